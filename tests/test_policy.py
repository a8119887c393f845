"""The decision to retrain: what fires, who is behind it, what holds it back, and that it can be replayed."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen.adaptation import (
    BAND_ABUSE,
    EVASION,
    MASS,
    OBFUSCATED_ABUSE,
    OBFUSCATION,
    AdaptationFigures,
    Alarm,
    share,
)
from redqueen.drift import DriftFigures
from redqueen.errors import InvalidInput
from redqueen.policy import Decision, Hold, LabelCounts, Limits, LoopState, Signals, decide, replay

T0 = datetime(2026, 1, 3, 14, tzinfo=UTC)
NOW = T0 + timedelta(hours=1)
HOUR = timedelta(hours=1)
LIVE = LoopState(champion="m1", last_retrain=T0 - timedelta(hours=20), retrains_today=1)
PLENTY = LabelCounts(trusted=5000, new=900)
LIMITS = Limits()


def drift(share_drifted: float = 0.0, score: float = 0.0, n: int = 2400) -> DriftFigures:
    psi = {f"f{i}": 0.5 if i < round(share_drifted * 10) else 0.01 for i in range(10)} | {"score": score}
    return DriftFigures(n, psi, dict.fromkeys(psi, 0.0), dict.fromkeys(psi, 0.005), ("score",))


def alarm(figure: str) -> Alarm:
    sentence = f"{figure} 41% (n=88) against 12% before, in 3 of 3 windows"
    return Alarm(figure, 0.41, 88, 0.12, 0.29, 3, 3, 1e5, 2000, sentence)


def window(
    ago: int = 0, *alarmed: str, drifted: DriftFigures | None = None, judged: dict[str, Any] | None = None
) -> Signals:
    figures = AdaptationFigures(T0 - ago * HOUR, 1.0, 2400, 1300, judged or {})
    return Signals(
        window=T0 - ago * HOUR,
        champion="m1",
        drift=drifted or drift(),
        figures=figures,
        alarms=tuple(alarm(name) for name in alarmed),
        labels=PLENTY,
    )


def ask(trigger: Any, *history: Signals, state: LoopState = LIVE, **over: Any) -> Decision:
    return decide(history or (window(),), state, over.pop("limits", LIMITS), trigger, now=NOW, **over)


# ---- what fires ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trigger", ["drift", "adaptation", "evasion", "obfuscation", "threshold_mass"])
def test_quiet_windows_decide_nothing_and_say_so(trigger: str) -> None:
    decision = ask(trigger, window(2), window(1), window())
    assert decision.action == "none"
    assert decision.message.startswith("No retrain: ")
    assert not decision.page


def test_drift_fires_on_share_or_scores_only_when_it_persists() -> None:
    moved, scored = drift(0.4), drift(score=0.3)
    assert ask("drift", window(2), window(1), window(drifted=moved)).action == "none"
    for over in (moved, scored):
        decision = ask("drift", window(2), window(1, drifted=over), window(drifted=over))
        assert (decision.action, decision.attribution) == ("retrain", "organic")


def test_drift_of_few_rows_or_of_a_former_champion_is_not_counted() -> None:
    few = drift(0.9, n=100)
    assert ask("drift", *(window(i, drifted=few) for i in (2, 1, 0))).action == "none"
    former = replace(window(1, drifted=drift(0.9)), champion="m0")
    assert ask("drift", former, window(drifted=drift(0.9))).action == "none"


def test_an_evasion_alarm_is_an_attack_and_names_the_decision() -> None:
    decision = ask("adaptation", window(0, MASS, EVASION))
    assert (decision.action, decision.trigger, decision.attribution) == ("retrain", "evasion", "attack")
    assert decision.id.startswith("2026-01-03T14-attack-")
    assert len(decision.id) == len("2026-01-03T14-attack-7f3a")
    assert "41% (n=88) against 12% before" in decision.message
    assert decision.expected_benefit == "evasion_rate from 41% back towards 12%"


@pytest.mark.parametrize(
    ("alarmed", "confirming", "judged", "expected"),
    [
        (OBFUSCATION, OBFUSCATED_ABUSE, (9, 10), ("retrain", "attack")),
        (OBFUSCATION, OBFUSCATED_ABUSE, (0, 2), ("retrain", "unclear")),
        (OBFUSCATION, OBFUSCATED_ABUSE, (1, 30), ("none", "organic")),
        (MASS, BAND_ABUSE, (9, 10), ("retrain", "attack")),
        (MASS, BAND_ABUSE, (0, 0), ("retrain", "unclear")),
        (MASS, BAND_ABUSE, (0, 40), ("none", "organic")),
    ],
)
def test_labels_of_the_actors_concerned_tell_attack_from_meme(
    alarmed: str, confirming: str, judged: tuple[int, int], expected: tuple[str, str]
) -> None:
    seen = window(0, alarmed, judged={confirming: share(*judged, 5)})
    decision = ask("adaptation", seen)
    assert (decision.action, decision.attribution) == expected


def test_each_figure_can_be_asked_for_by_itself() -> None:
    seen = window(0, OBFUSCATION, judged={OBFUSCATED_ABUSE: share(9, 10, 5)})
    assert ask("obfuscation", seen).action == "retrain"
    assert ask("evasion", seen).action == "none"


def test_drift_beside_an_evasion_alarm_is_an_attack() -> None:
    moved = drift(0.5)
    decision = ask("drift", window(1, drifted=moved), window(0, EVASION, drifted=moved))
    assert decision.attribution == "attack"


def test_bootstrap_waits_for_labels_then_fires_once() -> None:
    empty = LoopState()
    few = ask("bootstrap", state=empty, labels=LabelCounts(999, 999))
    assert few.action == "none"
    assert "999 of 1000" in few.message
    enough = ask("bootstrap", state=empty, labels=LabelCounts(1000, 1000))
    assert (enough.action, enough.attribution) == ("retrain", "n/a")
    assert ask("bootstrap").action == "none"
    assert ask("adaptation", state=empty).action == "none"


def test_a_bootstrap_needs_no_window_at_all() -> None:
    decision = decide([], LoopState(), LIMITS, "bootstrap", now=NOW, labels=LabelCounts(2000, 2000))
    assert decision.action == "retrain"
    assert decision.window == NOW


# ---- what holds back -------------------------------------------------------------------------------------

UNTIL = NOW + HOUR
HELD = {
    "cooldown": replace(LIVE, last_retrain=NOW - HOUR),
    "daily budget": replace(LIVE, retrains_today=4),
    "run in flight": replace(LIVE, in_flight="2026-01-03T12-drift-0000"),
    "frozen (training)": replace(LIVE, holds=(Hold("training", "ana", "holiday", UNTIL),)),
    "frozen (all)": replace(LIVE, holds=(Hold("all", "ana", "holiday", UNTIL),)),
}


@pytest.mark.parametrize("name", HELD)
def test_each_guard_holds_and_names_itself(name: str) -> None:
    decision = ask("adaptation", window(0, EVASION), state=HELD[name])
    assert decision.action == "hold"
    assert len(decision.held_by) == 1
    assert decision.held_by[0].startswith(name)
    assert decision.held_by[0] in decision.message


def test_label_guards_state_their_numbers() -> None:
    few = ask("adaptation", window(0, EVASION), labels=LabelCounts(5000, 149))
    assert few.held_by == ("too few trusted labels: 149 new ones, 150 needed",)
    early = ask("adaptation", window(0, EVASION), labels=LabelCounts(5000, 400, missed=149))
    assert early.held_by == ("too few judged examples: 149 of what got through, 150 needed",)
    assert (
        ask("adaptation", window(0, EVASION), labels=LabelCounts(5000, 400, missed=150)).action == "retrain"
    )
    poisoned = ask("adaptation", window(0, EVASION), labels=LabelCounts(5000, 400, suspect=100))
    assert poisoned.held_by[0].startswith("suspect labels: 100 (20%")
    assert poisoned.page


def test_holds_of_another_scope_or_past_their_end_do_not_hold() -> None:
    holds = (Hold("promotion", "ana", "x", UNTIL), Hold("training", "ana", "x", NOW))
    assert ask("adaptation", window(0, EVASION), state=replace(LIVE, holds=holds)).action == "retrain"
    with pytest.raises(InvalidInput, match="scope"):
        Hold("everything", "ana", "x", UNTIL)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "broken",
    [
        replace(window(), health="broken", health_reason="evidently raised"),
        replace(window(), health="stale"),
        window(6),
        replace(window(), drift=None, figures=None),
        replace(window(), champion="m0"),
    ],
)
@pytest.mark.parametrize("trigger", ["drift", "adaptation"])
def test_unknown_monitoring_holds_and_pages_even_when_nothing_fired(broken: Signals, trigger: str) -> None:
    decision = ask(trigger, broken)
    assert decision.action == "hold"
    assert decision.page
    assert decision.held_by[0].startswith("monitoring unknown: ")


def test_a_person_is_held_by_a_run_in_flight_only() -> None:
    frozen = replace(HELD["frozen (all)"], retrains_today=9, last_retrain=NOW)
    assert ask("manual", window(9), state=frozen).action == "retrain"
    assert ask("manual", state=HELD["run in flight"]).action == "hold"


def test_unmeasured_figures_are_named_in_the_reasons() -> None:
    seen = replace(window(), unmeasured={EVASION: "3 actors, needs 20"})
    assert "evasion_rate unknown: 3 actors, needs 20" in ask("adaptation", seen).reasons


def test_an_unknown_trigger_is_refused() -> None:
    with pytest.raises(InvalidInput, match="gut feeling"):
        ask("gut feeling")


# ---- laws ------------------------------------------------------------------------------------------------

states = st.builds(
    LoopState,
    champion=st.sampled_from([None, "m1"]),
    last_retrain=st.sampled_from([None, NOW - HOUR, NOW - 20 * HOUR]),
    retrains_today=st.integers(0, 5),
    in_flight=st.sampled_from([None, "c"]),
    holds=st.sampled_from([(), (Hold("training", "ana", "x", UNTIL),)]),
)
windows = st.builds(
    lambda ago, alarmed, moved: window(ago, *alarmed, drifted=drift(moved)),
    st.integers(0, 8),
    st.sets(st.sampled_from([EVASION, OBFUSCATION, MASS])),
    st.sampled_from([0.0, 0.5]),
)
triggers = st.sampled_from(["bootstrap", "drift", "adaptation", "evasion", "threshold_mass", "manual"])
counted = st.builds(LabelCounts, st.integers(0, 2000), st.integers(0, 300), st.integers(0, 100))


@settings(max_examples=150, deadline=None)
@given(st.lists(windows, max_size=4), states, triggers, counted)
def test_a_decision_replays_from_its_own_json(
    history: list[Signals], state: LoopState, trigger: Any, labels: LabelCounts
) -> None:
    decision = decide(history, state, LIMITS, trigger, now=NOW, labels=labels)
    stored = Decision.from_dict(json.loads(json.dumps(decision.to_dict())))
    assert stored == decision
    assert replay(stored) == decision


@settings(max_examples=150, deadline=None)
@given(st.lists(windows, max_size=4), states, triggers, counted)
def test_no_sensor_retrains_past_a_guard(
    history: list[Signals], state: LoopState, trigger: Any, labels: LabelCounts
) -> None:
    decision = decide(history, state, LIMITS, trigger, now=NOW, labels=labels)
    if decision.action == "retrain":
        assert not decision.held_by
        assert state.in_flight is None
        if decision.trigger != "manual":
            assert not state.holds
            assert state.retrains_today < LIMITS.daily_budget
            assert state.last_retrain != NOW - HOUR
    else:
        assert (decision.action == "hold") == bool(decision.held_by)
    assert decision.message.endswith(".")
