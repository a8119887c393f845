"""Claims about attacks: rewritings stay readable, search is aimed, seeded and within budget, the gate is
closed."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen.attacks import (
    FAMILIES,
    AttackReport,
    FamilyResult,
    GateLimits,
    Homoglyph,
    Invisible,
    Spacing,
    WordFamily,
    attack,
    clopper_pearson,
    compare,
    gate,
)
from redqueen.attacks.families import visible_length
from redqueen.errors import InvalidInput
from redqueen.text import canonicalise, domains

BENIGN_FRAMES = [
    "are you coming to the {} tonight", "did anyone see the {} yesterday", "I am so tired after the {}",
    "my sister asked about the {} again", "the {} was great, thanks for the tip",
    "can we talk about the {} later",
    "who has the notes from the {}", "please do not click links about the {} it is a scam",
]  # fmt: skip
BENIGN_THINGS = [
    "match",
    "party",
    "exam",
    "concert",
    "update",
    "giveaway",
    "movie",
    "lecture",
    "patch",
    "game",
    "trip",
]
ABUSE_FRAMES = [
    "claim your free {} now at {}", "you have won a {}! confirm your account: {}",
    "hurry up, {} for the first 50, {}",
    "airdrop of {} ends today visit {}", "verify your wallet to receive {} {}",
    "cheap {} no limits dm me or {}",
]  # fmt: skip
ABUSE_THINGS = [
    "nitro",
    "steam gift card",
    "bitcoin",
    "iphone",
    "skin bundle",
    "premium membership",
    "followers",
]
LINKS = [
    "https://discord-gift.ru/x",
    "steamcomunity.com/gift",
    "nitro-claim.xyz",
    "http://free.gift-win.top/a?b=1",
]


def messages(seed: int, count: int) -> tuple[list[str], list[str]]:
    """Benign and abusive messages, so many of each."""
    rng = random.Random(seed)
    benign = [rng.choice(BENIGN_FRAMES).format(rng.choice(BENIGN_THINGS)) for _ in range(count)]
    abuse = [
        rng.choice(ABUSE_FRAMES).format(rng.choice(ABUSE_THINGS), rng.choice(LINKS)) for _ in range(count)
    ]
    return benign, abuse


class NgramDetector:
    """A character n-gram model: what a team starts with."""

    policies = ("scam",)

    def __init__(self, canonical: bool = False, grams: tuple[int, int] = (1, 3)) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer
        from sklearn.linear_model import LogisticRegression

        self.canonical, self.asked = canonical, 0
        self._vectors = HashingVectorizer(analyzer="char_wb", ngram_range=grams, n_features=2**14)
        benign, abuse = messages(1, 300)
        self._model = LogisticRegression(C=3.0).fit(self._prepare(benign + abuse), [0] * 300 + [1] * 300)
        # A strict operating point: a tenth of plain abuse is missed, so that the rest is not far above it.
        self.thresholds = np.array([np.quantile(self.score(messages(2, 300)[1])[:, 0], 0.1)])
        self.asked = 0

    def _prepare(self, texts: Sequence[str]):  # type: ignore[no-untyped-def]
        return self._vectors.transform([canonicalise(t) if self.canonical else t for t in texts])

    def score(self, texts: list[str], features: np.ndarray | None = None) -> np.ndarray:
        self.asked += len(texts)
        return self._model.predict_proba(self._prepare(texts))[:, 1:]


@pytest.fixture(scope="module")
def detector() -> NgramDetector:
    return NgramDetector()


@pytest.fixture(scope="module")
def abuse() -> list[str]:
    return sorted(set(messages(3, 200)[1]))[:50]


@pytest.fixture(scope="module")
def report(detector: NgramDetector, abuse: list[str]) -> AttackReport:
    return attack(detector, abuse, seed=1)


words = st.text(st.characters(codec="utf-8", categories=["L", "N", "P", "S"]), min_size=1, max_size=12)
texts = st.lists(words | st.sampled_from(["claim", "nitro", "https://evil.com/x", "free"]), max_size=25).map(
    " ".join
)


@settings(max_examples=60, deadline=None)
@given(texts, st.floats(0, 1), st.integers(0, 99), st.sampled_from(FAMILIES))
def test_rewritings_stay_within_what_a_person_reads(text: str, strength: float, seed: int, family) -> None:  # type: ignore[no-untyped-def]
    mutated = family.mutate(text, strength, random.Random(seed))
    assert mutated == family.mutate(text, strength, random.Random(seed))
    assert visible_length(mutated) <= max(visible_length(text), family.length_limit(text))
    if isinstance(family, WordFamily) and not isinstance(family, Spacing):
        before, after = text.split(), mutated.split()
        assert len(before) == len(after)
        assert sum(a != b for a, b in zip(before, after, strict=True)) <= family.max_words(len(before))


def test_every_family_rewrites_something_and_says_what_it_is() -> None:
    text = "claim your free nitro now at https://discord-gift.ru/x and confirm your account before tomorrow"
    for family in FAMILIES:
        assert family.mutate(text, 1.0, random.Random(3)) != text, family.name
        assert family.mutate(text, 0.0, random.Random(3)) == text, family.name
        assert family.atlas.startswith("AML.T00")
        assert len(family.threat) > 20
    assert len({family.name for family in FAMILIES}) == len(FAMILIES) >= 7


def test_canonicalising_undoes_what_cannot_be_seen() -> None:
    text = "claim your free nitro before tomorrow morning"
    for family in (Invisible(max_words_share=1.0), Homoglyph(max_words_share=1.0)):
        read = [canonicalise(family.mutate(text, 1.0, random.Random(seed))) for seed in range(20)]
        kept = np.mean([a == b for r in read for a, b in zip(r, text, strict=True)])
        # Accents that compose are somebody's orthography and stay.
        assert kept >= (1.0 if family.name == "invisible" else 0.95)


def test_cloaked_links_still_lead_to_the_same_host() -> None:
    cloak = FAMILIES[-1]
    seen = {
        cloak.mutate("go to https://discord-gift.ru/x now", 1.0, random.Random(seed)) for seed in range(60)
    }
    assert len(seen) >= 8
    # A redirector is a host of its own; where it leads stands last.
    assert {domains(text)[-1] for text in seen} == {"discord-gift.ru"}
    assert {host for text in seen for host in domains(text)} == {"google.com", "discord-gift.ru"}


def test_search_beats_blind_rewriting_at_the_same_strength(
    detector: NgramDetector, abuse: list[str], report: AttackReport
) -> None:
    for family, result in zip(FAMILIES, report.families, strict=True):
        strength = family.max_words_share if isinstance(family, WordFamily) else 1.0
        blind = [family.mutate(t, strength, random.Random(i)) for i, t in enumerate(abuse)]
        kept = float((detector.score(blind)[:, 0] >= detector.thresholds[0]).mean())
        assert result.recall_after <= kept + 0.02, family.name
    assert report.mean_recall < report.recall_before - 0.05


def test_survivors_are_readable_and_really_evade(
    detector: NgramDetector, abuse: list[str], report: AttackReport
) -> None:
    families = {family.name: family for family in FAMILIES}
    assert len(report.survivors) == sum(report.attacked - sum(f.caught_after) for f in report.families) > 10
    for hard in report.survivors:
        assert families[hard.family].readable(abuse[int(hard.id)], hard.text)
        assert hard.margin < 0
    assert (detector.score([h.text for h in report.survivors])[:, 0] < detector.thresholds[0]).all()


def test_same_seed_same_outcome_and_another_seed_another(
    detector: NgramDetector, abuse: list[str], report: AttackReport
) -> None:
    again = attack(detector, abuse, seed=1)
    assert again == report
    assert again.digest() == report.digest()
    assert attack(detector, abuse, seed=2).survivors != report.survivors


@pytest.mark.parametrize("budget", [50, 400, 3_000])
def test_the_budget_is_kept_and_its_end_is_told(
    detector: NgramDetector, abuse: list[str], budget: int
) -> None:
    detector.asked = 0
    report = attack(detector, abuse, seed=1, budget_queries=budget)
    assert detector.asked == report.queries <= budget
    if budget < 1_000:
        assert any(f.exhausted for f in report.families)
        assert "budget ran out" in " ".join(gate(report).reasons)


def test_features_follow_the_text_and_keep_the_behaviour(abuse: list[str]) -> None:
    from redqueen.features import FEATURES, NAMES

    class Spy:
        policies = ("scam", "spam")
        thresholds = np.array([0.5, 0.9])
        seen: list[np.ndarray] = []  # noqa: RUF012

        def score(self, texts: list[str], features: np.ndarray | None = None) -> np.ndarray:
            assert features is not None
            self.seen.append(features)
            obscured = features[:, NAMES.index("text_obfuscation")] > 0
            return np.stack([np.where(obscured, 0.95, 0.6), np.full(len(texts), 0.1)], axis=1)

    rows = np.zeros((len(abuse), len(FEATURES)), dtype=np.float32)
    rows[:, NAMES.index("actor_events_1h")] = np.arange(len(abuse))
    report = attack(Spy(), abuse, features=rows, families=[Invisible()], seed=1)
    assert report.families[0].recall_after == 1.0
    assert any((seen[:, NAMES.index("text_obfuscation")] > 0).any() for seen in Spy.seen)
    assert set(np.concatenate([s[:, NAMES.index("actor_events_1h")] for s in Spy.seen])) == set(
        range(len(abuse))
    )


def test_a_policy_column_decides_where_one_is_given(abuse: list[str]) -> None:
    class Fixed:
        policies = ("a", "b")
        thresholds = np.array([0.5, 0.5])

        def score(self, texts: list[str], features: np.ndarray | None = None) -> np.ndarray:
            return np.tile([0.9, 0.1], (len(texts), 1))

    columns = [i % 2 for i in range(len(abuse))]
    assert attack(Fixed(), abuse, policy=columns, families=[]).recall_before == pytest.approx(0.5, abs=0.02)
    assert attack(Fixed(), abuse, families=[]).recall_before == 1.0


def test_reports_survive_json_and_summaries_hold_no_text(report: AttackReport, abuse: list[str]) -> None:
    written = json.loads(json.dumps(report.to_dict(survivors=True)))
    assert AttackReport.from_dict(written) == report
    assert AttackReport.from_dict(report.to_dict()).digest() == report.digest()
    shown = json.dumps(report.summary())
    assert not any(text in shown for text in abuse)
    assert [f["family"] for f in report.summary()["families"]] == [f.name for f in FAMILIES]
    with pytest.raises(InvalidInput, match="no attack report"):
        AttackReport.from_dict({"seed": 1})


def made(kept: Sequence[float], messages: int = 120) -> AttackReport:
    """A report in which each family leaves the given share caught."""
    ids = tuple(map(str, range(messages)))
    after = [tuple(i < share * messages for i in range(messages)) for share in kept]
    results = tuple(
        FamilyResult(f"f{k}", "AML.T0043", caught, messages, 10, False) for k, caught in enumerate(after)
    )
    return AttackReport(1, ids, (True,) * messages, results, (), 100, 1_000)


def test_the_gate_has_floors() -> None:
    assert gate(made([0.8, 0.7])).passed
    low = gate(made([0.9, 0.05]), made([0.9, 0.07]))
    assert not low.passed
    assert "worst family, f1" in low.reasons[0]
    assert not gate(made([0.25, 0.26])).passed
    assert gate(made([0.25, 0.26]), limits=GateLimits(min_mean_recall=0.2)).passed


def test_a_first_model_is_not_refused_for_one_weak_family_but_it_is_told() -> None:
    weak = gate(made([0.9, 0.05]))
    assert weak.passed
    assert any(
        "worst family, f1" in reason and "what is live holds 0.00" in reason for reason in weak.reasons
    )


def test_the_gate_stays_closed_without_evidence() -> None:
    few = gate(made([0.9], messages=20))
    assert not few.passed
    assert "only 20 abusive messages" in few.reasons[0]
    assert not gate(made([])).passed
    tired = made([0.9, 0.9])
    tired = replace(tired, families=(replace(tired.families[0], exhausted=True), tired.families[1]))
    assert not gate(tired).passed


def test_the_gate_refuses_who_is_worse_than_the_champion() -> None:
    champion = made([0.9, 0.9])
    assert gate(made([0.9, 0.9]), champion).passed
    assert gate(made([0.87, 0.88]), champion).passed
    assert not gate(made([0.7, 0.75]), champion).passed
    one_family = gate(made([0.9, 0.6]), champion, GateLimits(max_mean_loss=0.5))
    assert not one_family.passed
    assert "under f1" in one_family.reasons[0]


def test_comparison_is_paired_and_refuses_other_messages(abuse: list[str], detector: NgramDetector) -> None:
    champion, candidate = made([0.8]), made([0.6])
    mean = compare(champion, candidate).mean
    assert mean.difference == pytest.approx(-0.2)
    assert mean.low < -0.2 < mean.high < 0
    with pytest.raises(InvalidInput, match="same ones"):
        compare(champion, replace(candidate, seed=9))
    canonical = attack(NgramDetector(canonical=True), abuse, seed=1)
    invisible = compare(attack(detector, abuse, seed=1), canonical).families[0]
    assert invisible.name == "invisible"
    assert invisible.candidate >= invisible.champion


def test_bad_input_and_broken_detectors_are_refused(detector: NgramDetector) -> None:
    class Broken:
        policies = ("a",)
        thresholds = np.array([0.5])

        def score(self, texts: list[str], features: np.ndarray | None = None) -> np.ndarray:
            return np.full((len(texts), 1), np.nan)

    for kwargs, message in (
        ({"texts": []}, "no message"),
        ({"texts": ["a", "b"], "ids": ["1"]}, "1 ids were given for 2"),
        ({"texts": ["a", "b"], "ids": ["1", "1"]}, "ids repeat"),
        ({"texts": ["a", "b"], "budget_queries": 1}, "does not suffice"),
    ):
        with pytest.raises(InvalidInput, match=message):
            attack(detector, **kwargs)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="not finite"):
        attack(Broken(), ["a"])


def test_clopper_pearson_is_exact() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    low, high = clopper_pearson(0, 100)
    assert low == 0
    assert high == pytest.approx(1 - 0.025 ** (1 / 100))
    low, high = clopper_pearson(5, 10)
    assert (low, high) == pytest.approx((0.18709, 0.81291), abs=1e-4)


def test_a_candidate_below_a_floor_passes_only_where_the_live_champion_is_no_better() -> None:
    weak = made([0.9, 0.05])
    assert gate(weak, made([0.8, 0.05])).passed
    refused = gate(weak, made([0.9, 0.07]))
    assert not refused.passed
    assert "worst family, f1" in refused.reasons[0]
