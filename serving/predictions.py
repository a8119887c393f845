"""The prediction log: rows wait in memory for a moment, then land in the store, by hour of receipt.

A store that is down costs no prediction: parts go to a spool directory on local disk and follow later, under
the same name, so that a part delivered twice is one part. No scoring here, and nobody reads the log through
this.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from redqueen.clock import hour_of
from redqueen.schema import PREDICTIONS
from redqueen.store import ObjectStore, to_parquet
from redqueen.tables import hour_key, write_part

logger = logging.getLogger(__name__)

TABLE = "predictions"
Row = Mapping[str, Any]


@dataclass(frozen=True)
class LogState:
    """How the log stands, in rows: in memory, on local disk, in the store, lost (the disk was full too)."""

    buffered: int
    spooled: int
    written: int
    lost: int
    store_failures: int


class PredictionLog:
    """Buffers rows and writes them by hour; safe to use from several threads.

    Args:
        spool: local directory for parts the store did not take; an earlier process's leftovers are delivered.
        max_rows: rows due for writing; reached, `due()` is true.
        max_age_s: longest a row waits (wall time) before `due()` is true.
        keep_rows: most rows held in memory when neither store nor disk take them; the oldest go first and are
            counted as lost.
    """

    def __init__(
        self,
        store: ObjectStore,
        spool: Path,
        *,
        max_rows: int = 5000,
        max_age_s: float = 5.0,
        keep_rows: int = 100_000,
    ) -> None:
        self._store = store
        self._spool = spool
        self._max_rows, self._max_age_s, self._keep_rows = max_rows, max_age_s, keep_rows
        self._buffer: dict[datetime, list[Row]] = defaultdict(list)
        self._oldest: float | None = None
        self._retry_at = 0.0
        self._newest_hour: datetime | None = None
        self._lock = threading.Lock()  # guards the buffer and the counts
        self._writing = threading.Lock()  # one flush at a time, so that spooled parts are delivered once
        self._in_flight = self._written = self._lost = self._failures = 0
        self._spooled: dict[Path, int] = {path: _rows_in(path) for path in _parts(spool)}

    def append(self, rows: Iterable[Row], received_at: datetime) -> None:
        """Take rows (columns of `PREDICTIONS`) received at one instant. Touches memory only."""
        hour = hour_of(received_at)
        with self._lock:
            self._buffer[hour].extend(rows)
            self._newest_hour = hour
            self._oldest = self._oldest if self._oldest is not None else time.monotonic()

    def due(self) -> bool:
        """Whether a flush is called for: enough rows, old rows, or an hour that is over."""
        with self._lock:
            if not self._buffer:
                return bool(self._spooled) and time.monotonic() >= self._retry_at
            count = sum(map(len, self._buffer.values()))
            waited = time.monotonic() - (self._oldest or 0.0)
            over = any(hour != self._newest_hour for hour in self._buffer)
            return over or count >= self._max_rows or waited >= self._max_age_s

    def crowded(self) -> bool:
        """Whether so many rows wait in memory that they had better wait on disk."""
        with self._lock:
            return sum(map(len, self._buffer.values())) >= 4 * self._max_rows

    def spill(self) -> None:
        """Move what waits in memory to the spool. Whoever scores may do that: it never asks the store, which
        may hang.
        """
        with self._lock:
            batches, self._buffer, self._oldest = self._buffer, defaultdict(list), None
        for hour, rows in sorted(batches.items()):
            self._spool_part(hour, rows, self._table(rows), _part_name())

    def flush(self) -> int:
        """Write everything that waits; returns the rows that reached the store. Never raises for a store."""
        with self._writing:
            with self._lock:
                batches, self._buffer, self._oldest = self._buffer, defaultdict(list), None
                self._in_flight = sum(map(len, batches.values()))
            delivered = self._deliver_spool()
            for hour, rows in sorted(batches.items()):
                delivered += self._write(hour, rows)
                with self._lock:
                    self._in_flight -= len(rows)
            return delivered

    def state(self) -> LogState:
        """The counts as they are now."""
        with self._lock:
            buffered = self._in_flight + sum(map(len, self._buffer.values()))
            spooled = sum(self._spooled.values())
            return LogState(buffered, spooled, self._written, self._lost, self._failures)

    def _write(self, hour: datetime, rows: list[Row]) -> int:
        table = self._table(rows)
        name = _part_name()
        # While older parts wait on disk the store is known to be down: not asking again keeps a flush short.
        if not self._spooled:
            try:
                write_part(self._store, TABLE, hour, table, name)
            except Exception as error:
                self._store_failed(error)
            else:
                with self._lock:
                    self._written += table.num_rows
                return table.num_rows
        self._spool_part(hour, rows, table, name)
        return 0

    def _table(self, rows: list[Row]) -> pa.Table:
        try:
            return pa.Table.from_pylist(rows, schema=PREDICTIONS)
        except (pa.ArrowException, TypeError, ValueError, OverflowError):
            # One row that does not fit its column must not take the others with it.
            fitting = [row for row in rows if _fits(row)]
            with self._lock:
                self._lost += len(rows) - len(fitting)
            logger.error("%d predictions do not fit the table and are lost", len(rows) - len(fitting))
            return pa.Table.from_pylist(fitting, schema=PREDICTIONS)

    def _spool_part(self, hour: datetime, rows: list[Row], table: pa.Table, name: str) -> None:
        path = self._spool / hour_key(TABLE, hour) / f"{name}.parquet"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            with open(partial, "wb") as file:
                file.write(to_parquet(table))
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError as error:
            logger.error("neither store nor spool take predictions (%s)", type(error).__name__)
            self._put_back(hour, rows)
        else:
            with self._lock:
                self._spooled[path] = table.num_rows

    def _put_back(self, hour: datetime, rows: list[Row]) -> None:
        with self._lock:
            kept = rows + self._buffer[hour]
            room = self._keep_rows - sum(len(r) for h, r in self._buffer.items() if h != hour)
            over = max(0, len(kept) - max(0, room))
            self._buffer[hour] = kept[over:]
            self._lost += over
            self._oldest = time.monotonic()

    def _deliver_spool(self) -> int:
        delivered = 0
        with self._lock:
            waiting = sorted(self._spooled.items())
        for path, rows in waiting:
            key = path.relative_to(self._spool).as_posix()
            try:
                self._store.put(key, path.read_bytes())
            except FileNotFoundError:  # another process with the same home delivered it
                rows = 0
            except Exception as error:
                self._store_failed(error)
                break
            path.unlink(missing_ok=True)
            with self._lock:
                del self._spooled[path]
                self._written += rows
            delivered += rows
        return delivered

    def _store_failed(self, error: Exception) -> None:
        with self._lock:
            self._failures += 1
            self._retry_at = time.monotonic() + self._max_age_s
        logger.warning("the store did not take predictions (%s); they wait on disk", type(error).__name__)


def _part_name() -> str:
    """A name that no other part has; parts sort by when they were made."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{os.getpid()}-{uuid.uuid4().hex[:8]}"


def _fits(row: Row) -> bool:
    try:
        pa.Table.from_pylist([row], schema=PREDICTIONS)
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        return False
    return True


def _parts(spool: Path) -> list[Path]:
    return sorted(spool.rglob("*.parquet")) if spool.is_dir() else []


def _rows_in(path: Path) -> int:
    try:
        return int(pq.read_metadata(path).num_rows)
    except Exception:
        return 0
