"""Tables by hour of arrival: what is written is read again, and a stray file blinds nobody."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import polars as pl
import pytest

from redqueen import tables
from redqueen.store import DirectoryStore

T0 = datetime(2026, 1, 3, 14, tzinfo=UTC)


def test_hours_are_read_as_they_were_written_end_exclusive(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for i in range(3):
        tables.write_part(store, "events", T0 + i * tables.HOUR, pl.DataFrame({"n": [i]}))
    assert tables.read_hours(store, "events", T0, T0 + 2 * tables.HOUR)["n"].to_list() == [0, 1]
    assert tables.landed_hours(store, "events") == [T0 + i * tables.HOUR for i in range(3)]
    assert tables.read_hours(store, "labels", T0, T0 + tables.HOUR).is_empty()


def test_an_hour_is_the_same_whatever_zone_names_it() -> None:
    from zoneinfo import ZoneInfo

    assert tables.hour_key("events", T0.astimezone(ZoneInfo("Asia/Kolkata"))) == "events/dt=2026-01-03/hr=14/"
    assert tables.hours_between(T0, T0 - timedelta(hours=3)) == []


def test_stray_files_are_named_and_hide_no_hour(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = DirectoryStore(tmp_path)
    for name in (
        "README.txt",
        "dt=2026-01-03/x.jsonl",
        "dt=2026-13-03/hr=14/x.jsonl",
        "old/dt=2026-01-03/hr=14/x",
    ):
        store.put(f"events/{name}", b"")
    store.put("events/dt=2026-01-03/hr=14/part/x.jsonl", b"")
    assert tables.landed_hours(store, "events") == [T0]
    assert "README.txt" in caplog.text
