"""How well a message's characters are predicted by what abuse says, against how well by what else is said.

One model of the character that follows up to three others for benign messages, and one for each policy, in
the manner of the compression models that filter spam (Bratko et al., Spam Filtering Using Statistical Data
Compression Models, JMLR 7, 2006), smoothed by interpolated absolute discounting (Ney, Essen and Kneser, On
Structuring Probabilistic Dependences in Stochastic Language Modelling, 1994). What it says of a message is
their log likelihood ratio. The linear model looks for what tells the two sides apart, this one knows how each
side writes; they err on different messages.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.tokens import HASH_BASE, MAX_CHARACTERS, PASSAGE, View, into_buckets, passage

Floats = npt.NDArray[np.floating[Any]]
Places = npt.NDArray[np.int64]
Table = npt.NDArray[np.float32]

BITS = (12, 16, 18, 20)
"""Buckets, as powers of two, of the characters that follow none, one, two and three others."""
DISCOUNT = 0.75
"""Taken of every count, for what has not been seen to follow."""
UNSEEN = 1 / 500
"""Probability of a character of which nothing is known."""
WINDOW, LEAD = PASSAGE, 1.0
"""Characters of a stretch of a long text, and by how much the loudest must exceed all else to be heard."""
_DAMPING = 3
"""Characters added to the length: a word or two is little evidence."""
_BEGIN, _END = "\x02", " \x03"
_CONTEXT = np.uint64(0x94D049BB133111EB)


@dataclass(frozen=True)
class _Read:
    """Texts one after the other: the code points, whose each is, and its place there; `first` and `size` of
    each text.
    """

    codes: npt.NDArray[np.uint64]
    text: Places
    place: Places
    first: Places
    size: Places

    @staticmethod
    def of(canonical: Sequence[str]) -> _Read:
        framed = [f"{_BEGIN}{text[:MAX_CHARACTERS]}{_END}" for text in canonical]
        codes = np.frombuffer("".join(framed).encode("utf-32-le", "surrogatepass"), np.uint32)
        size = np.fromiter(map(len, framed), np.int64, len(framed))
        first = np.cumsum(size) - size
        text = np.repeat(np.arange(len(framed)), size)
        return _Read(codes.astype(np.uint64), text, np.arange(len(codes)) - first[text], first, size)

    def orders(self) -> Iterator[tuple[Places, Places, Places]]:
        """For each order: the places with so many characters before them, and the buckets of those characters
        alone and together with the one at the place.
        """
        before = np.zeros(len(self.codes), np.uint64)
        for order, bits in enumerate(BITS):
            at = np.flatnonzero(self.place >= max(order, 1))
            known = before[at]
            together = (known * HASH_BASE + self.codes[at] + np.uint64(1)) * HASH_BASE
            yield at, into_buckets((known + np.uint64(1)) * _CONTEXT, bits), into_buckets(together, bits)
            earlier = np.zeros_like(before)
            earlier[order + 1 :] = self.codes[: max(0, len(before) - order - 1)]
            before = before * HASH_BASE + earlier + np.uint64(7)


@dataclass(frozen=True)
class Heard:
    """What the models make of texts.

    Attributes:
        logits: their answer, log odds [n, policies].
        loudest: where the loudest stretch of each text begins; 0 where it has no more than `WINDOW`
            characters.
    """

    logits: npt.NDArray[np.float32]
    loudest: Places


@dataclass(frozen=True)
class Markov:
    """What each side's writing is like, by order; the columns are benign messages, then the policies.

    Attributes:
        seen: float32 [2**bits, 1 + policies] an order, the discounted probability of a character after
            others; with the precision of float16, as it is saved.
        left: the same of those others, the share that is left for the order below.
    """

    seen: tuple[Table, ...]
    left: tuple[Table, ...]

    @property
    def policies(self) -> int:
        """Columns of the log odds."""
        return self.seen[0].shape[1] - 1

    def passages(self, seen: Sequence[View]) -> list[View]:
        """What the encoder reads of messages: of a long one its loudest stretch."""
        at = np.zeros(len(seen), np.int64)
        long = [i for i, view in enumerate(seen) if len(view.canonical) > WINDOW]
        at[long] = self.hear([seen[i].canonical for i in long]).loudest
        return [passage(view, begin) for view, begin in zip(seen, at.tolist(), strict=True)]

    def logits(self, canonical: Sequence[str]) -> npt.NDArray[np.float32]:
        """Log odds [n, policies] of canonical texts."""
        return self.hear(canonical).logits

    def hear(self, canonical: Sequence[str]) -> Heard:
        """Log likelihood ratio of canonical texts over the root of their length.

        Kind words around the abuse do not hide it: of a text of up to `WINDOW` characters the passage speaks
        whose ratio is largest (as in Page's CUSUM: Continuous Inspection Schemes, Biometrika 41, 1954). In a
        long text some passage always sounds odd: there the whole has as much to say, or it is a loud stretch.
        """
        at = np.zeros(len(canonical), np.int64)
        if not len(canonical):
            return Heard(np.zeros((0, self.policies), np.float32), at)
        read = _Read.of(canonical)
        before = np.concatenate([np.zeros((1, self.policies)), np.cumsum(self._ratios(read), axis=0)])
        whole = before[read.first + read.size] - before[read.first]
        passage = _loudest_passage(before, read)
        found = np.where((read.size > WINDOW)[:, None], (whole + passage) / 2, passage)
        found = _damped(found, read.size)
        long = np.flatnonzero(read.size > WINDOW)
        if len(long):
            number = read.size[long] - WINDOW + 1
            starts = np.cumsum(number) - number
            begin = np.arange(number.sum()) - np.repeat(starts - read.first[long], number)
            stretches = before[begin + WINDOW] - before[begin]
            loudest = np.maximum.reduceat(stretches, starts)
            found[long] = np.maximum(found[long], _damped(loudest, np.full(len(long), WINDOW)) - LEAD)
            at[long] = np.maximum(0, _first_largest(stretches.max(1), starts, number) - len(_BEGIN))
        return Heard(found.astype(np.float32), at)

    def _ratios(self, read: _Read) -> Floats:
        """Log likelihood ratio of each character [characters, policies]."""
        p = np.full((len(read.codes), 1 + self.policies), UNSEEN, np.float32)
        for (at, others, together), seen, left in zip(read.orders(), self.seen, self.left, strict=True):
            p[at] = seen.take(together, 0) + left.take(others, 0) * p.take(at, 0)
        logs = np.log(p)
        # Summed up over a whole batch, where float32 would round by who shares it.
        return np.asarray(logs[:, 1:] - logs[:, :1], np.float64)

    def to_bytes(self) -> bytes:
        """Safetensors; of each table only the buckets of which something is known."""
        from safetensors.numpy import save

        tensors: dict[str, npt.NDArray[Any]] = {}
        for order, tables in enumerate(zip(self.seen, self.left, strict=True)):
            for name, table, unknown in zip(("seen", "left"), tables, (0, 1), strict=True):
                at = np.flatnonzero((table != unknown).any(1))
                tensors[f"{name}.{order}"] = table[at].astype(np.float16)
                tensors[f"{name}.{order}.at"] = at.astype(np.int32)
        return save(tensors)

    @staticmethod
    def from_bytes(data: bytes) -> Markov:
        """The inverse of `to_bytes`."""
        from safetensors.numpy import load

        tensors = load(data)

        def table(name: str, order: int, unknown: float) -> Table:
            values = tensors[f"{name}.{order}"]
            full = np.full((2 ** BITS[order], values.shape[1]), unknown, np.float32)
            full[tensors[f"{name}.{order}.at"]] = values
            return full

        orders = range(len(BITS))
        return Markov(tuple(table("seen", o, 0) for o in orders), tuple(table("left", o, 1) for o in orders))


def _loudest_passage(before: Floats, read: _Read) -> Floats:
    """The largest sum of neighbouring characters of each text [n, policies], given the sums before each."""
    # Far enough below the text before it, each text begins its minimum anew.
    down = read.text[:, None] * (np.ptp(before) + 1.0)
    lowest = np.minimum.accumulate(before[:-1] - down, axis=0) + down
    return np.asarray(np.maximum.reduceat(before[1:] - lowest, read.first))


def _first_largest(values: Floats, first: Places, number: Places) -> Places:
    """Within each lot of neighbours, of so many from `first` on, the place of the largest; of those that
    differ by rounding, the first.
    """
    largest = np.repeat(np.maximum.reduceat(values, first), number)
    hits = np.flatnonzero(values >= largest - 1e-6)
    lot = np.searchsorted(first, hits, side="right") - 1
    return np.asarray(hits[np.searchsorted(lot, np.arange(len(first)))] - first)


def _damped(ratio: Floats, size: Places) -> Floats:
    return np.asarray(ratio / np.sqrt(size + _DAMPING)[:, None])


def fit(canonical: Sequence[str], targets: Floats, weight: Floats) -> Markov:
    """Count what follows what.

    Args:
        canonical: texts [n].
        targets: probabilities [n, policies]; a message counts for the sides that it is more likely of.
        weight: [n].
    """
    abusive = targets.max(1) >= 0.5
    sides = np.column_stack(
        [np.where(abusive, 0.0, 1 - targets.max(1)), np.where(targets >= 0.5, targets, 0.0)]
    )
    sides = sides * weight[:, None]
    read = _Read.of(canonical)
    seen, left = [], []
    for (at, others, together), bits in zip(read.orders(), BITS, strict=True):
        text, after = read.text[at], np.zeros(2**bits, np.int64)
        after[together] = others
        columns = [_counted(together, after, sides[text, side]) for side in range(sides.shape[1])]
        seen.append(np.column_stack([column[0] for column in columns]).astype(np.float16).astype(np.float32))
        left.append(np.column_stack([column[1] for column in columns]).astype(np.float16).astype(np.float32))
    return Markov(tuple(seen), tuple(left))


def _counted(together: Places, after: Places, weight: Floats) -> tuple[Floats, Floats]:
    """Discounted probabilities by bucket of what followed, and what is left by bucket of what it followed."""
    count = np.bincount(together, weight, len(after))
    kept = np.maximum(count - DISCOUNT, 0)
    whole = np.bincount(after, count, len(after))
    some = np.maximum(whole, 1e-9)
    return kept / some[after], np.where(whole > 0, np.bincount(after, count - kept, len(after)) / some, 1.0)
