"""Where data enters: what landed in the store becomes checked tables; what cannot be used goes to quarantine.

Producers drop files under `events/dt=/hr=/` and `labels/dt=/hr=/`, by the hour of arrival. These two assets
read one hour's files, refuse rows that break the contract with a reason, and write the rest to `ingested/`.
Rules for rows are in `redqueen.ingest`; what is expected of the batch as a whole is in `assets.expectations`.
An hour may be taken in as often as one likes: a row that another hour took in is a counted copy.
"""

from collections import Counter
from datetime import datetime

import polars as pl
from dagster import AssetExecutionContext, MaterializeResult

from assets import expectations
from assets.common import hourly_asset
from assets.environment import Environment
from assets.partitions import hours_of
from redqueen import arrivals, erasure, ingest, quarantine, retention, tombstones, truth
from redqueen.schema import polars_schema
from redqueen.tables import HOUR, read_hours, write_part


def _take_in(env: Environment, table: str, hours: list[datetime]) -> tuple[pl.DataFrame, dict[str, int]]:
    """Take in each hour of `table`; returns all clean rows and the counts to show."""
    counts = Counter(
        dict.fromkeys(("rows", "refused", "unreadable_files", "duplicates", "known_from_other_hours"), 0)
    )
    frames = []
    purged = retention.purged_until(env.store, table)
    erased = tombstones.load(env.store)
    for hour in hours:
        if purged is not None and hour < purged:
            # What landed is gone: made again from nothing, the hour would lose what passed.
            frames.append(read_hours(env.store, f"ingested/{table}", hour, hour + HOUR))
            counts["purged_hours"] += 1
            continue
        frames.append(_take_in_hour(env, table, hour, erased, counts))
    empty = pl.DataFrame(schema=polars_schema(table))
    return pl.concat([empty, *(frame for frame in frames if frame.height)]), dict(counts)


def _take_in_hour(
    env: Environment, table: str, hour: datetime, erased: tombstones.Tombstones, counts: Counter[str]
) -> pl.DataFrame:
    store = env.store
    files = arrivals.landed(store, table, hour)
    landed = ingest.read_landed(store, table, hour, files)
    outcome = ingest.take_in(store, landed.rows, table, hour, env.clock.now(), env.settings.policies, erased)
    quarantine.refuse(store, table, hour, outcome.refused)
    quarantine.refuse_files(store, table, hour, landed.unreadable)
    before = read_hours(store, f"ingested/{table}", hour, hour + HOUR) if table == "labels" else outcome.clean
    changed = not outcome.clean.equals(before)
    # What a later hour learnt from the labels of this one, or without them, is no longer true. Twice, because
    # a kill may come between, and somebody may learn meanwhile.
    if changed:
        truth.forget(store, hour)
    write_part(store, f"ingested/{table}", hour, outcome.clean)
    if changed:
        truth.forget(store, hour)
    # What was erased came back: the refusal is kept, what was sent is not.
    erasure.scrub(store, outcome.erased_in, erased)
    arrivals.note(store, table, hour, files)
    counts["rows"] += outcome.clean.height
    counts["refused"] += outcome.refused.height
    counts["duplicates"] += outcome.duplicates
    counts["known_from_other_hours"] += outcome.known
    counts["unreadable_files"] += len(landed.unreadable)
    return outcome.clean


def _materialize(
    context: AssetExecutionContext, env: Environment, table: str, config: expectations.Showing
) -> MaterializeResult:
    rows, counts = _take_in(env, table, hours_of(context))
    context.log.info(f"{table}: {counts}")
    shown, checks = expectations.judge(env, context, table, rows, config, asset=table)
    return MaterializeResult(
        metadata={"dagster/partition_row_count": rows.height, **counts, **shown}, check_results=checks
    )


@hourly_asset(
    "ingest",
    kinds={"parquet", "greatexpectations"},
    code_version="1",
    check_specs=expectations.check_specs("events", "events"),
)
def events(
    context: AssetExecutionContext, env: Environment, config: expectations.Showing
) -> MaterializeResult:
    """Messages, friend requests and joins that arrived in the hour, checked.

    If `refused` jumps, a producer changed its format: see `quarantine/events/` for rows and reasons. Nothing
    is lost; fix the producer and materialize the hour again.
    """
    return _materialize(context, env, "events", config)


@hourly_asset(
    "ingest",
    kinds={"parquet", "greatexpectations"},
    code_version="1",
    check_specs=expectations.check_specs("labels", "labels"),
)
def labels(
    context: AssetExecutionContext, env: Environment, config: expectations.Showing
) -> MaterializeResult:
    """Judgements that reached us in the hour, from moderators, reports, appeals, honeypots, vendors and the
    audit slice.

    Few rows here means the loop is going blind: evasion cannot be measured and no retrain may start.
    """
    result = _materialize(context, env, "labels", config)
    # What was learnt from the rows that these hours held before is void.
    truth.forget(env.store, min(hours_of(context)))
    return result
