"""Moving the rollout: pointer, log and the candidates' records tell one story, also after a kill."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from redqueen import operate, state
from redqueen.errors import Conflict, InvalidInput, Refused
from redqueen.rollout import Candidate, Evidence, Limits, RolloutState, ShadowComparison, Step, next_step
from redqueen.store import DirectoryStore

NOW = datetime(2026, 1, 3, 14, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def status(store: DirectoryStore, name: str) -> str:
    return str(state.candidate(store, name)["status"])


def start(store: DirectoryStore, name: str, now: datetime) -> None:
    """A candidate that passed its gates goes into shadow."""
    state.advance_candidate(store, name, "waiting", now, "passed", model_id=f"m-{name}")
    seen = state.rollout_state(store)
    waiting = Evidence(waiting=Candidate(name, f"m-{name}", gate_passed=True), approval="ana")
    operate.move(store, seen, next_step(seen, waiting, Limits(), now), now)


def first_live(store: DirectoryStore) -> None:
    """A first model goes live by approval, after its shadow."""
    start(store, "one", NOW)
    shadow = ShadowComparison(500, None, None, 0.05, 0)
    evidence = Evidence(shadow=shadow, telemetry_age_hours=0.1, approval="ana")
    seen = state.rollout_state(store)
    operate.move(store, seen, next_step(seen, evidence, Limits(), NOW + 2 * HOUR), NOW + 2 * HOUR)


def promote(store: DirectoryStore, now: datetime) -> None:
    seen = state.rollout_state(store)
    step = Step("promote", "100%", "test", "all guardrails hold", seen.version)
    operate.move(store, seen, step, now)


def test_a_first_model_goes_through_shadow_to_live_and_its_record_follows(store: DirectoryStore) -> None:
    start(store, "one", NOW)
    assert status(store, "one") == "shadow"
    first_live(store)
    assert state.rollout_state(store).champion == "m-one"
    assert status(store, "one") == "live"
    assert [entry["state"]["version"] for entry in state.rollout_log(store)] == [1, 2]


def test_a_promotion_supersedes_and_a_rollback_by_hand_restores(store: DirectoryStore) -> None:
    first_live(store)
    start(store, "two", NOW + 3 * HOUR)
    promote(store, NOW + 8 * HOUR)
    assert (status(store, "one"), status(store, "two")) == ("superseded", "live")
    after = operate.roll_back(store, NOW + 9 * HOUR, "ana", "complaints", pause_hours=6)
    assert after.champion == "m-one"
    assert (status(store, "one"), status(store, "two")) == ("live", "rolled_back")
    assert "complaints" in after.message
    assert after.paused(NOW + 14 * HOUR)
    assert not after.paused(NOW + 15 * HOUR)


def test_a_rollback_drops_the_challenger_first(store: DirectoryStore) -> None:
    first_live(store)
    start(store, "two", NOW + 3 * HOUR)
    after = operate.roll_back(store, NOW + 4 * HOUR, "ana", "a hunch", pause_hours=1)
    assert (after.champion, after.challenger) == ("m-one", None)
    assert (status(store, "one"), status(store, "two")) == ("live", "rolled_back")
    start(store, "two", NOW + 9 * HOUR)
    assert state.rollout_state(store) == after, "a blocked candidate never starts again"


def test_nobody_goes_back_to_a_model_that_cannot_be_loaded(store: DirectoryStore) -> None:
    first_live(store)
    start(store, "two", NOW + 3 * HOUR)
    promote(store, NOW + 8 * HOUR)
    before = state.rollout_state(store)
    with pytest.raises(Refused, match="m-one, the model before, cannot go live: it was changed"):
        operate.roll_back(store, NOW + 9 * HOUR, "ana", "complaints", 6, lambda model: "it was changed")
    assert state.rollout_state(store) == before
    start(store, "three", NOW + 10 * HOUR)
    after = operate.roll_back(store, NOW + 11 * HOUR, "ana", "a hunch", 1, lambda model: "it was changed")
    assert (after.champion, after.challenger) == ("m-two", None), (
        "a challenger is dropped whatever was before"
    )


def test_with_nothing_to_go_back_to_a_rollback_is_refused(store: DirectoryStore) -> None:
    with pytest.raises(Refused, match="no previous champion"):
        operate.roll_back(store, NOW, "ana", "nerves", pause_hours=1)
    assert state.rollout_log(store) == []


def test_a_step_decided_on_what_is_past_moves_nothing(store: DirectoryStore) -> None:
    stale = RolloutState.initial()
    first_live(store)
    step = Step("start_shadow", "shadow", "test", "", 0, candidate="x", model_id="m-x")
    with pytest.raises(Conflict):
        operate.move(store, stale, step, NOW)
    with pytest.raises(Refused):
        operate.move(store, state.rollout_state(store), step, NOW)
    assert state.rollout_state(store).champion == "m-one"


def test_records_catch_up_with_a_move_whose_writer_was_killed(store: DirectoryStore) -> None:
    first_live(store)
    seen = state.rollout_state(store)
    moved = replace(seen, stage="none", version=seen.version + 1, blocked={"two": "harm"})
    state.advance_candidate(store, "two", "5%", NOW, "on its way")
    state.move_rollout(store, seen, moved, {})
    assert status(store, "two") == "5%"
    operate.reflect(store, NOW)
    operate.reflect(store, NOW)
    assert status(store, "two") == "rolled_back"
    assert len(state.candidate(store, "two")["history"]) == 2


# -- after a kill, and by two at once ------------------------------------------------------------------------


class Killed(BaseException):
    """What no handler catches."""


def killed(
    monkeypatch: pytest.MonkeyPatch, module: ModuleType, name: str, act: Callable[[], object], at: int = 1
) -> None:
    """`act` until it comes to `name` of `module` for the `at`th time, where its process is killed."""
    done, calls = getattr(module, name), iter(range(1, 100))

    def kill(*given: Any) -> Any:
        if next(calls) == at:
            raise Killed
        return done(*given)

    monkeypatch.setattr(module, name, kill)
    with pytest.raises(Killed):
        act()
    monkeypatch.setattr(module, name, done)


def with_challenger(store: DirectoryStore) -> None:
    """Champion two, one before it, and three on its way."""
    first_live(store)
    start(store, "two", NOW + 3 * HOUR)
    promote(store, NOW + 8 * HOUR)
    start(store, "three", NOW + 9 * HOUR)


LATER = NOW + 10 * HOUR


def test_a_rollback_that_was_killed_is_finished_by_the_next_which_takes_nothing_else_down(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_challenger(store)
    killed(monkeypatch, state, "_swap", lambda: operate.roll_back(store, LATER, "ana", "a hunch", 6))
    assert state.rollout_state(store).challenger == "m-three"
    after = operate.roll_back(store, LATER, "ana", "a hunch", 6)
    assert (after.champion, after.challenger) == ("m-two", None)
    assert (status(store, "two"), status(store, "three")) == ("live", "rolled_back")


def test_a_rollback_that_was_killed_before_the_records_blocks_no_lap(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_challenger(store)
    killed(monkeypatch, operate, "reflect", lambda: operate.roll_back(store, LATER, "ana", "a hunch", 6), 2)
    assert (state.rollout_state(store).challenger, status(store, "three")) == (None, "shadow")
    assert state.in_flight(store, LATER) == "three"
    with pytest.raises(Refused, match=r"it was done at 00:00 UTC: three is rolled back to m-two.*--again"):
        operate.roll_back(store, LATER, "ana", "a hunch", 6)
    assert (status(store, "two"), status(store, "three")) == ("live", "rolled_back")
    assert state.in_flight(store, LATER) is None


def test_after_a_promotion_that_was_killed_a_person_looks_before_going_back(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    first_live(store)
    start(store, "two", NOW + 3 * HOUR)
    killed(monkeypatch, state, "_swap", lambda: promote(store, NOW + 8 * HOUR))
    with pytest.raises(Refused, match="half-way and is finished now"):
        operate.roll_back(store, NOW + 9 * HOUR, "ana", "a hunch", 6)
    assert state.rollout_state(store).champion == "m-two"
    assert operate.roll_back(store, NOW + 9 * HOUR, "ana", "a hunch", 6).champion == "m-one"


def test_a_second_rollback_at_once_goes_no_further_unless_it_is_meant(store: DirectoryStore) -> None:
    with_challenger(store)
    operate.roll_back(store, LATER, "ana", "complaints", 6)
    with pytest.raises(Refused, match="take down m-two, which is live"):
        operate.roll_back(store, LATER + HOUR / 60, "ben", "complaints", 6)
    assert operate.roll_back(store, LATER + HOUR / 60, "ben", "harm", 6, again=True).champion == "m-one"


def test_an_hour_later_a_rollback_means_what_is_live_then(store: DirectoryStore) -> None:
    with_challenger(store)
    operate.roll_back(store, LATER, "ana", "complaints", 6)
    assert operate.roll_back(store, LATER + HOUR, "ana", "still", 6).champion == "m-one"


def test_a_damaged_record_does_not_make_a_failure_of_a_rollback(
    store: DirectoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with_challenger(store)
    store.put(state.candidate_key("three"), b'{"cand')
    assert operate.roll_back(store, LATER, "ana", "a hunch", 6).challenger is None
    assert "the record of three did not" in caplog.text


def test_where_the_pointer_is_gone_nobody_takes_it_for_a_new_home(store: DirectoryStore) -> None:
    with_challenger(store)
    held = store.get(state.LIVE_KEY).data
    store.delete(state.LIVE_KEY)
    with pytest.raises(InvalidInput, match=r"from `state` in 'rollout/log/000005.json'"):
        state.rollout_state(store)
    store.put_json(state.LIVE_KEY, store.get_json("rollout/log/000005.json")["state"])
    assert store.get(state.LIVE_KEY).data == held


def test_a_first_move_that_was_killed_is_finished(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed(monkeypatch, state, "_swap", lambda: start(store, "one", NOW))
    assert state.rollout_state(store) == RolloutState.initial()
    step = operate.settle(store, NOW)
    assert step is not None
    assert step["action"] == "start_shadow"
    assert (state.rollout_state(store).challenger, status(store, "one")) == ("m-one", "shadow")
    assert operate.settle(store, NOW) is None


@pytest.mark.parametrize(
    ("key", "left"),
    [
        (state.LIVE_KEY, {"version": 3, "stage_since": "yesterday"}),
        (state.LOOP_KEY, {"retrains": {"one": "soon"}}),
        (state.HOLDS_KEY, {"holds": [{"scope": "all"}]}),
        (state.CLAIM_KEY, {"a": 1}),
        (state.candidate_key("one"), {"candidate": "one"}),
    ],
)
def test_a_record_of_another_shape_is_named(store: DirectoryStore, key: str, left: dict[str, object]) -> None:
    first_live(store)
    store.put_json(key, left)
    with pytest.raises(InvalidInput, match=f"'{key}' in the store was damaged .*put it back from a backup"):
        state.loop_state(store, NOW)
