"""The detector as serving, evaluation and attacks use it: a verified bundle, messages in, probabilities out.

Runs on ONNX Runtime, one thread; loads no torch. Training does not belong here.

A bundle may hold shortcuts (`Shortcuts`) that answer sooner and nearly the same. Serving takes them;
evaluation and attacks do not, unless they ask: int8 as the target of an attack hides weakness.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models import bundle
from models.baseline import Linear
from models.bundle import Manifest
from models.cascade import LOUDEST, Cascade, Watch
from models.fusion import Fusion, Logits
from models.markov import Markov
from models.signing import Trust, trust_of
from models.tokens import Feeds, Reader, View, load_reader, log_odds, passage, views
from models.trees import Trees
from redqueen.errors import BundleError, InvalidInput

if TYPE_CHECKING:
    from redqueen.settings import Settings
    from redqueen.store import ObjectStore

Floats = npt.NDArray[np.float32]

TOLD_FROM = (50, 0.02)
"""So many messages, and such a share of them, have to lack a feature before a person is told."""

BATCH = 64
"""Messages through the network at a time: larger batches fall out of the core's cache and are slower."""


@dataclass(frozen=True)
class Shortcuts:
    """What a service may use, where the bundle has it, to answer sooner.

    Attributes:
        int8: the encoder in int8.
        cascade: a first stage that settles most messages without the encoder.
        audit_rate: share of the settled messages that the whole model reads all the same.
        salt: decides which.
    """

    int8: bool = True
    cascade: bool = True
    audit_rate: float = 0.02
    salt: str = ""

    @staticmethod
    def of(settings: Settings) -> Shortcuts:
        """Those that the settings allow."""
        return Shortcuts(cascade=settings.cascade, audit_rate=settings.cascade_audit_rate, salt=settings.salt)


