"""The linear baseline: hashed character n-grams and words, logistic regression. No learning library, no
pickle.

It trains beside the deep model and is served in its place when it is as good; it is also one of the voices
that `models.fusion` weighs. Hashing is plain array arithmetic over the whole batch: about 10 us a message.

A mean over a message can be diluted: enough kind words, and the abuse among them is a detail. So a text is
hashed in pieces, and of a long one the loudest stretches speak beside the whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from models.tokens import HASH_BASE, MAX_CHARACTERS, into_buckets

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.int64]
Places = npt.NDArray[np.int64]

BITS = 18
GRAMS = (2, 3, 4, 5)
LEAST_MESSAGES = 2
PIECE = 64
"""Characters of a piece, about a dozen words: a short lure and little else."""
STRETCHES = ((3, 0.2), (8, 0.4))
"""Pieces of a stretch, and how much the loudest of them has to say of a longer text; the rest is for the
whole. A long text has many stretches, and the loudest of a benign one is loud by chance: it speaks beside the
whole, not in its place."""
BURIED = ((4, 3.0), (8, 0.5))
"""Pieces of a stretch, and by how much its log odds must exceed all that for it to speak alone: abuse between
benign words. The shorter the stretches, the odder is the oddest of a benign text."""
LEARNT_STRETCH = 6
"""Pieces of the stretches that are learnt from, a few sentences. A text of more pieces is long."""
_PIECES = re.compile(rf".{{1,{PIECE}}}(?:\s|$)|.{{1,{PIECE}}}", re.DOTALL)
_BASE_INVERSE = np.uint64(pow(int(HASH_BASE), -1, 2**64))
_WORD, _PAIR = np.uint64(0x517CC1B727220A95), np.uint64(0x2545F4914F6CDD1D)


def buckets(texts: Sequence[str], bits: int = BITS) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The hashed n-grams, words and word pairs of every text: (row, bucket), one entry an occurrence."""
    padded = [f" {t[:MAX_CHARACTERS]} " for t in texts]
    chars = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    rows = np.repeat(np.arange(len(texts)), [len(p) for p in padded])
    found = [*_grams(chars, rows), *_words(chars, rows)]
    return np.concatenate([r for r, _ in found]), np.concatenate([into_buckets(h, bits) for _, h in found])


def _grams(
    chars: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]]:
    """Character n-grams within a row; n is part of the hash by way of its length."""
    hashes, found = chars + np.uint64(1), []
    for n in range(2, max(GRAMS) + 1):
        hashes = hashes[:-1] * HASH_BASE + chars[n - 1 :] + np.uint64(1)
        inside = rows[: len(hashes)] == rows[n - 1 :]
        if n in GRAMS:
            found.append((rows[: len(hashes)][inside], hashes[inside]))
    return found


def _words(
    chars: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]]:
    """Words and pairs of neighbours, by a prefix sum of powers: any span's hash is one subtraction."""
    solid = (chars != 32).astype(np.int8)
    edges = np.diff(solid, prepend=np.int8(0), append=np.int8(0))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    powers = np.cumprod(np.full(len(chars), HASH_BASE, np.uint64), dtype=np.uint64)
    inverse = np.cumprod(np.full(len(chars), _BASE_INVERSE, np.uint64), dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(chars * powers, dtype=np.uint64)])
    words = (sums[ends] - sums[starts]) * inverse[starts]
    pairs = words[:-1] * _PAIR + words[1:]
    together = rows[starts[:-1]] == rows[starts[1:]]
    return [(rows[starts], words * _WORD), (rows[starts[:-1]][together], pairs[together])]


@dataclass(frozen=True)
class Heard:
    """What a linear model makes of texts, as log odds [n, policies].

    Attributes:
        logits: its answer.
        loudest: the loudest part of each text: a piece, two neighbours, or the whole. Words before or after
            the abuse do not dilute it, though they move where a piece begins.
    """

    logits: Floats
    loudest: Floats


