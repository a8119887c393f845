"""The numbers of a graph snapshot, computed from ties that were known by its instant.

Pure: frames in, frames out; the same rows in any order give the same bits. No label is used, so there is none
to leak. Ratios are smoothed towards the mean over accounts: what one answer says about an account is little,
and an account nobody has seen yet reads as the average one.

*Trust* is early-terminated power iteration, as in SybilRank (Cao, Sirivianos, Yang, Pregueiro: "Aiding the
detection of fake accounts in large scale social online services", NSDI 2012), from chosen seeds as in
TrustRank (Gyöngyi, Garcia-Molina, Pedersen: "Combating web spam with TrustRank", VLDB 2004). The walk takes
few steps over mutual ties only, so fakes get what flows through the few ties that real accounts gave them,
however many ties they make among themselves; dividing by the degree keeps the popular from being trusted
for being popular.

*Lockstep* compares senders by the recipients who never answered them. Friends write to the same friends and
are answered; a victim list is written to in unison and is not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from redqueen.ties import Ties

PRIOR_WEIGHT = 4.0
"""Observations that the average account's ratio counts for."""
SEED_AGE = timedelta(days=90)
"""An account younger than this is no seed of trust, however well it is answered."""
SEED_FRIENDS = 3
"""Mutual ties that a seed has at least."""
MIN_SHARED = 3
"""Unanswered recipients that two senders have in common before it is more than chance."""
REPRESENTATIVES = 16
"""Senders of one recipient that all its senders are compared with; keeps the work linear in the edges."""
LOCKSTEP_GROUP = 0.5
"""From this overlap on two senders are shown as one group."""
MAX_DOMAIN_ACTORS = 100
"""Senders of a domain that are told apart: beyond it a domain is simply well known."""
BLOCK_PRODUCTS = 4_000_000
"""Products held at once when senders are compared: 100 MB or so."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True)
class Numbers:
    """The columns of a snapshot.

    actors: `actor_id` and a column a number, without the rows that equal the newcomer's.
    recipients: `recipient_id`, `popularity_log`.
    newcomer: the value of each column for an account that is not in the tables.
    facts: what a person wants to know about the graph; counts only.
    """

    actors: pl.DataFrame
    recipients: pl.DataFrame
    newcomer: dict[str, float]
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Graph:
    """The edges by account number (places in `ids`, sorted); answers a flag each."""

    ids: pl.Series
    src: Ints
    dst: Ints
    wrote_back: Bools
    accepted: Bools
    answered: Bools
    blocked: Bools
    friendly: Bools
    reach: Ints = field(repr=False)

    @property
    def n(self) -> int:
        return len(self.ids)

    def per_sender(self, flags: NDArray[Any]) -> Floats:
        return np.bincount(self.src, weights=flags, minlength=self.n).astype(np.float64)


def numbers(known: Ties, as_of: datetime) -> Numbers:
    """The numbers of every account in `known`, which holds nothing later than `as_of`."""
    graph = _graph(known)
    reciprocity, usual_reciprocity = _smoothed(graph.per_sender(graph.wrote_back), graph.reach)
    answered = graph.per_sender(graph.answered)
    acceptance, usual_acceptance = _smoothed(graph.per_sender(graph.accepted), answered, nobody=0.5)
    blocked, usual_blocked = _smoothed(graph.per_sender(graph.blocked), graph.reach)
    seeds = _seeds(graph, known.accounts, as_of)
    alike, partner = lockstep(graph.src, graph.dst, ~(graph.wrote_back | graph.accepted), graph.n)
    trusted = trust(graph.src[graph.friendly], graph.dst[graph.friendly], seeds, graph.n)
    columns = {
        "reach_log": (np.log1p(graph.reach), 0.0),
        "reciprocity": (reciprocity, usual_reciprocity),
        "acceptance": (acceptance, usual_acceptance),
        "blocked": (blocked, usual_blocked),
        "device_accounts_log": (_shared(known.machines, "device", graph), 0.0),
        "ip_accounts_log": (_shared(known.machines, "ip", graph), 0.0),
        "neighbour_reciprocity": (_neighbours(graph, reciprocity, usual_reciprocity), usual_reciprocity),
        "lockstep": (alike, 0.0),
        "trust": (trusted, 0.0),
    }
    values = {name: np.asarray(column, dtype=np.float32) for name, (column, _) in columns.items()}
    newcomer = {name: float(np.float32(usual)) for name, (_, usual) in columns.items()}
    told = np.zeros(graph.n, dtype=bool)
    for name, column in values.items():
        told |= column != np.float32(newcomer[name])
    senders = np.bincount(graph.dst, minlength=graph.n)
    facts = {
        "accounts": graph.n,
        "edges": len(graph.src),
        "reciprocated_share": round(float(graph.wrote_back.mean()), 4) if len(graph.src) else 0.0,
        "seeds": int(seeds.sum()),
        "trusted_accounts": int((trusted > 0).sum()),
        "lockstep_groups": _group_sizes(alike, partner),
    }
    return Numbers(
        pl.DataFrame({"actor_id": graph.ids, **values}).filter(pl.Series(told)),
        pl.DataFrame(
            {"recipient_id": graph.ids, "popularity_log": np.log1p(senders).astype(np.float32)}
        ).filter(pl.Series(senders > 0)),
        newcomer | {"popularity_log": 0.0},
        facts,
    )


def domains(
    pairs: pl.DataFrame, before: pl.DataFrame | None, as_of: datetime
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The numbers of every domain ever seen, and the pairs to carry on to the next snapshot.

    Args:
        pairs: `host`, `actor_id`, `known_at`, each pair once, all known before `as_of`.
        before: `host`, `first_seen` of the snapshot before; an account's erasure does not make a domain new.
    """
    kept = pairs.sort("host", "known_at", "actor_id").filter(
        pl.int_range(pl.len()).over("host") < MAX_DOMAIN_ACTORS
    )
    counted = kept.group_by("host").agg(pl.col("known_at").min().alias("first_seen"), actors=pl.len())
    if before is not None:
        counted = pl.concat([counted, before.select("host", "first_seen", actors=pl.lit(0, pl.UInt32))])
    days = (pl.lit(as_of) - pl.col("first_seen")).dt.total_microseconds() / 86_400e6
    table = (
        counted.group_by("host")
        .agg(pl.col("first_seen").min(), pl.col("actors").max())
        .select(
            "host",
            "first_seen",
            days.log1p().cast(pl.Float32).alias("domain_age_days_log"),
            pl.col("actors").cast(pl.Float64).log1p().cast(pl.Float32).alias("domain_actors_log"),
        )
        .sort("host")
    )
    return table, kept


