"""The first stage: all parts but the encoder settle most messages as benign, the encoder reads the rest.

Belongs here: what the first stage makes of a message, the cut below which it settles it, how that cut is set,
and the watch over what was settled. Which messages go on to the encoder is decided in `models.detector`.

**Padding.** A mean over a message can be diluted: enough kind words, and the abuse among them is a detail.
So the text is read in pieces too, and the loudest of them has its say: a piece, two neighbours, or the whole.
Words before or after the abuse do not dilute it, though they move where a piece begins.

**The cut.** A miss is a message that the whole model would act on and the first stage settles. On held-out
abuse, one message a near-duplicate group, each as it is and in every disguise of `redqueen.attacks` and
buried among benign messages, the cut is the largest at which the share of messages missed in *any* of these
forms is at most `MOST_MISSED` with one-sided confidence `CONFIDENCE` (Clopper & Pearson 1934; taking the cut
from an order statistic of the misses is Wilks' tolerance limit, 1941). Cuts are tried from the strictest on
and the first that fails ends the search, so that the confidence holds for the one that is chosen (fixed
sequence testing, Angelopoulos et al. 2021, "Learn then test"). Too little abuse to show that: no first stage.

**The watch.** Held-out abuse is of yesterday. Of what is settled in service, a sample is read by the whole
model all the same, and where that shows more misses than allowed, the first stage stops settling.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from models.baseline import Linear
from models.fusion import Floats, Fusion, Logits, Slice, Voice, calibrate, ece, share, sigmoid
from models.markov import Markov
from models.tokens import View, views
from redqueen import attacks
from redqueen.features import with_text

Mask = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.int64]

MOST_MISSED, CONFIDENCE = 0.01, 0.95
"""Most of the abuse that the whole model catches that the first stage may settle, and how surely."""

HIGHEST_CUT = 0.2
"""A settled message's probability stays below this share of the threshold, whatever held-out messages would
allow: the next campaign looks less like abuse than the last one."""

LEAST_SETTLED = 0.3
"""A first stage that settles less of the benign messages does not earn its upkeep."""

MOST_ATTACKED = 450
"""Abusive messages that the cut is set on: more cost training time and move it little."""

LOUDEST = "loudest"
"""What the linear model hears in the loudest part of a message, as a part of the first stage."""

MOST_REMEMBERED = 100_000
"""Texts of the sample that the watch knows again; copies come close together."""

TRIP_CONFIDENCE = 0.999
"""How sure the watch must be of too many misses: it looks again and again, and each look may err."""

_PARTS = re.compile(r".{1,160}\s|.{1,160}", re.DOTALL)


@dataclass(frozen=True)
class Stage:
    """What makes a probability of the first stage's parts, and the share of a threshold below which a message
    is settled; 0 settles none.
    """

    voice: Voice
    cut: float


@dataclass(frozen=True)
class Cascade:
    """The first stage of a bundle: with behaviour, where there is any, and for text alone.

    Attributes:
        thresholds: those of the bundle's fusion, by policy.
    """

    full: Stage | None
    text_only: Stage
    thresholds: tuple[float, ...]

    def settle(self, heard: Logits, wordless: Mask) -> tuple[Floats, Mask]:
        """Calibrated probabilities [n, policies] without the encoder, and which messages [n] that settles:
        every policy's probability is far enough below its threshold.

        Args:
            heard: log odds [n, policies] by part: linear, markov, `loudest` (what `Linear.hear` hears in the
                loudest part of each message), and trees, where behaviour is known.
            wordless: the messages in which there is nothing to read: the text parts know nothing of them, so
                they are not settled.
        """
        p, ratio = _judged(self.text_only.voice, heard, self.thresholds)
        settled = ratio < self.text_only.cut
        if self.full is not None and (speak := self.full.voice.spoken(heard)).any():
            q, ratio = _judged(self.full.voice, heard, self.thresholds)
            p, settled = np.where(speak[:, None], q, p), np.where(speak, ratio < self.full.cut, settled)
        return p, settled & ~wordless

    def to_bytes(self) -> bytes:
        """JSON."""
        return json.dumps(asdict(self), sort_keys=True, indent=1).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Cascade:
        """The inverse of `to_bytes`."""
        body = json.loads(data)

        def stage(of: Any) -> Stage:
            return Stage(_voice(of["voice"]), float(of["cut"]))

        full = None if body["full"] is None else stage(body["full"])
        return Cascade(full, stage(body["text_only"]), tuple(map(float, body["thresholds"])))


def _voice(of: dict[str, Any]) -> Voice:
    rows = {name: tuple(map(float, of[name])) for name in ("bias", "slope", "intercept")}
    return Voice(tuple(of["parts"]), tuple(tuple(map(float, row)) for row in of["weights"]), **rows)


def _judged(voice: Voice, logits: Logits, thresholds: Sequence[float]) -> tuple[Floats, Floats]:
    """Probabilities [n, policies], and the largest of each message in units of its threshold [n]."""
    p = sigmoid(voice.logits(logits)).astype(np.float32)
    return p, np.asarray((p / np.asarray(thresholds, np.float32)).max(axis=1))


# -- setting the cut -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Held-out messages [n], which no part was fitted to, and what the whole model makes of messages.

    Attributes:
        features: [n, F] in the order of `names`; None without behaviour.
        part: their labels, weights and near-duplicate groups.
        logits: their log odds [n, policies] by part of the whole model.
        encode: log odds of the encoder for other messages.
    """

    texts: Sequence[str]
    views: Sequence[View]
    features: npt.NDArray[np.float32] | None
    names: tuple[str, ...]
    part: Slice
    logits: Logits
    encode: Callable[[Sequence[View]], Floats]


