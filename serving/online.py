"""Features at the moment of scoring: what the text says by itself, what its sender did in the last hours, and
what the day's graph says of both.

Declared and computed in `redqueen.features`; this module feeds one engine in order, keeps a journal beside
it, looks up the day's graph, and fills the windows again after a restart.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from redqueen import features as declared
from redqueen import graph, tables, text
from redqueen.clock import hour_of
from redqueen.features import Engine, InProcess, Prepared
from redqueen.features.declared import HORIZON, SECOND
from redqueen.features.finish import SNAPSHOTS
from redqueen.features.journal import Journal
from redqueen.features.online import alone
from redqueen.settings import Settings
from redqueen.store import ObjectStore

if TYPE_CHECKING:
    from redqueen.features.onredis import RedisEngine

logger = logging.getLogger(__name__)

REPLAYED_AT_ONCE = 2_000
FILL_WAIT_SECONDS = 60.0
"""How long a replica waits, when it starts, for another one that is filling the windows in Redis."""

LOOK_AGAIN_SECONDS = 30.0
"""How often a graph snapshot that is not there yet is looked for."""

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
    """The features of one process. Not thread-safe but for `refresh`: the scorer takes turns.

    Args:
        engine: keeps the windows.
        journal: what an engine in this process is told is kept there; None where the state outlives it.
        has_actor: off for streams without a sender, whose behaviour features are unknown.
        max_ahead: how far an event's times may run ahead of the clock. Windows move with the newest event, so
            one date from the far future would hold them there; it is read apart and leaves no trace.
    """

    names: tuple[str, ...] = declared.NAMES
    version: str = declared.FEATURES_VERSION

    def __init__(
        self,
        engine: Engine | None = None,
        journal: Journal | None = None,
        *,
        has_actor: bool = True,
        max_ahead: timedelta = timedelta(hours=2),
    ) -> None:
        self._engine = InProcess() if engine is None else engine
        self._journal = journal
        self._has_actor, self._max_ahead = has_actor, max_ahead
        self._snapshots: dict[date, graph.GraphSnapshot | None] = {}
        self._look_again_at = 0.0
        self._taken_in = 0
        self.journal_trouble = ""
        """Why the journal could not be written or read; "" while it can."""

    def __len__(self) -> int:
        """Events this process has taken into the windows, those replayed at its start included."""
        return self._taken_in

    def observe(self, events: Sequence[Event], now: datetime) -> Observed:
        """The events' features as of their moments; they are taken in by the time they were received.

        Raises whatever the engine does: the windows are then not to be had.
        """
        latest = now + self._max_ahead
        prepared = [self._prepared(event, latest) for event in events]
        ahead = np.array([event["ts"] > latest for event in events], dtype=bool)
        raw = np.zeros((len(events), len(declared.AGGREGATES)), dtype=np.int64)
        known = [i for i in _by_arrival(prepared) if not ahead[i]]
        if known:
            taken = [prepared[i] for i in known]
            self._keep(taken, now)
            raw[known] = self._engine.observe(taken)
            self._taken_in += len(taken)
        for i in np.flatnonzero(ahead):
            raw[i] = 0 if prepared[i].actor is None else alone(prepared[i])
        return Observed(self._finished(raw, prepared), ahead)

    def _prepared(self, event: Event, latest: datetime) -> Prepared:
        received = event.get("received_at")
        if received is not None and received > latest:
            event = {**event, "received_at": latest}
        prepared = declared.prepare(event)
        return prepared if self._has_actor else prepared._replace(actor=None)

    def _keep(self, prepared: Sequence[Prepared], now: datetime) -> None:
        if self._journal is None:
            return
        try:
            self._journal.append([event for event in prepared if event.actor is not None], now)
            self.journal_trouble = ""
        except OSError as error:
            self.journal_trouble = f"it could not be written ({error.strerror}); a restart would forget"

    def _finished(self, raw: NDArray[np.int64], prepared: Sequence[Prepared]) -> NDArray[np.float32]:
        direct = np.array([event.direct for event in prepared], dtype=np.float64).reshape(len(prepared), -1)
        has_actor = np.array([event.actor is not None for event in prepared], dtype=bool)
        return declared.finish(raw, direct, self._looked_up(prepared), has_actor).astype(np.float32)

    # -- the day's graph -------------------------------------------------------------------------------------

    def refresh(self, store: ObjectStore, now: datetime, *, force: bool = True) -> None:
        """Have the graph snapshots at hand that events of these hours read. May raise the store's errors.

        One that is not there yet is looked for again in a while, or now if `force`.
        """
        wanted = {graph.snapshot_day(_micros(now + shift)) for shift in (timedelta(0), self._max_ahead)}
        wanted.add(graph.snapshot_day(_micros(now - timedelta(hours=1))))
        held = self._snapshots
        if not force and wanted == held.keys() and time.monotonic() < self._look_again_at:
            return
        self._snapshots = {d: held.get(d) or graph.open_snapshot(store, d) for d in sorted(wanted)}
        self._look_again_at = time.monotonic() + LOOK_AGAIN_SECONDS

    @property
    def snapshot_days(self) -> list[str]:
        """The days whose graph is at hand."""
        return [day.isoformat() for day, snapshot in sorted(self._snapshots.items()) if snapshot is not None]

    def _looked_up(self, prepared: Sequence[Prepared]) -> NDArray[np.float64]:
        found = np.full((len(prepared), len(SNAPSHOTS)), np.nan)
        snapshots = self._snapshots
        by_day: dict[date, list[int]] = {}
        for i, event in enumerate(prepared):
            by_day.setdefault(graph.snapshot_day(event.received), []).append(i)
        for day, places in by_day.items():
            snapshot = snapshots.get(day)
            if snapshot is not None:
                of = [prepared[i] for i in places]
                found[places] = snapshot.lookup(
                    [e.actor for e in of], [e.recipient for e in of], [e.hosts for e in of]
                )
        return found

    # -- filling the windows ---------------------------------------------------------------------------------

    def cold_until(self, now: datetime) -> datetime | None:
        """When the windows will be whole, where it is known that they are not; else None."""
        return None

    def warm_start(self, store: ObjectStore, now: datetime, *, wait_s: float = 0.0) -> int:
        """Fill the windows from the journal and from what was ingested; returns the events replayed.

        The journal's events come in the order in which they were observed; others, which this service never
        saw, come where they were received. May raise the store's errors.
        """
        kept = self._journaled(now)
        seen = {event.event_id for event in kept}
        rest = [event for event in _ingested(store, now) if event.event_id not in seen]
        if not self._has_actor:
            rest = [event._replace(actor=None) for event in rest]
        merged = _merged(kept, rest)
        while chunk := list(islice(merged, REPLAYED_AT_ONCE)):
            self._engine.observe(chunk)
        self._taken_in += len(kept) + len(rest)
        return len(kept) + len(rest)

    def _journaled(self, now: datetime) -> list[Prepared]:
        if self._journal is None:
            return []
        try:
            replay = self._journal.read(now)
        except OSError as error:
            self.journal_trouble = f"it could not be read ({error.strerror})"
            return []
        if replay.broken:
            logger.warning("journal: %d lines could not be read", replay.broken)
        return replay.events


class SharedFeatures(OnlineFeatures):
    """Features whose windows lie in Redis: they outlive this process, and replicas share them.

    Who finds them empty fills them; who comes meanwhile waits for that, a while.
    """

    _engine: RedisEngine

    def __init__(self, engine: RedisEngine, **options: Any) -> None:
        super().__init__(engine, **options)
        self._since: int | None = None
        self._nothing_before = False

    def warm_start(self, store: ObjectStore, now: datetime, *, wait_s: float = 0.0) -> int:
        """Fill the windows if Redis holds none of ours; returns the events replayed."""
        until = time.monotonic() + wait_s
        while (since := self._engine.since()) is None and not self._engine.claim():
            if time.monotonic() >= until:
                return 0
            time.sleep(0.1)
        if since is not None:
            self._since = since
            return 0
        try:
            replayed = super().warm_start(store, now)
        except BaseException:
            self._engine.unclaim()
            raise
        self._nothing_before = not replayed
        if replayed:
            self._since = _micros(now - declared.LOOKBACK)
            self._engine.begun(self._since)
        else:
            self._engine.unclaim()
        return replayed

    def refresh(self, store: ObjectStore, now: datetime, *, force: bool = True) -> None:
        """The graph; and whether Redis still holds our windows."""
        super().refresh(store, now, force=force)
        since = self._engine.since()
        if since is None and len(self) and self._engine.claim():
            # It lost what it held, or there was no past to begin with. What was lost cannot be put under what
            # was counted since: windows fill by time.
            lost = self._since is not None or not self._nothing_before
            since = _micros(now if lost else now - declared.LOOKBACK)
            self._engine.begun(since)
        if since is not None:
            self._since = since

    def cold_until(self, now: datetime) -> datetime | None:
        """When the windows will be whole again, where they began without their past; None where they are."""
        if self._since is None or self._since + HORIZON <= _micros(now):
            return None
        return datetime.fromtimestamp((self._since + HORIZON) // SECOND, UTC)


def open_features(settings: Settings) -> OnlineFeatures:
    """The features that the settings ask for: windows in this process, with a journal, or in Redis."""
    ahead = timedelta(hours=settings.serving_max_ahead_hours)
    if settings.redis_url is None:
        journal = Journal(settings.home / "journal")
        return OnlineFeatures(InProcess(), journal, has_actor=settings.behaviour, max_ahead=ahead)
    from redqueen.features.onredis import RedisEngine, connect

    client = connect(settings.redis_url.get_secret_value())
    engine = RedisEngine(client, salt=settings.salt)
    return SharedFeatures(engine, has_actor=settings.behaviour, max_ahead=ahead)


def _by_arrival(prepared: Sequence[Prepared]) -> list[int]:
    return sorted(range(len(prepared)), key=lambda i: (prepared[i].received, prepared[i].event_id))


def _ingested(store: ObjectStore, now: datetime) -> list[Prepared]:
    past = declared.read_prepared(store, hour_of(now - declared.LOOKBACK), hour_of(now) + tables.HOUR)
    past = past.unique("event_id", keep="first").sort("received", "event_id")
    return [
        Prepared._make([*row[:_HOSTS], tuple(row[_HOSTS] or ()), *row[_HOSTS + 1 :], ()])
        for row in past.select(Prepared._fields[:-1]).iter_rows()
    ]


_HOSTS = Prepared._fields.index("hosts")


def _merged(kept: Sequence[Prepared], rest: Sequence[Prepared]) -> Iterator[Prepared]:
    """`kept` in its own order, and each of `rest` (sorted) before the first that was received after it."""
    others = iter(rest)
    waiting = next(others, None)
    for event in kept:
        while waiting is not None and waiting.received < event.received:
            yield waiting
            waiting = next(others, None)
        yield event
    if waiting is not None:
        yield waiting
    yield from others


def _micros(instant: datetime) -> int:
    return (instant - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
