"""What training disturbs: both classes alike, from the seed alone, and as production would read it."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import perturb
from models.perturb import KINDS, disturbed, misspelt, padded
from models.tokens import LEVELS, View, view, views
from redqueen.text import canonicalise
from tests.toy_model import messages

TEXTS = [message.text for message in messages(400, seed=11)]


def one_epoch(
    texts: list[str], noise: float, padding: float, *, seed: int = 1, benign: list[int] | None = None
) -> list[View]:
    return disturbed(
        views(texts),
        texts,
        np.arange(len(texts)),
        np.array(range(len(texts)) if benign is None else benign, np.int64),
        noise,
        padding,
        600,
        np.random.default_rng([7, seed]),
    )


# -- any text ------------------------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=60), kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 2**32))
def test_any_text_can_be_disturbed_and_equal_seeds_disturb_equally(text: str, kind: str, seed: int) -> None:
    made = [KINDS[kind](text, random.Random(seed)) for _ in range(2)]
    assert made[0] == made[1]
    view(made[0])


@given(text=st.text(max_size=60), benign=st.text(max_size=300), seed=st.integers(0, 2**32))
def test_padding_keeps_the_message_whole_and_stays_short(text: str, benign: str, seed: int) -> None:
    made = padded(text, benign, 24, random.Random(seed))
    assert text in made
    assert len(made.split()) <= len(text.split()) + 24


@given(text=st.text(min_size=3, max_size=60), seed=st.integers(0, 2**32))
def test_a_misspelling_changes_about_as_much_as_it_says(text: str, seed: int) -> None:
    made = misspelt(text, random.Random(seed), 0.1)
    assert abs(len(made) - len(text)) <= max(1, len(text) // 10)


# -- an epoch ------------------------------------------------------------------------------------------------


def test_an_epoch_depends_on_its_seed_alone() -> None:
    first, again, other = (one_epoch(TEXTS, 0.5, 0.2, seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_without_noise_or_padding_texts_stay_as_they_are() -> None:
    plain, seen = views(TEXTS), one_epoch(TEXTS, 0.0, 0.0)
    assert [v.canonical for v in seen] == [v.canonical for v in plain]
    assert [v.sent for v in seen] == [v.sent for v in plain]
    relabelled = np.mean([a.level != b.level for a, b in zip(seen, plain, strict=True)])
    assert 0 < relabelled < 2 * perturb.RANDOM_LEVEL


def test_about_the_asked_share_is_disturbed() -> None:
    plain = views(TEXTS)
    seen = one_epoch(TEXTS, 0.3, 0.0)
    changed = np.mean([a.canonical != b.canonical or b.sent != "" for a, b in zip(plain, seen, strict=True)])
    assert 0.1 < changed <= 0.35  # a change of case is none to the reader
    long = np.mean(
        [
            len(v.canonical) > 20 + len(p.canonical)
            for p, v in zip(plain, one_epoch(TEXTS, 0.0, 0.4), strict=True)
        ]
    )
    assert 0.25 < long < 0.45


@pytest.mark.parametrize("padding", [0.0, 0.3])
def test_neither_class_is_disturbed_more_than_the_other(padding: float) -> None:
    """The same texts under both labels: what was done to them must not tell which."""
    both = TEXTS + TEXTS
    abusive = np.arange(len(both)) < len(TEXTS)
    benign = np.flatnonzero(~abusive).tolist()
    marks: list[list[float]] = []
    for seed in range(12):
        seen = one_epoch(both, 0.5, padding, seed=seed, benign=benign)
        marks += [[v.level > 0, len(v.canonical), len(v.sent), v.canonical.count(" ")] for v in seen]
    table, labels = np.array(marks, float), np.tile(abusive, 12)
    gap = table[labels].mean(0) - table[~labels].mean(0)
    error = table.std(0) * np.sqrt(2 / labels.sum())
    assert (np.abs(gap) < 4 * error).all(), gap / error


def test_what_is_seen_of_a_disguise_is_what_production_sees() -> None:
    """A text is disturbed as it was sent and read again: canonicalising undoes of it what it can."""
    seen = [v for v in one_epoch(TEXTS, 1.0, 0.0) if v.sent]
    assert len(seen) > 100
    assert all(view(v.sent).canonical == v.canonical for v in seen)
    hidden = KINDS["invisible"]("claim the free gift wallet now", random.Random(2))
    assert hidden != "claim the free gift wallet now"
    assert view(hidden).canonical == "claim the free gift wallet now"
    assert 0 < view(hidden).level < LEVELS
    assert view(hidden).sent == hidden


def test_look_alikes_are_mostly_read_back() -> None:
    text = "claim the free gift wallet bonus now"
    rng = random.Random(3)
    made = [KINDS["homoglyph"](text, rng) for _ in range(60)]
    assert np.mean([m != text for m in made]) > 0.7
    words = [word for m in made for word in canonicalise(m).split()]
    assert np.mean([word in text.split() for word in words]) > 0.6


def test_a_kind_that_is_left_out_never_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perturb, "KINDS", {"invisible": KINDS["invisible"]})
    plain, seen = views(TEXTS), one_epoch(TEXTS, 1.0, 0.0)
    assert [v.canonical for v in seen] == [v.canonical for v in plain]
    monkeypatch.setattr(perturb, "KINDS", {})
    assert [v.sent for v in one_epoch(TEXTS, 1.0, 0.0)] == [v.sent for v in plain]


def test_where_the_text_as_sent_is_not_known_the_canonical_form_is_disturbed() -> None:
    read = views(TEXTS)
    seen = disturbed(read, (), np.arange(50), np.arange(50), 1.0, 0.0, 600, np.random.default_rng(1))
    assert sum(a.canonical != b.canonical for a, b in zip(read, seen, strict=False)) > 10
