"""What watches the live detector: the answers serving gave, and the hour's one record of signals.

Figures and alarms are defined in `redqueen.drift`, `redqueen.adaptation` and `redqueen.signals`; what follows
from them is decided in `redqueen.policy`, asked by the sensors.
"""

import tempfile
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import polars as pl
from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    Config,
    MaterializeResult,
    MetadataValue,
    TableRecord,
)
from pydantic import Field

from assets import expectations
from assets.common import freshness, hourly_asset, picture
from assets.environment import Environment
from assets.ingest import events, labels
from assets.partitions import hours_of
from assets.poisoning import label_guard
from redqueen import poisoning, policy, state
from redqueen import signals as watching
from redqueen.drift import DriftFigures, Reference, drift_figures
from redqueen.errors import InvalidInput
from redqueen.features import NAMES
from redqueen.policy import LabelCounts
from redqueen.store import DirectoryStore
from redqueen.tables import HOUR, landed_hours, read_hours, write_part

PAST_WINDOWS = 72
LIMITS = policy.Limits()
PLOTTED = 12
"""Columns on the page of a window: the worst. A plot of each column would cost seconds every hour."""


def signals_key(window: datetime) -> str:
    """Where a window's record is kept."""
    return f"signals/window={window:%Y-%m-%dT%H}.json"


def reference_key(model_id: str) -> str:
    """Where a model's frozen reference is kept."""
    return f"references/{model_id}/reference.json"


@hourly_asset(
    "monitoring",
    deps=[events],
    kinds={"parquet"},
    code_version="1",
    check_specs=[
        AssetCheckSpec(
            "answers_sound",
            asset="served",
            description="No answer was given twice or in a degraded way, and nearly every message has one.",
        ),
        *expectations.check_specs("served", "predictions"),
    ],
)
def served(
    context: AssetExecutionContext, env: Environment, config: expectations.Showing
) -> MaterializeResult:
    """What the scoring service answered in the hour, each answer once.

    `degraded` above zero: a model or the features failed and a simpler answer was given; ask the service for
    its state. No rows at all while a model is live: the service is down or its log does not reach the store.
    """
    figures: dict[str, Any] = {"rows": 0, "duplicates": 0, "degraded": 0, "n_events": 0}
    frames = []
    for hour in hours_of(context):
        raw = read_hours(env.store, "predictions", hour, hour + HOUR)
        rows = watching.once(raw)
        figures["rows"] += rows.height
        figures["duplicates"] += raw.height - rows.height
        figures["n_events"] += read_hours(env.store, "ingested/events", hour, hour + HOUR).height
        if rows.height:
            write_part(env.store, "served", hour, rows)
            figures["degraded"] += int(rows["degraded"].sum())
            frames.append(rows)
    rows = pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()
    shown, checks = expectations.judge(env, context, "served", rows, config, asset="served")
    live = bool(frames) and (rows["model_id"] != "none").any()
    covered = watching.answered(rows).height / max(figures["n_events"], 1)
    sound = not live or (figures["degraded"] == 0 and covered >= watching.MIN_COVERAGE)
    return MaterializeResult(
        metadata={**figures, **_served_metadata(rows), **shown},
        check_results=[
            *checks,
            AssetCheckResult(
                check_name="answers_sound",
                passed=sound,
                severity=AssetCheckSeverity.WARN,
                metadata={"degraded": figures["degraded"], "covered": round(covered, 4)},
            ),
        ],
    )


def _served_metadata(rows: pl.DataFrame) -> dict[str, Any]:
    if rows.is_empty():
        return {"state": "nothing was scored in this hour"}
    actions = {f"action_{a}": n for a, n in watching.answered(rows)["action"].value_counts().iter_rows()}
    arms = [
        TableRecord({"model": model, "arm": arm, "answers": n})
        for model, arm, n in rows.group_by("model_id", "arm").len().sort("model_id", "arm").iter_rows()
    ]
    return {
        **actions,
        "latency_p50_us": int(rows["latency_us"].median() or 0),  # type: ignore[arg-type]
        "latency_p99_us": int(rows["latency_us"].quantile(0.99) or 0),
        "models": MetadataValue.table(arms),
    }


class Watching(Config):
    """What a person may ask for."""

    html: bool = Field(False, description="Write Evidently's HTML report even without an alarm.")


