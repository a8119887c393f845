"""The last step, which both compilers share: integers become features.

Nothing is counted here. Whatever was accumulated arrives as an integer, so two compilers that agree on the
integers agree on the features to the last bit: the same ufunc runs over the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from redqueen.features.declared import (
    AGGREGATES,
    CLOGC_SCALE,
    FEATURES,
    SECOND,
    Direct,
    Entropy,
    Of,
    Share,
    Snapshot,
    Value,
)

__all__ = ["ACTORLESS", "SNAPSHOTS", "clogc_table", "finish"]

SNAPSHOTS = tuple(feature.value for feature in FEATURES if isinstance(feature.value, Snapshot))
"""The columns of a snapshot matrix [n, S]."""

ACTORLESS = tuple(feature.name for feature in FEATURES if not feature.needs_actor)
"""The features of a stream that does not say who sent what."""

_BLOCK = 65_536


def finish(
    raw: NDArray[np.int64],
    direct: NDArray[np.float64],
    snapshot: NDArray[np.float64],
    has_actor: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Features [n, F] of raw aggregates [n, A], direct values [n, D], snapshot values [n, S].

    Features that need an actor are NaN in the rows where `has_actor` [n] is false.
    """
    done = np.empty((len(raw), len(FEATURES)))
    for start in range(0, len(raw), _BLOCK):
        part = slice(start, start + _BLOCK)
        # Contiguous rows: on strided data a ufunc may take another code path, and come to another last bit.
        counted = raw[part].T.astype(np.float64, order="C")
        found = np.concatenate(
            [
                direct[part].T,
                snapshot[part].T,
                counted[_PLAIN.first],
                np.log1p(counted[_LOG.first]),
                np.log1p(counted[_LOG_SECONDS.first] / SECOND),
                _shares(counted[_SHARE.first], counted[_SHARE.second]),
                _entropies(counted[_ENTROPY.first], counted[_ENTROPY.second]),
            ]
        )
        done[part] = found[_PLACE].T
    if not has_actor.all():
        done[np.ix_(~has_actor, _NEEDS_ACTOR)] = np.nan
    return done


def _shares(part: NDArray[np.float64], whole: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(part, whole, out=np.zeros(part.shape), where=whole > 0)


def _entropies(clogc: NDArray[np.float64], count: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.maximum(count, 1.0)
    # Rounding in the tiles may leave a burst a hair below 0.
    return np.maximum(np.log(total) - clogc / (CLOGC_SCALE * total), 0.0)


class _Alike(NamedTuple):
    """Features that are finished alike: their columns, and the aggregates they are made of."""

    columns: list[int]
    first: NDArray[np.intp]
    second: NDArray[np.intp]

    @classmethod
    def of(cls, kind: type[Value], shape: str | None = None) -> _Alike:
        columns = [
            column
            for column, feature in enumerate(FEATURES)
            if isinstance(feature.value, kind) and getattr(feature.value, "shape", None) == shape
        ]
        parts = [FEATURES[column].aggregates for column in columns]
        made_of = [[AGGREGATES.index(part[i]) for part in parts if i < len(part)] for i in (0, 1)]
        return cls(columns, *(np.array(places, dtype=np.intp) for places in made_of))


_PLAIN, _LOG, _LOG_SECONDS = (_Alike.of(Of, shape) for shape in ("plain", "log", "log_seconds"))
_SHARE = _Alike.of(Share)
_ENTROPY = _Alike.of(Entropy)
_PLACE = np.argsort(
    [
        column
        for alike in (_Alike.of(Direct), _Alike.of(Snapshot), _PLAIN, _LOG, _LOG_SECONDS, _SHARE, _ENTROPY)
        for column in alike.columns
    ]
)
"""Where in the rows that `finish` stacks each feature lies."""
_NEEDS_ACTOR = np.array([feature.needs_actor for feature in FEATURES])


_clogc: list[int] = [0]


def clogc_table(most: int) -> Sequence[int]:
    """round(c ln c * CLOGC_SCALE) for every c up to `most` at least: one table, so that all agree."""
    while len(_clogc) <= most:
        upto = max(1024, 2 * len(_clogc), most + 1)
        _clogc.extend(round(c * math.log(c) * CLOGC_SCALE) for c in range(len(_clogc), upto))
    return _clogc
