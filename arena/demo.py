"""The demo: sets a home up, plays a world through the loop in it, and tells what came of it.

Belongs here: homes, resuming, progress on the terminal. The loop itself is `arena.loop`.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from arena import story
from arena.world import World
from redqueen.clock import hour_of
from redqueen.errors import Refused
from redqueen.importing import Columns, Plan, Stream, load_stream, plan_windows
from redqueen.settings import Settings, load_settings, write_env
from redqueen.store import DirectoryStore, open_store

META = "demo/meta.json"


# -- homes ---------------------------------------------------------------------------------------------------


def prepare(home: Path, wanted: dict[str, Any], end: datetime) -> dict[str, Any]:
    """Make `home` ready for the demo that `wanted` describes; returns its notes.

    An unfinished demo of the same description is taken up where it stopped. Anything else that an earlier
    demo left is removed, and a home that holds something other than a demo is not touched.

    Raises:
        Refused: the home holds something that is not a demo's.
    """
    path = home / META
    if path.exists():
        meta: dict[str, Any] = json.loads(path.read_text())
        if meta["wanted"] == wanted and not meta["finished"]:
            return meta
        for part in ("store", "dagster", "demo", "cache", "work", "logs", "spool", "journal"):
            shutil.rmtree(home / part, ignore_errors=True)
    elif (home / "store").exists() and DirectoryStore(home / "store").list(""):
        raise Refused(
            f"{home} holds data that is not a demo's; it stays untouched. Give the demo a home of its own: "
            "make demo HOME_DIR=.redqueen-demo"
        )
    meta = {"wanted": wanted, "end": end.isoformat(), "finished": False, "seconds": 0.0}
    _write_meta(home, meta)
    return meta


def _write_meta(home: Path, meta: dict[str, Any]) -> None:
    path = home / META
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(meta, indent=1))
    partial.replace(path)


def _settle(home: Path, first_hour: datetime, **values: object) -> Settings:
    """Write the home's settings, and make them those of this process and its children."""
    write_env(
        home,
        partitions_start=first_hour.isoformat(),
        bootstrap_approval="the demo",
        **values,
    )
    os.environ["RQ_HOME"] = str(home)
    return load_settings(home)


# -- the main job --------------------------------------------------------------------------------------------


def simulate(home: Path, scenario: str, seed: int, console: Console) -> bool:
    """Run a scenario on the built-in platform; whether it kept its promises."""
    from arena.worlds import SimulatedWorld

    wanted = {"scenario": scenario, "seed": seed}
    meta = prepare(home, wanted, hour_of(datetime.now(UTC)))
    world = SimulatedWorld(scenario, seed, datetime.fromisoformat(meta["end"]))
    settings = _settle(home, world.hours[0])
    console.print(
        f"[bold]Red Queen[/], scenario [bold]{scenario}[/], seed {seed}: {len(world.hours)} simulated hours "
        f"that end now, {world.first_scored} of them history. Home: {home}"
    )
    return _play(settings, world, meta, scenario, seed, console)


def replay(
    home: Path, data: list[Path], columns: Columns, *, policy: str, where: str | None, window: str,
    undated: str, seed: int, console: Console,
) -> bool:  # fmt: skip
    """Run the loop on a real stream, one of its periods an hour."""
    from arena.worlds import ReplayWorld

    stream = load_stream(data, columns, undated, seed, policy, where=where)  # type: ignore[arg-type]
    wanted = {
        "data": [str(p.resolve()) for p in data], "columns": vars(columns), "where": where, "window": window,
        "undated": undated, "seed": seed, "policy": policy,
    }  # fmt: skip
    meta = prepare(home, json.loads(json.dumps(wanted)), hour_of(datetime.now(UTC)))
    plan = plan_windows(stream, window, datetime.fromisoformat(meta["end"]))  # type: ignore[arg-type]
    settings = _settle(home, plan.windows[0].hour, **_stream_settings(stream, plan))
    _quarantine(settings, stream, plan)
    for note in stream.told:
        console.print(f"  {note}")
    if _single_words(stream):
        console.print("  texts are single words: attacks that add words are left out of the threat model")
    console.print(f"  one {window} of the stream is played in one hour: {len(plan)} hours")
    return _play(settings, ReplayWorld(plan), meta, "replay", seed, console)


