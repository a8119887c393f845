"""Plays a world through the real loop: traffic through the scorer, files into the store, the clock forward, the
sensors ticked. It moves the clock and the traffic and nothing else: what is trained, attacked, rolled out or
rolled back is decided by the definitions that production runs.

Killed at any instant and started again, it takes up the hour it was in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Protocol

import numpy as np
import polars as pl

from arena.driver import Driver, Tick
from arena.world import Row, Traffic, World
from redqueen import schema, state
from redqueen.clock import StoreClock
from redqueen.settings import Settings
from redqueen.store import ObjectStore, open_store, to_json
from redqueen.tables import HOUR, hour_key, read_hours, write_part

BATCH = 256
SENSOR_ORDER = ("label_arrival", "first_lap", "drift", "adaptation", "rollout", "run_failed", "watch_the_watchers")
TRIGGERS = ("first_lap", "drift", "adaptation")


class Scoring(Protocol):
    """The scoring service as its clients see it."""

    def score(self, events: list[Row]) -> list[Row]: ...

    def refresh(self) -> bool: ...

    def flush(self) -> int: ...


@dataclass
class Point:
    """What the truth says about one hour. Shares are None where nothing was scored."""

    at: str
    name: str
    n_abuse: int = 0
    n_benign: int = 0
    recall: float | None = None
    fpr: float | None = None
    recall_never_retrained: float | None = None
    stage: str = "none"
    champion: str | None = None


@dataclass
class Progress:
    """Everything the loop must remember to go on after a kill."""

    next_hour: int = 0
    shocked: bool = False
    pending_labels: list[Row] = field(default_factory=list)
    points: list[dict[str, Any]] = field(default_factory=list)
    triggers: list[dict[str, Any]] = field(default_factory=list)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    first_model: str | None = None
    world: dict[str, Any] = field(default_factory=dict)


class Loop:
    """One world, one home, one scoring service, one Dagster driver."""

    def __init__(
        self,
        settings: Settings,
        world: World,
        driver: Driver,
        service: Scoring,
        say: Callable[[str], None],
    ) -> None:
        self.settings, self.world, self.driver, self.service, self.say = settings, world, driver, service, say
        self.store: ObjectStore = open_store(settings)
        self.clock = StoreClock(self.store)
        self.path = settings.home / "demo" / "progress.json"
        self.progress = self._load()
        self._first: Any = None

    # -- memory ---------------------------------------------------------------------------------------------------

    def _load(self) -> Progress:
        if not self.path.exists():
            return Progress()
        progress = Progress(**json.loads(self.path.read_text()))
        self.world.restore(progress.world)
        return progress

    def _save(self) -> None:
        self.progress.world = self.world.state()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_bytes(to_json(asdict(self.progress)))
        partial.replace(self.path)

    # -- the hours ------------------------------------------------------------------------------------------------

    def run(self, on_hour: Callable[[int, int], None] = lambda done, total: None) -> Progress:
        """Play every hour that has not been played yet."""
        hours = self.world.hours
        if self.progress.next_hour == 0:
            self.clock.set(hours[0])
        for run_id in self.driver.recover():
            self.say(f"took up a run that was killed ({run_id[:8]})")
        for index in range(self.progress.next_hour, len(hours)):
            self._hour(index)
            self.progress.next_hour = index + 1
            self._save()
            on_hour(index + 1, len(hours))
        return self.progress

    def _hour(self, index: int) -> None:
        hour = self.world.hours[index]
        scored = index >= self.world.first_scored
        if self.world.shock_at == hour and not self.progress.shocked:
            self.say(f"{self.world.name_of(index)}  the world changes")
            probed: list[Row] = []
            self.world.shock(lambda rows: self._probe(rows, probed))
            self._land(hour, "events", probed, "probes")
            self.progress.shocked = True
            self._save()
        traffic = self.world.traffic(index)
        actions = self._score(hour, traffic.events) if scored else {}
        self._land(hour, "events", [*traffic.events, *traffic.rubbish])
        self._earn_labels(index, traffic, actions)
        self._land_due_labels(hour)
        self.clock.set(hour + HOUR)
        if scored or index == self.world.first_scored - 1:
            self._tick(index)
        if scored:
            self.progress.points.append(asdict(self._measure(index, hour, traffic, actions)))

    def _score(self, hour: datetime, events: list[Row]) -> dict[str, str]:
        """Send the hour's traffic through the scoring service, as clients do."""
        self.clock.set(hour + timedelta(minutes=1))
        self.service.refresh()
        answers: list[Row] = []
        for start in range(0, len(events), BATCH):
            answers += self.service.score([wire(row) for row in events[start : start + BATCH]])
        self.service.flush()
        return {answer["event_id"]: answer["action"] for answer in answers}

    def _probe(self, rows: list[Row], probed: list[Row]) -> list[str]:
        """What attackers see of the live detector: an action for each message they send."""
        self.service.refresh()
        probed += rows
        answers = [self.service.score([wire(r) for r in rows[i : i + BATCH]]) for i in range(0, len(rows), BATCH)]
        return [answer["action"] for batch in answers for answer in batch]

    # -- landing --------------------------------------------------------------------------------------------------

    def _land(self, hour: datetime, table: str, rows: list[Row], name: str = "producer") -> None:
        """Drop a file the way a producer does: JSON lines, by the hour of arrival."""
        if rows:
            lines = "\n".join(json.dumps(wire(row), ensure_ascii=False) for row in rows)
            self.store.put(f"{hour_key(table, hour)}{name}-{hour:%Y%m%dT%H}.jsonl", lines.encode())

    def _earn_labels(self, index: int, traffic: Traffic, actions: Mapping[str, str]) -> None:
        hour = self.world.hours[index]
        known = {row["label_id"] for row in self.progress.pending_labels}
        # People judge what the loop asked them to judge: last hour's requests were written after last hour.
        asked_hour = self.world.hours[index - 1] if index else None
        asked = read_hours(self.store, "review", asked_hour, hour) if asked_hour else pl.DataFrame()
        pairs = list(asked.select("event_id", "reason").iter_rows()) if not asked.is_empty() else []
        earned = self.world.labels(index, traffic, actions, pairs)
        self.progress.pending_labels += [row for row in earned if row["label_id"] not in known]

    def _land_due_labels(self, hour: datetime) -> None:
        end = (hour + HOUR).isoformat()
        rows = [wire(row) for row in self.progress.pending_labels]
        due = [row for row in rows if row["received_at"] < end]
        self._land(hour, "labels", due)
        self.progress.pending_labels = [row for row in rows if row["received_at"] >= end]

    # -- the sensors ----------------------------------------------------------------------------------------------

    def _tick(self, index: int) -> None:
        """Let Dagster evaluate each sensor once, and run what it asks for."""
        for sensor in SENSOR_ORDER:
            before = state.rollout_state(self.store)
            tick = self.driver.tick(sensor)
            self._tell(index, sensor, tick)
            after = state.rollout_state(self.store)
            if after.version != before.version:
                self.say(f"{self.world.name_of(index)}  rollout: {after.message}")
                self.service.refresh()

    def _tell(self, index: int, sensor: str, tick: Tick) -> None:
        if sensor not in TRIGGERS or not tick.run_ids:
            return
        for run in tick.runs:
            tags, run_id = run.tags, run.run_id
            reason = tags.get("redqueen/reason", "")
            self.progress.triggers.append(
                {
                    "sensor": sensor,
                    "run_id": run_id,
                    "reason": reason,
                    "attribution": tags.get("redqueen/attribution", ""),
                    "candidate": tags.get("dagster/partition", ""),
                    "at": (self.world.hours[index] + HOUR).isoformat(),
                    "name": self.world.name_of(index),
                }
            )
            self.say(f"{self.world.name_of(index)}  {sensor} started a lap: {reason}")

    # -- the truth ------------------------------------------------------------------------------------------------

    def _measure(self, index: int, hour: datetime, traffic: Traffic, actions: Mapping[str, str]) -> Point:
        live = state.rollout_state(self.store)
        judged = [row["event_id"] for row in traffic.events if row.get("text")]
        abuse = [e for e in judged if traffic.truth.get(e)]
        benign = [e for e in judged if not traffic.truth.get(e)]
        point = Point(
            hour.isoformat(), self.world.name_of(index), len(abuse), len(benign),
            stage=live.stage, champion=live.champion,
        )  # fmt: skip
        served = read_hours(self.store, "predictions", hour, hour + HOUR)
        if served.is_empty() or not (served["arm"] == "champion").any():
            return point
        acted = {e for e, action in actions.items() if action in schema.ACTED_ON}
        point.recall = _share(abuse, acted)
        point.fpr = _share(benign, acted)
        if self.progress.first_model is None:
            self.progress.first_model = served.filter(pl.col("arm") == "champion")["model_id"][0]
        point.recall_never_retrained = _share(abuse, self._first_acts(served, traffic))
        return point

    def _first_acts(self, served: pl.DataFrame, traffic: Traffic) -> set[str]:
        """What the first champion, never retrained, would have acted on, with the features as served."""
        first = self._first_detector()
        rows = served.unique("event_id", keep="first")
        texts = {row["event_id"]: row["text"] for row in traffic.events if row.get("text")}
        rows = rows.filter(pl.col("event_id").is_in(list(texts)))
        features = np.asarray(rows["features"].to_list(), dtype=np.float32)
        ids = rows["event_id"].to_list()
        scores = first.score([texts[e] for e in ids], features)
        acted = first.threshold_ratio(scores) >= 1.0
        return {e for e, hit in zip(ids, acted, strict=True) if hit}

    def _first_detector(self) -> Any:
        if self._first is None:
            from models.bundle import fetch
            from models.detector import Detector

            assert self.progress.first_model is not None
            self._first = Detector.load(fetch(self.store, self.progress.first_model, self.settings.home / "cache"))
        return self._first


def _share(of: list[str], chosen: set[str]) -> float | None:
    return round(sum(e in chosen for e in of) / len(of), 4) if of else None


def wire(row: Row) -> Row:
    """A row as it travels: times as ISO 8601."""
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in row.items()}


def land_parquet(store: ObjectStore, hour: datetime, table: str, rows: pl.DataFrame) -> str | None:
    """Land rows as one Parquet file; nothing where there are none."""
    return write_part(store, table, hour, rows, "import") if rows.height else None
