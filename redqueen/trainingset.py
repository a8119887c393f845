"""From gold labels, features and texts to the rows a detector is trained on. Pure; reading is the asset's
part.

A row is one labelled message with a soft target per policy (`p_<policy>`), a weight, a near-duplicate group,
the chance with which it was kept where the set had to be thinned, what results are sliced by, and the
features `f_<name>` as they were when it happened. An event without text is a message without words.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import polars as pl

from redqueen import text
from redqueen.campaigns import near_duplicates
from redqueen.store import Blob, ObjectStore

IMMATURE_WEIGHT = 0.5
"""An event whose labels are still coming in counts for half."""

HARD_EXAMPLE_WEIGHT = 0.5
"""A machine-made variant teaches the trick, not the traffic: it must not outweigh what people really sent."""

ABUSE_SHARE = 0.5
"""Abuse is thinned only where it is more than this share of a full set."""

FRESH_SHARE = 0.25
"""At least this share of the benign rows kept are the newest there are: what is normal drifts too."""

SLOTS = 64
"""Spans of time, equally long, that older benign rows are thinned evenly over: one loud day is one day."""

SLICED_BY: dict[str, pl.DataType | type[pl.DataType]] = {
    "language": pl.String,
    "account_age_days": pl.Float32,
    "community_size": pl.Int32,
}
"""Columns of a row that nothing learns from: results are reported by them. Null where they are not known."""


@dataclass(frozen=True)
class TrainingSet:
    """The rows, and what a person wants to know about them."""

    rows: pl.DataFrame
    digest: str
    n_abuse: dict[str, int]
    n_benign: int
    n_hard: int
    families: int
    """Near-duplicate groups."""
    largest_family: int
    thinned: int
    """Benign rows left out."""
    thinned_abuse: int


def columns(policies: tuple[str, ...], feature_names: tuple[str, ...]) -> list[str]:
    """The columns of a training set, in their order."""
    targets, features = (f"p_{p}" for p in policies), (f"f_{name}" for name in feature_names)
    return ["event_id", "ts", "text", *SLICED_BY, *targets, "weight", "inclusion", "group", *features]


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
    """Join, weight, group and thin.

    Args:
        gold: table `gold`, one row an event and policy.
        events: table `events`.
        features: `event_id` and one float32 column a feature.
        hard_examples: `event_id` of the original and the `text` that worked against a detector; may be empty.
        policies: the label columns, in this order.
        feature_names: the feature columns to carry, in this order.
        max_rows: above it the set is thinned, see `_thin`.

    Returns:
        Rows sorted by time, and a digest that is equal exactly when the rows are.
    """
    wide = _targets(gold, policies)
    rows = (
        events.select("event_id", "ts", pl.col("text").fill_null(""), *_sliced_by(events))
        .join(wide, on="event_id", how="inner")
        .join(features.select("event_id", *feature_names), on="event_id", how="inner")
        .rename({name: f"f_{name}" for name in feature_names})
    )
    rows = pl.concat([rows, _hard_rows(rows, hard_examples)], how="vertical").sort("ts", "event_id", "text")
    rows = rows.with_columns(_group(rows))
    is_abuse = pl.max_horizontal(f"p_{p}" for p in policies) >= 0.5
    kept = _thin(rows, is_abuse, max_rows).select(columns(policies, feature_names))
    kept = kept.sort("ts", "event_id", "text")
    return TrainingSet(
        rows=kept,
        digest=digest(kept),
        n_abuse={p: int((kept[f"p_{p}"] >= 0.5).sum()) for p in policies},
        n_benign=kept.filter(~is_abuse).height,
        n_hard=int((kept["event_id"].str.starts_with("hard:")).sum()),
        families=kept["group"].n_unique(),
        largest_family=max(kept["group"].value_counts()["count"].to_list(), default=0),
        thinned=rows.filter(~is_abuse).height - kept.filter(~is_abuse).height,
        thinned_abuse=rows.filter(is_abuse).height - kept.filter(is_abuse).height,
    )


def digest(rows: pl.DataFrame) -> str:
    """What names a training set: equal exactly when the columns, the rows and their order are."""
    columns = json.dumps([[name, str(kind)] for name, kind in rows.schema.items()]).encode()
    return hashlib.sha256(columns + rows.hash_rows(seed=1).to_numpy().tobytes()).hexdigest()[:16]


def instant(record: Mapping[str, Any]) -> datetime:
    """The instant that a candidate's snapshot is as of."""
    return datetime.fromisoformat(record["as_of"])


