"""Features at the moment of scoring: what the text says by itself, and what its sender did in the last hours.

The features themselves are declared and computed in `redqueen.features` and `redqueen.text`; this module
keeps the one state of a process, feeds it in order, and fills it again after a restart.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redqueen import features as declared
from redqueen import tables, text
from redqueen.clock import hour_of
from redqueen.store import ObjectStore

INGESTED = "ingested/events"

Event = Mapping[str, Any]


@dataclass(frozen=True)
class TextSignals:
    """What is logged of a text besides its scores: the share obscured, a near-duplicate fingerprint."""

    obfuscation: float
    fingerprint: int


def text_signals(message: str) -> TextSignals:
    """The signals of one message."""
    reading = text.read(message)
    return TextSignals(reading.obfuscation, text.simhash(reading.canonical))


@dataclass(frozen=True)
class Observed:
    """Feature rows [n, F] in the order given; `ahead`: events from the future, which were not taken in."""

    rows: NDArray[np.float32]
    ahead: NDArray[np.bool_]


class OnlineFeatures:
    """The features of one process. Not thread-safe: the scorer takes turns.

    Args:
        has_actor: off for streams without a sender, whose behaviour features are unknown.
        max_ahead: how far an event's own time may run ahead of the clock. The windows move with the newest
            event, so one date from the far future would hold them there; it is read apart and leaves no
            trace.
    """

    names: tuple[str, ...] = tuple(feature.name for feature in declared.FEATURES)
    version: str = str(declared.FEATURES_VERSION)

    def __init__(self, *, has_actor: bool = True, max_ahead: timedelta = timedelta(hours=2)) -> None:
        self._state = declared.BehaviourState(has_actor=has_actor)
        self._max_ahead = max_ahead

    def __len__(self) -> int:
        """Events in the windows."""
        return len(self._state)

    def observe(self, events: Sequence[Event], now: datetime) -> Observed:
        """The events' features as of their moments; the events are taken in by the time they happened."""
        ahead = np.array([event["ts"] > now + self._max_ahead for event in events], dtype=bool)
        rows = np.empty((len(events), len(self.names)), dtype=np.float32)
        for i in sorted(range(len(events)), key=lambda i: (events[i]["ts"], events[i]["event_id"])):
            state = declared.BehaviourState(has_actor=False) if ahead[i] else self._state
            rows[i] = state.observe(events[i])
        return Observed(rows, ahead)

    def warm_start(self, store: ObjectStore, now: datetime) -> int:
        """Replay what was ingested in the last hours; returns the rows read. May raise the store's errors."""
        past = tables.read_hours(
            store, INGESTED, hour_of(now - declared.LOOKBACK), hour_of(now) + tables.HOUR
        )
        if past.is_empty():
            return 0
        self.observe(past.unique("event_id", keep="first").to_dicts(), now)
        return past.height
