"""From messages to what the encoder reads, the same in training and in serving. No torch here.

A message is read twice: in its canonical form, which says what was meant, and, where that had been disguised,
as it was sent. Two readers turn it into sequences: `Words` for the compact encoder (characters by word, no
vocabulary that could go stale), `Pieces` around the tokenizer of a pretrained one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from redqueen import text

LEVEL_EDGES = (0.0, 0.04, 0.15)
"""Share of characters changed by canonicalising: none, a few, many, most."""
LEVELS = len(LEVEL_EDGES) + 1

MAX_CHARACTERS = 2_000
"""Of a longer message the beginning and the end are read, together so many characters. They are counted once
all that says nothing is gone: blanks, and what cannot be seen, would push the rest out of view."""
HEAD = MAX_CHARACTERS * 2 // 3

MOST_PARTS = 8
"""Of more parts the encoder reads the first and the last ones. Ordinary text has four in `PASSAGE`
characters, and up to eleven in `MAX_CHARACTERS`, from which it learns."""
MOST_SENT = 4
"""So many times as many parts as its words ask for may a message have for the way that they were sent."""
PASSAGE = 640
"""Characters that the encoder reads of a longer message, where the Markov models find it loudest. In a mean
over all of it abuse drowns among benign words, and of many parts the loudest of a benign one is loud by
chance."""
LOUDEST = 0.4
"""How much the loudest part of what is read counts; the rest is the mean of all its parts."""

Feeds = dict[str, npt.NDArray[Any]]
"""The network's inputs of a batch, by name."""

HASH_BASE = np.uint64(0x9E3779B97F4A7C15)
"""Of the polynomial hashes of characters that stand next to each other, in all parts."""


def into_buckets(hashes: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.int64]:
    """Which of 2**bits buckets each hash falls into, whatever its low bits look like (splitmix64)."""
    mixed = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(64 - bits)).astype(np.int64)


class View(NamedTuple):
    """A message as models read it: its canonical form, how much was changed to get there (0 to 3), and, where
    anything was, the text as it was sent.
    """

    canonical: str
    level: int
    sent: str = ""


def view(message: str) -> View:
    """One message as models read it."""
    return views([message])[0]


def views(messages: Sequence[str]) -> list[View]:
    """Many messages at once, several times as fast."""
    found = text.read_many(messages)
    levels = np.searchsorted(LEVEL_EDGES, [reading.obfuscation for reading in found], side="left")
    return [
        View(_ends_of(reading.canonical), level, _ends_of(sent) if level else "")
        for sent, reading, level in zip(messages, found, levels.tolist(), strict=True)
    ]


def _ends_of(message: str) -> str:
    """The beginning and the end of what is too long."""
    if len(message) <= MAX_CHARACTERS:
        return message
    return f"{message[:HEAD]} {message[len(message) - (MAX_CHARACTERS - HEAD - 1) :]}"


