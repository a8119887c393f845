"""Weighing the parts by time, thresholds by cost and budget, and detectors to which a part is missing."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import bundle, fusion, markov, rehearsal, shallow
from models.dataset import LARGEST_HELD, Dataset, forward, load, split
from models.detector import Detector
from models.fusion import Fusion, Limits, Slice, Voice
from models.train import train
from redqueen.errors import InvalidInput
from tests.toy_model import POLICIES, dataset, matrix, messages, spec, toy_bundle

# -- thresholds ----------------------------------------------------------------------------------------------


def scored(seed: int, n: int = 900, policies: int = 3) -> tuple[np.ndarray, Slice]:
    """Log odds [n, policies] and who is abusive: a tenth under each policy."""
    rng = np.random.default_rng(seed)
    under = rng.integers(0, 10, n)
    targets = np.stack([under == p for p in range(policies)], axis=1).astype(float)
    return rng.normal(size=targets.shape) * 2 - 3 + 5 * targets, Slice(targets, np.ones(n), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    costs=st.lists(st.floats(0.2, 30), min_size=3, max_size=3),
    budget=st.floats(0.002, 0.2),
)
def test_nothing_is_acted_on_that_does_not_pay_and_no_budget_is_overspent(
    seed: int, costs: list[float], budget: float
) -> None:
    z, part = scored(seed)
    cuts = Limits(budget, 0.0, tuple(costs)).cut(z, part.abusive, part.weight)
    assert (fusion.sigmoid(cuts) >= 1 / (1 + np.array(costs)) - 1e-9).all()
    assert (z[~part.abusive] >= cuts).any(1).mean() <= budget * fusion.BUDGET_SHARE + 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), cost=st.floats(1.0, 20))
def test_equal_costs_share_the_budget_as_if_none_were_named(seed: int, cost: float) -> None:
    z, part = scored(seed)
    plain = fusion.cut(z, ~part.abusive, part.weight, 0.02)
    equal = fusion.cut(z, ~part.abusive, part.weight, 0.02, costs=np.full(3, cost))
    np.testing.assert_array_equal(plain, equal)


def test_where_the_budget_is_scarce_the_dearer_policy_gets_more_of_it() -> None:
    caught: dict[str, list[float]] = {"equal": [], "dear": []}
    for seed in range(12):
        z, part = scored(seed)
        for name, costs in (("equal", (5.0, 5.0, 5.0)), ("dear", (5.0, 1.0, 1.0))):
            cuts = Limits(0.03, 0.0, costs).cut(z, part.abusive, part.weight)
            caught[name].append(float((z[:, 0] >= cuts[0])[part.targets[:, 0] > 0].mean()))
    assert np.mean(caught["dear"]) > np.mean(caught["equal"]) + 0.03


def single(n_parts: int = 1) -> Voice:
    parts = ("linear", "trees")[:n_parts]
    return Voice(parts, ((1.0,) * n_parts,) * 3, (0.0,) * 3, (1.0,) * 3, (0.0,) * 3)


def width(z: np.ndarray, part: Slice) -> np.ndarray:
    limits = Limits(0.05, 0.0, (20.0,) * 3)
    inside = fusion.sigmoid(limits.cut(z, part.abusive, part.weight))
    ends = np.array(fusion.threshold_intervals(single(), {"linear": z}, part, limits))
    assert ((ends[:, 0] <= inside + 1e-5) & (inside <= ends[:, 1] + 1e-5)).all()
    return np.asarray(np.diff(ends, axis=1).mean())


def test_a_threshold_is_known_better_the_more_messages_there_are_and_copies_are_none() -> None:
    few, many = scored(1, 300), scored(1, 3_000)
    assert width(*many) < width(*few) / 2
    z, part = few
    copied = Slice(*(np.concatenate([v] * 9) for v in (part.targets, part.weight, part.groups)))
    assert width(np.concatenate([z] * 9), copied) > 0.8 * width(z, part)


def test_the_share_acted_on_is_told_with_its_interval() -> None:
    z, part = scored(3)
    found = fusion.report(z, np.zeros(3), part, ("a", "b", "c"))
    for figures in (found, *found["by_policy"].values()):
        for name in ("recall", "fpr"):
            low, high = figures[f"{name}_interval"]
            assert low <= figures[name] <= high
            assert high - low < 0.2
    assert found["fpr"] >= max(v["fpr"] for v in found["by_policy"].values())


# -- voices --------------------------------------------------------------------------------------------------


def test_a_message_without_words_is_judged_by_behaviour_and_others_are_not() -> None:
    full, silent = single(2), Voice(("trees",), ((2.0,),) * 3, (0.0,) * 3, (1.0,) * 3, (0.5,) * 3)
    fused = Fusion(full, single(), (0.5,) * 3, silent)
    logits = {"linear": np.full((2, 3), -4.0), "trees": np.full((2, 3), 1.0)}
    wordless = np.array([True, False])
    p = fused.probabilities(logits, wordless)
    np.testing.assert_allclose(p[0], fusion.sigmoid(np.full(3, 2.5)), atol=1e-6)
    np.testing.assert_allclose(p[1], fusion.sigmoid(np.full(3, -3.0)), atol=1e-6)
    # Behaviour unknown: the text parts say what they can.
    alone = fused.probabilities({"linear": logits["linear"]}, wordless)
    np.testing.assert_allclose(alone, fusion.sigmoid(np.full((2, 3), -4.0)), atol=1e-6)


def test_a_part_with_nothing_to_say_of_a_message_does_not_sway_the_weights() -> None:
    rng = np.random.default_rng(8)
    bad = rng.random((4_000, 1)) < 0.2
    logits = {p: 2.0 * bad - 1 + rng.normal(size=(4_000, 1)) for p in ("linear", "trees")}
    heard = fusion.fit_voice(tuple(logits), logits, bad.astype(float), np.ones(4_000))
    logits["trees"][:40] = np.nan
    gaps = fusion.fit_voice(tuple(logits), logits, bad.astype(float), np.ones(4_000))
    np.testing.assert_allclose(gaps.weights, heard.weights, atol=0.05)
    np.testing.assert_allclose(
        gaps.raw(logits)[:40], 2 * np.mean(gaps.weights) * logits["linear"][:40] + gaps.bias
    )


def test_a_threshold_that_a_probability_cannot_tell_from_one_is_brought_back() -> None:
    # Benign messages as loud as this are rare; those above 17 log odds would all be acted on.
    z = np.concatenate([np.linspace(-8, 30, 400), np.linspace(20, 40, 100)])[:, None]
    part = Slice((np.arange(500) >= 400).astype(float)[:, None], np.ones(500))
    voice = Voice(("linear",), ((4.0,),), (0.0,), (1.0,), (0.0,))
    logits = {"linear": z / 4}
    limits = Limits(0.05, 0.0, (2.3,))
    fused = fusion.finish(voice, voice, logits, part, limits)
    acted = fused.probabilities(logits)[:, 0] >= np.float32(fused.thresholds[0])
    assert acted.tolist() == (z >= limits.cut(z, part.abusive, part.weight))[:, 0].tolist()
    assert 0 < acted[:400].mean() <= 0.05


def test_fusions_travel_as_json_also_those_of_older_bundles() -> None:
    fused = Fusion(single(2), single(), (0.5, 0.4, 0.3), single(2))
    plain = json.loads(json.dumps(fused.to_dict()))
    assert Fusion.from_dict(plain) == fused
    del plain["features_only"]
    assert Fusion.from_dict(plain).features_only is None


def test_with_nothing_to_weigh_every_part_is_heard_alike() -> None:
    nothing = {p: np.zeros((0, 2)) for p in ("linear", "trees")}
    voice = fusion.fit_voice(("linear", "trees"), nothing, np.zeros((0, 2)), np.zeros(0))
    np.testing.assert_allclose(voice.weights, 0.5)


# -- who learns, who judges ----------------------------------------------------------------------------------


def toy_data(folder: Path, **columns: Any) -> tuple[Dataset, int]:
    plan = spec(folder)
    pl.read_parquet(plan.dataset).with_columns(**columns).write_parquet(plan.dataset)
    return load(plan), plan.seed


@settings(max_examples=20, deadline=None)
@given(families=st.integers(1, 300), seed=st.integers(0, 50))
def test_parts_are_weighed_on_what_came_later_and_was_no_copy(
    tmp_path_factory: pytest.TempPathFactory, families: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    data, _ = toy_data(tmp_path_factory.mktemp("f"), group=pl.Series(rng.integers(0, families, 900)))
    parts = split(data, seed)
    for known, later in forward(data, parts.older):
        assert len(known)
        assert not set(data.group[known]) & set(data.group[later])
        assert not len(later) or data.sent_at[known].max() <= data.sent_at[later].min()
    assert not set(data.group[parts.held]) & set(data.group[parts.everything])


def test_a_flood_is_learnt_from_whatever_the_draw_says(tmp_path: Path) -> None:
    flood = pl.Series([7] * (LARGEST_HELD + 1) + list(range(100, 999 - LARGEST_HELD)))
    data, _ = toy_data(tmp_path, group=flood)
    for seed in range(40):
        assert not (data.group[split(data, seed).held] == 7).any()


@pytest.mark.parametrize(("families", "expected"), [(2_000, 340), (1_000, 100), (6_000, 500)])
def test_as_much_abuse_is_held_as_vouches_for_a_first_stage_where_there_is_that_much(
    tmp_path: Path, families: int, expected: int
) -> None:
    table = pl.DataFrame({"event_id": [f"e{i}" for i in range(2 * families)]}).with_columns(
        ts=pl.lit(datetime(2026, 1, 1, tzinfo=UTC)),
        text=pl.lit("hello"), weight=pl.lit(1.0), group=pl.int_range(pl.len(), dtype=pl.Int64),
        p_scam=(pl.int_range(pl.len()) % 2).cast(pl.Float32),
    )  # fmt: skip
    table.write_parquet(tmp_path / "families.parquet")
    plan = spec(tmp_path, dataset=str(tmp_path / "families.parquet"), policies=("scam",), feature_names=())
    data = load(plan)
    held = [int(data.abusive[split(data, seed).held].sum()) for seed in range(12)]
    assert np.mean(held) == pytest.approx(expected, rel=0.1)


def test_the_newest_count_twice_in_what_is_served_and_once_in_the_rehearsal(tmp_path: Path) -> None:
    data, _ = toy_data(tmp_path)
    parts = split(data, 1)
    older = shallow.fit_markov(data, parts.older)
    before, after, _ = shallow.fit_shallow(spec(tmp_path), data, parts, older)

    def counted(rows: npt.NDArray[np.int64], times: npt.NDArray[np.float32]) -> markov.Markov:
        return markov.fit(
            [data.views[i].canonical for i in rows], data.targets[rows], times * data.weight[rows]
        )

    once, every = np.ones(len(parts.older), np.float32), parts.everything
    twice = np.where(np.isin(every, parts.newest), 2, 1).astype(np.float32)
    for fitted, expected in ((before, counted(parts.older, once)), (after, counted(every, twice))):
        for seen, right in zip(fitted.markov.seen, expected.seen, strict=True):
            np.testing.assert_array_equal(seen, right)
    material = shallow.Material.made(spec(tmp_path), data, parts)
    linear = material.linear(every, start=material.linear(parts.older))
    assert not np.allclose(after.linear.weights, linear.weights, atol=1e-3)


@pytest.mark.parametrize("helpful", [True, False])
def test_trees_that_cost_recall_are_not_heard(tmp_path: Path, helpful: bool) -> None:
    data, _ = toy_data(tmp_path)
    bad, linear = data.abusive[:, None], said(data, 3.0, 1.5)
    trees = said(data, 1.0, 0.5)
    if not helpful:
        # Right about most, and wrong about the benign ones that are mistaken for abuse anyway.
        trees = np.where(~bad & (linear > np.quantile(linear[~bad[:, 0]], 0.95)), 2.0, trees)
    heard = weighed(tmp_path, data, {"linear": linear, "trees": trees})["fusion"].parts
    assert ("trees" in heard) == helpful


def said(data: Dataset, sure: float, noise: float) -> npt.NDArray[np.float32]:
    """Log odds [n, policies] of a part: so sure of who is abusive, and so noisy."""
    rng = np.random.default_rng([5, int(10 * noise)])
    right = np.where(data.abusive[:, None], sure, -sure)
    return (right + rng.normal(0, noise, (len(data.views), len(POLICIES)))).astype(np.float32)


def weighed(folder: Path, data: Dataset, logits: dict[str, npt.NDArray[np.float32]]) -> dict[str, Voice]:
    """The voices that these log odds give, without copies and with nothing predicted earlier."""
    rows = np.arange(len(data.views))
    none, empty = {part: z[:0] for part, z in logits.items()}, np.array([], np.int64)
    earlier = shallow.Forward(empty, {part: z for part, z in none.items() if part != "encoder"})
    copies = rehearsal.Copies([], None, empty, empty.astype(bool))
    return rehearsal.weigh(spec(folder), logits, data, rows, copies, none, earlier)


def test_the_encoder_is_heard_as_loudly_as_it_catches_more(tmp_path: Path) -> None:
    data, _ = toy_data(tmp_path)
    linear = said(data, 2.0, 2.0)

    def shares(encoder: npt.NDArray[np.float32]) -> list[float]:
        voice = weighed(tmp_path, data, {"encoder": encoder, "linear": linear})["fusion"]
        parts = [dict(zip(voice.parts, weights, strict=True)) for weights in voice.weights]
        return [part.get("encoder", 0.0) / part["linear"] for part in parts]

    assert min(shares(said(data, 4.0, 1.0))) >= 0.25
    assert max(shares(linear)) == pytest.approx(rehearsal.ENCODER_SHARES[0], rel=1e-3)
    assert max(shares(said(data, -2.0, 4.0))) == pytest.approx(rehearsal.ENCODER_SHARES[0], rel=1e-3)


def test_linear_and_markov_models_are_weighed_half_way_to_equal(tmp_path: Path) -> None:
    data, _ = toy_data(tmp_path)
    logits = {"linear": said(data, 3.0, 1.5), "markov": said(data, 1.0, 2.0), "trees": said(data, 2.0, 1.0)}
    plain = fusion.fit_voice(tuple(logits), logits, data.targets, data.stands_for)
    voice = weighed(tmp_path, data, logits)["fusion"]
    assert voice.parts == plain.parts
    linear, markov_, trees = np.asarray(plain.weights).T
    assert (linear > 1.5 * markov_).all()
    found = np.asarray(voice.weights).T
    np.testing.assert_allclose(found[0] - found[1], (linear - markov_) / 2, atol=1e-5)
    np.testing.assert_allclose(found[0] + found[1], linear + markov_, atol=1e-5)
    np.testing.assert_allclose(found[2], trees, atol=1e-5)


def test_the_quietest_of_those_that_catch_nearly_as_much_is_chosen() -> None:
    caught = {0.1: 0.9, 0.2: 0.95 - rehearsal.NEARLY + 1e-9, 0.3: 0.95}
    voices = [Voice(("linear",), ((weight,),), (0.0,), (1.0,), (0.0,)) for weight in caught]
    assert rehearsal.quietest(voices, lambda voice: caught[voice.weights[0][0]]) is voices[1]


def test_what_was_thinned_counts_in_judging_and_not_in_learning(tmp_path: Path) -> None:
    data, seed = toy_data(tmp_path, inclusion=pl.lit(0.25), weight=pl.lit(0.5))
    assert (data.weight == 0.5).all()
    assert (data.stands_for == 2.0).all()
    assert split(data, seed).held_weight.min() >= 2.0 / 0.15


def test_the_order_of_equal_scores_means_nothing_to_average_precision() -> None:
    positive = np.array([True, False, False, True, False])
    assert fusion.pr_auc(np.zeros(5), positive, np.ones(5)) == fusion.pr_auc(
        np.zeros(5), positive[::-1], np.ones(5)
    )
    assert fusion.pr_auc(np.zeros(5), positive, np.ones(5)) == 0.4
    assert fusion.pr_auc(np.array([4.0, 2, 1, 3, 0]), positive, np.ones(5)) == 1.0


# -- a part is missing ---------------------------------------------------------------------------------------


def caught(detector: Detector, texts: list[str], features: Any, seed: int) -> tuple[float, float]:
    """Shares of abusive and of benign messages acted on."""
    bad = np.array([m.policy is not None for m in messages(1200, seed=seed)])
    acted = detector.decide(detector.score(texts, features))
    return float(acted[bad].mean()), float(acted[~bad].mean())


def test_without_an_encoder_text_and_behaviour_still_count(tmp_path: Path) -> None:
    # Of 900 messages so few benign ones are held that the budget is one or two of them.
    known = dataset(tmp_path / "more.parquet", 2_500)
    detector = Detector.load(train(spec(tmp_path, encoder="none", dataset=str(known))))
    rows = messages(1200, seed=91)
    recall, fpr = caught(detector, [m.text for m in rows], matrix(rows), 91)
    assert recall > 0.85
    assert fpr < 2 * 0.02
    assert "Encoder: none" in (tmp_path / "work" / "bundle" / bundle.CARD).read_text()


def test_with_behaviour_alone_there_is_a_detector_too(tmp_path: Path) -> None:
    plan = spec(tmp_path, encoder="none")
    rows = pl.read_parquet(plan.dataset)
    mute = rows.with_columns(text=pl.lit(""), group=pl.int_range(pl.len(), dtype=pl.Int64))
    mute.write_parquet(plan.dataset)
    detector = Detector.load(train(plan))
    assert detector.manifest.selected == "fusion"
    some = messages(1200, seed=92)
    recall, fpr = caught(detector, [""] * 1200, matrix(some), 92)
    assert recall > 0.5
    assert fpr < 2 * 0.02


def test_text_alone_without_encoder_or_behaviour_is_the_baseline_under_another_name(tmp_path: Path) -> None:
    detector = Detector.load(train(spec(tmp_path, encoder="none", feature_names=())))
    recall, fpr = caught(detector, [m.text for m in messages(1200, seed=93)], None, 93)
    assert recall > 0.5
    assert fpr < 2 * 0.02


def test_an_event_without_words_is_judged_by_how_its_sender_behaves() -> None:
    detector = Detector.load(toy_bundle())
    rows = messages(1200, seed=94)
    recall, fpr = caught(detector, ["\u200b"] * 1200, matrix(rows), 94)
    assert recall > 0.5
    assert fpr < 2 * 0.02


def test_where_the_fusion_hears_no_trees_an_event_without_words_still_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "_caught", lambda voice, *_: float("trees" not in voice.parts))
    monkeypatch.setattr(rehearsal, "select", lambda _: "fusion")
    detector = Detector.load(train(spec(tmp_path, encoder="none")))
    rows = messages(1200, seed=95)
    recall, fpr = caught(detector, ["\u200b"] * 1200, matrix(rows), 95)
    assert recall > 0.5
    assert fpr < 2 * 0.02


def test_costs_reach_the_bundle_and_a_wrong_number_of_them_is_refused(tmp_path: Path) -> None:
    metrics = json.loads((toy_bundle() / bundle.METRICS).read_text())
    assert metrics["miss_costs"] == dict.fromkeys(POLICIES, fusion.MISS_COST)
    for policy, (low, high) in metrics["threshold_intervals"].items():
        assert low <= metrics["thresholds"][policy] <= high
        assert metrics["thresholds"][policy] >= 1 / (1 + fusion.MISS_COST) - 1e-9
    card = (toy_bundle() / bundle.CARD).read_text()
    assert "Clopper" in card
    assert f"{metrics['thresholds']['spam']:.3f} (" in card
    with pytest.raises(InvalidInput, match="one above 0 is needed for each"):
        train(spec(tmp_path, encoder="none", miss_costs=(1.0,)))
