"""The feed by itself: what it plans, what it refuses, and that a kill leaves no trace. The real daemon and
the real service beside it are in `test_end_to_end`."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from arena import feed as feeding
from arena.feed import Feed, run_feed
from dagster_project.instance import initialise
from redqueen import state
from redqueen.clock import StoreClock, hour_of
from redqueen.errors import InvalidInput, Refused, ServiceUnavailable
from redqueen.settings import Settings, load_settings
from redqueen.store import ObjectStore, open_store
from redqueen.tables import HOUR, hour_key
from tests.services import free_port

WANTED = {"scenario": "attack", "seed": 5, "hours": 2, "scale": 0.05}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    home = tmp_path / "home"
    initialise(home)
    return load_settings(home)


class Service:
    """Allows everything; dies at the request it was told to die at."""

    def __init__(self, dies_at: int | None = None) -> None:
        self.requests, self.dies_at = 0, dies_at

    def score(self, events: list[dict[str, Any]]) -> list[dict[str, Any]]:
        self.requests += 1
        if self.requests == self.dies_at:
            raise ServiceUnavailable("gone")
        return [{"event_id": event["event_id"], "action": "allow"} for event in events]

    def refresh(self) -> bool:
        return False

    def flush(self) -> int:
        return 0


def play(settings: Settings, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Play what is left, with nobody to wait for."""
    store = open_store(settings)
    monkeypatch.setattr(Feed, "_held", lambda self, index: None)
    monkeypatch.setattr(feeding, "POLL_SECONDS", 0.0)
    progress = feeding._progress(settings, store, WANTED)
    Feed(settings, store, progress, service, 0.0, Console(quiet=True)).run()  # type: ignore[arg-type]


def landed(store: ObjectStore) -> dict[str, list[dict[str, Any]]]:
    """The rows of each landed file."""
    keys = [k for table in ("events", "labels") for k in store.list(f"{table}/")]
    return {k: [json.loads(line) for line in store.get(k).data.splitlines()] for k in keys}


def test_a_new_home_plays_history_and_ends_now(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    now = hour_of(datetime.now(UTC))
    play(settings, Service(), monkeypatch)
    store = open_store(settings)
    assert abs(StoreClock(store).now() - now) <= HOUR
    hours = 38
    assert sum(key.startswith("events/") for key in landed(store)) == hours
    rows = landed(store)[store.list("events/")[-1]]
    assert all({"event_id", "ts", "actor_id"} <= row.keys() for row in rows)


def test_killed_in_an_hour_it_leaves_what_an_undisturbed_feed_leaves(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(settings, Service(), monkeypatch)
    other = tmp_path / "other"
    (other / "redqueen.env").parent.mkdir()
    (other / "redqueen.env").write_text((settings.home / "redqueen.env").read_text())
    disturbed = load_settings(other)
    for dies_at in (1, 1):
        with pytest.raises(ServiceUnavailable):
            play(disturbed, Service(dies_at), monkeypatch)
    play(disturbed, Service(), monkeypatch)
    assert landed(open_store(disturbed)) == landed(open_store(settings))


def test_it_goes_on_from_the_clock_with_other_people(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(settings, Service(), monkeypatch)
    store = open_store(settings)
    before, ids = landed(store), event_ids(store)
    end = StoreClock(store).now()
    play(settings, Service(), monkeypatch)
    assert StoreClock(store).now() == end + 2 * HOUR
    assert before.items() <= landed(store).items()
    later = event_ids(store) - ids
    assert later
    assert not later & ids


def event_ids(store: ObjectStore) -> set[str]:
    rows = [row for k, rows in landed(store).items() if k.startswith("events/") for row in rows]
    return {row["event_id"] for row in rows} - {None}


def test_hours_beyond_the_partitions_are_refused_with_the_room_there_is(settings: Settings) -> None:
    store = open_store(settings)
    StoreClock(store).set(hour_of(datetime.now(UTC)) + 20 * HOUR)
    with pytest.raises(InvalidInput, match=r"room for [34]\b"):
        feeding._progress(settings, store, WANTED | {"hours": 12})
    assert feeding._progress(settings, store, WANTED | {"hours": None}).hours in (3, 4)


def test_history_never_begins_before_the_first_partition(settings: Settings) -> None:
    progress = feeding._progress(settings, open_store(settings), WANTED | {"hours": 100})
    assert progress.begin >= settings.partitions_start
    with pytest.raises(InvalidInput, match="--hours"):
        feeding._progress(settings, open_store(settings), WANTED | {"hours": 200})


def test_foreign_data_and_an_unfinished_demo_are_left_alone(settings: Settings) -> None:
    store = open_store(settings)
    store.put(hour_key("events", datetime(2026, 1, 1, tzinfo=UTC)) + "x.jsonl", b"{}")
    with pytest.raises(Refused, match="home of its own"):
        feeding._progress(settings, store, WANTED)
    StoreClock(store).set(datetime.now(UTC))
    meta = settings.home / "demo" / "meta.json"
    meta.parent.mkdir(parents=True)
    meta.write_text('{"finished": false}')
    with pytest.raises(Refused, match="make demo"):
        feeding._progress(settings, store, WANTED)


def test_without_a_service_it_says_how_to_start_one(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQ_SERVING_URL", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ServiceUnavailable, match=f"redqueen --home {settings.home} serve"):
        run_feed(load_settings(settings.home), "attack", 1, 2, 0.0, Console(quiet=True))


def test_the_clock_waits_for_a_lap_and_for_the_hour_before(settings: Settings) -> None:
    store = open_store(settings)
    progress = feeding._progress(settings, store, WANTED)
    feed = Feed(settings, store, progress, Service(), 0.0, Console(quiet=True))  # type: ignore[arg-type]
    first, now = progress.history, progress.begin + 36 * HOUR

    def held() -> str:
        found = feed._held(first)
        return found[0] if found else ""

    assert "no lap has been started" in held()
    state.claim_lap(store, "c1", now)
    assert held() == "lap c1 is starting"
    state.advance_candidate(store, "c1", "launched", now, "why")
    assert held() == "lap c1 is launched"
    state.advance_candidate(store, "c1", "waiting", now, "passed")
    assert "has not been measured" in held()
    store.put_json(f"signals/window={now - timedelta(hours=1):%Y-%m-%dT%H}.json", {})
    assert held() == ""


def test_a_new_home_gets_settings_once_and_production_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "new"
    assert "partitions start" in "".join(initialise(home))
    kept = (home / "redqueen.env").read_text()
    assert initialise(home) == []
    assert (home / "redqueen.env").read_text() == kept
    assert load_settings(home).bootstrap_approval == "embedded default"
    monkeypatch.setenv("RQ_CLOCK", "wall")
    assert initialise(tmp_path / "production") == []
    assert load_settings(tmp_path / "production").bootstrap_approval is None


def test_imported_hours_are_inside_the_partitions_of_a_new_home(tmp_path: Path) -> None:
    store = open_store(load_settings(tmp_path))
    old = datetime(2025, 3, 4, 5, tzinfo=UTC)
    store.put(hour_key("events", old) + "import.parquet", b"")
    initialise(tmp_path)
    assert load_settings(tmp_path).partitions_start == old
