"""The windows that the scoring service keeps: filled from the past, journaled, shared, whole after a kill."""

from __future__ import annotations

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from redqueen import graph
from redqueen.clock import hour_of
from redqueen.features import FEATURES_VERSION, NAMES, prepare
from redqueen.features.journal import KEPT, Journal
from redqueen.schema import polars_schema
from redqueen.store import DirectoryStore, ObjectStore
from redqueen.tables import read_hours, write_part
from serving.client import HttpClient
from tests.miniature import NOON, Platform, event, service
from tests.services import RedisServer, free_port

# -- behaviour online ----------------------------------------------------------------------------------------


def ingest(store: ObjectStore, events: list[dict[str, Any]]) -> None:
    columns = polars_schema("events")
    frame = pl.DataFrame(
        [dict.fromkeys(columns) | {"received_at": e["ts"]} | e for e in events], schema=columns
    )
    for (hour,), rows in frame.group_by(pl.col("ts").dt.truncate("1h")):
        write_part(store, "ingested/events", hour, rows)  # type: ignore[arg-type]


def served_features(platform: Platform, event_id: str) -> list[np.ndarray]:
    rows = platform.logged().filter(pl.col("event_id") == event_id)["features"].to_list()
    return [np.array(row) for row in rows]


def named(row: np.ndarray, name: str) -> float:
    return float(row[NAMES.index(name)])


@pytest.mark.parametrize("started", ["before", "after"])
def test_a_service_without_a_journal_fills_its_windows_from_what_was_ingested(
    platform: Platform, started: str
) -> None:
    past = [event(n, actor_id="busy", ts=NOON - timedelta(minutes=50 - n)) for n in range(40)]
    platform.client.score(past)
    platform.client.score([event(99, actor_id="busy")])
    platform.client.flush()
    platform.close()
    shutil.rmtree(platform.settings.home / "journal")
    if started == "before":
        assert platform.client.state()["events_observed"] == 0
    ingest(platform.store, past)
    platform.client.score([event(99, actor_id="busy")])
    lived, fresh = served_features(platform, "e99")
    np.testing.assert_array_equal(lived, fresh)
    assert named(fresh, "actor_events_1h") == 41
    assert platform.client.state()["events_observed"] == 41


def test_a_restarted_service_takes_the_journal_in_its_own_order_and_what_came_beside_it(
    platform: Platform,
) -> None:
    """A straggler counts where it was observed, not where it was received."""

    def at(n: int, minutes: float, **more: Any) -> dict[str, Any]:
        return event(n, actor_id="busy", ts=NOON - timedelta(minutes=minutes), **more)

    platform.client.score([at(0, 100)])
    platform.client.score([at(1, 20)])
    platform.client.score([at(2, 75)])
    platform.client.score([event(98, actor_id="busy")])
    platform.close()
    ingest(platform.store, [at(0, 100), at(2, 75), at(3, 30), at(4, 150)])
    platform.client.score([event(99, actor_id="busy")])
    (before,), (after,) = served_features(platform, "e98"), served_features(platform, "e99")
    assert named(before, "actor_events_1h") == 3, "the straggler is counted at the clock of its actor"
    assert (named(after, "actor_events_1h"), named(after, "actor_events_24h")) == (5, 7)


def test_received_at_decides_what_is_late_and_in_which_order(platform: Platform) -> None:
    old = NOON - timedelta(hours=3)
    platform.client.score([
        event(0, actor_id="a", ts=old, received_at=NOON),
        event(2, actor_id="a", ts=NOON, received_at=NOON + timedelta(seconds=2)),
        event(1, actor_id="a", ts=NOON, received_at=NOON + timedelta(seconds=1)),
    ])  # fmt: skip
    rows = {n: served_features(platform, f"e{n}")[0] for n in range(3)}
    assert [named(rows[n], "actor_events_24h") for n in range(3)] == [1, 1, 2]


def test_a_receipt_from_the_far_future_does_not_stop_the_windows(platform: Platform) -> None:
    platform.client.score([event(0, actor_id="a", received_at=NOON + timedelta(days=300))])
    assert named(served_features(platform, "e0")[0], "actor_events_24h") == 1
    for n in (1, 2):
        platform.client.score([event(n, actor_id="a", ts=NOON + timedelta(minutes=n))])
    assert named(served_features(platform, "e2")[0], "actor_events_24h") == 2, (
        "it was late, and left no trace"
    )


