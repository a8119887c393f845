"""One training run, from labelled messages to a verified bundle.

The newest messages are the only honest test of what comes next, and also the only examples of what attackers
do now. Both are had by training twice on one schedule:

1. *Rehearsal.* Everything learns from the older four fifths and is judged on the newest fifth, which comes
later and
   shares no near-duplicate with it. That decides how much each part is listened to, and whether the linear
   baseline is as good.
2. *Refresh.* The encoder goes on for its last epoch, the newest messages twice in it; trees and baseline are
fitted
   again. Calibration and thresholds come from a *held* share of near-duplicate groups that neither pass has
   seen.

Deterministic for the same dataset, spec and machine; resumes after each epoch. Only the training process runs
this.

One thread trains the encoder and another fits the rest meanwhile. Two threads inside one small matrix product
wait for each other more than they work, and on a busy machine they stop each other: 110 messages a second
instead of 2,800.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from models import baseline, bundle, card, encoder, fusion, trees
from models.baseline import Linear
from models.dataset import Dataset, Rows, Split, load, split
from models.detector import Detector
from models.encoder import EncoderConfig, Examples, Trainer
from models.fusion import Fusion, Slice, Voice
from models.tokens import View
from models.train import Progress, TrainingSpec
from models.trees import Trees
from redqueen.errors import InvalidInput
from redqueen.features import with_text

PADDED, PADDED_WEIGHT = 0.4, 0.5
"""Share of messages that trees also see padded with a benign one, and what such a copy weighs. Without them a
long message looks benign by its length alone, and three kind words before a lure hide it."""

LINEAR_TOLERANCE = 0.002
"""The baseline is as good if it is within this recall, on clean and on misspelt messages alike."""


# -- the encoder, with checkpoints ---------------------------------------------------------------------------


def schedule(parts: Split, epochs: int) -> list[Rows]:
    """The rows of each epoch: rehearsal on the older ones, then one refresh with the newest twice."""
    rehearsal = [parts.older] * max(1, epochs - 1)
    return [*rehearsal, np.concatenate([parts.older, parts.newest, parts.newest])]


class Encoding:
    """The encoder's way through its schedule, resumable; knows its log odds after rehearsal and after the
    refresh.
    """

    def __init__(self, spec: TrainingSpec, data: Dataset, parts: Split, progress: Progress) -> None:
        config = EncoderConfig(
            source=spec.encoder,
            layers=spec.layers,
            width=spec.width,
            heads=spec.heads,
            max_tokens=spec.max_tokens,
        )
        self.config, self.progress = config, progress
        self.reader = encoder.make_reader(config)
        epochs = schedule(parts, spec.epochs)
        self.trainer = Trainer(
            config, self.reader, Examples(data.views, data.targets, data.weight), epochs, spec.seed
        )
        self.curve: list[dict[str, Any]] = []
        self._done, self._rehearsed = 0, torch.zeros(0)
        self._file = Path(spec.out) / "checkpoint.safetensors"
        self._key = _spec_digest(spec)
        self._resume()

    def rehearse(self, judged: Sequence[View]) -> npt.NDArray[np.float32]:
        """Train on the older messages; log odds of `judged`."""
        last = len(self.trainer.epochs) - 1
        while self._done < last:
            self._epoch()
            if self._done == last:
                self._rehearsed = torch.from_numpy(encoder.logits(self.trainer.model, self.reader, judged))
            self._save()
        return self._rehearsed.numpy()

    def refresh(self, held: Sequence[View]) -> npt.NDArray[np.float32]:
        """Train on everything but the held messages; log odds of those."""
        if self._done < len(self.trainer.epochs):
            self._epoch()
            self._save()
        return encoder.logits(self.trainer.model, self.reader, held)

    def _epoch(self) -> None:
        figures = self.trainer.run_epoch(self._done)
        self._done += 1
        self.curve.append({"epoch": self._done, **figures})
        self.progress({"stage": f"epoch {self._done} of {len(self.trainer.epochs)}", **figures})

    def _save(self) -> None:
        tensors = {**self.trainer.state(), "rehearsed": self._rehearsed}
        note = {"spec": self._key, "epoch": str(self._done), "curve": json.dumps(self.curve)}
        partial = self._file.with_suffix(".partial")
        partial.write_bytes(safetensors.torch.save(tensors, note))
        partial.replace(self._file)

    def _resume(self) -> None:
        """Take up the checkpoint, if there is one and it is of this very spec and dataset."""
        if not self._file.exists():
            return
        with safetensors.safe_open(self._file, "pt") as saved:
            note = saved.metadata() or {}
            if note.get("spec") != self._key:
                return
            tensors = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118 (not a dict)
        self._rehearsed = tensors.pop("rehearsed")
        self.trainer.restore(tensors)
        self._done, self.curve = int(note["epoch"]), json.loads(note["curve"])
        self.progress({"stage": f"resumed after epoch {self._done}"})


def _spec_digest(spec: TrainingSpec) -> str:
    """What a checkpoint must agree on: the spec but for places and times, the data's bytes, and the code."""
    where = ("out", "dataset", "created_at")
    plain = {k: v for k, v in spec.to_dict().items() if k not in where}
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


