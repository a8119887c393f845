"""From the tables of a window to its one signals record. Pure: reading and Evidently are the asset's part.

The figures themselves are defined in `redqueen.drift` and `redqueen.adaptation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Literal

import numpy as np
import polars as pl

from redqueen import adaptation, labels
from redqueen.adaptation import AdaptationFigures, Baseline
from redqueen.drift import DriftFigures, Reference, fit_reference
from redqueen.policy import LabelCounts, Signals

TRAILING = timedelta(hours=4)
"""How far back labels are still awaited before a figure that needs them is read."""

REFERENCE_WINDOWS = 4
"""The first windows of a champion, in which nobody has had time to adapt to it, are what later ones are held
to.
"""

MIN_COVERAGE = 0.5
"""Below this share of messages with a prediction the watchers see too little to be believed."""

SCORE_PREFIX = "score_"


def once(predictions: pl.DataFrame) -> pl.DataFrame:
    """Each prediction once: a client may send a message twice, and a killed service may log it twice."""
    if predictions.is_empty():
        return predictions
    return predictions.unique(["event_id", "model_id", "arm"], keep="first", maintain_order=True)


def answered(predictions: pl.DataFrame) -> pl.DataFrame:
    """The predictions that decided what happened, one an event; shadow rows decided nothing."""
    if predictions.is_empty():
        return predictions
    decided = predictions.filter(pl.col("arm") != "shadow")
    return decided.unique("event_id", keep="first", maintain_order=True)


def drift_frame(
    predictions: pl.DataFrame, feature_names: Sequence[str], policies: Sequence[str]
) -> pl.DataFrame:
    """The columns that drift is measured on: features as served, and the score of each policy.

    Args:
        predictions: rows of one model; `features` lists in the order of `feature_names`.
    """
    lists = predictions["features"].to_list()
    width = len(feature_names)
    # A row served without features (degraded) counts as null in every column: losing them is a drift too.
    matrix = np.array([row if len(row) == width else [np.nan] * width for row in lists], dtype=np.float64)
    columns = {name: matrix[:, i] for i, name in enumerate(feature_names)} if len(lists) else {}
    scores = [dict(pairs) if not isinstance(pairs, dict) else pairs for pairs in _score_maps(predictions)]
    columns |= {f"{SCORE_PREFIX}{p}": np.array([s.get(p, np.nan) for s in scores]) for p in policies}
    return pl.DataFrame(columns)


def _score_maps(predictions: pl.DataFrame) -> list[dict[str, float]]:
    """Arrow maps come back as lists of key and value."""
    return [
        {entry["key"]: entry["value"] for entry in row} if isinstance(row, list) else dict(row or {})
        for row in predictions["scores"].to_list()
    ]


def score_columns(policies: Sequence[str]) -> tuple[str, ...]:
    """The columns of `drift_frame` that are the model's own scores."""
    return tuple(f"{SCORE_PREFIX}{policy}" for policy in policies)


def make_reference(
    predictions: pl.DataFrame, feature_names: Sequence[str], policies: Sequence[str]
) -> Reference:
    """Freeze what a model's traffic looked like while it was on its way to live."""
    frame = drift_frame(predictions, feature_names, policies)
    varied = [name for name in frame.columns if frame[name].is_not_nan().any()]
    return fit_reference(frame, varied)