# --- the parts ----------------------------------------------------------------------------------------------


def _graph(known: Ties) -> _Graph:
    edges = known.edges
    named = (edges["actor_id"], edges["recipient_id"].alias("actor_id"), known.machines["actor_id"])
    ids = pl.concat(column.unique() for column in named).unique().sort()
    src, dst = _places(ids, edges["actor_id"]), _places(ids, edges["recipient_id"])
    order = np.lexsort((dst, src))
    src, dst = src[order], dst[order]
    replied, accepted, declined, blocked = (
        edges[f"{name}_at"].is_not_null().to_numpy()[order]
        for name in ("replied", "accepted", "declined", "blocked")
    )
    # In both directions: the edge's own key among the keys of all edges turned round.
    keys, turned = src * len(ids) + dst, dst * len(ids) + src
    at = np.minimum(np.searchsorted(keys, turned), max(len(keys) - 1, 0))
    mutual = keys[at] == turned if len(keys) else np.zeros(0, dtype=bool)
    blocked_either = blocked | (mutual & blocked[at])
    return _Graph(
        ids, src, dst,
        wrote_back=mutual | replied,
        # Who blocks a sender has not accepted it, whatever came before.
        accepted=(replied | accepted) & ~blocked,
        answered=replied | accepted | declined | blocked,
        blocked=blocked,
        friendly=(mutual | replied | accepted) & ~blocked_either,
        reach=np.bincount(src, minlength=len(ids)),
    )  # fmt: skip


