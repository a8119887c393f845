"""What watches arrivals: closed hours to take in, and enough labels for a first model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta

import polars as pl
from dagster import (
    DagsterInstance,
    DagsterRunStatus,
    RunRequest,
    RunsFilter,
    SensorEvaluationContext,
    SensorResult,
    SkipReason,
)

from assets.environment import Environment
from assets.partitions import partition_of
from redqueen import arrivals, retention, state
from redqueen.clock import hour_of
from redqueen.signals import label_counts
from redqueen.store import ObjectStore
from redqueen.tables import HOUR, hour_key, hours_between, landed_hours, read_hours
from sensors.asking import ask, latest_signals
from sensors.common import run_tags, watcher

LATE_HOURS = 6
"""Files may arrive late for this long and are noticed at the next tick; later ones by the daily sweep."""

MOST_RUNS = 4
"""Hours requested one by one in a tick; a longer backlog is caught up in one run over a range."""

MOST_GOING = 2
"""While so many runs of the job are going, what lands waits and is taken in together: each run costs seconds
before it reads its first row, and a queue of single hours only grows."""
GOING_FOR = timedelta(minutes=15)
"""A run that was launched longer ago is not waited for: it may be stuck, and arrivals go on."""

GOING = (
    DagsterRunStatus.QUEUED,
    DagsterRunStatus.NOT_STARTED,
    DagsterRunStatus.STARTING,
    DagsterRunStatus.STARTED,
)

LANDINGS = ("events", "labels", "predictions")


def _digest(store: ObjectStore, hour: datetime) -> str:
    """What has landed in an hour, as a short hash; a late file changes it."""
    names = [key for table in LANDINGS for key in store.list(hour_key(table, hour))]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:12] if names else ""


@dataclass(frozen=True)
class _Seen:
    """What the cursor remembers: the last hours taken in and what lay in them, up to where every hour has
    been looked at, and how far the sweep of older days has come.

    sweep_day: the day that is looked at next; swept: the day on which the last round began.
    """

    taken_in: dict[str, str] = field(default_factory=dict)
    looked: str | None = None
    sweep_day: str | None = None
    swept: str | None = None

    @classmethod
    def of(cls, cursor: str | None) -> _Seen:
        known = json.loads(cursor) if cursor else {}
        seen = cls(**{f.name: known[f.name] for f in fields(cls) if f.name in known})
        # A cursor of before: every hour up to the newest it names had been looked at.
        return replace(seen, looked=max(seen.taken_in)) if seen.taken_in and not seen.looked else seen


def _due(store: ObjectStore, first: datetime, now: datetime, seen: _Seen) -> dict[datetime, str]:
    """Closed hours with something new in them, by what has landed.

    Only the last hours are listed, and those since the last look: a daemon that was down for a day catches
    up. Without a memory everything is listed, once.
    """
    current = hour_of(now)
    looked = datetime.fromisoformat(seen.looked) if seen.looked else None
    if looked is None or looked > current:
        # No memory, or a simulation has set the clock back: then nothing is known of its hours.
        hours = [h for t in LANDINGS for h in landed_hours(store, t)]
    else:
        hours = hours_between(min(looked, current - LATE_HOURS * HOUR), current)
    # An hour before the first partition cannot be run; asking for it would fail every tick.
    digests = {hour: _digest(store, hour) for hour in sorted(set(hours)) if first <= hour < current}
    return {
        hour: digest
        for hour, digest in digests.items()
        if digest and seen.taken_in.get(hour.isoformat()) != digest
    }


def _sweep(
    store: ObjectStore, first: datetime, now: datetime, seen: _Seen
) -> tuple[dict[datetime, str], _Seen]:
    """What landed in one older day after it was taken in, and where the sweep goes on.

    One day a tick, from yesterday back to the first partition, a round a day: files are found however late
    they come, and no tick lists more than a day.
    """
    today = f"{now:%Y-%m-%d}"
    horizon = hour_of(now) - LATE_HOURS * HOUR
    if seen.sweep_day is None:
        if seen.swept == today:
            return {}, seen
        seen = replace(seen, sweep_day=f"{horizon:%Y-%m-%d}", swept=today)
    day = datetime.fromisoformat(str(seen.sweep_day)).replace(tzinfo=UTC)
    found = {h: d for h, d in arrivals.missed(store, day).items() if first <= h < horizon}
    before = day - timedelta(days=1)
    over = day <= max([first, *(p for p in _purged(store) if p is not None)])
    return found, replace(seen, sweep_day=None if over else f"{before:%Y-%m-%d}")


def _purged(store: ObjectStore) -> list[datetime | None]:
    return [retention.purged_until(store, table) for table in arrivals.TABLES]


def _going(instance: DagsterInstance) -> int:
    """How many runs of the job `hour` are on their way, by the wall's clock."""
    since = datetime.now(UTC) - GOING_FOR
    return instance.get_runs_count(RunsFilter(job_name="hour", statuses=list(GOING), created_after=since))


