"""Votes that disagree, as coded arrays, become probabilities: Dawid and Skene (1979), in two readings.

Both count the same thing, a *confusion* for every rater: how much of what they said fell on which truth,
`n[said, truth]`. Both shrink a rater's confusion towards its source's by a prior worth some votes, so that a
new rater is its source's average, and a source's towards what is stated of it. They differ in how a count is
read:

- `dawid_skene` reads along the truth, P(said | truth), any number of classes: the textbook. It is right for a
  panel whose members say whatever they think of every item put before them.
- `fit` reads along what was said, P(truth | said): what a vote is *worth*. It is what gold labels are made
  of, for the textbook cannot be had of sources that only ever say "abuse" (reports, honeypots): nobody
  reports what is benign, so P(report | benign) is unknown, and a textbook fit reads such a vote as no news at
  all.

Reading along what was said brings three guards, which keep one hostile channel from certifying itself:

1. *A source is no witness for itself.* A vote is compared with the evidence of all *other* sources: a report
   is never confirmed by more reports. Trusted raters answer to other trusted votes only, or a ring of
   reporters could talk a moderator down, one event after the other. The others err too: of a rater who is
   right with probability w they bear out `1 - q + w (2q - 1)` of the votes when they are right with
   probability q, and w is estimated by least squares from that. (Counting bare agreement would charge each
   rater with the doubts about the others, and all would drift towards a coin; counting the vote itself in
   lets the likelier class win every disagreement, a little more in each round.)
2. *Never below a coin, never certain.* Votes are not turned round, or a rater could vote by proxy.
3. *Reports weigh, together, no more than one good vote* (`Fusion.report_limit`).

There is no learnt class share in that reading. An event is judged because somebody chose it, so the share of
abuse among judged events is the choosers', not the traffic's; a share learnt from it would discount the first
report of a new campaign. `Fusion.class_share` states one per policy where a person knows better.

Frames and tables are `redqueen.labels`' part, keeping what was fitted is `redqueen.truth`'s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from redqueen.schema import LABEL_SOURCES

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

Floats = npt.NDArray[np.float64]
Codes = npt.NDArray[np.intp]
Flags = npt.NDArray[np.bool_]

EPSILON = 1e-10
"""The least a count or a share is taken for, so that its logarithm exists."""


# -- the textbook --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """Votes as codes, one entry a vote.

    item, rater, said: codes from 0, of equal length.
    source: the source of each *rater*; None when all are of one.
    weight: how much of a vote each is; None when each is one.
    """

    item: Codes
    rater: Codes
    said: Codes
    n_items: int
    n_raters: int
    n_classes: int
    source: Codes | None = None
    weight: Floats | None = None


@dataclass(frozen=True)
class Priors:
    """What is believed before any vote, in imagined votes. All zero is the textbook.

    rater_votes: what a rater's source says of the rater.
    reliability, source_votes: share of right votes of each source, and what that belief is worth; one entry a
        source. Wrong votes fall on the other classes evenly.
    class_share, class_items: how common each class is, and how many items that belief is worth.
    """

    rater_votes: float = 0.0
    reliability: Floats | None = None
    source_votes: Floats | None = None
    class_share: Floats | None = None
    class_items: float = 0.0


TEXTBOOK = Priors()


@dataclass(frozen=True)
class Fitted:
    """What came out: `p[item, class]`, the share of each class, and the bound on the likelihood a vote, by
    iteration.
    """

    p: Floats
    share: Floats
    loss: tuple[float, ...]


def dawid_skene(
    panel: Panel, priors: Priors = TEXTBOOK, *, iterations: int = 100, tolerance: float = 1e-5
) -> Fitted:
    """Fit by EM, from the shares of votes, until the bound a vote grows by less than `tolerance`.

    Without priors the steps, their order, the start and the stop are those of crowd-kit's `DawidSkene`, and
    so is the result.

    Args:
        panel: the votes; every item has one at least.
        priors: what is believed beforehand.
        iterations: the most EM steps.
        tolerance: in nats a vote; negative runs all iterations.
    """
    cells = _Cells.of(panel)
    p = cells.shares()
    share = _class_share(p, priors)
    log_errors = cells.log_errors(cells.counts(p), priors)
    loss: list[float] = []
    for _ in range(iterations):
        log_p = cells.log_likelihood(log_errors)
        log_p += np.log(share)[:, None]
        log_p -= log_p.max(axis=0)
        p = np.exp(log_p)
        total = p.sum(axis=0)
        p /= total
        log_p -= np.log(total)
        share = _class_share(p, priors)
        counts = cells.counts(p)
        log_errors = cells.log_errors(counts, priors)
        loss.append(_bound(p, log_p, share, counts, log_errors) / len(panel.item))
        if len(loss) > 1 and loss[-1] - loss[-2] < tolerance:
            break
    return Fitted(np.ascontiguousarray(p.T), share, tuple(loss))


@dataclass(frozen=True)
class _Cells:
    """The votes as a sparse matrix, items by cells; a cell is something a rater ever said.

    Both EM steps are products with it. Everything is laid out class by class (`[class, item]`, `[class,
    cell]`): sums over a last axis of two or three classes cost more than the products.
    """

    by_item: csr_matrix
    by_cell: csr_matrix
    said: Codes
    rater: Codes
    first: Codes
    panel: Panel

    @classmethod
    def of(cls, panel: Panel) -> _Cells:
        from scipy.sparse import csr_matrix

        coded = panel.rater * panel.n_classes + panel.said
        used = np.bincount(coded, minlength=panel.n_raters * panel.n_classes) > 0
        column = np.cumsum(used) - 1
        whole = np.flatnonzero(used)
        weight = np.ones(len(coded)) if panel.weight is None else panel.weight
        matrix = csr_matrix((weight, (panel.item, column[coded])), shape=(panel.n_items, len(whole)))
        rater = whole // panel.n_classes
        first = np.flatnonzero(np.diff(rater, prepend=-1))
        return cls(matrix, matrix.T.tocsr(), whole % panel.n_classes, rater, first, panel)

    def shares(self) -> Floats:
        """The share of each class among an item's votes: where EM starts."""
        size = self.panel.n_items * self.panel.n_classes
        place = self.panel.said * self.panel.n_items + self.panel.item
        votes = np.bincount(place, self.panel.weight, size).reshape(self.panel.n_classes, -1)
        return np.asarray(votes / votes.sum(axis=0))

    def log_likelihood(self, log_errors: Floats) -> Floats:
        """`[class, item]`: log P(all that was said of an item | class)."""
        return np.stack([self.by_item @ row for row in log_errors])

    def counts(self, p: Floats) -> Floats:
        """`n[truth, cell]`: how much of what was said in a cell fell on each truth."""
        return np.stack([self.by_cell @ row for row in p])

    def log_errors(self, counts: Floats, priors: Priors) -> Floats:
        """`[truth, cell]`: log P(said | truth)."""
        believed = np.zeros_like(counts)
        if priors.rater_votes > 0:
            source = (
                np.zeros(self.panel.n_raters, np.intp) if self.panel.source is None else self.panel.source
            )
            believed = self._pooled(counts, source[self.rater], priors)
        raised = np.maximum(counts + priors.rater_votes * believed, EPSILON)
        total = np.add.reduceat(raised, self.first, axis=1)
        if priors.rater_votes > 0:
            # What a rater never said still takes its share of the prior.
            unsaid = 1.0 - np.add.reduceat(believed, self.first, axis=1)
            total += priors.rater_votes * np.maximum(unsaid, 0.0)
        sizes = np.diff(np.append(self.first, len(self.rater)))
        return np.asarray(np.log(raised) - np.repeat(np.log(total), sizes, axis=1))

    def _pooled(self, counts: Floats, source: Codes, priors: Priors) -> Floats:
        """`[truth, cell]`: P(said | truth) of each cell's source, shrunk towards what is stated of it."""
        classes, sources = self.panel.n_classes, int(source.max(initial=0)) + 1
        place = source * classes + self.said
        summed = [np.bincount(place, row, sources * classes) for row in counts]
        pooled = np.stack(summed).astype(np.float64).reshape(classes, sources, classes)
        if priors.reliability is not None and priors.source_votes is not None:
            right, worth = priors.reliability[:sources], priors.source_votes[:sources]
            stated = np.eye(classes)[:, None, :] * right[:, None]
            stated += (1.0 - np.eye(classes))[:, None, :] * ((1.0 - right) / max(classes - 1, 1))[:, None]
            pooled = pooled + stated * worth[:, None]
        pooled = np.maximum(pooled, EPSILON)
        pooled /= pooled.sum(axis=2, keepdims=True)
        return np.asarray(pooled[:, source, self.said])


