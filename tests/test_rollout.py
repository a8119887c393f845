"""The rollout: false alarms and power of its tests, what is counted, and the laws of its state machine."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen.errors import InvalidInput, Refused
from redqueen.policy import Hold
from redqueen.rollout import (
    GUARDRAILS,
    HARM_RATIOS,
    JUDGED,
    LIVE,
    MISMATCH_RATIOS,
    MISSED,
    NONE,
    SHADOW,
    SHARES,
    SLOW,
    WRONG,
    Arms,
    Candidate,
    Evidence,
    Limits,
    RolloutState,
    ShadowComparison,
    Stage,
    Step,
    Stratum,
    Tally,
    apply,
    assign,
    collect,
    compare_shadow,
    harm_evidence,
    log_e_path,
    mismatch_evidence,
    next_step,
    risk_difference,
    rollback,
)

T0 = datetime(2026, 1, 3, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
LIMITS = Limits()

# ---- assignment ------------------------------------------------------------------------------------------


@given(st.text(min_size=1), st.text(), st.floats(0, 1), st.floats(0, 1))
def test_who_meets_the_challenger_still_does_at_a_larger_share(
    actor: str, salt: str, one: float, other: float
) -> None:
    small, large = sorted((one, other))
    if assign(actor, salt, small) == "challenger":
        assert assign(actor, salt, large) == "challenger"
    assert assign(actor, salt, 0.0) == "champion"
    assert assign(actor, salt, 1.0) == "challenger"


@pytest.mark.parametrize("share", SHARES.values())
def test_the_share_is_met_and_differs_between_salts(share: float) -> None:
    arms = {salt: [assign(f"a{i}", salt, share) == "challenger" for i in range(20_000)] for salt in "xy"}
    both = np.array(list(arms.values()))
    assert both.mean(axis=1) == pytest.approx([share, share], rel=0.15)
    assert (both[0] & both[1]).mean() == pytest.approx(share**2, abs=0.005)


# ---- false alarms and power ------------------------------------------------------------------------------

RAMP = np.repeat([0.01, 0.05, 0.25], 20)  # 60 looks
NEEDED = np.log(len(GUARDRAILS) / LIMITS.alpha)


def ramp_paths(runs: int, rates: np.ndarray, lift: float = 1.0, n: int = 1300, seed: int = 0) -> np.ndarray:
    """Log e-values [runs, looks] of a ramp with a base rate per look; the challenger's is `lift` times it."""
    rng = np.random.default_rng(seed)
    challengers = rng.binomial(n, RAMP, (runs, len(RAMP)))
    hits = rng.binomial(challengers, np.minimum(rates * lift, 1))
    others = rng.binomial(n - challengers, rates)
    return log_e_path(hits, hits + others, challengers / n, HARM_RATIOS)


@pytest.mark.parametrize("moving", [False, True])
def test_a_harmless_challenger_is_rolled_back_at_most_at_the_stated_rate(moving: bool) -> None:
    # The base rate rises tenfold while the share does: pooled tests see that as harm every time (Simpson).
    rates = np.geomspace(0.005, 0.05, len(RAMP)) if moving else np.full(len(RAMP), 0.02)
    runs = 2000
    crossed = (ramp_paths(runs, rates) >= NEEDED).any(axis=1)
    assert crossed.mean() <= LIMITS.alpha / len(GUARDRAILS)


@pytest.mark.parametrize(("rate", "lift", "units"), [(0.05, 1.5, 3000), (0.01, 2.0, 4500), (0.02, 3.0, 700)])
def test_harm_is_found_after_about_as_many_canary_actors_as_known(
    rate: float, lift: float, units: int
) -> None:
    paths = ramp_paths(300, np.full(len(RAMP), rate), lift, seed=3)
    met = np.cumsum(1300 * RAMP)
    first = np.where((paths >= NEEDED).any(axis=1), (paths >= NEEDED).argmax(axis=1), len(RAMP) - 1)
    assert np.median(met[first]) <= units


