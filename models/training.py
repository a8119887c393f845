"""One training run, from labelled messages to a verified bundle.

The newest messages are the only honest test of what comes next, and also the only examples of what attackers
do now. Both are had by training twice on one schedule:

1. *Rehearsal.* Everything learns from the older four fifths and is judged on the newest fifth, which comes
   later and shares no near-duplicate with it. That decides how much each part is listened to, and whether the
   linear baseline is as good.
2. *Refresh.* The encoder goes on for up to half of its epochs, the newest messages twice in each; trees and
   baseline are fitted again. Calibration and thresholds come from a *held* share of near-duplicate groups
   that neither pass has seen.

Deterministic for the same dataset, spec and machine, unless it hits its limit of time; resumes where it was
killed. Only the training process runs this.

One thread trains the encoder and another fits the rest meanwhile. Two threads inside one small matrix product
wait for each other more than they work, and on a busy machine they stop each other: 110 messages a second
instead of 2,800.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from models import bundle, card, cascade, encoder, fusion, shortcuts, warm
from models.dataset import EPOCH, Dataset, Split, load, split
from models.detector import Detector
from models.encoding import Clock, Encoding, code_version
from models.fusion import Fusion, Slice, Voice
from models.rehearsal import Copies, Rehearsal, rehearse
from models.shallow import Shallow, fit_markov, fit_shallow
from models.train import Progress, TrainingSpec
from models.warm import Champion
from redqueen.errors import InvalidInput

# -- the run -------------------------------------------------------------------------------------------------


def run(spec: TrainingSpec, progress: Progress) -> Path:
    """Train all parts, weigh, calibrate, export; returns the verified bundle's directory, `<out>/bundle`.

    Beside it `result.json` holds model_id, the held messages' ids (what an evaluation may use), metrics,
    learning curve and the seconds that each stage took.

    Raises:
        InvalidInput: the dataset does not fit the spec.
    """
    watch, clock = _Stopwatch(progress), Clock(spec.seconds)
    Path(spec.out).mkdir(parents=True, exist_ok=True)
    settle_torch()
    data = load(spec)
    before_champion = split(data, spec.seed)
    champion = Champion.of(spec)
    begin, parts = warm.start(spec, champion, data, before_champion)
    watch.lap("data", messages=len(data.views), abusive=int(data.abusive.sum()), held=len(parts.held))
    older = fit_markov(data, parts.older)
    watch.lap("markov")
    with ThreadPoolExecutor(1) as beside:
        fitting = beside.submit(fit_shallow, spec, data, parts, older)
        encoding = None
        if spec.encodes:
            encoding = Encoding(spec, data, parts, older.passages, progress, clock, begin.weights)
        copies = Copies.of_judged(spec, data, parts)
        rehearsed = refreshed = None
        if encoding is not None:
            judged = [*(data.views[i] for i in parts.judged), *copies.views]
            rehearsed = encoding.rehearse(older.passages(judged))
            watch.lap("encoder, rehearsal")
            encoding.refresh()
            watch.lap("encoder, refresh")
        before, after, earlier = fitting.result()
        watch.lap("waiting for trees and linear")
        if encoding is not None:
            refreshed = encoding.logits(after.markov.passages([data.views[i] for i in parts.held]))

    rehearsal = rehearse(spec, data, parts, before, rehearsed, copies, earlier)
    final = _finish(spec, data, parts, after, refreshed, rehearsal)
    scores = final.fusion.probabilities(final.held_logits, data.wordless[parts.held])
    acted = np.asarray((scores >= np.asarray(final.fusion.thresholds)).any(1))
    metrics = _metrics(spec, data, parts, rehearsal, final) | {
        "training": _told(spec, data, parts, encoding, begin),
        "old_campaigns": warm.old_campaigns(spec, champion, data, before_champion, acted),
    }
    files = {} if encoding is None else _encoder_files(encoding)
    faster, metrics["shortcuts"] = shortcuts.made(
        files,
        cascade.Parts(final.shallow.linear, final.shallow.markov, final.shallow.trees, final.fusion),
        rehearsal.no_encoder,
        data,
        parts,
        spec.feature_names,
        final.held_logits,
        spec.seed,
    )
    watch.lap("shortcuts")
    folder = _write(spec, files | faster, rehearsal, final, metrics)
    detector = Detector.load(folder)
    _agree(detector, data, parts, final)
    watch.lap("bundle", model_id=detector.model_id)
    held = [data.event_ids[i] for i in parts.held]
    _write_result(spec, folder, detector, encoding, watch, held)
    return folder


def settle_torch() -> None:
    """One thread, and the same numbers each time."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Without it, matrix products on a graphics card differ from run to run, and torch refuses them.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
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
class Final:
    """The refreshed parts and what they answer with."""

    shallow: Shallow
    fusion: Fusion
    held_logits: dict[str, npt.NDArray[np.float32]]
    metrics: dict[str, Any]
    threshold_intervals: list[tuple[float, float]]


def _finish(
    spec: TrainingSpec,
    data: Dataset,
    parts: Split,
    shallow: Shallow,
    encoded: npt.NDArray[np.float32] | None,
    rehearsal: Rehearsal,
) -> Final:
    """Calibrate and set thresholds on the held messages."""
    held = parts.held
    logits = shallow.logits(data, held, encoded)
    part = Slice(data.targets[held], parts.held_weight, data.group[held])
    plain = fusion.fit_voice(("linear",), logits, part.targets, part.weight)
    candidates: dict[str, tuple[Voice, Voice, Voice | None]] = {
        "fusion": (rehearsal.full, rehearsal.text_only, rehearsal.features_only),
        "linear": (plain, plain, None),
    }
    limits = _limits(spec)
    metrics = {
        name: _held_report(voices, logits, data.wordless[held], part, limits, spec.policies)
        for name, voices in candidates.items()
    }
    fused = _fuse(candidates[rehearsal.selected], logits, part, limits)
    return Final(
        shallow, fused, logits, metrics, fusion.threshold_intervals(fused.full, logits, part, limits)
    )