def _class_share(p: Floats, priors: Priors) -> Floats:
    stated = np.zeros(len(p)) if priors.class_share is None else priors.class_share * priors.class_items
    share = (p.sum(axis=1) + stated) / (p.shape[1] + stated.sum())
    return np.asarray(np.maximum(share, EPSILON))


def _bound(p: Floats, log_p: Floats, share: Floats, counts: Floats, log_errors: Floats) -> float:
    """The evidence lower bound as crowd-kit has it: the class share counts once a vote, not once an item."""
    # `einsum`, not `vdot`: BLAS would wake a thread a core for a sum that memory bounds.
    expected = np.einsum("ij,ij->", counts, log_errors) + counts.sum(axis=1) @ np.log(share)
    return float(expected - np.einsum("ij,ij->", p, log_p))


# -- what a vote is worth ------------------------------------------------------------------------------------

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

REPORT = LABEL_SOURCES.index("report")
_IS_TRUSTED = np.array([name in TRUSTED for name in LABEL_SOURCES])


@dataclass(frozen=True)
class Fusion:
    """How votes are weighed.

    reliability: prior share of right votes, by source.
    prior_votes: how many imagined votes each prior is worth against what the overlap shows. Trusted sources
        have many, so that no number of colluding reports can talk them down.
    rater_votes: how many imagined votes a rater's source is worth against the rater's own record.
    reports_an_hour: a rater's reports beyond so many in one hour share the weight of so many.
    report_limit: all reports on one event together weigh no more than a single vote of this reliability.
    min_overlap: with fewer events judged by two or more sources, a policy's priors stand as they are.
    class_share: share of abuse among judged events, by policy, where one is known; else one half.
    """

    reliability: Mapping[str, float] = field(default_factory=lambda: dict(RELIABILITY))
    prior_votes: float = 100.0
    trusted_prior_votes: float = 5_000.0
    rater_votes: float = 20.0
    trusted_rater_votes: float = 200.0
    reports_an_hour: int = 10
    report_limit: float = 0.95
    min_overlap: int = 50
    iterations: int = 8
    class_share: Mapping[str, float] = field(default_factory=dict)

    def priors(self) -> Floats:
        """Prior reliability of each of `LABEL_SOURCES`."""
        return np.array([self.reliability.get(name, 0.6) for name in LABEL_SOURCES])

    def source_strength(self) -> Floats:
        """What a source's prior is worth, in votes."""
        return np.where(_IS_TRUSTED, self.trusted_prior_votes, self.prior_votes)

    def rater_strength(self) -> Floats:
        """What its source is worth against a rater's own record, in votes."""
        return np.where(_IS_TRUSTED, self.trusted_rater_votes, self.rater_votes)


