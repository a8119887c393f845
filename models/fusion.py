"""From the parts' log odds to calibrated probabilities, thresholds and the figures that judge them.

A *voice* weighs the parts (encoder, linear, trees) per policy and calibrates the sum; there is one for
messages with behaviour features and one for text alone. Everything is a handful of floats in `fusion.json`.
Plain numpy and scipy: serving uses the same code that training measured.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]
Logits = Mapping[str, Floats]
"""Log odds [n, policies] by part."""

PARTS = ("encoder", "linear", "trees")
TEXT_PARTS = ("encoder", "linear")
LIMIT = 15.0
"""No part may shout louder than this: one saturated log odds must not drown the others."""

BUDGET_SHARE = 0.6
"""Share of the false-positive budget that thresholds spend on held-out messages. The rest is for what they
cannot
show: the held-out share is itself an estimate (some 15 messages), and live traffic has moved on from it."""

LEAST_PROBABILITY = 0.3
"""No action below it, however few false positives the held-out messages show there: it says that a missed
abusive
message costs a little over two false actions, and a new community soon fills an empty space below."""


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
        stacked = np.stack([np.clip(logits[p], -LIMIT, LIMIT) for p in self.parts], axis=2)
        return np.asarray(np.einsum("npc,pc->np", stacked, np.asarray(self.weights)) + np.asarray(self.bias))

    def logits(self, logits: Logits) -> Floats:
        """Calibrated log odds [n, policies]."""
        return np.asarray(self.raw(logits) * np.asarray(self.slope) + np.asarray(self.intercept))


@dataclass(frozen=True)
class Fusion:
    """The two voices and the thresholds on probability, in the order of the bundle's policies.

    `text_only` is shifted so that the same thresholds let through the same share of benign messages: a caller
    that lost its features need not know other thresholds.
    """

    full: Voice
    text_only: Voice
    thresholds: tuple[float, ...]

    def probabilities(self, logits: Logits) -> npt.NDArray[np.float32]:
        """Calibrated probabilities [n, policies]; the text-only voice speaks where a part is missing."""
        voice = self.full if set(self.full.parts) <= set(logits) else self.text_only
        return sigmoid(voice.logits(logits)).astype(np.float32)

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

        return Fusion(voice(data["full"]), voice(data["text_only"]), tuple(map(float, data["thresholds"])))


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
    gets the average and not a fluke.
    """
    stacked = np.stack([np.clip(logits[p], -LIMIT, LIMIT) for p in parts], axis=2)
    fitted = [
        _logistic(stacked[:, p], targets[:, p], weight, np.full(len(parts), 1 / len(parts)), pull=2.0)
        for p in range(targets.shape[1])
    ]
    ones, zeros = (1.0,) * len(fitted), (0.0,) * len(fitted)
    return Voice(tuple(parts), tuple(tuple(w) for w, _ in fitted), tuple(b for _, b in fitted), ones, zeros)


def calibrate(voice: Voice, logits: Logits, targets: Floats, weight: Floats) -> Voice:
    """Platt scaling per policy on messages that neither parts nor weights have seen."""
    z = voice.raw(logits)
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


def cut(
    z: Floats,
    benign: npt.NDArray[np.bool_],
    weight: Floats,
    share: float,
    floor: float = -np.inf,
    label_error: float = 0.0,
) -> Floats:
    """Thresholds on `z` [policies] that let at most `share` of benign messages be acted on, all policies
    together.

    label_error: share of abusive messages that judges call benign. Those look like false positives that no
    threshold short of missing all abuse can avoid, and a handful of them decides where it lies: as many as
    the caught abuse lets expect are not counted, but never more than `share` itself: judges may err less.

    Every policy is allowed the same number of benign messages, so that the rare ones are watched with the
    same care; what a policy does not need, because its threshold has come down to `floor`, the others may
    spend.
    """
    tail = -np.sort(-z[benign], axis=0)
    w, bad = weight[benign], weight[~benign]
    odds = label_error / (1 - label_error)
    best = np.maximum(tail[0] + 0.5 if len(tail) else np.zeros(z.shape[1]), floor)
    for k in range(1, len(tail)):
        at = np.maximum((tail[k - 1] + tail[k]) / 2, floor)
        misjudged = min(odds * (bad * (z[~benign] >= at).any(1)).sum(), share * w.sum())
        if (w * (z[benign] >= at).any(1)).sum() - misjudged > share * w.sum():
            break
        best = at
        if (at == floor).all():
            break
    return np.asarray(best)


