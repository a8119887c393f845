"""Delivers a world's hours from the outside: traffic to the scoring service, files into the store.

Belongs here: what producers, clients and reviewers do. Shared by the loop, which ticks the sensors itself,
and by the feed, which leaves them to the daemon. The clock, and everything that looks at results, is theirs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Protocol

import polars as pl

from arena.world import Row, Traffic, World
from redqueen.store import ObjectStore, to_json
from redqueen.tables import HOUR, hour_key, read_hours

BATCH = 256
"""Events of one request."""


class Scoring(Protocol):
    """The scoring service as its clients see it."""

    def score(self, events: list[Row]) -> list[dict[str, Any]]: ...

    def refresh(self) -> bool: ...

    def flush(self) -> int: ...


class Memory(Protocol):
    """What must outlive the process for the delivery to go on after a kill."""

    shocked: bool
    pending_labels: list[Row]


class Delivery:
    """One world's traffic and labels on their way to one store and one service.

    Args:
        memory: kept by the caller, who saves it after every hour and whenever `save` is called.
    """

    def __init__(
        self, store: ObjectStore, world: World, service: Scoring, memory: Memory, save: Callable[[], None]
    ) -> None:
        self.store, self.world, self.service, self.memory, self.save = store, world, service, memory, save

    def shock(self, index: int) -> bool:
        """Let the world change if this is the hour and it has not yet; whether it did just now."""
        hour = self.world.hours[index]
        if self.world.shock_at != hour or self.memory.shocked:
            return False
        probed: list[Row] = []
        self.world.shock(lambda rows: self._probe(rows, probed))
        self.land(hour, "events", probed, "probes")
        self.memory.shocked = True
        self.save()
        return True

    def score(self, events: list[Row]) -> dict[str, str]:
        """Send traffic through the service, as clients do; actions by event id, predictions in the store."""
        answers: list[Row] = []
        for start in range(0, len(events), BATCH):
            answers += self.service.score([wire(row) for row in events[start : start + BATCH]])
        self.service.flush()
        return {answer["event_id"]: answer["action"] for answer in answers}

    def land_hour(self, index: int, traffic: Traffic, actions: Mapping[str, str]) -> int:
        """Land the hour's events, and the labels that are due by its end; how many labels that were.

        Files are named by their hour, so that an hour delivered twice is one hour.
        """
        hour = self.world.hours[index]
        self.land(hour, "events", [*traffic.events, *traffic.rubbish])
        self._earn_labels(index, traffic, actions)
        return self._land_due_labels(hour)

    def land(self, hour: datetime, table: str, rows: list[Row], name: str = "producer") -> None:
        """Drop a file the way a producer does: JSON lines, by the hour of arrival."""
        if rows:
            lines = "\n".join(json.dumps(wire(row), ensure_ascii=False) for row in rows)
            self.store.put(f"{hour_key(table, hour)}{name}-{hour:%Y%m%dT%H}.jsonl", lines.encode())

    def _probe(self, rows: list[Row], probed: list[Row]) -> list[str]:
        """What attackers see of the live detector: an action for each message they send."""
        self.service.refresh()
        probed += rows
        answers = [
            self.service.score([wire(r) for r in rows[i : i + BATCH]]) for i in range(0, len(rows), BATCH)
        ]
        return [answer["action"] for batch in answers for answer in batch]

    def _earn_labels(self, index: int, traffic: Traffic, actions: Mapping[str, str]) -> None:
        hour = self.world.hours[index]
        known = {row["label_id"] for row in self.memory.pending_labels}
        # People judge what the loop asked them to judge: last hour's requests were written after last hour.
        asked_hour = self.world.hours[index - 1] if index else None
        asked = read_hours(self.store, "review", asked_hour, hour) if asked_hour else pl.DataFrame()
        pairs = list(asked.select("event_id", "reason").iter_rows()) if not asked.is_empty() else []
        earned = self.world.labels(index, traffic, actions, pairs)
        self.memory.pending_labels += [row for row in earned if row["label_id"] not in known]

    def _land_due_labels(self, hour: datetime) -> int:
        end = (hour + HOUR).isoformat()
        rows = [wire(row) for row in self.memory.pending_labels]
        due = [row for row in rows if row["received_at"] < end]
        self.land(hour, "labels", due)
        self.memory.pending_labels = [row for row in rows if row["received_at"] >= end]
        return len(due)


def save(path: Path, memory: Mapping[str, Any]) -> None:
    """Keep what must outlive the process, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(to_json(memory))
    partial.replace(path)


def wire(row: Row) -> Row:
    """A row as it travels: times as ISO 8601."""
    return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in row.items()}
