"""Attackers' adaptation: figures per distinct actor, and alarms with a stated false-alarm rate."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from redqueen.adaptation import (
    AUDITED_EVASION,
    BAND_ABUSE,
    CAUGHT,
    EVASION,
    MASS,
    OBFUSCATION,
    RULES,
    AdaptationFigures,
    Alarm,
    Baseline,
    Measure,
    alarms,
    baselines,
    evidence_path,
    join_labels,
    share,
    unmeasured,
    wilson,
    window_figures,
)
from redqueen.errors import InvalidInput

T0 = datetime(2026, 1, 3, tzinfo=UTC)
HOUR = timedelta(hours=1)
RULE = {rule.figure: rule for rule in RULES}


def row(actor: str, **over: object) -> dict[str, object]:
    base = {"event_id": f"{actor}-{over}", "actor_id": actor, "ts": T0, "action": "allow", "arm": "champion"}
    return base | {"obfuscation": 0.0, "threshold_ratio": 0.1, "propensity": 0.1, "abuse": None} | over


def figures(rows: list[dict[str, object]], **measure: int) -> AdaptationFigures:
    frame = pl.DataFrame(rows, schema_overrides={"abuse": pl.Boolean}, infer_schema_length=None)
    how = Measure(**({"min_actors": 1, "min_labelled": 1, "min_confirming": 1} | measure))  # type: ignore[arg-type]
    return window_figures(frame, window=T0, measure=how)


# ---- figures -------------------------------------------------------------------------------------


def test_a_thousand_messages_of_one_actor_are_one_piece_of_evidence() -> None:
    loud = [row("loud", obfuscation=0.4, abuse=True, threshold_ratio=0.9) for _ in range(1000)]
    quiet = [row(f"q{i}", abuse=True, action="block", threshold_ratio=2.0) for i in range(9)]
    found = figures(loud + quiet)
    for name in (EVASION, OBFUSCATION, MASS):
        assert found[name].value == pytest.approx(0.1)
        assert found[name].n == 10
    assert found[CAUGHT].value == pytest.approx(0.9)


def test_review_is_delivered_and_unlabelled_is_not_benign() -> None:
    found = figures([row("a", action="review", abuse=True), row("b", action="limit", abuse=True), row("c")])
    assert found[EVASION].hits == 1
    assert found[EVASION].n == 2


def test_mass_counts_actors_whose_highest_score_lies_just_under() -> None:
    over = [row("over", threshold_ratio=r) for r in (0.5, 1.0)]
    found = figures([*over, row("under", threshold_ratio=0.99), row("far", threshold_ratio=0.29)])
    assert found[MASS].hits == 1
    assert found[MASS].n == 3


def test_shadow_rows_decided_nothing() -> None:
    found = figures([row("a", arm="shadow", obfuscation=1.0), row("a")])
    assert found[OBFUSCATION].hits == 0
    assert found.n_events == 1


def test_small_samples_are_unknown_with_the_reason_never_zero() -> None:
    found = figures([row("a", abuse=True)], min_labelled=20)
    assert found[EVASION].value is None
    assert found[EVASION].reason == "1 actors, needs 20"
    assert found["new_domain_rate"].status == "unknown"


def test_audited_evasion_weighs_by_inverse_propensity() -> None:
    rows = [row(f"e{i}", audited=True, abuse=True, propensity=0.05) for i in range(30)]
    rows += [row(f"c{i}", audited=True, abuse=True, action="block", propensity=0.5) for i in range(30)]
    rows += [row(f"x{i}", audited=False, abuse=True, propensity=0.5) for i in range(30)]
    figure = figures(rows)[AUDITED_EVASION]
    assert figure.value == pytest.approx(20 / 22)
    assert figure.n == 60
    assert figure.high is not None
    assert figure.low is not None
    plain_low, plain_high = wilson(60 * 20 / 22, 60)
    assert figure.high - figure.low > plain_high - plain_low  # unequal weights cost precision


def test_the_band_knows_whether_labels_confirm_it() -> None:
    rows = [row(f"a{i}", threshold_ratio=0.8, abuse=i < 3) for i in range(6)]
    assert figures(rows)[BAND_ABUSE].value == pytest.approx(0.5)


def test_joining_labels_keeps_every_row_and_ignores_rows_without_votes() -> None:
    predictions = pl.DataFrame({"event_id": ["a", "b", "c"], "ts": [T0] * 3})
    gold = pl.DataFrame(
        {
            "event_id": ["a", "a", "b", "c"],
            "policy": ["spam", "scam", "spam", "spam"],
            "p_abuse": [0.1, 0.9, 0.2, 0.0],
            "n_votes": [1, 1, 2, 0],
            "first_labeled_at": [T0 + HOUR, T0 + 2 * HOUR, T0, T0],
            "sources": [["report"], ["audit"], ["moderator"], []],
        },
        schema_overrides={"sources": pl.List(pl.String)},
    )
    joined = join_labels(predictions, gold)
    assert joined["abuse"].to_list() == [True, False, None]
    assert joined["audited"].to_list() == [True, False, False]
    assert joined["known_at"].to_list() == [T0 + HOUR, T0, None]
    late = join_labels(predictions, gold, pl.DataFrame({"event_id": ["a"], "known_at": [T0 + 9 * HOUR]}))
    assert late["known_at"].to_list() == [T0 + 9 * HOUR, None, None]
    with pytest.raises(InvalidInput, match="n_votes"):
        join_labels(predictions, gold.drop("n_votes"))


def test_fresh_evidence_counts_each_actor_in_the_window_his_first_label_arrived() -> None:
    trailing = pl.DataFrame(
        [
            row("old", ts=T0 - 2 * HOUR, known_at=T0 - HOUR, abuse=True),
            row("old", ts=T0, known_at=T0, abuse=True),
            row("new", ts=T0 - 2 * HOUR, known_at=T0, abuse=True),
        ]
    )
    found = window_figures(trailing.clear(), trailing, window=T0, measure=Measure(min_labelled=1))[EVASION]
    assert (found.n, found.fresh_n, found.fresh_hits) == (2, 1, 1)


@given(st.integers(0, 200), st.integers(1, 200))
def test_wilson_holds_the_estimate_and_stays_within_zero_and_one(hits: int, extra: int) -> None:
    n = hits + extra
    low, high = wilson(hits, n)
    assert 0 <= low <= hits / n <= high + 1e-12
    assert high <= 1


# ---- alarms --------------------------------------------------------------------------------------

QUIET = {EVASION: (0.08, 25), OBFUSCATION: (0.03, 1300), MASS: (0.04, 1300)}
ATTACK = {EVASION: (0.35, 25), OBFUSCATION: (0.20, 1300), MASS: (0.10, 1300)}


def simulate(rng: np.random.Generator, rates: list[dict[str, tuple[float, int]]]) -> list[AdaptationFigures]:
    """Windows drawn from rates; evasion is shown over trailing 4 windows and counted fresh, as in
    production."""
    windows: list[AdaptationFigures] = []
    evasion: list[tuple[int, int]] = []
    for hour, rate in enumerate(rates):
        counts = {name: (int(rng.binomial(n, p)), n) for name, (p, n) in rate.items()}
        evasion.append(counts[EVASION])
        hits, n = (sum(c[i] for c in evasion[-4:]) for i in (0, 1))
        found = {name: share(*counts[name], 50) for name in (OBFUSCATION, MASS)}
        found[EVASION] = share(hits, n, 20, counts[EVASION])
        windows.append(AdaptationFigures(T0 + hour * HOUR, 1.0, 2400, 1300, found))
    return windows


def known_baseline(rng: np.random.Generator) -> dict[str, Baseline]:
    return baselines(simulate(rng, [QUIET] * 12))


def test_two_hundred_quiet_runs_of_sixty_windows_stay_within_the_stated_false_alarm_rate() -> None:
    rng = np.random.default_rng(7)
    crossed = dict.fromkeys(RULE, 0)
    alarmed = 0
    for _ in range(200):
        base, history = known_baseline(rng), simulate(rng, [QUIET] * 60)
        hot = {
            name: evidence_path(history, base[name], rule) >= 1 / rule.alpha for name, rule in RULE.items()
        }
        for name in RULE:
            crossed[name] += bool(hot[name].any())
        looks = np.flatnonzero(np.any(list(hot.values()), axis=0))  # only here can an alarm stand
        alarmed += any(alarms(history[: look + 1], base) for look in looks)
    stated = 60 * RULES[0].alpha  # per figure and run
    assert all(count <= 200 * stated for count in crossed.values())
    assert alarmed <= 1


@pytest.mark.parametrize("name", [EVASION, OBFUSCATION, MASS])
def test_each_figure_finds_the_attack_by_itself_within_four_windows(name: str) -> None:
    rng = np.random.default_rng(11)
    found = 0
    for _ in range(60):
        base = known_baseline(rng)
        history = simulate(rng, [QUIET] * 10 + [QUIET | {name: ATTACK[name]}] * 4)
        found += {alarm.figure for alarm in alarms(history, base)} == {name}
    assert found >= 54


def test_a_rise_within_tolerance_never_alarms_however_long_it_lasts() -> None:
    rng = np.random.default_rng(5)
    slow = QUIET | {OBFUSCATION: (0.045, 1300)}
    for _ in range(20):
        assert alarms(simulate(rng, [slow] * 60), known_baseline(rng)) == ()


def test_one_bad_window_is_not_persistence() -> None:
    rng = np.random.default_rng(5)
    base = known_baseline(rng)
    spike = simulate(rng, [QUIET] * 6 + [QUIET | {OBFUSCATION: (0.5, 1300)}])
    assert alarms(spike, base) == ()
    assert evidence_path(spike, base[OBFUSCATION], RULE[OBFUSCATION])[-1] > 1e6


def test_the_alarm_says_it_in_a_sentence_and_survives_json() -> None:
    window = AdaptationFigures(T0, 1.0, 500, 500, {EVASION: share(36, 88, 20, (36, 88))})
    base = {EVASION: Baseline(EVASION, 0.12, 120, 1000, 24)}
    (alarm,) = alarms([window] * 3, base)
    assert alarm.sentence == "evading actors 41% (n=88) against 12% before, in 3 of 3 windows"
    assert Alarm.from_dict(json.loads(json.dumps(alarm.to_dict()))) == alarm
    assert AdaptationFigures.from_dict(json.loads(json.dumps(window.to_dict()))) == window
    assert Baseline.from_dict(json.loads(json.dumps(base[EVASION].to_dict()))) == base[EVASION]


def test_silence_of_an_unknown_figure_is_named() -> None:
    empty = AdaptationFigures(T0, 1.0, 3, 3, {OBFUSCATION: share(0, 3, 50)})
    base = {OBFUSCATION: Baseline(OBFUSCATION, 0.03, 30, 1000, 9)}
    reasons = unmeasured([empty], base)
    assert reasons[OBFUSCATION] == "3 actors, needs 50"
    assert reasons[EVASION] == "no baseline for this champion yet"
    assert alarms([empty] * 5, base) == ()


def test_baselines_need_windows_fall_back_and_respect_a_floor() -> None:
    rng = np.random.default_rng(2)
    former = known_baseline(rng)
    assert baselines(simulate(rng, [QUIET] * 2)) == {}
    assert baselines(simulate(rng, [QUIET] * 2), fallback=former) == former
    raised = baselines(simulate(rng, [QUIET] * 5), floor={OBFUSCATION: 0.09})[OBFUSCATION]
    assert raised.mean == 0.09
    assert raised.hits / raised.n == pytest.approx(0.09, abs=1e-3)