@dataclass(frozen=True)
class Linear:
    """A trained baseline.

    Attributes:
        weights: float32 [2**BITS, policies], inverse document frequency folded in.
        scale: float32 [2**BITS], squared inverse document frequency; its sum over a text normalises the text.
        bias: float32 [policies].
    """

    weights: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]
    bias: npt.NDArray[np.float32]

    def logits(self, canonical: Sequence[str]) -> npt.NDArray[np.float32]:
        """Log odds [n, policies] of canonical texts."""
        return np.asarray(self.hear(canonical).logits, np.float32)

    def hear(self, canonical: Sequence[str]) -> Heard:
        """All that it says of canonical texts, hashed once."""
        if not len(canonical):
            nothing = np.zeros((0, len(self.bias)), np.float32)
            return Heard(nothing, nothing)
        pieces, first, last = _cut(canonical)
        # An older bundle may hash into fewer buckets: its own size says how many.
        row, bucket = buckets(pieces, len(self.weights).bit_length() - 1)
        size = last - first
        begin, end = np.repeat(first, size), np.repeat(last, size)
        before = np.concatenate(
            [np.zeros((1, 1 + len(self.bias))), np.cumsum(self._sums(row, bucket, len(pieces)), 0)]
        )

        @cache
        def loudest(width: int) -> Floats:
            """Of the stretches of so many pieces, or of the whole where it has no more."""
            at = np.maximum(begin, np.minimum(np.arange(len(pieces)), end - width))
            found = self._odds(before[np.minimum(at + width, end)] - before[at])
            return np.asarray(np.maximum.reduceat(found, first))

        whole = self._whole(np.repeat(np.arange(len(canonical)), size)[row], bucket, len(canonical))
        logits = _weighed(whole, loudest, size)
        return Heard(logits, np.maximum(np.maximum(loudest(1), loudest(2)), whole))

    def _whole(self, text: Places, bucket: Places, number: int) -> Floats:
        """Log odds of whole texts, in which the second occurrence of an n-gram counts less than the first."""
        bits = len(self.weights).bit_length() - 1
        # Half as wide a key is sorted twice as fast.
        keys = np.sort(((text << bits) | bucket).astype(np.uint32 if number << bits < 2**32 else np.uint64))
        starts = np.flatnonzero(np.concatenate([[True], keys[1:] != keys[:-1]]))
        damped = 1 + np.log(np.diff(starts, append=len(keys)))
        distinct = keys[starts].astype(np.int64)
        found = self._columns.take(distinct & (len(self.weights) - 1), 0)
        found[:, 0] *= damped**2
        found[:, 1:] *= damped[:, None]
        # No text is without n-grams: its edges are one.
        first = np.searchsorted(distinct, np.arange(number) << bits)
        return self._odds(np.add.reduceat(found, first, axis=0, dtype=np.float64))

    def _sums(self, row: Places, bucket: Places, number: int) -> Floats:
        """What norm and log odds are made of [number, 1 + policies]."""
        found = self._columns.take(bucket, 0)
        return np.stack([np.bincount(row, column, number) for column in found.T], axis=1)

    @cached_property
    def _columns(self) -> npt.NDArray[np.float32]:
        """Scale and weights side by side [2**BITS, 1 + policies]: one look into memory an n-gram, not two."""
        return np.column_stack([self.scale, self.weights])

    def _odds(self, sums: Floats) -> Floats:
        return np.asarray(sums[:, 1:] / np.sqrt(sums[:, :1] + 1e-6) + self.bias)

    def to_bytes(self) -> bytes:
        """Safetensors."""
        from safetensors.numpy import save

        return save({"weights": self.weights, "scale": self.scale, "bias": self.bias})

    @staticmethod
    def from_bytes(data: bytes) -> Linear:
        """The inverse of `to_bytes`."""
        from safetensors.numpy import load

        tensors = load(data)
        return Linear(tensors["weights"], tensors["scale"], tensors["bias"])


def _weighed(whole: Floats, loudest: Callable[[int], Floats], size: Places) -> Floats:
    """What is said of texts of so many pieces: the loudest stretches beside the whole, or one alone."""
    logits = whole
    for width, share in STRETCHES:
        long = (size > width)[:, None]
        if long.any():
            logits = np.where(long, logits + share * np.maximum(0, loudest(width) - whole), logits)
    for width, lead in BURIED:
        long = (size > width)[:, None]
        if long.any():
            logits = np.where(long, np.maximum(logits, loudest(width) - lead), logits)
    return logits


def _cut(canonical: Sequence[str]) -> tuple[list[str], Places, Places]:
    """The pieces of all texts, one after the other, and where those of each text begin and end."""
    found = [_PIECES.findall(text[:MAX_CHARACTERS]) or [""] for text in canonical]
    last = np.cumsum([len(pieces) for pieces in found])
    first = np.concatenate([[0], last[:-1]])
    return [piece for pieces in found for piece in pieces], first, last


