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
import random
import resource
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch

from models import bundle, card, cascade, encoder, fusion, perturb, shortcuts, warm
from models.dataset import Dataset, Rows, Split, load, split
from models.detector import Detector
from models.encoding import Clock, Encoding, code_version
from models.fusion import Fusion, Slice, Voice
from models.shallow import Forward, Shallow, fit_shallow
from models.tokens import View, views
from models.train import Progress, TrainingSpec
from models.warm import Champion
from redqueen.errors import InvalidInput
from redqueen.features import with_text

LINEAR_TOLERANCE = 0.002
"""The baseline is as good if it is within this recall, on messages as they are, misspelt and padded alike."""

AROUND_BUDGET = (0.5, 0.75, 1.0, 1.5, 2.0)
"""Multiples of the false-positive budget at which recall says who is worth listening to: at the budget alone
a handful of benign messages would decide."""

ENCODER_SHARES = (0.12, 0.25, 0.5, 1.0)
"""What the encoder may weigh, as shares of what all other parts weigh together."""

NEARLY = 0.002
"""So much recall is within chance: some five of the two or three thousand messages that it is measured on."""

BENIGN_PADDED = 1_000
"""So many benign messages are also judged between the words of others."""


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
    with ThreadPoolExecutor(1) as beside:
        fitting = beside.submit(fit_shallow, spec, data, parts)
        encoding = Encoding(spec, data, parts, progress, clock, begin.weights) if spec.encodes else None
        copies = Copies.of_judged(spec, data, parts)
        rehearsed = refreshed = None
        if encoding is not None:
            rehearsed = encoding.rehearse([*(data.views[i] for i in parts.judged), *copies.views])
            watch.lap("encoder, rehearsal")
            refreshed = encoding.refresh([data.views[i] for i in parts.held])
            watch.lap("encoder, refresh")
        before, after, earlier = fitting.result()
        watch.lap("waiting for trees and linear")

    rehearsal = _rehearse(spec, data, parts, before, rehearsed, copies, earlier)
    final = _finish(spec, data, parts, after, refreshed, rehearsal)
    scores = final.fusion.probabilities(final.held_logits, data.wordless[parts.held])
    acted = np.asarray((scores >= np.asarray(final.fusion.thresholds)).any(1))
    metrics = _metrics(spec, data, parts, rehearsal, final) | {
        "training": _told(spec, data, encoding, begin),
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
class Rehearsal:
    """What was learnt by predicting later messages from earlier ones: how much each part is listened to.

    The figures are those of voices that had half of the judged messages; the ones here, which are served, had
    all.
    """

    full: Voice
    text_only: Voice
    no_encoder: Voice
    features_only: Voice | None
    metrics: dict[str, Any]
    selected: str


def _rehearse(
    spec: TrainingSpec,
    data: Dataset,
    parts: Split,
    shallow: Shallow,
    encoded: npt.NDArray[np.float32] | None,
    copies: Copies,
    earlier: Forward,
) -> Rehearsal:
    judged = parts.judged
    clean = shallow.logits(data, judged, None if encoded is None else encoded[: len(judged)])
    rough = shallow.read(copies.views, copies.features, None if encoded is None else encoded[len(judged) :])
    early = _halves(judged)[0]
    known = copies.of < len(early)
    measured = _voices(
        spec, _some(clean, early), data, judged[early], copies.only(known), _some(rough, known), earlier
    )
    metrics = _rehearsal_metrics(spec, data, judged, measured, clean, copies, rough)
    voices = _voices(spec, clean, data, judged, copies, rough, earlier)
    return Rehearsal(
        voices["fusion"],
        voices["text_only"],
        voices["no_encoder"],
        voices.get("trees"),
        metrics,
        select(metrics),
    )


@dataclass(frozen=True)
class Copies:
    """Judged messages as attackers send them: the abusive ones misspelt, and any put between the words of a
    benign message. Who is listened to must not depend on attackers leaving their messages alone.

    Attributes:
        views, features: what is read of the copies.
        of: places of their originals among the judged messages, ascending.
        padded: which are between other words; the others are misspelt.
        share: what a copy weighs, as a share of its original.
    """

    views: list[View]
    features: npt.NDArray[np.float32] | None
    of: Rows
    padded: npt.NDArray[np.bool_]
    share: npt.NDArray[np.float64]

    @staticmethod
    def of_judged(spec: TrainingSpec, data: Dataset, parts: Split) -> Copies:
        judged, pick = parts.judged, random.Random(spec.seed)
        abusive, talked = data.abusive[judged], data.talked[judged]
        misspelt = np.flatnonzero(abusive & ~data.wordless[judged])
        bad, good = np.flatnonzero(abusive & talked), np.flatnonzero(~abusive & talked)
        chosen = good if len(good) <= BENIGN_PADDED else np.sort(pick.sample(good.tolist(), BENIGN_PADDED))
        benign = parts.older[data.talked[parts.older] & ~data.abusive[parts.older]].tolist()
        of = np.concatenate([misspelt, bad, chosen] if benign else [misspelt]).astype(np.int64)
        padded = np.arange(len(of)) >= len(misspelt)
        share = np.where(abusive[of], 0.5, len(good) / max(len(chosen), 1))
        texts = []
        for place, is_padded in zip(judged[of].tolist(), padded.tolist(), strict=True):
            text = data.texts[place]
            kind = [data.texts[i] for i in pick.choices(benign, k=perturb.OTHERS)] if is_padded else []
            texts.append(perturb.among(kind, text, pick) if kind else perturb.misspelt(text, pick, 0.08))
        features = None
        if data.features is not None:
            features = with_text(data.features[judged[of]], texts, spec.feature_names)
        return Copies(views(texts), features, of, padded, share).only(np.argsort(of, kind="stable"))

    def only(self, chosen: npt.NDArray[Any]) -> Copies:
        """Some of them: a mask, or places."""
        places = np.arange(len(self.of))[chosen]
        return Copies(
            [self.views[i] for i in places],
            None if self.features is None else self.features[places],
            self.of[places],
            self.padded[places],
            self.share[places],
        )


def _some(
    logits: dict[str, npt.NDArray[np.float32]], rows: npt.NDArray[Any]
) -> dict[str, npt.NDArray[np.float32]]:
    return {part: z[rows] for part, z in logits.items()}


def _voices(
    spec: TrainingSpec,
    logits: dict[str, npt.NDArray[np.float32]],
    data: Dataset,
    rows: Rows,
    copies: Copies,
    rough: dict[str, npt.NDArray[np.float32]],
    earlier: Forward,
) -> dict[str, Voice]:
    """Every combination worth reporting, weighed on `rows` and on what was predicted `earlier`.

    A likelihood is won among messages that nobody would act on: a part that gains there can lose where the
    threshold lies. So the encoder, which has said nothing earlier, is added to the others as quietly as is
    enough, and the fusion does not listen to trees that cost it recall. Calibration is for messages as they
    are.
    """
    combinations = {
        "fusion": tuple(logits),
        "text_only": tuple(p for p in logits if p in fusion.TEXT_PARTS),
        "no_encoder": tuple(p for p in logits if p != "encoder"),
        "linear": ("linear",),
        **({"encoder": ("encoder",)} if "encoder" in logits else {}),
        **({"trees": ("trees",)} if "trees" in logits else {}),
    }
    targets, weight = data.targets[rows], data.stands_for[rows]
    part = Slice(targets, weight)
    both = np.concatenate([earlier.rows, rows])
    long = {p: np.concatenate([earlier.logits[p], logits[p]]) for p in earlier.logits}

    def caught(voice: Voice) -> float:
        return _caught(voice, spec.fpr_budget, logits, part, rough, copies)

    voices = {}
    for name, used in combinations.items():
        cheap = tuple(p for p in used if p != "encoder")
        if not cheap:
            voice = fusion.fit_voice(used, logits, targets, weight)
        else:
            voice = fusion.fit_voice(cheap, long, data.targets[both], data.stands_for[both])
            if "encoder" in used:
                voice = quietest([_with_encoder(voice, share) for share in ENCODER_SHARES], caught)
        voices[name] = fusion.calibrate(voice, logits, targets, weight)
    if caught(voices["fusion"]) < caught(voices["text_only"]):
        voices["fusion"] = voices["text_only"]
    return voices


def _with_encoder(voice: Voice, share: float) -> Voice:
    """The voice with the encoder beside it, at a share of what all others weigh together."""
    weights = tuple((round(share * sum(w), 6), *w) for w in voice.weights)
    return replace(voice, parts=("encoder", *voice.parts), weights=weights)


def quietest(voices: list[Voice], caught: Callable[[Voice], float]) -> Voice:
    """The first, so the one with the least of what is added, that catches nearly as much as the best does.

    What looks best is so by a few messages, and the next ones are others; of equals the simplest is the safer
    (the one standard error rule of Breiman et al., Classification and Regression Trees, 1984, 3.4.3).
    """
    found = [caught(voice) for voice in voices]
    return next(v for v, share in zip(voices, found, strict=True) if share >= max(found) - NEARLY)


def _caught(
    voice: Voice,
    budget: float,
    logits: dict[str, npt.NDArray[np.float32]],
    part: Slice,
    rough: dict[str, npt.NDArray[np.float32]],
    copies: Copies,
) -> float:
    """Recall on messages as they are and on their copies: the mean of both, over budgets around this one."""
    z, attacked = voice.logits(logits), voice.logits(rough)
    cuts = _around(z, part, budget)
    found = [_recall(z[part.abusive], cuts), _recall(attacked[part.abusive[copies.of]], cuts)]
    known = [recall for recall in found if recall is not None]
    return float(np.mean(known)) if known else 0.0


def _around(z: fusion.Floats, part: Slice, budget: float) -> list[fusion.Floats]:
    """Cuts that spend `AROUND_BUDGET` of the budget on the benign messages of `z`."""
    return [fusion.cut(z, ~part.abusive, part.weight, budget * times) for times in AROUND_BUDGET]


def _recall(abusive: fusion.Floats, cuts: list[fusion.Floats]) -> float | None:
    """Mean share of abusive messages acted on at the cuts; None where there are none."""
    return round(float(np.mean([(abusive >= cut).any(1) for cut in cuts])), 5) if len(abusive) else None


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
    copies: Copies,
    rough: dict[str, npt.NDArray[np.float32]],
) -> dict[str, Any]:
    """Each combination on the later half, acted on where just the budget of its benign messages is spent;
    `around_budget` is recall at more and less than that, by which the baseline is compared.
    """
    late = _halves(rows)[1]
    part = Slice(data.targets[rows[late]], data.stands_for[rows[late]], data.group[rows[late]])
    of_late = data.abusive[rows[copies.of]] & (copies.of >= len(rows) - len(late))
    kinds = {"recall_misspelt": of_late & ~copies.padded, "recall_padded": of_late & copies.padded}
    out: dict[str, Any] = {}
    for name, voice in voices.items():
        z = voice.logits(_some(clean, late))
        cuts = fusion.cut(z, ~part.abusive, part.weight, spec.fpr_budget)
        out[name] = fusion.report(z, cuts, part, spec.policies)
        for figure, chosen in kinds.items():
            caught = np.asarray((voice.logits(_some(rough, chosen)) >= cuts).any(1))
            out[name][figure] = round(float(caught.mean()), 5) if len(caught) else None
        around = _around(z, part, spec.fpr_budget)
        out[name]["around_budget"] = {"recall": _recall(z[part.abusive], around)} | {
            figure: _recall(voice.logits(_some(rough, chosen)), around) for figure, chosen in kinds.items()
        }
    return out