@hourly_asset(
    "monitoring",
    deps=[served, labels, label_guard],
    kinds={"evidently"},
    code_version="1",
    fresh=freshness(fail_hours=3, warn_hours=2),
    check_specs=[
        AssetCheckSpec("monitoring_healthy", asset="signals", description="The watchers can be believed."),
        AssetCheckSpec("no_alarm", asset="signals", description="Neither drift nor attackers' adaptation."),
    ],
)
def signals(context: AssetExecutionContext, env: Environment, config: Watching) -> MaterializeResult:
    """One record an hour: drift against the champion's reference, attackers' adaptation, health.

    This is what the sensors read. `evasion_rate` is the share of later-labelled abusers that got through;
    when it alarms, attackers have found a way around the live detector.
    """
    hours = hours_of(context)
    record = None
    for hour in hours:
        record = _watch(env, hour, html=config.html)
    assert record is not None
    healthy = record.signals.health == "ok"
    alarms = [alarm.sentence for alarm in record.signals.alarms]
    drift = record.signals.drift
    moved = list(drift.drifted) if drift else []
    return MaterializeResult(
        metadata=_signals_metadata(env, record),
        check_results=[
            AssetCheckResult(
                check_name="monitoring_healthy",
                passed=healthy,
                severity=AssetCheckSeverity.ERROR,
                metadata={"reason": record.signals.health_reason or "ok"},
            ),
            AssetCheckResult(
                check_name="no_alarm",
                passed=not alarms and not (drift is not None and policy.drifted(drift, LIMITS)),
                severity=AssetCheckSeverity.WARN,
                metadata={
                    "alarms": "; ".join(alarms) or "none",
                    # Some column always moves; an alarm takes as many as would ask for a retrain.
                    "drifted_columns": ", ".join(moved) or "none",
                },
            ),
        ],
    )


def _watch(env: Environment, hour: datetime, *, html: bool) -> watching.Watched:
    """Measure one window and write its record."""
    end = hour + HOUR
    if end > env.clock.now():
        # A record of the future would be the latest one, for all who look, until it is past.
        raise InvalidInput(f"the hour from {hour:%Y-%m-%d %H:%M} UTC is measured when it is over")
    trailing = watching.answered(read_hours(env.store, "served", end - watching.TRAILING, end))
    here = trailing.filter(pl.col("ts") >= hour) if trailing.height else trailing
    champion = _champion_of(here)
    past = _past(env, hour)
    figures = drift = frame = None
    counts = _counts(env, end)
    if champion is not None:
        votes = read_hours(env.store, "ingested/labels", end - watching.TRAILING, end)
        # Only what this champion answered: what a former one, or none, let through is not evasion of this
        # one.
        own = trailing.filter(pl.col("model_id") == champion)
        figures, missed = watching.adaptation_figures(
            own, votes, hour, env.settings.policies, env.settings.maturity,
            poisoning.effective_weights(env.store, end),
        )  # fmt: skip
        counts = replace(counts, missed=missed)
        reference = _reference(env, champion)
        rows = own.filter(pl.col("ts") >= hour)
        if reference is not None and not rows.is_empty():
            drift, frame = _drift(env, reference, rows, hour)
    live = state.rollout_state(env.store)
    known = any(w.signals.champion for w in past)
    record = watching.watch(
        hour, champion, figures, drift, past,
        n_events=read_hours(env.store, "ingested/events", hour, end).height,
        # Before the first model nobody answers; after it, an answer by no model is none.
        n_served=_by_a_model(here).height if known else here.height,
        counts=counts,
        stage=live.stage,
        expected=live.champion is not None and known,
    )  # fmt: skip
    if drift is not None and (html or record.signals.alarms or policy.drifted(drift, LIMITS)):
        assert reference is not None
        assert frame is not None
        _draw_page(env, reference, frame, drift, hour)
    env.store.put_json(signals_key(hour), record.to_dict())
    return record


def _reference(env: Environment, champion: str) -> Reference | None:
    """What the champion's traffic is held against; None until it was promoted."""
    stored = state.read(env.store, reference_key(champion))
    return Reference.from_dict(stored["reference"]) if stored else None


def _champion_of(rows: pl.DataFrame) -> str | None:
    """The model that answered most as champion; None while nothing is live."""
    if rows.is_empty():
        return None
    champions = _by_a_model(rows).filter(pl.col("arm") == "champion")["model_id"]
    return None if champions.is_empty() else str(champions.mode().sort()[0])


def _by_a_model(rows: pl.DataFrame) -> pl.DataFrame:
    """The answers that a model gave."""
    return rows.filter(pl.col("model_id") != "none") if rows.height else rows