@dataclass(frozen=True)
class Parts:
    """The parts beside the encoder, and what fuses all of them."""

    linear: Linear
    markov: Markov
    trees: Any | None
    fusion: Fusion

    def first(self, held: Held, texts: Sequence[str], seen: Sequence[View], rows: Rows) -> dict[str, Floats]:
        """What the first stage hears of messages rewritten as `texts` that were `rows`."""
        found = self.read(seen)
        if self.trees is not None and held.features is not None:
            found["trees"] = self.trees.logits(with_text(held.features[rows], texts, held.names))
        return found

    def read(self, seen: Sequence[View]) -> dict[str, Floats]:
        """What it hears of their words."""
        canonical = [v.canonical for v in seen]
        heard = self.linear.hear(canonical)
        return {"linear": heard.logits, LOUDEST: heard.loudest, "markov": self.markov.logits(canonical)}


def fit(
    parts: Parts, without_encoder: Voice, held: Held, seed: int, most_missed: float | None = None
) -> tuple[Cascade | None, dict[str, Any]]:
    """The first stage, or None where none can be vouched for; and the figures, `why` among them.

    Args:
        without_encoder: how much the other parts count against each other; weighed on other messages than
            `held`, so that the bound holds.
        most_missed: default `MOST_MISSED`.
    """
    if "encoder" not in parts.fusion.full.parts:
        return None, _verdict("the encoder is not served, so there is nothing to spare")
    bound = MOST_MISSED if most_missed is None else most_missed
    if not held.part.abusive.any():
        return None, _verdict(
            f"no abusive message is held that could show that at most {bound:.1%} are missed"
        )
    attacked = _Attacked.of(held, parts, seed)
    stages: dict[str, Stage] = {}
    figures: dict[str, Any] = {"most_missed": bound, "confidence": CONFIDENCE}
    clean = {**held.logits, **parts.read(held.views)}
    for name, voice in _voices(parts, without_encoder):
        seen = {part: clean[part] for part in voice.parts}
        voice = calibrate(voice, seen, held.part.targets, held.part.weight)
        whole = _Whole(parts, name)
        acted = whole.acted(held.views, held.logits)
        found = attacked.cut(voice, whole, acted, bound)
        stages[name] = Stage(voice, found["cut"])
        p, ratio = _judged(voice, seen, parts.fusion.thresholds)
        settled = ratio < found["cut"]
        figures[name] = found | _figures(settled, p, acted, held.part)
    main = "full" if "full" in stages else "text_only"
    told = figures[main]
    if not told["allowed"] >= 0:
        return None, _verdict(
            f"{told['n']} unrelated abusive messages cannot show that at most {bound:.1%} are missed",
            **figures,
        )
    if told["settled_benign"] is None or told["settled_benign"] < LEAST_SETTLED:
        return None, _verdict(f"it would settle only {told['settled_benign']} of benign messages", **figures)
    cascade = Cascade(stages.get("full"), stages["text_only"], parts.fusion.thresholds)
    why = (
        f"settles {told['settled_benign']:.0%} of benign messages, and at most {bound:.1%} of the abuse that "
        f"the whole model catches (confidence {CONFIDENCE:.0%}, {told['n']} messages, {attacked.forms} forms)"
    )
    return cascade, _verdict(why, passed=True, **figures)


