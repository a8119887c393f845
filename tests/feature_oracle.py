"""The semantics of `redqueen.features.declared`, word for word and as slowly as that: the compilers' oracle.

Everything that happened is kept, and every value is counted anew from all of it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from redqueen.features.declared import (
    AGGREGATES,
    CLOGC_SCALE,
    HORIZON,
    KEYS,
    TILE,
    WATERMARK,
    Aggregate,
)
from redqueen.features.prepared import Prepared


class _Entry(NamedTuple):
    clock: int
    event: Prepared


class Oracle:
    """Takes events in the order they become known; remembers them all."""

    def __init__(self) -> None:
        self._history: dict[tuple[str, Any], list[_Entry]] = {}
        self._rows: dict[str, tuple[int, list[int]]] = {}

    def observe(self, event: Prepared) -> list[int]:
        if event.actor is None:
            return [0] * len(AGGREGATES)
        if event.event_id in self._rows:
            until, row = self._rows[event.event_id]
            if event.received <= until:
                return row
        if event.received - event.at > WATERMARK:
            return Oracle().observe(event._replace(received=event.at, late=False))
        for key in KEYS:
            for value in _values(key, event):
                entries = self._history.setdefault((key, value), [])
                clock = max([event.at, *(entry.clock for entry in entries)])
                entries.append(_Entry(clock, event))
        row = [
            max((_count(one, self._history[one.key, v]) for v in _values(one.key, event)), default=0)
            for one in AGGREGATES
        ]
        self._rows[event.event_id] = (event.at + WATERMARK, row)
        return row


def _values(key: str, event: Prepared) -> Iterable[Any]:
    columns = [getattr(event, column) for column in KEYS[key]]  # type: ignore[index]
    if KEYS[key] == ("hosts",):  # type: ignore[index]
        return event.hosts
    return [] if None in columns else [tuple(columns)]


def _count(one: Aggregate, entries: list[_Entry]) -> int:
    now = entries[-1].clock
    if one.op == "gap":
        earlier = [entry.clock for entry in entries[:-1] if entry.clock > now - HORIZON]
        return min(now - earlier[-1], one.window.length) if earlier else one.window.length
    start = (now - one.window.length) // one.window.hop * one.window.hop
    inside = [entry for entry in entries if entry.clock // TILE * TILE >= start]
    events = [entry.event for entry in inside if one.where is None or getattr(entry.event, one.where)]
    if one.op == "count":
        return len(events)
    if one.op == "sum":
        return sum(getattr(event, one.value or "") for event in events)
    if one.op == "distinct":
        return len({getattr(event, one.value or "") for event in events} - {None})
    tiles = Counter(entry.clock // TILE for entry in inside)
    return sum(round(c * math.log(c) * CLOGC_SCALE) for c in tiles.values())
