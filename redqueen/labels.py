"""From votes to truth: what the labels known at an instant say about each event, as a probability.

Labels come in late, disagree, and some are hostile. Here they become gold labels: as of an instant of
`received_at` (nothing that arrived later may count), one vote a rater, weighed by how reliable rater and
source have proved on that policy. The arithmetic is `redqueen.aggregation`'s; keeping what was learnt, so
that a day's labels do not recompute a year, is `redqueen.truth`'s. Reading and writing tables is the assets'
business; what becomes of gold labels is training's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property

import numpy as np
import polars as pl

from redqueen.aggregation import (
    RELIABILITY,
    TRUSTED,
    Ballot,
    Codes,
    Floats,
    Fusion,
    Tally,
    fit,
    interval,
    logit,
    settle,
)
from redqueen.schema import ANY_POLICY, LABEL_SOURCES, polars_schema

__all__ = ["GOLD_SCHEMA", "MATURITY_HOURS", "RELIABILITY", "TRUSTED", "Fusion", "delays", "gold", "known"]

MATURITY_HOURS = 24.0

GOLD_SCHEMA = polars_schema("gold")

ITEM_SCHEMA: dict[str, pl.DataType] = {
    "event_id": pl.String(),
    "policy": pl.String(),
    "p_abuse": pl.Float64(),
    "n_votes": pl.Int32(),
    "disagreement": pl.Float64(),
    "first_labeled_at": pl.Datetime("us", "UTC"),
    "first_received_at": pl.Datetime("us", "UTC"),
    "trusted": pl.Boolean(),
    "sources": pl.List(pl.String()),
}
"""A judged (event, policy), before it is asked whether it is mature: that depends on the instant alone."""

ROW_SCHEMA: dict[str, pl.DataType] = {
    "label_id": pl.String(),
    "event_id": pl.String(),
    "policy": pl.String(),
    "source": pl.String(),
    "rater_id": pl.String(),
    "abuse": pl.Boolean(),
    "weight": pl.Float64(),
    "guard": pl.Float64(),
    "labeled_at": pl.Datetime("us", "UTC"),
    "received_at": pl.Datetime("us", "UTC"),
}
"""What a label says about one policy; `abuse` is null where it says nothing ("unsure", a policy we lack).
`weight` is the label's own, `guard` what the poisoning guard leaves of it.
"""

RECORD_SCHEMA: dict[str, pl.DataType] = {
    "policy": pl.String(),
    "source": pl.String(),
    "rater_id": pl.String(),
    "benign_seen": pl.Float64(),
    "benign_agreed": pl.Float64(),
    "abuse_seen": pl.Float64(),
    "abuse_agreed": pl.Float64(),
    "votes": pl.Float64(),
    "contradicted": pl.Float64(),
}
"""A rater's confusion on one policy: by what was said, how much others could tell of such votes and how much
of that fell on the truth that was said (see `aggregation.Tally`; the rest fell on the other). And the weight
of the votes that others could judge, with what their verdict contradicts.
"""

COUNTED = ("seen", "agreed", "contradicted")
"""How a vote was counted, see `aggregation.Outcome`."""

AIMED = ("moderator", "appeal")
"""Sources that look where a score pointed, or where it led to an action: review requests near a threshold,
and the appeals of those who were acted on."""

WHOSE = ["event_id", "policy", "source", "rater_id"]
SUMS = list(RECORD_SCHEMA)[3:]
_RATER = ["policy", "source", "rater_id"]


def gold(
    labels: pl.DataFrame,
    as_of: datetime,
    policies: Sequence[str],
    *,
    maturity_hours: float | Mapping[str, float] = MATURITY_HOURS,
    events: pl.DataFrame | None = None,
    fusion: Fusion | None = None,
    weights: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """The gold labels as known at `as_of`, one row an (event, policy) that anyone voted on, sorted by both.

    Args:
        labels: rows of the labels table, any order; copies of a label count once.
        as_of: labels received later do not exist, whatever their `labeled_at`.
        policies: a benign vote under "any" counts for each of these; votes on other policies are left out.
            An abuse vote says nothing about the policies it does not name.
        maturity_hours: an event older than this is mature, or one that a trusted source voted on; one number,
            or one a policy.
        events: `event_id, ts` of the events, where at hand. Without them an event counts as old as its first
            received label, so it matures late, never early.
        fusion: how votes are weighed.
        weights: `label_id, weight` of labels that the poisoning guard holds (0) or discounts; others count 1.

    Returns:
        The gold schema. `p_abuse` is in (0, 1), 0.5 where votes cancel out; `n_votes` counts raters;
        `disagreement` is the share of the votes' weight on the side that lost; "unsure" is no vote.
    """
    how = fusion or Fusion()
    if not labels.height:
        return pl.DataFrame(schema=GOLD_SCHEMA)
    votes = elect(guarded(spread(known(labels, as_of), policies, how), weights))
    return ripe(judge(votes, how).items, as_of, maturity_hours, events)


def unaimed(labels: pl.DataFrame) -> pl.DataFrame:
    """The labels that came to be whatever a model's score was; an hour without any may have no columns."""
    return labels if labels.is_empty() else labels.filter(~pl.col("source").is_in(AIMED))


