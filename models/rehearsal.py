"""What is decided by predicting later messages from earlier ones: how much each part is listened to, and
whether the linear baseline is as good as all of them.

Belongs here: the copies that messages are also judged in, the weighing of the parts, the figures of the
rehearsal. The parts themselves are `models.shallow` and `models.encoding`; what a weight is, `models.fusion`.
No torch here.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models import fusion, perturb
from models.dataset import Dataset, Rows, Split
from models.fusion import Slice, Voice
from models.shallow import Forward, Shallow
from models.tokens import View, views
from models.train import TrainingSpec
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


def rehearse(
    spec: TrainingSpec,
    data: Dataset,
    parts: Split,
    shallow: Shallow,
    encoded: npt.NDArray[np.float32] | None,
    copies: Copies,
    earlier: Forward,
) -> Rehearsal:
    """Weigh the parts on the judged messages, and on half of them for the figures of the other half.

    Args:
        shallow: the parts beside the encoder, fitted on the older messages.
        encoded: the encoder's log odds of the judged messages, then of their copies; None without one.
        earlier: what fits on less of the past predicted.
    """
    judged = parts.judged
    clean = shallow.logits(data, judged, None if encoded is None else encoded[: len(judged)])
    rough = shallow.read(copies.views, copies.features, None if encoded is None else encoded[len(judged) :])
    early = _halves(judged)[0]
    known = copies.of < len(early)
    measured = weigh(
        spec, _some(clean, early), data, judged[early], copies.only(known), _some(rough, known), earlier
    )
    metrics = _figures(spec, data, judged, measured, clean, copies, rough)
    voices = weigh(spec, clean, data, judged, copies, rough, earlier)
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
    """

    views: list[View]
    features: npt.NDArray[np.float32] | None
    of: Rows
    padded: npt.NDArray[np.bool_]

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
        texts = []
        for place, is_padded in zip(judged[of].tolist(), padded.tolist(), strict=True):
            text = data.texts[place]
            kind = [data.texts[i] for i in pick.choices(benign, k=perturb.OTHERS)] if is_padded else []
            texts.append(perturb.among(kind, text, pick) if kind else perturb.misspelt(text, pick, 0.08))
        features = None
        if data.features is not None:
            features = with_text(data.features[judged[of]], texts, spec.feature_names)
        return Copies(views(texts), features, of, padded).only(np.argsort(of, kind="stable"))

    def only(self, chosen: npt.NDArray[Any]) -> Copies:
        """Some of them: a mask, or places."""
        places = np.arange(len(self.of))[chosen]
        return Copies(
            [self.views[i] for i in places],
            None if self.features is None else self.features[places],
            self.of[places],
            self.padded[places],
        )


def _some(
    logits: dict[str, npt.NDArray[np.float32]], rows: npt.NDArray[Any]
) -> dict[str, npt.NDArray[np.float32]]:
    return {part: z[rows] for part, z in logits.items()}


def weigh(
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
            voice = _evened(fusion.fit_voice(cheap, long, data.targets[both], data.stands_for[both]))
            if "encoder" in used:
                voice = quietest([_with_encoder(voice, share) for share in ENCODER_SHARES], caught)
        voices[name] = fusion.calibrate(voice, logits, targets, weight)
    if caught(voices["fusion"]) < caught(voices["text_only"]):
        voices["fusion"] = voices["text_only"]
    return voices


def _evened(voice: Voice) -> Voice:
    """The voice with the linear and the Markov models half way to equal weights.

    What combines predictions best on one period seldom does on the next, and the plain average is hard to
    beat (Smith & Wallis, A Simple Explanation of the Forecast Combination Puzzle, Oxford Bulletin of
    Economics and Statistics 71, 2009). The two read the same words and err on different messages.
    """
    if not {"linear", "markov"} <= set(voice.parts):
        return voice
    pair = [voice.parts.index("linear"), voice.parts.index("markov")]
    weights = np.asarray(voice.weights)
    weights[:, pair] = (weights[:, pair] + weights[:, pair].mean(1, keepdims=True)) / 2
    return replace(voice, weights=tuple(tuple(round(float(w), 6) for w in row) for row in weights))


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


def _figures(
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
