"""From judgements to truth one can train on, and from doubt to requests for judgement.

`gold_labels` is as of an instant and belongs to a candidate; `review_requests` belongs to the hour. How votes
become a probability is in `redqueen.labels`; who is asked to judge what is in `redqueen.review`.
"""

from datetime import UTC, datetime

import polars as pl
from dagster import AssetExecutionContext, Config, MaterializeResult, asset
from pydantic import Field

from assets.common import OWNERS, RETRY, freshness
from assets.environment import Environment
from assets.ingest import events, labels
from assets.partitions import candidates, hourly, hours_of
from redqueen import labels as truth
from redqueen import review, state
from redqueen.clock import hour_of
from redqueen.errors import InvalidInput
from redqueen.store import to_parquet
from redqueen.tables import HOUR, landed_hours, read_hours, read_keys, write_part


class AsOf(Config):
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
    deps=[labels, events],
    group_name="labels",
    owners=OWNERS,
    kinds={"polars"},
    tags={"stage": "labels"},
    code_version="1",
    retry_policy=RETRY,
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
    end = hour_of(as_of) + HOUR
    hours = landed_hours(env.store, "ingested/labels")
    votes = read_hours(env.store, "ingested/labels", hours[0], end) if hours else pl.DataFrame()
    if votes.is_empty():
        raise InvalidInput(f"no label had reached us by {as_of:%Y-%m-%d %H:%M} UTC: choose a later as_of")
    gold = truth.gold(
        votes, as_of=as_of, policies=env.settings.policies, maturity_hours=env.settings.maturity_hours
    )
    env.store.put(gold_key(candidate), to_parquet(gold.to_arrow()))
    by_source = votes.filter(pl.col("received_at") <= as_of)["source"].value_counts(sort=True)
    return MaterializeResult(
        metadata={
            "as_of": as_of.isoformat(),
            "judged_events": gold["event_id"].n_unique(),
            "abusive_events": gold.filter(pl.col("p_abuse") >= 0.5)["event_id"].n_unique(),
            "mature_share": round(float(gold["mature"].sum()) / max(gold.height, 1), 4),
            **{f"votes_{row['source']}": row["count"] for row in by_source.iter_rows(named=True)},
        }
    )


@asset(
    partitions_def=hourly,
    deps=[events],
    group_name="labels",
    owners=OWNERS,
    kinds={"polars"},
    tags={"stage": "labels"},
    code_version="1",
    freshness_policy=freshness(fail_hours=6, warn_hours=3),
    retry_policy=RETRY,
)
def review_requests(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """Messages that people are asked to judge: a random audit slice whatever the score, then the doubtful
    ones.

    The audit slice is what recall is measured on without the detector's own bias; it must never be switched
    off.
    """
    counts = {"audit": 0, "uncertain": 0, "acted_on": 0}
    for hour in hours_of(context):
        rows = read_hours(env.store, "ingested/events", hour, hour + HOUR)
        served = read_keys(env.store, env.store.list(f"predictions/dt={hour:%Y-%m-%d}/hr={hour:%H}/"))
        asked = review.review_requests(
            rows,
            served if not served.is_empty() else None,
            salt=env.settings.salt,
            audit_rate=env.settings.audit_rate,
            budget=env.settings.review_budget_per_hour,
            severe=env.settings.severe,
        )
        write_part(env.store, "review", hour, asked)
        for reason, count in asked["reason"].value_counts().iter_rows():
            counts[reason] = counts.get(reason, 0) + count
    return MaterializeResult(metadata={"dagster/partition_row_count": sum(counts.values()), **counts})
