"""From messages to what the encoder reads, the same in training and in serving. No torch here.

A message is read twice: in its canonical form, which says what was meant, and, where that had been disguised,
as it was sent. Two readers turn it into sequences: `Words` for the compact encoder (characters by word, no
vocabulary that could go stale), `Pieces` around the tokenizer of a pretrained one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from redqueen import text

LEVEL_EDGES = (0.0, 0.04, 0.15)
"""Share of characters changed by canonicalising: none, a few, many, most."""
LEVELS = len(LEVEL_EDGES) + 1

MAX_CHARACTERS = 2_000
"""A message is read up to here; beyond it a longer text only costs time."""

Feeds = dict[str, npt.NDArray[Any]]
"""The network's inputs of a batch, by name."""


@dataclass(frozen=True)
class View:
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
    cut = [message[:MAX_CHARACTERS] for message in messages]
    found = text.read_many(cut)
    levels = np.searchsorted(LEVEL_EDGES, [reading.obfuscation for reading in found], side="left")
    return [
        View(reading.canonical, int(level), sent if level else "")
        for sent, reading, level in zip(cut, found, levels, strict=True)
    ]


class Reader(Protocol):
    """Turns messages into sequences, and a batch of sequences into the network's inputs."""

    def sequences(self, messages: Sequence[View]) -> list[Any]:
        """A sequence a message; `len` is its length, at least 1."""
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
    """A message as words, and what kind each is; the first is its mark and has no characters."""

    words: tuple[str, ...]
    kinds: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.words)


@dataclass(frozen=True)
class Words:
    """Characters by word. A message takes at most `most` places, its mark included."""

    most: int

    def sequences(self, messages: Sequence[View]) -> list[Line]:
        return [self._line(message) for message in messages]

    def _line(self, message: View) -> Line:
        canonical, sent = _words(message.canonical), _words(message.sent)
        room = self.most - 1
        # Half of the places for each, and what one does not need is the other's.
        for_sent = min(len(sent), max(room // 2, room - len(canonical)))
        canonical, sent = _ends(canonical, room - for_sent), _ends(sent, for_sent)
        kinds = (MARK + message.level, *(CANONICAL,) * len(canonical), *(SENT,) * len(sent))
        return Line(("", *canonical, *sent), kinds)

    def padded(self, batch: Sequence[Line]) -> Feeds:
        """`short` uint8 [u, SHORT, 3] and `long` uint8 [v, WORD, 3], the code points of each distinct word in
        three bytes, the empty word first in both; `places` int64 [n, longest], the word at each place, the
        long ones counted on after the short; `kinds` int64 [n, longest], 0 in padding.
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
        return {"short": _codes(short, SHORT), "long": _codes(long, WORD), "places": places, "kinds": kinds}

    def to_bytes(self) -> bytes:
        return json.dumps({"reader": "words", "most": self.most}).encode()


def _words(message: str) -> list[str]:
    return _WORDS.findall(message)


def _codes(words: Iterable[str], size: int) -> npt.NDArray[np.uint8]:
    filled = "".join(word.ljust(size, "\0") for word in words)
    codes = np.frombuffer(filled.encode("utf-32-le", "surrogatepass"), np.uint8)
    return np.ascontiguousarray(codes.reshape(-1, size, 4)[:, :, :3])


# -- a pretrained encoder's reader ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Pieces:
    """A pretrained encoder's own tokenizer; it reads the canonical form."""

    tokenizer: Any
    most: int
    pad_id: int

    def sequences(self, messages: Sequence[View]) -> list[list[int]]:
        encodings = self.tokenizer.encode_batch_fast([message.canonical for message in messages])
        # What frames a text is at its ends, and stays there.
        return [_ends(encoding.ids, self.most) or [self.pad_id] for encoding in encodings]

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


def _ends(items: list[_T], room: int) -> list[_T]:
    """The beginning and the end of a long message: benign words put before the abuse do not push it out."""
    if len(items) <= room:
        return items
    head = room * 2 // 3
    return items[:head] + items[len(items) - (room - head) :]


def length_buckets(lengths: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows in batches of at most `size` of similar length, so that little is padded."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]
