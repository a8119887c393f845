"""State that several processes agree upon: nothing is lost in a race, and a killed writer leaves no gap."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from redqueen import state
from redqueen.errors import Conflict, InvalidInput
from redqueen.policy import Hold, LabelCounts, Limits, LoopState, decide
from redqueen.rollout import RolloutState
from redqueen.store import DirectoryStore, ObjectStore, S3Store
from tests.services import S3Server

NOW = datetime(2026, 1, 3, 14, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    if request.param == "directory":
        return DirectoryStore(tmp_path / "store")
    server: S3Server = request.getfixturevalue("s3_server")
    return S3Store(server.new_bucket(), "home", server.url)


def bumped(found: dict[str, Any]) -> dict[str, Any]:
    return {"n": found.get("n", 0) + 1}


def state_at(version: int, **over: Any) -> RolloutState:
    return replace(RolloutState.initial(), version=version, **over)


# -- compare and swap ---------------------------------------------------------------------------------------


def test_racing_writers_lose_no_update(store: ObjectStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: state.update(store, "state/n.json", bumped, tries=60), range(12)))
    assert state.read(store, "state/n.json") == {"n": 12}


def test_a_change_that_changes_nothing_writes_nothing(store: ObjectStore) -> None:
    assert state.update(store, "state/n.json", lambda found: None) == {}
    assert not store.exists("state/n.json")
    state.update(store, "state/n.json", bumped)
    before = store.get("state/n.json").etag
    assert state.update(store, "state/n.json", lambda found: dict(found)) == {"n": 1}
    assert store.get("state/n.json").etag == before


@pytest.mark.parametrize("damage", [b"", b"{", b"[1]", b"\xff"])
def test_damaged_state_is_named_and_not_written_over(store: ObjectStore, damage: bytes) -> None:
    store.put("state/n.json", damage)
    for use in (
        lambda: state.read(store, "state/n.json"),
        lambda: state.update(store, "state/n.json", bumped),
    ):
        with pytest.raises(InvalidInput, match=r"'state/n\.json' in the store was damaged"):
            use()
    assert store.get("state/n.json").data == damage


def test_a_writer_that_never_wins_says_so(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)

    def overtaken(found: dict[str, Any]) -> dict[str, Any]:
        store.put_json("state/n.json", {"n": found.get("n", 0) + 1})
        return {"n": -1}

    with pytest.raises(Conflict, match="3 other writers came first"):
        state.update(store, "state/n.json", overtaken, tries=3)


# -- rollout ------------------------------------------------------------------------------------------------


def test_of_two_writers_that_move_the_rollout_one_wins(store: ObjectStore) -> None:
    seen = state.rollout_state(store)
    wishes = [state_at(1, champion=f"model-{i}") for i in range(6)]

    def attempt(wish: RolloutState) -> bool:
        try:
            state.move_rollout(store, seen, wish, {"by": wish.champion})
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(6) as pool:
        won = [wish for wish, yes in zip(wishes, pool.map(attempt, wishes), strict=True) if yes]
    assert len(won) == 1
    assert state.rollout_state(store) == won[0]
    assert [entry["step"]["by"] for entry in state.rollout_log(store)] == [won[0].champion]


def test_a_writer_killed_between_log_and_swap_is_completed_by_the_next(tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    class DiesAtTheSwap(DirectoryStore):
        def put_if_absent(self, key: str, data: bytes) -> str:
            if key == state.LIVE_KEY:
                raise Killed
            return super().put_if_absent(key, data)

    wanted = state_at(1, champion="first")
    with pytest.raises(Killed):
        state.move_rollout(DiesAtTheSwap(tmp_path), RolloutState.initial(), wanted, {})
    store = DirectoryStore(tmp_path)
    assert state.rollout_state(store).version == 0
    with pytest.raises(Conflict):
        state.move_rollout(store, RolloutState.initial(), state_at(1, champion="second"), {})
    assert state.rollout_state(store) == wanted
    state.move_rollout(store, wanted, state_at(2, champion="second"), {})
    assert [entry["state"]["champion"] for entry in state.rollout_log(store)] == ["first", "second"]


def test_a_slow_writer_whose_move_another_finished_is_told_that_it_was_made(tmp_path: Path) -> None:
    wanted = state_at(1, champion="first")

    class OvertakenAtTheSwap(DirectoryStore):
        def get(self, key: str) -> Any:
            if key == state.LIVE_KEY:
                with pytest.raises(Conflict):
                    state.move_rollout(DirectoryStore(tmp_path), RolloutState.initial(), state_at(1), {})
            return super().get(key)

    state.move_rollout(OvertakenAtTheSwap(tmp_path), RolloutState.initial(), wanted, {})
    assert state.rollout_state(DirectoryStore(tmp_path)) == wanted


# -- laps ---------------------------------------------------------------------------------------------------


def test_of_two_laps_that_are_claimed_one_starts(store: ObjectStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda name: state.claim_lap(store, name, NOW), "abcd"))
    assert sum(got) == 1
    winner = "abcd"[got.index(True)]
    assert state.claim_lap(store, winner, NOW)
    assert state.in_flight(store, NOW) == winner


def test_a_claim_without_a_lap_expires_and_so_does_a_lap_that_fell_silent(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    assert state.claim_lap(store, "a", NOW)
    assert not state.claim_lap(store, "b", NOW + HOUR)
    later = NOW + 2.1 * HOUR
    assert state.claim_lap(store, "b", later)
    state.advance_candidate(store, "b", "launched", later, "drift")
    assert not state.claim_lap(store, "c", later + HOUR)
    assert state.claim_lap(store, "c", later + 2.1 * HOUR)


@pytest.mark.parametrize("status", state.FINISHED)
def test_a_finished_lap_frees_the_track(tmp_path: Path, status: str) -> None:
    store = DirectoryStore(tmp_path)
    assert state.claim_lap(store, "a", NOW)
    state.advance_candidate(store, "a", status, NOW, "over")
    assert state.in_flight(store, NOW) is None
    assert state.claim_lap(store, "b", NOW)


def test_a_candidate_that_waits_for_its_rollout_is_never_an_orphan(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    state.advance_candidate(store, "a", "waiting", NOW, "passed")
    assert state.in_flight(store, NOW + 48 * HOUR) == "a"
    assert state.waiting_candidate(store, RolloutState.initial()) == "a"
    assert state.waiting_candidate(store, state_at(3, blocked={"a": "harm"})) is None


def test_the_same_move_again_leaves_one_line_of_history(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for _ in range(2):
        state.advance_candidate(store, "a", "trained", NOW, "trained as m1", model_id="m1")
    record = state.advance_candidate(store, "a", "evaluated", NOW + HOUR, "recall 90%")
    assert [step["status"] for step in record["history"]] == ["trained", "evaluated"]
    assert record["model_id"] == "m1"


def test_an_unknown_candidate_is_answered_with_those_that_exist(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    with pytest.raises(InvalidInput, match="none yet"):
        state.candidate(store, "x")
    state.advance_candidate(store, "a", "trained", NOW, "done")
    with pytest.raises(InvalidInput, match="the latest are: a"):
        state.candidate(store, "x")


def test_a_retrain_is_spent_once_and_leaves_the_budget_after_a_day(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for at in (NOW, NOW + HOUR):
        state.spend_retrain(store, "a", at)
    state.spend_retrain(store, "b", NOW + HOUR)
    found = state.loop_state(store, NOW + 2 * HOUR)
    assert (found.retrains_today, found.last_retrain) == (2, NOW + HOUR)
    assert state.loop_state(store, NOW + 24.5 * HOUR).retrains_today == 1


# -- decisions and holds ------------------------------------------------------------------------------------


def test_a_decision_is_taken_once_a_window_and_scope(store: ObjectStore) -> None:
    counts = LabelCounts(trusted=5000, new=5000)
    first = decide([], LoopState(), Limits(), "bootstrap", now=NOW, labels=counts)
    assert first.action == "retrain"
    other = decide([], LoopState(retrains_today=9), Limits(), "bootstrap", now=NOW, labels=LabelCounts(0, 0))
    assert state.recorded_decision(store, first.window, "first_lap") is None
    assert state.record_decision(store, "first_lap", first) == first
    assert state.record_decision(store, "first_lap", other) == first
    assert state.record_decision(store, "drift", other) == other
    assert state.recorded_decision(store, first.window, "first_lap") == first
    assert [d["scope"] for d in state.decisions(store)] == ["first_lap", "drift"]


def test_a_freeze_holds_until_it_is_lifted_replaced_or_over(store: ObjectStore) -> None:
    state.freeze(store, Hold("training", "ana", "bad labels", NOW + HOUR))
    state.freeze(store, Hold("promotion", "ben", "holiday", NOW + 3 * HOUR))
    state.freeze(store, Hold("training", "eve", "still bad", NOW + 2 * HOUR))
    assert {h.scope: h.owner for h in state.holds(store, NOW)} == {"training": "eve", "promotion": "ben"}
    assert [h.scope for h in state.holds(store, NOW + 2 * HOUR)] == ["promotion"]
    assert state.unfreeze(store, "promotion")
    assert not state.unfreeze(store, "promotion")
    assert [h.scope for h in state.loop_state(store, NOW).holds] == ["training"]
