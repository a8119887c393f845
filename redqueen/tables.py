"""Reading and writing tables in the store by the hour of arrival. No validation here: that is
`redqueen.ingest`.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

import polars as pl
import pyarrow as pa

from redqueen.store import ObjectStore, to_parquet

logger = logging.getLogger(__name__)

HOUR = timedelta(hours=1)


def hour_key(table: str, hour: datetime) -> str:
    """The prefix of one hour of a table: `events/dt=2026-01-03/hr=14/`."""
    utc = hour.astimezone(UTC)
    return f"{table}/dt={utc:%Y-%m-%d}/hr={utc:%H}/"


def hours_between(start: datetime, end: datetime) -> list[datetime]:
    """The hours from `start` up to but not including `end`."""
    count = max(0, round((end - start) / HOUR))
    return [start + HOUR * i for i in range(count)]


def write_part(
    store: ObjectStore, table: str, hour: datetime, rows: pl.DataFrame | pa.Table, name: str = "part"
) -> str:
    """Write one file of one hour; the same name again replaces it. Returns the key."""
    arrow = rows.to_arrow() if isinstance(rows, pl.DataFrame) else rows
    key = f"{hour_key(table, hour)}{name}.parquet"
    store.put(key, to_parquet(arrow))
    return key


def read_keys(store: ObjectStore, keys: Iterable[str]) -> pl.DataFrame:
    """The Parquet objects under `keys`, concatenated; a frame without columns where there are none."""
    frames = [pl.read_parquet(io.BytesIO(store.get(key).data)) for key in keys if key.endswith(".parquet")]
    return pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()


def read_hours(store: ObjectStore, table: str, start: datetime, end: datetime) -> pl.DataFrame:
    """All rows of `table` that arrived in [start, end); a frame without columns where there are none."""
    keys = [key for hour in hours_between(start, end) for key in store.list(hour_key(table, hour))]
    return read_keys(store, keys)


def landed_hours(store: ObjectStore, table: str) -> list[datetime]:
    """The hours of `table` that hold anything, in order."""
    hours = set()
    for key in store.list(f"{table}/"):
        try:
            day, hour = key.removeprefix(f"{table}/").split("/")[:2]
            hours.add(datetime.strptime(f"{day}/{hour}", "dt=%Y-%m-%d/hr=%H").replace(tzinfo=UTC))
        except ValueError:
            # One stray file must not blind the sensor to every hour; who put it there finds this line.
            logger.warning(
                "'%s' is in no hour and is not read: files go to %s/dt=YYYY-MM-DD/hr=HH/", key, table
            )
    return sorted(hours)
