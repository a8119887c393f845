"""From judgements to truth one can train on, as of an instant and for a candidate.

How votes become a probability is in `redqueen.labels`, what is kept between days in `redqueen.truth`. Asking
for judgements is `assets.review`'s part, holding suspect ones `assets.poisoning`'s.
"""

import io
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
from dagster import AssetExecutionContext, Config, MaterializeResult, MetadataValue, TableRecord, asset
from pydantic import Field

from assets import expectations
from assets.common import OWNERS, RETRY
from assets.environment import Environment
from assets.ingest import events, labels
from assets.partitions import candidates
from assets.poisoning import label_guard
from redqueen import labels as votes
from redqueen import poisoning, state, truth
from redqueen.clock import hour_of
from redqueen.errors import InvalidInput
from redqueen.store import to_parquet
from redqueen.tables import HOUR, hour_key, hours_between

DELAYS_OVER = timedelta(days=7)
"""How far back it is measured how late labels come."""


class AsOf(expectations.Showing):
    """What a person may set when launching a lap by hand."""

    as_of: str | None = Field(
        None, description="Use only labels that had reached us by this instant (ISO 8601). Default: now."
    )


def gold_key(candidate: str) -> str:
    """Where a candidate's gold labels are kept."""
    return f"gold/candidate={candidate}/part.parquet"


def _instant(env: Environment, config: AsOf, candidate: str) -> datetime:
    """The instant of a candidate's snapshot: once chosen it stays, so that a killed lap continues the same
    one.
    """
    chosen = state.read(env.store, state.candidate_key(candidate)).get("as_of")
    wanted = config.as_of or chosen
    if wanted is None:
        return env.clock.now()
    try:
        instant = datetime.fromisoformat(wanted)
    except ValueError:
        raise InvalidInput(
            f"as_of '{wanted}' is not an ISO 8601 instant, such as 2026-01-03T14:00:00Z"
        ) from None
    return (instant if instant.tzinfo else instant.replace(tzinfo=UTC)).astimezone(UTC)


@asset(
    partitions_def=candidates,
    deps=[labels, events, label_guard],
    group_name="labels",
    owners=OWNERS,
    kinds={"polars", "greatexpectations"},
    tags={"stage": "labels"},
    code_version="2",
    retry_policy=RETRY,
    check_specs=expectations.check_specs("gold_labels", "gold labels", quality=False),
)
def gold_labels(context: AssetExecutionContext, env: Environment, config: AsOf) -> MaterializeResult:
    """What was abuse, as far as it was known at one instant: votes of all sources, weighed by reliability.

    The first step of a lap. Launched by hand it takes an `as_of`; nothing that reached us later is used,
    whatever date it carries.
    """
    candidate = context.partition_key
    as_of = _instant(env, config, candidate)
    now = env.clock.now()
    # "launched" is written before the work: only launched laps spend budget, and a second lap sees this one.
    record = state.read(env.store, state.candidate_key(candidate))
    if not record:
        trigger = context.run.tags.get("redqueen/trigger", "manual")
        reason = context.run.tags.get("redqueen/reason", "launched by hand")
        facts = {"as_of": as_of.isoformat(), "trigger": trigger, "created_at": now.isoformat()}
        state.advance_candidate(env.store, candidate, "launched", now, reason, run_id=context.run_id, **facts)
        state.spend_retrain(env.store, candidate, now)
    policies = env.settings.policies
    weights = poisoning.effective_weights(env.store, as_of)
    known, base = truth.known_at(env.store, as_of, policies, weights=weights)
    rows = known.rows()
    if rows.is_empty():
        raise InvalidInput(f"no label had reached us by {as_of:%Y-%m-%d %H:%M} UTC: choose a later as_of")
    gold = votes.ripe(known.items(), as_of, env.settings.maturity)
    env.store.put(gold_key(candidate), to_parquet(gold.to_arrow()))
    by_source = rows.unique("label_id")["source"].value_counts(sort=True)
    shown, checks = expectations.judge(env, context, "gold", gold, config, asset="gold_labels")
    return MaterializeResult(
        check_results=checks,
        metadata={
            **shown,
            "as_of": as_of.isoformat(),
            "how": _how(base),
            "judged_events": gold["event_id"].n_unique(),
            "abusive_events": gold.filter(pl.col("p_abuse") >= 0.5)["event_id"].n_unique(),
            "mature_share": round(float(gold["mature"].sum()) / max(gold.height, 1), 4),
            "held_labels": rows.filter(pl.col("guard") == 0)["label_id"].n_unique(),
            "disagreement": round(float(gold["disagreement"].mean() or 0.0), 4),  # type: ignore[arg-type]
            "source_errors": _table(votes.source_errors(known.learnt, known.how)),
            "delays": _table(_delays(env, rows, as_of)),
            **{f"votes_{row['source']}": row["count"] for row in by_source.iter_rows(named=True)},
        },
    )