def _places(ids: pl.Series, wanted: pl.Series) -> Ints:
    numbered = pl.DataFrame({"id": ids, "place": np.arange(len(ids), dtype=np.int64)})
    found = wanted.alias("id").to_frame().join(numbered, on="id", how="left", maintain_order="left")
    return found["place"].to_numpy().astype(np.int64)


def _smoothed(part: Floats, whole: NDArray[Any], nobody: float = 0.0) -> tuple[Floats, float]:
    """part / whole, drawn towards the mean over the accounts that have a ratio; and that mean.

    The mean is over accounts, each once: a flood from a few senders moves it by no more than those few.
    """
    seen = whole > 0
    usual = float(np.mean(part[seen] / whole[seen])) if seen.any() else nobody
    return (part + PRIOR_WEIGHT * usual) / (whole + PRIOR_WEIGHT), usual


def _shared(machines: pl.DataFrame, kind: str, graph: _Graph) -> Floats:
    """ln(accounts on the account's busiest machine of a kind); 0 where it has none."""
    used = machines.filter(pl.col("kind") == kind)
    if used.is_empty():
        return np.zeros(graph.n)
    most = used.with_columns(pl.len().over("machine").alias("accounts"))
    busiest = np.ones(graph.n)
    np.maximum.at(busiest, _places(graph.ids, most["actor_id"]), most["accounts"].to_numpy())
    return np.log(busiest)


def _neighbours(graph: _Graph, reciprocity: Floats, usual: float) -> Floats:
    """The mean reciprocity of those that an account writes to; the usual one where it writes to nobody."""
    total = graph.per_sender(reciprocity[graph.dst])
    return np.where(graph.reach > 0, total / np.maximum(graph.reach, 1), usual)


def _seeds(graph: _Graph, accounts: pl.DataFrame, as_of: datetime) -> Bools:
    """Long-standing accounts that people talk with: aged, mutual ties, mostly answered, never blocked."""
    old = accounts.filter(pl.col("created_at") <= pl.lit(as_of - SEED_AGE))["actor_id"]
    aged = graph.ids.is_in(old.implode()).to_numpy()
    friends = graph.per_sender(graph.friendly)
    answered = 2 * graph.per_sender(graph.wrote_back) >= graph.reach
    return aged & (friends >= SEED_FRIENDS) & answered & (graph.per_sender(graph.blocked) == 0)


def trust(src: Ints, dst: Ints, seeds: Bools, n: int) -> Floats:
    """Trust of each of `n` accounts, in [0, 1): 0 where none arrives, 1/2 for a fair share.

    Args:
        src, dst: friendly ties by account number; one direction suffices.
        seeds: where the walk starts, each account with the same weight.
    """
    low, high = np.minimum(src, dst), np.maximum(src, dst)
    pairs = np.unique(low * max(n, 1) + high)
    low, high = pairs // max(n, 1), pairs % max(n, 1)
    ones = np.ones(2 * len(pairs))
    ties = sparse.csr_array((ones, (np.r_[low, high], np.r_[high, low])), shape=(n, n))
    degree = np.asarray(ties.sum(axis=1)).ravel()
    start = seeds & (degree > 0)
    if not start.any():
        return np.zeros(n)
    flow, share = start / start.sum(), np.maximum(degree, 1.0)
    # Few steps: it spreads among those who know each other before it leaks far into a region of fakes. Half
    # stays at each step, or a pair that only knows each other would pass its trust to and fro.
    for _ in range(math.ceil(math.log2(max(2, int((degree > 0).sum()))))):
        flow = 0.5 * flow + 0.5 * (ties @ (flow / share))
    fair = flow / share * degree.sum()
    return np.asarray(fair / (1 + fair))


