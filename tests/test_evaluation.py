"""How a candidate is judged on unseen messages, and when the gate lets it through."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from arena.platform import Platform
from assets.environment import Environment
from assets.partitions import candidates
from assets.training import contenders, evaluation, features_for, training_set_key, work_folder
from models import bundle
from models.signing import signer_of, trust_of
from redqueen import state
from redqueen.errors import BundleError
from redqueen.evaluation import (
    COMMUNITIES,
    HARD,
    MIN_RECALL,
    MIN_SLICE,
    OVER,
    RECALL_SLACK,
    SLICE_ALPHA,
    Report,
    compare,
    gate,
    headline,
    judge,
    over,
    share_interval,
    slice_verdict,
    slices,
)
from redqueen.features import FEATURES_VERSION
from redqueen.rollout import RolloutState
from redqueen.settings import write_env
from redqueen.store import to_parquet
from redqueen.trainingset import SLICED_BY
from tests.toy_model import messages, toy_bundle

POLICIES = ("spam", "scam")
T0 = datetime(2026, 1, 3, tzinfo=UTC)


def rows(spam: list[int], scam: list[int], ids: list[str] | None = None) -> pl.DataFrame:
    n = len(spam)
    return pl.DataFrame(
        {"event_id": ids or [f"e{i}" for i in range(n)], "p_spam": spam, "p_scam": scam},
        schema_overrides={"p_spam": pl.Float32, "p_scam": pl.Float32},
    )


def report(recall: float = 0.9, fpr: float = 0.005, fpr_low: float = 0.002) -> Report:
    return Report(200, 2000, recall, recall - 0.05, recall + 0.05, fpr, fpr_low, fpr + 0.003, {})


def test_a_message_is_acted_on_when_any_policy_reaches_its_own_threshold() -> None:
    scores = np.array([[0.9, 0.0], [0.5, 0.0], [0.0, 0.5], [0.0, 0.49]])
    found = judge(rows([1, 1, 0, 0], [0, 0, 1, 0]), scores, [0.6, 0.5], POLICIES)
    assert (found.n_abuse, found.n_benign) == (3, 1)
    assert found.recall == pytest.approx(2 / 3)
    assert found.fpr == 0.0
    assert found.recall_low < found.recall


def test_slices_are_kept_where_there_is_enough_to_say() -> None:
    n = 100
    spam = [1] * 40 + [0] * 60
    scores = np.array([[0.9, 0.0]] * 20 + [[0.1, 0.0]] * 80)
    frame = rows(spam, [0] * n).with_columns(
        account_age_days=pl.Series([1.0] * 90 + [9.0] * 10, dtype=SLICED_BY["account_age_days"]),
        language=pl.Series(["en"] * 60 + ["de"] * 35 + [None] * 5, dtype=SLICED_BY["language"]),
        community_size=pl.Series([None] * 50 + [20_000] * 50, dtype=SLICED_BY["community_size"]),
    )
    found = judge(frame, scores, [0.5, 0.5], POLICIES).slices
    assert found["policy spam"].recall == pytest.approx(0.5)
    assert found["account new"].n_abuse == 40
    assert (found["language en"].n_abuse, found["language de"].n_benign) == (40, 35)
    assert found["community large"].n_benign == 50
    assert not found.keys() & {"account old", "community small", HARD}, "too few, or none"
    assert 0.3 < found["policy spam"].recall_low < 0.5 < found["policy spam"].recall_high < 0.7


def test_a_community_is_in_one_slice_and_the_arena_fills_more_than_one() -> None:
    ends = list(COMMUNITIES.values())
    assert all(end == start for (_, end), (start, _) in pairwise(ends))
    hour = Platform(1, T0, "quiet", None).hour(T0)
    spam = [int(hour.truth[event["event_id"]] is not None) for event in hour.events]
    sizes = pl.Series([event["community_size"] for event in hour.events], dtype=SLICED_BY["community_size"])
    frame = rows(spam, [0] * len(spam)).with_columns(community_size=sizes)
    found = judge(frame, np.zeros((len(spam), 2)), [0.5, 0.5], POLICIES).slices
    full = [name for name in COMMUNITIES if f"community {name}" in found]
    assert full == ["middling", "large"]
    assert all(found[f"community {name}"].n_abuse > MIN_SLICE for name in full)


def test_what_attacks_made_is_a_slice_of_its_own_and_counts_nowhere_else() -> None:
    n = 80
    ids = [f"{'hard:' if i >= 40 else ''}e{i % 40}" for i in range(n)]
    scores = np.array([[0.9, 0.0]] * 40 + [[0.1, 0.0]] * 40)
    found = judge(rows([1] * n, [0] * n, ids), scores, [0.5, 0.5], POLICIES)
    assert (found.n_abuse, found.recall) == (40, 1.0)
    assert found.slices["policy spam"].n_abuse == 40
    assert (found.slices[HARD].n_abuse, found.slices[HARD].recall) == (40, 0.0)


def test_with_no_abuse_at_all_recall_is_no_division_by_zero() -> None:
    found = judge(rows([0, 0], [0, 0]), np.zeros((2, 2)), [0.5, 0.5], POLICIES)
    assert (found.recall, found.fpr, found.recall_low) == (0.0, 0.0, 0.0)
    assert not gate(found, None, 0.01).passed


# -- intervals -----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 60), k=st.integers(0, 60))
def test_without_near_duplicates_the_interval_is_the_exact_one(n: int, k: int) -> None:
    hit = np.arange(n) < min(k, n)
    low, high = share_interval(hit, np.ones(n), np.arange(n))
    exact = binomtest(int(hit.sum()), n).proportion_ci(method="exact")
    assert (low, high) == (pytest.approx(exact.low, abs=1e-9), pytest.approx(exact.high, abs=1e-9))


def test_copies_make_nobody_surer() -> None:
    hit, families = np.arange(20) < 15, np.arange(20)
    once = share_interval(hit, np.ones(20), families)
    often = share_interval(np.repeat(hit, 9), np.ones(180), np.repeat(families, 9))
    assert often == pytest.approx(once, abs=1e-6)
    assert share_interval(np.ones(500, dtype=bool), np.ones(500), np.zeros(500, dtype=int))[0] < 0.05
    assert share_interval(np.zeros(0, dtype=bool), np.zeros(0), np.zeros(0, dtype=int)) == (0.0, 1.0)


def test_the_interval_holds_the_truth_as_often_as_it_says_also_with_campaigns() -> None:
    rng, held = np.random.default_rng(5), 0
    for _ in range(300):
        size = rng.integers(1, 12, 60)
        family = np.repeat(np.arange(60), size)
        # Of a campaign all are caught or most are not.
        chance = np.where(rng.random(60) < 0.8, 0.95, 0.2)
        low, high = share_interval(rng.random(size.sum()) < chance[family], np.ones(size.sum()), family)
        held += low <= 0.8 * 0.95 + 0.2 * 0.2 <= high
    assert held / 300 > 0.93


# -- slices against the champion -----------------------------------------------------------------------------


def world(n: int, seed: int, copies: int = 1) -> pl.DataFrame:
    """`n` families of `copies` near-duplicates, a third of them abusive, in languages and communities."""
    rng = np.random.default_rng(seed)
    spam = rng.random(n) < 1 / 3
    sizes = np.exp(rng.uniform(0, 11, n)).astype(int)
    frame = rows([int(s) for s in spam], [0] * n).with_columns(
        language=pl.Series(rng.choice(["en", "de", "pt", "tr"], n, p=[0.6, 0.2, 0.1, 0.1])),
        account_age_days=pl.Series(rng.exponential(30, n), dtype=SLICED_BY["account_age_days"]),
        community_size=pl.Series(sizes, dtype=SLICED_BY["community_size"]),
        group=pl.Series(np.arange(n)),
    )
    return pl.concat([frame] * copies).with_columns(event_id=pl.Series([f"e{i}" for i in range(n * copies)]))


def decisions(frame: pl.DataFrame, seed: int, miss: float = 0.2, fpr: float = 0.01) -> np.ndarray:
    """Messages that a detector with these error rates acts on; near-duplicates are judged alike."""
    draw = np.random.default_rng(seed).random(frame["group"].n_unique())[frame["group"].to_numpy()]
    return np.where(frame["p_spam"].to_numpy() >= 0.5, draw >= miss, draw < fpr)


def test_a_candidate_as_good_as_the_champion_is_hardly_ever_said_to_be_behind() -> None:
    alarms = 0
    for seed in range(200):
        frame = world(1200, seed, copies=3)
        candidate, champion = (decisions(frame, 1000 * i + seed) for i in (1, 2))
        found = compare(frame, candidate, champion, POLICIES, 0.01)
        assert len(found) > 10
        alarms += any(c.behind for c in found)
    # Two of 200 is the most that the level allows on the average, with the binomial spread on top.
    assert alarms <= 6, f"{alarms} false alarms at a level of {SLICE_ALPHA}"


def test_the_slice_that_falls_behind_is_named_and_the_others_are_not() -> None:
    frame = world(6000, seed=1)
    champion = decisions(frame, 2)
    worse = slices(frame, POLICIES)["language tr"] & (np.random.default_rng(3).random(frame.height) < 0.2)
    candidate = champion & ~worse
    verdict = slice_verdict(compare(frame, candidate, champion, POLICIES, 0.01))
    assert not verdict.passed
    assert [reason.split(":")[0] for reason in verdict.reasons] == ["behind the champion, language tr"]
    assert slice_verdict(compare(frame, champion, candidate, POLICIES, 0.01)).passed


def test_new_false_positives_in_one_slice_are_found_too() -> None:
    frame = world(6000, seed=4)
    champion = decisions(frame, 5)
    benign = frame["p_spam"].to_numpy() < 0.5
    hit = slices(frame, POLICIES)["account new"] & benign & (np.random.default_rng(6).random(6000) < 0.06)
    behind = [c for c in compare(frame, champion | hit, champion, POLICIES, 0.01) if c.behind]
    assert "account new" in {c.slice for c in behind}
    assert {c.what for c in behind} == {"false positives"}


def test_forty_copies_of_one_message_are_one_loss() -> None:
    frame = world(MIN_SLICE * 4, seed=7, copies=40)
    champion = np.ones(frame.height, dtype=bool)
    lost = frame["group"].to_numpy() == frame.filter(pl.col("p_spam") >= 0.5)["group"][0]
    found = compare(frame, champion & ~lost, champion, POLICIES, 0.01)
    assert {c.lost for c in found if c.slice == "policy spam" and c.what == "recall"} == {1}
    assert not any(c.behind for c in found)


def test_a_slice_with_few_families_is_not_compared() -> None:
    frame = world(MIN_SLICE - 1, seed=8, copies=50)
    everything = np.ones(frame.height, dtype=bool)
    assert compare(frame, ~everything, everything, POLICIES, 0.01) == []
    assert slice_verdict([]).passed


# -- campaigns that are over ---------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-9, 9)), min_size=1, max_size=60), st.randoms())
def test_a_campaign_is_over_when_its_last_message_is_not_among_the_newest(sent, random) -> None:  # type: ignore[no-untyped-def]
    found = over(np.array([at for at, _ in sent]), np.array([family for _, family in sent]))
    last = {family: max(at for at, of in sent if of == family) for _, family in sent}
    silent = {family for (_, family), silent in zip(sent, found, strict=True) if silent}
    heard = last.keys() - silent
    assert max((last[f] for f in silent), default=-1) < min(last[f] for f in heard), (
        "the whole family, or none"
    )
    assert sum(at > max((last[f] for f in silent), default=-1) for at, _ in sent) >= len(sent) / 5
    order = random.sample(range(len(sent)), len(sent))
    again = over(np.array([sent[i][0] for i in order]), np.array([sent[i][1] for i in order]))
    assert again.tolist() == found[order].tolist()


def test_a_candidate_that_forgets_what_is_over_is_behind_there() -> None:
    frame = world(6000, seed=1, copies=2)
    old = frame["group"] < 600
    frame = frame.with_columns(over=old)
    champion = decisions(frame, 2)
    forgot = old.to_numpy() & (np.random.default_rng(3).random(6000)[frame["group"].to_numpy()] < 0.15)
    found = compare(frame, champion & ~forgot, champion, POLICIES, 0.01)
    assert [c.slice for c in found if c.behind] == [OVER]
    assert {c.what for c in found if c.slice == OVER} == {"recall"}, "a campaign is abuse"
    assert not any(c.behind for c in compare(frame, champion, champion & ~forgot, POLICIES, 0.01))


def test_where_no_campaign_is_over_nothing_is_said_of_one() -> None:
    frame = world(1200, seed=1).with_columns(over=False)
    champion = decisions(frame, 2)
    found = compare(frame, champion, champion, POLICIES, 0.01)
    assert OVER not in {c.slice for c in found}
    assert slice_verdict(found).passed
    report = judge(frame, champion[:, None] * np.array([[1.0, 0.0]]), [0.5, 0.5], POLICIES)
    assert OVER not in report.slices


# -- the gate ------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=40))
def test_a_lower_threshold_never_loses_recall(messages: list[tuple[bool, float]]) -> None:
    spam = [int(abusive) for abusive, _ in messages]
    scores = np.array([[score, 0.0] for _, score in messages])
    strict, lax = (judge(rows(spam, [0] * len(spam)), scores, [t, 1.1], POLICIES) for t in (0.7, 0.3))
    assert lax.recall >= strict.recall
    assert lax.fpr >= strict.fpr


def test_a_good_candidate_passes_and_says_by_how_much() -> None:
    verdict = gate(report(0.93), report(0.9), 0.01)
    assert verdict.passed
    assert "93.0%" in verdict.reasons[0]
    assert "champion 90.0%" in verdict.reasons[0]


def test_every_broken_condition_is_named() -> None:
    bad = report(recall=MIN_RECALL - 0.1, fpr=0.2, fpr_low=0.15)
    verdict = gate(bad, report(0.9), 0.01)
    assert not verdict.passed
    assert len(verdict.reasons) == 3


@pytest.mark.parametrize(("loss", "passes"), [(RECALL_SLACK - 0.01, True), (RECALL_SLACK + 0.01, False)])
def test_a_little_recall_may_be_lost_to_newer_data(loss: float, passes: bool) -> None:
    assert gate(report(0.9 - loss), report(0.9), 0.01).passed is passes


def test_a_row_counts_for_those_that_were_left_out() -> None:
    # Newest benign rows are all kept, of the older ones one in twenty; all that is acted on is new.
    frame = rows([1] * 40 + [0] * 1_040, [0] * 1_080).with_columns(
        inclusion=pl.Series([0.1] * 2 + [1.0] * 78 + [0.05] * 1_000)
    )
    scores = np.zeros((1_080, 2))
    scores[2:60] = 1
    judged = judge(frame, scores, [0.5, 0.5], POLICIES)
    assert judged.fpr == pytest.approx(20 / (40 + 20 * 1_000))
    assert judged.fpr_low < judged.fpr < judged.fpr_high < 0.006
    assert judged.recall == 38 / 40, "a flood is one campaign, however many were left out"
    unweighted = judge(frame.drop("inclusion"), scores, [0.5, 0.5], POLICIES)
    assert unweighted.fpr == pytest.approx(20 / 1_040)


def test_false_positives_break_the_gate_only_when_they_are_sure() -> None:
    few = replace(report(), fpr=0.05, fpr_low=0.015)
    assert gate(few, None, 0.01).passed
    assert not gate(replace(few, fpr_low=0.021), None, 0.01).passed


def test_the_headline_is_plain_numbers_one_level_deep() -> None:
    metrics = {
        "auc": 0.98765432,
        "name": "fusion",
        "ok": True,
        "recall": {"spam": 0.5, "note": "x", "b": False},
    }
    assert headline(metrics) == {"auc": 0.98765, "recall_spam": 0.5}


def test_a_champion_that_knows_other_features_is_judged_as_it_is_served_by_text_alone() -> None:
    rows = pl.DataFrame({"f_a": [1.0, 2.0], "f_b": [3.0, 4.0]})

    def detector(version: str, *names: str) -> SimpleNamespace:
        return SimpleNamespace(feature_names=names, manifest=SimpleNamespace(features_version=version))

    assert features_for(detector(FEATURES_VERSION, "b", "a"), rows).tolist() == [[3.0, 1.0], [4.0, 2.0]]
    assert features_for(detector("of-old", "b", "gone"), rows) is None
    assert features_for(detector(FEATURES_VERSION), rows) is None


# -- the asset -----------------------------------------------------------------------------------------------

CANDIDATE = "2026-01-03T14-attack-0001"


def published(
    env: Environment, folder: Path, learnt: dict[str, Any] | None = None, **thresholds: float
) -> str:
    """The toy detector, published with these thresholds and this training; returns its model_id."""
    shutil.copytree(toy_bundle(), folder)
    fused = json.loads((folder / bundle.FUSION).read_text())
    manifest = bundle.verify(folder)
    if learnt is not None:
        metrics = json.loads((folder / bundle.METRICS).read_text())
        (folder / bundle.METRICS).write_text(json.dumps(metrics | {"training": learnt}))
    for policy, threshold in thresholds.items():
        fused["thresholds"][manifest.policies.index(policy)] = threshold
    (folder / bundle.FUSION).write_text(json.dumps(fused))
    kept = ("policies", "features_version", "feature_names", "selected", "snapshot", "code_version", "parent")
    bundle.write_manifest(
        folder, **{name: getattr(manifest, name) for name in kept}, created_at=manifest.created_at
    )
    signer_of(env.settings).sign(folder)
    return bundle.publish(env.store, folder, trust_of(env.settings))


def evaluated(env: Environment, model: str, champion: str | None) -> dict[str, Any]:
    """What the asset says of a model that held-out messages of the toy world are put to."""
    state.advance_candidate(env.store, CANDIDATE, "trained", T0, "told", model_id=model)
    live = replace(RolloutState.initial(), champion=champion).to_dict()
    env.store.put_json(state.LIVE_KEY, live)
    said = messages(1500, seed=11)
    held = pl.DataFrame(
        {
            "event_id": [f"e{i}" for i in range(len(said))],
            "text": [m.text for m in said],
            "language": ["en", "de"] * (len(said) // 2),
            "ts": [T0 + timedelta(seconds=i) for i in range(len(said))],
            "group": list(range(len(said))),
            **{f"p_{p}": [float(m.policy == p) for m in said] for p in POLICIES},
        }
    )
    env.store.put(training_set_key(CANDIDATE), to_parquet(held.to_arrow()))
    folder = work_folder(env, CANDIDATE)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"held_event_ids": held["event_id"].to_list()}))
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(candidates.name or "", [CANDIDATE])
        dg.materialize(
            [evaluation], instance=instance, partition_key=CANDIDATE, resources={"env": env},
            selection=[evaluation], raise_on_error=False,
        )  # fmt: skip
    return env.store.get_json(f"evaluations/{model}/evaluation.json")


def test_a_champion_is_only_compared_on_what_it_cannot_have_learnt(tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_env(home, policies="spam,scam", severe_policies="", fpr_budget=0.05)
    env = Environment(home=str(home))
    later = {"seed": 0, "held_rates": [0.15, 0.4], "until": (T0 + timedelta(days=1)).isoformat()}
    champion = published(env, tmp_path / "a", later, spam=0.02)
    found = evaluated(env, published(env, tmp_path / "b", spam=0.99), champion)
    ours, theirs = found["reports"]["candidate"], found["reports"]["champion"]
    assert 0.3 * ours["n_abuse"] < theirs["n_abuse"] < 0.5 * ours["n_abuse"]
    assert 0.1 * ours["n_benign"] < theirs["n_benign"] < 0.2 * ours["n_benign"]
    assert f"on the {theirs['n_abuse']} that it cannot have learnt from" in " ".join(found["reasons"])
    assert "of 1500 messages: it may have learnt from the others" in found["reasons"][-1]
    # Of one that does not tell what it learnt from nothing can be said, and nothing is.
    silent = published(env, tmp_path / "c", {}, spam=0.03)
    alone = evaluated(env, published(env, tmp_path / "d", spam=0.5), silent)
    assert alone["compared"] == []
    assert alone["reports"]["champion"]["n_abuse"] == 0
    assert "on 0 of 1500 messages" in alone["reasons"][-1]
    assert "champion not compared: only 0 abusive messages are new to it" in alone["reasons"][0]


def test_a_candidate_that_gives_up_a_slice_is_rejected_and_the_slice_is_named(tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_env(home, policies="spam,scam", severe_policies="", fpr_budget=0.05)
    env = Environment(home=str(home))
    champion = published(env, tmp_path / "a")
    alone = evaluated(env, champion, None)
    assert alone["passed"], alone["reasons"]
    assert alone["compared"] == []
    assert alone["reasons"][-1] == "judged alone: no model is live yet"
    assert {OVER, "language en", "language de", "policy spam"} <= alone["reports"]["candidate"][
        "slices"
    ].keys()
    worse = evaluated(env, published(env, tmp_path / "b", scam=0.999999), champion)
    assert not worse["passed"]
    assert state.candidate(env.store, CANDIDATE)["status"] == "rejected"
    behind = [reason for reason in worse["reasons"] if reason.startswith("behind the champion")]
    assert any("policy scam: recall" in reason for reason in behind)
    assert any(f"{OVER}: recall" in reason for reason in behind)
    assert not any("policy spam" in reason for reason in behind)


def test_a_champion_of_other_policies_is_judged_by_todays(tmp_path: Path) -> None:
    home = tmp_path / "home"
    write_env(home, policies="spam,scam", severe_policies="", fpr_budget=0.05)
    env = Environment(home=str(home))
    both = evaluated(env, published(env, tmp_path / "a"), None)["reports"]["candidate"]
    write_env(home, policies="spam", severe_policies="", fpr_budget=0.05)
    env = Environment(home=str(home))
    # What was scam is nothing that today's policies are about, and the champion still acts on it.
    told = evaluated(env, published(env, tmp_path / "b", scam=0.9), published(env, tmp_path / "c"))
    reports = told["reports"]
    assert reports["champion"]["n_abuse"] == reports["candidate"]["n_abuse"] < both["n_abuse"]
    assert "policy scam" not in reports["champion"]["slices"]


def test_a_champion_that_is_refused_does_not_hold_up_its_successor_but_a_candidate_is_held_up_by_itself(
    tmp_path: Path,
) -> None:
    home = tmp_path / "home"
    write_env(home, policies="spam,scam", severe_policies="", fpr_budget=0.05)
    env = Environment(home=str(home))
    model, champion = published(env, tmp_path / "a"), published(env, tmp_path / "b", scam=0.999)
    env.store.put(f"models/{champion}/{bundle.FUSION}", b"{}")
    with pytest.raises(BundleError):
        contenders(dg.build_asset_context(), env, champion)
    told = evaluated(env, model, champion)
    assert told["passed"], told["reasons"]
    assert told["compared"] == []
    assert "the champion cannot be loaded" in told["reasons"][-1]
    assert bundle.FUSION in told["reasons"][-1]
    assert "cannot be loaded" in state.candidate(env.store, CANDIDATE)["reason"], "redqueen why tells it too"
