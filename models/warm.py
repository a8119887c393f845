"""The champion's part in the training of its successor: a warm start, and the measure of what was forgotten.

Which of the champion's weights may be taken over, when a start from them can still be judged honestly, and
how the two do on old campaigns. The training itself is `models.encoding` and `models.training`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
from torch import Tensor

from models import bundle, encoder
from models.bundle import Manifest
from models.dataset import Dataset, Rows, Split, micros, unheard_of
from models.detector import Detector
from models.encoding import config_of
from models.train import TrainingSpec
from redqueen.evaluation import over

LEAST_ABUSIVE, LEAST_BENIGN = 40, 160
"""Judged messages that the champion cannot have learnt from, without which no warm start can be judged."""


@dataclass(frozen=True)
class Champion:
    """A parent's bundle, verified; `until` is the newest message of its training, in microseconds, `rates`
    the shares of groups that its training held.
    """

    folder: Path
    manifest: Manifest
    files: dict[str, bytes]
    until: int | None
    seed: int | None
    rates: tuple[float, ...]

    def knows_no_held(self, spec: TrainingSpec, parts: Split) -> bool:
        """Whether all that is held now was held from it too: the seed is the same, and no larger share is
        held than was then.
        """
        pairs = zip(parts.rates, self.rates, strict=False)
        return self.seed == spec.seed and len(self.rates) == 2 and all(now <= then for now, then in pairs)

    @staticmethod
    def of(spec: TrainingSpec) -> Champion | None:
        """The champion that a spec names; None where there is none.

        Raises:
            BundleError: its bundle does not verify.
        """
        if spec.parent_bundle is None:
            return None
        folder = Path(spec.parent_bundle)
        manifest, files = bundle.read(folder)
        training = json.loads(files[bundle.METRICS]).get("training", {})
        until = training.get("until")
        at = None if until is None else micros(until)
        rates = tuple(map(float, training.get("held_rates", ())))
        return Champion(folder, manifest, files, at, training.get("seed"), rates)


@dataclass(frozen=True)
class Start:
    """Where the encoder begins: from the champion's weights, or from nothing and why."""

    why: str
    weights: dict[str, Tensor]

    @property
    def warm(self) -> bool:
        """Whether the champion's weights are taken over."""
        return bool(self.weights)


def start(spec: TrainingSpec, champion: Champion | None, data: Dataset, parts: Split) -> tuple[Start, Split]:
    """Where to begin, and who is judged then.

    A champion has learnt from most of the messages that the rehearsal is judged on, and an encoder that
    begins with its weights would seem to predict what it has seen. So after a warm start only messages are
    judged that are newer than everything the champion was trained on and of no group that it knew. Where
    these are too few, the start is cold. What the champion knows of the newest messages counts as older then.
    """
    cold = Start("from nothing, as the setting says", {})
    if not spec.warm_start or not spec.encodes:
        return cold, parts
    if champion is None:
        return replace(cold, why="from nothing: there is no champion yet"), parts
    if champion.until is None or not champion.knows_no_held(spec, parts):
        why = "from nothing: the champion may have learnt from messages that are held out here"
        return replace(cold, why=why), parts
    judged = parts.judged[unheard_of(data.sent_at, data.group, champion.until)[parts.judged]]
    abusive = int(data.abusive[judged].sum())
    if abusive < LEAST_ABUSIVE or len(judged) - abusive < LEAST_BENIGN:
        few = f"{abusive} abusive and {len(judged) - abusive} benign"
        why = f"from nothing: only {few} judged messages are newer than the champion's training"
        return replace(cold, why=why), parts
    weights, total = inherited(spec, champion)
    if not weights:
        return replace(cold, why="from nothing: the champion's encoder has another shape"), parts
    taken = f"{len(weights)} of {total} tensors of {champion.manifest.model_id}"
    new = data.sent_at[parts.newest] > champion.until
    older = np.concatenate([parts.older, parts.newest[~new]])
    moved = replace(parts, older=older, newest=parts.newest[new], judged=judged)
    return Start(f"from {taken}", weights), moved


def inherited(spec: TrainingSpec, champion: Champion) -> tuple[dict[str, Tensor], int]:
    """The champion's weights that fit the encoder of a spec, and how many tensors that encoder has.

    A tensor fits if its name and shape do and the backbones are described alike; the last layer only if the
    policies are the same ones.
    """
    if bundle.ENCODER not in champion.files:
        return {}, 0
    config = config_of(spec)
    model = encoder.build(config, len(spec.policies))
    own = model.state_dict()
    if _shape(encoder.describe(config, model)) != _shape(json.loads(champion.files[bundle.NETWORK])):
        return {}, len(own)
    theirs = safetensors.torch.load(champion.files[bundle.ENCODER])
    same_policies = champion.manifest.policies == spec.policies
    return {
        name: tensor
        for name, tensor in theirs.items()
        if name in own and own[name].shape == tensor.shape and (same_policies or not name.startswith("head."))
    }, len(own)


def _shape(described: dict[str, Any]) -> str:
    shape = {"source": described["config"]["source"], "backbone": described["backbone"]}
    return json.dumps(shape, sort_keys=True)


# -- forgetting ----------------------------------------------------------------------------------------------


def old_campaigns(
    spec: TrainingSpec,
    champion: Champion | None,
    data: Dataset,
    parts: Split,
    acted: npt.NDArray[np.bool_],
) -> dict[str, Any]:
    """How much abuse of campaigns that are over the candidate and the champion catch.

    Those are the held abusive messages of groups that are `over`. Neither has learnt from them, or the
    champion is not asked.

    Args:
        acted: bool [len(parts.held)], what the candidate would act on.

    Returns:
        `recall` and `champion_recall` at the thresholds of each, None where there is nothing to compare, and
        the number of messages `n`.
    """
    held = parts.held
    old = np.flatnonzero(data.abusive[held] & over(data.sent_at, data.group)[held])
    found: dict[str, Any] = {"recall": None, "champion_recall": None, "n": len(old)}
    if not len(old):
        return found
    found["recall"] = round(float(acted[old].mean()), 5)
    if champion is not None and champion.knows_no_held(spec, parts):
        found["champion_recall"] = round(float(_caught(spec, champion, data, held[old]).mean()), 5)
    return found


def _caught(spec: TrainingSpec, champion: Champion, data: Dataset, rows: Rows) -> npt.NDArray[np.bool_]:
    """What the champion acts on; by text alone if it knows other features, as it is served then."""
    detector = Detector.load(champion.folder)
    known = set(detector.feature_names) <= set(spec.feature_names)
    features = None
    if data.features is not None and known and champion.manifest.features_version == spec.features_version:
        columns = [spec.feature_names.index(name) for name in detector.feature_names]
        features = data.features[rows][:, columns]
    return detector.decide(detector.score_views([data.views[i] for i in rows], features))
