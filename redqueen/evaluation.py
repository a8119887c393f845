"""How good is a detector on messages it has not seen, and is that good enough? Pure: scores come in, a
verdict out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

Mask = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.floating[Any]]

MIN_RECALL = 0.5
"""A detector that misses half of what it was shown examples of is broken, whatever it replaces."""

MAX_FPR_OVER_BUDGET = 2.0
RECALL_SLACK = 0.03
"""How much recall a candidate may lose on the same messages: within this, newer data is worth more."""

MIN_SLICE = 30
"""Fewer messages, or near-duplicate families, say nothing of a slice."""

SLICE_ALPHA = 0.01
"""Chance that a candidate as good as the champion in every slice is held to be behind in some."""

NEW_ACCOUNT_DAYS = 7.0
COMMUNITIES = {"tiny": (0, 10), "small": (10, 100), "middling": (100, 1_000), "large": (1_000, 2**31 - 1)}
"""Members, from and below; sizes are int32. By factors of ten: most communities are a handful of friends, and
those where strangers meet have hundreds to thousands of members (Discord,
https://discord.com/blog/discord-is-for-your-communities, 2020)."""

NEWEST = 0.2
"""A campaign is over if nothing like it is among the newest messages, this share of all."""

HARD = "attacks that once worked"
OVER = "campaigns that are over"


@dataclass(frozen=True)
class Share:
    """Recall and false-positive rate on some messages, with how many they rest on and 95% intervals."""

    n_abuse: int
    n_benign: int
    recall: float
    recall_low: float
    recall_high: float
    fpr: float
    fpr_low: float
    fpr_high: float


@dataclass(frozen=True)
class Report(Share):
    """A detector on held-out messages at its own thresholds, and on slices of them."""

    slices: Mapping[str, Share]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Verdict:
    """Whether a gate lets a candidate through, and every reason for or against it."""

    passed: bool
    reasons: tuple[str, ...]


# -- one detector --------------------------------------------------------------------------------------------


def judge(
    rows: pl.DataFrame, scores: npt.ArrayLike, thresholds: npt.ArrayLike, policies: Sequence[str]
) -> Report:
    """Measure at the operating point.

    Args:
        rows: training-set rows, length n. Those made by an attack (`hard:`) are a slice of their own and
            count nowhere else: they are machine-made, and only ever abuse.
        scores: calibrated probabilities [n, P], by the policies that the model knows.
        thresholds: [P].
        policies: by which the rows are judged.
    """
    acted = acted_on(scores, thresholds)
    abuse, families, weight = _abuse(rows, policies), _families(rows), _weight(rows)
    overall = _share(acted, abuse, ~_hard(rows), families, weight)
    found = {
        name: _share(acted, abuse, chosen, families, weight)
        for name, chosen in slices(rows, policies).items()
        if chosen.sum() >= MIN_SLICE
    }
    return Report(**asdict(overall), slices=found)


def acted_on(scores: npt.ArrayLike, thresholds: npt.ArrayLike) -> Mask:
    """bool [n]: whether some policy's threshold is reached."""
    return np.any(np.asarray(scores) >= np.asarray(thresholds), axis=1)


def slices(rows: pl.DataFrame, policies: Sequence[str]) -> dict[str, Mask]:
    """Every slice of `rows` by name: each policy (with all benign messages), language, account age, community
    size, the abuse of campaigns that are over (column `over`, made by the function of that name), and what
    attacks left. A column that the set does not have makes no slice.
    """
    hard, abuse = _hard(rows), _abuse(rows, policies)
    found = {f"policy {p}": (rows[f"p_{p}"].to_numpy() >= 0.5) | ~abuse for p in policies}
    if "language" in rows.columns:
        for language in rows["language"].drop_nulls().unique().sort().to_list():
            found[f"language {language}"] = _true(rows["language"] == language)
    if "account_age_days" in rows.columns:
        age = rows["account_age_days"]
        found |= {
            "account new": _true(age < NEW_ACCOUNT_DAYS),
            "account old": _true(age >= NEW_ACCOUNT_DAYS),
        }
    if "community_size" in rows.columns:
        for name, (low, high) in COMMUNITIES.items():
            inside = rows["community_size"].is_between(low, high, closed="left")
            found[f"community {name}"] = _true(inside)
    if "over" in rows.columns:
        found[OVER] = abuse & _true(rows["over"])
    return {name: chosen & ~hard for name, chosen in found.items()} | {HARD: hard}


def over(sent_at: npt.NDArray[np.int64], family: npt.NDArray[np.int64]) -> Mask:
    """bool [n]: whether no message of the same near-duplicate family is among the newest, by `NEWEST`.

    Args:
        sent_at: [n], n at least 1, of a whole training set: a part does not know who was heard of since.
    """
    since = np.sort(sent_at)[int(len(sent_at) * (1 - NEWEST))]
    return ~np.isin(family, family[sent_at >= since])


def _true(column: pl.Series) -> Mask:
    return np.asarray(column.fill_null(False).to_numpy(), dtype=bool)


def _hard(rows: pl.DataFrame) -> Mask:
    return _true(rows["event_id"].str.starts_with("hard:"))


def _abuse(rows: pl.DataFrame, policies: Sequence[str]) -> Mask:
    return np.any(rows.select([f"p_{p}" for p in policies]).to_numpy() >= 0.5, axis=1)


def _families(rows: pl.DataFrame) -> npt.NDArray[np.int64]:
    """Near-duplicate groups; where there are none each message is its own."""
    return rows["group"].to_numpy() if "group" in rows.columns else np.arange(rows.height)


def _weight(rows: pl.DataFrame) -> Floats:
    """How many messages each row stands for: where a training set was thinned, those left out as well. For
    benign ones alone: of abuse only floods are thinned, and a flood is one campaign.
    """
    if "inclusion" not in rows.columns:
        return np.ones(rows.height)
    return np.asarray(1 / rows["inclusion"].fill_null(1.0).to_numpy(), np.float64)


def _share(acted: Mask, abuse: Mask, chosen: Mask, families: npt.NDArray[np.int64], weight: Floats) -> Share:
    bad, good = abuse & chosen, ~abuse & chosen
    return Share(
        int(bad.sum()),
        int(good.sum()),
        _mean(acted[bad], np.ones(int(bad.sum()))),
        *share_interval(acted[bad], np.ones(int(bad.sum())), families[bad]),
        _mean(acted[good], weight[good]),
        *share_interval(acted[good], weight[good], families[good]),
    )


def _mean(acted: Mask, weight: Floats) -> float:
    return float(np.average(acted, weights=weight)) if len(acted) else 0.0


def share_interval(
    hit: Mask, weight: Floats, family: npt.NDArray[np.integer[Any]], level: float = 0.95
) -> tuple[float, float]:
    """Interval of a weighted share of messages of which near-duplicates are not independent.

    Clopper and Pearson's exact interval on the effective number of messages, after Korn and Graubard
    (Confidence intervals for proportions with small expected number of positive counts estimated from survey
    data, Survey Methodology 24, 1998): the variance is that between families, and where nothing varies (no
    message hit, or all) a family counts as one message. (0, 1) for no messages.
    """
    from scipy.stats import beta

    total = float(weight.sum())
    if total <= 0:
        return 0.0, 1.0
    of = np.unique(family, return_inverse=True)[1]
    share = float(weight[hit].sum()) / total
    most, least = total**2 / float((weight**2).sum()), total**2 / float((np.bincount(of, weight) ** 2).sum())
    between = float((np.bincount(of, weight * (hit - share)) ** 2).sum()) / total**2
    n = min(max(share * (1 - share) / between, least), most) if between > 0 else least
    hits, tail = share * n, (1 - level) / 2
    low = float(beta.ppf(tail, hits, n - hits + 1)) if hits > 0 else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, n - hits)) if hits < n else 1.0
    return low, high