@dataclass(frozen=True)
class Tally:
    """Confusions, read along what was said. A *record* is one rater on one policy.

    policy, source: codes of each record.
    seen: `[said, record]`, weight of the votes (said benign 0, abuse 1) that others could judge, each by how
        much their verdict tells.
    agreed: `[said, record]`, how much of it fell on the truth that was said, their errors allowed for; the
        rest fell on the other.
    source_seen, source_agreed: `[said, policy * sources + source]`, the same of all of a source's raters,
        also of those that have no record here.
    shared: by policy, how many events two or more sources judged.
    """

    policy: Codes
    source: Codes
    seen: Floats
    agreed: Floats
    source_seen: Floats
    source_agreed: Floats
    shared: Floats

    def worth(self, how: Fusion) -> Floats:
        """`[said, record]`: the share of a rater's votes of each kind that is right."""
        by_source = self.worth_of_sources(how)
        group = self.policy * len(LABEL_SOURCES) + self.source
        strength = how.rater_strength()[self.source]
        own = _clipped((strength * by_source[:, group] + self.agreed) / (strength + self.seen))
        learnt = (self.shared >= how.min_overlap)[self.policy]
        return np.where(learnt, own, how.priors()[self.source])

    def worth_of_sources(self, how: Fusion) -> Floats:
        """`[said, policy * sources + source]`: the same, of a source as a whole."""
        policies = len(self.shared)
        prior, strength = np.tile(how.priors(), policies), np.tile(how.source_strength(), policies)
        learnt = np.repeat(self.shared >= how.min_overlap, len(LABEL_SOURCES))
        right = (strength * prior + self.source_agreed) / (strength + self.source_seen)
        return np.where(learnt, _clipped(right), prior)

    def counted(self, ballot: Ballot, outcome: Outcome) -> Tally:
        """The tally of these votes alone, under the same codes (the M step)."""
        records, groups = len(self.policy), self.source_seen.shape[1]
        cell = ballot.abuse * records + ballot.record
        group = self.policy * len(LABEL_SOURCES) + self.source
        kept = []
        for column in (outcome.seen, outcome.agreed):
            weight = ballot.weight * np.nan_to_num(column)
            counts = np.bincount(cell, weight, 2 * records).astype(np.float64).reshape(2, records)
            by_source = [np.bincount(group, row, groups).astype(np.float64) for row in counts]
            kept.append((counts, np.stack(by_source)))
        (seen, source_seen), (agreed, source_agreed) = kept
        return Tally(self.policy, self.source, seen, agreed, source_seen, source_agreed, self.shared)

    def midway(self, other: Tally) -> Tally:
        """Half this tally, half `other`, which has the same records."""
        return Tally(
            self.policy,
            self.source,
            (self.seen + other.seen) / 2,
            (self.agreed + other.agreed) / 2,
            (self.source_seen + other.source_seen) / 2,
            (self.source_agreed + other.source_agreed) / 2,
            self.shared,
        )


