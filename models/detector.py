"""The detector as serving, evaluation and attacks use it: a verified bundle, messages in, probabilities out.

Runs on ONNX Runtime, one thread; loads no torch. Training does not belong here.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from models import bundle
from models.baseline import Linear
from models.bundle import Manifest
from models.fusion import Fusion
from models.signing import Trust, trust_of
from models.tokens import View, length_buckets, load_reader, views
from models.trees import Trees
from redqueen.errors import BundleError, InvalidInput

if TYPE_CHECKING:
    from redqueen.settings import Settings
    from redqueen.store import ObjectStore

Floats = npt.NDArray[np.float32]

BATCH = 64
"""Messages through the network at a time: larger batches fall out of the core's cache and are slower."""


class Detector:
    """A loaded bundle. Safe to share between threads.

    Attributes:
        model_id: the bundle's identity.
        policies: the columns of every score.
        thresholds: float32 [policies]; a message at or above one of them is acted on.
        feature_names: the columns that `features` must have; empty without behaviour.
        manifest: all else that the bundle says of itself.
    """

    def __init__(self, manifest: Manifest, fusion: Fusion, parts: dict[str, Any]) -> None:
        self.manifest = manifest
        self.model_id = manifest.model_id
        self.policies = manifest.policies
        self.feature_names = manifest.feature_names
        self.thresholds: Floats = np.asarray(fusion.thresholds, np.float32)
        self._fusion = fusion
        self._parts = parts

    @classmethod
    def load(cls, folder: Path | str, trust: Trust | None = None) -> Detector:
        """Verify a bundle and load it from the verified bytes.

        Args:
            trust: whose signature it must carry. None is for a bundle that this process just made.

        Raises:
            BundleError: it does not verify, or its files do not fit each other.
        """
        manifest, files = bundle.read(Path(folder), trust)
        try:
            fusion = Fusion.from_dict(json.loads(files[bundle.FUSION]))
            return cls(manifest, fusion, _load_parts(manifest, files, fusion))
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise BundleError(f"bundle {folder} verifies but does not load: {error}") from error

    @classmethod
    def of_home(cls, settings: Settings, store: ObjectStore, model_id: str) -> Detector:
        """A published model, verified and loaded by way of the home's cache.

        Raises:
            NotFound: there is no such model.
            BundleError: it does not verify, is not signed by whom this home trusts, or does not load.
        """
        trust = trust_of(settings)
        return cls.load(bundle.fetch(store, model_id, settings.home / "cache", trust), trust)

    def score(self, texts: Sequence[str], features: npt.ArrayLike | None = None) -> Floats:
        """Calibrated probabilities, float32 [n, policies].

        Args:
            texts: raw messages, of any length, also empty.
            features: [n, len(feature_names)] in that order, NaN where unknown. None scores by text alone; the
            same
                thresholds hold then.

        Raises:
            InvalidInput: `features` has another shape than that.
        """
        return self.score_views(views(texts), features)

    def score_views(self, views: Sequence[View], features: npt.ArrayLike | None = None) -> Floats:
        """`score` of messages that were read already."""
        logits: dict[str, npt.NDArray[np.floating[Any]]] = {}
        if "linear" in self._parts:
            logits["linear"] = self._parts["linear"].logits([v.canonical for v in views])
        if "encoder" in self._parts:
            logits["encoder"] = self._parts["encoder"].logits(views)
        known = None if features is None else self._checked(features, len(views))
        if known is not None and "trees" in self._parts:
            logits["trees"] = self._parts["trees"].logits(known)
        return self._fusion.probabilities(logits)

    def score_texts(self, texts: Sequence[str]) -> Floats:
        """`score` by text alone: what an attacker who changes only words can move."""
        return self.score(texts, None)

    def threshold_ratio(self, scores: Floats) -> Floats:
        """float32 [n]: the largest score in units of its threshold; 1 and above is acted on."""
        return np.asarray((scores / self.thresholds).max(axis=1), np.float32)

    def decide(self, scores: Floats) -> npt.NDArray[np.bool_]:
        """bool [n]: whether some policy's threshold is reached."""
        return np.asarray((scores >= self.thresholds).any(axis=1))

    def _checked(self, features: npt.ArrayLike, n: int) -> Floats:
        matrix = np.asarray(features, np.float32)
        if matrix.shape != (n, len(self.feature_names)):
            raise InvalidInput(
                f"features have the shape {matrix.shape}, "
                f"{self.model_id} wants ({n}, {len(self.feature_names)}): "
                f"compute them with features version {self.manifest.features_version}"
            )
        return matrix


def _load_parts(manifest: Manifest, files: dict[str, bytes], fusion: Fusion) -> dict[str, Any]:
    """Only the parts that the voices listen to."""
    wanted = {*fusion.full.parts, *fusion.text_only.parts}
    parts: dict[str, Any] = {}
    if "linear" in wanted:
        parts["linear"] = Linear.from_bytes(files[bundle.LINEAR])
    if "encoder" in wanted:
        parts["encoder"] = _Network(files[bundle.ONNX], files[bundle.READER])
    if "trees" in wanted:
        parts["trees"] = Trees.from_bytes(files[bundle.TREES], len(manifest.policies))
    return parts


class _Network:
    """The encoder on ONNX Runtime."""

    def __init__(self, onnx: bytes, reader: bytes) -> None:
        import onnxruntime

        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        options = onnxruntime.SessionOptions()
        # One thread a replica: two threads on busy cores wait for each other.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(onnx, options, providers=["CPUExecutionProvider"])
        self._reader = load_reader(reader)
        self._policies = self._session.get_outputs()[0].shape[1]

    def logits(self, views: Sequence[View]) -> Floats:
        sequences = self._reader.sequences(views)
        out = np.zeros((len(sequences), self._policies), np.float32)
        lengths = np.fromiter((len(s) for s in sequences), np.int64, len(sequences))
        for rows in length_buckets(lengths, BATCH):
            out[rows] = self._session.run(None, self._reader.padded([sequences[i] for i in rows]))[0]
        return out
