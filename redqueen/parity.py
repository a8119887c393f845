"""Do the features that were served agree with those recomputed from the tables, and if not, why.

Pure: reading is the asset's part. Both sides come from one declaration (`redqueen.features`), so what differs
has a reason outside of it: another version, a service without features, an event that reached only one side,
another order, a graph that was not there. Each differing event is given the first reason that fits, window
features and graph features apart; what fits none is `unknown`, and is a bug.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import polars as pl
from numpy.typing import NDArray

from redqueen.errors import InvalidInput
from redqueen.features import FEATURES, FEATURES_VERSION, NAMES
from redqueen.features.declared import KEYS, Of

TOLERANCE = 1e-6
"""Both sides narrow the same doubles to float32: more than this, or this share of the value, is a difference.
"""

WARN_SHARE = 0.01
"""Share of compared events that may differ: a message or two overtakes another in any hour."""
ERROR_SHARE = 0.2

BLOCK = 50
"""A cold start is looked for in so many events at a time, in the order in which they were served."""
COLD_SHARE = 0.8
COLD_EVENTS = 5

OTHER_VERSION = "served by another version of the features"
NO_FEATURES = "served without features"
NOT_RECOMPUTED = "never ingested"
NOT_SERVED = "never served"
OTHER_EVENT = "another message under the same id"
LATE = "received late, and the request did not say so"
COLD = "cold start: the service did not know the past"
OUT_OF_ORDER = "observed in another order than received"
NO_GRAPH = "served without the day's graph"
OTHER_GRAPH = "served with another graph"
UNKNOWN = "unknown"

_COST = np.array([feature.cost for feature in FEATURES])
_GROWS = np.array(
    [isinstance(f.value, Of) and f.value.aggregate.op in ("count", "distinct", "sum") for f in FEATURES]
)
"""Features that can only be lower where something of the past is missing."""


@dataclass(frozen=True)
class FeatureParity:
    """One feature that differs: in how many events, in which share of those compared, by how much at most
    (where both sides have a number), and what most of them have in common.
    """

    name: str
    events: int
    share: float
    max_abs: float
    cause: str


@dataclass(frozen=True)
class ParityReport:
    """What a stretch of served events has in common with its recomputation.

    served: events. compared: those with features of this version on both sides. causes: events by reason,
    those not compared included. features: the differing ones, most events first.
    """

    served: int
    compared: int
    differing: int
    causes: dict[str, int]
    features: tuple[FeatureParity, ...]

    @property
    def share(self) -> float:
        """The share of compared events in which anything differs."""
        return self.differing / self.compared if self.compared else 0.0

    @property
    def verdict(self) -> str:
        """In a sentence."""
        if not self.served:
            return "nothing was served"
        if not self.compared:
            return f"nothing to compare: {self._said()}"
        if not self.differing:
            return f"{self.compared} events, every feature as served"
        worst = self.features[0]
        return (
            f"{self.differing} of {self.compared} events differ ({self._said()}); "
            f"most in {worst.name}: {worst.cause}"
        )

    def _said(self) -> str:
        return ", ".join(f"{n} {cause}" for cause, n in self.causes.items())


def compare(
    served: pl.DataFrame,
    recomputed: pl.DataFrame,
    prepared: pl.DataFrame | None = None,
    *,
    version: str = FEATURES_VERSION,
) -> ParityReport:
    """Compare features as served with features recomputed.

    Args:
        served: rows of `predictions` in the order in which they were written; of an event's rows the first
            counts.
        recomputed: event_id and a column a feature; of the events that should have been served.
        prepared: the prepared events (`redqueen.features.prepared`). Without them lateness and order are not
            among the causes.

    Raises:
        InvalidInput: `recomputed` has an event twice.
    """
    if recomputed.height != recomputed["event_id"].n_unique():
        raise InvalidInput("the recomputed features repeat an event_id: materialize them again")
    causes: Counter[str] = Counter()
    first = served.unique("event_id", keep="first", maintain_order=True) if served.height else served
    if first.is_empty():
        return ParityReport(0, 0, 0, {}, ())
    causes[NOT_SERVED] = recomputed.join(first, on="event_id", how="anti").height
    widths = pl.col("features").list.len()
    bare, foreign = widths == 0, (pl.col("features_version") != version) | (widths != len(NAMES))
    causes[NO_FEATURES] = first.filter(bare).height
    causes[OTHER_VERSION] = first.filter(~bare & foreign).height
    usable = first.filter(~bare & ~foreign).select("event_id", "features", "ts")
    both = usable.join(
        recomputed.select("event_id", *NAMES), on="event_id", how="inner", maintain_order="left"
    )
    causes[NOT_RECOMPUTED] = usable.height - both.height
    features, differing = _differences(both, prepared, causes)
    counted = {cause: n for cause, n in causes.most_common() if n}
    return ParityReport(first.height, both.height, differing, counted, features)


def _differences(
    both: pl.DataFrame, prepared: pl.DataFrame | None, causes: Counter[str]
) -> tuple[tuple[FeatureParity, ...], int]:
    if both.is_empty():
        return (), 0
    online = both["features"].explode().to_numpy().astype(np.float64).reshape(both.height, -1)
    offline = both.select(NAMES).to_numpy().astype(np.float64)
    gap = np.abs(online - offline)
    silent = np.isnan(online) & np.isnan(offline)
    differs = ~silent & ~(gap <= TOLERANCE * np.maximum(1.0, np.abs(offline)))
    rows = np.flatnonzero(differs.any(axis=1))
    if not rows.size:
        return (), 0
    why = _explained(differs, online, offline, both, prepared)
    for code, n in enumerate(np.bincount(why[rows].min(axis=1), minlength=len(_RANK))[: len(_RANK)]):
        causes[_RANK[code]] += int(n)
    found = []
    for column in np.flatnonzero(differs.any(axis=0)):
        where = differs[:, column]
        sizes = gap[where, column]
        known = sizes[~np.isnan(sizes)]
        cause = _RANK[int(np.bincount(why[where, column]).argmax())]
        n = int(where.sum())
        found.append(FeatureParity(NAMES[column], n, n / both.height, float(known.max(initial=0.0)), cause))
    found.sort(key=lambda feature: (-feature.events, -feature.max_abs))
    return tuple(found), len(rows)


_RANK = (OTHER_EVENT, LATE, COLD, OUT_OF_ORDER, UNKNOWN, NO_GRAPH, OTHER_GRAPH)
"""Of an event that differs for several reasons the first counts: the message, its windows, the graph."""
_AGREES = len(_RANK)


def _explained(
    differs: NDArray[np.bool_],
    online: NDArray[np.float64],
    offline: NDArray[np.float64],
    both: pl.DataFrame,
    prepared: pl.DataFrame | None,
) -> NDArray[np.int8]:
    """The place in `_RANK` of the cause wherever `differs` [n, F]."""
    why = np.full(differs.shape, _AGREES, dtype=np.int8)
    free, window, graph = ((cost == _COST) for cost in ("free", "window", "snapshot"))

    def because(cause: str, where: NDArray[np.bool_]) -> None:
        why[differs & where] = _RANK.index(cause)

    because(UNKNOWN, differs)
    late = np.zeros(len(why), dtype=bool)
    if prepared is not None:
        rows = prepared.unique("event_id", keep="first")
        known = both.select("event_id").join(rows, on="event_id", how="left", maintain_order="left")
        because(OUT_OF_ORDER, _out_of_order(known))
        late = known["late"].fill_null(False).to_numpy()
    because(COLD, _cold(differs, online, offline)[:, None] & window)
    because(LATE, late[:, None] & window)
    because(OTHER_EVENT, np.broadcast_to(free, differs.shape))
    because(OTHER_GRAPH, np.broadcast_to(graph, differs.shape))
    because(NO_GRAPH, graph & np.isnan(online))
    return why


def _cold(
    differs: NDArray[np.bool_], online: NDArray[np.float64], offline: NDArray[np.float64]
) -> NDArray[np.bool_]:
    """The events that lack a past which nearly all others around them lack too."""
    counts, whole = online[:, _GROWS], offline[:, _GROWS]
    missing = (differs[:, _GROWS] & (counts < whole)).any(axis=1)
    missing &= ~(differs[:, _GROWS] & (counts > whole)).any(axis=1)
    past = np.nan_to_num(whole).max(axis=1, initial=0.0) > 1
    cold = np.zeros(len(online), dtype=bool)
    for start in range(0, len(online), BLOCK):
        part = slice(start, start + BLOCK)
        of = int((past & missing)[part].sum())
        if of >= max(COLD_EVENTS, COLD_SHARE * int(past[part].sum())):
            # Where the start fell within a block, its neighbour has some of the cold ones.
            cold[max(0, start - BLOCK) : start + 2 * BLOCK] = True
    return cold & missing


def _out_of_order(known: pl.DataFrame) -> NDArray[np.bool_]:
    """[n, F]: whether another order of this event, or of one before it, shows in the keys of a feature."""
    found = np.zeros((known.height, len(FEATURES)), dtype=bool)
    shuffled = {key: _shuffled(known, columns) for key, columns in KEYS.items()}
    for place, feature in enumerate(FEATURES):
        for aggregate in feature.aggregates:
            found[:, place] |= shuffled[aggregate.key]
    return found


def _shuffled(known: pl.DataFrame, columns: tuple[str, ...]) -> NDArray[np.bool_]:
    """Rows from the first on that, under its key, was served before one received earlier."""
    # A message has several domains: any message may share one with it.
    groups = [pl.lit(0) if column == "hosts" else pl.col(column) for column in columns]
    earliest_later = pl.col("received").reverse().cum_min().reverse()
    overtook = (pl.col("received") > earliest_later).cast(pl.Int8).cum_max().over(groups)
    present = pl.all_horizontal([group.is_not_null() for group in groups])
    return known.select(((overtook == 1) & present).fill_null(False)).to_series().to_numpy()