# -- against the champion, slice by slice --------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """Candidate and champion on the same messages of one slice.

    Attributes:
        slice: its name.
        what: recall, or false positives.
        families: how many near-duplicate families of abusive (benign) messages the slice has.
        candidate, champion: the share of those messages that each acts on.
        lost, gained: families of which the candidate judges more messages wrongly, or fewer.
        p: chance of so many losses among those that differ, if neither were better; adjusted for the number
            of comparisons.
        behind: whether the candidate is significantly and noticeably worse.
    """

    slice: str
    what: str
    families: int
    candidate: float
    champion: float
    lost: int
    gained: int
    p: float
    behind: bool

    @property
    def reason(self) -> str:
        """For a person, where the candidate is behind."""
        return (
            f"{self.slice}: {self.what} {self.candidate:.1%}, the champion's {self.champion:.1%} "
            f"({self.lost} families of messages judged worse, {self.gained} better, p {self.p:.1g})"
        )


def compare(
    rows: pl.DataFrame, candidate: Mask, champion: Mask, policies: Sequence[str], budget: float
) -> list[Comparison]:
    """Whether the candidate falls behind the champion in some slice of the same held-out messages.

    A slice is compared where it has at least `MIN_SLICE` families of abusive (for recall) or benign messages
    (for false positives). The test is McNemar's exact one on families: of those of which the two judge a
    different number of messages rightly, half would be losses. P values are adjusted by Holm's method over
    all comparisons, so that of a hundred candidates as good as the champion everywhere at most one is said
    to be behind (`SLICE_ALPHA`). Behind is, besides, only who has lost more than `RECALL_SLACK` of recall or
    is over the false-positive budget: in a large slice trifles are significant.
    """
    abuse, families, weight = _abuse(rows, policies), _families(rows), _weight(rows)
    found = []
    for name, chosen in slices(rows, policies).items():
        for what, of in (("recall", abuse & chosen), ("false positives", ~abuse & chosen)):
            names, which = np.unique(families[of], return_inverse=True)
            if len(names) < MIN_SLICE:
                continue
            sign = 1 if what == "recall" else -1
            change = sign * (candidate[of].astype(np.int64) - champion[of])
            by_family = np.bincount(which, change, len(names))
            lost, gained = int((by_family < 0).sum()), int((by_family > 0).sum())
            stands_for = np.ones(int(of.sum())) if what == "recall" else weight[of]
            shares = _mean(candidate[of], stands_for), _mean(champion[of], stands_for)
            p = _losses_by_chance(lost, gained)
            found.append(Comparison(name, what, len(names), *shares, lost, gained, p, behind=False))
    adjusted = _holm([c.p for c in found])
    return [
        replace(c, p=p, behind=p < SLICE_ALPHA and _noticeable(c, budget))
        for c, p in zip(found, adjusted, strict=True)
    ]


def _losses_by_chance(lost: int, gained: int) -> float:
    from scipy.stats import binom

    return float(binom.sf(lost - 1, lost + gained, 0.5)) if lost else 1.0


def _holm(p: Sequence[float]) -> list[float]:
    """P values adjusted so that all may be read at one level (Holm, Scand. J. Statist. 6, 1979)."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(np.argsort(p, kind="stable").tolist()):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


