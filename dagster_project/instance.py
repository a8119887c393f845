"""The Dagster instance of a home: where it lives, its `dagster.yaml`, and who may drive it. Light on purpose.

Belongs here: what `make ui`, the daemon and the demo must agree on. What only one of them does lives with it.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from redqueen.clock import hour_of
from redqueen.errors import Refused
from redqueen.settings import ENV_FILE, load_settings, write_env
from redqueen.store import open_store
from redqueen.tables import landed_hours

LOCATION_NAME = "redqueen"
"""The code location's name in `workspace.yaml`. Cursors, ticks and run keys hang on it: never rename it."""

CONFIG_FILE = "dagster.yaml"
LOCK_FILE = "driven-by.lock"

DAYS_SHOWN = timedelta(days=5)
"""How far back the hourly partitions of a new home reach."""

DAGSTER_YAML = """\
# Written by Red Queen for this home, once; edit freely, it is not overwritten.
# SQLite below this directory is the default storage; see docs/runbook.md for Postgres.
telemetry:
  enabled: false
nux:
  enabled: false   # a newsletter dialog would cover the first screen

# No queue: a run starts within seconds of its request. The jobs here are small or wait for a child process.
run_coordinator:
  module: dagster._core.run_coordinator
  class: DefaultRunCoordinator

sensors:
  use_threads: true
  num_workers: 4

# Cancelled runs would leak the slots of their pools without this.
run_monitoring:
  enabled: true
  free_slots_after_run_end_seconds: 60

# Ticks only; event logs grow until they are purged.
retention:
  sensor:
    purge_after_days: 30
"""


def dagster_home(home: Path) -> Path:
    """The DAGSTER_HOME of a Red Queen home, absolute, as Dagster demands."""
    return (Path(home) / "dagster").absolute()


def write_dagster_yaml(dagster_home: Path) -> Path:
    """Write `dagster.yaml` into `dagster_home` unless one is there, atomically. Returns its path.

    An existing file is left alone: it may hold an operator's storage and secrets.
    """
    path = Path(dagster_home) / CONFIG_FILE
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{CONFIG_FILE}.{os.getpid()}")
    draft.write_text(DAGSTER_YAML, encoding="utf-8")
    draft.replace(path)
    return path


def initialise(home: Path) -> list[str]:
    """Give a new home on the embedded default its settings, and say which; nothing on any other home.

    New is a home without `redqueen.env`. A store of its own or the wall's clock (`RQ_STORE_URL`,
    `RQ_CLOCK=wall`) means production, whose settings are nobody's to guess.
    """
    settings = load_settings(home)
    if (home / ENV_FILE).exists() or settings.clock == "wall" or settings.store_url is not None:
        return []
    landed = landed_hours(open_store(settings), "events")
    first = min([hour_of(datetime.now(UTC)) - DAYS_SHOWN, *landed[:1]])
    write_env(home, partitions_start=first.isoformat(), bootstrap_approval="embedded default")
    return [
        f"A new home: {home}. Written to {home / ENV_FILE}, edit freely:",
        f"  hourly partitions start at {first:%Y-%m-%d %H:%M} UTC (RQ_PARTITIONS_START)",
        "  a first model may go live without a control, after gate and shadow (RQ_BOOTSTRAP_APPROVAL)",
    ]


@contextmanager
def claim_home(dagster_home: Path, who: str) -> Iterator[None]:
    """Hold the right to evaluate this home's sensors, until the block ends or the process dies.

    Two that evaluate the same sensors would race for cursors and run each request twice.

    Parameters: `who` names the holder to whoever comes second ("make demo").
    Raises: Refused, naming the holder, when another process has the home.
    """
    path = Path(dagster_home) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise Refused(
                f"{who} cannot drive {path.parent}: {holder} is doing so. Stop it, or use another home."
            ) from None
        lock.seek(0)
        lock.truncate()
        lock.write(f"{who} (process {os.getpid()})\n")
        lock.flush()
        yield