def known(labels: pl.DataFrame, as_of: datetime) -> pl.DataFrame:
    """The labels received by `as_of`, each label_id once, as it was first received."""
    received = labels.filter(pl.col("received_at") <= as_of)
    if not received["label_id"].is_duplicated().any():
        return received
    order = [
        "label_id",
        "received_at",
        "labeled_at",
        "value",
        "policy",
        "source",
        "rater_id",
        "event_id",
        "confidence",
    ]
    return received.sort(order).unique("label_id", keep="first", maintain_order=True)


def spread(labels: pl.DataFrame, policies: Sequence[str], how: Fusion) -> pl.DataFrame:
    """One row a label and policy it speaks of (`ROW_SCHEMA`), with the weight the label has by itself.

    Args:
        labels: as `known` gives them; whole hours of arrival, since a rater's haste is counted by the hour.
    """
    said = pl.col("value").replace_strict(
        {"abuse": True, "benign": False}, default=None, return_dtype=pl.Boolean
    )
    heard = labels.with_columns(weight=_weight(how), guard=pl.lit(1.0), abuse=said).with_columns(
        abuse=pl.when(pl.col("source").is_in(list(LABEL_SOURCES))).then("abuse")
    )
    everywhere = (pl.col("policy") == ANY_POLICY) & ~pl.col("abuse")
    everywhere = everywhere.fill_null(False)
    for_each = pl.DataFrame({"policy": list(policies)}, schema={"policy": pl.String})
    of_all = heard.filter(everywhere).drop("policy").join(for_each, how="cross")
    ours = pl.col("policy").is_in(list(policies))
    named = heard.filter(~everywhere).with_columns(abuse=pl.when(ours).then("abuse"))
    columns = list(ROW_SCHEMA)
    return pl.concat([named.select(columns), of_all.select(columns)]).cast(ROW_SCHEMA)  # type: ignore[arg-type]


def guarded(rows: pl.DataFrame, weights: pl.DataFrame | None) -> pl.DataFrame:
    """`rows` with the weight that the poisoning guard leaves each label: `label_id, weight`, others 1."""
    if weights is None or weights.is_empty():
        return rows.with_columns(guard=pl.lit(1.0))
    least = weights.group_by("label_id").agg(guard=pl.col("weight").min().cast(pl.Float64))
    told = rows.drop("guard").join(least, on="label_id", how="left", maintain_order="left")
    return told.with_columns(pl.col("guard").fill_null(1.0).clip(0.0, 1.0)).select(rows.columns)


def elect(rows: pl.DataFrame) -> pl.DataFrame:
    """The votes among `rows`: one a rater, event and policy (the rater's latest that is not held).

    Sorted by event, policy, source and rater: sums of floats depend on their order, and the result must not
    depend on the rows'.
    """
    votes = rows.filter(pl.col("abuse").is_not_null() & (pl.col("guard") > 0))
    votes = votes.with_columns(weight=pl.col("weight") * pl.col("guard"))
    ordered = votes.sort(*WHOSE, "received_at", "labeled_at", "label_id", "abuse")
    return ordered.unique(WHOSE, keep="last", maintain_order=True)


