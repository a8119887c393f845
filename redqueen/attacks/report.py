"""What an attack came to, two of them compared, and the verdict that holds the gate.

Belongs here: counting, confidence intervals, limits and reasons. Does not belong here: anything that asks a
detector. Reports hold rewritten messages (`survivors`); `AttackReport.summary` and everything in a verdict
do not, so that they may be shown, logged and kept as metadata.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from redqueen.errors import InvalidInput

__all__ = [
    "AttackReport", "Comparison", "FamilyDifference", "FamilyResult", "GateLimits", "HardExample", "Verdict",
    "clopper_pearson", "compare", "gate",
]  # fmt: skip

RESAMPLES = 2_000


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share, (0, 1) where nothing was tried."""
    from scipy.special import betaincinv

    if not trials:
        return 0.0, 1.0
    tail = (1 - confidence) / 2
    low = float(betaincinv(hits, trials - hits + 1, tail)) if hits else 0.0
    high = float(betaincinv(hits + 1, trials - hits, 1 - tail)) if hits < trials else 1.0
    return low, high


@dataclass(frozen=True)
class HardExample:
    """A rewriting that got through: the message it came from, by id, and how far below the threshold it is
    (log-odds)."""

    id: str
    family: str
    text: str
    margin: float


@dataclass(frozen=True)
class FamilyResult:
    """One family against one detector. `caught_after` says for each attacked id whether it is caught all
    the same."""

    name: str
    atlas: str
    caught_after: tuple[bool, ...]
    applicable: int
    """Caught messages to which the family had anything to offer (a message without a link cannot cloak
    it)."""
    queries: int
    exhausted: bool

    @property
    def recall_after(self) -> float:
        """Share of all abusive messages that are still caught."""
        return sum(self.caught_after) / len(self.caught_after)


