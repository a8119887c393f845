"""From gold labels, features and texts to the rows a detector is trained on. Pure; reading is the asset's
part.

A row is one labelled message with a soft target per policy (`p_<policy>`), a weight, a near-duplicate group,
and the features `f_<name>` as they were when it happened.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import polars as pl

from redqueen import text

IMMATURE_WEIGHT = 0.5
"""An event whose labels are still coming in counts for half."""

HARD_EXAMPLE_WEIGHT = 0.5
"""A machine-made variant teaches the trick, not the traffic: it must not outweigh what people really sent."""


@dataclass(frozen=True)
class TrainingSet:
    """The rows, and what a person wants to know about them."""

    rows: pl.DataFrame
    digest: str
    n_abuse: dict[str, int]
    n_benign: int
    n_hard: int
    thinned: int


def build(
    gold: pl.DataFrame,
    events: pl.DataFrame,
    features: pl.DataFrame,
    hard_examples: pl.DataFrame,
    *,
    policies: tuple[str, ...],
    feature_names: tuple[str, ...],
    max_rows: int,
) -> TrainingSet:
    """Join, weight and thin.

    Args:
        gold: table `gold`, one row an event and policy.
        events: table `events`; only rows with a text are used.
        features: `event_id` and one float32 column a feature.
        hard_examples: `event_id` of the original and the `text` that worked against a detector; may be empty.
        policies: the label columns, in this order.
        feature_names: the feature columns to carry, in this order.
        max_rows: above it benign rows are thinned, evenly over time; abuse is always kept.

    Returns:
        Rows sorted by time, and a digest that is equal exactly when the rows are.
    """
    wide = _targets(gold, policies)
    rows = (
        events.filter(pl.col("text").is_not_null())
        .select("event_id", "ts", "text")
        .join(wide, on="event_id", how="inner")
        .join(features.select("event_id", *feature_names), on="event_id", how="inner")
        .rename({name: f"f_{name}" for name in feature_names})
    )
    rows = pl.concat([rows, _hard_rows(rows, hard_examples)], how="vertical")
    rows, thinned = _thin(rows, policies, max_rows)
    rows = rows.with_columns(_group(rows["text"])).sort("ts", "event_id", "text")
    is_abuse = pl.max_horizontal(f"p_{p}" for p in policies) >= 0.5
    return TrainingSet(
        rows=rows,
        digest=digest(rows),
        n_abuse={p: int((rows[f"p_{p}"] >= 0.5).sum()) for p in policies},
        n_benign=rows.filter(~is_abuse).height,
        n_hard=int((rows["event_id"].str.starts_with("hard:")).sum()),
        thinned=thinned,
    )


def digest(rows: pl.DataFrame) -> str:
    """What names a training set: equal exactly when the rows and their order are."""
    return hashlib.sha256(rows.hash_rows(seed=1).to_numpy().tobytes()).hexdigest()[:16]


def instant(record: Mapping[str, Any]) -> datetime:
    """The instant that a candidate's snapshot is as of."""
    return datetime.fromisoformat(record["as_of"])


def _targets(gold: pl.DataFrame, policies: tuple[str, ...]) -> pl.DataFrame:
    """One row an event: `p_<policy>` (0 where nobody spoke of the policy) and `weight`."""
    columns = [
        pl.col("p_abuse").filter(pl.col("policy") == p).max().fill_null(0.0).cast(pl.Float32).alias(f"p_{p}")
        for p in policies
    ]
    weight = (
        pl.when(pl.col("mature").all()).then(1.0).otherwise(IMMATURE_WEIGHT).cast(pl.Float32).alias("weight")
    )
    return gold.group_by("event_id").agg(*columns, weight)


def _hard_rows(rows: pl.DataFrame, hard_examples: pl.DataFrame) -> pl.DataFrame:
    """Each hard example takes targets and features of the message it was made from."""
    if hard_examples.is_empty():
        return rows.clear()
    originals = rows.drop("text").unique("event_id")
    return (
        hard_examples.select("event_id", "text")
        # The same rewriting beats one detector after the other: it is one lesson all the same.
        .unique(maintain_order=True)
        .join(originals, on="event_id", how="inner")
        .with_columns(
            ("hard:" + pl.col("event_id")).alias("event_id"),
            pl.lit(HARD_EXAMPLE_WEIGHT, dtype=pl.Float32).alias("weight"),
        )
        .select(rows.columns)
    )


def _thin(rows: pl.DataFrame, policies: tuple[str, ...], max_rows: int) -> tuple[pl.DataFrame, int]:
    """Keep all abuse and an even share of the benign rows, chosen by hash so that a re-run agrees."""
    surplus = rows.height - max_rows
    if surplus <= 0:
        return rows, 0
    abuse = pl.max_horizontal(f"p_{p}" for p in policies) >= 0.5
    benign = rows.filter(~abuse)
    keep = max(0, benign.height - surplus)
    order = pl.Series(
        "order", [hashlib.blake2b(e.encode(), digest_size=8).digest() for e in benign["event_id"].to_list()]
    )
    kept = benign.with_columns(order).sort("order").head(keep).drop("order")
    return pl.concat([rows.filter(abuse), kept]), benign.height - keep


def _group(texts: pl.Series) -> pl.Series:
    """Near-duplicate groups: equal fingerprints of the canonical text."""
    fingerprints = [text.simhash(text.canonicalise(t)) for t in texts.to_list()]
    return pl.Series("group", fingerprints, dtype=pl.Int64)
