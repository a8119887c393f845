"""Rings of colluding reporters against benign victims: how many victims gold labels call abusive, with the
guard and without, and how many honest people it flags.

The world: honest people vote on what they see, "abuse" or "benign", right nine times in ten; they see
popular items most (Zipf 1.1) and so meet on those. Auditors judge one item in fifty, or none. The victims
are 200 benign items that nobody audited, that two to four honest people called benign, and that come out
benign as long as nobody lies: a ring has to outvote them.

The ring has read the guard. Its members take part as everyone does (camouflage: for each vote on a victim so
many honest ones, on abusive items by popularity) and it chooses among strategies: all members on every
victim; or one vote more on a victim than honest people cast, by members who were paired least so far, no two
of them together on more than c victims, down to one, for as many victims as that allows. Its best strategy
counts: `victims_mislabelled` is the worst case over strategies, camouflage and auditing of the mean over
seeds, for rings of 8. Victims that a ring leaves alone to stay below the threshold count as not mislabelled:
that is what hiding costs it.

Where the guard loses: see the rows whose `members_found` is below 1, and `worst_ring_mislabelled`. Rings of
20 and 30 that spread thinly and camouflage threefold cast a quarter of all little-known votes for "abuse";
what they share then looks like chance among the busy, and they reach most of their victims. A ring that
people found right on what else it shares is not held but counts as one voter, which now and then still beats
two lone defenders. And the guard knows no neighbourhoods: here honest people meet by popularity alone, as
the null has it, so `honest_flagged` says nothing about small communities whose members all report the same
things.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

import numpy as np
import polars as pl
from common import QUICK, best_of, finish, show

from redqueen.labels import gold
from redqueen.poisoning import Limits, guard

NOW = datetime(2026, 3, 1, tzinfo=UTC)
DAYS = 29
RATERS, ITEMS, SIGHTS, VICTIMS = 1_200, 3_000, 40_000, 200
ABUSIVE, HONEST_RIGHT = 0.3, 0.9
AUDITED = (0.0, 0.02)
"""Share of items that auditors judge: none, and a few that tell who is right."""
DEFENDERS = (2, 4)
ZIPF = 1.1
ALL_IN = 0
TOGETHER = (1, 2, 3, 5)
"""Victims that two members of a ring that spreads may share."""


@dataclass(frozen=True)
class World:
    """The labels of a world without a ring, and whom a ring there would attack."""

    labels: pl.DataFrame
    victims: np.ndarray
    defenders: np.ndarray
    abusive: np.ndarray
    popularity: np.ndarray
    seen_at: np.ndarray


def world(seed: int, share_audited: float) -> World:
    rng = np.random.default_rng(seed)
    popularity = rng.permutation((1.0 + np.arange(ITEMS)) ** -ZIPF)
    popularity /= popularity.sum()
    activity = rng.pareto(1.5, RATERS) + 1.0
    abusive = rng.random(ITEMS) < ABUSIVE
    seen_at = rng.uniform(0.5, DAYS - 1.5, ITEMS)
    who = rng.choice(RATERS, SIGHTS, p=activity / activity.sum())
    what = rng.choice(ITEMS, SIGHTS, p=popularity)
    who, what = np.divmod(np.unique(who * ITEMS + what), ITEMS)
    right = rng.random(len(who)) < HONEST_RIGHT
    voted = votes("h", who, what, abusive[what] == right, "report", late(rng, seen_at[what]))
    items = np.arange(ITEMS)
    audited = rng.random(ITEMS) < share_audited
    seen = items[audited]
    audit = votes("a", np.zeros(len(seen)), seen, abusive[seen], "audit", seen_at[seen] + 0.4)
    labels = pl.concat([voted, audit])
    called = truth(labels, None)
    defenders = np.bincount(what[~abusive[what] & right], minlength=ITEMS)
    plain = np.array([called.get(f"e{item}") is False for item in items])
    open_to_it = plain & ~abusive & ~audited & (defenders >= DEFENDERS[0]) & (defenders <= DEFENDERS[1])
    victims = rng.choice(items[open_to_it], VICTIMS, replace=False)
    return World(labels, victims, defenders[victims], items[abusive], popularity, seen_at)


def late(rng: np.random.Generator, day: np.ndarray) -> np.ndarray:
    """When a report of something seen that day arrives: hours later, a day at most."""
    return day + np.minimum(rng.exponential(0.15, len(day)), 1.0)


def votes(kind: str, who: Any, what: Any, abuse: Any, source: str, day: Any) -> pl.DataFrame:
    numbers = pl.DataFrame({"who": who, "what": what, "abuse": abuse, "day": day}).cast(
        {"who": pl.Int64, "what": pl.Int64, "abuse": pl.Boolean, "day": pl.Float64}
    )
    at = pl.lit(NOW - timedelta(days=DAYS)) + pl.duration(microseconds=pl.col("day") * 86_400_000_000)
    return numbers.select(
        label_id=pl.format("{}{}-{}", pl.lit(kind), "who", "what"),
        event_id=pl.format("e{}", "what"),
        policy=pl.when("abuse").then(pl.lit("spam")).otherwise(pl.lit("any")),
        value=pl.when("abuse").then(pl.lit("abuse")).otherwise(pl.lit("benign")),
        source=pl.lit(source),
        rater_id=pl.format("{}{}", pl.lit(kind), "who"),
        labeled_at=at.cast(pl.Datetime("us", "UTC")),
        received_at=at.cast(pl.Datetime("us", "UTC")),
        confidence=pl.lit(None, pl.Float64),
    )


def teams(defenders: np.ndarray, size: int, together: int, rng: np.random.Generator) -> list[list[int]]:
    """Who of the ring attacks which victim, an empty team where it leaves the victim alone."""
    if together == ALL_IN:
        return [list(range(size))] * len(defenders)
    met = np.zeros((size, size))
    chosen: list[list[int]] = []
    in_vain: set[int] = set()
    for against in defenders:
        each = min(size, int(against) + 1)
        team = [] if each in in_vain else spread(met, each, together, rng)
        if not team:
            in_vain.add(each)
        for one in team:
            met[one, [other for other in team if other != one]] += 1
        chosen.append(team)
    return chosen


def spread(met: np.ndarray, each: int, together: int, rng: np.random.Generator) -> list[int]:
    """`each` members of whom no two have met `together` times, where a few tries find them."""
    for _ in range(10):
        team = [int(rng.integers(len(met)))]
        while len(team) < each:
            cost = met[team].sum(axis=0) + 1e3 * (met[team].max(axis=0) >= together) + rng.random(len(met))
            cost[team] = np.inf
            team.append(int(np.argmin(cost)))
        if met[np.ix_(team, team)].max() < together:
            return team
    return []


def ring(place: World, size: int, together: int, camouflage: int, seed: int) -> pl.DataFrame:
    """The ring's votes."""
    rng = np.random.default_rng([seed, size, together, camouflage])
    chosen = teams(place.defenders, size, together, rng)
    who = np.array([member for team in chosen for member in team], dtype=np.int64)
    what = np.array([v for v, team in zip(place.victims, chosen, strict=True) for _ in team], dtype=np.int64)
    share = place.popularity[place.abusive]
    cover = rng.choice(place.abusive, len(who) * camouflage, p=share / share.sum())
    both = np.r_[who, np.repeat(who, camouflage)] * ITEMS + np.r_[what, cover]
    whose, items = np.divmod(np.unique(both), ITEMS)
    return votes("r", whose, items, np.ones(len(items)), "report", late(rng, place.seen_at[items]))