@dataclass(frozen=True)
class AttackReport:
    """An attack on one detector at its fixed operating point."""

    seed: int
    ids: tuple[str, ...]
    caught_before: tuple[bool, ...]
    families: tuple[FamilyResult, ...]
    survivors: tuple[HardExample, ...]
    queries: int
    budget: int

    @property
    def attacked(self) -> int:
        """Messages that were caught as they are, and so were attacked."""
        return sum(self.caught_before)

    @property
    def recall_before(self) -> float:
        """Share of the abusive messages caught as they are."""
        return self.attacked / len(self.ids)

    @property
    def mean_recall(self) -> float:
        """Recall after the attack, mean over families."""
        return (
            float(np.mean([f.recall_after for f in self.families])) if self.families else self.recall_before
        )

    @property
    def worst(self) -> FamilyResult:
        """The family that leaves the least recall (the first of equals)."""
        return min(self.families, key=lambda f: f.recall_after)

    @property
    def recall_under_best_attack(self) -> float:
        """Share of messages caught under every family: what an abuser leaves who picks the best for each
        message."""
        kept = np.array([self.caught_before, *(f.caught_after for f in self.families)])
        return float(kept.all(axis=0).mean())

    def evasion(self, family: FamilyResult) -> tuple[float, float, float]:
        """Share of attacked messages that evaded, with its exact 95% interval: (rate, low, high)."""
        evaded = self.attacked - sum(family.caught_after)
        low, high = clopper_pearson(evaded, self.attacked)
        return (evaded / self.attacked if self.attacked else 0.0), low, high

    def summary(self) -> dict[str, Any]:
        """The figures, without a message or an id: fit for metadata and logs."""
        rows = []
        for family in self.families:
            rate, low, high = self.evasion(family)
            rows.append(
                {
                    "family": family.name, "atlas": family.atlas, "attacked": self.attacked,
                    "applicable": family.applicable, "recall_before": round(self.recall_before, 4),
                    "recall_after": round(family.recall_after, 4), "evasion": round(rate, 4),
                    "evasion_low": round(low, 4), "evasion_high": round(high, 4), "queries": family.queries,
                    "exhausted": family.exhausted,
                }
            )  # fmt: skip
        return {
            "messages": len(self.ids), "attacked": self.attacked, "seed": self.seed, "queries": self.queries,
            "budget": self.budget, "recall_before": round(self.recall_before, 4),
            "mean_recall": round(self.mean_recall, 4),
            "worst_family": self.worst.name if self.families else None,
            "worst_recall": round(self.worst.recall_after, 4) if self.families else None,
            "recall_under_best_attack": round(self.recall_under_best_attack, 4), "families": rows,
        }  # fmt: skip

    def to_dict(self, *, survivors: bool = False) -> dict[str, Any]:
        """As JSON-able data; rewritten messages only on request (they belong in the hard-example store)."""
        return {
            "seed": self.seed,
            "ids": list(self.ids),
            "caught_before": [int(c) for c in self.caught_before],
            "families": [
                {**vars(f), "caught_after": [int(c) for c in f.caught_after]} for f in self.families
            ],
            "survivors": [vars(s) for s in self.survivors] if survivors else [],
            "queries": self.queries,
            "budget": self.budget,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttackReport:
        """The report that `to_dict` wrote. Raises InvalidInput where it is not one."""
        try:
            return cls(
                seed=int(data["seed"]),
                ids=tuple(data["ids"]),
                caught_before=tuple(map(bool, data["caught_before"])),
                families=tuple(
                    FamilyResult(**{**f, "caught_after": tuple(map(bool, f["caught_after"]))})
                    for f in data["families"]
                ),
                survivors=tuple(HardExample(**s) for s in data.get("survivors", ())),
                queries=int(data["queries"]),
                budget=int(data["budget"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InvalidInput(
                f"this is no attack report ({error!r}); run the adversarial evaluation again"
            ) from error

    def digest(self) -> str:
        """sha256 of the outcome (survivors' texts aside): deployment compares it with the one it was
        shown."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class FamilyDifference:
    """Recall after the attack, candidate less champion, with its paired bootstrap interval."""

    name: str
    champion: float
    candidate: float
    low: float
    high: float

    @property
    def difference(self) -> float:
        """Positive where the candidate is the better one."""
        return self.candidate - self.champion


@dataclass(frozen=True)
class Comparison:
    """Two detectors under the same attack: each family, and the mean over families."""

    families: tuple[FamilyDifference, ...]
    mean: FamilyDifference

    def summary(self) -> list[dict[str, Any]]:
        """One row a family, the mean last, rounded for a table."""
        return [
            {
                "family": d.name, "champion": round(d.champion, 4), "candidate": round(d.candidate, 4),
                "difference": round(d.difference, 4), "low": round(d.low, 4), "high": round(d.high, 4),
            }
            for d in (*self.families, self.mean)
        ]  # fmt: skip


def compare(champion: AttackReport, candidate: AttackReport, confidence: float = 0.90) -> Comparison:
    """The candidate against the champion, message by message.

    The interval is two-sided, so that at .90 each end alone is a one-sided .95 bound; messages are resampled,
    families are not. Raises InvalidInput unless messages, families and seed are the same.
    """
    names = [f.name for f in candidate.families]
    if (
        champion.ids != candidate.ids
        or champion.seed != candidate.seed
        or names != [f.name for f in champion.families]
    ):
        raise InvalidInput(
            "champion and candidate were attacked with other messages, families or seeds; attack both again "
            "with the same ones"
        )
    old = np.array([f.caught_after for f in champion.families], dtype=float)
    new = np.array([f.caught_after for f in candidate.families], dtype=float)
    rng = np.random.default_rng(candidate.seed)
    n = len(candidate.ids)
    weights = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)
    resampled = (new - old) @ weights.T / n
    tails = [(1 - confidence) / 2, (1 + confidence) / 2]

    def difference(name: str, a: float, b: float, draws: np.ndarray) -> FamilyDifference:
        low, high = np.quantile(draws, tails)
        return FamilyDifference(name, float(a), float(b), float(low), float(high))

    return Comparison(
        tuple(difference(*item) for item in zip(names, old.mean(1), new.mean(1), resampled, strict=True)),
        difference("mean", old.mean(), new.mean(), resampled.mean(0)),
    )


@dataclass(frozen=True)
class GateLimits:
    """What a candidate must hold under attack; shares of recall at the fixed operating point."""

    min_mean_recall: float = 0.30
    min_worst_recall: float = 0.10
    max_mean_loss: float = 0.10
    """Recall that the candidate may lose against the champion in the mean, at the cautious end of the
    interval."""
    max_family_loss: float = 0.10
    """Recall that it may lose in one family before it is evidently worse (at the lenient end of the
    interval)."""
    min_messages: int = 50
    """Fewer abusive messages than this prove nothing, and what proves nothing does not pass."""


@dataclass(frozen=True)
class Verdict:
    """Whether the candidate may be deployed, and every reason for it in a sentence."""

    passed: bool
    reasons: list[str]


def gate(
    report: AttackReport, champion: AttackReport | None = None, limits: GateLimits | None = None
) -> Verdict:
    """Judge a candidate's report: floors that are fixed, and not worse than the champion's on the same
    attack.

    Closed by default: too few messages, no family or an attack that ran out of budget do not pass. Reasons
    of a refusal come first; a pass says what it rests on.
    """
    limits = limits or GateLimits()
    if not report.families:
        return Verdict(False, ["no attack family was run"])
    against, held = _floors(report, champion, limits)
    if champion is not None:
        worse, equal = _regressions(compare(champion, report), limits)
        against, held = against + worse, held + equal
    return Verdict(not against, against + held)


def _floors(
    report: AttackReport, champion: AttackReport | None, limits: GateLimits
) -> tuple[list[str], list[str]]:
    against: list[str] = []
    held: list[str] = []
    if len(report.ids) < limits.min_messages:
        against.append(f"only {len(report.ids)} abusive messages were attacked, not {limits.min_messages}")
    for family in report.families:
        if family.exhausted:
            against.append(f"the query budget ran out under {family.name}, which proves nothing; raise it")
    worst = report.worst
    figures = [
        ("mean recall under attack", report.mean_recall, limits.min_mean_recall, _mean_of(champion)),
        (
            f"recall under the worst family, {worst.name},", worst.recall_after, limits.min_worst_recall,
            _family_of(champion, worst.name),
        ),
    ]  # fmt: skip
    for name, value, floor, live in figures:
        sentence = f"{name} is {value:.2f}, the floor is {floor:.2f}"
        # Under attack every model may be below the floor: keeping a live one that is no better helps only
        # abusers, and keeping none for the sake of one family helps them most.
        excused = value < floor and value >= live
        if excused:
            sentence += f", but what is live holds {live:.2f}"
        (held if value >= floor or excused else against).append(sentence)
    return against, held


def _mean_of(report: AttackReport | None) -> float:
    """A first model, too, must hold in the mean: without a champion there is no excuse."""
    return report.mean_recall if report else 1.0


def _family_of(report: AttackReport | None, name: str) -> float:
    """Where nothing is live every family gets through: one weak family is told, not held against it."""
    return next((f.recall_after for f in report.families if f.name == name), 0.0) if report else 0.0


def _regressions(comparison: Comparison, limits: GateLimits) -> tuple[list[str], list[str]]:
    against: list[str] = []
    held: list[str] = []
    mean = comparison.mean
    sentence = (
        f"mean recall under attack against the champion's: {mean.difference:+.2f} "
        f"({mean.low:+.2f} to {mean.high:+.2f}), at worst {-limits.max_mean_loss:+.2f} is allowed"
    )
    (held if mean.low >= -limits.max_mean_loss else against).append(sentence)
    against += [
        f"under {d.name} recall is {d.candidate:.2f}, the champion's is {d.champion:.2f} "
        f"({d.low:+.2f} to {d.high:+.2f}): evidently worse by more than {limits.max_family_loss:.2f}"
        for d in comparison.families
        if d.high < -limits.max_family_loss
    ]
    return against, held