@dataclass(frozen=True)
class Judged:
    """What became of votes.

    items: `ITEM_SCHEMA`, one row an (event, policy), sorted.
    votes: the votes in the order they came, with `COUNTED`, null where nobody may judge the vote.
    """

    items: pl.DataFrame
    votes: pl.DataFrame


def judge(votes: pl.DataFrame, how: Fusion, learnt: Learnt | None = None) -> Judged:
    """Fuse votes, as `elect` gives them: with what was `learnt`, else learning from these very votes."""
    if not votes.height:
        blank = votes.with_columns(pl.lit(None, pl.Float64).alias(name) for name in COUNTED)
        return Judged(pl.DataFrame(schema=ITEM_SCHEMA), blank)
    items = (
        votes.group_by("event_id", "policy", maintain_order=True)
        .agg(
            n_votes=pl.len().cast(pl.Int32),
            first_labeled_at=pl.col("labeled_at").min(),
            first_received_at=pl.col("received_at").min(),
            trusted=pl.col("source").is_in(list(TRUSTED)).any(),
            sources=pl.col("source").unique().sort(),
            weight=pl.col("weight").sum(),
            against=pl.col("weight").filter(~pl.col("abuse")).sum(),
        )
        .with_row_index("item")
    )
    ballot, empty = _coded(votes, items, learnt or Learnt.nothing(shared(items)), how)
    outcome = fit(ballot, empty, how) if learnt is None else settle(ballot, empty, how)
    lost = pl.when(pl.col("p_abuse") >= 0.5).then("against").otherwise(pl.col("weight") - pl.col("against"))
    told = items.with_columns(p_abuse=pl.Series(outcome.p)).with_columns(
        disagreement=pl.when(pl.col("weight") > 0).then(lost / pl.col("weight")).otherwise(0.0).clip(0.0, 1.0)
    )
    told = told.select(pl.col(name).cast(kind) for name, kind in ITEM_SCHEMA.items())
    counts = {name: pl.Series(getattr(outcome, name)).fill_nan(None) for name in COUNTED}
    return Judged(told, votes.with_columns(**counts))