def finish(
    full: Voice,
    text_only: Voice,
    logits: Logits,
    abusive: npt.NDArray[np.bool_],
    weight: Floats,
    fpr_budget: float,
    label_error: float = 0.0,
) -> Fusion:
    """Thresholds on held-out messages; the text-only voice is shifted so that the same ones hold for it."""
    share = fpr_budget * BUDGET_SHARE
    floor = float(log_odds(np.asarray(LEAST_PROBABILITY)))
    cuts = np.round(cut(full.logits(logits), ~abusive, weight, share, floor, label_error), 6)
    text_z = text_only.logits(logits)
    text_cuts = np.round(cut(text_z, ~abusive, weight, share, floor, label_error), 6)
    shifted = tuple(
        round(float(i + c - t), 6) for i, c, t in zip(text_only.intercept, cuts, text_cuts, strict=True)
    )
    return Fusion(
        full, replace(text_only, intercept=shifted), tuple(round(float(p), 9) for p in sigmoid(cuts))
    )


# -- judging -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Slice:
    """Labelled messages to judge on: soft targets [n, policies] and weights [n]."""

    targets: Floats
    weight: Floats

    @property
    def abusive(self) -> npt.NDArray[np.bool_]:
        """Messages that are more likely abuse than not."""
        return np.asarray(self.targets.max(1) >= 0.5)


def report(z: Floats, cuts: Floats, part: Slice, policies: Sequence[str]) -> dict[str, Any]:
    """Recall, false-positive share, PR-AUC and ECE of log odds `z` [n, policies] acted on at `cuts`.

    A message counts as caught whichever policy caught it: the platform acted on it.
    """
    acted, abusive, w = np.asarray((z >= cuts).any(1)), part.abusive, part.weight
    by_policy = {
        name: {
            "recall": share(acted, part.targets[:, p] >= 0.5, w),
            "pr_auc": pr_auc(z[:, p], part.targets[:, p] >= 0.5, w),
            "ece": ece(sigmoid(z[:, p]), part.targets[:, p], w),
            "n": int((part.targets[:, p] >= 0.5).sum()),
        }
        for p, name in enumerate(policies)
    }
    return {
        "recall": share(acted, abusive, w),
        "fpr": share(acted, ~abusive, w),
        "pr_auc": pr_auc(z.max(1), abusive, w),
        "ece": round(float(np.mean([v["ece"] for v in by_policy.values()])), 5),
        "n_abusive": int(abusive.sum()),
        "n_benign": int((~abusive).sum()),
        "by_policy": by_policy,
    }


def share(acted: npt.NDArray[np.bool_], of: npt.NDArray[np.bool_], weight: Floats) -> float | None:
    """Weighted share of the messages `of` that were acted on; None where there are none."""
    total = float(weight[of].sum())
    return round(float(weight[of & acted].sum()) / total, 5) if total else None


def pr_auc(score: Floats, positive: npt.NDArray[np.bool_], weight: Floats) -> float | None:
    """Average precision, weighted; None without positives."""
    if not positive.any():
        return None
    order = np.argsort(-score, kind="stable")
    hits = (weight * positive)[order]
    precision = np.cumsum(hits) / np.maximum(np.cumsum(weight[order]), 1e-12)
    return round(float((precision * hits).sum() / hits.sum()), 5)


def ece(p: Floats, target: Floats, weight: Floats, bins: int = 15) -> float:
    """Expected calibration error over bins of equal width."""
    which = np.minimum((p * bins).astype(np.int64), bins - 1)
    gap = np.bincount(which, weight * (p - target), bins)
    return round(float(np.abs(gap).sum() / max(weight.sum(), 1e-12)), 5)