# -- the run -------------------------------------------------------------------------------------------------


def run(spec: TrainingSpec, progress: Progress) -> Path:
    """Train all parts, weigh, calibrate, export; returns the verified bundle's directory, `<out>/bundle`.

    Beside it `result.json` holds model_id, the held messages' ids (what an evaluation may use), metrics,
    learning curve and the seconds that each stage took.

    Raises:
        InvalidInput: the dataset does not fit the spec.
    """
    watch = _Stopwatch(progress)
    Path(spec.out).mkdir(parents=True, exist_ok=True)
    _settle_torch()
    data = load(spec)
    parts = split(data, spec.seed)
    watch.lap("data", messages=len(data.views), abusive=int(data.abusive.sum()), held=len(parts.held))
    with ThreadPoolExecutor(1) as beside:
        fitting = beside.submit(_fit_shallow, spec, data, parts)
        encoding = Encoding(spec, data, parts, progress)
        misspelt = _misspelt(data, parts.judged, spec.seed)
        rehearsed = encoding.rehearse([*(data.views[i] for i in parts.judged), *misspelt.views])
        watch.lap("encoder, rehearsal")
        refreshed = encoding.refresh([data.views[i] for i in parts.held])
        watch.lap("encoder, refresh")
        before, after = fitting.result()
        watch.lap("waiting for trees and linear")

    rehearsal = _rehearse(spec, data, parts, before, rehearsed, misspelt)
    final = _finish(spec, data, parts, after, refreshed, rehearsal)
    folder = _write(spec, data, parts, encoding, rehearsal, final)
    detector = Detector.load(folder)
    _agree(detector, data, parts, final)
    watch.lap("bundle", model_id=detector.model_id)
    held = [data.event_ids[i] for i in parts.held]
    _write_result(spec, folder, detector, encoding, watch, held)
    return folder


def _settle_torch() -> None:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)