def lockstep(src: Ints, dst: Ints, unanswered: Bools, n: int) -> tuple[Floats, Ints]:
    """For each of `n` senders the largest overlap of its unanswered recipients with another's, and whose.

    Cosine in [0, 1], a recipient weighing ln(senders / its senders): one whom everybody writes to weighs
    nothing. 0, and -1, where no other sender shares `MIN_SHARED` of them.
    """
    best, partner = np.zeros(n), np.full(n, -1, dtype=np.int64)
    src, dst = src[unanswered], dst[unanswered]
    senders, by = np.unique(src, return_inverse=True)
    recipients, to = np.unique(dst, return_inverse=True)
    weight = np.log(len(senders) / np.bincount(to, minlength=len(recipients))) ** 2
    norm = np.sqrt(np.bincount(by, weights=weight[to], minlength=len(senders)))
    # Only who wrote to enough, and to somebody whom others wrote to, can be alike.
    busy = np.bincount(by, minlength=len(senders)) >= MIN_SHARED
    several = np.bincount(to[busy[by]], minlength=len(recipients)) > 1
    kept = busy[by] & several[to] & (weight[to] > 0)
    by, to = by[kept], to[kept]
    shape = (len(senders), len(recipients))
    wrote = sparse.csr_array((np.ones(len(by)), (by, to)), shape=shape)
    chosen = _representatives(by, to, len(senders))
    shown = sparse.csr_array((np.ones(int(chosen.sum())), (by[chosen], to[chosen])), shape=shape)
    # The count of shared recipients and their weight in one product: real and imaginary part.
    other = sparse.csc_array(shown.multiply(1 + 1j * weight[None, :]).T)
    cost = wrote @ np.bincount(to[chosen], minlength=len(recipients))
    for rows in _blocks(cost):
        one, two, alike = _most_alike(wrote, other, rows, norm)
        shared = wrote[one].multiply(wrote[two])
        exact = shared @ weight / (norm[one] * norm[two])
        best[senders[one]] = np.minimum(np.maximum(exact, alike), 1.0)
        partner[senders[one]] = senders[two]
    return best, partner


def _representatives(by: Ints, to: Ints, senders: int) -> Bools:
    """Up to `REPRESENTATIVES` senders of each recipient: the first in one random order of all.

    One order for all recipients, so that accounts which share a list of victims are represented by the same
    few on each of it, however many they are. A cap on popular recipients would let them hide by being many.
    """
    rank = np.random.default_rng(0).permutation(senders)[by]
    order = np.lexsort((rank, to))
    sorted_to = to[order]
    nth = np.arange(len(to)) - np.searchsorted(sorted_to, sorted_to)
    chosen = np.zeros(len(to), dtype=bool)
    chosen[order] = nth < REPRESENTATIVES
    return chosen


def _blocks(cost: Floats) -> Iterator[slice]:
    """Ranges of rows whose products fit into memory together."""
    total = np.cumsum(cost)
    start = 0
    while start < len(total):
        limit = (total[start - 1] if start else 0) + BLOCK_PRODUCTS
        end = max(start + 1, int(np.searchsorted(total, limit, side="right")))
        yield slice(start, end)
        start = end


def _most_alike(
    wrote: sparse.csr_array, other: sparse.csc_array, rows: slice, norm: Floats
) -> tuple[Ints, Ints, Floats]:
    """For each sender of `rows` that has one: the sender, the most alike representative, their overlap."""
    product = sparse.coo_array(wrote[rows] @ other)
    one, two = product.coords[0] + rows.start, product.coords[1]
    enough = (product.data.real >= MIN_SHARED) & (one != two)
    one, two = one[enough].astype(np.int64), two[enough].astype(np.int64)
    alike = product.data.imag[enough] / (norm[one] * norm[two])
    order = np.lexsort((two, -alike, one))
    one, two, alike = one[order], two[order], alike[order]
    first = np.r_[True, one[1:] != one[:-1]] if len(one) else np.zeros(0, dtype=bool)
    return one[first], two[first], alike[first]


def _group_sizes(alike: Floats, partner: Ints, most: int = 5) -> list[int]:
    """Sizes of the largest groups of senders that are in lockstep with each other."""
    one = np.flatnonzero((alike >= LOCKSTEP_GROUP) & (partner >= 0))
    if not len(one):
        return []
    members, places = np.unique(np.r_[one, partner[one]], return_inverse=True)
    links = sparse.csr_array(
        (np.ones(len(one)), (places[: len(one)], places[len(one) :])), shape=(len(members),) * 2
    )
    sizes = np.bincount(connected_components(links, directed=False)[1])
    return [int(size) for size in sorted(sizes, reverse=True)[:most]]