@dataclass(frozen=True)
class Ballot:
    """Votes as codes, one entry a vote, sorted by item and, within it, by source.

    record: the rater's record on the item's policy.
    leaning: log odds of abuse of each *item* before any vote.
    """

    item: Codes
    source: Codes
    record: Codes
    abuse: Flags
    weight: Floats
    leaning: Floats

    def evidence(self, worth: Floats, how: Fusion) -> Floats:
        """Each vote's log odds towards abuse, all reports on one item held to `report_limit`."""
        right = worth[self.abuse.astype(np.intp), self.record]
        odds = np.where(self.abuse, 1.0, -1.0) * logit(0.5 + (right - 0.5) * self.weight)
        reported = self.source == REPORT
        if not reported.any():
            return odds
        limit = float(logit(how.report_limit))
        total = np.abs(np.bincount(self.item[reported], odds[reported], len(self.leaning)))
        squeeze = np.minimum(1.0, limit / np.maximum(total, 1e-9))
        odds[reported] *= squeeze[self.item[reported]]
        return odds

    def fuse(self, odds: Floats) -> Floats:
        """Probability of abuse of each item."""
        return sigmoid(self.leaning + np.bincount(self.item, odds, len(self.leaning)))

    def borne_out(self, odds: Floats) -> tuple[Floats, Floats, Floats]:
        """What those who may judge each vote tell of it: `Outcome.seen`, `agreed` and `contradicted`."""
        trusted = _IS_TRUSTED[self.source]
        items = len(self.leaning)
        total = np.bincount(self.item, odds, items)
        sworn = np.bincount(self.item, np.where(trusted, odds, 0.0), items)
        group = self._group()
        own_source = np.bincount(group, odds)[group]
        others = np.where(trusted, sworn[self.item] - odds, total[self.item] - own_source)
        others = (others + self.leaning[self.item]) * np.where(self.abuse, 1.0, -1.0)
        # Sums taken apart again are never quite zero.
        others = np.where(np.abs(others) < 1e-9, 0.0, others)
        q = sigmoid(np.abs(others))
        tells = 2 * q - 1
        agreed = tells * (np.where(others > 0, 1.0, 0.0) - (1 - q))
        return tells**2, agreed, np.where(others == 0, 0.5, others < 0)

    def measurable(self) -> Flags:
        """Which votes anybody else may judge."""
        trusted = _IS_TRUSTED[self.source]
        sworn = np.bincount(self.item, trusted, len(self.leaning))
        return np.where(trusted, sworn[self.item] > 1, self.shared()[self.item])

    def shared(self) -> Flags:
        """Which items two or more sources judged."""
        first = np.flatnonzero(np.diff(self._group(), prepend=-1))
        return np.bincount(self.item[first], minlength=len(self.leaning)) > 1

    def _group(self) -> Codes:
        """Codes of (item, source), in the order of the votes."""
        changes = (np.diff(self.item, prepend=-1) != 0) | (np.diff(self.source, prepend=-1) != 0)
        return np.cumsum(changes) - 1


