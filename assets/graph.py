"""The daily graph snapshot, which features and serving look accounts and domains up in.

What a snapshot is, and when one is due, is `redqueen.graph`; the numbers are `redqueen.graphmath`.
"""

import time
from datetime import date
from typing import Any

import polars as pl
from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetDep,
    AssetExecutionContext,
    MaterializeResult,
    MetadataValue,
    TableRecord,
    TimeWindowPartitionMapping,
    asset,
)

from assets import expectations
from assets.common import OWNERS, RETRY, freshness
from assets.environment import Environment
from assets.ingest import events
from assets.partitions import daily, days_of
from redqueen import graph
from redqueen.errors import InvalidInput


@asset(
    partitions_def=daily,
    # A day's snapshot is made from the hours of the day before; see `partitions.daily`.
    deps=[AssetDep(events, partition_mapping=TimeWindowPartitionMapping(start_offset=-1, end_offset=-1))],
    group_name="features",
    owners=OWNERS,
    kinds={"polars", "scipy"},
    tags={"stage": "features"},
    code_version=graph.VERSION,
    freshness_policy=freshness(fail_hours=30, warn_hours=26),
    retry_policy=RETRY,
    check_specs=[
        AssetCheckSpec(
            "graph_as_of",
            asset="graph_snapshot",
            description="Nothing was counted that reached us, or was answered, at the midnight or later.",
        ),
        *expectations.check_specs("graph_snapshot", "the graph snapshot"),
    ],
)
def graph_snapshot(
    context: AssetExecutionContext, env: Environment, config: expectations.Showing
) -> MaterializeResult:
    """Who writes to whom and is answered, who shares machines, who moves in lockstep, whom trust reaches, and
    how long each domain has been known: as of the midnight that begins the day.

    Written once: a snapshot that is there is left as it is, because scores were made with it. Without one the
    graph features of the day are missing (NaN) and the detector does without; materialize the day to get it.
    """
    began, now = time.monotonic(), env.clock.now()
    ahead = [day for day in days_of(context) if graph.midnight(day) > now]
    if ahead:
        # Written once, it would say for ever that nobody had written to anybody in the rest of today.
        raise InvalidInput(
            f"{ahead[0]} has not begun (it is {now:%Y-%m-%d %H:%M} UTC): wait for its midnight"
        )
    markers = {day: graph.build(env.store, day) for day in days_of(context)}
    newest = markers[max(markers)]
    rows = pl.concat(graph.rows_of(env.store, marker) for marker in markers.values())
    shown, checks = expectations.judge(env, context, "graph", rows, config, asset="graph_snapshot")
    late = [day for day, marker in markers.items() if not graph.as_of_holds(marker)]
    return MaterializeResult(
        metadata={
            **_metadata(newest),
            "days": len(markers),
            "seconds": round(time.monotonic() - began, 3),
            **shown,
        },
        check_results=[
            AssetCheckResult(
                check_name="graph_as_of",
                passed=not late,
                severity=AssetCheckSeverity.ERROR,
                metadata=_instants(newest) | {"days_that_fail": _listed(late)},
            ),
            *checks,
        ],
    )


def _metadata(marker: dict[str, Any]) -> dict[str, Any]:
    facts = marker["facts"]
    groups = [
        TableRecord({"group": place, "accounts": size})
        for place, size in enumerate(facts["lockstep_groups"], start=1)
    ]
    counts = {name: value for name, value in facts.items() if name != "lockstep_groups"}
    return {
        "dagster/partition_row_count": facts["accounts"],
        "as_of": marker["as_of"],
        **counts,
        "largest_lockstep_groups": MetadataValue.table(groups) if groups else "none",
    }


def _instants(marker: dict[str, Any]) -> dict[str, str]:
    return {name: marker[name] or "none" for name in ("as_of", "latest_received", "latest_answer")}


def _listed(days: list[date]) -> str:
    return ", ".join(f"{day}" for day in days) or "none"
