"""Plays a world through the real loop: traffic through the scorer, files into the store, the clock forward,
the sensors ticked. It moves the clock and the traffic and nothing else: what is trained, attacked, rolled out
or rolled back is decided by the definitions that production runs.

Killed at any instant and started again, it takes up the hour it was in.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import polars as pl

from arena.delivery import Delivery, Scoring, save
from arena.driver import Driver, Tick
from arena.world import Row, Traffic, World
from redqueen import schema, state
from redqueen.clock import StoreClock
from redqueen.features import NAMES
from redqueen.settings import Settings
from redqueen.store import ObjectStore, open_store
from redqueen.tables import HOUR, read_hours, write_part

SENSOR_ORDER = (
    "label_arrival",
    "daily_graph",
    "first_lap",
    "drift",
    "adaptation",
    "rollout",
    "run_failed",
    "watch_the_watchers",
)
TRIGGERS = ("first_lap", "drift", "adaptation")


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
        self.delivery = Delivery(self.store, world, service, self.progress, self._save)
        self._first: Any = None

    # -- memory ----------------------------------------------------------------------------------------------

    def _load(self) -> Progress:
        if not self.path.exists():
            return Progress()
        progress = Progress(**json.loads(self.path.read_text()))
        self.world.restore(progress.world)
        return progress

    def _save(self) -> None:
        self.progress.world = self.world.state()
        save(self.path, asdict(self.progress))

    # -- the hours -------------------------------------------------------------------------------------------

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
        if self.delivery.shock(index):
            self.say(f"{self.world.name_of(index)}  the world changes")
        traffic = self.world.traffic(index)
        actions = self._score(hour, traffic.events) if scored else {}
        self.delivery.land_hour(index, traffic, actions)
        self.clock.set(hour + HOUR)
        if scored or index == self.world.first_scored - 1:
            self._tick(index)
        if scored:
            self.progress.points.append(asdict(self._measure(index, hour, traffic, actions)))

    def _score(self, hour: datetime, events: list[Row]) -> dict[str, str]:
        """Send the hour's traffic through the scoring service, with what is live by now."""
        self.clock.set(hour + timedelta(minutes=1))
        self.service.refresh()
        return self.delivery.score(events)

    # -- the sensors -----------------------------------------------------------------------------------------

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

    # -- the truth -------------------------------------------------------------------------------------------

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
        texts = {row["event_id"]: row["text"] for row in traffic.events if row.get("text")}
        rows = served.filter(pl.col("event_id").is_in(list(texts)))
        own = rows.filter(pl.col("model_id") == self.progress.first_model)
        known = set(own.filter(pl.col("action").is_in(list(schema.ACTED_ON)))["event_id"])
        rows = rows.filter(~pl.col("event_id").is_in(own["event_id"].to_list())).unique(
            "event_id", keep="first"
        )
        if rows.is_empty():
            return known
        served_features = np.asarray(rows["features"].to_list(), dtype=np.float32)
        features = served_features[:, [NAMES.index(name) for name in first.feature_names]]
        ids = rows["event_id"].to_list()
        scores = first.score([texts[e] for e in ids], features)
        acted = first.threshold_ratio(scores) >= 1.0
        return known | {e for e, hit in zip(ids, acted, strict=True) if hit}

    def _first_detector(self) -> Any:
        if self._first is None:
            from models.detector import Detector

            assert self.progress.first_model is not None
            self._first = Detector.of_home(self.settings, self.store, self.progress.first_model)
        return self._first


def _share(of: list[str], chosen: set[str]) -> float | None:
    return round(sum(e in chosen for e in of) / len(of), 4) if of else None


def land_parquet(store: ObjectStore, hour: datetime, table: str, rows: pl.DataFrame) -> str | None:
    """Land rows as one Parquet file; nothing where there are none."""
    return write_part(store, table, hour, rows, "import") if rows.height else None