@dataclass(frozen=True)
class Outcome:
    """What fusing made of a ballot.

    p: probability of abuse of each item.
    seen: of each vote, how much the verdict of those who may judge it tells, in [0, 1].
    agreed: how much of that falls on what was said, their errors allowed for (single votes may lie outside 0
        and `seen`, sums do not for long).
    contradicted: whether their verdict is the other one (1, 0; a half where they are undecided).

    All three are nan where nobody may judge the vote.
    """

    p: Floats
    seen: Floats
    agreed: Floats
    contradicted: Floats


def settle(ballot: Ballot, tally: Tally, how: Fusion) -> Outcome:
    """Fuse votes by what is already known of the raters (the E step)."""
    odds = ballot.evidence(tally.worth(how), how)
    measured = ballot.measurable()
    told = [np.where(measured, column, np.nan) for column in ballot.borne_out(odds)]
    return Outcome(ballot.fuse(odds), *told)


def fit(ballot: Ballot, empty: Tally, how: Fusion) -> Outcome:
    """Learn what votes are worth, from these votes alone, and fuse them.

    Args:
        empty: the records to fill; `shared` says which policies may be learnt.
    """
    rounds = how.iterations if (empty.shared >= how.min_overlap).any() else 0
    outcome = settle(ballot, empty, how)
    tally = None
    for _ in range(rounds):
        # Two that judge each other alone would overshoot in turn: a step of one half meets in the middle.
        now = empty.counted(ballot, outcome)
        tally = now if tally is None else tally.midway(now)
        outcome = settle(ballot, tally, how)
    return outcome


def interval(wrong: Floats, seen: Floats, level: float = 0.95) -> tuple[Floats, Floats]:
    """Lower and upper bound of a share of `wrong` among `seen` (Jeffreys; counts may be fractions)."""
    from scipy.special import betaincinv

    tail = (1.0 - level) / 2
    a, b = np.maximum(wrong, 0.0) + 0.5, np.maximum(seen - wrong, 0.0) + 0.5
    return np.asarray(betaincinv(a, b, tail)), np.asarray(betaincinv(a, b, 1.0 - tail))


def logit(p: Floats | float) -> Floats:
    """Log odds, held off the ends."""
    inside = np.clip(np.asarray(p, dtype=np.float64), 1e-6, 1 - 1e-6)
    return np.asarray(np.log(inside / (1 - inside)), dtype=np.float64)


def sigmoid(x: Floats) -> Floats:
    """Probability of log odds. Held off 0 and 1: no pile of votes makes a certainty, and `exp` must not
    overflow.
    """
    return np.asarray(1.0 / (1.0 + np.exp(-np.clip(x, -30.0, 30.0))), dtype=np.float64)


def _clipped(right: Floats) -> Floats:
    return np.asarray(np.clip(right, 0.5, 0.995))
