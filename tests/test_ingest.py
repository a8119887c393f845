"""Every landed row ends up clean, refused with a reason, or counted as a copy; none raises, none vanishes."""

from __future__ import annotations

import json
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from assets.environment import Environment
from assets.ingest import _take_in
from redqueen import arrivals, ingest, ledger, loose, quarantine, tombstones
from redqueen.clock import StoreClock
from redqueen.errors import InvalidInput
from redqueen.schema import polars_schema
from redqueen.store import DirectoryStore, S3Store, to_parquet
from redqueen.tables import hour_key, read_hours, write_part
from tests.services import S3Server

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
    assert dict(clean.schema) == polars_schema("events")
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
    assert dict(result.clean.schema) == polars_schema("events")


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


# -- across hours --------------------------------------------------------------------------------------------


def take(store: Any, table: str, hour: datetime, *rows: dict[str, Any]) -> ingest.Conformed:
    """Take rows in as landed in `hour`, and write what passes."""
    outcome = ingest.take_in(store, frame(*rows), table, hour, hour + timedelta(hours=1))
    write_part(store, f"ingested/{table}", hour, outcome.clean)
    return outcome


def kept(store: DirectoryStore, table: str = "events") -> pl.DataFrame:
    return read_hours(store, f"ingested/{table}", HOUR - timedelta(days=2), HOUR + timedelta(days=25))


def later(hours: int) -> datetime:
    return HOUR + timedelta(hours=hours)


@pytest.mark.parametrize("hours", [1, 30, 24 * 20])
def test_a_row_sent_again_in_another_hour_changes_nothing(store: DirectoryStore, hours: int) -> None:
    first = take(store, "events", HOUR, event(1), event(2))
    again = take(store, "events", later(hours), event(1, received_at=later(hours)), event(3, ts=later(hours),
                 received_at=later(hours)))  # fmt: skip
    assert (first.clean.height, first.known) == (2, 0)
    assert (again.clean["event_id"].to_list(), again.duplicates, again.known) == (["e3"], 1, 1)
    assert again.refused.is_empty()
    assert sorted(kept(store)["event_id"]) == ["e1", "e2", "e3"]


def test_the_same_id_with_other_content_is_refused_in_another_hour(store: DirectoryStore) -> None:
    take(store, "labels", HOUR, label(1))
    for other in (label(1, value="benign"), label(1, labeled_at=HOUR - timedelta(days=3))):
        outcome = take(store, "labels", later(2), {**other, "received_at": later(2)})
        assert reasons(outcome) == ["label_id: taken in before with other content"]
        assert outcome.clean.is_empty()
    assert kept(store, "labels")["value"].to_list() == ["abuse"]


def test_a_late_file_in_an_hour_taken_in_long_ago_is_taken_in(store: DirectoryStore) -> None:
    take(store, "events", HOUR, event(1))
    take(store, "events", later(1), event(2, received_at=later(1)))
    outcome = take(store, "events", HOUR, event(1), event(2), event(3))
    assert sorted(outcome.clean["event_id"]) == ["e1", "e3"]
    assert outcome.known == 1
    assert sorted(kept(store)["event_id"]) == ["e1", "e2", "e3"]


def test_a_copy_that_claims_to_have_come_earlier_does_not_change_when_we_knew(store: DirectoryStore) -> None:
    known = event(1, received_at=HOUR + timedelta(minutes=50))
    take(store, "events", HOUR, known)
    outcome = take(store, "events", HOUR, event(1, received_at=HOUR + timedelta(minutes=2)), known)
    assert outcome.clean["received_at"].to_list() == [known["received_at"]]
    assert outcome.duplicates == 1


def test_a_mended_file_replaces_what_its_own_hour_took_in(store: DirectoryStore) -> None:
    take(store, "events", HOUR, event(1), event(2))
    outcome = take(store, "events", HOUR, event(1, text="mended"))
    assert outcome.clean["text"].to_list() == ["mended"]
    # What is no longer in the file is free again.
    assert take(store, "events", later(1), event(2, received_at=later(1))).clean.height == 1


