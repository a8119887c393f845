"""Fixtures for everybody: a home of its own for each test, and the real servers."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Partitions are cut when the definitions are imported: from defaults, not from a demo's home in the checkout.
os.environ["RQ_HOME"] = tempfile.mkdtemp(prefix="redqueen-tests-")
os.environ.setdefault("DO_NOT_TRACK", "1")
os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
os.environ.setdefault("AWS_ACCESS_KEY_ID", "test")
os.environ.setdefault("AWS_SECRET_ACCESS_KEY", "test")
os.environ.setdefault("AWS_DEFAULT_REGION", "us-east-1")

from tests.services import RedisServer, S3Server

if TYPE_CHECKING:
    from tests.miniature import Platform


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the developer's own home."""
    monkeypatch.setenv("RQ_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    server = S3Server.start(tmp_path_factory.mktemp("s3"))
    yield server
    server.stop()


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer.start()
    yield server
    server.stop()


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    """A platform in miniature, without a live model yet."""
    from tests.miniature import Platform

    made = Platform(tmp_path / "home")
    yield made
    made.close()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The real data sets; a test that wants them skips where they are absent."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("RQ_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set RQ_SHARED_DATA")
    return folder