def test_the_sample_ratio_test_is_quiet_on_a_fair_split_and_loud_on_a_broken_one() -> None:
    rng = np.random.default_rng(1)
    needed = np.log(1 / LIMITS.mismatch_alpha)
    fair = log_e_path(rng.binomial(400, RAMP, (1000, 60)), 400, RAMP, MISMATCH_RATIOS)
    assert (fair >= needed).any(axis=1).mean() <= LIMITS.mismatch_alpha
    for broken in (0.7, 1.4):
        skewed = log_e_path(rng.binomial(400, RAMP * broken, (200, 60)), 400, RAMP, MISMATCH_RATIOS)
        assert (skewed >= needed).any(axis=1).mean() > 0.95


def test_strata_without_events_or_without_a_control_say_nothing() -> None:
    empty = Stratum("a", "1%", harm={MISSED: Tally(Arms(90, 1), Arms(0, 0))})
    alone = Stratum("b", "1%", harm={MISSED: Tally(Arms(0, 5), Arms(0, 5))})
    assert harm_evidence([empty, alone], MISSED) == pytest.approx(1.0)
    assert harm_evidence([], MISSED) == 1.0
    assert mismatch_evidence([]) == 1.0


def judged(n: int, harmed: tuple[float, float] = (0.01, 0.01)) -> Stratum:
    tally = Tally(Arms(3 * n, n), Arms(round(3 * n * harmed[0]), round(n * harmed[1])))
    return Stratum(
        "a", "25%", joined=Arms(3 * n, n), abusive=Arms(90, 30), cohort=dict.fromkeys(JUDGED, tally)
    )


def test_no_event_in_few_actors_is_not_certainty() -> None:
    few, many = (risk_difference([judged(n, (0, 0))], MISSED, LIMITS) for n in (10, 300))
    assert few.difference == many.difference == 0
    assert not few.shown
    assert many.shown
    assert not risk_difference([], MISSED, LIMITS).shown


def test_risk_difference_is_stratified() -> None:
    # Within each stratum the arms are equal; pooled, the challenger looks five times worse.
    early = Stratum("a", "1%", cohort={MISSED: Tally(Arms(9900, 100), Arms(99, 1))})
    late = Stratum("b", "25%", cohort={MISSED: Tally(Arms(300, 1000), Arms(30, 100))})
    assert risk_difference([early, late], MISSED, LIMITS).difference == pytest.approx(0)


# ---- counting --------------------------------------------------------------------------------------------


def served(actor: str, hour: int, arm: str = "champion", stage: str = "25%", **over: Any) -> dict[str, Any]:
    base = {"event_id": f"{actor}{hour}{over}", "actor_id": actor, "ts": T0 + hour * HOUR, "arm": arm}
    return (
        base | {"stage": stage, "action": "allow", "latency_us": 900, "degraded": False, "abuse": None} | over
    )


def counted(*rows: dict[str, Any], **options: Any) -> tuple[Stratum, ...]:
    return collect(pl.DataFrame(list(rows), schema_overrides={"abuse": pl.Boolean}), **options)


def test_an_actor_is_harmed_once_per_guardrail_however_loud_he_is() -> None:
    loud = [served("loud", hour, "challenger", abuse=True) for hour in (0, 0, 0, 1, 2)]
    first, second, third = counted(*loud, served("other", 0))
    assert first.harm[MISSED] == Tally(Arms(1, 1), Arms(0, 1))
    assert second.harm[MISSED] == third.harm[MISSED] == Tally(Arms(0, 0), Arms(0, 0))
    assert [s.entered.challenger for s in (first, second, third)] == [1, 0, 0]
    slow = counted(*(served("loud", hour, "challenger", latency_us=60_000) for hour in (0, 0, 0, 1)))
    assert [s.harm[SLOW] for s in slow] == [Tally(Arms(0, 1), Arms(0, 1)), Tally()]
    assert first.cohort[MISSED] == Tally(Arms(0, 1), Arms(0, 1))


def test_harm_is_what_the_label_says_about_the_action() -> None:
    (stratum,) = counted(
        served("missed", 0, abuse=True, action="review"),
        served("caught", 0, abuse=True, action="block"),
        served("wronged", 0, abuse=False, action="limit"),
        served("fine", 0, abuse=False),
        served("unknown", 0, action="block", latency_us=60_000, degraded=True),
    )
    assert {g: stratum.harm[g].harmed.champion for g in GUARDRAILS} == dict.fromkeys(GUARDRAILS, 1)
    assert stratum.cohort[MISSED] == Tally(Arms(4, 0), Arms(1, 0))
    assert stratum.cohort[WRONG] == Tally(Arms(4, 0), Arms(1, 0))
    assert stratum.abusive == Arms(2, 0)


