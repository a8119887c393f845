"""The linear baseline: hashed character n-grams and words, logistic regression. No learning library, no
pickle.

It trains beside the deep model and is served in its place when it is as good; it is also one of the voices
that `models.fusion` weighs. Hashing is plain array arithmetic over the whole batch: about 10 us a message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from models.tokens import MAX_CHARACTERS

Floats = npt.NDArray[np.floating[Any]]

BITS = 18
GRAMS = (2, 3, 4, 5)
LEAST_MESSAGES = 2
_BASE = np.uint64(0x9E3779B97F4A7C15)
_BASE_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 2**64))
_WORD, _PAIR = np.uint64(0x517CC1B727220A95), np.uint64(0x2545F4914F6CDD1D)


def buckets(texts: Sequence[str], bits: int = BITS) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The hashed n-grams, words and word pairs of every text: (row, bucket), one entry an occurrence."""
    padded = [f" {t[:MAX_CHARACTERS]} " for t in texts]
    chars = np.frombuffer("".join(padded).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    rows = np.repeat(np.arange(len(texts)), [len(p) for p in padded])
    found = [*_grams(chars, rows), *_words(chars, rows)]
    return np.concatenate([r for r, _ in found]), np.concatenate([_bucket(h, bits) for _, h in found])


def _bucket(hashes: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.int64]:
    mixed = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    return (mixed >> np.uint64(64 - bits)).astype(np.int64)


def _grams(
    chars: npt.NDArray[np.uint64], rows: npt.NDArray[np.int64]
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]]:
    """Character n-grams within a row; n is part of the hash by way of its length."""
    hashes, found = chars + np.uint64(1), []
    for n in range(2, max(GRAMS) + 1):
        hashes = hashes[:-1] * _BASE + chars[n - 1 :] + np.uint64(1)
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
    powers = np.cumprod(np.full(len(chars), _BASE, np.uint64), dtype=np.uint64)
    inverse = np.cumprod(np.full(len(chars), _BASE_INVERSE, np.uint64), dtype=np.uint64)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(chars * powers, dtype=np.uint64)])
    words = (sums[ends] - sums[starts]) * inverse[starts]
    pairs = words[:-1] * _PAIR + words[1:]
    together = rows[starts[:-1]] == rows[starts[1:]]
    return [(rows[starts], words * _WORD), (rows[starts[:-1]][together], pairs[together])]


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
        n = len(canonical)
        if n == 0:
            return np.zeros((0, len(self.bias)), np.float32)
        # An older bundle may hash into fewer buckets: its own size says how many.
        rows, found = buckets(canonical, len(self.weights).bit_length() - 1)
        norm = np.sqrt(np.bincount(rows, self.scale[found], n) + 1e-6)
        hit = self.weights[found]
        sums = np.stack([np.bincount(rows, hit[:, p], n) for p in range(len(self.bias))], axis=1)
        return (sums / norm[:, None] + self.bias).astype(np.float32)

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


@dataclass(frozen=True)
class Design:
    """Hashed texts ready to fit on: a CSR matrix [n, 2**BITS] of plain occurrences, normalised later."""

    counts: Any

    @staticmethod
    def of(canonical: Sequence[str]) -> Design:
        """Hash once; both fits of a training run take their rows from it."""
        from scipy.sparse import csr_matrix

        rows, found = buckets(canonical)
        ones = np.ones(len(rows), np.float32)
        return Design(csr_matrix((ones, (rows, found)), shape=(len(canonical), 2**BITS), dtype=np.float32))


def fit(
    design: Design,
    rows: npt.NDArray[np.int64],
    targets: Floats,
    weight: Floats,
    *,
    start: Linear | None = None,
    strength: float = 20.0,
    iterations: int = 40,
) -> Linear:
    """Weighted logistic regression on soft targets, all policies at once, by L-BFGS.

    Args:
        design: hashed texts.
        rows: the rows of `design` to fit on.
        targets: probabilities [len(rows), policies].
        weight: [len(rows)].
        start: where to begin; a second fit on more rows then takes a few steps.
        strength: inverse of the L2 penalty, as scikit-learn's `C`.
    """
    from scipy.optimize import minimize
    from scipy.sparse import diags_array

    counts = design.counts[rows]
    document = np.bincount(counts.indices, minlength=2**BITS)
    # What one message alone contains says nothing of the next, and would take most of the norm.
    idf = np.where(document >= LEAST_MESSAGES, np.log((1 + len(rows)) / (1 + document)) + 1, 0.0)
    idf = idf.astype(np.float32)
    norm = np.sqrt(counts @ (idf**2) + 1e-6)
    seen = np.flatnonzero(idf)
    x = (diags_array(1 / norm) @ counts @ diags_array(idf)).tocsc()[:, seen].tocsr().astype(np.float32)
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
