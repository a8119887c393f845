"""The parts beside the encoder (linear model, Markov models, trees): what they learn from, how they are
fitted.

Linear model and trees learn from copies of messages padded with benign ones as well. All are cheap enough to
be fitted again on the past as it was known then; that decides how much each is listened to
(`models.rehearsal`).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from models import baseline, markov, perturb, trees
from models.baseline import Linear
from models.dataset import Dataset, Rows, Split, forward
from models.markov import Markov
from models.tokens import View, views
from models.train import TrainingSpec
from models.trees import Trees
from redqueen.features import with_text

PADDED, PADDED_WEIGHT = 0.4, 0.5
"""Share of messages that linear model and trees also see padded with benign ones, and what such a copy
weighs. Without them a long message looks benign by its length alone, and three kind words before a lure hide
it."""
SHORT = baseline.PIECE * baseline.BURIED[0][0]
"""Characters of a message in which no stretch speaks alone."""


@dataclass(frozen=True)
class Shallow:
    """The parts beside the encoder; no trees where there is no behaviour."""

    linear: Linear
    markov: Markov
    trees: Trees | None

    def logits(
        self, data: Dataset, rows: Rows, encoded: npt.NDArray[np.float32] | None
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Log odds of `rows` by part, those of the encoder included, where there is one."""
        features = None if data.features is None else data.features[rows]
        return self.read([data.views[i] for i in rows], features, encoded)

    def read(
        self,
        seen: Sequence[View],
        features: npt.NDArray[np.float32] | None,
        encoded: npt.NDArray[np.float32] | None,
    ) -> dict[str, npt.NDArray[np.float32]]:
        """The same of messages that need not be in the dataset."""
        found = {} if encoded is None else {"encoder": encoded}
        canonical = [v.canonical for v in seen]
        found["linear"], found["markov"] = self.linear.logits(canonical), self.markov.logits(canonical)
        if self.trees is not None and features is not None:
            found["trees"] = self.trees.logits(features)
        return found


@dataclass(frozen=True)
class Material:
    """What linear model and trees learn from: the messages, and padded copies of some.

    Attributes:
        design: hashed texts, those of the messages [n] and then those of the copies [m].
        of: int64 [m], whose copy each is.
        short: bool [m], whether its message is. The linear model hears a long one stretch by stretch, and
            what stands around it in a copy would only teach it that benign words are none.
        features: of the copies, float32 [m, F]; None without behaviour.
    """

    data: Dataset
    design: baseline.Design
    of: Rows
    short: npt.NDArray[np.bool_]
    features: npt.NDArray[np.float32] | None

    @staticmethod
    def made(spec: TrainingSpec, data: Dataset, parts: Split) -> Material:
        of, texts = _padded(data, np.sort(parts.everything), spec.seed)
        canonical = [view.canonical for view in views(texts)]
        features = None
        if data.features is not None:
            features = with_text(data.features[of], texts, spec.feature_names)
        short = np.array([len(data.views[i].canonical) <= SHORT for i in of], bool)
        design = baseline.Design.of([*data.canonical, *canonical])
        return Material(data, design, of, short, features)

    def counting_twice(self, rows: Rows) -> Material:
        """The same, but that some messages and their copies weigh twice as much."""
        weight = self.data.weight.copy()
        weight[rows] *= 2
        return replace(self, data=replace(self.data, weight=weight))

    def linear(self, rows: Rows, start: Linear | None = None) -> Linear:
        """Fitted on some messages and their copies; in fewer steps where it starts from an older fit."""
        copies = np.flatnonzero(np.isin(self.of, rows) & self.short)
        every = np.concatenate([rows, len(self.data.views) + copies])
        targets, weight = self._told(rows, copies)
        return baseline.fit(
            self.design,
            every,
            targets,
            weight,
            counted=len(rows),
            start=start,
            iterations=20 if start else 40,
        )

    def markov(self, rows: Rows) -> Markov:
        """The same of the messages alone."""
        return fit_markov(self.data, rows)

    def trees(self, rows: Rows, seed: int) -> Trees | None:
        """The same; None without behaviour."""
        if self.data.features is None or self.features is None:
            return None
        copies = np.flatnonzero(np.isin(self.of, rows))
        known = np.concatenate([self.data.features[rows], self.features[copies]])
        return trees.fit(known, *self._told(rows, copies), counted=len(rows), seed=seed)

    def _told(self, rows: Rows, copies: Rows) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        targets, weight = self.data.targets, self.data.weight
        origin = self.of[copies]
        return (
            np.concatenate([targets[rows], targets[origin]]),
            np.concatenate([weight[rows], PADDED_WEIGHT * weight[origin]]).astype(np.float32),
        )


def _padded(data: Dataset, rows: Rows, seed: int) -> tuple[Rows, list[str]]:
    """Some of `rows`, ascending, and their texts padded with benign ones that were sent before them: nothing
    is learnt that was not known by then.
    """
    rng, pick = np.random.default_rng(seed), random.Random(seed)
    worded = rows[data.talked[rows]]
    benign = worded[~data.abusive[worded]]
    chosen = worded[rng.random(len(worded)) < PADDED]
    before = np.searchsorted(benign, chosen)
    chosen, before = chosen[before > 0], before[before > 0]
    texts = []
    for row, end in zip(chosen.tolist(), before.tolist(), strict=True):
        kind = [data.texts[benign[pick.randrange(end)]] for _ in range(perturb.OTHERS)]
        texts.append(perturb.among(kind, data.texts[row], pick))
    return chosen, texts


def fit_markov(data: Dataset, rows: Rows) -> Markov:
    """Of messages and no copies: what pads an abusive one is not how abuse is written."""
    return markov.fit([data.views[i].canonical for i in rows], data.targets[rows], data.weight[rows])


def fit_shallow(
    spec: TrainingSpec, data: Dataset, parts: Split, older: Markov
) -> tuple[Shallow, Shallow, Forward]:
    """Fitted on the older messages, and on all but the held ones, where the newest count twice (as they do
    for the encoder); what older fits would have said.

    Args:
        older: the Markov models of the older messages.
    """
    material = Material.made(spec, data, parts)
    linear = material.linear(parts.older)
    before = Shallow(linear, older, material.trees(parts.older, spec.seed))
    fresh = material.counting_twice(parts.newest)
    linear = fresh.linear(parts.everything, start=linear)
    after = Shallow(linear, fresh.markov(parts.everything), fresh.trees(parts.everything, spec.seed))
    return before, after, _forward(data, parts, material, spec.seed)


@dataclass(frozen=True)
class Forward:
    """Log odds of the cheap parts for older messages, each predicted from those before it."""

    rows: Rows
    logits: dict[str, npt.NDArray[np.float32]]


def _forward(data: Dataset, parts: Split, material: Material, seed: int) -> Forward:
    """What the cheap parts would have said in the past. One fold says how they did lately, and an attack of
    that week alone would decide who is listened to; the encoder is too dear to be trained again for it.
    """
    linear: Linear | None = None
    rows, found = [parts.older[:0]], []
    for known, later in forward(data, parts.older):
        linear = material.linear(known, start=linear)
        fitted = Shallow(linear, material.markov(known), material.trees(known, seed))
        found.append(fitted.logits(data, later, None))
        rows.append(later)
    every = {p: np.concatenate([logits[p] for logits in found]) for p in found[0]}
    return Forward(np.concatenate(rows), every)
