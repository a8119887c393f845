"""Dagster's SQLite storage with its connections kept open, for the one process that drives a simulation.

Dagster opens a new SQLAlchemy engine for every statement, so that nothing is shared between processes; that
compiles every statement anew and was four fifths of an idle tick (90 ms against 17). The files and tables are
Dagster's own: the UI and the daemon read them with the stock storage. Nothing else belongs here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import RLock
from typing import Any

import sqlalchemy as sa
from dagster._core.storage.event_log import SqliteEventLogStorage
from dagster._core.storage.event_log.sqlite.sqlite_event_log import INDEX_SHARD_NAME
from dagster._core.storage.runs import SqliteRunStorage
from dagster._core.storage.schedules import SqliteScheduleStorage
from dagster._core.storage.sqlite_storage import DagsterSqliteStorage
from dagster._serdes import ConfigurableClassData

BUSY_TIMEOUT_SECONDS = 30
KEPT_ENGINES = 12
"""Engines kept: the few databases of the home and those of the latest runs (each run has its own file)."""


class _Engines:
    """The open engines of this process, least recently used first."""

    def __init__(self) -> None:
        self._engines: OrderedDict[str, sa.Engine] = OrderedDict()
        self._lock = RLock()

    def get(self, url: str) -> tuple[sa.Engine, bool]:
        """The engine of a database, and whether it was opened just now."""
        with self._lock:
            fresh = url not in self._engines
            if fresh:
                self._engines[url] = _open_engine(url)
                if len(self._engines) > KEPT_ENGINES:
                    self._engines.popitem(last=False)[1].dispose()
            self._engines.move_to_end(url)
            return self._engines[url], fresh

    def close(self, directory: Path) -> None:
        """Close every connection to databases below `directory`."""
        with self._lock:
            for url in [url for url in self._engines if str(directory) in url]:
                self._engines.pop(url).dispose()


_ENGINES = _Engines()
_READY: set[str] = set()


def _open_engine(url: str) -> sa.Engine:
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_SECONDS})

    @sa.event.listens_for(engine, "connect")
    def relax(connection: Any, _record: object) -> None:
        # In WAL mode NORMAL survives a killed process; only a power cut may take the last transactions.
        connection.execute("PRAGMA synchronous=NORMAL").close()

    return engine


@contextmanager
def _transaction(url: str) -> Iterator[sa.Connection]:
    with _ENGINES.get(url)[0].begin() as connection:
        yield connection


def close_connections(dagster_home: Path) -> None:
    """Close what this process holds open below `dagster_home`."""
    _ENGINES.close(dagster_home)


class _Runs(SqliteRunStorage):
    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        with _transaction(self._conn_string) as connection:
            yield connection


class _Schedules(SqliteScheduleStorage):
    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        with _transaction(self._conn_string) as connection:
            yield connection


class _EventLog(SqliteEventLogStorage):
    @contextmanager
    def _connect(self, shard: str) -> Iterator[sa.Connection]:
        with self._db_lock:
            path = Path(self.path_for_shard(shard))
            blank = not path.exists() and shard != INDEX_SHARD_NAME
            if blank:
                self._place_blank(path)
            engine, fresh = _ENGINES.get(self.conn_string_for_shard(shard))
            if fresh and not blank:
                self._initdb(engine, for_index_shard=shard == INDEX_SHARD_NAME)
            with engine.begin() as connection:
                yield connection

    def _place_blank(self, path: Path) -> None:
        """A run's empty log, copied: making its tables anew costs 75 ms, a quarter of a small run."""
        blank = _blank_directory() / "blank.db"
        if not blank.exists():
            engine = _open_engine(f"sqlite:///{blank}")
            self._initdb(engine)
            engine.dispose()
        draft = path.with_name(f"{path.name}.draft")
        shutil.copyfile(blank, draft)
        draft.replace(path)


@cache
def _blank_directory() -> Path:
    directory = tempfile.TemporaryDirectory(prefix="redqueen-")
    _KEPT_ALIVE.append(directory)
    return Path(directory.name)


_KEPT_ALIVE: list[tempfile.TemporaryDirectory[str]] = []


class KeptSqliteStorage(DagsterSqliteStorage):
    """The stock SQLite storage of a Dagster home, on engines that this process keeps."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        runs, events, schedules = _databases(base_dir)
        if base_dir not in _READY or not runs.exists():
            super().__init__(base_dir, inst_data=inst_data)  # makes the files and their tables; 40 ms
            _READY.add(base_dir)
        self.base_dir = base_dir
        self._inst_data = inst_data
        self._run_storage = _Runs(f"sqlite:///{runs}")
        self._event_log_storage = _EventLog(str(events.parent))
        self._schedule_storage = _Schedules(f"sqlite:///{schedules}")

    @classmethod
    def from_config_value(  # type: ignore[override]
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, str]
    ) -> KeptSqliteStorage:
        """Called by Dagster with `base_dir`, the DAGSTER_HOME."""
        return cls(config_value["base_dir"], inst_data=inst_data)


def _databases(base_dir: str) -> tuple[Path, Path, Path]:
    """Runs, index of events, schedules: where the stock storage keeps them."""
    home = Path(os.path.abspath(base_dir))
    return (
        home / "history" / "runs.db",
        home / "history" / "runs" / f"{INDEX_SHARD_NAME}.db",
        home / "schedules" / "schedules.db",
    )
