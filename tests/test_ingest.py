"""Every landed row ends up clean, refused with a reason, or counted as a copy; none raises, none vanishes."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redqueen import ingest, loose, quarantine
from redqueen.errors import InvalidInput
from redqueen.store import DirectoryStore, to_parquet
from redqueen.tables import hour_key

HOUR = datetime(2026, 1, 3, 14, tzinfo=UTC)
NOW = HOUR + timedelta(hours=1)


def event(n: int = 0, **changes: Any) -> dict[str, Any]:
    ts = HOUR + timedelta(seconds=n % 3500)
    row = {
        "event_id": f"e{n}",
        "ts": ts,
        "received_at": ts + timedelta(seconds=1),
        "actor_id": f"a{n % 50}",
        "community_id": "c1",
        "community_size": 40,
        "channel_id": "general",
        "recipient_id": None,
        "kind": "message",
        "response": None,
        "response_ts": None,
        "text": f"hello {n}",
        "language": "en",
        "account_created_at": ts - timedelta(days=9),
        "ip_hash": None,
        "device_hash": None,
    }
    return {**row, **changes}


def label(n: int = 0, **changes: Any) -> dict[str, Any]:
    at = HOUR + timedelta(seconds=n)
    row = {
        "label_id": f"l{n}",
        "event_id": f"e{n}",
        "policy": "spam",
        "value": "abuse",
        "source": "moderator",
        "rater_id": "r1",
        "labeled_at": at,
        "received_at": at + timedelta(seconds=9),
        "confidence": 0.9,
    }
    return {**row, **changes}


def frame(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), infer_schema_length=None)


def reasons(result: ingest.Conformed) -> list[str]:
    return result.refused["reason"].to_list()


def as_json(row: dict[str, Any]) -> str:
    return json.dumps(row, default=lambda value: value.isoformat())


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path)


def test_a_sound_hour_is_clean_and_in_the_schemas_types() -> None:
    clean, refused = ingest.conform(frame(*(event(n) for n in range(20))), "events", HOUR, NOW)
    assert dict(clean.schema) == ingest.polars_schema("events")
    assert (clean.height, refused.height) == (20, 0)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"event_id": None}, "event_id: missing"),
        ({"actor_id": " "}, "actor_id: missing"),
        ({"ts": "yesterday"}, "ts: not a time"),
        ({"kind": "shout"}, "kind: not one of message, dm, friend_request, join"),
        ({"response": "maybe"}, "response: not one of accept, decline, reply, block"),
        ({"community_size": "many"}, "community_size: out of range or not a number"),
        ({"community_size": -1}, "community_size: out of range or not a number"),
        ({"ts": HOUR + timedelta(minutes=6), "received_at": HOUR}, "ts: more than 5 min after received_at"),
        ({"received_at": NOW + timedelta(days=9)}, "received_at: in the future"),
        ({"ts": HOUR - timedelta(days=31)}, "ts: more than 30 days before received_at"),
        ({"account_created_at": NOW}, "account_created_at: after ts"),
        ({"text": None}, "text: missing in a message"),
        ({"text": "  \n"}, "text: missing in a message"),
    ],
)
def test_a_bad_event_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    rows = [json.loads(as_json(row)) for row in (event(0), event(1, **changes))]
    columns = {name: [loose._as_text(row[name]) for row in rows] for name in rows[0]}
    result = ingest.conform(pl.DataFrame(columns), "events", HOUR, NOW)
    assert result.clean["event_id"].to_list() == ["e0"]
    assert reasons(result) == [reason]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"value": "bad"}, "value: not one of abuse, benign, unsure"),
        ({"source": "gossip"}, "source: not one of"),
        ({"confidence": 1.5}, "confidence: out of range or not a number"),
        ({"policy": "any"}, "policy: an abuse label must name its policy"),
        ({"policy": "gambling"}, "policy: not one of spam, scam, any"),
        ({"labeled_at": NOW}, "labeled_at: more than 5 min after received_at"),
        ({"labeled_at": datetime(1999, 1, 1, tzinfo=UTC)}, "labeled_at: before the year 2000"),
    ],
)
def test_a_bad_label_is_refused_with_its_reason(changes: dict[str, Any], reason: str) -> None:
    result = ingest.conform(
        frame(label(0), label(1, **changes)), "labels", HOUR, NOW, policies=("spam", "scam")
    )
    assert result.clean.height == 1
    assert reasons(result)[0].startswith(reason)


def test_a_friend_request_needs_no_text() -> None:
    clean, _ = ingest.conform(frame(event(kind="friend_request", text=None)), "events", HOUR, NOW)
    assert clean.height == 1


def test_a_resent_row_is_a_counted_copy_and_a_contradiction_is_refused() -> None:
    first = event(1)
    later = {**first, "received_at": first["received_at"] + timedelta(seconds=40)}
    other = {**later, "text": "something else"}
    for rows in ([first, later, other, event(2)], [event(2), other, later, first]):
        result = ingest.conform(frame(*rows), "events", HOUR, NOW)
        assert result.duplicates == 1
        assert reasons(result) == ["event_id: conflicting duplicate"]
        kept = result.clean.filter(pl.col("event_id") == "e1")
        assert kept["received_at"].to_list() == [first["received_at"]]


def test_what_landed_now_was_not_known_before() -> None:
    backdated = label(1, received_at=HOUR - timedelta(days=300), labeled_at=HOUR - timedelta(days=301))
    result = ingest.conform(frame(backdated), "labels", HOUR, NOW)
    assert result.held_back == 1
    assert result.clean["received_at"].to_list() == [HOUR]


def test_files_of_every_kind_are_read_together_and_broken_ones_told(store: DirectoryStore) -> None:
    prefix = hour_key("events", HOUR)
    store.put(f"{prefix}a.parquet", to_parquet(frame(event(0), event(1)).to_arrow()))
    broken = b'{"event_id": "torn\n[1]\n'
    store.put(f"{prefix}b.jsonl", f"{as_json(event(2))}\n".encode() + broken + as_json(event(3)).encode())
    rows = frame(event(4)).select(pl.exclude("response_ts")).write_csv().encode()
    store.put(f"{prefix}c.csv", rows + b"only,three,fields\n")
    store.put(f"{prefix}d.parquet", b"PAR1 and then the power went")
    store.put(f"{prefix}e.jsonl", b"\x1f\x8b\x00 not json at all")
    store.put(f"{prefix}f.xml", b"<row/>")
    store.put(f"{prefix}_SUCCESS", b"")

    landed, unreadable = ingest.read_landed(store, "events", HOUR)
    result = ingest.conform(landed, "events", HOUR, NOW)

    assert sorted(result.clean["event_id"]) == ["e0", "e1", "e2", "e3", "e4"]
    assert sorted(reasons(result)) == [
        "the line has 3 fields where the header has 15",
        "the line is not JSON",
        "the line is not a JSON object",
    ]
    assert [key.rpartition("/")[2] for key, _ in unreadable] == ["d.parquet", "e.jsonl", "f.xml"]
    assert set(result.refused["_row"]) == {2, 3}


def test_an_hour_in_which_nothing_landed_is_empty(store: DirectoryStore) -> None:
    landed, unreadable = ingest.read_landed(store, "events", HOUR)
    result = ingest.conform(landed, "events", HOUR, NOW)
    assert (result.clean.height, result.refused.height, unreadable) == (0, 0, [])
    assert dict(result.clean.schema) == ingest.polars_schema("events")


def test_a_text_with_half_a_surrogate_or_an_odd_byte_does_not_escape(store: DirectoryStore) -> None:
    line = as_json(event(0)).replace("hello 0", "free \\ud83d nitro").encode()
    odd = as_json(event(1)).replace("hello", "h\u00e9llo").encode("utf-8").replace(b"\\u00e9", b"\xff")
    store.put(f"{hour_key('events', HOUR)}a.jsonl", line + b"\n" + odd)
    clean, refused = ingest.conform(ingest.read_landed(store, "events", HOUR)[0], "events", HOUR, NOW)
    assert (clean.height, refused.height) == (2, 0)


def test_other_tables_do_not_land() -> None:
    with pytest.raises(InvalidInput, match="events, labels"):
        ingest.conform(frame(event()), "gold", HOUR, NOW)


values = st.one_of(
    st.none(),
    st.text(max_size=8),
    st.integers(),
    st.floats(),
    st.booleans(),
    st.lists(st.integers(), max_size=2),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(st.sampled_from([*event(), "other"]), values, max_size=16), max_size=6))
def test_no_row_raises_and_none_vanishes(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    mixed = [{**event(n), **row} if n % 2 else row for n, row in enumerate(rows)]
    data = "\n".join(as_json(row) for row in mixed).encode()
    landed = loose.read_rows(data, "x.jsonl") if rows else pl.DataFrame()
    result = ingest.conform(landed, "events", HOUR, NOW)
    assert result.clean.height + result.refused.height + result.duplicates == len(rows)
    assert not result.refused["reason"].is_null().any()
    assert result.clean["event_id"].is_unique().all()


@settings(max_examples=40, deadline=None)
@given(data=st.binary(max_size=200), suffix=st.sampled_from(loose.SUFFIXES))
def test_any_bytes_are_rows_or_an_unreadable_file(data: bytes, suffix: str) -> None:
    try:
        rows = loose.read_rows(data, f"x{suffix}")
    except InvalidInput:
        return
    ingest.conform(rows, "events", HOUR, NOW)


@pytest.mark.parametrize(
    "written",
    [
        "2026-01-03T14:00:00Z",
        "2026-01-03 14:00:00",
        "2026-01-03T15:00:00.000+01:00",
        "2026-01-03T15:00:00+0100",
        "2026-01-03 14:00 UTC",
        "1767448800",
        "1767448800000",
        "1767448800000000",
    ],
)
def test_times_are_read_as_people_write_them(written: str) -> None:
    assert loose.parse_times(pl.Series([written])).to_list() == [HOUR]


def test_absurd_times_are_none() -> None:
    told = pl.Series(["0001-01-01", "9999-12-31T00:00:00", "1e400", "-5", "nan", "12", "2026-13-40"])
    assert loose.parse_times(told).to_list() == [None] * 7
    assert loose.parse_times(pl.Series(["2026-01-03"])).to_list() == [HOUR.replace(hour=0)]


def test_2500_rows_take_milliseconds() -> None:
    rows = frame(*(event(n) for n in range(2500)), event(3), event(4, text="no"))
    ingest.conform(rows, "events", HOUR, NOW)
    best = min(_seconds(rows) for _ in range(3))
    assert best < 0.2, f"{best * 1000:.0f} ms"  # some 15 ms on a quiet core


def _seconds(rows: pl.DataFrame) -> float:
    start = time.perf_counter()
    ingest.conform(rows, "events", HOUR, NOW)
    return time.perf_counter() - start


def test_quarantine_keeps_each_refused_row_once(store: DirectoryStore) -> None:
    bad = [event(n, kind="shout") for n in range(3)]
    landed = frame(*bad, event(9, text=None)).with_columns(pl.lit("f").alias("_file"))
    refused = ingest.conform(landed.with_row_index("_row", 1), "events", HOUR, NOW).refused
    key = quarantine.refuse(store, "events", HOUR, refused)
    assert quarantine.refuse(store, "events", HOUR, refused.reverse()) == key
    # A second ingestion saw one file more: the rows it refuses again are not counted again.
    quarantine.refuse(store, "events", HOUR, refused.head(2))
    assert sum(quarantine.counts(store, "events").values()) == 4
    assert next(iter(quarantine.counts(store, "events"))).startswith("kind")
    assert quarantine.listing(store, "events")["rows"].sum() == 4
    assert quarantine.refuse(store, "events", HOUR, refused.clear()) is None
    quarantine.refuse_files(store, "events", HOUR, [("events/x.parquet", "torn")])
    assert quarantine.counts(store, "events", HOUR)["torn"] == 1