class Detector:
    """A loaded bundle. Safe to share between threads.

    Attributes:
        model_id: the bundle's identity.
        policies: the columns of every score.
        thresholds: float32 [policies]; a message at or above one of them is acted on.
        feature_names: the columns that `features` must have; empty without behaviour.
        manifest: all else that the bundle says of itself.
        training: what its metrics tell of the training (`training` in `metrics.json`).
        parts: what gives log odds, by name: encoder, linear, markov, trees; those that are listened to.
        watch: counts what the first stage settles; None where every message is read by all parts.
        lacking: counts the messages whose behaviour could not be judged.
    """

    def __init__(
        self,
        manifest: Manifest,
        fusion: Fusion,
        parts: dict[str, Any],
        cascade: Cascade | None = None,
        watch: Watch | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> None:
        self.manifest, self.training = manifest, training or {}
        self.model_id = manifest.model_id
        self.policies = manifest.policies
        self.feature_names = manifest.feature_names
        self.thresholds: Floats = np.asarray(fusion.thresholds, np.float32)
        self._fusion = fusion
        self.parts = parts
        self._cascade, self.watch = cascade, watch
        self.lacking = Lacking()

    @classmethod
    def load(
        cls, folder: Path | str, trust: Trust | None = None, shortcuts: Shortcuts | None = None
    ) -> Detector:
        """Verify a bundle and load it from the verified bytes.

        Args:
            trust: whose signature it must carry. None is for a bundle that this process just made.
            shortcuts: which to take. None is the float network, and every message by all parts.

        Raises:
            BundleError: it does not verify, or its files do not fit each other.
        """
        manifest, files = bundle.read(Path(folder), trust)
        try:
            fusion = Fusion.from_dict(json.loads(files[bundle.FUSION]))
            parts = _load_parts(manifest, files, fusion, int8=shortcuts is not None and shortcuts.int8)
            training = _told_of_training(files[bundle.METRICS])
            if shortcuts is None or not shortcuts.cascade or bundle.CASCADE not in files:
                return cls(manifest, fusion, parts, training=training)
            watch = Watch(shortcuts.audit_rate, shortcuts.salt)
            return cls(manifest, fusion, parts, Cascade.from_bytes(files[bundle.CASCADE]), watch, training)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise BundleError(f"bundle {folder} verifies but does not load: {error}") from error

    @classmethod
    def of_home(
        cls, settings: Settings, store: ObjectStore, model_id: str, shortcuts: Shortcuts | None = None
    ) -> Detector:
        """A published model, verified and loaded by way of the home's cache; `shortcuts` as in `load`.

        Raises:
            NotFound: there is no such model.
            BundleError: it does not verify, is not signed by whom this home trusts, or does not load.
        """
        trust = trust_of(settings)
        return cls.load(bundle.fetch(store, model_id, settings.home / "cache", trust), trust, shortcuts)

    def score(self, texts: Sequence[str], features: npt.ArrayLike | None = None) -> Floats:
        """Calibrated probabilities, float32 [n, policies].

        Args:
            texts: raw messages, of any length, also empty.
            features: [n, len(feature_names)] in that order, NaN where unknown. None scores by text alone; the
                same thresholds hold then.

        Raises:
            InvalidInput: `features` has another shape than that.
        """
        return self.score_views(views(texts), features)

    def score_views(self, views: Sequence[View], features: npt.ArrayLike | None = None) -> Floats:
        """`score` of messages that were read already."""
        trees = None
        if features is not None:
            matrix = self._checked(features, len(views))
            if "trees" in self.parts:
                trees = self.parts["trees"].logits(matrix)
                self._note_lacking(matrix)
        canonical = [v.canonical for v in views]
        heard, passages = self.parts["linear"].hear(canonical), views
        logits = {"linear": heard.logits}
        if "markov" in self.parts:
            told = self.parts["markov"].hear(canonical)
            logits["markov"] = told.logits
            passages = [passage(view, at) for view, at in zip(views, told.loudest.tolist(), strict=True)]
        if trees is not None:
            logits["trees"] = trees
        wordless = np.array([not v.canonical for v in views], dtype=bool)
        if self._cascade is None or self.watch is None or self.watch.tripped:
            return self._whole(passages, logits, wordless)
        scores, settled = self._cascade.settle({**logits, LOUDEST: heard.loudest}, wordless)
        drawn = self.watch.drawn(views)
        read = ~settled | self.watch.sampled(drawn)
        if read.any():
            asked = np.flatnonzero(read)
            some = {part: z[asked] for part, z in logits.items()}
            scores[asked] = self._whole([passages[i] for i in asked.tolist()], some, wordless[asked])
        self.watch.record(settled, self.decide(scores), drawn)
        return scores

    def _whole(
        self,
        passages: Sequence[View],
        logits: Logits,
        wordless: npt.NDArray[np.bool_],
    ) -> Floats:
        """Every part's opinion, fused; the encoder's is asked for here."""
        if "encoder" in self.parts:
            logits = {**logits, "encoder": self.parts["encoder"].logits(passages)}
        return self._fusion.probabilities(logits, wordless)

    def score_texts(self, texts: Sequence[str]) -> Floats:
        """`score` by text alone: what an attacker who changes only words can move."""
        return self.score(texts, None)

    def threshold_ratio(self, scores: Floats) -> Floats:
        """float32 [n]: the largest score in units of its threshold; 1 and above is acted on."""
        return np.asarray((scores / self.thresholds).max(axis=1), np.float32)

    def decide(self, scores: Floats) -> npt.NDArray[np.bool_]:
        """bool [n]: whether some policy's threshold is reached."""
        return np.asarray((scores >= self.thresholds).any(axis=1))

    def _note_lacking(self, matrix: Floats) -> None:
        demanded = list(self.parts["trees"].demanded)
        missing = np.isnan(matrix[:, demanded])
        names = [self.feature_names[i] for i in demanded]
        by_name = dict(zip(names, missing.sum(0).tolist(), strict=True))
        self.lacking.note(len(matrix), int(missing.any(1).sum()), by_name)

    def _checked(self, features: npt.ArrayLike, n: int) -> Floats:
        matrix = np.asarray(features, np.float32)
        if matrix.shape != (n, len(self.feature_names)):
            raise InvalidInput(
                f"features have the shape {matrix.shape}, "
                f"{self.model_id} wants ({n}, {len(self.feature_names)}): "
                f"compute them with features version {self.manifest.features_version}"
            )
        return matrix


class Lacking:
    """Counts messages that came with behaviour and lacked a feature without which the trees do not speak, so
    that they were judged by their text. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter(scored=0, lacking=0)
        self._by_name: Counter[str] = Counter()
        self._lock = threading.Lock()

    def note(self, scored: int, lacking: int, by_name: Mapping[str, int]) -> None:
        """Take note of so many messages, of those that lacked something, and of what they lacked."""
        with self._lock:
            self._counts.update(scored=scored, lacking=lacking)
            self._by_name.update(by_name)

    def counts(self) -> dict[str, int]:
        """`scored` with behaviour, and of those `lacking` a feature."""
        with self._lock:
            return dict(self._counts)

    def told(self) -> str:
        """A sentence for on call, where it is more than a trifle; else empty."""
        with self._lock:
            scored, lacking = self._counts["scored"], self._counts["lacking"]
            most = [name for name, n in self._by_name.most_common(3) if n]
        if lacking < TOLD_FROM[0] or lacking < TOLD_FROM[1] * scored:
            return ""
        return (
            f"{lacking} of {scored} messages lacked {', '.join(most)}, which was never missing when it was "
            "trained: they were judged by their text alone"
        )


def _told_of_training(metrics: bytes) -> dict[str, Any]:
    """What the metrics tell of the training; nothing a message is scored by."""
    try:
        return dict(json.loads(metrics)["training"])
    except (ValueError, KeyError, TypeError):
        return {}


def _load_parts(
    manifest: Manifest, files: dict[str, bytes], fusion: Fusion, *, int8: bool = False
) -> dict[str, Any]:
    """Only the parts that the voices listen to; the encoder in int8 if that is asked for and there."""
    voices = (fusion.full, fusion.text_only, fusion.features_only)
    wanted = {part for voice in voices if voice is not None for part in voice.parts}
    parts: dict[str, Any] = {}
    if "linear" in wanted:
        parts["linear"] = Linear.from_bytes(files[bundle.LINEAR])
    if "markov" in wanted:
        parts["markov"] = Markov.from_bytes(files[bundle.MARKOV])
    if "encoder" in wanted:
        onnx = files[bundle.ONNX_INT8 if int8 and bundle.ONNX_INT8 in files else bundle.ONNX]
        parts["encoder"] = Network(onnx, load_reader(files[bundle.READER]))
    if "trees" in wanted:
        parts["trees"] = Trees.from_bytes(files[bundle.TREES], len(manifest.policies))
    return parts


class Network:
    """The encoder on ONNX Runtime."""

    def __init__(self, onnx: bytes, reader: Reader) -> None:
        import onnxruntime

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        options = onnxruntime.SessionOptions()
        # One thread a replica: two threads on busy cores wait for each other.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self._reader = reader
        self._policies = self._session.get_outputs()[0].shape[1]
        self._inputs = {given.name for given in self._session.get_inputs()}

    def logits(self, views: Sequence[View]) -> Floats:
        """Log odds [n, policies] of messages."""
        return log_odds(self._reader, views, self._run, self._policies, BATCH)

    def _run(self, feeds: Feeds) -> Floats:
        # The network of an older bundle may not read all that today's reader gives.
        known = {name: values for name, values in feeds.items() if name in self._inputs}
        return np.asarray(self._session.run(None, known)[0])