def test_killed_between_index_and_data_the_hour_runs_again_to_the_same_bytes(store: DirectoryStore) -> None:
    rows = [event(n) for n in range(30)]
    ingest.take_in(store, frame(*rows), "events", HOUR, NOW)  # claimed, and then the power went
    assert take(store, "events", later(1), event(5, received_at=later(1))).known == 1
    take(store, "events", HOUR, *rows)
    key = f"{hour_key('ingested/events', HOUR)}part.parquet"
    before = store.get(key).data
    manifest = store.get("index/events/manifest.json").etag
    take(store, "events", HOUR, *rows)
    assert store.get(key).data == before
    assert store.get("index/events/manifest.json").etag == manifest
    assert kept(store).height == 30


def test_two_hours_that_race_for_the_same_ids_do_not_both_keep_them(store: DirectoryStore) -> None:
    n, failures = 4, []
    start = threading.Barrier(n)

    def run(i: int) -> None:
        rows = [event(k, received_at=later(i)) for k in range(40)]
        start.wait()
        try:
            take(store, "events", later(i), *rows)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert sorted(kept(store)["event_id"]) == sorted(f"e{k}" for k in range(40))
    left = set(store.list("index/events/"))
    assert len(left) == 2, "a manifest and one segment; losers leave nothing"


