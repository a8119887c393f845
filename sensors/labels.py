"""What watches arrivals: closed hours to take in, and enough labels for a first model."""

from __future__ import annotations

import hashlib
import json
from datetime import datetime, timedelta

import polars as pl
from dagster import (
    DefaultSensorStatus,
    RunRequest,
    SensorEvaluationContext,
    SensorResult,
    SkipReason,
    sensor,
)

from assets.environment import Environment
from assets.partitions import partition_of
from redqueen import state
from redqueen.clock import hour_of
from redqueen.settings import load_settings
from redqueen.signals import label_counts
from redqueen.store import ObjectStore
from redqueen.tables import HOUR, hour_key, landed_hours, read_hours
from sensors.asking import ask, latest_signals

INTERVAL = load_settings().sensor_interval_seconds
LATE_HOURS = 6
"""Files may arrive late for this long and still be taken in by themselves."""

MOST_RUNS = 4
"""Hours requested one by one in a tick; a longer backlog is caught up in one run over a range."""

LANDINGS = ("events", "labels", "predictions")


def _digest(store: ObjectStore, hour: datetime) -> str:
    """What has landed in an hour, as a short hash; a late file changes it."""
    names = [key for table in LANDINGS for key in store.list(hour_key(table, hour))]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12] if names else ""


def _due(store: ObjectStore, now: datetime, seen: dict[str, str]) -> dict[datetime, str]:
    """Closed hours with something new in them, by what has landed."""
    current = hour_of(now)
    oldest = min((datetime.fromisoformat(h) for h in seen), default=None)
    horizon = current - LATE_HOURS * HOUR if oldest is not None else datetime.min.replace(tzinfo=now.tzinfo)
    newest = max((datetime.fromisoformat(h) for h in seen), default=horizon)
    # Hours after the newest taken in are due however old: a daemon that was down for a day must catch up.
    hours = [
        h for t in LANDINGS for h in landed_hours(store, t) if h < current and (h >= horizon or h > newest)
    ]
    digests = {hour: _digest(store, hour) for hour in sorted(set(hours))}
    return {
        hour: digest for hour, digest in digests.items() if digest and seen.get(hour.isoformat()) != digest
    }


@sensor(
    name="label_arrival",
    job_name="hour",
    minimum_interval_seconds=INTERVAL,
    default_status=DefaultSensorStatus.RUNNING,
    description="Takes in each hour once it is over: events, labels and served predictions that landed. A "
    "late file makes its hour run again.",
)
def label_arrival(context: SensorEvaluationContext, env: Environment) -> SensorResult | SkipReason:
    """Request the job `hour` for every closed hour with new files."""
    now = env.clock.now()
    seen: dict[str, str] = json.loads(context.cursor)["taken_in"] if context.cursor else {}
    due = _due(env.store, now, seen)
    if not due:
        return SkipReason(f"nothing new has landed in a closed hour (it is {now:%Y-%m-%d %H:%M} UTC)")
    hours = sorted(due)
    kept = dict(sorted({**seen, **{h.isoformat(): d for h, d in due.items()}}.items())[-2 * LATE_HOURS :])
    why = f"took in {len(hours)} hour(s) up to {hours[-1]:%m-%d %H}h"
    requests = [_one(hour, due[hour], now) for hour in hours]
    if len(hours) > MOST_RUNS:
        requests = [_range(hours, due, now)]
    return SensorResult(run_requests=requests, cursor=json.dumps({"why": why, "taken_in": kept}))


def _tags(now: datetime, reason: str) -> dict[str, str]:
    return {"redqueen/sim_time": f"{now:%Y-%m-%d %H:%M}", "redqueen/reason": reason}


def _one(hour: datetime, digest: str, now: datetime) -> RunRequest:
    return RunRequest(
        run_key=f"hour:{hour:%Y-%m-%dT%H}:{digest}",
        partition_key=partition_of(hour),
        tags=_tags(now, "files landed in this hour"),
    )


def _range(hours: list[datetime], due: dict[datetime, str], now: datetime) -> RunRequest:
    """One run over the whole backlog: 48 hours take seconds so, and half a minute one by one."""
    together = hashlib.sha256("".join(due[h] for h in hours).encode()).hexdigest()[:12]
    return RunRequest(
        run_key=f"hours:{hours[0]:%Y-%m-%dT%H}:{hours[-1]:%Y-%m-%dT%H}:{together}",
        tags={
            **_tags(now, f"catching up on {len(hours)} hours"),
            "dagster/asset_partition_range_start": partition_of(hours[0]),
            "dagster/asset_partition_range_end": partition_of(hours[-1]),
        },
    )


@sensor(
    name="first_lap",
    job_name="lap",
    minimum_interval_seconds=INTERVAL,
    default_status=DefaultSensorStatus.RUNNING,
    description="Starts the first lap as soon as enough trusted labels are there. Idle once a model is live.",
)
def first_lap(context: SensorEvaluationContext, env: Environment) -> SensorResult | SkipReason:
    """Ask the policy for a first model while none is live."""
    if state.rollout_state(env.store).champion is not None:
        return SkipReason("a model is live; drift and adaptation ask for the next laps")
    hours = landed_hours(env.store, "ingested/labels")
    if not hours:
        return SkipReason("no label has been taken in yet")
    window = f"{hours[-1]:%Y-%m-%dT%H}"
    if context.cursor and json.loads(context.cursor)["window"] == window:
        return SkipReason("no hour of labels was taken in since the last answer")
    measured = latest_signals(env.store, 1)
    # The job `hour` ends with the signals: until then its labels may be there and their features not.
    if not measured or measured[-1].window < hours[-1]:
        return SkipReason(f"{hours[-1]:%Y-%m-%d %H}h is still being taken in")
    votes = read_hours(env.store, "ingested/labels", hours[0], hours[-1] + timedelta(hours=1))
    settings = env.settings
    judged = votes.filter(pl.col("source").is_in(list(settings.trusted_sources)))
    for value in ("abuse", "benign"):
        n = judged.filter(pl.col("value") == value)["event_id"].n_unique()
        if n < settings.min_class_labels:
            return SkipReason(f"{n} events were judged {value}, {settings.min_class_labels} are needed")
    result = ask(env, "first_lap", "bootstrap", [], label_counts(votes, None, settings.trusted_sources))
    why = json.loads(result.cursor or "{}").get("why", "")
    return result._replace(cursor=json.dumps({"window": window, "why": why}))
