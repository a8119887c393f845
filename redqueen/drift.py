"""How far has traffic moved from what the champion was measured on?

Belongs here: frozen reference bins, the codes they give, PSI and Jensen-Shannon on those codes.
Does not belong here: what to do about drift (`redqueen.policy`), running Evidently (`assets.monitoring`).

Why frozen bins: Evidently bins a numeric column over reference *and* current data, so a single outlier row
stretches the bins and hides real drift (PSI .250 became .022 when measured). Here the edges are quantiles of
the reference alone, with an overflow bin on either side; traffic is turned into small integer codes, and
those codes are handed to Evidently as categorical columns. Its figure and ours then agree exactly, because
`psi` uses the same replacement for empty bins (see `_fill_empty`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from redqueen.errors import InvalidInput

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

TAIL = 0.001  # share of the reference in each overflow bin of a continuous column
MAX_CATEGORIES = 30  # further categories of the reference share the code "other"


@dataclass(frozen=True)
class ColumnReference:
    """One column's frozen bins and the reference's count in each.

    numeric: `edges` ascending, n edges give codes 0..n (code 0 is underflow, code n overflow), null is n + 1.
    category: `categories` give codes 0..k-1, anything else k ("other"), null k + 1.
    """

    name: str
    kind: Literal["numeric", "category"]
    edges: tuple[float, ...]
    categories: tuple[str, ...]
    counts: tuple[int, ...]

    @property
    def null_code(self) -> int:
        return (len(self.edges) if self.kind == "numeric" else len(self.categories)) + 1

    def codes(self, values: pl.Series) -> IntArray:
        """Integer code of each value; NaN counts as null, infinities fall in the overflow bins."""
        if self.kind == "category":
            index = {category: code for code, category in enumerate(self.categories)}
            other = len(self.categories)
            texts = values.cast(pl.String).to_list()
            found = [self.null_code if text is None else index.get(text, other) for text in texts]
            return np.asarray(found, dtype=np.int64)
        numbers = values.cast(pl.Float64).to_numpy()  # polars gives NaN for null
        binned = np.searchsorted(np.asarray(self.edges), numbers, side="left")
        return np.where(np.isnan(numbers), self.null_code, binned).astype(np.int64)


@dataclass(frozen=True)
class Reference:
    """What the champion's traffic looked like: frozen bins per column, from `n` rows. Plain JSON both
    ways."""

    n: int
    columns: tuple[ColumnReference, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.columns)

    @property
    def expected(self) -> dict[str, FloatArray]:
        """Column -> share of the reference in each code (sums to 1)."""
        return {c.name: np.asarray(c.counts, dtype=np.float64) / self.n for c in self.columns}

    def codes(self, frame: pl.DataFrame) -> pl.DataFrame:
        """The reference's columns of `frame` as Int32 codes, same rows, same order.

        Raises InvalidInput when a column is missing: a column that is not measured is not "no drift".
        """
        require(frame, self.names, "the window's traffic")
        return pl.DataFrame([pl.Series(c.name, c.codes(frame[c.name]), dtype=pl.Int32) for c in self.columns])

    def counts(self, frame: pl.DataFrame) -> dict[str, IntArray]:
        """Column -> rows of `frame` in each code, aligned with `expected`."""
        require(frame, self.names, "the window's traffic")
        return {c.name: np.bincount(c.codes(frame[c.name]), minlength=len(c.counts)) for c in self.columns}

    def expand(self) -> pl.DataFrame:
        """`n` rows of codes with exactly the reference's counts: what Evidently takes as reference data.

        Columns are rebuilt one by one, so joint distributions are meaningless; marginals are exact.
        """
        return pl.DataFrame(
            [
                pl.Series(c.name, np.repeat(np.arange(len(c.counts)), c.counts), dtype=pl.Int32)
                for c in self.columns
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "columns": [
                {
                    "name": c.name,
                    "kind": c.kind,
                    "edges": list(c.edges),
                    "categories": list(c.categories),
                    "counts": list(c.counts),
                }
                for c in self.columns
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Reference:
        return cls(
            n=int(data["n"]),
            columns=tuple(
                ColumnReference(
                    name=c["name"],
                    kind=c["kind"],
                    edges=tuple(float(edge) for edge in c["edges"]),
                    categories=tuple(c["categories"]),
                    counts=tuple(int(count) for count in c["counts"]),
                )
                for c in data["columns"]
            ),
        )


def fit_reference(frame: pl.DataFrame, columns: Sequence[str], bins: int = 10) -> Reference:
    """Freeze `bins` quantile bins (and two overflow bins) per numeric column of `frame`; strings keep their
    values.

    Ties collapse: a column that is 95% zeros gets a bin for zero and a few above it.
    Raises InvalidInput for an empty frame, a missing column or a type that is neither number, bool nor
    string.
    """
    require(frame, columns, "the reference")
    if frame.is_empty():
        raise InvalidInput("the drift reference has no rows: fit it on a period with served traffic")
    return Reference(n=frame.height, columns=tuple(_fit_column(frame[name], bins) for name in columns))


def _fit_column(values: pl.Series, bins: int) -> ColumnReference:
    if values.dtype.is_numeric():
        shape = ColumnReference(values.name, "numeric", _quantile_edges(values, bins), (), ())
    elif values.dtype in (pl.String, pl.Boolean, pl.Categorical) or isinstance(values.dtype, pl.Enum):
        texts = values.cast(pl.String).drop_nulls().value_counts(sort=True)
        top = sorted(texts.get_column(values.name).head(MAX_CATEGORIES).to_list())
        shape = ColumnReference(values.name, "category", (), tuple(top), ())
    else:
        raise InvalidInput(
            f"drift column {values.name!r} has type {values.dtype}: give a number, a bool or a string"
        )
    counts = np.bincount(shape.codes(values), minlength=shape.null_code + 1)
    return ColumnReference(
        shape.name, shape.kind, shape.edges, shape.categories, tuple(int(count) for count in counts)
    )


def _quantile_edges(values: pl.Series, bins: int) -> tuple[float, ...]:
    numbers = values.cast(pl.Float64).to_numpy()
    numbers = numbers[np.isfinite(numbers)]
    if not len(numbers):
        return ()
    inner = np.linspace(0, 1, bins + 1)[1:-1]
    edges = np.quantile(numbers, [TAIL, *inner, 1 - TAIL], method="inverted_cdf")
    # Bins are (left, right]; stepping just below the lowest edge keeps values equal to it out of the
    # underflow bin.
    # The lowest edge itself is none, or its bin would hold a single row, and a single row too few there
    # weighs as much as a column that changed.
    edges = np.unique(np.concatenate([[np.nextafter(edges[0], -np.inf)], edges[1:]]))
    return tuple(float(edge) for edge in edges)


# ---- distances -----------------------------------------------------------------------------------


def psi(counts: Iterable[float], expected: Iterable[float]) -> float:
    """Population stability index of `counts` (rows a code) against `expected` (share a code), in nats.

    Identical to Evidently 0.7.23's `ValueDrift(method="psi")` on the same codes. 0 for no rows at all.
    """
    shares = _shares(counts, expected)
    if shares is None:
        return 0.0
    current, reference = (_fill_empty(share) for share in shares)
    return float(np.sum((reference - current) * np.log(reference / current)))


def js(counts: Iterable[float], expected: Iterable[float]) -> float:
    """Jensen-Shannon distance (root of the divergence, nats; 0 to .833), unsmoothed as in Evidently."""
    shares = _shares(counts, expected)
    if shares is None:
        return 0.0
    current, reference = shares
    middle = (current + reference) / 2
    divergence = (_relative_entropy(current, middle) + _relative_entropy(reference, middle)) / 2
    return float(np.sqrt(max(divergence, 0.0)))


def sampling_noise(expected: Iterable[float], n: int, m: int) -> float:
    """PSI to expect from chance alone: (B - 1)(1/n + 1/m), B the occupied codes, n current and m reference
    rows."""
    occupied = int(np.count_nonzero(np.asarray(list(expected))))
    return max(occupied - 1, 0) * (1 / max(n, 1) + 1 / max(m, 1))


def _shares(counts: Iterable[float], expected: Iterable[float]) -> tuple[FloatArray, FloatArray] | None:
    """(current, reference) shares over codes that occur in either; None when there is nothing to compare."""
    current = np.asarray(list(counts), dtype=np.float64)
    reference = np.asarray(list(expected), dtype=np.float64)
    if current.shape != reference.shape:
        raise InvalidInput(
            f"{current.size} counts against {reference.size} expected shares: use one reference"
        )
    total = current.sum()
    if total == 0:
        return None
    seen = (current > 0) | (reference > 0)
    return current[seen] / total, reference[seen]


def _fill_empty(shares: FloatArray) -> FloatArray:
    """Evidently's rule for an empty bin: .0001, or a millionth of the smallest share when that is <=
    .0001."""
    smallest = shares[shares > 0].min()
    return np.where(shares == 0, smallest / 1e6 if smallest <= 0.0001 else 0.0001, shares)


def _relative_entropy(p: FloatArray, q: FloatArray) -> float:
    held = p > 0
    return float(np.sum(p[held] * np.log(p[held] / q[held])))


# ---- a window's figures --------------------------------------------------------------------------


@dataclass(frozen=True)
class DriftFigures:
    """One window's drift. A column drifted when its PSI less sampling noise reaches `threshold`.

    n: rows of the window; psi, js, noise: by column; score_psi: the largest excess among the model's own
    scores.
    """

    n: int
    psi: dict[str, float] = field(default_factory=dict)
    js: dict[str, float] = field(default_factory=dict)
    noise: dict[str, float] = field(default_factory=dict)
    score_columns: tuple[str, ...] = ()
    threshold: float = 0.2

    def excess(self, column: str) -> float:
        return max(self.psi[column] - self.noise[column], 0.0)

    @property
    def drifted(self) -> tuple[str, ...]:
        """Columns that drifted, worst first."""
        over = [name for name in self.psi if self.excess(name) >= self.threshold]
        return tuple(sorted(over, key=lambda name: (-self.excess(name), name)))

    @property
    def share(self) -> float:
        """Share of *feature* columns that drifted; scores are judged apart, by `score_psi`."""
        features = [name for name in self.psi if name not in self.score_columns]
        return sum(name in features for name in self.drifted) / len(features) if features else 0.0

    @property
    def score_psi(self) -> float:
        return max((self.excess(name) for name in self.score_columns), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        return {
            "n": self.n,
            "psi": dict(self.psi),
            "js": dict(self.js),
            "noise": dict(self.noise),
            "score_columns": list(self.score_columns),
            "threshold": self.threshold,
            "drifted": list(self.drifted),
            "share": self.share,
            "score_psi": self.score_psi,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DriftFigures:
        return cls(
            n=int(data["n"]),
            psi=dict(data["psi"]),
            js=dict(data["js"]),
            noise=dict(data["noise"]),
            score_columns=tuple(data["score_columns"]),
            threshold=float(data["threshold"]),
        )


def drift_figures(
    reference: Reference,
    frame: pl.DataFrame,
    *,
    score_columns: Sequence[str] = (),
    threshold: float = 0.2,
    measured: Mapping[str, float] | None = None,
) -> DriftFigures:
    """Compare a window's traffic with the reference.

    `measured` is column -> PSI as Evidently reported it; where given, it decides. Raises InvalidInput when it
    leaves out a column of the reference (Evidently silently skips columns of types it does not know).
    """
    counts, expected = reference.counts(frame), reference.expected
    if measured is not None and (missing := sorted(set(reference.names) - set(measured))):
        raise InvalidInput(f"the drift report did not evaluate {missing}: check their types and run it again")
    if unknown := sorted(set(score_columns) - set(reference.names)):
        raise InvalidInput(f"score columns {unknown} are not in the drift reference: fit it with them")
    return DriftFigures(
        n=frame.height,
        psi={
            name: float(measured[name]) if measured is not None else psi(counts[name], expected[name])
            for name in reference.names
        },
        js={name: js(counts[name], expected[name]) for name in reference.names},
        noise={name: sampling_noise(expected[name], frame.height, reference.n) for name in reference.names},
        score_columns=tuple(score_columns),
        threshold=threshold,
    )


def require(frame: pl.DataFrame, columns: Sequence[str], what: str) -> None:
    """Raise InvalidInput naming the columns of `columns` that `frame` lacks."""
    if missing := [name for name in columns if name not in frame.columns]:
        raise InvalidInput(f"{what} lacks column(s) {missing}: it has {frame.columns}")