class _Stopwatch:
    """Seconds by stage, told to `progress` as they end."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress, self._last = progress, time.perf_counter()

    def lap(self, stage: str, **figures: Any) -> None:
        now = time.perf_counter()
        self.seconds[stage] = round(now - self._last, 2)
        self._last = now
        self._progress({"stage": stage, "seconds": self.seconds[stage], **figures})


@dataclass(frozen=True)
class Shallow:
    """The parts beside the encoder; no trees where there is no behaviour."""

    linear: Linear
    trees: Trees | None

    def logits(
        self, data: Dataset, rows: Rows, encoded: npt.NDArray[np.float32]
    ) -> dict[str, npt.NDArray[np.float32]]:
        """Log odds of `rows` by part, those of the encoder included."""
        found = {"encoder": encoded, "linear": self.linear.logits([data.views[i].canonical for i in rows])}
        if self.trees is not None and data.features is not None:
            found["trees"] = self.trees.logits(data.features[rows])
        return found


def _fit_shallow(spec: TrainingSpec, data: Dataset, parts: Split) -> tuple[Shallow, Shallow]:
    """Fitted on the older messages, and on everything but the held ones."""
    design = baseline.Design.of(data.canonical)
    rows = parts.older
    linear = baseline.fit(design, rows, data.targets[rows], data.weight[rows])
    before = Shallow(linear, _fit_trees(spec, data, rows))
    rows = parts.everything
    linear = baseline.fit(design, rows, data.targets[rows], data.weight[rows], start=linear, iterations=20)
    return before, Shallow(linear, _fit_trees(spec, data, rows))


def _fit_trees(spec: TrainingSpec, data: Dataset, rows: Rows) -> Trees | None:
    if data.features is None:
        return None
    padded, texts = _padded(data, rows, spec.seed)
    copies = with_text(data.features[padded], texts, spec.feature_names)
    every = np.concatenate([rows, padded])
    weight = np.concatenate([data.weight[rows], PADDED_WEIGHT * data.weight[padded]])
    return trees.fit(
        np.concatenate([data.features[rows], copies]), data.targets[every], weight, seed=spec.seed
    )


def _padded(data: Dataset, rows: Rows, seed: int) -> tuple[Rows, list[str]]:
    """Some of `rows`, and their texts with a benign message before or after them, as abusers write them."""
    rng = np.random.default_rng(seed)
    chosen, benign = rows[rng.random(len(rows)) < PADDED], rows[~data.abusive[rows]]
    if not len(benign):
        return chosen[:0], []
    others, first = rng.choice(benign, len(chosen)), rng.random(len(chosen)) < 0.5
    pairs = [
        (data.texts[a], data.texts[b]) if lead else (data.texts[b], data.texts[a])
        for a, b, lead in zip(others, chosen, first, strict=True)
    ]
    return chosen, [f"{one}\n{two}" for one, two in pairs]


@dataclass(frozen=True)
class Rehearsal:
    """What was learnt by predicting the newest messages from the older ones."""

    full: Voice
    text_only: Voice
    metrics: dict[str, Any]
    selected: str


def _rehearse(
    spec: TrainingSpec,
    data: Dataset,
    parts: Split,
    shallow: Shallow,
    encoded: npt.NDArray[np.float32],
    misspelt: Misspelt,
) -> Rehearsal:
    judged = parts.judged
    clean = shallow.logits(data, judged, encoded[: len(judged)])
    rough = {
        "encoder": encoded[len(judged) :],
        "linear": shallow.linear.logits([v.canonical for v in misspelt.views]),
        **({"trees": clean["trees"][misspelt.of]} if "trees" in clean else {}),
    }
    voices = _voices(clean, data, judged)
    metrics = _rehearsal_metrics(spec, data, judged, voices, clean, rough)
    return Rehearsal(voices["fusion"], voices["text_only"], metrics, select(metrics))


@dataclass(frozen=True)
class Misspelt:
    """Misspelt copies of the abusive among judged messages; `of` are their places among those."""

    views: list[View]
    of: Rows


def _misspelt(data: Dataset, judged: Rows, seed: int) -> Misspelt:
    of = np.flatnonzero(data.abusive[judged])
    pick = random.Random(seed)
    return Misspelt(
        [
            replace(
                data.views[judged[i]], canonical=encoder.misspelt(data.views[judged[i]].canonical, pick, 0.08)
            )
            for i in of
        ],
        of,
    )


def _voices(logits: dict[str, npt.NDArray[np.float32]], data: Dataset, rows: Rows) -> dict[str, Voice]:
    """Every combination worth reporting, fitted on the earlier half of the judged rows."""
    combinations = {
        "fusion": tuple(logits),
        "text_only": fusion.TEXT_PARTS,
        "no_encoder": tuple(p for p in logits if p != "encoder"),
        "linear": ("linear",),
        "encoder": ("encoder",),
        **({"trees": ("trees",)} if "trees" in logits else {}),
    }
    early = _halves(rows)[0]
    seen = {p: z[early] for p, z in logits.items()}
    targets, weight = data.targets[rows[early]], data.weight[rows[early]]
    return {
        name: fusion.calibrate(fusion.fit_voice(used, seen, targets, weight), seen, targets, weight)
        for name, used in combinations.items()
    }


def _halves(rows: Rows) -> tuple[Rows, Rows]:
    """Places of the earlier and the later half."""
    places = np.arange(len(rows))
    return places[: len(rows) // 2], places[len(rows) // 2 :]


def _rehearsal_metrics(
    spec: TrainingSpec,
    data: Dataset,
    rows: Rows,
    voices: dict[str, Voice],
    clean: dict[str, npt.NDArray[np.float32]],
    rough: dict[str, npt.NDArray[np.float32]],
) -> dict[str, Any]:
    """Each combination on the later half, acted on where just the budget of its benign messages is spent."""
    late = _halves(rows)[1]
    part = Slice(data.targets[rows[late]], data.weight[rows[late]])
    rough_late = np.flatnonzero(np.flatnonzero(data.abusive[rows]) >= late[0]) if len(late) else late
    out: dict[str, Any] = {}
    for name, voice in voices.items():
        z = voice.logits({p: v[late] for p, v in clean.items()})
        cuts = fusion.cut(z, ~part.abusive, part.weight, spec.fpr_budget)
        caught = np.asarray((voice.logits({p: v[rough_late] for p, v in rough.items()}) >= cuts).any(1))
        out[name] = fusion.report(z, cuts, part, spec.policies) | {
            "recall_misspelt": round(float(caught.mean()), 5) if len(caught) else None
        }
    return out


def select(metrics: dict[str, Any]) -> str:
    """`linear` if it is as good as the fusion on the newest messages, clean and misspelt; else `fusion`."""
    ours, simple = metrics["fusion"], metrics["linear"]
    figures = [(ours[k], simple[k]) for k in ("recall", "recall_misspelt")]
    if any(a is None or b is None for a, b in figures):
        return "fusion"
    return "linear" if all(b >= a - LINEAR_TOLERANCE for a, b in figures) else "fusion"


@dataclass(frozen=True)
class Final:
    """The refreshed parts and what they answer with."""

    shallow: Shallow
    fusion: Fusion
    held_logits: dict[str, npt.NDArray[np.float32]]
    metrics: dict[str, Any]


def _finish(
    spec: TrainingSpec,
    data: Dataset,
    parts: Split,
    shallow: Shallow,
    encoded: npt.NDArray[np.float32],
    rehearsal: Rehearsal,
) -> Final:
    """Calibrate and set thresholds on the held messages."""
    held = parts.held
    logits = shallow.logits(data, held, encoded)
    part = Slice(data.targets[held], parts.held_weight)
    plain = fusion.fit_voice(("linear",), logits, part.targets, part.weight)
    candidates = {"fusion": (rehearsal.full, rehearsal.text_only), "linear": (plain, plain)}
    metrics = {name: _held_report(*voices, logits, part, spec) for name, voices in candidates.items()}
    fused = _fuse(*candidates[rehearsal.selected], logits, part, spec)
    return Final(shallow, fused, logits, metrics)


def _fuse(
    full: Voice, text_only: Voice, logits: dict[str, npt.NDArray[np.float32]], part: Slice, spec: TrainingSpec
) -> Fusion:
    calibrated = [fusion.calibrate(v, logits, part.targets, part.weight) for v in (full, text_only)]
    error = spec.label_error
    return fusion.finish(
        calibrated[0], calibrated[1], logits, part.abusive, part.weight, spec.fpr_budget, error
    )


def _held_report(
    full: Voice, text_only: Voice, logits: dict[str, npt.NDArray[np.float32]], part: Slice, spec: TrainingSpec
) -> dict[str, Any]:
    """Figures at the real thresholds, each half of the held messages judged with what the other half gave."""
    z, cuts = np.zeros(part.targets.shape), np.zeros(part.targets.shape)
    for fold in (0, 1):
        here, there = np.arange(fold, len(z), 2), np.arange(1 - fold, len(z), 2)
        fused = _fuse(
            full,
            text_only,
            {p: v[there] for p, v in logits.items()},
            Slice(part.targets[there], part.weight[there]),
            spec,
        )
        z[here] = fused.full.logits({p: v[here] for p, v in logits.items()})
        cuts[here] = fusion.log_odds(np.asarray(fused.thresholds))
    return fusion.report(z, cuts, part, spec.policies)


# -- the bundle ----------------------------------------------------------------------------------------------


def _write(
    spec: TrainingSpec, data: Dataset, parts: Split, encoding: Encoding, rehearsal: Rehearsal, final: Final
) -> Path:
    folder = Path(spec.out) / "bundle"
    scratch = Path(spec.out) / "bundle.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    model = encoding.trainer.model
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    metrics = _metrics(spec, data, parts, rehearsal, final)
    contents = {
        bundle.ENCODER: safetensors.torch.save(weights),
        bundle.NETWORK: _json(encoder.describe(encoding.config, model)),
        bundle.ONNX: encoder.to_onnx(model, encoding.reader),
        bundle.READER: encoding.reader.to_bytes(),
        bundle.LINEAR: final.shallow.linear.to_bytes(),
        bundle.FUSION: _json(final.fusion.to_dict()),
        bundle.METRICS: _json(metrics),
        bundle.CARD: card.text(spec, metrics).encode(),
        **({bundle.TREES: final.shallow.trees.to_bytes()} if final.shallow.trees else {}),
    }
    for name, content in contents.items():
        (scratch / name).write_bytes(content)
    bundle.write_manifest(
        scratch,
        policies=spec.policies,
        features_version=spec.features_version,
        feature_names=spec.feature_names,
        selected=rehearsal.selected,
        snapshot=spec.snapshot,
        code_version=code_version(),
        parent=spec.parent,
        created_at=spec.created_at or datetime.now(UTC).isoformat(timespec="seconds"),
    )
    shutil.rmtree(folder, ignore_errors=True)
    scratch.replace(folder)
    return folder


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def _metrics(
    spec: TrainingSpec, data: Dataset, parts: Split, rehearsal: Rehearsal, final: Final
) -> dict[str, Any]:
    return {
        "selected": rehearsal.selected,
        "behaviour": data.features is not None,
        "fpr_budget": spec.fpr_budget,
        "thresholds": dict(zip(spec.policies, final.fusion.thresholds, strict=True)),
        "n": {
            "messages": len(data.views),
            "abusive": int(data.abusive.sum()),
            "older": len(parts.older),
            "newest": len(parts.newest),
            "judged": len(parts.judged),
            "held": len(parts.held),
        },
        "newest": rehearsal.metrics,
        "held": final.metrics,
        "voice": asdict(final.fusion.full),
    }


def _agree(detector: Detector, data: Dataset, parts: Split, final: Final) -> None:
    """The exported model must answer as the trained one did: a bundle that does not is not written off as
    noise.
    """
    some = parts.held[:64]
    expected = final.fusion.probabilities({p: z[:64] for p, z in final.held_logits.items()})
    texts = [data.views[i] for i in some]
    got = detector.score_views(texts, None if data.features is None else data.features[some])
    if len(some) and float(np.abs(got - expected).max()) > 1e-3:
        raise InvalidInput(
            f"the exported network differs from the trained one by {np.abs(got - expected).max():.4f} "
            "in probability: this encoder does not survive the export to ONNX, choose another"
        )


def _write_result(
    spec: TrainingSpec,
    folder: Path,
    detector: Detector,
    encoding: Encoding,
    watch: _Stopwatch,
    held: list[str],
) -> None:
    result = {
        "model_id": detector.model_id,
        "bundle": str(folder),
        "selected": detector.manifest.selected,
        "held_event_ids": held,
        "metrics": json.loads((folder / bundle.METRICS).read_text()),
        "curve": encoding.curve,
        "seconds": watch.seconds,
        "total_seconds": round(sum(watch.seconds.values()), 2),
    }
    partial = Path(spec.out) / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(Path(spec.out) / "result.json")
