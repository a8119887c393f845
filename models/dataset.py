"""The messages of a training run and who learns from which: read once, held, and cut by time.

Which labels make a training set is decided before, in `redqueen.trainingset`; what is learnt, in
`models.training`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from models.tokens import View, views
from models.train import TrainingSpec
from redqueen.errors import InvalidInput

Rows = npt.NDArray[np.int64]

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

LEAST_WORDS = 3

NEWEST = 0.2
"""Share of the messages, the newest, that the rehearsal is judged on."""

FORWARD = (0.5, 0.75)
"""Where the older messages are cut besides: linear model and trees learn from those before a cut and predict
those up to the next one."""

HELD_BENIGN, HELD_ABUSE = 0.15, 0.10
"""Shares of near-duplicate groups held for calibration. Thresholds need many benign messages; abuse is dear.
"""

MOST_HELD_BENIGN, MOST_HELD_ABUSE = 4_000, 500
"""About so many messages at most: they tell recall to two points and a false-positive share of 1% to a third
of it, and what is held beyond that is missed in learning (a point of recall on campaigns that are new)."""

FAMILIES_VOUCHING, MOST_VOUCHING = 340, 0.2
"""So many groups of abuse must be held for a first stage to be vouched for (299, `models.cascade`, and a few
that the whole model misses): a larger share of a small set is held for that, but never more than this one."""

LARGEST_HELD = 40
"""Messages of the largest group that may be held. A campaign that floods the platform must be learnt from,
whatever the draw says, and a hundred copies held are one message to calibrate on."""


@dataclass(frozen=True)
class Dataset:
    """A training set in memory, sorted by time; rows line up across the fields, `sent_at` in microseconds.

    `weight` is what a message weighs in learning, `stands_for` in judging: a message that was kept where
    others like it were left out speaks for those too.
    """

    event_ids: list[str]
    sent_at: Rows
    texts: list[str]
    views: list[View]
    targets: npt.NDArray[np.float32]
    weight: npt.NDArray[np.float32]
    stands_for: npt.NDArray[np.float64]
    group: Rows
    synthetic: npt.NDArray[np.bool_]
    features: npt.NDArray[np.float32] | None

    @property
    def canonical(self) -> list[str]:
        """The canonical texts."""
        return [v.canonical for v in self.views]

    @property
    def wordless(self) -> npt.NDArray[np.bool_]:
        """Messages in which there is nothing to read."""
        return np.array([not v.canonical for v in self.views], dtype=bool)

    @property
    def talked(self) -> npt.NDArray[np.bool_]:
        """Messages of some words. What has fewer is a name or an address: an attacker spells it otherwise
        and does not talk around it.
        """
        return np.array([len(v.canonical.split()) >= LEAST_WORDS for v in self.views], dtype=bool)

    @property
    def abusive(self) -> npt.NDArray[np.bool_]:
        """Messages that are more likely abuse than not."""
        return np.asarray(self.targets.max(1) >= 0.5)


def load(spec: TrainingSpec) -> Dataset:
    """Read the dataset of a spec.

    Raises:
        InvalidInput: a column is missing, or there are too few rows to learn from.
    """
    needed = [
        *("event_id", "ts", "text", "weight", "group"),
        *(f"p_{p}" for p in spec.policies),
        *(f"f_{f}" for f in spec.feature_names),
    ]
    table = pl.read_parquet(spec.dataset)
    if missing := [c for c in needed if c not in table.columns]:
        raise InvalidInput(
            f"{spec.dataset} has no column '{missing[0]}': build the training set for these policies"
        )
    if "inclusion" not in table.columns:
        table = table.with_columns(inclusion=pl.lit(1.0))
    table = table.select(*needed, "inclusion").drop_nulls(["text", "ts"]).sort("ts", "event_id", "text")
    if table.height < 50:
        raise InvalidInput(f"{spec.dataset} has {table.height} messages: at least 50 are needed to train")
    matrix = (
        table.select([f"f_{f}" for f in spec.feature_names]).cast(pl.Float32) if spec.feature_names else None
    )
    return Dataset(
        event_ids=table["event_id"].to_list(),
        sent_at=table["ts"].dt.epoch("us").to_numpy(),
        texts=table["text"].to_list(),
        views=views(table["text"].to_list()),
        targets=table.select([f"p_{p}" for p in spec.policies])
        .fill_null(0)
        .cast(pl.Float32)
        .to_numpy(order="c"),
        weight=table["weight"].fill_null(1).cast(pl.Float32).to_numpy(),
        stands_for=(table["weight"].fill_null(1).cast(pl.Float64) / table["inclusion"]).to_numpy(),
        group=_families(table),
        synthetic=table["event_id"].str.starts_with("hard:").to_numpy(),
        features=None if matrix is None else _finite(matrix.to_numpy()),
    )


def _finite(features: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """An infinite value says no more than that it is not known."""
    return np.ascontiguousarray(np.where(np.isinf(features), np.float32(np.nan), features))


def _families(table: pl.DataFrame) -> Rows:
    """Near-duplicate groups, a hard example counted to the message that it was made from."""
    own = table.select(pl.col("event_id"), pl.col("group").cast(pl.Int64))
    origin = own.unique("event_id", keep="first").rename({"group": "origin"})
    joined = own.with_columns(pl.col("event_id").str.strip_prefix("hard:")).join(
        origin, on="event_id", how="left", maintain_order="left"
    )
    return joined.select(pl.coalesce("origin", "group")).to_series().to_numpy()


@dataclass(frozen=True)
class Split:
    """Which rows do what; all sorted by time. `judged` is the later, unrelated part of `newest`.

    `held_weight` is what each held message stands for in the traffic; `rates` are the shares of benign and of
    abusive groups that are held. With the same seed a set holds what another one holds at lower rates.
    """

    older: Rows
    newest: Rows
    judged: Rows
    held: Rows
    held_weight: npt.NDArray[np.float64]
    rates: tuple[float, float]

    @property
    def everything(self) -> Rows:
        """All rows that the refresh learns from."""
        return np.concatenate([self.older, self.newest])


def split(data: Dataset, seed: int) -> Split:
    """Hold whole near-duplicate groups, none of the largest, then cut the rest by time."""
    draw = _uniform(data.group, seed)
    groups, inverse, size = np.unique(data.group, return_inverse=True, return_counts=True)
    has_abuse = np.bincount(inverse, data.abusive, len(groups))[inverse] > 0
    n_abuse = max(1, int(has_abuse.sum()))
    n_benign = max(1, len(has_abuse) - n_abuse)
    families = max(1, len(np.unique(data.group[has_abuse & (size[inverse] <= LARGEST_HELD)])))
    vouching = FAMILIES_VOUCHING / families
    rates = (
        min(HELD_BENIGN, MOST_HELD_BENIGN / n_benign),
        max(min(HELD_ABUSE, MOST_HELD_ABUSE / n_abuse), vouching if vouching <= MOST_VOUCHING else 0.0),
    )
    rate = np.where(has_abuse, rates[1], rates[0])
    held_group = (draw < rate) & (size[inverse] <= LARGEST_HELD)
    held = np.flatnonzero(held_group & ~data.synthetic)
    rest = np.flatnonzero(~held_group)
    at = int(len(rest) * (1 - NEWEST))
    older, newest = rest[:at], rest[at:]
    # Each kind of group stands for those of its kind that were not held.
    weight = data.stands_for[held] / rate[held]
    return Split(older, newest, _unrelated(data, newest, older), held, weight, rates)


def not_learnt_by(
    training: Mapping[str, Any],
    sent_at: Rows,
    group: Rows,
    abusive: npt.NDArray[np.bool_],
) -> npt.NDArray[np.bool_]:
    """bool [n]: the messages of a training set that an earlier model has not learnt from: of groups that it
    held, or newer than it and of no group that it knew. Where a later message joined two groups, which have
    one name then, it may have known the other one.

    Args:
        training: what the earlier model's metrics tell of its training. Where that is not enough, it may have
            learnt from anything.
        sent_at, group, abusive: of all messages [n] of the set.
    """
    seed, rates, until = (training.get(name) for name in ("seed", "held_rates", "until"))
    if seed is None or until is None or not rates:
        return np.zeros(len(group), bool)
    _, inverse = np.unique(group, return_inverse=True)
    has_abuse = np.bincount(inverse, abusive)[inverse] > 0
    held = _uniform(group, int(seed)) < np.where(has_abuse, rates[1], rates[0])
    return np.asarray(held | unheard_of(sent_at, group, micros(until)))


def unheard_of(sent_at: Rows, group: Rows, until: int) -> npt.NDArray[np.bool_]:
    """bool [n]: the messages newer than `until`, in microseconds, of groups in which nothing is older."""
    new = sent_at > until
    return np.asarray(new & ~np.isin(group, group[~new]))


def micros(instant: str) -> int:
    """An ISO instant in microseconds since the epoch."""
    return (datetime.fromisoformat(instant) - EPOCH) // timedelta(microseconds=1)


def forward(data: Dataset, older: Rows) -> list[tuple[Rows, Rows]]:
    """Pairs of rows, those to learn from and later ones to predict, that share no near-duplicates."""
    ends = [*(int(len(older) * share) for share in FORWARD), len(older)]
    pairs = [(older[:at], older[at:end]) for at, end in pairwise(ends)]
    return [(known, _unrelated(data, later, known)) for known, later in pairs]


def _unrelated(data: Dataset, later: Rows, known: Rows) -> Rows:
    """Those of `later` that people sent and that are no near-duplicates of what is `known`."""
    return later[~np.isin(data.group[later], data.group[known]) & ~data.synthetic[later]]


def _uniform(keys: Rows, seed: int) -> npt.NDArray[np.float64]:
    """A number in [0, 1) per key, the same wherever the key appears (splitmix64)."""
    z = keys.astype(np.uint64) + np.uint64((seed * 2 + 1) * 0x9E3779B97F4A7C15 % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((z ^ (z >> np.uint64(31))) / 2.0**64)