def test_missed_abuse_is_counted_on_labels_that_did_not_look_where_the_score_pointed() -> None:
    rows = [
        served("confident", 0, abuse=True, abuse_unaimed=None),
        served("audited", 0, abuse=True, abuse_unaimed=True),
        served("wronged", 0, abuse=False, abuse_unaimed=None, action="block"),
    ]
    frame = pl.DataFrame(rows, schema_overrides={"abuse": pl.Boolean, "abuse_unaimed": pl.Boolean})
    (stratum,) = collect(frame)
    assert stratum.harm[MISSED].harmed == Arms(1, 0)
    assert stratum.cohort[MISSED] == Tally(Arms(1, 0), Arms(1, 0))
    assert stratum.cohort[WRONG] == Tally(Arms(3, 0), Arms(1, 0))
    assert stratum.abusive == Arms(1, 0)


def aimed(seed: int, missed: tuple[float, float], seen: tuple[float, float], unaimed: bool) -> Step:
    """The step after eight hours at 25%. By arm: the share of abuse that is missed, and the share of that
    which is seen by those who look where the arm's scores point. Besides, 12% of everything is audited, and
    what was caught is always judged.
    """
    rng = np.random.default_rng(seed)
    n = 3_200
    arm, bad, audited = (rng.random(n) < 0.25).astype(int), rng.random(n) < 0.1, rng.random(n) < 0.12
    through = rng.random(n) < np.where(bad, np.array(missed)[arm], 1.0)
    known = audited | (bad & ~through) | (bad & (rng.random(n) < np.array(seen)[arm]))
    by_audit = np.where(audited, bad, None)
    frame = pl.DataFrame(
        {
            "actor_id": [f"a{i}" for i in range(n)],
            "ts": [T0 + (i * 8 // n) * HOUR for i in range(n)],
            "arm": np.where(arm == 1, "challenger", "champion"),
            "stage": ["25%"] * n, "latency_us": [900] * n, "degraded": [False] * n,
            "action": np.where(through, "allow", "limit"),
            "abuse": pl.Series(np.where(known, bad, None).tolist(), dtype=pl.Boolean),
            **({"abuse_unaimed": pl.Series(by_audit.tolist(), dtype=pl.Boolean)} if unaimed else {}),
        }
    )  # fmt: skip
    return ask(at("25%"), evidence(*collect(frame)), hours=8)


def test_where_people_look_neither_hides_harm_nor_makes_it() -> None:
    promoted, rolled_back = {}, {}
    for unaimed in (False, True):
        worse = [aimed(seed, (0.15, 0.45), (1.0, 0.0), unaimed).action for seed in range(20)]
        alike = [aimed(seed, (0.3, 0.3), (0.0, 1.0), unaimed).action for seed in range(20)]
        promoted[unaimed], rolled_back[unaimed] = worse.count("promote"), alike.count("rollback")
    # On all labels the worse one goes live, and the one that is no worse is rolled back.
    assert promoted[False] > 15
    assert rolled_back[False] > 15
    assert promoted[True] <= 4
    assert rolled_back[True] == 0


def test_an_actor_who_changes_arm_with_the_ramp_enters_once_and_joins_twice() -> None:
    one, two = counted(served("a", 0, stage="1%"), served("a", 1, "challenger", stage="5%"))
    assert (one.entered, one.joined) == (Arms(1, 0), Arms(1, 0))
    assert (two.entered, two.joined) == (Arms(0, 0), Arms(0, 1))
    assert (one.stage, two.stage) == ("1%", "5%")


def test_other_stages_and_arms_are_left_out_and_segments_stratify() -> None:
    rows = [served("a", 0, "shadow"), served("b", 0, stage="shadow"), served("c", 0, new="yes")]
    rows += [served("d", 0, new="no")]
    assert [s.segment for s in counted(*rows, segment="new")] == ["no", "yes"]
    assert counted(served("a", 0, "shadow")) == ()
    with pytest.raises(InvalidInput, match="latency_us"):
        collect(pl.DataFrame({"actor_id": ["a"]}))


def test_shadow_is_compared_event_by_event() -> None:
    rows = []
    for event, live, shadow in (("a", "allow", "block"), ("b", "block", "limit"), ("c", "review", "allow")):
        rows += [{"event_id": event, "arm": "champion", "action": live, "degraded": False}]
        rows += [{"event_id": event, "arm": "shadow", "action": shadow, "degraded": event == "c"}]
    found = compare_shadow(pl.DataFrame(rows))
    assert found == ShadowComparison(3, pytest.approx(2 / 3), pytest.approx(1 / 3), pytest.approx(2 / 3), 1)
    nothing = compare_shadow(pl.DataFrame(rows).clear())
    assert (nothing.n, nothing.agreement, nothing.champion_action_rate) == (0, None, None)


# ---- the state machine, by example -----------------------------------------------------------------------

WAITING = Candidate("2026-01-03T12-attack-7f3a", "m2", gate_passed=True)
OLD = RolloutState(champion="m1", champion_candidate="c1", stage=LIVE)
GOOD_SHADOW = ShadowComparison(2000, 0.98, 0.05, 0.06, 0)


def at(stage: Stage, **over: Any) -> RolloutState:
    base = replace(OLD, challenger="m2", candidate=WAITING.candidate, stage=stage, stage_since=T0)
    return replace(base, share=SHARES.get(stage, 0.0), version=7, **over)


def evidence(*strata: Stratum, **over: Any) -> Evidence:
    return Evidence(strata=strata, **({"shadow": GOOD_SHADOW, "telemetry_age_hours": 0.1} | over))


def ask(state: RolloutState, found: Evidence, hours: float = 5.0, limits: Limits = LIMITS) -> Step:
    return next_step(state, found, limits, T0 + timedelta(hours=hours))


def test_a_waiting_candidate_starts_in_shadow_with_its_own_salt() -> None:
    step = ask(OLD, evidence(waiting=WAITING))
    assert (step.action, step.to_stage) == ("start_shadow", SHADOW)
    state = apply(OLD, step, T0)
    assert (state.challenger, state.candidate, state.champion) == ("m2", WAITING.candidate, "m1")
    assert (state.version, state.share) == (1, 0.0)
    assert state.salt != OLD.salt


@pytest.mark.parametrize(
    ("state", "waiting", "reason"),
    [
        (OLD, None, "no_candidate"),
        (OLD, replace(WAITING, gate_passed=False, gate_reason="worse"), "gate_failed"),
        (replace(OLD, blocked={WAITING.candidate: "harm"}), WAITING, "blocked"),
    ],
)
def test_what_does_not_start(state: RolloutState, waiting: Candidate | None, reason: str) -> None:
    step = ask(state, evidence(waiting=waiting))
    assert (step.action, step.reason) == ("none", reason)
    assert apply(state, step, T0) is state


@pytest.mark.parametrize(
    ("shadow", "action", "reason"),
    [
        (GOOD_SHADOW, "advance", "no_harm_seen"),
        (replace(GOOD_SHADOW, n=199), "hold", "too_little_data"),
        (None, "hold", "too_little_data"),
        (replace(GOOD_SHADOW, errors=1), "rollback", "shadow_errors"),
        (replace(GOOD_SHADOW, challenger_action_rate=0.3), "rollback", "shadow_action_rate"),
    ],
)
def test_the_shadow_gate(shadow: ShadowComparison | None, action: str, reason: str) -> None:
    step = ask(at(SHADOW), evidence(shadow=shadow))
    assert (step.action, step.reason) == (action, reason)


def test_a_first_model_needs_an_approval_and_then_needs_no_control() -> None:
    first = replace(at(SHADOW), champion=None, champion_candidate=None)
    shadow = replace(GOOD_SHADOW, champion_action_rate=None, agreement=None)
    assert ask(first, evidence(shadow=shadow)).reason == "awaiting_approval"
    step = ask(first, evidence(shadow=shadow, approval="ana"))
    assert (step.action, step.to_stage) == ("promote", LIVE)
    assert "ana" in step.message
    state = apply(first, step, T0)
    assert (state.champion, state.challenger, state.previous, state.share) == ("m2", None, None, 0.0)


@pytest.mark.parametrize(
    ("over", "hours", "reason", "page"),
    [
        ({}, 0.5, "baking", False),
        ({"telemetry_age_hours": None}, 5, "stale_telemetry", True),
        ({"telemetry_age_hours": 4.0}, 5, "stale_telemetry", True),
        ({"holds": (Hold("promotion", "ana", "sale", T0 + 9 * HOUR),)}, 5, "frozen", False),
        ({"holds": (Hold("all", "ana", "sale", T0 + 9 * HOUR),)}, 5, "frozen", False),
    ],
)
def test_what_holds_the_ramp(over: dict[str, Any], hours: float, reason: str, page: bool) -> None:
    step = ask(at("1%"), evidence(judged(400), **over), hours)
    assert (step.action, step.reason, step.page) == ("hold", reason, page)


def test_a_training_freeze_does_not_hold_the_ramp_but_a_pause_does() -> None:
    held = evidence(judged(400), holds=(Hold("training", "ana", "x", T0 + 9 * HOUR),))
    assert ask(at("1%"), held).action == "advance"
    assert ask(at("1%", promotion_paused_until=T0 + 9 * HOUR), held).reason == "paused"


def test_harm_and_mismatch_roll_back_even_frozen_paused_and_half_blind() -> None:
    harm = replace(judged(400), harm={MISSED: Tally(Arms(1200, 400), Arms(6, 40))})
    skew = replace(judged(400), entered=Arms(900, 600))
    holds = (Hold("all", "ana", "x", T0 + 9 * HOUR),)
    for broken, reason in ((harm, "harm:missed_abuse"), (skew, "sample_ratio_mismatch")):
        found = evidence(broken, holds=holds, telemetry_age_hours=None)
        state = at("25%", promotion_paused_until=T0 + 9 * HOUR)
        step = ask(state, found)
        assert (step.action, step.reason, step.page) == ("rollback", reason, True)
        after = apply(state, step, T0)
        assert (after.champion, after.challenger, after.stage, after.share) == ("m1", None, LIVE, 0.0)
        assert WAITING.candidate in after.blocked
        assert after.promotion_paused_until == T0 + 9 * HOUR, "a person's pause is not shortened"
        assert ask(after, evidence(waiting=WAITING)).reason == "blocked"


def test_before_all_traffic_information_and_no_worse_are_required() -> None:
    few, worse = evidence(judged(30)), evidence(judged(400, (0.01, 0.05)))
    assert ask(at("25%"), few).reason == "too_little_data"
    assert ask(at("25%"), worse).reason == "not_shown_no_worse"
    blind = evidence(replace(judged(400), abusive=Arms(0, 0)))
    assert ask(at("25%"), blind).reason == "too_little_data"
    leaning = replace(judged(400), harm={MISSED: Tally(Arms(1200, 400), Arms(6, 9))})
    assert ask(at("25%"), evidence(leaning)).reason == "harm_suspected"
    step = ask(at("25%"), evidence(judged(400)))
    assert (step.action, step.reason) == ("promote", "shown_no_worse")
    after = apply(at("25%"), step, T0)
    assert (after.champion, after.previous, after.previous_candidate) == ("m2", "m1", "c1")


def test_a_stalled_rollout_pages() -> None:
    assert not ask(at("25%"), evidence(judged(30)), 5).page
    assert ask(at("25%"), evidence(judged(30)), 30).page


def test_a_person_can_always_go_back() -> None:
    dropped = apply(at("5%"), rollback(at("5%"), "ana", "complaints"), T0)
    assert (dropped.champion, dropped.challenger) == ("m1", None)
    live = replace(OLD, previous="m0", previous_candidate="c0")
    restored = apply(live, rollback(live, "ana", "complaints"), T0)
    assert (restored.champion, restored.champion_candidate, restored.previous) == ("m0", "c0", None)
    assert list(restored.blocked) == ["c1"]
    with pytest.raises(Refused, match="no challenger"):
        rollback(OLD, "ana", "complaints")


def test_a_step_for_another_version_is_refused() -> None:
    step = ask(at("1%"), evidence(judged(400)))
    with pytest.raises(Refused, match="decide again"):
        apply(replace(at("1%"), version=8), step, T0)


# ---- whole rollouts --------------------------------------------------------------------------------------


def traffic(
    rng: np.random.Generator,
    state: RolloutState,
    hour: int,
    actors: int,
    pool: int,
    labelled: float,
    lift: float,
) -> pl.DataFrame:
    """An hour: 8% of actors abusive; 8% of them missed, 1% of the others hit (times lift)."""
    ids = rng.choice(pool, actors, replace=False) + (0 if pool > actors else hour * actors)
    challenger = np.array([assign(f"a{i}", state.salt, state.share) == "challenger" for i in ids])
    abusive = rng.random(actors) < 0.08
    worse = np.where(challenger, lift, 1.0)
    acted = rng.random(actors) < np.where(abusive, 1 - 0.08 * worse, 0.01 * worse)
    judged_share = np.where(abusive, 2 * labelled, labelled)
    known = (rng.random(actors) < judged_share).tolist()
    return pl.DataFrame(
        {
            "actor_id": [f"a{i}" for i in ids],
            "ts": [T0 + hour * HOUR] * actors,
            "arm": np.where(challenger, "challenger", "champion"),
            "stage": [state.stage] * actors,
            "action": np.where(acted, "block", "allow"),
            "latency_us": rng.integers(500, 5000, actors),
            "degraded": [False] * actors,
            "abuse": pl.Series(
                [bool(a) if k else None for a, k in zip(abusive, known, strict=True)], dtype=pl.Boolean
            ),
        }
    )


def run(
    seed: int, actors: int, pool: int, labelled: float, lag: int = 0, lift: float = 1.0, most: int = 30
) -> tuple[RolloutState, int]:
    """Play a rollout by the hour, labels `lag` hours late. Returns the last state and the hours it took."""
    rng = np.random.default_rng(seed)
    state = apply(OLD, ask(OLD, evidence(waiting=WAITING)), T0)
    hours: list[pl.DataFrame] = []
    for hour in range(most):
        now = T0 + (hour + 1) * HOUR
        hours.append(traffic(rng, state, hour, actors, pool, labelled, lift))
        seen = pl.concat(hours).with_columns(
            pl.when(pl.col("ts") + lag * HOUR < now).then("abuse").alias("abuse")
        )
        found = evidence(*collect(seen))
        state = apply(state, next_step(state, found, LIMITS, now), now)
        if state.challenger is None:
            return state, hour + 1
    return state, most


def test_a_good_challenger_is_live_within_about_eight_hours_on_the_platform() -> None:
    ends = [run(seed, actors=1300, pool=6000, labelled=0.15, lag=2) for seed in range(8)]
    assert [state.champion for state, _ in ends] == ["m2"] * 8
    assert np.median([hours for _, hours in ends]) <= 8
    assert max(hours for _, hours in ends) <= 12


@pytest.mark.parametrize("events", [250, 2000])
def test_a_stream_without_actors_passes_with_the_same_limits(events: int) -> None:
    ends = [run(seed, actors=events, pool=events, labelled=1.0) for seed in range(5)]
    assert [state.champion for state, _ in ends] == ["m2"] * 5
    assert np.median([hours for _, hours in ends]) <= 14


def test_a_challenger_that_does_four_times_the_harm_never_goes_live() -> None:
    for seed in range(5):
        state, _ = run(seed, actors=1300, pool=6000, labelled=0.15, lag=2, lift=4.0)
        assert state.champion == "m1"


# ---- laws ------------------------------------------------------------------------------------------------

counts = st.integers(0, 60)
arms = st.builds(Arms, st.integers(0, 400), st.integers(0, 200))
tallies = st.builds(
    lambda units, a, b: Tally(units, Arms(min(a, units[0]), min(b, units[1]))), arms, counts, counts
)
strata = st.builds(
    Stratum,
    look=st.sampled_from("abc"),
    stage=st.sampled_from(list(SHARES)),
    entered=arms,
    joined=arms,
    harm=st.fixed_dictionaries(dict.fromkeys(GUARDRAILS, tallies)),
    cohort=st.fixed_dictionaries(dict.fromkeys(JUDGED, tallies)),
    abusive=arms,
)
anything = st.builds(
    Evidence,
    strata=st.lists(strata, max_size=3).map(tuple),
    shadow=st.one_of(
        st.none(),
        st.builds(
            ShadowComparison, st.integers(0, 900), st.just(0.9), st.just(0.05), st.floats(0, 1), counts
        ),
    ),
    telemetry_age_hours=st.one_of(st.none(), st.floats(0, 9)),
    waiting=st.one_of(st.none(), st.builds(Candidate, st.sampled_from("xyz"), st.just("m"), st.booleans())),
    approval=st.sampled_from([None, "ana"]),
    holds=st.sampled_from([(), (Hold("promotion", "ana", "x", T0 + 3 * HOUR),)]),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(anything, st.floats(0, 6)), max_size=10), st.booleans())
def test_laws_of_every_history(history: list[tuple[Evidence, float]], first: bool) -> None:
    state, now = (RolloutState.initial() if first else OLD), T0
    for found, hours in history:
        now += timedelta(hours=hours)
        step = next_step(state, found, LIMITS, now)
        assert step == next_step(state, found, LIMITS, now)
        assert step.message.endswith(".")
        after = apply(state, step, now)
        assert after.version == state.version + (step.action not in ("hold", "none"))
        assert RolloutState.from_dict(json.loads(json.dumps(after.to_dict()))) == after
        json.dumps(asdict(step))
        if step.action == "promote":
            assert_earned(state, found)
        if step.action == "start_shadow":
            assert step.candidate not in state.blocked
            assert found.waiting is not None
            assert found.waiting.gate_passed
        if step.action in ("advance", "promote", "start_shadow"):
            assert not any(hold.stops("promotion", now) for hold in found.holds)
        if step.action in ("advance", "promote"):
            assert found.telemetry_age_hours is not None
            assert not state.paused(now)
        assert (after.challenger is None) == (after.stage in (NONE, LIVE))
        assert (after.share > 0) == (after.stage in SHARES)
        if after.challenger is not None:
            back = apply(after, rollback(after, "ana", "law"), now)
            assert back.champion == after.champion
            assert back.challenger is None
        state = after


def assert_earned(state: RolloutState, found: Evidence) -> None:
    """Nothing goes live without information: judged actors in both arms and a bound below the margin."""
    if state.champion is None:
        assert found.approval
        assert found.shadow is not None
        assert found.shadow.n >= LIMITS.shadow_min_rows
        return
    assert state.stage == "25%"
    for name in JUDGED:
        difference = risk_difference(found.strata, name, LIMITS)
        assert difference.shown
        assert min(difference.judged) >= LIMITS.min_judged


# -- judges err ---------------------------------------------------------------------------------------------


def better_but_misjudged(rng: np.random.Generator, looks: int = 20) -> tuple[Stratum, ...]:
    """A challenger on a quarter of people catches three times as much abuse; judges call 2% of it benign."""
    found = []
    for look in range(looks):
        caught = Arms(int(rng.binomial(195, 0.33)), int(rng.binomial(65, 0.95)))
        harmed = Arms(
            *(
                int(rng.binomial(n, 0.02) + rng.binomial(u, 0.001))
                for n, u in zip(caught, (900, 300), strict=True)
            )
        )
        found.append(Stratum(str(look), "25%", harm={WRONG: Tally(Arms(900, 300), harmed)}, caught=caught))
    return tuple(found)


def test_a_challenger_is_not_rolled_back_for_the_errors_of_those_who_judge_what_it_caught() -> None:
    rng = np.random.default_rng(5)
    runs = [better_but_misjudged(rng) for _ in range(300)]
    needed = len(GUARDRAILS) / LIMITS.alpha
    naive = np.mean([harm_evidence(strata, WRONG) >= needed for strata in runs])
    aware = np.mean([harm_evidence(strata, WRONG, LIMITS.label_error) >= needed for strata in runs])
    assert naive > 0.2, "the trap is real"
    assert aware <= LIMITS.alpha


def test_real_harm_is_found_in_spite_of_that() -> None:
    rng = np.random.default_rng(6)
    found = 0
    for _ in range(50):
        strata = better_but_misjudged(rng)
        worse = [
            replace(
                s,
                harm={
                    WRONG: Tally(
                        s.harm[WRONG].units,
                        Arms(
                            s.harm[WRONG].harmed.champion,
                            s.harm[WRONG].harmed.challenger + int(rng.poisson(9)),
                        ),
                    )
                },
            )
            for s in strata
        ]
        found += harm_evidence(worse, WRONG, LIMITS.label_error) >= len(GUARDRAILS) / LIMITS.alpha
    assert found >= 45