# -- what it is made from ------------------------------------------------------------------------------------


class _Recording:
    """A store that notes the sha256 of every object that is read through it."""

    def __init__(self, store: ObjectStore) -> None:
        self._store, self.digests = store, dict[str, str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def get(self, key: str) -> Blob:
        blob = self._store.get(key)
        self.digests[key] = hashlib.sha256(blob.data).hexdigest()
        return blob


def recording(store: ObjectStore) -> tuple[ObjectStore, dict[str, str]]:
    """A view of `store`, and the sha256 of what was read through it, by key, as it is read."""
    recorder = _Recording(store)
    return cast("ObjectStore", recorder), recorder.digests


def provenance(digests: Mapping[str, str], **settings: Any) -> dict[str, Any]:
    """What a training set was made from: every object read, the settings, and one digest over both.

    Equal inputs have equal digests, whatever the order in which they were read.
    """
    inputs = [{"key": key, "sha256": digests[key]} for key in sorted(digests)]
    made_from = {"settings": settings, "inputs": inputs}
    told = json.dumps(made_from, sort_keys=True, default=str).encode()
    return {"digest": hashlib.sha256(told).hexdigest()[:16], **made_from}


def lessons(
    keys: Iterable[str], candidates: Iterable[Mapping[str, Any]], candidate: str, as_of: datetime
) -> list[str]:
    """The keys of hard examples that `candidate` may learn from: those found by `as_of`, and not its own.

    A lap that is run again would otherwise find what its own attack left, and no longer its own snapshot.

    Args:
        keys: `hard_examples/v=<candidate>/...`.
        candidates: records of all candidates; the examples of one that has none were put there by hand.
    """
    attacked = {record["candidate"]: _attacks(record.get("history", ())) for record in candidates}

    def known(key: str) -> bool:
        by = key.split("/")[1].removeprefix("v=")
        return by != candidate and (by not in attacked or any(at <= as_of for at in attacked[by]))

    return [key for key in keys if key.endswith(".parquet") and known(key)]


def _attacks(history: Sequence[Mapping[str, Any]]) -> list[datetime]:
    """When a candidate was attacked: it held, or was rejected although its evaluation had passed it."""
    before = [None, *(move["status"] for move in history)]
    return [
        datetime.fromisoformat(move["at"])
        for move, earlier in zip(history, before, strict=False)
        if move["status"] == "attacked" or (move["status"], earlier) == ("rejected", "evaluated")
    ]


# -- rows ----------------------------------------------------------------------------------------------------


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


def _sliced_by(events: pl.DataFrame) -> list[pl.Expr]:
    """`SLICED_BY` from the columns of an event, as far as they are there and known."""
    language, born, size = (
        pl.col(name) if name in events.columns else pl.lit(None)
        for name in ("language", "account_created_at", "community_size")
    )
    moment, time = pl.col("ts"), pl.Datetime("us", "UTC")
    found = {
        "language": pl.when(language != "und").then(language),
        "account_age_days": (moment.cast(time) - born.cast(time)).dt.total_seconds() / 86_400,
        # An import that does not know how large a community is says 0.
        "community_size": pl.when(size > 0).then(size),
    }
    return [found[name].cast(kind).alias(name) for name, kind in SLICED_BY.items()]


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


# -- near-duplicates -----------------------------------------------------------------------------------------


def _group(rows: pl.DataFrame) -> pl.Series:
    """Near-duplicate families of `rows`, sorted by time; a hard example belongs to the message it was made
    from.

    A family is called by a hash of its first message, so that it keeps its name while it grows from one
    training set to the next: who is held out hangs on the name (`models.dataset.split`), and a champion must
    not have learnt from what it is now judged on.
    """
    canonical = [r.canonical for r in text.read_many(rows["text"].to_list())]
    alike = _with_originals(near_duplicates(canonical), rows["event_id"])
    ids = rows["event_id"].to_list()
    # What people sent comes before what was made of it, also in the same instant.
    sent_first = np.argsort([i.startswith("hard:") for i in ids], kind="stable")
    first, of = np.unique(alike[sent_first], return_index=True)[1], np.unique(alike, return_inverse=True)[1]
    names = [_hash(canonical[i] or f"\0{ids[i]}") for i in sent_first[first].tolist()]
    return pl.Series("group", np.array(names, dtype=np.int64)[of] if names else [], dtype=pl.Int64)


def _with_originals(alike: npt.NDArray[np.int64], ids: pl.Series) -> npt.NDArray[np.int64]:
    """The families, those joined into which a message and what was made of it fell apart."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    places = pl.DataFrame({"id": ids, "family": alike}).with_columns(
        origin=pl.when(pl.col("id").str.starts_with("hard:")).then(pl.col("id").str.strip_prefix("hard:"))
    )
    made = places.drop_nulls("origin").join(places, left_on="origin", right_on="id", how="inner")
    if made.is_empty():
        return alike
    a, b = made["family"].to_numpy(), made["family_right"].to_numpy()
    size = int(alike.max()) + 1
    graph = coo_array((np.ones(a.size, dtype=np.int8), (a, b)), shape=(size, size))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)[alike]


def _hash(said: str) -> int:
    found = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


# -- thinning ------------------------------------------------------------------------------------------------


def _thin(rows: pl.DataFrame, is_abuse: pl.Expr, max_rows: int) -> pl.DataFrame:
    """At most `max_rows` of `rows`, by hash so that a re-run agrees, with `inclusion`: the share of their
    likes that was kept, which judging weighs by.

    Abuse is kept whole up to `ABUSE_SHARE` of the set, or more where there is little else. Beyond that each
    near-duplicate family gives up what it has more of than others, so old campaigns stay. Of benign rows the
    newest stay (`FRESH_SHARE`), the others evenly over all history.
    """
    order = [_hash(f"{i}\0{said}") for i, said in rows.select("event_id", "text").iter_rows()]
    rows = rows.with_columns(order=pl.Series(order, dtype=pl.Int64))
    abuse, benign = rows.filter(is_abuse), rows.filter(~is_abuse)
    allowed = max(int(max_rows * ABUSE_SHARE), max_rows - benign.height)
    abuse = _deal(abuse, pl.col("group"), allowed)
    keep = min(max(0, max_rows - abuse.height), benign.height)
    # Enough of the newest, were they alone; then the older ones.
    fresh = benign.height if keep == benign.height else int(np.ceil(FRESH_SHARE * keep))
    newest, older = benign.tail(fresh), benign.head(benign.height - fresh)
    span = pl.col("ts").max() - pl.col("ts").min()
    slot = (SLOTS * (pl.col("ts") - pl.col("ts").min()) / (span + pl.duration(microseconds=1))).floor()
    return pl.concat([abuse, _whole(newest), _deal(older, slot, keep - fresh)]).drop("order")


def _whole(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.with_columns(inclusion=pl.lit(1.0, pl.Float32))


def _deal(rows: pl.DataFrame, stratum: pl.Expr, keep: int) -> pl.DataFrame:
    """`keep` of `rows`, one from each stratum in turn until it has no more; within a stratum by `order`."""
    if rows.height <= keep:
        return _whole(rows)
    dealt = (
        rows.with_columns(stratum=stratum)
        .sort("order")
        .with_columns(turn=pl.int_range(pl.len()).over("stratum"), there=pl.len().over("stratum"))
        .sort("turn", "order")
        .head(keep)
    )
    share = (pl.len().over("stratum") / pl.col("there")).cast(pl.Float32)
    return dealt.with_columns(inclusion=share).drop("stratum", "turn", "there")
