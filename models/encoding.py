"""The encoder's way through its schedule: epochs, validation, checkpoints, and the time it may take.

Belongs here: what stands between one step of training (`models.encoder`) and the whole run
(`models.training`). Whatever is written down in a checkpoint is all that the next step depends on, so a run
that was killed ends with the model that an uninterrupted run ends with, to the bit. Only a run that hits its
limit of time depends on the machine's speed, and it says so.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor

from models import encoder, fusion
from models.dataset import Dataset, Rows, Split
from models.encoder import EncoderConfig, Examples, Trainer
from models.tokens import View
from models.train import Progress, TrainingSpec
from redqueen.errors import InvalidInput

PATIENCE = 1
"""So many epochs without a better one end the rehearsal."""

MOST_EPOCHS = 12
"""A small training set is gone through no more often than that, unless the spec says so."""

HEARTBEAT_SECONDS = 10.0
"""How often a long epoch tells how far it is."""

WARM_SHARE = 0.5
"""Epochs of a warm start, as a share of those from scratch: measured to be enough."""

NOT_LEARNT_FROM = (
    *("out", "dataset", "created_at", "parent_bundle"),
    *("seconds", "memory_mb", "checkpoint_seconds"),
)
"""Fields of a spec that do not decide what is learnt: places, times and limits."""


def schedule(parts: Split, epochs: int) -> tuple[list[Rows], list[Rows]]:
    """The rows of each epoch: rehearsal on the older ones, then the refresh, with the newest twice.

    Up to half of the epochs: what attackers do now is in the newest alone, and is not learnt in passing.
    """
    refresh = max(1, epochs // 2)
    newest_twice = np.concatenate([parts.older, parts.newest, parts.newest])
    return [parts.older] * max(1, epochs - refresh), [newest_twice] * refresh


def epochs_of(spec: TrainingSpec, messages: int) -> int:
    """As many as the spec says, and more where a compact encoder would see too little of a small set."""
    if spec.encoder is not None:
        return spec.epochs
    return max(spec.epochs, min(MOST_EPOCHS, -(-spec.examples // max(messages, 1))))


def config_of(spec: TrainingSpec) -> EncoderConfig:
    """The encoder that a spec asks for."""
    return EncoderConfig(
        source=spec.encoder,
        layers=spec.layers,
        width=spec.width,
        heads=spec.heads,
        max_tokens=spec.max_tokens,
    )


def digest(spec: TrainingSpec) -> str:
    """What a checkpoint must agree on: what decides what is learnt, the data's bytes, and the code."""
    plain = {k: v for k, v in spec.to_dict().items() if k not in NOT_LEARNT_FROM}
    data = hashlib.sha256(Path(spec.dataset).read_bytes()).hexdigest()
    return hashlib.sha256(json.dumps([plain, data, code_version()], sort_keys=True).encode()).hexdigest()


def code_version() -> str:
    """The installed version and a digest of this package's sources."""
    sources = b"".join(p.read_bytes() for p in sorted(Path(__file__).parent.glob("*.py")))
    try:
        version = metadata.version("redqueen")
    except metadata.PackageNotFoundError:
        version = "0"
    return f"{version}+{hashlib.sha256(sources).hexdigest()[:8]}"


