"""A small labelled world and a detector trained on it once a session, for tests that need a real bundle."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from models.train import TrainingSpec, train
from redqueen.text import canonicalise, simhash

POLICIES = ("spam", "scam")
FEATURES = ("rate", "age")
_CHAT = (
    *("the", "a", "we", "our", "lunch", "game", "match", "tomorrow", "server", "update", "thanks"),
    *("maybe", "later", "bug", "cat", "music", "road", "coffee", "team"),
)
_WORDS = {
    "spam": ["cheap", "followers", "buy", "promo", "discount", "visit", "shop", "sale", "boost", "deal"],
    "scam": ["free", "gift", "claim", "wallet", "airdrop", "verify", "account", "bonus", "prize", "crypto"],
}


@dataclass(frozen=True)
class Message:
    text: str
    policy: str | None
    features: tuple[float, float]


def messages(n: int, seed: int, abuse: float = 0.2) -> list[Message]:
    """`n` messages, a share of them abusive; abusers also send faster from younger accounts."""
    rng = random.Random(seed)
    return [_message(rng, rng.choice(POLICIES) if rng.random() < abuse else None) for _ in range(n)]


def _message(rng: random.Random, policy: str | None) -> Message:
    """Some abuse hardly shows in its words, and some chat has a suspect word: behaviour tells them apart."""
    words = rng.choices(_CHAT, k=rng.randint(3, 9))
    if policy is not None:
        words += rng.sample(_WORDS[policy], 1 if rng.random() < 0.3 else 3)
    elif rng.random() < 0.2:
        words.append(rng.choice(_WORDS[rng.choice(POLICIES)]))
    rng.shuffle(words)
    bad = policy is not None
    return Message(" ".join(words), policy, (rng.gauss(3.0 * bad, 1), rng.gauss(-2.0 * bad, 1)))


def dataset(path: Path, n: int = 900, seed: int = 1) -> Path:
    """The training set of `n` messages as Parquet, one a minute."""
    rows = messages(n, seed)
    start = datetime(2026, 1, 1, tzinfo=UTC)
    table = {
        "event_id": [f"e{i:05}" for i in range(n)],
        "ts": [start + timedelta(minutes=i) for i in range(n)],
        "text": [m.text for m in rows],
        "weight": np.ones(n, np.float32),
        "group": [simhash(canonicalise(m.text)) for m in rows],
        **{f"p_{p}": [0.95 if m.policy == p else 0.02 for m in rows] for p in POLICIES},
        **{f"f_{name}": [m.features[i] for m in rows] for i, name in enumerate(FEATURES)},
    }
    pl.DataFrame(table, schema_overrides={"group": pl.Int64}).write_parquet(path)
    return path


def spec(folder: Path, **changes: object) -> TrainingSpec:
    """A spec that trains in seconds, working in `folder`."""
    plain = {
        "dataset": str(dataset(folder / "dataset.parquet")),
        "out": str(folder / "work"),
        "policies": POLICIES,
        "feature_names": FEATURES,
        "features_version": "toy-1",
        "fpr_budget": 0.02,
        "snapshot": "toy",
        "created_at": "2026-01-02T00:00:00+00:00",
        "width": 32,
        "epochs": 3,
    }
    return TrainingSpec.from_dict(plain | changes)


@cache
def toy_bundle() -> Path:
    """The verified bundle; read only: copy it before changing it."""
    folder = tempfile.TemporaryDirectory(prefix="toy-model-")
    _KEPT.append(folder)
    return train(spec(Path(folder.name)))


_KEPT: list[tempfile.TemporaryDirectory[str]] = []


def matrix(rows: list[Message]) -> npt.NDArray[np.float32]:
    """The features [n, 2] of messages."""
    return np.array([m.features for m in rows], np.float32)