def _voices(parts: Parts, without_encoder: Voice) -> Iterator[tuple[str, Voice]]:
    """The first stage's voices, not yet calibrated: text alone, and with behaviour if that is listened to.

    The linear model speaks half by the whole message and half by its loudest part. By the loudest alone, as
    many parts as a long letter has, one of them always sounds odd: of Enron's benign letters a third were
    settled by it, of all three heard together nearly all.
    """
    n = len(parts.fusion.thresholds)
    ones, zeros = (1.0,) * n, (0.0,) * n
    yield "text_only", Voice(("linear", LOUDEST, "markov"), ((0.5, 0.5, 1.0),) * n, zeros, ones, zeros)
    if "trees" in parts.fusion.full.parts and {"linear", "markov", "trees"} == set(without_encoder.parts):
        weights = [dict(zip(without_encoder.parts, row, strict=True)) for row in without_encoder.weights]
        rows = tuple((w["linear"] / 2, w["linear"] / 2, w["markov"], w["trees"]) for w in weights)
        heard = ("linear", LOUDEST, "markov", "trees")
        yield "full", replace(without_encoder, parts=heard, weights=rows, slope=ones, intercept=zeros)


@dataclass(frozen=True)
class _Whole:
    """The whole model as it answers in one mode, `full` or `text_only`."""

    parts: Parts
    mode: str

    def acted(self, seen: Sequence[View], logits: Logits) -> Mask:
        """Which messages it acts on."""
        known = {k: v for k, v in logits.items() if k != "trees" or self.mode == "full"}
        p = self.parts.fusion.probabilities(known, np.array([not v.canonical for v in seen], bool))
        return np.asarray((p >= np.asarray(self.parts.fusion.thresholds, np.float32)).any(1))