class Clock:
    """Seconds that a training has taken, those of earlier attempts included, and how many it may take."""

    def __init__(self, limit: float | None) -> None:
        self.limit = limit
        self.earlier = 0.0
        self._began = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds until now."""
        return self.earlier + time.monotonic() - self._began

    def leaves(self, seconds: float) -> bool:
        """Whether so many seconds are left."""
        return self.limit is None or self.spent + seconds <= self.limit


@dataclass
class Place:
    """How far the schedule has come; with the tensors, all that a checkpoint holds.

    Attributes:
        epoch: the epoch that is being learnt, or comes next; counted from 0.
        step: steps of it that are done.
        loss, rows: the summed loss and the messages of these steps.
        curve: figures of each epoch that is done.
        best: the best epoch of the rehearsal so far, counted from 1; 0 before the first is done.
        score: its validation loss.
        rehearsed: whether the rehearsal is over.
        stopped: why it ended before the schedule did: "early" or "time"; None if it did not.
    """

    epoch: int = 0
    step: int = 0
    loss: float = 0.0
    rows: int = 0
    curve: list[dict[str, Any]] = field(default_factory=list)
    best: int = 0
    score: float | None = None
    rehearsed: bool = False
    stopped: str | None = None


class Encoding:
    """The encoder on its way through the schedule; knows its log odds after rehearsal and after the refresh.
    It is judged by what it is served: the `passages` of messages.

    The rehearsal ends when validation has not improved for `PATIENCE` epochs, or when going on would leave no
    time for the refresh; then the weights of its best epoch are taken. Validation is the earlier half of the
    judged messages, on which the parts are weighed too: the later half, which is reported, decides nothing.
    """

    def __init__(
        self,
        spec: TrainingSpec,
        data: Dataset,
        parts: Split,
        passages: Callable[[Sequence[View]], list[View]],
        progress: Progress,
        clock: Clock | None = None,
        inherited: dict[str, Tensor] | None = None,
    ) -> None:
        config, epochs = config_of(spec), epochs_of(spec, len(parts.everything))
        if inherited:
            epochs = max(2, round(epochs * WARM_SHARE))
        self.config, self.progress, self.place = config, progress, Place()
        self.reader = encoder.make_reader(config)
        self.trainer = Trainer(
            config,
            self.reader,
            Examples(data.views, data.targets, data.weight, data.texts),
            *schedule(parts, epochs),
            spec.seed,
        )
        if inherited:
            self.trainer.model.load_state_dict(inherited, strict=False)
        self._clock, self._checkpoint_seconds = clock or Clock(None), spec.checkpoint_seconds
        rows = parts.judged[: len(parts.judged) // 2]
        self._validation = Examples(
            passages([data.views[i] for i in rows]), data.targets[rows], data.weight[rows]
        )
        self._best: dict[str, Tensor] = {}
        self._rehearsed = torch.zeros(0)
        self._file = Path(spec.out) / "checkpoint.safetensors"
        # A champion that could not be had the next time makes it another training.
        self._key = f"{digest(spec)} {'warm' if inherited else 'cold'}"
        self._resume()

    def rehearse(self, judged: Sequence[View]) -> npt.NDArray[np.float32]:
        """Train on the older messages; log odds of `judged`."""
        last = self.trainer.rehearsals
        while not self.place.rehearsed:
            self._learn(keep_for_refresh=True)
            self._validate()
            if self.place.epoch == last or self.place.stopped:
                self._end_rehearsal(judged)
            self._save()
        return self._rehearsed.numpy()

    def refresh(self) -> None:
        """Train on everything but the held messages."""
        while self.place.epoch < len(self.trainer.epochs):
            self._learn(keep_for_refresh=False)
            if self.place.stopped == "time" and not self._clock.leaves(0.0):
                self.place.epoch = len(self.trainer.epochs)
            self._save()
        self.trainer.model.cpu()

    def logits(self, seen: Sequence[View]) -> npt.NDArray[np.float32]:
        """What it says now."""
        return encoder.logits(self.trainer.model, self.reader, seen)

    # -- one epoch -------------------------------------------------------------------------------------------

    def _learn(self, *, keep_for_refresh: bool) -> None:
        """Go on with the epoch until it is done or the time is up; then its figures are in the curve."""
        at, rows = self.place, len(self.trainer.epochs[self.place.epoch])
        after = self.trainer.epochs[self.trainer.rehearsals :] if keep_for_refresh else []
        later = sum(map(len, after))
        began = told = saved = time.monotonic()
        seen = 0
        for loss, size in self.trainer.steps(at.epoch, at.step):
            at.step, at.rows, at.loss = at.step + 1, at.rows + size, at.loss + loss * size
            seen, now = seen + size, time.monotonic()
            if not math.isfinite(loss):
                raise InvalidInput(
                    f"the encoder diverged: its loss is {loss} in epoch {at.epoch + 1}, step {at.step}; "
                    "train with another seed, or without an encoder"
                )
            if not self._clock.leaves((now - began) * later / seen):
                at.stopped = "time"
                break
            if now - saved >= self._checkpoint_seconds:
                self._save()
                saved = time.monotonic()
            if now - told >= HEARTBEAT_SECONDS:
                self._tell(at.rows / rows, seen / (now - began))
                told = now
        speed = seen / max(time.monotonic() - began, 1e-9)
        loss = at.loss / max(at.rows, 1)
        figures = {"epoch": at.epoch + at.rows / rows, "loss": loss, "examples_per_s": speed}
        at.curve.append({k: round(float(v), 6) for k, v in figures.items()})
        at.epoch, at.step, at.loss, at.rows = at.epoch + 1, 0, 0.0, 0
        if not keep_for_refresh:
            self._tell_epoch()

    def _validate(self) -> None:
        """Judge the epoch that has just ended, keep it if it is the best, and see if it was the last."""
        at = self.place
        found = self._validation_figures()
        at.curve[-1] |= found
        score = found.get("validation_loss")
        if score is None or at.score is None or score < at.score:
            at.best, at.score = at.epoch, score
            weights = self.trainer.model.state_dict()
            self._best = {name: tensor.detach().to("cpu", copy=True) for name, tensor in weights.items()}
        elif at.epoch - at.best >= PATIENCE and at.epoch < self.trainer.rehearsals:
            at.stopped = at.stopped or "early"
        self._tell_epoch()

    def _validation_figures(self) -> dict[str, float]:
        """What the log odds are worth once they are calibrated, as they will be: a ranking that got
        better must not look worse because the network has become too sure of itself.
        """
        of = self._validation
        abusive = of.targets.max(1, initial=0) >= 0.5
        if not abusive.any() or abusive.all():
            return {}
        z = {"encoder": self.logits(of.views)}
        calibrated = fusion.fit_voice(("encoder",), z, of.targets, of.weight).logits(z)
        loss = (np.logaddexp(0, calibrated) - of.targets * calibrated).sum(1)
        found = {
            "validation_loss": float((of.weight * loss).sum() / of.weight.sum()),
            "validation_pr_auc": fusion.pr_auc(calibrated.max(1), abusive, of.weight) or 0.0,
        }
        return {k: round(v, 6) for k, v in found.items()}

    def _end_rehearsal(self, judged: Sequence[View]) -> None:
        if self.place.best != self.place.epoch:
            self.trainer.model.load_state_dict(self._best)
        self._best = {}
        self._rehearsed = torch.from_numpy(self.logits(judged))
        self.place.rehearsed, self.place.epoch = True, self.trainer.rehearsals

    def _tell_epoch(self) -> None:
        self.progress({"stage": self._stage(self.place.epoch), **self.place.curve[-1]})

    def _tell(self, done: float, speed: float) -> None:
        at = self.place
        figures = {"epoch": round(at.epoch + done, 3), "loss": at.loss / at.rows, "examples_per_s": speed}
        self.progress({"stage": f"{self._stage(at.epoch + 1)}, under way", **figures})

    def _stage(self, epoch: int) -> str:
        return f"epoch {epoch} of {len(self.trainer.epochs)}"

    # -- checkpoints -----------------------------------------------------------------------------------------

    def _save(self) -> None:
        tensors = self.trainer.state() | {f"best.{k}": v for k, v in self._best.items()}
        tensors["rehearsed"] = self._rehearsed
        place = json.dumps(asdict(self.place) | {"seconds": self._clock.spent})
        partial = self._file.with_suffix(".partial")
        with partial.open("wb") as file:
            file.write(safetensors.torch.save(tensors, {"spec": self._key, "place": place}))
            os.fsync(file.fileno())
        partial.replace(self._file)

    def _resume(self) -> None:
        """Take up the checkpoint, if there is one and it is of this very spec and dataset. One that cannot be
        read is none: a training from the start ends with the same model.
        """
        if not self._file.exists():
            return
        try:
            with safetensors.safe_open(self._file, "pt") as saved:
                note = saved.metadata() or {}
                if note.get("spec") != self._key:
                    return
                tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 (not a dict)
        except safetensors.SafetensorError as error:
            self.progress({"stage": f"starts anew: the checkpoint is damaged ({error})"})
            return
        place = json.loads(note["place"])
        self._clock.earlier = float(place.pop("seconds"))
        self.place = Place(**place)
        self._rehearsed = tensors.pop("rehearsed")
        best = [name for name in tensors if name.startswith("best.")]
        self._best = {name.removeprefix("best."): tensors.pop(name) for name in best}
        self.trainer.restore(tensors)
        where = f"epoch {self.place.epoch}" + (f" and {self.place.step} steps" if self.place.step else "")
        self.progress({"stage": f"resumed after {where}"})
