"""From the parts' log odds to calibrated probabilities, thresholds and the figures that judge them.

A *voice* weighs the parts (encoder, linear, markov, trees) per policy and calibrates the sum; there is one
for messages with behaviour features, one for text alone and one for behaviour alone. Everything is a handful
of floats in `fusion.json`. Plain numpy and scipy: serving uses the same code that training measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from redqueen.evaluation import share_interval

Floats = npt.NDArray[np.floating[Any]]
Rows = npt.NDArray[np.bool_] | npt.NDArray[np.int64]
Logits = Mapping[str, Floats]
"""Log odds [n, policies] by part; NaN where the trees have nothing to say of a message."""

PARTS = ("encoder", "linear", "markov", "trees")
TEXT_PARTS = ("encoder", "linear", "markov")
LIMIT = 15.0
"""No part may shout louder than this: one saturated log odds must not drown the others."""

HIGHEST_THRESHOLD = 12.0
"""In log odds. Where more would be asked for, the voice is made quieter."""

BUDGET_SHARE = 0.6
"""Share of the false-positive budget that thresholds spend on held-out messages. The rest is for what they
cannot show: the held-out share is itself an estimate (some 15 messages), and live traffic has moved on."""

MISS_COST = 2.3
"""What a missed abusive message costs in false actions, where nothing else is said. No action where that does
not pay, so none below a probability of 1 / (1 + cost), however few false positives the held-out messages show
there: a new community soon fills an empty space below (Elkan, The Foundations of Cost-Sensitive Learning,
IJCAI 2001)."""

DRAWS = 200
"""Bootstrap draws for the interval of a threshold."""


@dataclass(frozen=True)
class Voice:
    """Weights over parts, then Platt calibration; all [policies, ...] as nested tuples."""

    parts: tuple[str, ...]
    weights: tuple[tuple[float, ...], ...]
    bias: tuple[float, ...]
    slope: tuple[float, ...]
    intercept: tuple[float, ...]

    def raw(self, logits: Logits) -> Floats:
        """The weighted sum [n, policies] before calibration."""
        stacked = _stacked(self.parts, logits)
        return np.asarray(np.einsum("npc,pc->np", stacked, np.asarray(self.weights)) + np.asarray(self.bias))

    def spoken(self, logits: Logits) -> npt.NDArray[np.bool_]:
        """bool [n]: the messages of which all its parts had something to say."""
        if "trees" in self.parts and "trees" in logits:
            return np.asarray(~np.isnan(logits["trees"]).any(1))
        known = set(self.parts) <= set(logits)
        return np.full(len(next(iter(logits.values()))), known)

    def logits(self, logits: Logits) -> Floats:
        """Calibrated log odds [n, policies]."""
        return np.asarray(self.raw(logits) * np.asarray(self.slope) + np.asarray(self.intercept))


def _stacked(parts: Sequence[str], logits: Logits) -> Floats:
    """[n, policies, parts]: log odds within `LIMIT`; trees with nothing to say agree with the others."""
    stacked = np.stack([np.clip(logits[p], -LIMIT, LIMIT) for p in parts], axis=2)
    if "trees" in parts and (unsaid := np.isnan(logits["trees"])).any():
        at = parts.index("trees")
        others = np.delete(stacked, at, axis=2)
        stacked[:, :, at][unsaid] = others.mean(2)[unsaid] if len(parts) > 1 else 0.0
    return np.asarray(stacked)


def _heard(parts: Sequence[str], logits: Logits, weight: Floats) -> Floats:
    """`weight` [n]; 0 for messages of which the only part has nothing to say."""
    return np.where(np.isnan(logits["trees"]).any(1), 0.0, weight) if tuple(parts) == ("trees",) else weight


@dataclass(frozen=True)
class Fusion:
    """The voices and the thresholds on probability, in the order of the bundle's policies.

    `text_only` and `features_only` are shifted so that the same thresholds act on the same share of benign
    messages: a caller that lost its features, or whose event has no words (a friend request, a picture), need
    not know other thresholds. `features_only` is None where there are no trees, or the linear model serves.
    """

    full: Voice
    text_only: Voice
    thresholds: tuple[float, ...]
    features_only: Voice | None = None

    def probabilities(self, logits: Logits, wordless: Rows | None = None) -> npt.NDArray[np.float32]:
        """Calibrated probabilities [n, policies]; the text-only voice speaks where a part is missing.

        Args:
            logits: log odds by part; those of text must all be there.
            wordless: bool [n], the messages in which there is nothing to read. The text parts know only how
                often such a message is abuse, so behaviour alone speaks for these, where it is known.
        """
        return sigmoid(self.log_odds(logits, wordless)).astype(np.float32)

    def log_odds(self, logits: Logits, wordless: Rows | None = None) -> Floats:
        """The log odds [n, policies] of `probabilities`."""
        z, silent = self.text_only.logits(logits), self.features_only
        if (speak := self.full.spoken(logits)).any():
            z = np.where(speak[:, None], self.full.logits(logits), z)
        if wordless is not None and silent is not None and (speak := silent.spoken(logits)).any():
            z = np.where((np.asarray(wordless, bool) & speak)[:, None], silent.logits(logits), z)
        return z

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Fusion:
        """The inverse of `to_dict`, also after JSON made lists of the tuples."""

        def voice(v: Mapping[str, Any]) -> Voice:
            return Voice(
                parts=tuple(v["parts"]),
                weights=tuple(tuple(map(float, row)) for row in v["weights"]),
                bias=tuple(map(float, v["bias"])),
                slope=tuple(map(float, v["slope"])),
                intercept=tuple(map(float, v["intercept"])),
            )

        silent = data.get("features_only")
        return Fusion(
            voice(data["full"]),
            voice(data["text_only"]),
            tuple(map(float, data["thresholds"])),
            voice(silent) if silent else None,
        )


def sigmoid(z: Floats) -> Floats:
    """Probabilities of log odds."""
    return np.asarray(1 / (1 + np.exp(-np.clip(z, -40, 40))))


def log_odds(p: Floats) -> Floats:
    """Log odds of probabilities."""
    p = np.clip(p, 1e-9, 1 - 1e-9)
    return np.asarray(np.log(p) - np.log1p(-p))


# -- fitting -------------------------------------------------------------------------------------------------


def fit_voice(parts: Sequence[str], logits: Logits, targets: Floats, weight: Floats) -> Voice:
    """Weigh the parts on messages that none of them was trained on; not yet calibrated.

    Weights are kept non-negative and are drawn to the plain average, so that a policy with a dozen examples
    gets that and not a fluke.
    """
    stacked, weight = _stacked(parts, logits), _heard(parts, logits, weight)
    average = np.full(len(parts), 1 / len(parts))
    fitted = [
        _logistic(stacked[:, p], targets[:, p], weight, average, pull=2.0) for p in range(targets.shape[1])
    ]
    ones, zeros = (1.0,) * len(fitted), (0.0,) * len(fitted)
    return Voice(tuple(parts), tuple(tuple(w) for w, _ in fitted), tuple(b for _, b in fitted), ones, zeros)


def calibrate(voice: Voice, logits: Logits, targets: Floats, weight: Floats) -> Voice:
    """Platt scaling per policy on messages that neither parts nor weights have seen."""
    z, weight = voice.raw(logits), _heard(voice.parts, logits, weight)
    fitted = [
        _logistic(z[:, [p]], targets[:, p], weight, np.ones(1), pull=2.0) for p in range(targets.shape[1])
    ]
    return replace(voice, slope=tuple(w[0] for w, _ in fitted), intercept=tuple(b for _, b in fitted))


def _logistic(x: Floats, y: Floats, weight: Floats, prior: Floats, pull: float) -> tuple[list[float], float]:
    """Ridge logistic regression towards `prior` on soft targets; weights at least 0."""
    from scipy.optimize import minimize

    def loss(theta: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        w, b = theta[:-1], theta[-1]
        z = x @ w + b
        error = weight * (sigmoid(z) - y)
        value = (weight * (np.logaddexp(0, z) - y * z)).sum()
        value += 0.5 * pull * ((w - prior) ** 2).sum() + 0.005 * b * b
        return float(value), np.append(x.T @ error + pull * (w - prior), error.sum() + 0.01 * b)

    bounds = [(0.0, None)] * len(prior) + [(None, None)]
    best = minimize(loss, np.append(prior, 0.0), jac=True, method="L-BFGS-B", bounds=bounds)
    # Rounded: the last bits of an optimum differ between machines and mean nothing.
    return [round(float(v), 6) for v in best.x[:-1]], round(float(best.x[-1]), 6)


def least_logit(costs: Floats) -> Floats:
    """Log odds [policies] below which acting costs more than it saves: 1 / (1 + cost) as a probability."""
    return np.asarray(-np.log(np.asarray(costs, np.float64)))


def cut(
    z: Floats,
    benign: npt.NDArray[np.bool_],
    weight: Floats,
    share: float,
    floor: float | Floats = -np.inf,
    label_error: float = 0.0,
    costs: Floats | None = None,
) -> Floats:
    """Thresholds on `z` [policies] that let at most `share` of benign messages be acted on, all policies
    together.

    label_error: share of abusive messages that judges call benign. Those look like false positives that no
    threshold short of missing all abuse can avoid, and a handful of them decides where it lies: as many as
    the caught abuse lets expect are not counted, but never more than `share` itself: judges may err less.

    costs: of a missed message, by policy. A policy is allowed benign messages in proportion, and with equal
    costs all are allowed the same number, so that the rare ones are watched with the same care; what a policy
    does not need, because its threshold has come down to `floor`, the others may spend.
    """
    tail = -np.sort(-z[benign], axis=0)
    w, bad = weight[benign], weight[~benign]
    odds = label_error / (1 - label_error)
    every = np.arange(z.shape[1])
    pace = np.ones(len(every)) if costs is None else np.asarray(costs) / np.max(costs)
    best = np.maximum(tail[0] + 0.5 if len(tail) else np.zeros(len(every)), floor)
    for k in range(1, len(tail)):
        rank = np.ceil(k * pace).astype(np.int64)
        at = np.maximum((tail[rank - 1, every] + tail[rank, every]) / 2, floor)
        misjudged = min(odds * (bad * (z[~benign] >= at).any(1)).sum(), share * w.sum())
        if (w * (z[benign] >= at).any(1)).sum() - misjudged > share * w.sum():
            break
        best = at
        if (at == floor).all():
            break
    return np.asarray(best)


@dataclass(frozen=True)
class Limits:
    """What thresholds are set by: the share of benign messages that may be acted on, all policies together;
    the share of abusive messages that judges call benign; the cost of a miss by policy, in false actions.
    """

    fpr_budget: float
    label_error: float
    costs: tuple[float, ...]

    def cut(self, z: Floats, abusive: npt.NDArray[np.bool_], weight: Floats) -> Floats:
        """Thresholds on calibrated log odds `z` of held-out messages."""
        costs = np.asarray(self.costs)
        share = self.fpr_budget * BUDGET_SHARE
        return cut(z, ~abusive, weight, share, least_logit(costs), self.label_error, costs)


def finish(
    full: Voice,
    text_only: Voice,
    logits: Logits,
    part: Slice,
    limits: Limits,
    features_only: Voice | None = None,
) -> Fusion:
    """Thresholds on held-out messages; the other voices are shifted so that the same ones hold for them."""
    cuts = limits.cut(full.logits(logits), part.abusive, part.weight)
    # In float32 every probability beyond some 17 log odds is 1: a threshold there would tell none apart.
    shrunk = np.minimum(1, HIGHEST_THRESHOLD / np.maximum(cuts, 1))
    full = replace(
        full,
        slope=tuple(round(float(v), 6) for v in full.slope * shrunk),
        intercept=tuple(round(float(v), 6) for v in full.intercept * shrunk),
    )
    cuts = np.round(cuts * shrunk, 6)

    def shifted(voice: Voice) -> Voice:
        weight = _heard(voice.parts, logits, part.weight)
        own = np.round(limits.cut(voice.logits(logits), part.abusive, weight), 6)
        moved = zip(voice.intercept, cuts, own, strict=True)
        return replace(voice, intercept=tuple(round(float(i + c - t), 6) for i, c, t in moved))

    return Fusion(
        full,
        shifted(text_only),
        tuple(round(float(p), 9) for p in sigmoid(cuts)),
        None if features_only is None else shifted(features_only),
    )


def threshold_intervals(
    voice: Voice, logits: Logits, part: Slice, limits: Limits, draws: int = DRAWS
) -> list[tuple[float, float]]:
    """95% intervals of the thresholds on probability, by policy: how far they would lie elsewhere had other
    messages been held.

    Percentile bootstrap that draws near-duplicate groups, not messages, with replacement (Field and Welsh,
    Bootstrapping Clustered Data, JRSS B 69, 2007); the calibration is taken as it is.
    """
    z = voice.logits(logits)
    names, of = np.unique(part.groups, return_inverse=True)
    rng = np.random.default_rng(0)
    found = []
    for _ in range(draws if len(names) else 0):
        times = rng.multinomial(len(names), np.full(len(names), 1 / len(names)))[of]
        drawn = times > 0
        found.append(np.round(limits.cut(z[drawn], part.abusive[drawn], (part.weight * times)[drawn]), 6))
    if not found:
        return [(0.0, 1.0)] * z.shape[1]
    ends = sigmoid(np.percentile(np.stack(found), [2.5, 97.5], axis=0))
    return [(round(float(low), 9), round(float(high), 9)) for low, high in ends.T]


# -- judging -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """Labelled messages to judge on: soft targets [n, policies], weights [n], near-duplicate groups [n]."""

    targets: Floats
    weight: Floats
    group: npt.NDArray[np.int64] | None = None

    @property
    def groups(self) -> npt.NDArray[np.int64]:
        """The groups; where nobody named them each message is its own."""
        return np.arange(len(self.weight)) if self.group is None else self.group

    def of(self, rows: Rows) -> Slice:
        """Some of the messages."""
        return Slice(self.targets[rows], self.weight[rows], self.groups[rows])

    @property
    def abusive(self) -> npt.NDArray[np.bool_]:
        """Messages that are more likely abuse than not."""
        return np.asarray(self.targets.max(1) >= 0.5)


def report(z: Floats, cuts: Floats, part: Slice, policies: Sequence[str]) -> dict[str, Any]:
    """Recall, false-positive share, PR-AUC and ECE of log odds `z` [n, policies] acted on at `cuts`.

    A message counts as caught whichever policy caught it: the platform acted on it. Of one policy, `recall`
    is the share of its messages that were acted on at all, `fpr` the share of benign messages that this
    policy acted on. Intervals are 95%, and near-duplicates do not narrow them (`share_interval`).
    """
    acted, abusive = np.asarray((z >= cuts).any(1)), part.abusive
    by_policy: dict[str, Any] = {}
    for p, name in enumerate(policies):
        positive = part.targets[:, p] >= 0.5
        by_policy[name] = {
            **_share("recall", acted, positive, part),
            **_share("fpr", np.asarray((z >= cuts)[:, p]), ~abusive, part),
            "pr_auc": pr_auc(z[:, p], positive, part.weight),
            "ece": ece(sigmoid(z[:, p]), part.targets[:, p], part.weight),
            "n": int(positive.sum()),
        }
    return {
        **_share("recall", acted, abusive, part),
        **_share("fpr", acted, ~abusive, part),
        "pr_auc": pr_auc(z.max(1), abusive, part.weight),
        "ece": round(float(np.mean([v["ece"] for v in by_policy.values()])), 5),
        "n_abusive": int(abusive.sum()),
        "n_benign": int((~abusive).sum()),
        "by_policy": by_policy,
    }


def _share(name: str, acted: npt.NDArray[np.bool_], of: npt.NDArray[np.bool_], part: Slice) -> dict[str, Any]:
    low, high = share_interval(acted[of], part.weight[of], part.groups[of])
    interval = [round(low, 5), round(high, 5)]
    return {name: share(acted, of, part.weight), f"{name}_interval": interval}


def share(acted: npt.NDArray[np.bool_], of: npt.NDArray[np.bool_], weight: Floats) -> float | None:
    """Weighted share of the messages `of` that were acted on; None where there are none."""
    total = float(weight[of].sum())
    return round(float(weight[of & acted].sum()) / total, 5) if total else None


def pr_auc(score: Floats, positive: npt.NDArray[np.bool_], weight: Floats) -> float | None:
    """Average precision, weighted; None without positives. Equal scores are one step: their order means
    nothing.
    """
    if not positive.any():
        return None
    steps, place = np.unique(-score, return_inverse=True)
    hits = np.bincount(place, weight * positive, len(steps))
    precision = np.cumsum(hits) / np.maximum(np.cumsum(np.bincount(place, weight, len(steps))), 1e-12)
    return round(float((precision * hits).sum() / hits.sum()), 5)


def ece(p: Floats, target: Floats, weight: Floats, bins: int = 15) -> float:
    """Expected calibration error over bins of equal width."""
    which = np.minimum((p * bins).astype(np.int64), bins - 1)
    gap = np.bincount(which, weight * (p - target), bins)
    return round(float(np.abs(gap).sum() / max(weight.sum(), 1e-12)), 5)
