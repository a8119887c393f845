"""What is live right now: the models of the rollout state, loaded, verified and proven by a first score.

`obtain` turns a model id into a model or an error; which model answers which message is `serving.scorer`'s
part. Nothing here keeps a service from answering: a model that cannot be had is a reason, not an exception.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from redqueen.errors import BundleError
from redqueen.rollout import RolloutState

if TYPE_CHECKING:
    from redqueen.settings import Settings
    from redqueen.store import ObjectStore

KNOWN_GOOD = "a first message"
"""What any model must be able to score; used to prove that it can."""

Floats = NDArray[np.floating[Any]]


class ServedDetector(Protocol):
    """What serving needs of a detector; `models.detector.Detector` is one."""

    @property
    def model_id(self) -> str: ...
    @property
    def policies(self) -> Sequence[str]: ...
    @property
    def thresholds(self) -> Any: ...
    @property
    def feature_names(self) -> Sequence[str]: ...
    def score(self, texts: Sequence[str], features: Any = None) -> Any: ...


class SettlingWatch(Protocol):
    """What serving tells of a model's first stage; `models.cascade.Watch` is one."""

    @property
    def tripped(self) -> str: ...
    def counts(self) -> dict[str, int]: ...
    def missed_share(self) -> tuple[float, float, float]: ...


class LackingWatch(Protocol):
    """The count of messages whose behaviour a model could not judge; `models.detector.Lacking` is one."""

    def counts(self) -> dict[str, int]: ...
    def told(self) -> str: ...


Loader = Callable[[str], ServedDetector]


class ScoringFailed(Exception):
    """A model raised, or answered what is no probability. Carries no text, only the kind of failure."""


@dataclass(frozen=True)
class ServedModel:
    """A verified detector, and where its feature columns lie among the service's.

    columns: positions of the model's features in a served feature row; None: the model reads text only.
    width: columns of a served feature row.
    unfit: why the features it was trained with cannot be served here, so that it reads text only; else "".
    """

    model_id: str
    policies: tuple[str, ...]
    thresholds: Floats
    columns: NDArray[np.intp] | None
    width: int
    detector: ServedDetector = field(repr=False)
    unfit: str = ""

    @property
    def wants_features(self) -> bool:
        """Whether it was trained with behaviour features, computed by this service or not."""
        return self.columns is not None or bool(self.unfit)

    def probabilities(self, texts: Sequence[str], features: Floats | None) -> Floats:
        """Probabilities [n, P] for n texts and their served feature rows [n, F], or None for text alone.

        Raises:
            ScoringFailed: the rows are not n x F, the detector raised, or did not answer n x P finite
                probabilities.
        """
        if features is not None and features.shape != (len(texts), self.width):
            raise ScoringFailed(f"its feature rows are {features.shape}, not {(len(texts), self.width)}")
        rows = None if features is None or self.columns is None else features[:, self.columns]
        try:
            p = np.asarray(self.detector.score(list(texts), rows), dtype=np.float64)
        except Exception as error:
            raise ScoringFailed(f"it raised {type(error).__name__}") from error
        if p.shape != (len(texts), len(self.policies)):
            raise ScoringFailed(f"it answered shape {p.shape} to {len(texts)} messages")
        if not np.isfinite(p).all() or (p < 0).any() or (p > 1).any():
            raise ScoringFailed("it answered numbers that are no probabilities")
        return p

    @property
    def lacking(self) -> LackingWatch | None:
        """Messages that lacked a feature it cannot do without; None where it has no behaviour to judge by."""
        watch: LackingWatch | None = getattr(self.detector, "lacking", None)
        return watch if self.columns is not None else None

    @property
    def settling(self) -> SettlingWatch | None:
        """What its first stage settles; None where it has none, or none is used."""
        watch: SettlingWatch | None = getattr(self.detector, "watch", None)
        return watch

    def threshold_ratios(self, probabilities: Floats) -> Floats:
        """How near each message came to being acted on [n]: the greatest probability / threshold."""
        ratios: Floats = (probabilities / np.maximum(self.thresholds, 1e-9)).max(axis=1)
        return ratios


@dataclass(frozen=True)
class Live:
    """One consistent picture of the rollout; swapped whole, so a request never sees half of a change.

    champion: the model that answers for the champion: the one before it where it could not be had, None while
        there is none.
    challenger_refused: there is a challenger, and its bundle is broken.
    """

    state: RolloutState
    etag: str | None
    champion: ServedModel | None = None
    challenger: ServedModel | None = None
    challenger_refused: bool = False
    problems: tuple[tuple[str, str], ...] = ()

    def model(self, model_id: str) -> ServedModel | None:
        """The loaded model of that id, if it is one of the two."""
        for model in (self.champion, self.challenger):
            if model is not None and model.model_id == model_id:
                return model
        return None


def decode_state(data: bytes) -> RolloutState:
    """The rollout state of `rollout/live.json`; raises `ValueError` or `KeyError` where it is none."""
    return RolloutState.from_dict(json.loads(data))


def bundle_loader(settings: Settings, store: ObjectStore) -> Loader:
    """A loader that fetches bundles from the store into the home, and verifies them."""

    def load(model_id: str) -> ServedDetector:
        # Loading a model is what pulls in the heavy libraries; a service without one starts without them.
        from models.detector import Detector, Shortcuts

        detector: ServedDetector = Detector.of_home(settings, store, model_id, Shortcuts.of(settings))
        return detector

    return load


def serve_model(
    model_id: str, load: Loader, served_features: Sequence[str], features_version: str
) -> ServedModel:
    """Load a model, prove that it is the one asked for and that it scores.

    Raises:
        BundleError: it is another model, wants a feature twice, or fails its first score. Other errors come
            from `load`.
    """
    detector = load(model_id)
    if detector.model_id != model_id:
        raise BundleError(f"what is stored as model '{model_id}' is model '{detector.model_id}': not loaded")
    policies = tuple(detector.policies)
    columns, unfit = _columns(detector, served_features, features_version)
    model = ServedModel(
        model_id, policies, _thresholds(detector, policies), columns, len(served_features), detector, unfit
    )
    try:
        model.probabilities([KNOWN_GOOD, ""], np.zeros((2, len(served_features)), dtype=np.float32))
    except ScoringFailed as error:
        raise BundleError(f"model '{model_id}' failed its first score ({error}): not loaded") from error
    return model


def _columns(
    detector: ServedDetector, served: Sequence[str], version: str
) -> tuple[NDArray[np.intp] | None, str]:
    names = tuple(detector.feature_names)
    if not names:
        return None, ""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BundleError(f"model '{detector.model_id}' wants feature '{twice[0]}' twice: not loaded")
    trained_with = getattr(getattr(detector, "manifest", None), "features_version", version)
    if trained_with != version:
        return None, f"it was trained with features version {trained_with}, this service computes {version}"
    position = {name: i for i, name in enumerate(served)}
    if missing := [name for name in names if name not in position]:
        return None, f"this service does not compute its features {', '.join(missing)}"
    return np.array([position[name] for name in names], dtype=np.intp), ""


def _thresholds(detector: ServedDetector, policies: tuple[str, ...]) -> Floats:
    found = detector.thresholds
    values = [found[policy] for policy in policies] if hasattr(found, "keys") else list(found)
    thresholds = np.array(values, dtype=np.float64)
    if thresholds.shape != (len(policies),) or np.isnan(thresholds).any() or (thresholds <= 0).any():
        raise BundleError(f"model '{detector.model_id}' has no usable threshold for each of {policies}")
    return thresholds
