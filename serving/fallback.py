"""Scoring a batch with whatever still works: with features, without them, with the other model, not at all.

One message that a model chokes on must not cost its neighbours in the batch their scores, or a single
crafted text would open the gate for a whole campaign. So a failing batch is halved until the culprit stands
alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from serving.live import KNOWN_GOOD, Floats, ScoringFailed, ServedModel


@dataclass(frozen=True)
class Scored:
    """Messages (positions in the batch) that one model scored [n, P]; whether that was a second choice."""

    model: ServedModel
    positions: NDArray[np.intp]
    probabilities: Floats
    degraded: bool


@dataclass(frozen=True)
class Outcome:
    """Who scored what; `unscored`: positions nobody could score; `failures`: which model failed, and how."""

    scored: tuple[Scored, ...]
    unscored: NDArray[np.intp]
    failures: tuple[tuple[str, str], ...]


def score_with(models: Sequence[ServedModel], texts: Sequence[str], features: Floats | None) -> Outcome:
    """Score every text with the first of `models` that can: each with features [n, F], then on text alone."""
    scored: list[Scored] = []
    failures: list[tuple[str, str]] = []
    pending = np.arange(len(texts))
    for model, with_features, degraded in _attempts(models, features is not None):
        if not len(pending):
            break
        rows = features[pending] if with_features and features is not None else None
        probabilities, why = _isolating(model, [texts[int(i)] for i in pending], rows)
        done = ~np.isnan(probabilities).any(axis=1)
        if why:
            failures.append((model.model_id, why))
        if done.any():
            scored.append(Scored(model, pending[done], probabilities[done], degraded))
        pending = pending[~done]
    return Outcome(tuple(scored), pending, tuple(failures))


def _attempts(models: Sequence[ServedModel], have_features: bool) -> Iterator[tuple[ServedModel, bool, bool]]:
    for rank, model in enumerate(models):
        if model.columns is not None and have_features:
            yield model, True, rank > 0
        # Text alone is what a text model always reads, and a second choice for any other.
        yield model, False, rank > 0 or model.wants_features


def _isolating(model: ServedModel, texts: Sequence[str], rows: Floats | None) -> tuple[Floats, str]:
    """Probabilities [n, P], NaN where the model failed, and how it failed ('' if it did not)."""
    try:
        return model.probabilities(texts, rows), ""
    except ScoringFailed as error:
        why = str(error)
    lost = np.full((len(texts), len(model.policies)), np.nan)
    if len(texts) == 1 or not _alive(model, rows):
        return lost, why
    half = len(texts) // 2
    parts = (slice(None, half), slice(half, None))
    answers = [_isolating(model, texts[part], None if rows is None else rows[part])[0] for part in parts]
    return np.concatenate(answers), why


def _alive(model: ServedModel, rows: Floats | None) -> bool:
    """Whether the model scores a harmless message: then the batch was at fault, and halving it pays."""
    try:
        model.probabilities([KNOWN_GOOD], None if rows is None else np.zeros_like(rows[:1]))
    except ScoringFailed:
        return False
    return True
