"""Which files of an hour have been taken in, so that one that lands long after its hour is still found.

Kept by day of arrival (`state/arrivals/<table>/dt=YYYY-MM-DD.json`), written after the hour's rows. Finding
the hours that a run must take in again is here; asking for the run is the sensor's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from redqueen import state
from redqueen.store import ObjectStore
from redqueen.tables import hour_key

TABLES = ("events", "labels")
PREFIX = "state/arrivals"


def landed(store: ObjectStore, table: str, hour: datetime) -> list[str]:
    """The files of one hour. Names that begin with `_` or `.` are markers, not data."""
    return [key for key in store.list(hour_key(table, hour)) if _is_data(key)]


def _is_data(key: str) -> bool:
    return not key.rpartition("/")[2].startswith(("_", "."))


def digest(keys: Sequence[str]) -> str:
    """What has landed, as a short hash; one file more changes it."""
    return hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()[:12]


def _key(table: str, day: datetime) -> str:
    return f"{PREFIX}/{table}/dt={day:%Y-%m-%d}.json"


def note(store: ObjectStore, table: str, hour: datetime, keys: Sequence[str]) -> None:
    """Keep that these files of the hour have been taken in."""
    found = {f"{hour.astimezone(UTC):%H}": digest(keys)}

    def change(known: dict[str, Any]) -> dict[str, Any] | None:
        return None if found.items() <= known.items() else {**known, **found}

    state.update(store, _key(table, hour.astimezone(UTC)), change)


def missed(store: ObjectStore, day: datetime) -> dict[datetime, str]:
    """Hours of a day in which files lie that nobody has taken in, each with what has landed there.

    One listing a table, whatever the size of the store. An hour of which nothing is kept, but whose rows are
    there, was taken in before this record was: it is left alone.
    """
    found: dict[datetime, str] = {}
    for table in TABLES:
        folder = f"{table}/dt={day:%Y-%m-%d}/"
        by_hour: dict[str, list[str]] = {}
        for key in store.list(folder):
            name = key.removeprefix(folder).partition("/")[0]
            if _is_data(key) and name.startswith("hr=") and name[3:].isdigit() and int(name[3:]) < 24:
                by_hour.setdefault(name[3:], []).append(key)
        if not by_hour:
            continue
        known = state.read(store, _key(table, day))
        for name, keys in by_hour.items():
            hour = day.replace(hour=int(name), minute=0, second=0, microsecond=0)
            before = known.get(name)
            if before is None and store.exists(f"{hour_key(f'ingested/{table}', hour)}part.parquet"):
                continue
            if before != digest(keys):
                found[hour] = digest([found.get(hour, ""), digest(keys)])
    return found
