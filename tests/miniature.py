"""A platform in miniature: a store, a clock, detectors that can be broken, and the scoring service on top."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from models.detector import Lacking
from redqueen.features import FEATURES
from redqueen.rollout import RolloutState
from redqueen.settings import Settings
from redqueen.state import LIVE_KEY
from redqueen.store import DirectoryStore
from redqueen.tables import read_hours
from serving.app import create_app
from serving.client import InProcessClient
from tests.services import answers, wait_for

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
POLICIES = ("spam", "scam", "harassment")
SECRET = "meet me at the old mill, password swordfish"


@dataclass
class Keyword:
    """A detector that is sure of a policy wherever its name stands in the text, and can be broken at will."""

    model_id: str
    feature_names: tuple[str, ...] = tuple(f.name for f in FEATURES)
    policies: tuple[str, ...] = POLICIES
    thresholds: tuple[float, ...] = (0.6, 0.6, 0.6)
    broken: str | None = None
    refused: Exception | None = None
    seen: list[tuple[int, bool]] = field(default_factory=list)
    lacking: Lacking = field(default_factory=Lacking)

    def score(self, texts: Sequence[str], features: Any = None) -> np.ndarray:
        self.seen.append((len(texts), features is not None))
        if self.broken == "always" or (self.broken == "features" and features is not None):
            raise RuntimeError(f"cannot read {texts[0]}")
        if any("CRASH" in text for text in texts):
            raise RuntimeError("cannot read CRASH")
        p = np.array([[0.9 if policy in text else 0.01 for policy in POLICIES] for text in texts], np.float32)
        p[["maybe" in text for text in texts], 0] = 0.4
        return p * np.nan if self.broken == "nan" else p


@dataclass
class MovableClock:
    at: datetime = NOON

    def now(self) -> datetime:
        return self.at


class Platform:
    """A store, a clock, some models, and the service on top of them in this process."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = Settings(home=home, **settings)
        self.store = DirectoryStore(home / "store")
        self.clock = MovableClock()
        self.models: dict[str, Keyword] = {"m-old": Keyword("m-old"), "m-new": Keyword("m-new")}
        self._client: InProcessClient | None = None

    def load(self, model_id: str) -> Keyword:
        model = self.models[model_id]
        if model.refused is not None:
            raise model.refused
        return model

    def live(self, **state: Any) -> None:
        version = getattr(self, "_version", 0) + 1
        self._version = version
        wanted = {**RolloutState.initial().to_dict(), **state, "version": version}
        self.store.put_json(LIVE_KEY, wanted)
        self.client.refresh()

    @property
    def client(self) -> InProcessClient:
        if self._client is None:
            app = create_app(
                self.settings, store=self.store, clock=self.clock, load=self.load, background=False
            )
            self._client = InProcessClient(app)
        return self._client

    def scored(self, *events: dict[str, Any]) -> list[tuple[str, bool]]:
        return [(a["action"], a["degraded"]) for a in self.client.score(events)]

    def logged(self) -> pl.DataFrame:
        self.client.flush()
        return read_hours(self.store, "predictions", NOON - timedelta(hours=12), NOON + timedelta(hours=12))

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


def event(n: int = 0, text: str = "good morning everyone", **changes: Any) -> dict[str, Any]:
    return {
        "event_id": f"e{n}",
        "ts": NOON + timedelta(milliseconds=n),
        "actor_id": f"actor-{n}",
        "community_id": "c1",
        "community_size": 120,
        "channel_id": "general",
        "kind": "message",
        "text": text,
        "account_created_at": NOON - timedelta(days=30),
        **changes,
    }


@contextmanager
def service(home: Path, port: int, **settings: Any) -> Iterator[subprocess.Popen[bytes]]:
    """The scoring service in a process of its own, from its first answer on; killed at the end."""
    code = (
        "from redqueen.settings import load_settings; from serving.app import serve; "
        f"serve(load_settings(), port={port})"
    )
    wanted = {"HOME": home, "CLOCK": "wall", **{name.upper(): value for name, value in settings.items()}}
    env = {**os.environ, **{f"RQ_{name}": str(value) for name, value in wanted.items()}}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        wait_for(lambda: answers(f"http://127.0.0.1:{port}/readyz"), 60, "the service's start")
        yield process
    finally:
        process.kill()
        process.wait()
