"""Where data enters: what landed in the store becomes checked tables; what cannot be used goes to quarantine.

Producers drop files under `events/dt=/hr=/` and `labels/dt=/hr=/`, by the hour of arrival. These two assets
read one hour's files, refuse rows that break the contract with a reason, and write the rest to `ingested/`.
Rules for rows are in `redqueen.ingest`; what is expected of the batch as a whole is in `assets.expectations`.
"""

from datetime import datetime

import polars as pl
from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    FreshnessPolicy,
    MaterializeResult,
    asset,
)

from assets.common import OWNERS, RETRY, freshness
from assets.environment import Environment
from assets.partitions import hourly, hours_of
from redqueen import ingest, quarantine
from redqueen.tables import write_part

FRESH: FreshnessPolicy = freshness(fail_hours=6, warn_hours=3)


def _take_in(env: Environment, table: str, hours: list[datetime]) -> tuple[pl.DataFrame, dict[str, int]]:
    """Conform and write each hour of `table`; returns all clean rows and the counts to show."""
    counts = {"rows": 0, "refused": 0, "unreadable_files": 0, "duplicates": 0}
    frames = []
    for hour in hours:
        landed = ingest.read_landed(env.store, table, hour)
        outcome = ingest.conform(landed.rows, table, hour, env.clock.now())
        quarantine.refuse(env.store, table, hour, outcome.refused)
        quarantine.refuse_files(env.store, table, hour, landed.unreadable)
        write_part(env.store, f"ingested/{table}", hour, outcome.clean)
        counts["rows"] += outcome.clean.height
        counts["refused"] += outcome.refused.height
        counts["duplicates"] += outcome.duplicates
        counts["unreadable_files"] += len(landed.unreadable)
        frames.append(outcome.clean)
    return pl.concat(frames), counts


def _expectations(rows: pl.DataFrame, table: str) -> list[AssetCheckResult]:
    """Great Expectations' verdict on the batch: one blocking check, one that only warns."""
    from assets import expectations

    result = expectations.validate(rows, table)
    blocking = [row for row in result.rows if row.severity == "error"]
    warning = [row for row in result.rows if row.severity != "error"]
    return [
        AssetCheckResult(
            check_name=f"{table}_expectations",
            passed=all(row.success for row in blocking),
            severity=AssetCheckSeverity.ERROR,
            metadata=expectations.metadata(blocking),
        ),
        AssetCheckResult(
            check_name=f"{table}_quality",
            passed=all(row.success for row in warning),
            severity=AssetCheckSeverity.WARN,
            metadata=expectations.metadata(warning),
        ),
    ]


def _materialize(context: AssetExecutionContext, env: Environment, table: str) -> MaterializeResult:
    rows, counts = _take_in(env, table, hours_of(context))
    context.log.info(f"{table}: {counts}")
    return MaterializeResult(
        metadata={"dagster/partition_row_count": rows.height, **counts},
        check_results=_expectations(rows, table),
    )


@asset(
    partitions_def=hourly,
    group_name="ingest",
    owners=OWNERS,
    kinds={"parquet", "greatexpectations"},
    tags={"stage": "ingest"},
    code_version="1",
    freshness_policy=FRESH,
    retry_policy=RETRY,
    check_specs=[
        AssetCheckSpec(
            "events_expectations", asset="events", blocking=True, description="Contract of events."
        ),
        AssetCheckSpec("events_quality", asset="events", description="Worth a look, stops nothing."),
    ],
)
def events(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """Messages, friend requests and joins that arrived in the hour, checked.

    If `refused` jumps, a producer changed its format: see `quarantine/events/` for rows and reasons. Nothing
    is lost; fix the producer and materialize the hour again.
    """
    return _materialize(context, env, "events")


@asset(
    partitions_def=hourly,
    group_name="ingest",
    owners=OWNERS,
    kinds={"parquet", "greatexpectations"},
    tags={"stage": "ingest"},
    code_version="1",
    freshness_policy=FRESH,
    retry_policy=RETRY,
    check_specs=[
        AssetCheckSpec(
            "labels_expectations", asset="labels", blocking=True, description="Contract of labels."
        ),
        AssetCheckSpec("labels_quality", asset="labels", description="Worth a look, stops nothing."),
    ],
)
def labels(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """Judgements that reached us in the hour, from moderators, reports, appeals, honeypots and the audit
    slice.

    Few rows here means the loop is going blind: evasion cannot be measured and no retrain may start.
    """
    return _materialize(context, env, "labels")