def test_a_journal_that_cannot_be_written_is_told_and_costs_no_answer(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    folder = platform.settings.home / "journal"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where the directory should be")
    assert platform.scored(event(0, "spam")) == [("limit", False)]
    assert "journal: it could not be written" in str(platform.client.state()["degraded_reasons"])
    folder.unlink()
    assert platform.scored(event(1, "spam")) == [("limit", False)]
    assert not platform.client.state()["degraded"]


def test_the_day_s_graph_is_read_and_its_absence_is_nan(platform: Platform) -> None:
    platform.client.score([event(0)])
    assert np.isnan(named(served_features(platform, "e0")[0], "graph_reach_log"))
    ingest(
        platform.store,
        [event(7, actor_id="friend", recipient_id="r", kind="dm", ts=NOON - timedelta(days=1))],
    )
    graph.build(platform.store, NOON.date())
    platform.client.refresh()
    assert platform.client.state()["graph_days"] == [f"{NOON:%Y-%m-%d}"]
    platform.client.score([event(1, actor_id="friend")])
    assert named(served_features(platform, "e1")[0], "graph_reach_log") == pytest.approx(np.log(2))


def test_what_is_journaled_is_read_back_whatever_was_torn_and_old_hours_go(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    rows = [prepare(event(n, f"see evil{n}.com/x and tell everyone", ip_hash="i")) for n in range(6)]
    journal.append(rows[:2], NOON - KEPT - timedelta(hours=1))
    journal.append(rows[2:4], NOON)
    with (tmp_path / f"{NOON:%Y-%m-%dT%H}.jsonl").open("ab") as file:
        file.write(b'{"event_id": "torn')
    Journal(tmp_path).append(rows[4:], NOON)
    replay = Journal(tmp_path).read(NOON)
    assert replay.events == [row._replace(direct=()) for row in rows[2:]]
    assert replay.broken == 1
    assert len(list(tmp_path.iterdir())) == 1
    other = (tmp_path / f"{NOON:%Y-%m-%dT%H}.jsonl").read_text().replace(FEATURES_VERSION, "1-other")
    (tmp_path / f"{NOON:%Y-%m-%dT%H}.jsonl").write_text(other)
    assert Journal(tmp_path).read(NOON).events == [], "windows of other declarations are not these"


# -- behaviour in Redis --------------------------------------------------------------------------------------


def test_replicas_share_the_windows_and_the_first_fills_them(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    first, second = (Platform(tmp_path / name, redis_url=redis_server.url) for name in ("a", "b"))
    alone = Platform(tmp_path / "c")
    past = [event(n, actor_id="busy", ts=NOON - timedelta(minutes=50 - n)) for n in range(40)]
    try:
        for platform in (first, second, alone):
            ingest(platform.store, past)
        first.client.score([event(50, actor_id="busy")])
        second.client.score([event(51, actor_id="busy")])
        alone.client.score([event(50, actor_id="busy"), event(51, actor_id="busy")])
        (wanted,), (found,) = served_features(alone, "e51"), served_features(second, "e51")
        np.testing.assert_array_equal(found, wanted)
        assert named(found, "actor_events_1h") == 42
        assert second.client.state()["events_observed"] == 1, "the windows were filled already"
    finally:
        for platform in (first, second, alone):
            platform.close()


def test_without_redis_text_alone_is_scored_and_said_until_it_is_back(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redqueen.features.onredis.QUIET_S", 0.0)
    platform = Platform(tmp_path, redis_url=redis_server.url)
    try:
        platform.live(stage="100%", champion="m-old")
        assert platform.scored(event(0, "spam")) == [("limit", False)]
        platform.client.refresh()
        assert not platform.client.state()["degraded"], "there was no past to begin with"
        redis_server.stop()
        assert platform.scored(event(1, "spam")) == [("limit", True)]
        platform.client.refresh()
        reasons = str(platform.client.state()["degraded_reasons"])
        assert "Redis did not take the events" in reasons
        assert "text alone is scored" in reasons
        again = RedisServer.start(redis_server.port)
        try:
            assert platform.scored(event(2, "spam")) == [("limit", False)]
            platform.client.refresh()
            (reason,) = platform.client.state()["degraded_reasons"]
            assert reason == "windows: they began without their past, and are whole from 2026-03-03 14:00 on"
            platform.clock.at += timedelta(hours=27)
            platform.client.refresh()
            assert not platform.client.state()["degraded"]
        finally:
            again.stop()
    finally:
        platform.close()


def test_a_service_whose_redis_is_down_starts_and_answers(tmp_path: Path) -> None:
    platform = Platform(tmp_path, redis_url=f"redis://:swordfish@127.0.0.1:{free_port()}/0")
    try:
        platform.live(stage="100%", champion="m-old")
        assert platform.scored(event(0, "spam")) == [("limit", True)]
        assert platform.client.state()["degraded"]
        assert "swordfish" not in str(platform.client.state())
    finally:
        platform.close()


def test_a_date_from_the_far_future_does_not_stop_the_windows(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    far = event(0, "spam", ts=NOON + timedelta(days=300))
    assert platform.scored(far) == [("limit", True)]
    assert platform.client.state()["events_observed"] == 0
    assert platform.scored(event(1, "spam")) == [("limit", False)]
    assert platform.client.state()["events_observed"] == 1


@pytest.mark.slow
def test_a_service_killed_between_two_requests_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SIGKILL, twice; the features of what comes later are those of a service that lived."""
    now = datetime.now(UTC)
    text = "the very same words again: see evil{}.com/1"
    events = [
        event(
            n, text.format(n % 3), actor_id=f"actor-{n % 7}", recipient_id=f"r{n % 5}", kind="dm",
            ip_hash=f"i{n % 4}", ts=now - timedelta(minutes=(600 - n) / 10),
            received_at=now - timedelta(minutes=(600 - n) / 10 - n % 3),
        )
        for n in range(600)
    ]  # fmt: skip
    lived = Platform(tmp_path / "lived")
    lived.clock.at = now
    for start in range(0, 600, 50):
        lived.client.score(events[start : start + 50])
    lived.client.flush()
    home, port = tmp_path / "killed", free_port()
    for lap in range(3):
        with service(home, port), HttpClient(f"http://127.0.0.1:{port}") as client:
            for start in range(200 * lap, 200 * lap + 200, 50):
                client.score(events[start : start + 50])
            client.flush()
    hours = hour_of(now) - timedelta(hours=2), hour_of(now) + timedelta(hours=2)
    wanted, found = (
        read_hours(DirectoryStore(at / "store"), "predictions", *hours).sort("event_id")
        for at in (tmp_path / "lived", home)
    )
    lived.close()
    assert found["event_id"].to_list() == wanted["event_id"].to_list()
    np.testing.assert_array_equal(
        np.array(found["features"].to_list()), np.array(wanted["features"].to_list())
    )
