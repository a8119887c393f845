"""The first stage: padding cannot quiet it, its cut keeps the bound, what it settles is watched."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import baseline, bundle, cascade, fusion
from models.cascade import Cascade, Watch, disguises
from models.detector import Detector, Shortcuts
from models.tokens import View, views
from models.train import train
from redqueen import attacks
from redqueen.settings import Settings
from redqueen.store import DirectoryStore
from serving.scorer import Scorer
from tests.miniature import MovableClock, event
from tests.toy_model import FEATURES, POLICIES, matrix, messages, spec, toy_bundle

BOUND = 0.35
UNAUDITED = Shortcuts(audit_rate=0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with a first stage: the toy's few held abusive messages can vouch for no better bound."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cascade, "MOST_MISSED", BOUND)
        return train(spec(tmp_path_factory.mktemp("cascade")))


@pytest.fixture(scope="module")
def exact(folder: Path) -> Detector:
    return Detector.load(folder)


@pytest.fixture(scope="module")
def served(folder: Path) -> Detector:
    return Detector.load(folder, shortcuts=UNAUDITED)


@pytest.fixture(scope="module")
def linear() -> baseline.Linear:
    return baseline.Linear.from_bytes((toy_bundle() / bundle.LINEAR).read_bytes())


# -- reading in pieces ---------------------------------------------------------------------------------------


@given(text=st.text("abcdefgh xyz", max_size=4 * baseline.PIECE))
def test_the_loudest_part_is_no_quieter_than_the_whole(linear: baseline.Linear, text: str) -> None:
    heard = linear.hear([text])
    assert (heard.loudest >= heard.logits - 1e-4).all()


@given(texts=st.lists(st.text(max_size=300), max_size=5))
def test_the_loudest_part_does_not_depend_on_who_shares_the_batch(
    linear: baseline.Linear, texts: list[str]
) -> None:
    together = linear.hear(texts).loudest
    assert together.shape == (len(texts), 2)
    for row, text in zip(together, texts, strict=True):
        np.testing.assert_allclose(row, linear.hear([text]).loudest[0], rtol=1e-4, atol=1e-4)


def test_benign_words_around_abuse_cannot_quiet_it(linear: baseline.Linear) -> None:
    rows = messages(600, seed=31)
    abuse = [m.text for m in rows if m.policy][:60]
    benign = [m.text for m in rows if not m.policy]
    pick = random.Random(3)
    padded = [" ".join([*pick.choices(benign, k=12), text, *pick.choices(benign, k=12)]) for text in abuse]
    alone, diluted = linear.logits(abuse).max(1), linear.logits(padded).max(1)
    heard = linear.hear(padded).loudest.max(1)
    assert np.median(alone - heard) < 0.5 * np.median(alone - diluted)
    assert (heard > linear.logits(benign).max(1).mean()).all()


# -- the cut -------------------------------------------------------------------------------------------------


@given(n=st.integers(0, 3000), bound=st.floats(0.002, 0.3))
def test_as_many_misses_are_allowed_as_keep_the_bound_and_no_more(n: int, bound: float) -> None:
    allowed = cascade._allowed(n, bound)
    one_sided = 2 * cascade.CONFIDENCE - 1
    if allowed >= 0:
        assert attacks.clopper_pearson(allowed, n, one_sided)[1] <= bound
    assert allowed == n or attacks.clopper_pearson(allowed + 1, n, one_sided)[1] > bound


def test_the_bound_holds_for_fresh_abuse_as_it_is_and_in_every_disguise(
    exact: Detector, served: Detector
) -> None:
    rows = messages(700, seed=77)
    benign = [m.text for m in rows if not m.policy]
    pick = random.Random(5)
    caught = missed = 0
    for message in [m for m in rows if m.policy]:
        forms = disguises(message.text, benign, pick)
        features = np.repeat(matrix([message]), len(forms), axis=0)
        acted = exact.decide(exact.score(forms, features))
        acts = served.decide(served.score(forms, features))
        caught += bool(acted[0])
        missed += bool(acted[0]) and bool((acted & ~acts).any())
    assert caught > 80
    assert missed / caught <= BOUND


def test_most_benign_messages_are_settled_below_every_threshold(exact: Detector, folder: Path) -> None:
    watched = Detector.load(folder, shortcuts=UNAUDITED)
    rows = [m for m in messages(500, seed=78) if not m.policy]
    scores = watched.score([m.text for m in rows], matrix(rows))
    assert watched.watch is not None
    counts = watched.watch.counts()
    assert counts["scored"] == len(rows)
    assert counts["settled"] > 0.5 * len(rows)
    assert counts["audited"] == 0
    whole = exact.score([m.text for m in rows], matrix(rows))
    settled = np.abs(scores - whole).max(1) > 1e-5
    assert 0 < settled.sum() <= counts["settled"]
    assert not watched.decide(scores[settled]).any()


def test_what_is_not_acted_on_has_calibrated_probabilities(served: Detector) -> None:
    rows = messages(3000, seed=79)
    scores = served.score([m.text for m in rows], matrix(rows))
    low = ~served.decide(scores)
    for p, policy in enumerate(served.policies):
        judged = [0.95 if m.policy == policy else 0.02 for m in rows]
        assert abs(float(scores[low, p].mean()) - np.array(judged)[low].mean()) < 0.02


def test_abuse_that_only_behaviour_shows_is_not_settled_by_its_words(
    served: Detector, exact: Detector
) -> None:
    rows = [m for m in messages(3000, seed=83) if m.policy]
    texts, features = [m.text for m in rows], matrix(rows)
    raised = exact.decide(exact.score(texts, features)) & ~exact.decide(exact.score_texts(texts))
    assert raised.sum() > 20
    assert served.decide(served.score(texts, features))[raised].mean() > 0.75


def test_a_message_without_words_is_not_settled_by_them(served: Detector, exact: Detector) -> None:
    features = [[0.0, 0.0], [6.0, -5.0]]
    np.testing.assert_array_equal(served.score(["", " "], features), exact.score(["", " "], features))


def test_evaluation_and_attacks_are_answered_by_all_parts(folder: Path) -> None:
    off = Detector.load(folder, shortcuts=Shortcuts(int8=False, cascade=False))
    rows = messages(80, seed=80)
    texts, features = [m.text for m in rows], matrix(rows)
    plain = Detector.load(folder)
    assert plain.watch is None
    np.testing.assert_array_equal(off.score(texts, features), plain.score(texts, features))


def test_too_little_abuse_vouches_for_no_first_stage() -> None:
    verdict = json.loads((toy_bundle() / bundle.METRICS).read_text())["shortcuts"]["cascade"]
    assert not verdict["passed"]
    assert "cannot show" in verdict["why"]
    assert not (toy_bundle() / bundle.CASCADE).exists()
    assert f"A first stage: no, {verdict['why']}" in (toy_bundle() / bundle.CARD).read_text()


@pytest.mark.parametrize(("n_abusive", "told"), [(0, "no abusive message is held"), (5, "cannot show that")])
def test_without_enough_abuse_the_verdict_says_so(exact: Detector, n_abusive: int, told: str) -> None:
    rows = messages(300, seed=85)
    kept = [m for m in rows if m.policy][:n_abusive] + [m for m in rows if not m.policy][:100]
    seen, known = views([m.text for m in kept]), matrix(kept)
    canonical = [view.canonical for view in seen]
    parts = cascade.Parts(exact.parts["linear"], exact.parts["markov"], exact.parts["trees"], exact._fusion)
    logits = {
        "encoder": exact.parts["encoder"].logits(seen),
        "linear": parts.linear.logits(canonical),
        "markov": parts.markov.logits(canonical),
        "trees": exact.parts["trees"].logits(known),
    }
    targets = np.array([[float(m.policy == p) for p in POLICIES] for m in kept])
    part = fusion.Slice(targets, np.ones(len(kept)))
    weighed = fusion.fit_voice(("linear", "trees"), logits, targets, part.weight)
    held = cascade.Held(
        [m.text for m in kept], seen, known, FEATURES, part, logits, exact.parts["encoder"].logits
    )
    found, verdict = cascade.fit(parts, weighed, held, seed=1)
    assert found is None
    assert told in verdict["why"]


def test_the_first_stage_is_part_of_what_a_model_is(folder: Path) -> None:
    manifest = bundle.verify(folder)
    without = {name: digest for name, digest in manifest.files.items() if name != bundle.CASCADE}
    plain = bundle.identify(
        without, manifest.policies, manifest.features_version, manifest.feature_names, manifest.selected
    )
    assert manifest.model_id != plain
    body = (folder / bundle.CASCADE).read_bytes()
    assert Cascade.from_bytes(body).to_bytes() == body


# -- the watch -----------------------------------------------------------------------------------------------


def seen(n: int) -> list[View]:
    return [View(f"message number {i}", 0) for i in range(n)]


def sample(rate: float, salt: str, some: list[View]) -> np.ndarray:
    watch = Watch(rate, salt)
    return watch.sampled(watch.drawn(some))


def test_the_sample_is_of_the_size_asked_for_and_follows_from_text_and_salt() -> None:
    some = seen(4000)
    drawn = sample(0.1, "salt", some)
    assert 0.08 < drawn.mean() < 0.12
    np.testing.assert_array_equal(drawn, sample(0.1, "salt", some))
    assert (drawn != sample(0.1, "other", some)).any()
    assert not sample(0.0, "salt", some).any()
    assert sample(1.0, "salt", some).all()


def test_the_share_missed_is_estimated_from_the_sample() -> None:
    rng = np.random.default_rng(1)
    n, rate = 200_000, 0.1
    abuse = rng.random(n) < 0.02
    settled = np.where(abuse, rng.random(n) < 0.2, rng.random(n) < 0.9)
    drawn = rng.permutation(np.linspace(0, 2**32 - 1, n).astype(np.uint32))
    watch = Watch(rate, "salt", most_missed=0.5)
    acted = abuse & (~settled | watch.sampled(drawn))
    # A flood of copies counts as one message, whether it is missed or caught.
    copied = np.concatenate([np.arange(n), *(np.repeat(rows[0], 5_000) for rows in flooding(settled, acted))])
    watch.record(settled[copied], acted[copied], drawn[copied])
    estimate, low, high = watch.missed_share()
    assert low < 0.2 < high
    assert abs(estimate - 0.2) < 0.05
    assert not watch.tripped
    assert watch.counts()["missed"] > 5_000


def flooding(settled: np.ndarray, acted: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(acted & settled), np.flatnonzero(acted & ~settled)]


def test_too_many_misses_stop_the_first_stage_and_a_few_do_not() -> None:
    fine, broken = Watch(0.1, "salt"), Watch(0.1, "salt")
    yes, no = np.ones(1, bool), np.zeros(1, bool)
    for watch, caught, misses in ((fine, 500, 3), (broken, 10, 8)):
        for i in range(caught):
            watch.record(no, yes, np.array([i], np.uint32))
        for i in range(misses):
            assert not watch.tripped or watch is broken
            watch.record(yes, yes, np.array([caught + i], np.uint32))
    assert not fine.tripped
    assert "should have been acted on" in broken.tripped


def test_copies_of_one_message_do_not_stop_the_first_stage() -> None:
    watch = Watch(0.1, "salt")
    for _ in range(60):
        watch.record(np.ones(9, bool), np.ones(9, bool), np.full(9, 7, np.uint32))
    assert not watch.tripped
    assert watch.counts()["missed"] == 540


def test_texts_that_were_caught_from_some_senders_are_missed_from_others() -> None:
    watch, texts = Watch(0.1, "salt"), np.arange(40, dtype=np.uint32)
    watch.record(np.zeros(40, bool), np.ones(40, bool), texts)
    watch.record(np.ones(40, bool), np.ones(40, bool), texts)
    assert watch.missed_share()[0] == 0.5
    assert watch.tripped


def test_what_is_audited_gets_the_whole_models_answer(folder: Path, exact: Detector) -> None:
    rows = messages(200, seed=81)
    texts, features = [m.text for m in rows], matrix(rows)
    audited = Detector.load(folder, shortcuts=Shortcuts(int8=False, audit_rate=1.0))
    np.testing.assert_allclose(audited.score(texts, features), exact.score(texts, features), atol=1e-6)
    assert audited.watch is not None
    counts = audited.watch.counts()
    assert counts["audited"] == counts["settled"] > 0


def test_a_first_stage_that_was_stopped_settles_nothing(folder: Path, exact: Detector) -> None:
    stopped = Detector.load(folder, shortcuts=UNAUDITED)
    assert stopped.watch is not None
    stopped.watch.tripped = "too many misses"
    rows = messages(100, seed=82)
    texts, features = [m.text for m in rows], matrix(rows)
    np.testing.assert_allclose(stopped.score(texts, features), exact.score(texts, features), atol=1e-6)
    assert stopped.watch.counts()["scored"] == 0


def test_on_call_sees_what_is_settled_and_why_it_stopped(tmp_path: Path, folder: Path) -> None:
    from redqueen import state
    from redqueen.rollout import RolloutState

    store = DirectoryStore(tmp_path / "store")
    settings = Settings(home=tmp_path, cascade_audit_rate=1.0)
    detector = Detector.load(folder, shortcuts=Shortcuts.of(settings))
    live: dict[str, Any] = RolloutState.initial().to_dict() | {"champion": detector.model_id}
    store.put(state.LIVE_KEY, json.dumps(live).encode())
    scorer = Scorer(settings, store, MovableClock(), load=lambda model_id: detector)
    scorer.start()
    texts = [m.text for m in messages(60, seed=84) if not m.policy]
    scorer.score([event(n, text=text) for n, text in enumerate(texts)])
    told = scorer.state()
    first = told["first_stage"][detector.model_id]
    assert first["settled"] == first["audited"] == told["counts"]["first_stage_settled"] > 0
    assert first["missed"] == 0
    assert detector.watch is not None
    detector.watch.tripped = "too many misses"
    assert f"first stage of {detector.model_id}: too many misses" in scorer.state()["degraded_reasons"]


def test_the_setting_turns_it_off(folder: Path, tmp_path: Path) -> None:
    off = Detector.load(folder, shortcuts=Shortcuts.of(Settings(home=tmp_path, cascade=False)))
    assert off.watch is None
