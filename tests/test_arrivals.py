"""Files are found however late they land, and no tick lists the whole store."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.environment import Environment
from assets.partitions import hour_of_partition
from redqueen import arrivals
from redqueen.clock import StoreClock
from redqueen.settings import write_env
from redqueen.tables import hour_key
from sensors.labels import GOING_FOR, LATE_HOURS, MOST_GOING, MOST_RUNS, label_arrival
from tests.test_ingest import Counting, as_json, event

START = datetime(2026, 1, 3, tzinfo=UTC)


class House:
    """A home whose sensor is ticked by hand, and whose runs only note what they took in."""

    def __init__(self, home: Path, instance: dg.DagsterInstance) -> None:
        write_env(home, partitions_start=START.isoformat())
        self.env = Environment(home=str(home))
        self.store = Counting(home / "store")
        self.env.__dict__["store"] = self.store
        self.cursor: str | None = None
        self.requests: list[dg.RunRequest] = []
        self.instance = instance

    def land(self, hour: datetime, name: str = "a") -> None:
        row = event(int(hour.timestamp()), ts=hour, received_at=hour, account_created_at=hour)
        self.store.put(f"{hour_key('events', hour)}{name}.jsonl", as_json(row).encode())

    def launch(self, job: str, age: timedelta = timedelta(0)) -> str:
        """A run that was launched so long ago and is still going."""
        run = dg.DagsterRun(job_name=job, status=dg.DagsterRunStatus.STARTED)
        return self.instance.run_storage.add_historical_run(run, datetime.now(UTC) - age).run_id

    def tick(self, now: datetime, *, work: bool = True) -> list[dg.RunRequest]:
        """One tick at `now`; its runs are done at once."""
        StoreClock(self.store).set(now)
        context = dg.build_sensor_context(instance=self.instance, cursor=self.cursor)
        result: Any = label_arrival(context, env=self.env)
        if isinstance(result, dg.SkipReason):
            return []
        self.cursor = result.cursor or self.cursor
        requests = list(result.run_requests or ())
        self.requests += requests
        for hour in (h for request in requests for h in hours_of(request)) if work else ():
            files = arrivals.landed(self.store, "events", hour)
            arrivals.note(self.store, "events", hour, files)
        return requests


def hours_of(request: dg.RunRequest) -> list[datetime]:
    if request.partition_key:
        return [hour_of_partition(request.partition_key)]
    first, last = (
        hour_of_partition(request.tags[f"dagster/asset_partition_range_{end}"]) for end in ("start", "end")
    )
    return [first + timedelta(hours=i) for i in range(round((last - first) / timedelta(hours=1)) + 1)]


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield House(tmp_path / "home", instance)


def at(hours: float) -> datetime:
    return START + timedelta(hours=hours)


def live_through(house: House, hours: int) -> None:
    """So many hours with a file each, the last five taken in one after the other."""
    for i in range(hours):
        house.land(at(i))
        if i >= hours - 5:
            house.tick(at(i + 1))


def test_each_hour_is_asked_for_once_when_it_is_over(house: House) -> None:
    live_through(house, 5)
    assert [hours_of(r) for r in house.requests] == [[at(i)] for i in range(5)]
    assert house.tick(at(5.1)) == []
    assert json.loads(house.cursor or "")["why"].startswith("took in 1 hour(s)")


def test_what_lands_while_runs_are_going_waits_and_is_taken_in_together(house: House) -> None:
    live_through(house, 5)
    house.launch("lap")
    house.launch("hour", age=GOING_FOR * 2)  # stuck: it is not waited for
    going = [house.launch("hour") for _ in range(MOST_GOING - 1)]
    house.land(at(5))
    assert [hours_of(r) for r in house.tick(at(6))] == [[at(5)]]
    going.append(house.launch("hour"))
    cursor = house.cursor
    for i in range(6, 12):
        house.land(at(i))
        assert house.tick(at(i + 1)) == []
    assert house.cursor == cursor
    house.instance.delete_run(going[0])
    assert [hours_of(r) for r in house.tick(at(12))] == [[at(i) for i in range(6, 12)]]


def test_a_file_that_is_a_little_late_is_found_at_the_next_tick(house: House) -> None:
    live_through(house, 5)
    house.land(at(2), "late")
    (request,) = house.tick(at(5.2))
    assert hours_of(request) == [at(2)]


def test_a_file_that_is_days_late_is_found_within_a_day(house: House) -> None:
    live_through(house, 80)
    for _ in range(6):  # the day's round is over
        assert house.tick(at(80.2)) == []
    house.land(at(3), "very-late")
    assert house.tick(at(80.5)) == [], "not before the next day"
    found = [r for i in range(6) for r in house.tick(at(97.1) + timedelta(minutes=i))]
    assert [hours_of(r) for r in found] == [[at(3)]]
    assert found[0].run_key is not None
    assert found[0].run_key.startswith("late:2026-01-03T03:")
    assert [r for i in range(6) for r in house.tick(at(121.1) + timedelta(minutes=i))] == []


def test_the_sweep_waits_for_a_run_that_is_taking_hours_in(house: House) -> None:
    for i in range(30):
        house.land(at(i))
    house.tick(at(30), work=False)  # one run over all of them, which takes its time
    run = house.launch("hour")
    assert [house.tick(at(30.1) + timedelta(minutes=i), work=False) for i in range(6)] == [[]] * 6
    house.instance.delete_run(run)
    found = [r for i in range(6) for r in house.tick(at(30.3) + timedelta(minutes=i), work=False)]
    assert found, "a run that came to nothing is made up for"


def test_a_late_hour_whose_run_failed_is_asked_for_again_the_next_day(house: House) -> None:
    live_through(house, 30)
    house.land(at(1), "late")
    keys = []
    for day in (49, 73):
        found = [r for i in range(6) for r in house.tick(at(day) + timedelta(minutes=i), work=False)]
        assert [hours_of(r) for r in found] == [[at(1)]]
        keys.append(found[0].run_key)
    assert keys[0] != keys[1]


def test_a_tick_lists_hours_and_one_day_and_never_a_table(house: House) -> None:
    live_through(house, 60)
    house.store.listed.clear()
    house.tick(at(60.5))
    assert all("/dt=" in prefix for prefix in house.store.listed)
    assert len(house.store.listed) <= 3 * LATE_HOURS + 2


def test_a_daemon_that_was_down_catches_up_in_one_range(house: House) -> None:
    live_through(house, 3)
    for i in range(3, 40):
        house.land(at(i))
    (request,) = house.tick(at(40))
    assert hours_of(request) == [at(i) for i in range(3, 40)]
    assert len(hours_of(request)) > MOST_RUNS


def test_a_clock_that_is_set_back_is_looked_at_anew(house: House) -> None:
    house.tick(at(500))
    for i in range(36):
        house.land(at(i))
    (request,) = house.tick(at(36))
    assert hours_of(request) == [at(i) for i in range(36)]


def test_a_cursor_from_before_the_sweep_is_understood(house: House) -> None:
    live_through(house, 4)
    known = json.loads(house.cursor or "{}")
    house.cursor = json.dumps({"why": "took in", "taken_in": known["taken_in"]})
    assert house.tick(at(4.3)) == []


def test_a_file_before_the_first_partition_stops_nobody(house: House) -> None:
    house.land(at(-30))
    house.land(at(0))
    (request,) = house.tick(at(1))
    assert hours_of(request) == [at(0)]
