"""Disturbed copies of messages, afresh each epoch: the encoder learns what is said however it is written.

Belongs here: ways in which messages come disturbed, and which messages of an epoch are. Does not belong here:
attacks that are aimed at a detector (`redqueen.attacks`), which this must not know: what it is judged by is
written apart from what it learns from.

A text is disturbed as it was sent and then read again, so that the model sees of a disturbance what it will
see in production: what canonicalising could not undo, and how much it had to. Benign and abusive messages are
disturbed alike; nothing here knows a label, except that what a message is padded with is benign.
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import numpy.typing as npt

from models.tokens import LEVELS, View, views
from redqueen.text.folding import characters

Disturb = Callable[[str, random.Random], str]
"""A text as it was sent, and where randomness comes from, to the text disturbed (or as it was)."""

RANDOM_LEVEL = 0.05
"""Share of messages that are said to be disguised by chance: the level alone must not decide."""

A_QUARTER = 24
"""A word of padding for so many characters that are read: a quarter of them, and more would push the message
out of view."""


def disturbed(
    read: Sequence[View],
    texts: Sequence[str],
    rows: npt.NDArray[np.int64],
    benign: npt.NDArray[np.int64],
    noise: float,
    padding: float,
    most: int,
    rng: np.random.Generator,
) -> list[View]:
    """The messages `rows` as one epoch sees them.

    Args:
        read: every message as it is.
        texts: every message as it was sent; empty where that is not known, and then the canonical form is
            taken for it.
        rows: the messages of the epoch, in order.
        benign: rows that others may be padded with.
        noise: share of messages that are disturbed in one of the `KINDS`.
        padding: share of messages that get parts of benign ones before or after them.
        most: characters that are read of a message that is changed: reading again takes time.
        rng: decides everything.
    """
    draws = rng.random((len(rows), 3))
    pick = random.Random(int(rng.integers(2**63)))
    sent = texts or [view.sent or view.canonical for view in read]
    kinds = list(KINDS.values())
    seen = [read[row] for row in rows]
    changed: dict[int, str] = {}
    for place, row in enumerate(rows):
        text = _stretch(sent[row], most, pick)
        if kinds and draws[place, 0] < noise:
            changed[place] = text = pick.choice(kinds)(text, pick)
        if draws[place, 1] < padding and len(benign):
            changed[place] = padded(text, sent[benign[pick.randrange(len(benign))]], most // A_QUARTER, pick)
    for place, view in zip(changed, views(list(changed.values())), strict=True):
        seen[place] = view
    for place in np.flatnonzero(draws[:, 2] < RANDOM_LEVEL).tolist():
        seen[place] = seen[place]._replace(level=pick.randrange(LEVELS))
    return seen


def _stretch(text: str, most: int, pick: random.Random) -> str:
    """Some part of a long text, as long as a reader takes at once."""
    start = pick.randrange(max(1, len(text) - most + 1))
    return text[start : start + most]


# -- kinds ---------------------------------------------------------------------------------------------------

_WORD = re.compile(r"\S+")
_LINK_DOT = re.compile(r"(?<=\w)\.(?=[a-zA-Z]{2})")
_KEYS = "abcdefghijklmnopqrstuvwxyz0123456789"
_UNSEEN = "\u200b\u2060\u2063\u00ad\u200e\ufeff"
_LEET = dict(zip("abeilostz", ("4@", "8", "3", "1!", "1", "0", "5$", "7", "2"), strict=True))
_MARKS = "\u0300\u0301\u0302\u0308\u0327"


def misspelt(words: str, pick: random.Random, share: float) -> str:
    """`words` with about `share` of its characters dropped, doubled, swapped, replaced or split off."""
    letters = list(words)
    for _ in range(max(1, int(len(letters) * share))):
        if len(letters) < 3:
            break
        at = pick.randrange(len(letters) - 1)
        match pick.randrange(5):
            case 0:
                del letters[at]
            case 1:
                letters.insert(at, letters[at])
            case 2:
                letters[at], letters[at + 1] = letters[at + 1], letters[at]
            case 3:
                letters[at] = pick.choice(_KEYS)
            case _:
                letters.insert(at, pick.choice(" .-_"))
    return "".join(letters)


def padded(text: str, benign: str, most: int, pick: random.Random) -> str:
    """The text with `most` words of a benign one before or after it, or some at both ends."""
    words = benign.split()
    start = pick.randrange(max(1, len(words) - most // 2))
    words = words[start : start + most]
    cut = pick.choice((0, len(words), pick.randint(0, len(words))))
    parts = (" ".join(words[:cut]), text, " ".join(words[cut:]))
    return pick.choice(("\n", " ")).join(part for part in parts if part)


OTHERS = 3
"""Benign messages whose words `among` takes: one may be shorter than the message that it is put around."""


def among(benign: Sequence[str], text: str, pick: random.Random) -> str:
    """The text with about as many benign words as it has itself before it, after it, or on both sides."""
    return padded(text, " ".join(benign), max(3, len(text.split())), pick)


def _slips(text: str, pick: random.Random) -> str:
    return misspelt(text, pick, pick.uniform(0.03, 0.15))


def _lost_and_doubled(text: str, pick: random.Random) -> str:
    share = pick.uniform(0.05, 0.3)
    kept: list[str] = []
    for word in text.split():
        if pick.random() >= share:
            kept.append(word)
        elif pick.random() < 0.4:
            kept += (word, word)
    return " ".join(kept) or text


def _capitals(text: str, pick: random.Random) -> str:
    share = pick.uniform(0.1, 0.6)
    return "".join(c.swapcase() if pick.random() < share else c for c in text)


def _cloaked_links(text: str, pick: random.Random) -> str:
    dot = pick.choice(("[.]", "(.)", " dot ", "{dot}", " . ", ".\u200b"))
    return _LINK_DOT.sub(dot, text).replace("http", pick.choice(("http", "hxxp")))


def _in_words(rewrite: Disturb) -> Disturb:
    """Rewrites a share of the words, from a tenth to most of them."""

    def disturb(text: str, pick: random.Random) -> str:
        share = pick.uniform(0.1, 0.7)
        return _WORD.sub(lambda m: rewrite(m[0], pick) if pick.random() < share else m[0], text)

    return disturb


def _alike(word: str, pick: random.Random) -> str:
    """Letters that look the same, or carry a mark."""
    table = _look_alikes()
    return "".join(pick.choice(table[c]) if c in table and pick.random() < 0.4 else c for c in word)


@cache
def _look_alikes() -> Mapping[str, Sequence[str]]:
    """By letter: what Unicode lists as confusable with it, and the letter with marks that compose."""
    found: dict[str, list[str]] = {}
    for code, letter in characters().mixed.items():
        found.setdefault(letter, []).append(chr(code))
    for letter in "abcdefghijklmnopqrstuvwxyz":
        composed = (unicodedata.normalize("NFC", letter + mark) for mark in _MARKS)
        found.setdefault(letter, []).extend(c for c in composed if len(c) == 1)
    return {letter: tuple(others) for letter, others in found.items() if others}


def _unseen(word: str, pick: random.Random) -> str:
    for _ in range(pick.randint(1, 3)):
        at = pick.randint(0, len(word))
        word = word[:at] + pick.choice(_UNSEEN) + word[at:]
    return word


def _leet(word: str, pick: random.Random) -> str:
    share = pick.choice((0.3, 1.0))
    return "".join(
        pick.choice(_LEET[c]) if (c := letter.lower()) in _LEET and pick.random() < share else letter
        for letter in word
    )


def _parted(word: str, pick: random.Random) -> str:
    """A separator between all letters, or at one or two places."""
    separator = pick.choice((" ", ".", "-", "_", "*", "/"))
    if pick.random() < 0.4:
        return separator.join(word)
    for _ in range(min(2, len(word) - 1)):
        at = pick.randint(1, len(word) - 1)
        word = word[:at] + separator + word[at:]
    return word


KINDS: dict[str, Disturb] = {
    "typo": _slips,
    "words": _lost_and_doubled,
    "case": _capitals,
    "url": _cloaked_links,
    "homoglyph": _in_words(_alike),
    "invisible": _in_words(_unseen),
    "leet": _in_words(_leet),
    "spacing": _in_words(_parted),
}
"""In which of these ways a message is disturbed is drawn evenly. Padding is apart: it comes on top."""