@dataclass(frozen=True)
class _Attacked:
    """Abusive held messages, one a near-duplicate group, in all their forms; `source` says which message [m]
    a form is of, as a row of the held ones.
    """

    held: Held
    messages: Rows
    forms: int
    views: list[View]
    source: Rows
    logits: dict[str, Floats]

    @staticmethod
    def of(held: Held, parts: Parts, seed: int) -> _Attacked:
        rng = random.Random(seed)
        abusive = np.flatnonzero(held.part.abusive)
        _, first = np.unique(held.part.groups[abusive], return_index=True)
        messages = abusive[np.sort(first)]
        if len(messages) > MOST_ATTACKED:
            messages = np.sort(np.array(rng.sample(messages.tolist(), MOST_ATTACKED)))
        benign = [held.texts[i] for i in np.flatnonzero(~held.part.abusive).tolist()]
        made = [disguises(held.texts[i], benign, rng) for i in messages.tolist()]
        source = np.repeat(messages, [len(forms) for forms in made])
        texts = [text for forms in made for text in forms]
        seen = views(texts)
        forms = len(made[0]) if made else 0
        return _Attacked(held, messages, forms, seen, source, parts.first(held, texts, seen, source))

    def cut(self, voice: Voice, whole: _Whole, acted: Mask, bound: float) -> dict[str, Any]:
        """The largest cut that keeps the bound, and what it rests on."""
        caught = np.isin(self.source, self.messages[acted[self.messages]])
        n = int(acted[self.messages].sum())
        allowed = _allowed(n, bound)
        told = {"n": n, "allowed": allowed, "cut": 0.0, "missed": 0, "missed_at_most": 1.0}
        if allowed < 0 or not n:
            return told
        _, ratio = _judged(voice, {p: self.logits[p] for p in voice.parts}, whole.parts.fusion.thresholds)
        missed: set[int] = set()
        cut = HIGHEST_CUT
        for row in self._settled_first(ratio, caught, whole):
            if row[1] not in missed and len(missed) == allowed:
                cut = row[0]
                break
            missed.add(row[1])
        high = attacks.clopper_pearson(len(missed), n, 2 * CONFIDENCE - 1)[1]
        return told | {"cut": cut, "missed": len(missed), "missed_at_most": round(high, 5)}

    def _settled_first(self, ratio: Floats, caught: Mask, whole: _Whole) -> Iterator[tuple[float, int]]:
        """(ratio, message) of the forms that the whole model acts on, the lowest ratio first. The whole model
        is asked in small lots, and seldom: the search ends at a handful of misses.
        """
        order = np.flatnonzero(caught & (ratio < HIGHEST_CUT))
        order = order[np.argsort(ratio[order], kind="stable")]
        for start in range(0, len(order), 64):
            lot = order[start : start + 64]
            seen = [self.views[i] for i in lot.tolist()]
            logits = {part: z[lot] for part, z in self.logits.items()}
            logits["encoder"] = self.held.encode(seen)
            for i in lot[whole.acted(seen, logits)]:
                yield float(ratio[i]), int(self.source[i])


def _allowed(n: int, bound: float) -> int:
    """The most misses among n messages with which the bound holds; -1 where none can show it."""
    misses = -1
    while misses < n and attacks.clopper_pearson(misses + 1, n, 2 * CONFIDENCE - 1)[1] <= bound:
        misses += 1
    return misses


def disguises(text: str, benign: Sequence[str], rng: random.Random) -> list[str]:
    """A message as it is, in every disguise of `redqueen.attacks` at full strength, and among benign messages
    that are put before it, after it, and around it.
    """
    forms = [text, *(_rewritten(text, family, rng) for family in attacks.FAMILIES)]
    kind = [_short(rng.choice(benign)) for _ in range(3)] if benign else ["see you tomorrow"] * 3
    before, after = "\n".join(kind), "\n".join(reversed(kind))
    return [*forms, f"{before}\n{text}", f"{text}\n{after}", f"{kind[0]}\n{text}\n{kind[1]}"]


def _rewritten(text: str, family: attacks.Family, rng: random.Random) -> str:
    """A long text in parts: the families that rewrite words look at the whole again after each."""
    parts = _PARTS.findall(text) if isinstance(family, attacks.WordFamily) else [text]
    return "".join(family.mutate(part, 1.0, rng) for part in parts)


def _short(text: str) -> str:
    """The beginning of a benign message: longer padding would push the abuse out of what any model reads."""
    return text if len(text) <= 200 else text[:200].rsplit(" ", 1)[0]


def _figures(settled: Mask, p: Floats, acted: Mask, part: Slice) -> dict[str, Any]:
    """What it does to held messages as they are."""
    return {
        "settled_benign": share(settled, ~part.abusive, part.weight),
        "settled_abuse": share(settled, part.abusive, part.weight),
        "recall": share(acted & ~settled, part.abusive, part.weight),
        "recall_whole": share(acted, part.abusive, part.weight),
        "ece_settled": round(
            float(
                np.mean(
                    [
                        ece(p[settled, j], part.targets[settled, j], part.weight[settled])
                        for j in range(p.shape[1])
                    ]
                )
            ),
            5,
        ),
    }


def _verdict(why: str, passed: bool = False, **figures: Any) -> dict[str, Any]:
    return {"passed": passed, "why": why, **figures}