def _stream_settings(stream: Stream, plan: Plan) -> dict[str, object]:
    """Settings that follow from a stream: its policies, its one source of labels, and how much of it there
    is.
    """
    judged = stream.rows.height
    return {
        "policies": ",".join(stream.policies),
        "attack_families": "invisible,homoglyph,leet,typo" if _single_words(stream) else None,
        "label_error": 0.0,
        "trusted_sources": "vendor,moderator,audit,honeypot",
        "behaviour": str(stream.behaviour).lower(),
        # A seventh of the stream, but never so little that a threshold would be a guess.
        "min_trusted_labels": max(500, min(5000, judged // 7)),
        "min_new_labels": max(50, judged // len(plan) // 4),
        "min_missed_labels": max(20, judged // len(plan) // 10),
    }


def _single_words(stream: Stream) -> bool:
    """Whether messages are names or links rather than sentences: nobody can add words to those."""
    words = stream.rows["text"].head(2000).str.strip_chars().str.count_matches(r"\s+")
    return bool((words == 0).mean() > 0.9)  # type: ignore[operator]


def _quarantine(settings: Settings, stream: Stream, plan: Plan) -> None:
    from redqueen import quarantine

    quarantine.refuse(open_store(settings), "import", plan.windows[0].hour, stream.quarantine)


def import_only(
    settings: Settings, data: list[Path], columns: Columns, *, policy: str, where: str | None, window: str,
    undated: str, seed: int, console: Console,
) -> None:  # fmt: skip
    """Turn a stream into the landed tables `events` and `labels`, and run nothing."""
    from arena.loop import land_parquet

    stream = load_stream(data, columns, undated, seed, policy, where=where)  # type: ignore[arg-type]
    plan = plan_windows(stream, window, hour_of(datetime.now(UTC)))  # type: ignore[arg-type]
    store = open_store(settings)
    for index, planned in enumerate(plan.windows):
        events, labels, _ = plan.hour(index)
        land_parquet(store, planned.hour, "events", events)
        land_parquet(store, planned.hour, "labels", labels)
    land_parquet(store, plan.end, "labels", plan.late_labels())
    _quarantine(settings, stream, plan)
    for note in stream.told:
        console.print(f"  {note}")
    first, last = plan.windows[0], plan.windows[-1]
    console.print(
        f"{len(plan)} hours landed, {first.hour:%Y-%m-%d %H}h ({first.period}) to {last.hour:%Y-%m-%d %H}h "
        f"({last.period}). The sensor label_arrival takes them in: make ui"
    )


def _play(
    settings: Settings, world: World, meta: dict[str, Any], scenario: str, seed: int, console: Console
) -> bool:
    from arena.driver import Driver
    from arena.loop import SENSOR_ORDER, Loop
    from serving.app import create_app
    from serving.client import InProcessClient

    began = time.monotonic()
    with Driver(settings.home) as driver:
        driver.start_sensors(SENSOR_ORDER)
        terminal = Console(file=driver.terminal, highlight=False, force_terminal=console.is_terminal)
        with InProcessClient(create_app(settings, background=False)) as service, _bar(terminal, world) as bar:
            loop = Loop(settings, world, driver, service, bar.say)
            progress = loop.run(bar.hour)
    meta["seconds"] += time.monotonic() - began
    told = story.collect(
        progress, open_store(settings), scenario=scenario, seed=seed, budget=settings.fpr_budget,
        shock_at=world.shock_at, seconds=meta["seconds"],
    )  # fmt: skip
    story.write(told, settings.home)
    meta["finished"] = True
    _write_meta(settings.home, meta)
    kept = story.tell(told, console, settings.home)
    console.print(f"{meta['seconds']:.0f} s in all.")
    # A scenario promises something and fails when it does not hold; a stream of one's own promises nothing.
    return kept or scenario == "replay"


class _Bar:
    """Progress on the terminal: a bar, and a line for everything that happens."""

    def __init__(self, console: Console, progress: Progress, total: int) -> None:
        self._console, self._progress = console, progress
        self._task = progress.add_task("hours", total=total)

    def say(self, sentence: str) -> None:
        self._console.print(f"  {sentence}")

    def hour(self, done: int, total: int) -> None:
        self._progress.update(self._task, completed=done, total=total)
        if not self._console.is_terminal and done % 10 == 0:
            self._console.print(f"  {done} of {total} hours")


@contextmanager
def _bar(console: Console, world: World) -> Iterator[_Bar]:
    columns = (TextColumn("{task.completed:.0f}/{task.total:.0f} hours"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bar(console, progress, len(world.hours))
