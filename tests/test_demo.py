"""The demo as a newcomer runs it: on a file of his own, killed half-way, run again."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from arena.demo import prepare
from arena.platform import Platform
from redqueen.errors import Refused
from redqueen.settings import load_settings
from redqueen.store import DirectoryStore
from redqueen.tables import hour_key
from tests.services import wait_for

DAYS = 12


@pytest.fixture(scope="module")
def messages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve days of dated, labelled messages, as somebody else's CSV."""
    start = datetime(2024, 3, 1, tzinfo=UTC)
    platform = Platform(3, start, "quiet", None, benign_per_hour=150, abusive_per_hour=110)
    path = tmp_path_factory.mktemp("data") / "messages.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["when", "who", "what", "bad"])
        for index in range(DAYS):
            hour = platform.hour(start + timedelta(hours=index))
            for event in hour.events:
                if event["text"]:
                    bad = int(hour.truth[event["event_id"]] is not None)
                    when = event["ts"] + timedelta(hours=23 * index)
                    rows.writerow([when.isoformat(), event["actor_id"], event["text"], bad])
        rows.writerow(["", "x", "a message without a date", 0])
    return path


def _demo(home: Path, data: Path) -> subprocess.Popen[bytes]:
    options = ["--text", "what", "--time", "when", "--label", "bad", "--actor", "who", "--window", "day"]
    command = [sys.executable, "-m", "cli.main", "--home", str(home), "demo", "--data", str(data), *options]
    small = {"RQ_ENCODER_LAYERS": "1", "RQ_ENCODER_WIDTH": "48", "RQ_TRAIN_EPOCHS": "2"}
    log = (home.parent / "demo.log").open("ab")
    return subprocess.Popen(command, env={**os.environ, **small}, stdout=log, stderr=subprocess.STDOUT)


def _hours_done(home: Path) -> int:
    path = home / "demo" / "progress.json"
    return int(json.loads(path.read_text())["next_hour"]) if path.exists() else 0


def _kill_when(process: subprocess.Popen[bytes], condition: Callable[[], bool], what: str) -> None:
    wait_for(lambda: process.poll() is not None or condition(), 120, what)
    assert process.poll() is None, "the demo ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.mark.slow
def test_a_demo_on_ones_own_file_that_is_killed_twice_completes(messages: Path, tmp_path: Path) -> None:
    home = tmp_path / "own"
    _kill_when(_demo(home, messages), lambda: _hours_done(home) >= 1, "the first hour")
    _kill_when(
        _demo(home, messages), lambda: any(home.glob("work/*/dataset.parquet")), "the training's start"
    )
    last = _demo(home, messages)
    last.wait(300)
    log = (home.parent / "demo.log").read_text()
    assert last.returncode == 0, log[-2000:]

    told = json.loads((home / "demo.json").read_text())
    assert len(told["recall"]) == len(told["fpr"]) == len(told["recall_never_retrained"])
    assert [r for r in told["recall"] if r is not None], "the first lap went live and was measured"
    assert told["triggers"][0]["sensor"] == "first_lap"
    assert (home / "demo.png").stat().st_size > 10_000
    assert "went to quarantine" in log
    _every_hour_landed_once(home)


def _every_hour_landed_once(home: Path) -> None:
    settings = load_settings(home)
    store = DirectoryStore(home / "store")
    hours = [settings.partitions_start + timedelta(hours=i) for i in range(DAYS)]
    assert all(len(store.list(hour_key("events", hour))) == 1 for hour in hours)
    assert all(store.exists(f"{hour_key('ingested/events', hour)}part.parquet") for hour in hours)


def test_a_home_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    DirectoryStore(tmp_path / "store").put("events/dt=2026-01-01/hr=00/mine.jsonl", b"{}")
    with pytest.raises(Refused, match="not a demo's"):
        prepare(tmp_path, {"scenario": "attack"}, datetime.now(UTC))
    assert DirectoryStore(tmp_path / "store").list("events/")


def test_the_same_demo_is_taken_up_and_another_starts_anew(tmp_path: Path) -> None:
    end = datetime(2026, 1, 3, 14, tzinfo=UTC)
    first = prepare(tmp_path, {"seed": 1}, end)
    (tmp_path / "store").mkdir()
    assert prepare(tmp_path, {"seed": 1}, end + timedelta(hours=1)) == first
    assert (tmp_path / "store").exists()
    assert prepare(tmp_path, {"seed": 2}, end)["wanted"] == {"seed": 2}
    assert not (tmp_path / "store").exists()