# -- the watch over what was settled -------------------------------------------------------------------------


class Watch:
    """Counts what is settled, draws the sample that the whole model reads all the same, and stops the first
    stage where that shows too many misses. Safe to use from several threads.

    Which messages are sampled follows from their text and a salt: a message scored twice gets the same
    answer, and whoever does not know the salt cannot choose texts that are never sampled.
    """

    def __init__(self, rate: float, salt: str, most_missed: float = MOST_MISSED) -> None:
        self.rate, self.most_missed = rate, most_missed
        self._salt = hashlib.blake2b(salt.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        self._counts: Counter[str] = Counter(scored=0, settled=0, audited=0, missed=0, caught=0)
        self._known: Counter[str] = Counter(missed=0, caught=0)
        self._seen: dict[tuple[str, int], None] = {}
        self._lock = threading.Lock()
        self.tripped = ""
        """Why nothing is settled any more; empty while all is well."""

    def drawn(self, messages: Sequence[View]) -> npt.NDArray[np.uint32]:
        """A number per message [n], the same for the same text; a low one is in the sample."""
        digests = (
            hashlib.blake2b(
                f"{v.canonical}\0{v.sent}".encode("utf-8", "surrogatepass"), digest_size=4, key=self._salt
            )
            for v in messages
        )
        return np.frombuffer(b"".join(one.digest() for one in digests), np.uint32)

    def sampled(self, drawn: npt.NDArray[np.uint32]) -> Mask:
        """Which of the messages [n] are read by the whole model even if they are settled."""
        return np.asarray(drawn < self.rate * 2**32)

    def record(self, settled: Mask, acted: Mask, drawn: npt.NDArray[np.uint32]) -> None:
        """Take note of messages [n]: settled by the first stage, acted on in the end.

        Of copies one counts: the sample has all of them or none, and they are no independent evidence.
        """
        sampled = self.sampled(drawn)
        audited = settled & sampled
        with self._lock:
            self._counts["scored"] += len(settled)
            self._counts["settled"] += int(settled.sum())
            self._counts["audited"] += int(audited.sum())
            self._counts["missed"] += int((audited & acted).sum())
            self._counts["caught"] += int((~settled & acted).sum())
            self._note_new("missed", drawn[audited & acted])
            self._note_new("caught", drawn[~settled & sampled & acted])
            if not self.tripped and (audited & acted).any():
                self.tripped = self._verdict()

    def _note_new(self, how: str, drawn: npt.NDArray[np.uint32]) -> None:
        """Count those that did not come to the same end lately. The same text may be caught from one sender
        and missed from another.
        """
        fresh = [key for d in np.unique(drawn).tolist() if (key := (how, d)) not in self._seen]
        self._seen.update(dict.fromkeys(fresh))
        while len(self._seen) > MOST_REMEMBERED:
            del self._seen[next(iter(self._seen))]
        self._known[how] += len(fresh)

    def counts(self) -> dict[str, int]:
        """Messages `scored`, `settled` by the first stage, of those `audited` by the whole model and found to
        be `missed`, and `caught` among the ones that were not settled.
        """
        with self._lock:
            return dict(self._counts)

    def missed_share(self) -> tuple[float, float, float]:
        """Share of the abuse that the whole model would act on that is settled, of copies one counted:
        estimate and 95% interval.
        """
        missed, known = self._known["missed"], self._known.total()
        low, high = attacks.clopper_pearson(missed, known)
        return missed / known if known else 0.0, low, high

    def _verdict(self) -> str:
        missed, known = self._known["missed"], self._known.total()
        low = attacks.clopper_pearson(missed, known, 2 * TRIP_CONFIDENCE - 1)[0]
        if low <= self.most_missed:
            return ""
        return (
            f"of {self._counts['audited']} settled messages that were read all the same, {missed} different "
            f"ones should have been acted on: more than {self.most_missed:.1%} of the abuse is missed, so "
            "nothing is settled any more until the next model"
        )
