"""Markov models of how each side writes: a distribution, the same in any batch, not to be talked down."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import markov
from models.markov import Markov
from models.tokens import PASSAGE, WORD, View, views

ABUSE = ["free gift cards, claim now", "claim your free nitro gift", "free nitro, claim it here"]
BENIGN = ["see you at the meeting tomorrow", "lunch at the usual place", "the notes of the meeting are here"]
TEXTS, TARGETS = ABUSE + BENIGN, np.array([[1.0]] * 3 + [[0.0]] * 3)


@pytest.fixture(scope="module")
def model() -> Markov:
    return markov.fit(TEXTS, TARGETS, np.ones(6))


def test_new_words_of_a_side_speak_for_it(model: Markov) -> None:
    abuse, benign = model.logits(["claim a nitro card", "notes of tomorrow"])[:, 0]
    assert abuse > benign + 1


def test_what_follows_is_a_distribution(model: Markov) -> None:
    """All that may follow some characters, seen or not, has a probability of one together."""
    alphabet = sorted({*"".join(TEXTS), "\x03", "z", "q"})
    read = markov._Read.of([f"claim{letter}" for letter in alphabet])
    last = read.first + 1 + len("claim")
    for side in range(2):
        p = np.full(len(read.codes), markov.UNSEEN)
        for (at, others, together), seen, left in zip(read.orders(), model.seen, model.left, strict=True):
            p[at] = seen[together, side] + left[others, side] * p[at]
        known = p[last].sum()
        # The two letters that were never seen stand for all others.
        assert 0.9 < known < 1.001


def test_a_policy_is_told_from_another() -> None:
    targets = np.array([[1.0, 0], [1, 0], [1, 0], [0, 0], [0, 0], [0, 1.0]])
    model = markov.fit(TEXTS, targets, np.ones(6))
    found = model.logits(["free nitro gift", "the notes of the meeting are here"])
    assert found[0, 0] > found[0, 1]
    assert found[1, 1] > found[1, 0]


def test_a_message_counts_by_its_weight(model: Markov) -> None:
    twice = markov.fit([*TEXTS, *TEXTS], np.concatenate([TARGETS, TARGETS]), np.full(12, 0.5))
    np.testing.assert_allclose(twice.logits(TEXTS), model.logits(TEXTS), atol=0.01)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=900), min_size=1, max_size=5))
def test_an_answer_does_not_depend_on_who_shares_the_batch(texts: list[str]) -> None:
    model = markov.fit(TEXTS, TARGETS, np.ones(6))
    together = model.logits(texts)
    assert np.isfinite(together).all()
    alone = np.concatenate([model.logits([text]) for text in texts])
    np.testing.assert_allclose(together, alone, atol=1e-4)


def test_kind_words_around_a_short_abusive_text_do_not_hide_it(model: Markov) -> None:
    plain, around = model.logits([ABUSE[0], f"{BENIGN[0]} {ABUSE[0]} {BENIGN[1]}"])[:, 0]
    length = np.sqrt([len(ABUSE[0]) + 6, len(ABUSE[0]) + len(BENIGN[0]) + len(BENIGN[1]) + 8])
    assert around * length[1] > 0.8 * plain * length[0]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text("free cards", max_size=20), min_size=1, max_size=4))
def test_the_loudest_passage_is_the_largest_sum_of_neighbours(texts: list[str]) -> None:
    model = markov.fit(TEXTS, TARGETS, np.ones(6))
    read = markov._Read.of(texts)
    ratios = model._ratios(read)[:, 0]
    for i, found in enumerate(model.logits(texts)[:, 0]):
        own = ratios[read.first[i] : read.first[i] + read.size[i]]
        ends = range(len(own) + 1)
        best = max(own[a:b].sum() for a in ends for b in ends if a < b)
        assert found == pytest.approx(best / np.sqrt(len(own) + 3), abs=1e-4)


def test_kind_words_around_a_long_abusive_text_do_not_hide_it(model: Markov) -> None:
    abuse, kind = " ".join(ABUSE * 9), " ".join(BENIGN * 7)
    plain, around = model.logits([abuse, f"{kind} {abuse} {kind}"])[:, 0]
    whole_of_kind = model.logits([f"{kind} {kind} {kind}"])[0, 0]
    assert around == pytest.approx(plain - markov.LEAD, rel=0.15)
    assert whole_of_kind < 0


def test_the_encoder_reads_a_long_message_where_the_abuse_is(model: Markov) -> None:
    abuse, kind = " ".join(ABUSE * 3), " ".join(BENIGN * 7)
    for message in (f"{abuse} {kind}", f"{kind} {abuse} {kind}", f"{kind} {abuse}"):
        (read,) = model.passages(views([message]))
        assert abuse in read.canonical
        assert len(read.canonical) < len(message)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("free cards\u00e9", max_size=1_500), max_size=4))
def test_a_passage_is_of_whole_words_and_the_same_in_any_batch(model: Markov, texts: list[str]) -> None:
    seen = [View(text, 0) for text in texts]
    for message, read in zip(seen, model.passages(seen), strict=True):
        assert model.passages([message]) == [read]
        if len(message.canonical) <= PASSAGE:
            assert read is message
            continue
        assert PASSAGE - 2 * WORD <= len(read.canonical) <= PASSAGE + 2 * WORD
        at = f" {message.canonical} ".find(f" {read.canonical} ")
        halved = max(map(len, message.canonical.split(" "))) > WORD
        assert at >= 0 or (halved and read.canonical in message.canonical)


def test_a_passage_as_it_was_sent_is_about_the_same_part(model: Markov) -> None:
    abuse, kind = " ".join(ABUSE * 6), " ".join(BENIGN * 7)
    disguised = " ".join(".".join(word) for word in abuse.split())
    (message,) = views([f"{kind} {disguised} {kind}"])
    (read,) = model.passages([message])
    assert "f.r.e.e" in read.sent
    assert read.level == message.level
    assert len(read.sent) == pytest.approx(
        len(message.sent) * len(read.canonical) / len(message.canonical), abs=2
    )


def test_it_survives_being_written_down(model: Markov) -> None:
    again = Markov.from_bytes(model.to_bytes())
    np.testing.assert_array_equal(again.logits(TEXTS), model.logits(TEXTS))
    assert model.logits([]).shape == (0, 1)
    assert len(model.to_bytes()) < 100_000


def test_an_answer_is_the_same_among_ten_thousand(model: Markov) -> None:
    together = model.logits(["notes of the usual place", *TEXTS] * 1_500)
    np.testing.assert_allclose(together[-7:], model.logits(["notes of the usual place", *TEXTS]), atol=1e-5)
