"""What watches for midnight: the graph snapshot is due once the last hour of the day before was taken in."""

from __future__ import annotations

import json
from datetime import date, datetime

from dagster import RunRequest, SensorEvaluationContext, SensorResult, SkipReason

from assets.environment import Environment
from assets.partitions import day_partition
from redqueen import graph
from redqueen.tables import landed_hours
from sensors.common import run_tags, watcher


@watcher(
    job="graph",
    description="Builds the graph snapshot once a day, when the last hour before midnight was taken in. "
    "Days missed by a daemon that was down are made up for, up to a week.",
)
def daily_graph(context: SensorEvaluationContext, env: Environment) -> SensorResult | SkipReason:
    """Request the days whose snapshot is due; once an hour again while a run does not bring them about."""
    now = env.clock.now()
    today = f"{now:%Y-%m-%d}"
    if not env.settings.behaviour:
        return SkipReason("this stream has no senders (RQ_BEHAVIOUR=false), so there is no graph")
    if context.cursor and json.loads(context.cursor)["there"] == today:
        return SkipReason(f"the snapshot of {today} is there")
    made = [day for day in graph.recent_days(now) if graph.complete(env.store, day)]
    start = env.settings.partitions_start
    landed, taken_in = (
        [hour for hour in landed_hours(env.store, table) if hour >= start]
        for table in ("events", "ingested/events")
    )
    days, why = graph.due_days(now, landed, taken_in, made)
    there = today if now.date() in made else None
    cursor = json.dumps({"there": there, "why": why})
    if not days:
        return SensorResult(skip_reason=why, cursor=cursor)
    return SensorResult(run_requests=[_request(days, why, now)], cursor=cursor)


def _request(days: list[date], why: str, now: datetime) -> RunRequest:
    """One run for all: days build on one another."""
    partitions = {"dagster/partition": day_partition(days[0])}
    if len(days) > 1:
        partitions = {
            "dagster/asset_partition_range_start": day_partition(days[0]),
            "dagster/asset_partition_range_end": day_partition(days[-1]),
        }
    return RunRequest(
        # The hour is in the key: a key is spent for ever, failures included, and a failed day comes again.
        run_key=f"graph:{days[0]}:{days[-1]}:{now:%Y-%m-%dT%H}",
        tags={**partitions, **run_tags(now, why)},
    )
