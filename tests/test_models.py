"""What detectors promise: calibrated scores, thresholds within budget, honest splits, equal reruns."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import onnx
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models import baseline, bundle, fusion, rehearsal, tokens, trees
from models.dataset import EPOCH, LARGEST_HELD, load, not_learnt_by, split
from models.detector import Detector, Network
from models.rehearsal import select
from models.tokens import View
from models.train import train
from redqueen.errors import BundleError, InvalidInput
from tests.toy_model import POLICIES, dataset, matrix, messages, spec, toy_bundle


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector.load(toy_bundle())


# -- scoring -------------------------------------------------------------------------------------------------


def test_it_catches_fresh_abuse_within_the_false_positive_budget(tmp_path: Path) -> None:
    # Of 900 messages some 80 benign ones are held, of whom the budget is one or two.
    detector = Detector.load(train(spec(tmp_path, dataset=str(dataset(tmp_path / "more.parquet", 2_500)))))
    rows = messages(1500, seed=99)
    abusive = np.array([m.policy is not None for m in rows])
    acted = detector.decide(detector.score([m.text for m in rows], matrix(rows)))
    assert acted[abusive].mean() > 0.85
    assert acted[~abusive].mean() < 0.02 * 2


def test_the_same_thresholds_hold_for_text_alone(detector: Detector) -> None:
    rows = messages(1500, seed=98)
    abusive = np.array([m.policy is not None for m in rows])
    acted = detector.decide(detector.score_texts([m.text for m in rows]))
    assert acted[abusive].mean() > 0.4
    assert acted[~abusive].mean() < 0.02 * 2


def test_the_policy_named_is_the_policy_meant(detector: Detector) -> None:
    rows = [m for m in messages(600, seed=97) if m.policy]
    best = detector.score([m.text for m in rows], matrix(rows)).argmax(1)
    assert np.mean([POLICIES[b] == m.policy for b, m in zip(best, rows, strict=True)]) > 0.9


def test_a_score_does_not_depend_on_who_shares_the_batch(detector: Detector) -> None:
    rows = messages(150, seed=5)
    together = detector.score([m.text for m in rows], matrix(rows))
    alone = np.concatenate([detector.score([m.text], matrix([m])) for m in rows])
    np.testing.assert_allclose(together, alone, atol=1e-5)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(texts=st.lists(st.text(max_size=80), max_size=4))
def test_any_text_gets_probabilities(detector: Detector, texts: list[str]) -> None:
    scores = detector.score(texts)
    assert scores.shape == (len(texts), 2)
    assert ((scores >= 0) & (scores <= 1)).all()


@pytest.mark.parametrize(
    "text", ["", " ", "\x00", "\ud800", "free gift " * 5000, "𝕗𝕣𝕖𝕖 𝕘𝕚𝕗𝕥", "\u202e\u200b"]
)
def test_odd_texts_are_scored(detector: Detector, text: str) -> None:
    scores = detector.score([text, "see you tomorrow"])
    assert np.isfinite(scores).all()
    assert scores.dtype == np.float32


def test_no_messages_give_no_scores(detector: Detector) -> None:
    assert detector.score([]).shape == (0, 2)
    assert detector.score([], np.zeros((0, 2))).shape == (0, 2)


def test_an_unknown_feature_is_allowed_and_a_wrong_matrix_is_not(detector: Detector) -> None:
    assert np.isfinite(detector.score(["hi"], [[np.nan, np.nan]])).all()
    with pytest.raises(InvalidInput, match=r"wants \(1, 2\)"):
        detector.score(["hi"], [[1.0]])


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 1)])
def test_a_feature_that_was_never_missing_and_now_is_makes_no_abuse_of_the_benign(
    detector: Detector, missing: tuple[int, ...]
) -> None:
    rows = messages(1500, seed=96)
    texts, features = [m.text for m in rows], matrix(rows)
    odd = np.arange(len(rows)) % 2 == 1
    features[np.ix_(odd, missing)] = np.nan
    scores, alone = detector.score(texts, features), detector.score_texts(texts)
    np.testing.assert_allclose(scores[odd], alone[odd], atol=1e-6)
    np.testing.assert_allclose(scores[~odd], detector.score(texts, matrix(rows))[~odd], atol=1e-6)
    assert (np.abs(scores - alone)[~odd] > 1e-3).mean() > 0.5
    counts = detector.lacking.counts()
    assert counts["lacking"] >= odd.sum()
    assert f"of {counts['scored']} messages lacked " in detector.lacking.told()
    # Nothing to read, and behaviour in part: what the text parts know of such messages.
    silent = np.full((1, 2), np.nan)
    np.testing.assert_allclose(detector.score([""], silent), detector.score_texts([""]), atol=1e-6)


def test_what_trees_make_of_a_feature_that_never_was_missing_is_arbitrary() -> None:
    """Why they are not asked then: many of the benign would be abuse."""
    rng, shift = np.random.default_rng(0), np.linspace(0, 1.6, 12)
    bad, tested = rng.random(8_000) < 0.1, rng.random(8_000) < 0.1
    learnt, later = (rng.normal(size=(8_000, 12)) + b[:, None] * shift for b in (bad, tested))
    fitted = trees.fit(learnt.astype(np.float32), bad[:, None].astype(np.float32), np.ones(8_000, np.float32))
    asked = replace(fitted, demanded=())
    cut = np.quantile(asked.logits(later.astype(np.float32))[~tested], 0.97)
    later[:, 11] = np.nan
    assert (asked.logits(later.astype(np.float32))[~tested] > cut).mean() > 0.2
    assert np.isnan(fitted.logits(later.astype(np.float32))).all()


@pytest.mark.parametrize("missing", [trees.LEAST_MISSING - 1, trees.LEAST_MISSING])
def test_trees_speak_without_a_feature_that_enough_messages_lacked(missing: int) -> None:
    rng = np.random.default_rng(3)
    bad = rng.random(1_500) < 0.2
    features = (rng.normal(size=(1_500, 2)) + 2 * bad[:, None]).astype(np.float32)
    # What abuse lacks says nothing of the benign, and copies nothing of messages.
    features[np.concatenate([np.flatnonzero(~bad)[:missing], np.flatnonzero(bad)[:40]]), 1] = np.nan
    features, bad = np.concatenate([features, features[:200]]), np.concatenate([bad, bad[:200]])
    fitted = trees.fit(features, bad[:, None].astype(np.float32), np.ones(1_700, np.float32), counted=1_500)
    asked = np.array([[0.0, np.nan], [np.nan, 0.0], [0.0, 0.0]], np.float32)
    known = missing >= trees.LEAST_MISSING
    for model in (fitted, trees.Trees.from_bytes(fitted.to_bytes(), 1)):
        assert np.isfinite(model.logits(asked)[:, 0]).tolist() == [known, False, True]


@pytest.mark.parametrize("hiding", ["\u200b" * 2_500, " " * 2_500, "\u200b\n" * 90_000, "f\u200b"])
def test_what_cannot_be_seen_does_not_push_the_message_out_of_view(detector: Detector, hiding: str) -> None:
    text = "claim free gift wallet bonus"
    hidden = text.replace("f", hiding) if hiding.startswith("f") else hiding + text
    plain, tried, between = detector.score([text, hidden, "\u2060".join(text)])
    assert detector.decide(np.stack([plain, tried, between])).all()
    long = "see you at lunch tomorrow then " * 200
    read = tokens.view(long + text).canonical
    assert len(read) == tokens.MAX_CHARACTERS
    assert read.startswith(long[:1_000])
    assert read.endswith(text)
    many = text.replace(" ", " " + "\u200b" * 400)
    assert tokens.view(many).canonical == text
    for number in (5, 47, 140):
        words = [f"w{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(number)]
        (lines,) = tokens.Words(48).parts(tokens.views(["\u200b".join(" ".join(words))]))
        assert max(map(len, lines)) <= 48
        assert {word for line in lines for word in line.words} >= set(words)


def test_the_encoder_reads_the_passage_of_a_long_message_in_which_abuse_is() -> None:
    found = Detector.load(toy_bundle())
    said = messages(400, seed=5)
    kind = " ".join(m.text for m in said if m.policy is None)[:900]
    abuse = " ".join(m.text for m in said if m.policy is not None)[:120]
    asked: list[View] = []
    network = found.parts["encoder"]

    class Noted:
        def logits(self, views: Sequence[View]) -> np.ndarray:
            asked.extend(views)
            return np.asarray(network.logits(views))

    found.parts["encoder"] = Noted()
    assert found.score([f"{kind} {abuse} {kind}", abuse]).shape == (2, len(POLICIES))
    passage, whole = asked
    assert abuse in passage.canonical
    assert len(passage.canonical) <= tokens.PASSAGE + 2 * tokens.WORD
    assert whole.canonical == abuse


def test_disguise_is_seen_through(detector: Detector) -> None:
    plain, disguised = detector.score(
        ["claim free gift wallet bonus", "ｃｌａｉｍ fr\u200bee gift wallet bonus"]
    )
    assert detector.decide(np.stack([plain, disguised])).all()


def test_decision_and_ratio_agree(detector: Detector) -> None:
    rows = messages(300, seed=4)
    scores = detector.score([m.text for m in rows], matrix(rows))
    np.testing.assert_array_equal(detector.decide(scores), detector.threshold_ratio(scores) >= 1)


def test_loading_and_scoring_never_import_torch() -> None:
    code = (
        "import sys, models, models.bundle, models.train\n"
        "assert not {'xgboost', 'sklearn', 'onnxruntime', 'scipy'} & set(sys.modules), sys.modules.keys()\n"
        "from models.detector import Detector\n"
        f"d = Detector.load({str(toy_bundle())!r}); d.score(['hello'], [[0, 0]])\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_bundle_that_fails_verification_is_never_loaded(tmp_path: Path) -> None:
    import shutil

    broken = Path(shutil.copytree(toy_bundle(), tmp_path / "broken"))
    with (broken / bundle.ONNX).open("ab") as file:
        file.write(b"x")
    with pytest.raises(BundleError, match=r"encoder\.onnx"):
        Detector.load(broken)


# -- the baseline --------------------------------------------------------------------------------------------


@given(texts=st.lists(st.text(max_size=40), min_size=1, max_size=5))
def test_hashing_a_batch_is_hashing_each_text(texts: list[str]) -> None:
    rows, found = baseline.buckets(texts)
    for i, text in enumerate(texts):
        _, alone = baseline.buckets([text])
        assert sorted(found[rows == i]) == sorted(alone)


@given(words=st.lists(st.text("abcdéж日😀", max_size=tokens.SHORT), min_size=1, max_size=5))
def test_the_n_grams_of_a_word_do_not_depend_on_the_room_around_it(words: list[str]) -> None:
    little, much = (tokens.n_grams(tokens._codes(words, size)) for size in (tokens.SHORT, tokens.WORD))
    for word, here, there in zip(words, little, much, strict=True):
        assert sorted(here[here > 0]) == sorted(there[there > 0])
        framed = len(word) + 2 if word else 0
        assert (here > 0).sum() == sum(max(0, framed - n + 1) for n in tokens.GRAMS)
    assert {*little.ravel()} <= {*range(1 + 2**tokens.GRAM_BITS)}


def test_a_network_that_reads_less_than_the_reader_gives_still_answers() -> None:
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("Cast", ["kinds"], ["there"], to=onnx.TensorProto.FLOAT),
            node("ReduceMax", ["there"], ["logits"], axes=[1], keepdims=1),
        ],
        "older",
        [value("kinds", onnx.TensorProto.INT64, ["n", "places"])],
        [value("logits", onnx.TensorProto.FLOAT, ["n", 1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    network = Network(model.SerializeToString(), tokens.Words(48))
    found = network.logits(tokens.views(["hello there", "", "fr33 g1ft"]))
    np.testing.assert_array_equal(found[:, 0], [tokens.CANONICAL, tokens.MARK, tokens.SENT])


def test_the_baseline_survives_saving() -> None:
    linear = baseline.Linear.from_bytes((toy_bundle() / bundle.LINEAR).read_bytes())
    again = baseline.Linear.from_bytes(linear.to_bytes())
    texts = [m.text for m in messages(20, seed=3)]
    np.testing.assert_array_equal(linear.logits(texts), again.logits(texts))


@settings(max_examples=40, deadline=None)
@given(texts=st.lists(st.text("abc d", max_size=1500), min_size=1, max_size=4))
def test_what_is_hashed_to_learn_from_is_what_is_hashed_to_score(texts: list[str]) -> None:
    design = baseline.Design.of(texts)
    n, pieces = len(texts), [len(baseline._PIECES.findall(text)) for text in texts]
    stretches = [-(-k // baseline.LEARNT_STRETCH) if k > baseline.LEARNT_STRETCH else 0 for k in pieces]
    assert design.counts.shape[0] == n
    np.testing.assert_array_equal(np.bincount(design.owner, minlength=n), stretches)
    for i in np.flatnonzero(stretches):
        parts = design.stretches[np.flatnonzero(design.owner == i)].toarray()
        whole = design.counts[[i]].toarray().ravel()
        assert (parts <= whole).all()
        assert (parts.sum(0) >= whole).all(), "no piece is left out"
    weights = np.random.default_rng(0).normal(size=(2**baseline.BITS, 1)).astype(np.float32)
    linear = baseline.Linear(weights, np.ones(2**baseline.BITS, np.float32), np.zeros(1, np.float32))
    damped = design.counts.copy()
    damped.data = 1 + np.log(damped.data)
    expected = (damped @ weights)[:, 0] / np.sqrt(np.asarray(damped.power(2).sum(1)).ravel() + 1e-6)
    heard = [hearing(linear, text, float(z)) for text, z in zip(texts, expected, strict=True)]
    np.testing.assert_allclose(linear.logits(texts)[:, 0], heard, rtol=1e-3, atol=2e-3)


def hearing(linear: baseline.Linear, text: str, whole: float) -> float:
    """What the linear model says of a text by definition: the whole, the loudest stretches beside it, or one
    of them alone.
    """
    pieces = baseline._PIECES.findall(text) or [""]
    found = [baseline.buckets([piece])[1] for piece in pieces]

    def loudest(width: int) -> float:
        stretches = [np.concatenate(found[i : i + width]) for i in range(len(pieces) - width + 1)]
        sums = [(linear.weights[s, 0].sum(), linear.scale[s].sum() + 1e-6) for s in stretches]
        return max(float(above / np.sqrt(below)) for above, below in sums) + float(linear.bias[0])

    said = whole
    for width, share in baseline.STRETCHES:
        if len(pieces) > width:
            said += share * max(0.0, loudest(width) - whole)
    alone = [loudest(width) - lead for width, lead in baseline.BURIED if len(pieces) > width]
    return max(said, *alone) if alone else said


def letters(seed: int) -> tuple[list[str], list[str], list[str]]:
    """Abusive and benign letters of eight messages each, and the benign messages one by one."""
    rows = messages(3000, seed=seed)
    abuse, benign = ([m.text for m in rows if bool(m.policy) is wanted] for wanted in (True, False))
    joined = [[" ".join(part[i : i + 8]) for i in range(0, len(part) - 7, 8)] for part in (abuse, benign)]
    return joined[0], joined[1], benign


def test_as_many_kind_words_as_there_are_abusive_ones_do_not_drown_them() -> None:
    abuse, benign, _ = letters(31)
    targets = np.array([[1.0]] * len(abuse) + [[0.0]] * len(benign), np.float32)
    design, rows = baseline.Design.of([*abuse, *benign]), np.arange(len(targets))
    linear = baseline.fit(design, rows, targets, np.ones(len(targets), np.float32))
    abuse, benign, kind = letters(32)
    budget = np.quantile(linear.logits(benign), 0.99)
    padded = [
        " ".join([*kind[12 * i : 12 * i + 6], text, *kind[12 * i + 6 : 12 * i + 12]])
        for i, text in enumerate(abuse)
    ]
    assert (linear.logits(abuse) > budget).mean() > 0.97
    assert (linear.logits(padded) > budget).mean() > 0.9  # 0.25 if only the whole is heard


# -- thresholds and choice -----------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    n=st.integers(1, 300),
    share=st.floats(0.001, 0.2),
    ties=st.booleans(),
)
def test_thresholds_never_spend_more_than_their_share(seed: int, n: int, share: float, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 3))
    z = z.round(1) if ties else z
    benign, weight = rng.random(n) < 0.8, rng.random(n) + 0.1
    acted = (z >= fusion.cut(z, benign, weight, share)).any(1)
    assert (weight * acted * benign).sum() <= share * (weight * benign).sum() + 1e-9


def figures(
    recall: float | None, misspelt: float | None, padded: float | None = 0.8
) -> dict[str, dict[str, float | None]]:
    return {"around_budget": {"recall": recall, "recall_misspelt": misspelt, "recall_padded": padded}}


def test_a_simpler_model_that_is_as_good_wins() -> None:
    assert select({"fusion": figures(0.95, 0.9), "linear": figures(0.949, 0.9)}) == "linear"
    assert select({"fusion": figures(0.95, 0.9), "linear": figures(0.947, 0.9)}) == "fusion"
    assert select({"fusion": figures(0.95, 0.9), "linear": figures(0.96, 0.8)}) == "fusion"
    assert select({"fusion": figures(0.95, 0.9), "linear": figures(0.96, 0.9, padded=0.5)}) == "fusion"
    assert select({"fusion": figures(None, None), "linear": figures(None, None)}) == "fusion"


# -- training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_what_an_earlier_model_cannot_have_learnt_is_what_it_held_or_never_saw(
    tmp_path: Path, share: float
) -> None:
    whole = load(spec(tmp_path, dataset=str(dataset(tmp_path / "all.parquet", 2_000))))
    known = np.arange(len(whole.event_ids)) < share * len(whole.event_ids)
    pl.read_parquet(tmp_path / "all.parquet").sort("ts").head(int(known.sum())).write_parquet(
        tmp_path / "early.parquet"
    )
    early = load(spec(tmp_path, dataset=str(tmp_path / "early.parquet")))
    parts = split(early, 3)
    until = (EPOCH + timedelta(microseconds=int(early.sent_at[-1]))).isoformat()
    training = {"seed": 3, "held_rates": parts.rates, "until": until}
    fair = not_learnt_by(training, whole.sent_at, whole.group, whole.abusive)
    learnt = set(early.group[parts.everything].tolist())
    _, which, size = np.unique(whole.group, return_inverse=True, return_counts=True)
    fair &= size[which] <= LARGEST_HELD
    assert not set(whole.group[fair].tolist()) & learnt
    held = np.isin(whole.event_ids, [early.event_ids[i] for i in parts.held])
    assert fair[held & (size[which] <= LARGEST_HELD)].all()
    assert fair[~known].any() == (share < 1)
    assert not not_learnt_by({}, whole.sent_at, whole.group, whole.abusive).any()


def test_near_duplicates_never_straddle_a_split(tmp_path: Path) -> None:
    plan = spec(tmp_path)
    table = pl.read_parquet(plan.dataset)
    copies = table.head(200).with_columns(
        pl.col("ts") + pl.duration(days=2), event_id="copy" + pl.col("event_id")
    )
    hard = table.head(200).with_columns(
        pl.lit("so long and farewell").alias("text"),
        event_id="hard:" + pl.col("event_id"),
        group=pl.lit(7, pl.Int64),
        ts=pl.col("ts") + pl.duration(days=3),
    )
    pl.concat([table, copies, hard]).write_parquet(plan.dataset)
    data = load(plan)
    parts = split(data, seed=3)
    assert not set(data.group[parts.held]) & set(data.group[parts.everything])
    assert not set(data.group[parts.judged]) & set(data.group[parts.older])
    assert not data.synthetic[parts.held].any()
    assert set(parts.judged) <= set(parts.newest)
    assert parts.older.max() < parts.newest.min()


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="p_hate"):
        train(spec(tmp_path, policies=("spam", "hate")))


def test_what_was_measured_is_reported() -> None:
    metrics = json.loads((toy_bundle() / bundle.METRICS).read_text())
    assert metrics["selected"] == "fusion"
    for name in ("fusion", "linear", "text_only", "no_encoder", "trees"):
        assert 0 <= metrics["newest"][name]["recall"] <= 1
        assert set(metrics["newest"][name]["by_policy"]) == set(POLICIES)
    held = metrics["held"]["fusion"]
    assert held["ece"] < 0.1
    assert held["fpr"] <= 0.02 * 2
    assert "held messages" in (toy_bundle() / bundle.CARD).read_text()
    result = json.loads((toy_bundle().parent / "result.json").read_text())
    assert result["model_id"] == bundle.verify(toy_bundle()).model_id
    assert len(result["held_event_ids"]) == metrics["n"]["held"]


def test_without_behaviour_it_says_so_and_the_baseline_can_serve(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rehearsal, "LINEAR_TOLERANCE", 1.0)
    folder = train(spec(tmp_path, feature_names=(), epochs=2))
    manifest = bundle.verify(folder)
    assert not manifest.behaviour
    assert bundle.TREES not in manifest.files
    assert "behaviour is off" in (folder / bundle.CARD).read_text()
    assert manifest.selected == "linear"
    served = Detector.load(folder)
    rows = messages(400, seed=96)
    acted = served.decide(served.score([m.text for m in rows], np.zeros((400, 0))))
    assert acted[[m.policy is not None for m in rows]].mean() > 0.6


# -- thresholds and judges who err ---------------------------------------------------------------------------


def _scored(rng: np.random.Generator, misjudged: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Log odds [n, 1], what judges say is benign, what is: 2,000 benign and 800 abusive messages."""
    z = np.concatenate([rng.normal(-4, 2, 2000), rng.normal(4, 2, 800)])[:, None]
    truly_benign = np.arange(2800) < 2000
    called_benign = truly_benign | (rng.random(2800) < misjudged)
    return z, called_benign, truly_benign


def test_a_threshold_is_not_driven_up_by_abuse_that_judges_called_benign() -> None:
    from models.fusion import cut

    recalls: dict[float, list[float]] = {0.0: [], 0.02: []}
    for seed in range(20):
        z, called, truly = _scored(np.random.default_rng(seed), misjudged=0.02)
        for error, found in recalls.items():
            at = cut(z, called, np.ones(len(z)), share=0.006, label_error=error)
            found.append(float((z[~truly] >= at).mean()))
            assert (z[truly] >= at).mean() <= 0.02, "twice the budget of 1%"
    assert np.mean(recalls[0.02]) > np.mean(recalls[0.0]) + 0.05


def test_the_allowance_for_erring_judges_is_bounded_when_they_do_not_err() -> None:
    from models.fusion import cut

    rates = []
    for seed in range(20):
        z, called, truly = _scored(np.random.default_rng(seed), misjudged=0.0)
        at = cut(z, called, np.ones(len(z)), share=0.006, label_error=0.02)
        rates.append(float((z[truly] >= at).mean()))
    assert max(rates) <= 0.0125