@dataclass(frozen=True)
class Watched:
    """The record of a window: the signals that decide, and what a person wants beside them."""

    signals: Signals
    baselines: dict[str, Baseline] = field(default_factory=dict)
    n_events: int = 0
    n_served: int = 0
    stage: str = "none"

    def to_dict(self) -> dict[str, Any]:
        return self.signals.to_dict() | {
            "baselines": {name: baseline.to_dict() for name, baseline in self.baselines.items()},
            "n_events": self.n_events,
            "n_served": self.n_served,
            "stage": self.stage,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Watched:
        return cls(
            Signals.from_dict(data),
            {name: Baseline.from_dict(b) for name, b in data["baselines"].items()},
            int(data["n_events"]),
            int(data["n_served"]),
            data["stage"],
        )


def adaptation_figures(
    trailing: pl.DataFrame,
    votes: pl.DataFrame,
    window: datetime,
    policies: Sequence[str],
    maturity_hours: float | Mapping[str, float],
    weights: pl.DataFrame | None = None,
) -> tuple[AdaptationFigures, int]:
    """The adaptation figures of the window that starts at `window`, and how many messages judged abusive got
    through.

    Args:
        trailing: answered predictions with `ts` in the window or up to `TRAILING` before its end.
        votes: label rows received by the window's end.
        weights: `label_id, weight` from the poisoning guard; a vote that is not named weighs 1.
    """
    end = window + timedelta(hours=1)
    gold = labels.gold(votes, end, policies, maturity_hours=maturity_hours, weights=weights)
    known_at = _known_at(votes, weights) if votes.height else None
    joined = adaptation.join_labels(trailing, gold, known_at)
    # Friend requests and joins carry no text: nobody can obfuscate them, so they would only dilute.
    served = joined.filter(pl.col("ts") >= window)
    missed = joined.filter(pl.col("abuse") & pl.col("action").is_in(adaptation.DELIVERED)).height
    return adaptation.window_figures(served, joined, window=window), missed


def _known_at(votes: pl.DataFrame, weights: pl.DataFrame | None) -> pl.DataFrame:
    """When a vote that counts first called each event abuse: `event_id, known_at`.

    A vote that is held, or says something else, tells nobody of abuse. If it did, whoever reports his own
    messages first would have them known too early to be news when they are judged.
    """
    said = votes.filter(pl.col("value") == "abuse")
    if weights is not None and weights.height:
        held = weights.filter(pl.col("weight") <= 0)
        said = said.join(held, on="label_id", how="anti")
    return said.select("event_id", known_at="received_at")


def watch(
    window: datetime,
    champion: str | None,
    figures: AdaptationFigures | None,
    drift: DriftFigures | None,
    past: Sequence[Watched],
    *,
    n_events: int,
    n_served: int,
    counts: LabelCounts,
    stage: str,
    expected: bool = False,
) -> Watched:
    """Put a window's record together: baselines from the champion's first windows, alarms on the later ones.

    Args:
        champion: the model that answered; None where none did.
        past: earlier records, oldest first, of any champion.
        expected: whether a model should have answered.
    """
    health, why = _health(expected or champion is not None, n_events, n_served)
    bare = Signals(
        window=window, champion=champion, health=health, health_reason=why, drift=drift, labels=counts
    )
    if champion is None or figures is None:
        return Watched(bare, {}, n_events, n_served, stage)
    own = [w.signals.figures for w in past if w.signals.champion == champion and w.signals.figures]
    former = next(
        (w.baselines for w in reversed(past) if w.signals.champion != champion and w.baselines), None
    )
    mine = [*own, figures]
    kept = [w.baselines for w in past if w.signals.champion == champion and w.signals.figures]
    if len(kept) >= REFERENCE_WINDOWS:
        # Kept, not fitted again: those first windows leave what is remembered, and an attack would move in.
        base = dict(kept[-1])
    else:
        base = adaptation.baselines(mine[:REFERENCE_WINDOWS], fallback=former)
        ours, theirs = base.get(adaptation.EVASION), (former or {}).get(adaptation.EVASION)
        if ours and theirs and ours.mean > theirs.mean:
            # An attack that still gets through must not become the new normal for having outlived a retrain.
            base[adaptation.EVASION] = theirs
    later = mine[REFERENCE_WINDOWS:]
    signals = Signals(
        window=window, champion=champion, health=health, health_reason=why, drift=drift, labels=counts,
        figures=figures,
        alarms=adaptation.alarms(later, base),
        unmeasured=adaptation.unmeasured(later, base),
    )  # fmt: skip
    return Watched(signals, base, n_events, n_served, stage)


def _health(expected: bool, n_events: int, n_served: int) -> tuple[Literal["ok", "broken"], str]:
    if expected and n_events and n_served < MIN_COVERAGE * n_events:
        return "broken", f"only {n_served} of {n_events} events have a prediction: is the scoring service up?"
    return "ok", ""


def label_counts(votes: pl.DataFrame, since: datetime | None, trusted_sources: Sequence[str]) -> LabelCounts:
    """How many events trusted sources have judged, in all and among labels received after `since`."""
    if votes.is_empty():
        return LabelCounts(0, 0)
    trusted = votes.filter(pl.col("source").is_in(list(trusted_sources)) & (pl.col("value") != "unsure"))
    fresh = trusted if since is None else trusted.filter(pl.col("received_at") > since)
    return LabelCounts(trusted["event_id"].n_unique(), fresh["event_id"].n_unique())