def _noticeable(found: Comparison, budget: float) -> bool:
    if found.what == "recall":
        return found.candidate < found.champion - RECALL_SLACK
    return found.candidate > budget


def slice_verdict(found: Sequence[Comparison]) -> Verdict:
    """Whether no slice has fallen behind; names those that have."""
    behind = tuple(c.reason for c in found if c.behind)
    if behind:
        return Verdict(False, tuple(f"behind the champion, {reason}" for reason in behind))
    told = f"{len(found)} comparisons with the champion, none behind" if found else "nothing to compare with"
    return Verdict(True, (told,))


# -- the gate ------------------------------------------------------------------------------------------------


def gate(candidate: Report, champion: Report | None, budget: float, alike: Report | None = None) -> Verdict:
    """Whether a candidate is good enough to be attacked and rolled out.

    Args:
        champion: on the same messages, or on those of them that it cannot have learnt from; on fewer than
            `MIN_SLICE` abusive ones it is not compared.
        budget: share of benign messages that may be acted on. It is broken only if the lower end of the 95%
            interval is above twice the budget: a few hundred benign messages cannot say more.
        alike: the candidate on the champion's messages, where those are not all.
    """
    broken = []
    if candidate.recall < MIN_RECALL:
        broken.append(
            f"recall {candidate.recall:.1%} on unseen messages, at least {MIN_RECALL:.0%} is needed"
        )
    if candidate.fpr_low > MAX_FPR_OVER_BUDGET * budget:
        broken.append(f"false positives {candidate.fpr:.2%} on unseen messages, the budget is {budget:.2%}")
    told = f"recall {candidate.recall:.1%}"
    if champion is not None and champion.n_abuse >= MIN_SLICE:
        same, where = candidate, ""
        if alike is not None:
            same, where = alike, f" on the {alike.n_abuse} that it cannot have learnt from"
            told += f", {alike.recall:.1%} to the champion's {champion.recall:.1%}{where}"
        else:
            told += f", champion {champion.recall:.1%}"
        if same.recall < champion.recall - RECALL_SLACK:
            broken.append(f"recall {same.recall:.1%} is below the champion's {champion.recall:.1%}{where}")
    elif champion is not None:
        told += f", champion not compared: only {champion.n_abuse} abusive messages are new to it"
    told += f", false positives {candidate.fpr:.2%} on unseen messages"
    return Verdict(not broken, tuple(broken) or (told,))


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


def at_thresholds(metrics: Mapping[str, Any]) -> list[dict[str, str | int]]:
    """A bundle's thresholds by policy with what they do on held messages, as rows of a table; 95% intervals
    in brackets.
    """
    held = metrics["held"][metrics["selected"]]["by_policy"]
    return [
        {
            "policy": policy,
            "threshold": _bracketed(threshold, metrics["threshold_intervals"][policy]),
            "recall": _bracketed(held[policy]["recall"], held[policy]["recall_interval"]),
            "false positives": _bracketed(held[policy]["fpr"], held[policy]["fpr_interval"]),
            "abusive": int(held[policy]["n"]),
            "cost of a miss": f"{metrics['miss_costs'][policy]:g} false actions",
        }
        for policy, threshold in metrics["thresholds"].items()
    ]


def _bracketed(value: float | None, interval: Sequence[float]) -> str:
    return "" if value is None else f"{value:.4f} ({interval[0]:.4f} to {interval[1]:.4f})"
