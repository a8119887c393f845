"""Asking people to judge, and what their judgements say of the detector.

Who is asked what, and how the answers are weighed, is in `redqueen.review`; the answers themselves arrive as
labels (`assets.ingest`).
"""

import io
import math
from datetime import datetime, timedelta
from typing import Any

import polars as pl
import pyarrow.parquet as pq
from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    MaterializeResult,
    MetadataValue,
    TableRecord,
)

from assets import expectations
from assets.campaigns import campaigns
from assets.common import hourly_asset
from assets.environment import Environment
from assets.ingest import events, labels
from assets.monitoring import served
from assets.partitions import hours_of
from redqueen import review, state
from redqueen import signals as watching
from redqueen.store import ObjectStore
from redqueen.tables import HOUR, hour_key, hours_between, read_hours, write_part

SPAN = timedelta(hours=24)
"""How much matured traffic an estimate is made of."""

TOO_WIDE = 0.5
"""A recall interval wider than this says nothing."""


def estimates_key(window: datetime) -> str:
    """Where a window's estimates are kept."""
    return f"estimates/window={window:%Y-%m-%dT%H}.json"


@hourly_asset(
    "labels",
    deps=[events, campaigns],
    kinds={"polars", "greatexpectations"},
    code_version="2",
    check_specs=expectations.check_specs("review_requests", "review requests", quality=False),
)
def review_requests(
    context: AssetExecutionContext, env: Environment, config: expectations.Showing
) -> MaterializeResult:
    """Messages that people are asked to judge: a random audit slice whatever the score, then two of each
    campaign nobody has seen before, then what was acted on and the doubtful ones.

    The audit slice is what recall is measured on without the detector's own bias; it must never be switched
    off.
    """
    counts = dict.fromkeys(review.REASONS, 0)
    frames = []
    for hour in hours_of(context):
        asked = _ask(env, hour)
        write_part(env.store, "review", hour, asked)
        frames.append(asked)
        for reason, count in asked["reason"].value_counts().iter_rows():
            counts[reason] += count
    rows = pl.concat(frames)
    shown, checks = expectations.judge(env, context, "review", rows, config, asset="review_requests")
    return MaterializeResult(
        metadata={"dagster/partition_row_count": rows.height, **counts, **shown}, check_results=checks
    )


def _ask(env: Environment, hour: datetime) -> pl.DataFrame:
    """The requests of one hour, within what is left of its day's budget."""
    settings = env.settings
    most = settings.review_budget_per_hour
    per_day = settings.review_budget_per_day
    seen = read_hours(env.store, "predictions", hour, hour + HOUR)
    campaigns = read_hours(env.store, "campaigns", hour, hour + HOUR)
    return review.review_requests(
        read_hours(env.store, "ingested/events", hour, hour + HOUR),
        None if seen.is_empty() else watching.answered(seen),
        salt=settings.salt,
        audit_rate=settings.audit_rate,
        budget=review.allotment(
            hour.hour,
            _asked_on(env.store, hour),
            per_day=24 * most if per_day is None else per_day,
            per_hour=most,
        ),
        severe=settings.severe,
        campaigns=None if campaigns.is_empty() else campaigns,
    )


def _asked_on(store: ObjectStore, hour: datetime) -> dict[int, int]:
    """Requests made so far on the day of `hour`, by hour of the day."""
    counts: dict[int, int] = {}
    for key in store.list(f"review/dt={hour:%Y-%m-%d}/"):
        of = int(key.split("/hr=")[1][:2])
        counts[of] = counts.get(of, 0) + pq.read_metadata(io.BytesIO(store.get(key).data)).num_rows
    return counts