def ripe(
    items: pl.DataFrame,
    as_of: datetime,
    maturity_hours: float | Mapping[str, float],
    events: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """`items` as gold labels at `as_of`: whether each is mature by then."""
    happened = pl.col("first_received_at")
    frame = items
    if events is not None and events.height:
        when = events.group_by("event_id").agg(pl.col("ts").min())
        frame = frame.join(when, on="event_id", how="left", maintain_order="left")
        happened = pl.coalesce("ts", "first_received_at")
    hours = (
        pl.col("policy").replace_strict(dict(maturity_hours), default=MATURITY_HOURS, return_dtype=pl.Float64)
        if isinstance(maturity_hours, Mapping)
        else pl.lit(float(maturity_hours))
    )
    age = pl.lit(as_of).cast(pl.Datetime("us", "UTC")) - happened
    aged = age.dt.total_microseconds() >= hours * 3.6e9
    told = frame.with_columns(mature=aged | pl.col("trusted"))
    return told.select(pl.col(name).cast(kind) for name, kind in GOLD_SCHEMA.items())


# -- what raters have proved -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learnt:
    """What is known of raters: their records (`RECORD_SCHEMA`), and by policy how many events two or more
    sources judged.
    """

    records: pl.DataFrame
    shared: Mapping[str, int]

    @classmethod
    def nothing(cls, shared: Mapping[str, int]) -> Learnt:
        return cls(pl.DataFrame(schema=RECORD_SCHEMA), shared)

    @classmethod
    def of(cls, judged: Judged) -> Learnt:
        return cls(records(judged.votes), shared(judged.items))

    def moved(self, before: Judged, after: Judged) -> Learnt:
        """With the counts of some events taken out as they were and put in as they are now."""
        out = records(before.votes).with_columns(-pl.col(SUMS))
        change = _summed(pl.concat([out, records(after.votes)]))
        kept = self.records.join(change, on=_RATER, how="left", maintain_order="left", suffix="_by")
        kept = kept.select(*_RATER, *(pl.col(n) + pl.col(f"{n}_by").fill_null(0.0) for n in SUMS))
        new = change.join(self.records, on=_RATER, how="anti", maintain_order="left")
        less, more = shared(before.items), shared(after.items)
        names = sorted({*self.shared, *less, *more})
        return Learnt(
            pl.concat([kept, new]),
            {name: self.shared.get(name, 0) - less.get(name, 0) + more.get(name, 0) for name in names},
        )

    @cached_property
    def standing(self) -> pl.DataFrame:
        """The records of each policy and source, added up."""
        return self.records.group_by("policy", "source").agg(pl.col(SUMS).sum()).sort("policy", "source")

    def tally(self, raters: pl.DataFrame, policies: Sequence[str]) -> Tally:
        """As arrays: the records of `raters` (`policy, source, rater_id`), in their order, empty ones too."""
        own = raters.join(self.records, on=_RATER, how="left", maintain_order="left")
        sources, groups = len(LABEL_SOURCES), len(policies) * len(LABEL_SOURCES)
        place = _codes(self.standing["policy"], policies) * sources + _codes(
            self.standing["source"], LABEL_SOURCES
        )
        standing = np.zeros((2, 2, groups))
        standing[:, :, place] = _counts(self.standing)
        seen, agreed = _counts(own)
        return Tally(
            _codes(raters["policy"], policies),
            _codes(raters["source"], LABEL_SOURCES),
            seen,
            agreed,
            standing[0],
            standing[1],
            np.array([float(self.shared.get(name, 0)) for name in policies]),
        )

    def policies(self) -> list[str]:
        """The policies that anything is known of."""
        return sorted({*self.shared, *self.standing["policy"]})


def _counts(rows: pl.DataFrame) -> Floats:
    """`[seen or agreed, said, row]` of records."""
    found = [
        [rows[f"{said}_{what}"].fill_null(0.0).to_numpy() for said in ("benign", "abuse")]
        for what in ("seen", "agreed")
    ]
    return np.array(found).reshape(2, 2, rows.height)


def records(votes: pl.DataFrame) -> pl.DataFrame:
    """The records that judged votes add up to."""
    said = {"benign": ~pl.col("abuse"), "abuse": pl.col("abuse")}
    return _summed(
        votes.filter(pl.col("seen").is_not_null()).select(
            *_RATER,
            *(
                pl.when(when).then(pl.col("weight") * pl.col(column)).otherwise(0.0).alias(f"{what}_{column}")
                for what, when in said.items()
                for column in ("seen", "agreed")
            ),
            votes="weight",
            contradicted=pl.col("weight") * pl.col("contradicted"),
        )
    )


def shared(items: pl.DataFrame) -> dict[str, int]:
    """By policy, how many events two or more sources judged."""
    found = items.group_by("policy").agg(n=(pl.col("sources").list.len() > 1).sum()).sort("policy")
    return dict(found.rows())


def _summed(rows: pl.DataFrame) -> pl.DataFrame:
    return rows.group_by(_RATER).agg(pl.col(SUMS).sum()).sort(_RATER)


def source_errors(learnt: Learnt, how: Fusion | None = None) -> pl.DataFrame:
    """Of each policy and source, the share of its votes that the fused truth of the others contradicts.

    "The others" are all other sources; for trusted sources all other trusted raters (see
    `redqueen.aggregation`). They err too, so a good source is contradicted more often than it is wrong:
    `estimated` allows for that.

    Returns:
        policy, source, votes (weight that others could judge), error (the share contradicted) with `low` and
        `high` (95%), estimated (share wrong, as far as all can tell), and `worth_abuse`, `worth_benign`: the
        share of such votes taken to be right, prior included. A source that nobody could judge has no row.
    """
    policies = learnt.policies()
    tally = learnt.tally(pl.DataFrame(schema=dict.fromkeys(_RATER, pl.String)), policies)
    benign, abuse = tally.worth_of_sources(how or Fusion())
    grid = pl.DataFrame({"policy": policies}, schema={"policy": pl.String}).join(
        pl.DataFrame({"source": LABEL_SOURCES}), how="cross", maintain_order="left_right"
    )
    grid = grid.with_columns(worth_abuse=abuse, worth_benign=benign)
    told = grid.join(learnt.standing, on=["policy", "source"], maintain_order="left")
    told = told.filter(pl.col("votes") > 1e-9)
    agreed = pl.col("benign_agreed") + pl.col("abuse_agreed")
    seen = pl.col("benign_seen") + pl.col("abuse_seen")
    low, high = interval(told["contradicted"].to_numpy(), told["votes"].to_numpy())
    return told.select(
        "policy",
        "source",
        "votes",
        error=(pl.col("contradicted") / pl.col("votes")).clip(0.0, 1.0),
        low=low,
        high=high,
        estimated=pl.when(seen > 1e-9).then((1.0 - agreed / seen).clip(0.0, 1.0)),
        worth_abuse="worth_abuse",
        worth_benign="worth_benign",
    )


def delays(labels: pl.DataFrame, events: pl.DataFrame | None, policies: Sequence[str]) -> pl.DataFrame:
    """How late labels come, by policy: what `RQ_MATURITY_HOURS` and `RQ_MATURITY_BY_POLICY` should cover.

    Args:
        labels: rows of the labels table; a label under "any" counts for each policy.
        events: `event_id, ts`, where at hand.

    Returns:
        policy, labels, and hours from judgement to arrival (`arrival_median`, `arrival_p90`) and from event
        to judgement (`judged_median`, `judged_p90`; null where no event is known), one row a policy with
        labels.
    """
    of_each = pl.DataFrame({"policy": list(policies)}, schema={"policy": pl.String})
    spoken = labels.filter(pl.col("policy").is_in([*policies, ANY_POLICY]))
    named, general = (
        spoken.filter(pl.col("policy") != ANY_POLICY),
        spoken.filter(pl.col("policy") == ANY_POLICY),
    )
    columns = ["policy", "event_id", "labeled_at", "received_at"]
    rows = pl.concat(
        [named.select(columns), general.drop("policy").join(of_each, how="cross").select(columns)]
    )
    happened = pl.lit(None, pl.Datetime("us", "UTC"))
    if events is not None and events.height:
        rows = rows.join(events.group_by("event_id").agg(pl.col("ts").min()), on="event_id", how="left")
        happened = pl.col("ts")
    hours = {
        "arrival": pl.col("received_at") - pl.col("labeled_at"),
        "judged": pl.col("labeled_at") - happened,
    }
    told = rows.with_columns(**{name: late.dt.total_seconds() / 3600 for name, late in hours.items()})
    return (
        told.group_by("policy")
        .agg(
            labels=pl.len(),
            **{f"{name}_median": pl.col(name).median() for name in hours},
            **{f"{name}_p90": pl.col(name).quantile(0.9) for name in hours},
        )
        .sort("policy")
    )


# -- codes -------------------------------------------------------------------------------------------------


def _coded(votes: pl.DataFrame, items: pl.DataFrame, learnt: Learnt, how: Fusion) -> tuple[Ballot, Tally]:
    """The votes as arrays, and the records they refer to."""
    raters = votes.select(_RATER).unique(maintain_order=True)
    policies = sorted({*learnt.policies(), *items["policy"].unique()})
    placed = votes.join(raters.with_row_index("record"), on=_RATER, how="left", maintain_order="left")
    nth = placed.select(pl.struct("event_id", "policy").rle_id().alias("item"))["item"]
    share = {name: float(logit(how.class_share.get(name, 0.5))) for name in policies}
    ballot = Ballot(
        nth.to_numpy().astype(np.intp),
        _codes(placed["source"], LABEL_SOURCES),
        placed["record"].to_numpy().astype(np.intp),
        placed["abuse"].to_numpy(),
        placed["weight"].to_numpy(),
        items["policy"].replace_strict(share, return_dtype=pl.Float64).to_numpy(),
    )
    return ballot, learnt.tally(raters, policies)


def _codes(names: pl.Series, known_as: Sequence[str]) -> Codes:
    places = {name: code for code, name in enumerate(known_as)}
    return names.replace_strict(places, return_dtype=pl.Int64).to_numpy().astype(np.intp)


def _weight(how: Fusion) -> pl.Expr:
    """How much of a vote a label is: its stated confidence, and for reports the rater's haste."""
    hour = pl.col("received_at").dt.truncate("1h")
    reports = pl.len().over("source", "rater_id", hour)
    haste = pl.when((pl.col("source") == "report") & (reports > how.reports_an_hour)).then(
        how.reports_an_hour / reports
    )
    sure = pl.col("confidence").fill_null(1.0).clip(0.0, 1.0)
    return haste.fill_null(1.0) * sure
