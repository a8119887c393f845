"""From votes to truth: what the labels known at an instant say about each event, as a probability.

Labels come in late, disagree, and some are hostile. Here they become gold labels: as of an instant of
`received_at` (nothing that arrived later may count), one vote a rater, weighed by how reliable its source
is. Reading and writing tables is the assets' business; what becomes of gold labels is training's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import numpy as np
import numpy.typing as npt
import polars as pl

from redqueen.schema import ANY_POLICY, LABEL_SOURCES

Floats = npt.NDArray[np.float64]

RELIABILITY: Mapping[str, float] = {
    "honeypot": 0.99,
    "moderator": 0.98,
    "audit": 0.98,
    "appeal": 0.9,
    "vendor": 0.9,
    "rule": 0.8,
    "report": 0.75,
}
"""How often a vote of each source is right, before its votes have been compared with others'."""

TRUSTED = ("moderator", "audit", "honeypot")
"""Sources whose one vote makes a label mature: people of ours, and traps that only abuse falls into."""

MATURITY_HOURS = 24.0


@dataclass(frozen=True)
class Fusion:
    """How votes are weighed.

    reliability: prior share of right votes, by source.
    prior_votes: how many imagined votes each prior is worth against what the overlap shows. Trusted sources
        have many, so that no number of colluding reports can talk them down.
    reports_an_hour: a rater's reports beyond so many in one hour share the weight of so many.
    report_limit: all reports on one event together weigh no more than a single vote of this reliability.
    min_overlap: with fewer (event, policy) pairs judged by two or more sources the priors stand as they are.
    """

    reliability: Mapping[str, float] = field(default_factory=lambda: dict(RELIABILITY))
    prior_votes: float = 100.0
    trusted_prior_votes: float = 5_000.0
    reports_an_hour: int = 10
    report_limit: float = 0.95
    min_overlap: int = 50
    iterations: int = 8


GOLD_SCHEMA: dict[str, pl.DataType] = {
    "event_id": pl.String(),
    "policy": pl.String(),
    "p_abuse": pl.Float64(),
    "n_votes": pl.Int32(),
    "mature": pl.Boolean(),
    "first_labeled_at": pl.Datetime("us", "UTC"),
    "sources": pl.List(pl.String()),
}


def gold(
    labels: pl.DataFrame,
    as_of: datetime,
    policies: Sequence[str],
    *,
    maturity_hours: float = MATURITY_HOURS,
    events: pl.DataFrame | None = None,
    fusion: Fusion | None = None,
) -> pl.DataFrame:
    """The gold labels as known at `as_of`, one row an (event, policy) that anyone voted on, sorted by both.

    Args:
        labels: rows of the labels table, any order; copies of a label count once.
        as_of: labels received later do not exist, whatever their `labeled_at`.
        policies: a benign vote under "any" counts for each of these; votes on other policies are left out.
            An abuse vote says nothing about the policies it does not name.
        maturity_hours: an event older than this is mature, or one that a trusted source voted on.
        events: `event_id, ts` of the events, where at hand. Without them an event counts as old as its first
            received label, so it matures late, never early.
        fusion: how votes are weighed.

    Returns:
        The gold schema. `p_abuse` is in (0, 1), 0.5 where votes cancel out; `n_votes` counts raters;
        "unsure" is no vote.
    """
    how = fusion or Fusion()
    if not labels.height:
        return pl.DataFrame(schema=GOLD_SCHEMA)
    votes = _votes(labels, as_of, policies, how)
    if not votes.height:
        return pl.DataFrame(schema=GOLD_SCHEMA)
    pairs = (
        votes.group_by("event_id", "policy")
        .agg(
            n_votes=pl.len().cast(pl.Int32),
            first_labeled_at=pl.col("labeled_at").min(),
            first_received_at=pl.col("received_at").min(),
            trusted=pl.col("source").is_in(list(TRUSTED)).any(),
            sources=pl.col("source").cast(pl.String).unique().sort(),
        )
        .sort("event_id", "policy")
        .with_row_index("pair")
    )
    joined = votes.join(pairs.select("event_id", "policy", "pair"), on=["event_id", "policy"])
    # Sums of floats depend on their order, and the result must not depend on the rows'.
    joined = joined.sort("pair", "source", "rater_id")
    p = _fuse(joined, pairs.height, how)
    aged = _age(pairs, events, as_of) >= timedelta(hours=maturity_hours)
    named = pairs.with_columns(p_abuse=pl.Series(p), mature=pl.Series(aged | pairs["trusted"]))
    return named.select(pl.col(name).cast(kind) for name, kind in GOLD_SCHEMA.items())


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