@hourly_asset(
    "monitoring",
    deps=[review_requests, served, labels],
    kinds={"polars"},
    code_version="1",
    check_specs=[
        AssetCheckSpec(
            "audit_slice_suffices",
            asset="audit_estimates",
            description="Enough of what was asked has been judged to say what the detector misses.",
        )
    ],
)
def audit_estimates(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """Recall, precision and prevalence of the last matured day, each with a 95% interval, from what reviewers
    judged, weighed by the chance with which they were asked.

    Free of the detector's own bias, and late by the time that labels take. Where `recall_low` is high, little
    is missed; where the check warns, reviewers' answers have stopped or the audit slice is too thin.
    """
    for window in hours_of(context):
        found, hours = _estimate(env, window)
    return MaterializeResult(
        metadata={
            "verdict": _verdict(found),
            "requested": found.requested,
            "judged": found.judged,
            "judged_abuse": found.overall.n_abuse,
            "from": f"{hours[0]:%Y-%m-%d %H}h",
            "to": f"{hours[-1]:%Y-%m-%d %H}h",
            **found.overall.figures(),
            "policies": MetadataValue.table([_line(name, rates) for name, rates in found.policies.items()]),
        },
        check_results=[_suffices(found)],
    )


def _estimate(env: Environment, window: datetime) -> tuple[review.Estimates, list[datetime]]:
    """Count the hour that matured with this window, and write what it and the hours before it say.

    Only that hour is read: the records of earlier windows hold the counts of theirs.
    """
    maturity = timedelta(hours=math.ceil(env.settings.maturity_hours)) + HOUR
    newest = window - maturity + HOUR
    hours = hours_between(newest + HOUR - SPAN, newest + HOUR)
    counts = [_known(env, hour, hour + maturity - HOUR) for hour in hours[:-1]]
    counts.append(_count(env, newest, known_by=window + HOUR))
    found = review.estimate(
        sum(counts, review.Tally()), env.settings.policies, label_error=env.settings.label_error
    )
    record = {
        "window": window.isoformat(),
        "hour": newest.isoformat(),
        "hours": len(hours),
        "tally": counts[-1].to_dict(),
        **found.to_dict(),
    }
    env.store.put_json(estimates_key(window), record)
    return found, hours


def _known(env: Environment, hour: datetime, window: datetime) -> review.Tally:
    """The counts of an hour as its own window wrote them; made again where that window was never run."""
    record = state.read(env.store, estimates_key(window))
    # The hour differs where the maturity was another one then.
    if record.get("hour") == hour.isoformat():
        return review.Tally.from_dict(record["tally"])
    return _count(env, hour, known_by=window + HOUR)


def _count(env: Environment, hour: datetime, *, known_by: datetime) -> review.Tally:
    """The counts of one hour's requests, from every label known by an instant."""
    asked = read_hours(env.store, "review", hour, hour + HOUR)
    if asked.is_empty():
        return review.Tally()
    answers = _columns(
        env.store, "served", hour, hour + HOUR,
        ("event_id", "arm", "model_id", "action", "threshold_ratio", "scores"), asked["event_id"],
    )  # fmt: skip
    if not answers.is_empty():
        # What no model answered is no miss of a detector.
        answers = watching.answered(answers).filter(pl.col("model_id") != "none")
    votes = _columns(
        env.store, "ingested/labels", hour, known_by,
        ("event_id", "policy", "value", "source"), asked["event_id"],
    )  # fmt: skip
    return review.tally(asked, answers, votes, env.settings.policies)


def _columns(
    store: ObjectStore, table: str, start: datetime, end: datetime, names: tuple[str, ...], events: pl.Series
) -> pl.DataFrame:
    """Some columns of some events: a day of whole tables would cost more than all the rest."""
    wanted = events.to_list()
    frames = [
        pl.read_parquet(io.BytesIO(store.get(key).data), columns=list(names)).filter(
            pl.col("event_id").is_in(wanted)
        )
        for hour in hours_between(start, end)
        for key in store.list(hour_key(table, hour))
        if key.endswith(".parquet")
    ]
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


def _verdict(found: review.Estimates) -> str:
    recall, precision = found.overall.recall, found.overall.precision
    if not found.requested:
        return "no model answered what was asked about: nothing to estimate yet"
    if recall is None:
        return f"{found.judged} of {found.requested} requests were judged, none of them abuse"
    told = f"recall {recall.value:.2f} ({recall.low:.2f} to {recall.high:.2f})"
    if precision is not None:
        told += f", precision {precision.value:.2f} ({precision.low:.2f} to {precision.high:.2f})"
    return f"{told}, from {found.judged} judgements"


def _suffices(found: review.Estimates) -> AssetCheckResult:
    recall = found.overall.recall
    thin = found.requested > 0 and (recall is None or recall.width > TOO_WIDE)
    said = (
        f"the audit slice is too thin: {found.judged} of {found.requested} requests were judged, "
        f"{found.overall.n_abuse} of them abuse. Do reviewers' answers arrive? Else raise RQ_AUDIT_RATE"
    )
    return AssetCheckResult(
        check_name="audit_slice_suffices",
        passed=not thin,
        severity=AssetCheckSeverity.WARN,
        metadata={"verdict": said if thin else _verdict(found), "judged": found.judged},
    )


def _line(policy: str, rates: review.Rates) -> TableRecord:
    def told(interval: review.Interval | None) -> str:
        return (
            "-" if interval is None else f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
        )

    shown: dict[str, Any] = {"policy": policy, "judged abuse": rates.n_abuse}
    return TableRecord(
        shown
        | {
            "recall": told(rates.recall),
            "precision": told(rates.precision),
            "prevalence": told(rates.prevalence),
        }
    )