def _limits(spec: TrainingSpec) -> fusion.Limits:
    costs = spec.miss_costs or (fusion.MISS_COST,) * len(spec.policies)
    if len(costs) != len(spec.policies) or not all(0 < cost < float("inf") for cost in costs):
        raise InvalidInput(f"miss_costs are {costs}: one above 0 is needed for each of {spec.policies}")
    return fusion.Limits(spec.fpr_budget, spec.label_error, costs)


def _fuse(
    voices: tuple[Voice, Voice, Voice | None],
    logits: dict[str, npt.NDArray[np.float32]],
    part: Slice,
    limits: fusion.Limits,
) -> Fusion:
    """The voices (all parts, text alone, features alone) calibrated, with thresholds."""

    def calibrated(voice: Voice) -> Voice:
        return fusion.calibrate(voice, logits, part.targets, part.weight)

    full, text_only, silent = voices
    features_only = None if silent is None else calibrated(silent)
    return fusion.finish(calibrated(full), calibrated(text_only), logits, part, limits, features_only)


def _held_report(
    voices: tuple[Voice, Voice, Voice | None],
    logits: dict[str, npt.NDArray[np.float32]],
    wordless: npt.NDArray[np.bool_],
    part: Slice,
    limits: fusion.Limits,
    policies: tuple[str, ...],
) -> dict[str, Any]:
    """Figures of what is served at the real thresholds, each half of the held groups judged with what the
    other half gave.
    """
    z, cuts = np.zeros(part.targets.shape), np.zeros(part.targets.shape)
    half = np.unique(part.groups, return_inverse=True)[1] % 2
    for fold in (0, 1):
        here, there = np.flatnonzero(half == fold), np.flatnonzero(half != fold)
        fused = _fuse(voices, {p: v[there] for p, v in logits.items()}, part.of(there), limits)
        z[here] = fused.log_odds({p: v[here] for p, v in logits.items()}, wordless[here])
        cuts[here] = fusion.log_odds(np.asarray(fused.thresholds))
    return fusion.report(z, cuts, part, policies)


# -- the bundle ----------------------------------------------------------------------------------------------


def _write(
    spec: TrainingSpec,
    encoder_files: dict[str, bytes],
    rehearsal: Rehearsal,
    final: Final,
    metrics: dict[str, Any],
) -> Path:
    folder = Path(spec.out) / "bundle"
    scratch = Path(spec.out) / "bundle.partial"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    contents = {
        **encoder_files,
        bundle.LINEAR: final.shallow.linear.to_bytes(),
        bundle.MARKOV: final.shallow.markov.to_bytes(),
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


def _encoder_files(encoding: Encoding) -> dict[str, bytes]:
    model = encoding.trainer.model
    weights = {k: v.contiguous() for k, v in model.state_dict().items()}
    return {
        bundle.ENCODER: safetensors.torch.save(weights),
        bundle.NETWORK: _json(encoder.describe(encoding.config, model)),
        bundle.ONNX: encoder.to_onnx(model, encoding.reader),
        bundle.READER: encoding.reader.to_bytes(),
    }


def _told(
    spec: TrainingSpec, data: Dataset, parts: Split, encoding: Encoding | None, begin: warm.Start
) -> dict[str, Any]:
    """How the training went: what an heir of this model must know, and what a person wants to."""
    return {
        "seed": spec.seed,
        "held_rates": parts.rates,
        "until": (EPOCH + timedelta(microseconds=int(data.sent_at[-1]))).isoformat(),
        "start": begin.why,
        "warm": begin.warm,
        "best_epoch": None if encoding is None else encoding.place.best,
        "stopped": None if encoding is None else encoding.place.stopped,
    }


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
        "threshold_intervals": dict(zip(spec.policies, final.threshold_intervals, strict=True)),
        "miss_costs": dict(zip(spec.policies, _limits(spec).costs, strict=True)),
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
    expected = final.fusion.probabilities(
        {p: z[:64] for p, z in final.held_logits.items()}, data.wordless[some]
    )
    texts = [data.views[i] for i in some]
    got = detector.score_views(texts, None if data.features is None else data.features[some])
    differs = float(np.abs(got - expected).max(initial=0))
    if not differs <= 1e-3:  # NaN is not
        raise InvalidInput(
            f"the exported network differs from the trained one by {differs:.4f} "
            "in probability: this encoder does not survive the export to ONNX, choose another"
        )


def _write_result(
    spec: TrainingSpec,
    folder: Path,
    detector: Detector,
    encoding: Encoding | None,
    watch: _Stopwatch,
    held: list[str],
) -> None:
    result = {
        "model_id": detector.model_id,
        "bundle": str(folder),
        "selected": detector.manifest.selected,
        "held_event_ids": held,
        "metrics": json.loads((folder / bundle.METRICS).read_text()),
        "curve": [] if encoding is None else encoding.place.curve,
        "seconds": watch.seconds,
        "total_seconds": round(sum(watch.seconds.values()), 2),
        "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }
    partial = Path(spec.out) / "result.json.partial"
    partial.write_text(json.dumps(result, indent=1))
    partial.replace(Path(spec.out) / "result.json")
