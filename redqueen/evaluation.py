"""How good is a detector on messages it has not seen, and is that good enough? Pure: scores come in, a
verdict out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from redqueen.adaptation import wilson

Mask = npt.NDArray[np.bool_]

MIN_RECALL = 0.5
"""A detector that misses half of what it was shown examples of is broken, whatever it replaces."""

MAX_FPR_OVER_BUDGET = 2.0
RECALL_SLACK = 0.03
"""How much recall a candidate may lose on the same messages: within this, newer data is worth more."""

MIN_SLICE = 30
NEW_ACCOUNT_LOG_HOURS = 5.1
"""log1p of a week in hours; below it an account is new."""


@dataclass(frozen=True)
class Share:
    """Recall and false-positive rate on some messages, with how many they rest on."""

    n_abuse: int
    n_benign: int
    recall: float
    fpr: float


@dataclass(frozen=True)
class Report:
    """A detector on held-out messages at its own thresholds. `recall_low` and `fpr_low` end 95% intervals."""

    n_abuse: int
    n_benign: int
    recall: float
    recall_low: float
    fpr: float
    fpr_low: float
    slices: Mapping[str, Share]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Whether a gate lets a candidate through, and every reason for or against it."""

    passed: bool
    reasons: tuple[str, ...]


def judge(
    rows: pl.DataFrame, scores: npt.ArrayLike, thresholds: npt.ArrayLike, policies: Sequence[str]
) -> Report:
    """Measure at the operating point.

    Args:
        rows: training-set rows (`p_<policy>`, `f_<feature>`), length n.
        scores: [n, P] calibrated probabilities, columns in the order of `policies`.
        thresholds: [P].
    """
    acted: Mask = np.any(np.asarray(scores) >= np.asarray(thresholds), axis=1)
    targets: Mask = rows.select([f"p_{p}" for p in policies]).to_numpy() >= 0.5
    abuse: Mask = np.any(targets, axis=1)
    everything = np.ones(len(abuse), dtype=bool)
    overall = _share(acted, abuse, everything)
    recall_low = wilson(float(acted[abuse].sum()), float(abuse.sum()))[0]
    fpr_low = wilson(float(acted[~abuse].sum()), float((~abuse).sum()))[0]
    slices = {f"policy {p}": _share(acted, abuse, targets[:, i] | ~abuse) for i, p in enumerate(policies)}
    slices |= {name: _share(acted, abuse, chosen) for name, chosen in _slices(rows)}
    kept = {name: s for name, s in slices.items() if s.n_abuse + s.n_benign >= MIN_SLICE}
    return Report(overall.n_abuse, overall.n_benign, overall.recall, recall_low, overall.fpr, fpr_low, kept)


def _slices(rows: pl.DataFrame) -> list[tuple[str, Mask]]:
    found = []
    age = next((c for c in rows.columns if c.startswith("f_") and "account_age" in c), None)
    if age is not None and rows[age].is_not_nan().any():
        new = rows[age].to_numpy() < NEW_ACCOUNT_LOG_HOURS
        found += [("account new", new), ("account old", ~new)]
    hard = rows["event_id"].str.starts_with("hard:").to_numpy()
    return [*found, ("attacks that once worked", hard)]


def _share(acted: Mask, abuse: Mask, chosen: Mask) -> Share:
    bad, good = abuse & chosen, ~abuse & chosen
    return Share(
        n_abuse=int(bad.sum()),
        n_benign=int(good.sum()),
        recall=float(acted[bad].mean()) if bad.any() else 0.0,
        fpr=float(acted[good].mean()) if good.any() else 0.0,
    )


def gate(candidate: Report, champion: Report | None, budget: float) -> Verdict:
    """Whether a candidate is good enough to be attacked and rolled out.

    Args:
        budget: share of benign messages that may be acted on. It is broken only if the lower end of the 95%
            interval is above twice the budget: a few hundred benign messages cannot say more.
    """
    broken = []
    if candidate.recall < MIN_RECALL:
        broken.append(
            f"recall {candidate.recall:.1%} on unseen messages, at least {MIN_RECALL:.0%} is needed"
        )
    if candidate.fpr_low > MAX_FPR_OVER_BUDGET * budget:
        broken.append(f"false positives {candidate.fpr:.2%} on unseen messages, the budget is {budget:.2%}")
    if champion is not None and candidate.recall < champion.recall - RECALL_SLACK:
        broken.append(f"recall {candidate.recall:.1%} is below the champion's {champion.recall:.1%}")
    if broken:
        return Verdict(False, tuple(broken))
    against = f", champion {champion.recall:.1%}" if champion else ""
    return Verdict(
        True,
        (f"recall {candidate.recall:.1%}{against}, false positives {candidate.fpr:.2%} on unseen messages",),
    )


def headline(metrics: Mapping[str, Any]) -> dict[str, float]:
    """The plain numbers of a bundle's metrics, one level deep, as metadata that plots itself."""
    flat = {}
    for name, value in metrics.items():
        if isinstance(value, int | float) and not isinstance(value, bool):
            flat[name] = round(float(value), 5)
        elif isinstance(value, Mapping):
            for inner, number in value.items():
                if isinstance(number, int | float) and not isinstance(number, bool):
                    flat[f"{name}_{inner}"] = round(float(number), 5)
    return flat