def _votes(labels: pl.DataFrame, as_of: datetime, policies: Sequence[str], how: Fusion) -> pl.DataFrame:
    """One vote a rater, event and policy (the rater's latest), with its weight.

    Columns: event_id, policy, source, rater_id, abuse, weight in (0, 1], labeled_at, received_at.
    """
    heard = known(labels, as_of).with_columns(weight=_weight(how))
    valued = heard.filter(
        pl.col("source").is_in(list(LABEL_SOURCES)) & pl.col("value").is_in(["abuse", "benign"])
    )
    everywhere = valued.filter((pl.col("policy") == ANY_POLICY) & (pl.col("value") == "benign"))
    for_each = pl.DataFrame({"policy": list(policies)}, schema={"policy": pl.String})
    spread = everywhere.drop("policy").join(for_each, how="cross")
    named = valued.filter(pl.col("policy").is_in(list(policies)))
    columns = [
        "event_id",
        "policy",
        "source",
        "rater_id",
        "value",
        "weight",
        "labeled_at",
        "received_at",
        "label_id",
    ]
    votes = pl.concat([named.select(columns), spread.select(columns)])
    whose = ["event_id", "policy", "source", "rater_id"]
    if votes.select(whose).is_duplicated().any():
        last = votes.sort(*whose, "received_at", "labeled_at", "label_id", "value")
        votes = last.unique(whose, keep="last", maintain_order=True)
    return votes.with_columns(abuse=pl.col("value") == "abuse").drop("value", "label_id")


def _weight(how: Fusion) -> pl.Expr:
    """How much of a vote a label is: its stated confidence, and for reports the rater's haste."""
    hour = pl.col("received_at").dt.truncate("1h")
    reports = pl.len().over("source", "rater_id", hour)
    haste = pl.when((pl.col("source") == "report") & (reports > how.reports_an_hour)).then(
        how.reports_an_hour / reports
    )
    sure = pl.col("confidence").fill_null(1.0).clip(0.0, 1.0)
    return haste.fill_null(1.0) * sure


def _age(pairs: pl.DataFrame, events: pl.DataFrame | None, as_of: datetime) -> pl.Series:
    happened = pl.col("first_received_at")
    frame = pairs.select("event_id", "first_received_at")
    if events is not None and events.height:
        when = events.group_by("event_id").agg(pl.col("ts").min())
        frame = frame.join(when, on="event_id", how="left", maintain_order="left")
        happened = pl.coalesce("ts", "first_received_at")
    return frame.select((pl.lit(as_of).cast(pl.Datetime("us", "UTC")) - happened).alias("age")).to_series()


def _logit(p: Floats | float) -> Floats:
    inside = np.clip(np.asarray(p, dtype=np.float64), 1e-6, 1 - 1e-6)
    return np.asarray(np.log(inside / (1 - inside)), dtype=np.float64)


def _sigmoid(x: Floats) -> Floats:
    # Held off 0 and 1: no pile of votes makes a certainty, and `exp` must not overflow.
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0))), dtype=np.float64)