def passage(message: View, begin: int) -> View:
    """The `PASSAGE` characters of a longer message that begin at `begin`, in whole words, and about the same
    part of the text as it was sent.
    """
    canonical, sent = message.canonical, message.sent
    if len(canonical) <= PASSAGE:
        return message
    start = canonical.rfind(" ", max(0, begin - WORD), begin + 1) + 1 or begin
    stop = canonical.find(" ", begin + PASSAGE, begin + PASSAGE + WORD)
    stop = begin + PASSAGE if stop < 0 else stop
    first, last = (len(sent) * place // len(canonical) for place in (start, stop))
    return View(canonical[start:stop], message.level, sent[first:last])


class Reader(Protocol):
    """Turns messages into sequences, and a batch of sequences into the network's inputs."""

    def parts(self, messages: Sequence[View]) -> list[list[Any]]:
        """The sequences of each message, one for most, several for a long one; `len` is a sequence's length,
        at least 1.
        """
        ...

    def padded(self, batch: Sequence[Any]) -> Feeds:
        """The inputs of the network for these sequences."""
        ...

    def to_bytes(self) -> bytes:
        """All that `load_reader` needs."""
        ...


# -- the compact encoder's reader ----------------------------------------------------------------------------

WORD = 16
"""Characters of a word (as in RETVec: Bursztein et al., NeurIPS 2023); a longer one is read in pieces."""
SHORT = 8
"""Most words are no longer, and cost half as much to read."""
_WORDS = re.compile(rf"[^\W_]{{1,{WORD}}}|(?:(?!\s)[\W_]){{1,4}}")
MARK, CANONICAL, SENT = 1, 1 + LEVELS, 2 + LEVELS
KINDS = SENT + 1
"""Kinds of places: padding, how much was changed (one a level), a word of the canonical form, one as sent."""


@dataclass(frozen=True)
class Line:
    """Words of a message, and what kind each is; the first is its mark and has no characters."""

    words: tuple[str, ...]
    kinds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class Words:
    """Characters by word, at most `most` places a part, its mark included."""

    most: int

    def parts(self, messages: Sequence[View]) -> list[list[Line]]:
        return [self._lines(message) for message in messages]

    def _lines(self, message: View) -> list[Line]:
        canonical, sent = _words(message.canonical), _words(message.sent)
        room = self.most - 1
        if len(canonical) + len(sent) > room and sent:
            room //= 2
        meant_parts = max(1, -(-len(canonical) // room))
        # What was put between the letters must not push the words apart, and out of what is read.
        number = max(meant_parts, min(-(-len(sent) // room), MOST_SENT * meant_parts, MOST_PARTS))
        pairs = zip(_evenly(canonical, number), _evenly(sent, number), strict=True)
        lines = [
            Line(
                ("", *meant, *raw[:room]),
                (MARK + message.level, *(CANONICAL,) * len(meant), *(SENT,) * len(raw[:room])),
            )
            for meant, raw in pairs
        ]
        return _ends(lines, MOST_PARTS)

    def padded(self, batch: Sequence[Line]) -> Feeds:
        """`short` uint8 [u, SHORT, 3] and `long` uint8 [v, WORD, 3], the code points of each distinct word in
        three bytes, the empty word first in both; `short_grams` and `long_grams`, their `n_grams`; `places`
        int64 [n, longest], the word at each place, the long ones counted on after the short; `kinds` int64
        [n, longest], 0 in padding.
        """
        shape = len(batch), max(map(len, batch))
        places, kinds = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        short, long = {"": 0}, {"": 0}
        for row, line in enumerate(batch):
            places[row, : len(line)] = [
                short.setdefault(word, len(short))
                if len(word) <= SHORT
                else ~long.setdefault(word, len(long))
                for word in line.words
            ]
            kinds[row, : len(line)] = line.kinds
        places = np.where(places < 0, len(short) + ~places, places)
        few, many = _codes(short, SHORT), _codes(long, WORD)
        grams = {"short_grams": n_grams(few), "long_grams": n_grams(many)}
        return {"short": few, "long": many, **grams, "places": places, "kinds": kinds}

    def to_bytes(self) -> bytes:
        return json.dumps({"reader": "words", "most": self.most}).encode()


def _words(message: str) -> list[str]:
    return _WORDS.findall(message)


def _codes(words: Iterable[str], size: int) -> npt.NDArray[np.uint8]:
    filled = "".join(word.ljust(size, "\0") for word in words)
    codes = np.frombuffer(filled.encode("utf-32-le", "surrogatepass"), np.uint8)
    return np.ascontiguousarray(codes.reshape(-1, size, 4)[:, :, :3])


GRAMS, GRAM_BITS = (2, 3, 4), 15
"""Lengths of the n-grams of a word that have vectors of their own, and how many share them, as a power of 2.
"""
_BEGIN, _END = 2, 3


def n_grams(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Buckets, from 1 on, of the n-grams of words between their edges: int64 [u, all there could be]; 0 where
    a word is shorter.

    Args:
        codes: code points of words, uint8 [u, size, 3].
    """
    points = codes.astype(np.uint64) @ np.array([1, 1 << 8, 1 << 16], np.uint64)
    length = (points > 0).sum(1)
    line = np.pad(points, ((0, 0), (1, 1)))
    line[:, 0] = _BEGIN
    line[np.arange(len(line)), length + 1] = _END
    line[length == 0] = 0
    hashes, found = line, []
    for n in range(2, max(GRAMS) + 1):
        hashes = hashes[:, :-1] * HASH_BASE + line[:, n - 1 :] + np.uint64(1)
        if n in GRAMS:
            found.append(np.where(line[:, n - 1 :] > 0, 1 + into_buckets(hashes, GRAM_BITS), 0))
    return np.concatenate(found, axis=1)


# -- a pretrained encoder's reader ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """A pretrained encoder's own tokenizer; it reads the canonical form."""

    tokenizer: Any
    most: int
    pad_id: int

    def parts(self, messages: Sequence[View]) -> list[list[list[int]]]:
        encodings = self.tokenizer.encode_batch_fast([message.canonical for message in messages])
        return [self._framed(encoding.ids, encoding.special_tokens_mask) for encoding in encodings]

    def _framed(self, ids: list[int], special: list[int]) -> list[list[int]]:
        """What frames the text frames each part of it."""
        text = [place for place, mark in enumerate(special) if not mark]
        first, last = (text[0], text[-1] + 1) if text else (len(ids), len(ids))
        before, within, after = ids[:first], ids[first:last], ids[last:]
        room = max(1, self.most - len(before) - len(after))
        found = _evenly(within, max(1, -(-len(within) // room)))
        return _ends([[*before, *part, *after] or [self.pad_id] for part in found], MOST_PARTS)

    def padded(self, batch: Sequence[list[int]]) -> Feeds:
        """`ids` and `mask`, int64 [n, longest]."""
        lengths = np.fromiter((len(ids) for ids in batch), np.int64, len(batch))
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        ids = np.full(mask.shape, self.pad_id, np.int64)
        ids[mask.astype(bool)] = np.concatenate([np.asarray(b, np.int64) for b in batch])
        return {"ids": ids, "mask": mask}

    def to_bytes(self) -> bytes:
        body = {"reader": "pieces", "most": self.most, "pad_id": self.pad_id}
        return json.dumps(body | {"tokenizer": json.loads(self.tokenizer.to_str())}).encode()


def load_reader(data: bytes) -> Reader:
    """The inverse of `to_bytes`."""
    body = json.loads(data)
    if body["reader"] == "words":
        return Words(int(body["most"]))
    from tokenizers import Tokenizer

    return Pieces(Tokenizer.from_str(json.dumps(body["tokenizer"])), int(body["most"]), int(body["pad_id"]))


_T = TypeVar("_T")

# -- both ----------------------------------------------------------------------------------------------------


def log_odds(
    reader: Reader,
    messages: Sequence[View],
    run: Callable[[Feeds], npt.NDArray[np.float32]],
    policies: int,
    batch: int,
) -> npt.NDArray[np.float32]:
    """Log odds [n, policies] of messages by a network that `run` asks about one batch of parts.

    Of a message in several parts the loudest speaks beside the mean of all: kind words before, after or
    around the abuse do not dilute it.
    """
    parts = reader.parts(messages)
    sequences = [sequence for found in parts for sequence in found]
    z = np.zeros((len(sequences), policies), np.float32)
    lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
    for rows in length_buckets(lengths, batch):
        z[rows] = run(reader.padded([sequences[i] for i in rows]))
    number = np.fromiter((len(found) for found in parts), np.int64, len(parts))
    if len(z) == len(parts):
        return z
    first = np.cumsum(number) - number
    mean = np.add.reduceat(z, first) / number[:, None].astype(np.float32)
    return np.asarray(mean + LOUDEST * (np.maximum.reduceat(z, first) - mean), np.float32)


def _evenly(items: list[_T], number: int) -> list[list[_T]]:
    """So many neighbouring lots of nearly the same size."""
    ends = [len(items) * i // number for i in range(number + 1)]
    return [items[a:b] for a, b in pairwise(ends)]


def _ends(items: list[_T], room: int) -> list[_T]:
    """The beginning and the end of what is too much."""
    if len(items) <= room:
        return items
    head = room * 2 // 3
    return items[:head] + items[len(items) - (room - head) :]


def length_buckets(lengths: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows in batches of at most `size` of similar length, so that little is padded."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]
