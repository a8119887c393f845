"""Sensors ask once and the same way, also when a tick was killed half-way."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

import pytest

from assets.deployment import _evidence
from assets.environment import Environment
from redqueen import state
from redqueen.clock import StoreClock
from redqueen.policy import LabelCounts
from redqueen.rollout import MISSED, Arms, RolloutState, Tally
from redqueen.tables import HOUR, write_part
from sensors.asking import ask, cursor_of
from tests.test_signals import predictions, votes

NOW = datetime(2026, 1, 3, 14, 30, tzinfo=UTC)
ENOUGH = LabelCounts(5000, 5000)


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    found = Environment(home=str(tmp_path / "home"))
    StoreClock(found.store).set(NOW)
    return found


def test_a_tick_that_is_evaluated_again_requests_the_same_run(env: Environment) -> None:
    first, again = (ask(env, "first_lap", "bootstrap", [], ENOUGH) for _ in range(2))
    (request,) = first.run_requests or ()
    assert again.run_requests == [request]
    assert request.run_key == f"lap:{request.partition_key}"
    assert request.tags["redqueen/trigger"] == "bootstrap"
    assert state.in_flight(env.store, NOW) == request.partition_key


def test_a_tick_killed_between_claim_and_record_asks_again_and_is_not_held_by_itself(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(state, "record_decision", die)
        with pytest.raises(Killed):
            ask(env, "first_lap", "bootstrap", [], ENOUGH)
    claimed = state.in_flight(env.store, NOW)
    assert claimed is not None
    (request,) = ask(env, "first_lap", "bootstrap", [], ENOUGH).run_requests or ()
    assert request.partition_key == claimed


def test_while_another_lap_is_under_way_the_answer_is_held_and_recorded(env: Environment) -> None:
    state.advance_candidate(env.store, "other", "launched", NOW, "by hand")
    result = ask(env, "first_lap", "bootstrap", [], ENOUGH)
    assert not result.run_requests
    assert "other" in str(result.skip_reason)
    (kept,) = state.decisions(env.store)
    assert kept["action"] == "hold"


def test_a_lap_that_was_decided_on_in_a_lost_tick_is_requested_again_in_the_next_window(
    env: Environment,
) -> None:
    (lost,) = ask(env, "first_lap", "bootstrap", [], ENOUGH).run_requests or ()
    StoreClock(env.store).set(NOW + HOUR)  # the tick was lost: nobody launched what it requested
    again = ask(env, "first_lap", "bootstrap", [], ENOUGH)
    assert [request.run_key for request in again.run_requests or ()] == [lost.run_key]
    assert state.lost_lap(env.store, "drift") is None, "another sensor's is not this one's"
    state.advance_candidate(env.store, str(lost.partition_key), "launched", NOW + HOUR, "it has started")
    assert not ask(env, "first_lap", "bootstrap", [], ENOUGH).run_requests


def test_a_place_that_was_taken_for_a_decision_that_does_not_stand_is_given_back(env: Environment) -> None:
    assert not ask(env, "first_lap", "bootstrap", [], LabelCounts(3, 3)).run_requests
    again = ask(env, "first_lap", "bootstrap", [], ENOUGH)  # more labels have come, in the same window
    assert not again.run_requests
    assert state.in_flight(env.store, NOW) is None
    StoreClock(env.store).set(NOW + HOUR)
    assert ask(env, "first_lap", "bootstrap", [], ENOUGH).run_requests


def test_a_cursor_says_why_in_few_words() -> None:
    cursor = json.loads(cursor_of(NOW, "x" * 900))
    assert cursor["window"] == "2026-01-03T14"
    assert len(cursor["why"]) == 180


# -- the evidence of a ramp ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sources", "missed"), [((), 0), (("moderator",), 0), (("audit",), 1), (("audit", "moderator"), 1)]
)
def test_a_canary_is_judged_with_few_labels_or_none(
    env: Environment, sources: tuple[str, ...], missed: int
) -> None:
    start = NOW.replace(minute=0) - HOUR
    rows = [
        {"event_id": f"e{i}", "actor_id": f"a{i}", "ts": start, "stage": "25%", "arm": arm}
        for i, arm in enumerate(("champion", "challenger"))
    ]
    write_part(env.store, "predictions", start, predictions(rows))
    if sources:
        said = {
            "event_id": "e1",
            "policy": "spam",
            "value": "abuse",
            "received_at": start,
            "labeled_at": start,
        }
        told = votes(
            [{**said, "label_id": source, "source": source, "rater_id": source} for source in sources]
        )
        write_part(env.store, "ingested/labels", start, told)
    seen = RolloutState(
        "m1", "one", "m2", "two", stage="25%", share=0.25, stage_since=start, ramp_since=start
    )
    (stratum,) = _evidence(env, seen, None, NOW).strata
    assert stratum.harm[MISSED] == Tally(Arms(1, 1), Arms(0, missed))