def _fuse(votes: pl.DataFrame, pairs: int, how: Fusion) -> Floats:
    """p_abuse of each pair: the votes' log-odds added up, with reliabilities learnt where sources overlap."""
    codes = {source: code for code, source in enumerate(LABEL_SOURCES)}
    item = votes["pair"].to_numpy().astype(np.intp)
    source = votes["source"].replace_strict(codes, return_dtype=pl.Int64).to_numpy().astype(np.intp)
    abuse = votes["abuse"].to_numpy().astype(np.float64)
    weight = votes["weight"].to_numpy().astype(np.float64)
    prior = np.array([how.reliability.get(name, 0.6) for name in LABEL_SOURCES])
    right = np.stack([prior, prior])  # [vote, source]: of votes benign (0) and abuse (1), how many are right

    per_source = np.bincount(item * len(codes) + source, minlength=pairs * len(codes)).reshape(pairs, -1)
    shared = (per_source > 0).sum(axis=1) > 1
    ballot = _Ballot(item, source, abuse, weight, pairs, codes["report"], float(_logit(how.report_limit)))
    if shared.sum() >= how.min_overlap:
        right = _learn(ballot, shared[item], right, prior, how)
    return _sigmoid(np.bincount(item, ballot.evidence(right), minlength=pairs).astype(np.float64))


@dataclass(frozen=True)
class _Ballot:
    """The votes as arrays, one entry a vote."""

    item: npt.NDArray[np.intp]
    source: npt.NDArray[np.intp]
    abuse: Floats
    weight: Floats
    pairs: int
    report: int
    report_limit: float

    def evidence(self, right: Floats) -> Floats:
        """Each vote's log-odds towards abuse, reports on one pair held to `report_limit` together."""
        sign = 2 * self.abuse - 1
        trust = 0.5 + (right[self.abuse.astype(np.intp), self.source] - 0.5) * self.weight
        odds = sign * _logit(trust)
        reported = np.where(self.source == self.report, odds, 0.0)
        total = np.abs(np.bincount(self.item, reported, minlength=self.pairs))[self.item]
        squeeze = np.where(total > self.report_limit, self.report_limit / np.maximum(total, 1e-9), 1.0)
        return np.asarray(np.where(self.source == self.report, odds * squeeze, odds), dtype=np.float64)


def _learn(
    ballot: _Ballot, shared: npt.NDArray[np.bool_], right: Floats, prior: Floats, how: Fusion
) -> Floats:
    """Dawid-Skene, run on what a vote is worth: per source and kind of vote, the share that is right.

    The E step is the evidence of all *other* sources (a source must not confirm itself); the M step counts
    how often each vote agrees with it, against the prior. The textbook form estimates how a source votes
    given the truth, which cannot be known of sources that only ever say "abuse" (reports, honeypots):
    nobody reports what is benign.
    """
    sources = right.shape[1]
    strength = np.array(
        [how.trusted_prior_votes if name in TRUSTED else how.prior_votes for name in LABEL_SOURCES],
        dtype=np.float64,
    )
    cell = ballot.abuse.astype(np.intp) * sources + ballot.source
    group = ballot.item * sources + ballot.source
    counted = ballot.weight * shared
    seen = np.bincount(cell, counted, minlength=2 * sources).reshape(2, sources)
    for _ in range(how.iterations):
        odds = ballot.evidence(right)
        total = np.bincount(ballot.item, odds, minlength=ballot.pairs)[ballot.item]
        own = np.bincount(group, odds, minlength=ballot.pairs * sources)[group]
        p_others = _sigmoid(total - own)
        agrees = np.where(ballot.abuse > 0, p_others, 1 - p_others)
        agreed = np.bincount(cell, counted * agrees, minlength=2 * sources).reshape(2, sources)
        # A source is never worth less than a coin: votes are not turned round, or a rater could vote by
        # proxy.
        right = np.clip((strength * prior + agreed) / (strength + seen), 0.5, 0.995)
    return right