def select(metrics: dict[str, Any]) -> str:
    """`linear` if it is as good as the fusion on the newest messages, as they are, misspelt and padded; else
    `fusion`.
    """
    ours, simple = metrics["fusion"]["around_budget"], metrics["linear"]["around_budget"]
    if ours["recall"] is None or simple["recall"] is None:
        return "fusion"
    # Messages of a word or two are not padded, and then nothing is known of that.
    figures = [(ours[k], simple[k]) for k in ours if ours[k] is not None and simple[k] is not None]
    return "linear" if all(b >= a - LINEAR_TOLERANCE for a, b in figures) else "fusion"


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
        name: _held_report(voices, logits, part, limits, spec.policies) for name, voices in candidates.items()
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
    part: Slice,
    limits: fusion.Limits,
    policies: tuple[str, ...],
) -> dict[str, Any]:
    """Figures at the real thresholds, each half of the held groups judged with what the other half gave."""
    z, cuts = np.zeros(part.targets.shape), np.zeros(part.targets.shape)
    half = np.unique(part.groups, return_inverse=True)[1] % 2
    for fold in (0, 1):
        here, there = np.flatnonzero(half == fold), np.flatnonzero(half != fold)
        fused = _fuse(voices, {p: v[there] for p, v in logits.items()}, part.of(there), limits)
        z[here] = fused.full.logits({p: v[here] for p, v in logits.items()})
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


def _told(spec: TrainingSpec, data: Dataset, encoding: Encoding | None, begin: warm.Start) -> dict[str, Any]:
    """How the training went: what an heir of this model must know, and what a person wants to."""
    return {
        "seed": spec.seed,
        "until": (warm.EPOCH + timedelta(microseconds=int(data.sent_at[-1]))).isoformat(),
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
    if len(some) and float(np.abs(got - expected).max()) > 1e-3:
        raise InvalidInput(
            f"the exported network differs from the trained one by {np.abs(got - expected).max():.4f} "
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