def _delays(env: Environment, rows: pl.DataFrame, as_of: datetime) -> pl.DataFrame:
    """How late labels came lately, with how long mature is taken to be: what to set that by."""
    since = as_of - DELAYS_OVER
    prefixes = [hour_key("ingested/events", h) for h in hours_between(hour_of(since), hour_of(as_of) + HOUR)]
    landed = {key for day in sorted({p.rsplit("hr=", 1)[0] for p in prefixes}) for key in env.store.list(day)}
    blobs = [io.BytesIO(env.store.get(key).data) for key in sorted(landed) if key.startswith(tuple(prefixes))]
    happened = [pl.read_parquet(blob, columns=["event_id", "ts"]) for blob in blobs]
    lately = rows.filter(pl.col("received_at") > since)
    found = votes.delays(lately, pl.concat(happened) if happened else None, env.settings.policies)
    matures = pl.col("policy").replace_strict(env.settings.maturity, return_dtype=pl.Float64)
    return found.with_columns(matures_after=matures)


def _table(rows: pl.DataFrame) -> Any:
    """A small frame for the UI."""
    rounded = rows.with_columns(pl.selectors.float().round(4))
    records = [
        TableRecord({name: "" if value is None else value for name, value in row.items()})
        for row in rounded.iter_rows(named=True)
    ]
    return MetadataValue.table(records) if records else MetadataValue.text("nothing to compare yet")


class Refit(Config):
    """What a person may set when launching it by hand."""

    refit: bool = Field(False, description="Fit anew from all labels instead of adding the news.")


@asset(
    deps=[labels, label_guard],
    group_name="labels",
    owners=OWNERS,
    kinds={"polars"},
    tags={"stage": "labels"},
    code_version="1",
    retry_policy=RETRY,
)
def truth_state(context: AssetExecutionContext, env: Environment, config: Refit) -> MaterializeResult:
    """How reliable each rater and source has proved, and what each judged event is held to be, as of the
    hour.

    Once a day with the news, once a week from all labels. A lap starts from it instead of reading the labels
    of all time; without it, or when it is void, the lap does so itself. Delete `truth/` whenever you like.
    """
    hour = hour_of(env.clock.now())
    policies = env.settings.policies
    weights = poisoning.effective_weights(env.store, hour)
    known, base = truth.known_at(env.store, hour, policies, weights=weights, refit=config.refit)
    if base is None or base.as_of < hour:
        truth.save(env.store, known, base)
    return MaterializeResult(
        metadata={
            "as_of": hour.isoformat(),
            "how": _how(base),
            "dagster/row_count": known.size(),
            "raters": known.learnt.records["rater_id"].n_unique(),
            "source_errors": _table(votes.source_errors(known.learnt, known.how)),
            "pruned_states": truth.prune(env.store),
        }
    )


def _how(base: truth.TruthState | None) -> str:
    return (
        "fitted from all labels" if base is None else f"the news since {base.as_of:%Y-%m-%d %H:%M} UTC added"
    )