class Counting(DirectoryStore):
    """Counts what is read and listed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.listed: list[str] = []

    def list(self, prefix: str) -> list[str]:
        self.listed.append(prefix)
        return super().list(prefix)


def test_a_segment_that_a_writer_is_about_to_name_is_no_leftover(
    store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    take(store, "events", HOUR, event(0))
    swap = ledger._swap

    def meanwhile(*given: Any) -> bool:
        monkeypatch.setattr(ledger, "_swap", swap)
        ledger.forget(store, "events", before=HOUR - timedelta(days=9))
        ledger._cache.clear()
        return swap(*given)

    monkeypatch.setattr(ledger, "_swap", meanwhile)
    for hours in (1, 2):
        take(store, "events", later(hours), event(hours, ts=later(hours), received_at=later(hours)))
    assert ledger.entries(store, "events").height == 3
    # What nobody names stays for a while and then goes.
    store.put("index/events/1-1-dead.parquet", b"left by a killed writer")
    ledger.forget(store, "events", before=HOUR - timedelta(days=9))
    assert store.exists("index/events/1-1-dead.parquet")
    monkeypatch.setattr(ledger, "LEFT_FOR", timedelta(0))
    ledger.forget(store, "events", before=HOUR - timedelta(days=9))
    assert not store.exists("index/events/1-1-dead.parquet")
    assert ledger.entries(store, "events").height == 3


def test_days_that_are_over_become_one_segment_and_nothing_is_listed(tmp_path: Path) -> None:
    store = Counting(tmp_path)
    take(store, "events", HOUR, event(0))
    store.listed.clear()
    for i in range(1, 60):
        take(store, "events", later(i), event(i * 100, ts=later(i), received_at=later(i)))
    assert store.listed == []
    segments, _ = ledger._manifest(store, "events")
    assert len(segments) <= 24 + 3
    assert ledger.entries(store, "events").height == 60
    assert len(DirectoryStore(tmp_path).list("index/events/")) == len(segments) + 1


def test_an_index_that_is_lost_is_made_again_from_what_was_taken_in(store: DirectoryStore) -> None:
    for i in range(3):
        take(store, "events", later(i), event(i, received_at=later(i)))
    before = ledger.entries(store, "events")
    for key in store.list("index/"):
        store.delete(key)
    ledger._cache.clear()
    assert take(store, "events", later(9), event(1, received_at=later(9))).known == 1
    assert ledger.entries(store, "events").equals(before)


def test_what_a_row_says_is_hashed_alike_whatever_nulls_and_columns_come_with_it() -> None:
    rows = ingest.conform(frame(event(1), event(2)), "events", HOUR, NOW).clean
    more = rows.with_columns(pl.lit(None, pl.String).alias("added_later"))
    assert (ledger.hash_contents(rows) == ledger.hash_contents(more)).all()
    # Written to disk, so pinned: another value here is another index.
    assert int(ledger.hash_ids(["e1"])[0]) == 292540415853092123


sent = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 7)), min_size=1, max_size=25)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(files=sent, order=st.permutations(range(6)), again=st.lists(st.integers(0, 5), max_size=4))
def test_however_files_overlap_and_hours_are_taken_in_every_id_is_there_once(
    files: list[tuple[int, int]], order: list[int], again: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    store = DirectoryStore(tmp_path_factory.mktemp("law"))
    landed: dict[int, list[dict[str, Any]]] = {}
    for hour, n in files:
        landed.setdefault(hour, []).append(event(n, received_at=later(hour)))
    for hour in [*order, *again]:
        rows = landed.get(hour, [])
        outcome = take(store, "events", later(hour), *rows) if rows else None
        if outcome is not None:
            assert outcome.refused.is_empty()
            assert outcome.clean.height + outcome.duplicates == len(rows)
    assert sorted(kept(store)["event_id"]) == sorted({f"e{n}" for _, n in files})


def test_the_index_works_on_s3(s3_server: S3Server) -> None:
    store = S3Store(s3_server.new_bucket(), "p", s3_server.url)
    take(store, "events", HOUR, event(1))
    assert take(store, "events", later(25), event(1, received_at=later(25))).known == 1
    ledger._cache.clear()
    assert take(store, "events", later(26), event(2, received_at=later(26))).clean.height == 1


# -- the asset's part ----------------------------------------------------------------------------------------


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    found = Environment(home=str(tmp_path / "home"))
    StoreClock(found.store).set(later(9))
    return found


def test_the_counts_tell_what_was_known_from_other_hours(env: Environment) -> None:
    for hour in (HOUR, later(1)):
        data = as_json(event(1, received_at=hour)).encode()
        env.store.put(f"{hour_key('events', hour)}a.jsonl", data)
    rows, counts = _take_in(env, "events", [HOUR, later(1)])
    assert rows["event_id"].to_list() == ["e1"]
    assert (counts["duplicates"], counts["known_from_other_hours"]) == (1, 1)
    # A file that comes after its hour was taken in is missed, until the hour is taken in again.
    day = HOUR.replace(hour=0)
    assert arrivals.missed(env.store, day) == {}
    env.store.put(f"{hour_key('events', HOUR)}late.jsonl", as_json(event(7)).encode())
    assert list(arrivals.missed(env.store, day)) == [HOUR]
    _take_in(env, "events", [HOUR])
    assert arrivals.missed(env.store, day) == {}


def test_a_policy_that_is_not_configured_is_refused(env: Environment) -> None:
    env.store.put(f"{hour_key('labels', HOUR)}a.jsonl", as_json(label(1, policy="gambling")).encode())
    rows, counts = _take_in(env, "labels", [HOUR])
    assert (rows.height, counts["refused"]) == (0, 1)


def test_what_was_erased_is_refused_and_nothing_of_it_is_kept(env: Environment) -> None:
    tombstones.add(env.store, "r1", "actor", ["a1"])
    tombstones.add(env.store, "r1", "event", ["e1"])
    key = f"{hour_key('events', HOUR)}a.jsonl"
    mine, others = event(1, text="my secret"), event(2, recipient_id="a1", kind="dm", text="to a friend")
    env.store.put(key, f"{as_json(mine)}\n{as_json(others)}".encode())
    env.store.put(f"{hour_key('labels', HOUR)}a.jsonl", as_json(label(1)).encode())
    rows, _ = _take_in(env, "events", [HOUR])
    labels, _ = _take_in(env, "labels", [HOUR])
    assert rows["event_id"].to_list() == ["e2"]
    assert rows["recipient_id"][0].startswith("erased-")
    assert labels.is_empty()
    for table in ("events", "labels"):
        assert quarantine.counts(env.store, table) == {"erased on request": 1}
    everything = b"".join(env.store.get(k).data for k in env.store.list("") if not k.endswith(".parquet"))
    assert b"my secret" not in everything
    assert b'"a1"' not in everything
    assert b'"e1"' not in everything
    assert b"to a friend" in everything