@watcher(
    job="hour",
    description="Takes in each hour once it is over: events, labels and served predictions that landed. A "
    "late file makes its hour run again; once a day all older days are looked through, one a tick.",
)
def label_arrival(context: SensorEvaluationContext, env: Environment) -> SensorResult | SkipReason:
    """Request the job `hour` for every closed hour with new files."""
    now = env.clock.now()
    first = hour_of(env.settings.partitions_start)
    seen = _Seen.of(context.cursor)
    due = _due(env.store, first, now, seen)
    going = _going(context.instance)
    # An hour that a run is taking in right now looks to the sweep like one that nobody took in.
    late, after = _sweep(env.store, first, now, seen) if seen.looked and not going else ({}, seen)
    late = {hour: digest for hour, digest in late.items() if hour not in due}
    hours = sorted(due)
    kept = dict(
        sorted({**seen.taken_in, **{h.isoformat(): d for h, d in due.items()}}.items())[-2 * LATE_HOURS :]
    )
    after = replace(after, taken_in=kept, looked=hour_of(now).isoformat())
    nothing = f"nothing new has landed in a closed hour (it is {now:%Y-%m-%d %H:%M} UTC)"
    if not due and not late:
        if after == seen:
            return SkipReason(nothing)
        return SensorResult(skip_reason=nothing, cursor=_cursor(context.cursor, after, None))
    why = f"took in {len(hours)} hour(s) up to {hours[-1]:%m-%d %H}h" if hours else ""
    if late:
        why = "; ".join([*([why] if why else []), f"late files in {len(late)} older hour(s)"])
    requests = [_one(hour, due[hour], now) for hour in hours]
    if hours and going >= MOST_GOING:
        return SkipReason(f"{len(hours)} hour(s) wait for {going} runs that are going, and are then one run")
    if len(hours) > MOST_RUNS:
        requests = [_range(hours, due, now)]
    requests += [_late(hour, late[hour], now) for hour in sorted(late)]
    return SensorResult(run_requests=requests, cursor=_cursor(context.cursor, after, why))


def _cursor(before: str | None, seen: _Seen, why: str | None) -> str:
    """`why` first: the cursor is what on call sees."""
    said = why if why is not None else (json.loads(before).get("why", "") if before else "")
    return json.dumps({"why": said, **asdict(seen)})


def _late(hour: datetime, digest: str, now: datetime) -> RunRequest:
    # With the day in its key: a run that failed is asked for again by tomorrow's sweep.
    return RunRequest(
        run_key=f"late:{hour:%Y-%m-%dT%H}:{digest}:{now:%Y-%m-%d}",
        partition_key=partition_of(hour),
        tags=run_tags(now, "files landed here after the hour was taken in"),
    )


def _one(hour: datetime, digest: str, now: datetime) -> RunRequest:
    return RunRequest(
        run_key=f"hour:{hour:%Y-%m-%dT%H}:{digest}",
        partition_key=partition_of(hour),
        tags=run_tags(now, "files landed in this hour"),
    )


def _range(hours: list[datetime], due: dict[datetime, str], now: datetime) -> RunRequest:
    """One run over the whole backlog: 48 hours take seconds so, and half a minute one by one."""
    together = hashlib.sha256("".join(due[h] for h in hours).encode()).hexdigest()[:12]
    return RunRequest(
        run_key=f"hours:{hours[0]:%Y-%m-%dT%H}:{hours[-1]:%Y-%m-%dT%H}:{together}",
        tags={
            **run_tags(now, f"catching up on {len(hours)} hours"),
            "dagster/asset_partition_range_start": partition_of(hours[0]),
            "dagster/asset_partition_range_end": partition_of(hours[-1]),
        },
    )


@watcher(
    job="lap",
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