def truth(labels: pl.DataFrame, weights: pl.DataFrame | None) -> dict[str, bool]:
    """What gold labels call abusive, by event."""
    judged = gold(labels, NOW, ("spam",), weights=weights)
    return dict(judged.select("event_id", pl.col("p_abuse") >= 0.5).iter_rows())


def mislabelled(place: World, labels: pl.DataFrame, weights: pl.DataFrame | None) -> float:
    called = truth(labels, weights)
    return float(np.mean([called.get(f"e{victim}", False) for victim in place.victims]))


def attack(place: World, extra: pl.DataFrame) -> dict[str, float]:
    """What an attack does without the guard and with it, and whom it finds; all shares."""
    labels = pl.concat([place.labels, extra])
    found = guard(labels, Limits(), NOW)
    grouped = found.verdicts.filter(pl.col("group").is_not_null())
    whose = grouped.join(labels.select("label_id", "rater_id"), on="label_id")["rater_id"].unique()
    held = found.verdicts.filter("held").join(extra.select("label_id"), on="label_id").height
    return {
        "unguarded": mislabelled(place, labels, None),
        "guarded": mislabelled(place, labels, found.verdicts.select("label_id", "weight")),
        "members_found": whose.str.starts_with("r").sum() / max(extra["rater_id"].n_unique(), 1),
        "votes_held": held / max(extra.height, 1),
        "honest_flagged": whose.str.starts_with("h").sum() / RATERS,
    }


def run(quick: bool) -> dict[str, object]:
    """The sweep; the figures of the module's first paragraph."""
    seeds = range(5 if quick else 20)
    sizes = (3, 8, 30) if quick else (3, 5, 8, 12, 20, 30)
    covers = (3,) if quick else (0, 3)
    spreads = (1, 3) if quick else TOGETHER
    told: dict[tuple[float, int, int, int], list[dict[str, float]]] = defaultdict(list)
    quiet = []
    for seed, audited in product(seeds, AUDITED):
        place = world(seed, audited)
        quiet.append(attack(place, place.labels.clear()))
        for size, together, cover in product(sizes, (ALL_IN, *spreads), covers):
            extra = ring(place, size, together, cover, seed)
            told[audited, size, together, cover].append(attack(place, extra))
    sweep = [
        {
            "audited": audited, "ring": size, "together": together or VICTIMS, "camouflage": cover,
            **{name: float(np.mean([row[name] for row in rows])) for name in rows[0]},
        }
        for (audited, size, together, cover), rows in told.items()
    ]  # fmt: skip
    rows = [list(r.values()) for r in sweep]
    show("Rings against 200 benign victims: shares, means over seeds", list(sweep[0]), rows)
    best = {size: max((r for r in sweep if r["ring"] == size), key=lambda r: r["guarded"]) for size in sizes}
    show("Each ring's best strategy", list(sweep[0]), [list(r.values()) for r in best.values()])
    labels = world(0, AUDITED[-1]).labels
    eights = [r for r in sweep if r["ring"] == 8]
    return {
        "victims_mislabelled": best[8]["guarded"],
        "victims_mislabelled_unguarded": max(r["unguarded"] for r in eights),
        "honest_flagged": max(r["honest_flagged"] for r in [*sweep, *quiet]),
        "worst_ring_mislabelled": max(r["guarded"] for r in sweep),
        "guard_cpu_s_per_1m": best_of(lambda: guard(labels, Limits(), NOW)) * 1e6 / labels.height,
        "seeds": len(seeds),
        "sweep": sweep,
    }


if __name__ == "__main__":
    finish(run(QUICK))