def _past(env: Environment, hour: datetime) -> list[watching.Watched]:
    keys = [k for k in env.store.list("signals/window=") if k < signals_key(hour)]
    return [watching.Watched.from_dict(env.store.get_json(k)) for k in keys[-PAST_WINDOWS:]]


def _counts(env: Environment, until: datetime) -> LabelCounts:
    spent = state.read(env.store, state.LOOP_KEY).get("retrains", {}).values()
    since = max((datetime.fromisoformat(at) for at in spent), default=None)
    hours = landed_hours(env.store, "ingested/labels")
    start = since.replace(minute=0) if since else (hours[0] if hours else until)
    counted = watching.label_counts(
        read_hours(env.store, "ingested/labels", start, until), since, env.settings.trusted_sources
    )
    return replace(counted, suspect=poisoning.held_since(env.store, since or start, until))


def _drift(
    env: Environment, reference: Reference, rows: pl.DataFrame, hour: datetime
) -> tuple[DriftFigures, pl.DataFrame]:
    """Evidently's figures on frozen-bin codes, kept as JSON; and the frame that they are of."""
    from assets import drift_report

    frame = watching.drift_frame(rows, NAMES, env.settings.policies)
    scores = tuple(n for n in watching.score_columns(env.settings.policies) if n in reference.names)
    snapshot = drift_report.run(reference, frame)
    measured = {
        name: float(metric["value"])
        for name, metric in zip(reference.names, snapshot.dict()["metrics"], strict=True)
    }
    env.store.put(f"{_reports(hour)}/drift.json", snapshot.json().encode())
    return drift_figures(reference, frame, score_columns=scores, measured=measured), frame


def _reports(hour: datetime) -> str:
    return f"reports/window={hour:%Y-%m-%dT%H}"


def _draw_page(
    env: Environment, reference: Reference, frame: pl.DataFrame, figures: DriftFigures, hour: datetime
) -> None:
    """Evidently's page of the columns that moved most."""
    from assets import drift_report

    plotted = sorted(figures.psi, key=lambda name: -figures.psi[name])[:PLOTTED]
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / "drift.html"
        drift_report.run(reference, frame, plotted, plots=True).save_html(str(page))
        env.store.put(f"{_reports(hour)}/drift.html", page.read_bytes())


def _signals_metadata(env: Environment, record: watching.Watched) -> dict[str, Any]:
    found = record.signals
    verdict = "; ".join(alarm.sentence for alarm in found.alarms) or "no alarm"
    metadata: dict[str, Any] = {
        "verdict": verdict if found.health == "ok" else f"unknown: {found.health_reason}",
        "champion": found.champion or "none",
        "stage": record.stage,
        "n_events": record.n_events,
        "n_served": record.n_served,
        "new_trusted_labels": found.labels.new if found.labels else 0,
    }
    for name, figure in (found.figures.figures if found.figures else {}).items():
        if figure.value is not None:
            metadata[name] = round(figure.value, 4)
    if found.drift is not None:
        worst = sorted(found.drift.psi, key=lambda name: -found.drift.psi[name])[:10]  # type: ignore[union-attr]
        metadata |= {
            "drift_share": round(found.drift.share, 4),
            "score_psi": round(found.drift.score_psi, 4),
            "worst_columns": MetadataValue.table(
                [TableRecord({"column": n, "psi": round(found.drift.psi[n], 4)}) for n in worst]
            ),
        }
    key = f"{_reports(found.window)}/drift.html"
    if env.store.exists(key):
        metadata["drift_report"] = MetadataValue.url(report_url(env, key))
        metadata["psi_picture"] = picture(lambda axes: _draw_psi(axes, record))
    return metadata


def report_url(env: Environment, key: str) -> str:
    """Where a browser finds a report: the reports server of `make ui`, or the store's own address."""
    if isinstance(env.store, DirectoryStore):
        return f"{env.settings.reports_url}/{key.removeprefix('reports/')}"
    return env.store.url(key)


def _draw_psi(axes: Any, record: watching.Watched) -> None:
    drift = record.signals.drift
    assert drift is not None
    names = sorted(drift.psi, key=lambda name: drift.psi[name])[-10:]
    axes.barh(names, [drift.psi[n] for n in names], color="#b23a48")
    axes.axvline(drift.threshold, color="#30343f", linestyle=":")
    axes.set_xlabel("PSI against the champion's reference")
    axes.tick_params(labelsize=7)