@dataclass(frozen=True)
class Design:
    """Hashed texts ready to fit on, as CSR matrices of plain occurrences, normalised later.

    Attributes:
        counts: [n, 2**BITS], of the texts.
        stretches: [s, 2**BITS], of the stretches of the long ones, one after the other.
        owner: int64 [s], whose stretch it is.
    """

    counts: Any
    stretches: Any
    owner: Places

    @staticmethod
    def of(canonical: Sequence[str]) -> Design:
        """Hash once; all fits of a training run take their rows from it."""
        from scipy.sparse import csr_matrix

        pieces, first, last = _cut(canonical)
        rows, found = buckets(pieces)
        ones = np.ones(len(rows), np.float32)
        by_piece = csr_matrix((ones, (rows, found)), shape=(len(pieces), 2**BITS), dtype=np.float32)

        def joined(begin: Places, end: Places) -> Any:
            """The sums of the pieces from `begin` to before `end`."""
            ends = np.concatenate([[0], np.cumsum(end - begin)])
            places = np.arange(ends[-1]) - np.repeat(ends[:-1] - begin, end - begin)
            ones = np.ones(len(places), np.float32)
            return csr_matrix((ones, places, ends), shape=(len(begin), len(pieces))) @ by_piece

        # As many as fit, the last to the very end: a short rest of a text would be learnt as if it were one.
        long = np.flatnonzero(last - first > LEARNT_STRETCH)
        number = -(-(last - first)[long] // LEARNT_STRETCH)
        owner = np.repeat(long, number)
        nth = np.arange(len(owner)) - np.repeat(np.cumsum(number) - number, number)
        begin = first[owner] + nth * ((last - first)[owner] - LEARNT_STRETCH) // np.repeat(number - 1, number)
        return Design(joined(first, last), joined(begin, begin + LEARNT_STRETCH), owner)


def fit(
    design: Design,
    rows: Rows,
    targets: Floats,
    weight: Floats,
    *,
    counted: int | None = None,
    start: Linear | None = None,
    strength: float = 60.0,
    iterations: int = 40,
) -> Linear:
    """Weighted logistic regression on soft targets, all policies at once, by L-BFGS.

    Args:
        design: hashed texts; the stretches of the long ones are learnt from as well.
        rows: the rows of `design` to fit on.
        targets: probabilities [len(rows), policies].
        weight: [len(rows)].
        counted: so many of the first `rows` make the document frequencies; None is all of them. Copies and
            parts of texts say nothing of how many texts contain a thing.
        start: where to begin; a second fit on more rows then takes a few steps.
        strength: inverse of the L2 penalty, as scikit-learn's `C`.
    """
    from scipy.optimize import minimize
    from scipy.sparse import diags_array, vstack

    counts = design.counts[rows]
    documents = len(rows) if counted is None else counted
    document = np.bincount(counts[:documents].indices, minlength=2**BITS)
    # What one message alone contains says nothing of the next, and would take most of the norm.
    idf = np.where(document >= LEAST_MESSAGES, np.log((1 + documents) / (1 + document)) + 1, 0.0)
    idf = idf.astype(np.float32)
    stretches, of = _stretches(design, rows)
    # The stretches of a text say much the same: together they weigh the root of their number.
    weight = np.concatenate([weight, weight[of] / np.sqrt(np.bincount(of)[of])])
    targets = np.concatenate([targets, targets[of]])
    # A whole text repeats itself: the second occurrence counts less than the first (sublinear tf).
    counts.data = 1 + np.log(counts.data)
    square = np.concatenate([counts.power(2) @ idf**2, stretches @ idf**2])
    seen = np.flatnonzero(idf)
    x = diags_array(1 / np.sqrt(square + 1e-6)) @ vstack([counts, stretches], format="csr") @ diags_array(idf)
    x = x.tocsc()[:, seen].tocsr().astype(np.float32)
    x_t = x.T.tocsr()
    n_policies = targets.shape[1]
    w = (weight * strength)[:, None].astype(np.float32)
    y = targets.astype(np.float32)

    def loss(flat: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        theta = flat.reshape(-1, n_policies)
        z = x @ theta[:-1].astype(np.float32) + theta[-1].astype(np.float32)
        error = w * (1 / (1 + np.exp(-np.clip(z, -30, 30))) - y)
        value = float((w * (np.logaddexp(0, z) - y * z)).sum(dtype=np.float64)) + 0.5 * float(
            (theta[:-1] ** 2).sum()
        )
        gradient = np.vstack([x_t @ error + theta[:-1], error.sum(0, keepdims=True)])
        return value, gradient.astype(np.float64).ravel()

    first = np.zeros((len(seen) + 1, n_policies))
    if start is not None:
        first[:-1] = start.weights[seen] / idf[seen, None]
        first[-1] = start.bias
    best = minimize(
        loss, first.ravel(), jac=True, method="L-BFGS-B", options={"maxiter": iterations, "maxcor": 6}
    )
    theta = best.x.reshape(-1, n_policies)
    weights = np.zeros((2**BITS, n_policies), np.float32)
    weights[seen] = theta[:-1] * idf[seen, None]
    return Linear(weights, idf**2, theta[-1].astype(np.float32))


def _stretches(design: Design, rows: Rows) -> tuple[Any, Places]:
    """The stretches of some rows, and whose each is, as a place in `rows`."""
    place = np.full(design.counts.shape[0], -1)
    place[rows] = np.arange(len(rows))
    theirs = np.flatnonzero(place[design.owner] >= 0)
    return design.stretches[theirs], place[design.owner[theirs]]
