"""Who reports together more than chance and popularity explain: rings of raters, from who reported what.

Only the statistics of co-reports belong here: integers in, groups of integers out. What becomes of a ring's
votes is `redqueen.poisoning`'s business.

The null keeps what makes honest people meet: how much each rater reports and how popular each item is. Under
it raters i and j both report item a with probability d_i d_j k_a (k_a - 1) / M^2. A shared item is worth its
surprise, w_a = log(K^2 / (k_a (k_a - 1))), so that meeting on what everybody reports counts for next to
nothing, and a pair's evidence is the Chernoff bound on the sum of what the two share. Two things betray a
ring: a pair that no chance explains, and a knot of raters each of whom shares a little with many others of
the knot, which a ring cannot help that spreads its targets to keep every pair unsuspicious.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import sparse
from scipy.sparse.csgraph import connected_components

Codes = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

TILTS = (0.125, 0.25, 0.5, 1.0, 1.5)
"""Exponents of the Chernoff bound that are tried; the best one holds, at the price of their number."""


@dataclass(frozen=True)
class RingLimits:
    """What makes a ring. These numbers are public: the guard must stand although a ring has read them.

    popular: an item with more reporters is left out; everybody meets there, and its pairs are too many.
    alpha: chance that a quiet platform yields one pair by luck.
    shared_items: a rater with fewer reports on items that anyone else reported is in no ring, and a ring
        shares at least so many items.
    knots: levels of weak evidence, each searched for knots: partners are two who share so much that chance
        gives a rater no more such partners than this.
    rare, rarely: further levels: partners are two who share an item of so few reporters (or as much in
        others), although both report so little that the chance of it is below this.
    knot_margin, knot_share: by how much a knot must be tighter than the tightest one among reports dealt out
        at random: so many partners, or such a share more. The very busy meet each other at any rate.
    least_knot: partners that each member of a knot has within it at least.
    pairs: most pairs that are counted; beyond it the most popular items are left out first.
    seed: of the dealing out at random.
    """

    popular: int = 50
    alpha: float = 1e-3
    shared_items: int = 3
    knots: tuple[float, ...] = (0.5, 8.0, 64.0)
    rare: tuple[int, ...] = (4, 8, 16)
    rarely: tuple[float, ...] = (0.05, 0.5)
    knot_margin: int = 2
    knot_share: float = 0.5
    least_knot: int = 4
    pairs: int = 5_000_000
    seed: int = 0


@dataclass(frozen=True)
class _Pairs:
    """Pairs of raters that share anything: both ends, what they share is worth, and the log of how likely
    chance does as much.
    """

    raters: int
    one: Codes
    other: Codes
    shared: Floats
    worth: Floats
    degrees: Floats
    log_p: Floats

    def graph(self, edges: Flags) -> Any:
        """The pairs chosen as a symmetric adjacency matrix."""
        one, other = self.one[edges], self.other[edges]
        ones = np.ones(2 * len(one), dtype=np.int32)
        ends = np.concatenate([one, other]), np.concatenate([other, one])
        return sparse.csr_array((ones, ends), shape=(self.raters, self.raters))


def rings(rater: Codes, item: Codes, limits: RingLimits | None = None) -> list[Codes]:
    """The groups of raters that collude, each sorted, by their first member.

    Args:
        rater, item: one entry a report, no (rater, item) twice, codes from 0; in an order of their own that
            does not depend on the order of arrival, for the comparison deals them out at random by `seed`.
    """
    how = limits or RingLimits()
    rater, item = _unpopular(rater, item, how)
    found = _pairs(rater, item, how)
    if found is None:
        return []
    eligible, pairs = found
    strong = pairs.log_p < np.log(how.alpha) - np.log(len(eligible) * (len(eligible) - 1) / 2)
    chosen = strong | _knots(rater, item, len(eligible), pairs, how)
    _, group = connected_components(pairs.graph(chosen), directed=False)
    whose = np.full(int(rater.max()) + 1, -1, dtype=np.int64)
    whose[eligible] = group
    _, _, groups = shared(whose, rater, item)
    wide = np.bincount(groups, minlength=int(group.max()) + 1) >= how.shared_items
    order = np.argsort(group, kind="stable")
    ends = np.cumsum(np.bincount(group))[:-1]
    kept = [eligible[one] for one in np.split(order, ends) if len(one) >= 2 and wide[group[one[0]]]]
    return sorted(kept, key=lambda one: int(one[0]))


def shared(whose: Codes, rater: Codes, item: Codes) -> tuple[Codes, Codes, Codes]:
    """What the members of each group share: an entry a group and item that two or more of it reported, with
    the place of the first such report, the item and the group.

    Args:
        whose: for each rater the group, or -1.
        rater, item: one entry a report, no (rater, item) twice.
    """
    inside = np.flatnonzero(whose[rater] >= 0)
    pair = both(whose[rater[inside]], item[inside])
    _, first, count = np.unique(pair, return_index=True, return_counts=True)
    place = inside[first[count >= 2]]
    return place, item[place], whose[rater[place]]


def both(one: Codes, other: Codes) -> Codes:
    """Two codes as one."""
    return one * (int(other.max(initial=0)) + 1) + other


def _unpopular(rater: Codes, item: Codes, how: RingLimits) -> tuple[Codes, Codes]:
    """The reports on items with few enough reporters, within the budget of pairs."""
    reporters = np.bincount(item)
    most = how.popular
    by_count = np.bincount(np.minimum(reporters, most + 1), minlength=most + 2)[: most + 1]
    pairs = np.cumsum(by_count * np.arange(most + 1) * np.arange(-1, most) // 2)
    most = min(most, max(2, int(np.searchsorted(pairs, how.pairs, side="right")) - 1))
    kept = reporters[item] <= most
    return rater[kept], item[kept]


def _pairs(rater: Codes, item: Codes, how: RingLimits) -> tuple[Codes, _Pairs] | None:
    """The raters with enough reports on shared items, and every pair of them that shares one."""
    reporters = np.bincount(item)
    shared = reporters[item] >= 2
    degree = np.bincount(rater)
    enough = np.bincount(rater[shared], minlength=len(degree)) >= how.shared_items
    eligible = np.flatnonzero(enough).astype(np.int64)
    if len(eligible) < 2:
        return None
    seat = np.cumsum(enough) - 1
    there = shared & enough[rater]
    worth = np.zeros(len(reporters))
    met = reporters >= 2
    worth[met] = _worth(reporters[met], how)
    report = sparse.csr_array(
        (np.ones(there.sum()), (seat[rater[there]], item[there])), shape=(len(eligible), len(reporters))
    )
    count = sparse.triu(report @ report.T, k=1).tocoo().data
    together = sparse.triu(report @ sparse.diags_array(worth) @ report.T, k=1).tocoo()
    one, other = together.coords
    degrees = degree[eligible[one]] * degree[eligible[other]] / float(reporters.sum()) ** 2
    log_p = _log_p(together.data, degrees, reporters, how)
    ends = one.astype(np.int64), other.astype(np.int64)
    return eligible, _Pairs(len(eligible), *ends, count, together.data, degrees, log_p)


def _worth(reporters: Codes, how: RingLimits) -> Floats:
    """The surprise of meeting on an item of so many reporters, above zero."""
    k = reporters.astype(np.float64)
    return np.asarray(np.log((how.popular + 1) ** 2 / (k * (k - 1))), dtype=np.float64)


def _log_p(score: Floats, degrees: Floats, reporters: Codes, how: RingLimits) -> Floats:
    """The log of a bound on the chance of what is shared, for pairs with this d_i d_j / M^2."""
    k = reporters[reporters >= 2]
    meets = k * (k - 1.0)
    worth = _worth(k, how)
    bound = np.zeros(len(score))
    for tilt in TILTS:
        growth = float((meets * np.expm1(tilt * worth)).sum())
        np.minimum(bound, degrees * growth - tilt * score, out=bound)
    return np.minimum(bound + np.log(len(TILTS)), 0.0)


def _knots(rater: Codes, item: Codes, eligible: int, pairs: _Pairs, how: RingLimits) -> Flags:
    """The weak pairs that hold a knot together."""
    # The same reports, dealt out anew: every rater reports as much, every item is as popular.
    anyone = np.random.default_rng(how.seed).permutation(rater)
    span = int(item.max()) + 1
    dealt = np.divmod(np.unique(anyone * span + item), span)
    null = _pairs(dealt[0], dealt[1], how)
    chosen = np.zeros(len(pairs.log_p), dtype=np.bool_)
    luck = _tightest(null, dealt[1], how)
    for (least, edges), by_luck in zip(_levels(pairs, item, how), luck, strict=True):
        tighter = by_luck + max(how.knot_margin, math.ceil(how.knot_share * by_luck))
        inside = _knotted(pairs.graph(edges), max(least, tighter))
        chosen |= edges & inside[pairs.one] & inside[pairs.other]
    return chosen


def _levels(pairs: _Pairs, item: Codes, how: RingLimits) -> Iterator[tuple[int, Flags]]:
    """For each level of weak evidence: the partners that each of a knot has at least, and the pairs that
    reach it.
    """
    for partners in how.knots:
        yield how.least_knot, (pairs.log_p < np.log(partners / pairs.raters)) & (pairs.shared >= 2)
    reporters = np.bincount(item)
    for few in how.rare:
        k = reporters[reporters <= few]
        chance = pairs.degrees * float((k * (k - 1)).sum())
        shares = pairs.worth >= _worth(np.array([few]), how) - 1e-9
        for rarely in how.rarely:
            # One item alone ties its reporters to each other: a knot is tighter than any one item makes it.
            yield few + how.knot_margin, shares & (chance < rarely)


def _tightest(null: tuple[Codes, _Pairs] | None, item: Codes, how: RingLimits) -> Iterator[int]:
    """The tightest knot that luck ties at each level."""
    if null is None:
        yield from repeat(0, len(how.knots) + len(how.rare) * len(how.rarely))
        return
    for _, edges in _levels(null[1], item, how):
        yield int(_coreness(null[1].graph(edges)).max(initial=0))


def _knotted(graph: Any, least: int) -> Flags:
    """The raters in knots of at least so many partners each. Who is tied half as tightly as a knot's heart is
    no part of it: honest people who were wrong together with a few of a ring.
    """
    core = _coreness(graph)
    inside = core >= least
    if not inside.any():
        return inside
    rows = np.flatnonzero(inside)
    _, knot = connected_components(graph[rows][:, rows], directed=False)
    heart = np.zeros(knot.max() + 1, dtype=np.int64)
    np.maximum.at(heart, knot, core[rows])
    inside[rows] = 2 * core[rows] > heart[knot]
    return inside


def _coreness(graph: Any) -> Codes:
    """For each node the largest k such that it lies in a part of the graph where all have k neighbours."""
    degree = np.diff(graph.indptr).astype(np.int64)
    core = np.zeros(len(degree), dtype=np.int64)
    alive = np.ones(len(degree), dtype=np.bool_)
    k = 0
    while alive.any():
        out = np.flatnonzero(alive & (degree <= k))
        if not len(out):
            k = int(degree[alive].min())
            continue
        core[out] = k
        alive[out] = False
        degree -= np.bincount(graph[out].indices, minlength=len(degree))
    return core
