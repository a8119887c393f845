"""A person's own messages become a stream, and the stream becomes hours; what is left out is told."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen import ingest
from redqueen.errors import InvalidInput
from redqueen.importing import Columns, Stream, load_stream, parse_where, plan_windows

END = datetime(2026, 1, 20, 12, tzinfo=UTC)
DAY = datetime(2020, 5, 4, tzinfo=UTC)  # a Monday
SHARED = Path(os.environ.get("RQ_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent: set RQ_SHARED_DATA to the folder that holds {name}")
    return path


def message(n: int, **changes: Any) -> dict[str, Any]:
    when = (DAY + timedelta(hours=n)).isoformat()
    return {"text": f"message {n}", "date": when, "label": n % 3 == 0, "who": f"u{n % 7}", **changes}


def written(folder: Path, rows: list[dict[str, Any]], name: str = "a.jsonl") -> Path:
    path = folder / name
    if name.endswith(".jsonl"):
        path.write_text("\n".join(json.dumps(row) for row in rows))
    elif name.endswith(".csv"):
        pl.DataFrame(rows).write_csv(path)
    else:
        pl.DataFrame(rows).write_parquet(path)
    return path


def stream(folder: Path, n: int = 300, **options: Any) -> Stream:
    return load_stream([written(folder, [message(i) for i in range(n)])], **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_stream(tmp_path: Path, name: str) -> None:
    (tmp_path / "other").mkdir()
    plain = stream(tmp_path / "other", 30)
    read = load_stream([written(tmp_path, [message(i) for i in range(30)], name)])
    assert read.rows.equals(plain.rows)
    assert read.rows["abusive"].sum() == 10
    assert read.quarantine.height == 0


@pytest.mark.parametrize(
    ("abuse", "benign"), [(1, 0), ("spam", "ham"), ("Abuse", "benign"), (True, False), ("1.0", "0")]
)
def test_labels_are_read_as_people_write_them(tmp_path: Path, abuse: Any, benign: Any) -> None:
    rows = [message(0, label=abuse), message(1, label=benign)]
    assert load_stream([written(tmp_path, rows)]).rows["abusive"].to_list() == [True, False]


@pytest.mark.parametrize(
    "when",
    [
        "2020-05-04T01:00:00Z",
        "2020-05-04 01:00:00",
        1588554000,
        "1588554000000",
        "Mon, 4 May 2020 03:00:00 +0200",
    ],
)
def test_dates_are_read_as_people_write_them(tmp_path: Path, when: Any) -> None:
    rows = load_stream([written(tmp_path, [message(0, date=when)])]).rows
    assert rows["ts"].to_list() == [DAY + timedelta(hours=1)]


def test_columns_are_named_joined_and_found_in_any_case(tmp_path: Path) -> None:
    rows = [
        {"Subject": "win", "Body": "now", "Sent": "2020-05-04", "Is_Spam": 1, "kind_of": "scam", "room": "x"}
    ]
    columns = Columns.parse("Subject, Body", time="Sent", policy="kind_of", community="room")
    got = load_stream([written(tmp_path, rows)], columns).rows.row(0, named=True)
    assert (got["text"], got["policy"], got["abusive"]) == ("win\nnow", "scam", True)
    assert got["community_id"] not in ("x", "imported")


def test_what_cannot_be_used_goes_to_quarantine_with_its_reason(tmp_path: Path) -> None:
    rows = [
        message(0),
        message(1, text=" "),
        message(2, label="perhaps"),
        message(3, date="soon"),
        message(4, label=None),
    ]
    path = written(tmp_path, rows)
    path.write_text(path.read_text() + "\n{torn")
    read = load_stream([path])
    assert read.rows.height == 1
    assert dict(read.quarantine["reason"].value_counts().iter_rows()) == {
        "no text": 1,
        "no label that says abuse or benign": 2,
        "no date": 1,
        "the line is not JSON": 1,
    }
    assert sorted(read.quarantine["_row"]) == [2, 3, 4, 5, 6]
    assert any("2 rows went to quarantine" in note for note in read.told)


def test_a_filter_drops_and_counts_rows_where_the_column_is(tmp_path: Path) -> None:
    written(tmp_path, [message(i, bulk=i % 2 == 0) for i in range(10)], "a.jsonl")
    written(tmp_path, [message(100 + i) for i in range(5)], "b.jsonl")
    read = load_stream([tmp_path], where="bulk=false")
    assert (read.rows.height, read.filtered) == (10, 5)
    with pytest.raises(InvalidInput, match="not column=value"):
        parse_where("bulk")


def test_undated_rows_are_spread_evenly_and_by_the_seed(tmp_path: Path) -> None:
    written(tmp_path, [message(24 * i) for i in range(10)], "dated.jsonl")
    written(tmp_path, [{"text": f"plain {i}", "label": 0} for i in range(900)], "undated.jsonl")
    read = load_stream([tmp_path], undated="spread", seed=4)
    assert (read.rows.height, read.spread) == (910, 900)
    plain = read.rows.filter(~pl.col("dated"))
    per_day = plain.group_by(pl.col("ts").dt.truncate("1d")).len()["len"]
    assert per_day.min() == per_day.max() == 100
    again = load_stream([tmp_path], undated="spread", seed=4)
    assert again.rows.equals(read.rows)
    other = load_stream([tmp_path], undated="spread", seed=5)
    assert not other.rows["ts"].equals(read.rows["ts"])
    assert set(other.rows["event_id"]) == set(read.rows["event_id"])
    assert load_stream([tmp_path]).quarantine["reason"].unique().to_list() == ["no date"]


def test_without_a_sender_each_message_is_its_own_actor(tmp_path: Path) -> None:
    alone = stream(tmp_path, 20)
    assert not alone.behaviour
    assert alone.rows["actor_id"].is_unique().all()
    assert any("behaviour features are off" in note for note in alone.told)
    known = stream(tmp_path, 20, columns=Columns(actor="who"))
    assert known.behaviour
    assert known.rows["actor_id"].n_unique() == 7
    assert not set(known.rows["actor_id"]) & {f"u{i}" for i in range(7)}
    assert set(stream(tmp_path, 20, columns=Columns(actor="who"), salt="other").rows["actor_id"]).isdisjoint(
        known.rows["actor_id"]
    )


def test_the_same_message_twice_is_two_events(tmp_path: Path) -> None:
    read = load_stream([written(tmp_path, [message(0), message(0), message(1)])])
    assert read.rows["event_id"].n_unique() == 3


def test_long_texts_are_cut_and_counted(tmp_path: Path) -> None:
    read = load_stream([written(tmp_path, [message(0, text="x" * 5_000), message(1)])])
    assert (read.rows["text"].str.len_chars().max(), read.cut) == (2_000, 1)


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        (
            Columns(label="verdict"),
            "--label names column 'verdict', but the files have date, label, text, who",
        ),
        (Columns(text=("subject",)), "--text names column 'subject'"),
        (Columns(actor="from"), "--actor names column 'from'"),
    ],
)
def test_a_wrong_name_is_told_with_the_right_ones(tmp_path: Path, columns: Columns, told: str) -> None:
    with pytest.raises(InvalidInput, match=told):
        stream(tmp_path, 3, columns=columns)


def test_files_that_cannot_be_a_stream_are_told(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        load_stream([tmp_path / "nowhere"])
    with pytest.raises(InvalidInput, match="holds no file"):
        load_stream([tmp_path])
    with pytest.raises(InvalidInput, match="no column is called date, time"):
        load_stream([written(tmp_path, [{"text": "a", "label": 1}])], undated="spread")
    with pytest.raises(InvalidInput, match="no dated, labelled message is left of 1 rows"):
        load_stream([written(tmp_path, [message(0, label="?")])])
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(InvalidInput, match=r"torn\.parquet.*not readable"):
        load_stream([tmp_path / "torn.parquet"])


def test_each_period_is_an_hour_and_the_last_ends_now(tmp_path: Path) -> None:
    plan = plan_windows(stream(tmp_path, 24 * 5), "day", END, min_rows=10)
    assert [window.hour for window in plan.windows] == [END - timedelta(hours=5 - i) for i in range(5)]
    assert [window.period for window in plan.windows] == [f"2020-05-0{4 + i}" for i in range(5)]
    assert [window.n for window in plan.windows] == [24] * 5
    assert plan.windows[0].period_start == DAY
    assert plan.windows[-1].period_end == DAY + timedelta(days=5)
    with pytest.raises(InvalidInput, match="day, week or month"):
        plan_windows(stream(tmp_path, 9), "year", END)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="no window 5"):
        plan.hour(5)


def test_near_empty_periods_are_joined_and_empty_ones_skipped(tmp_path: Path) -> None:
    hours = [*range(24), 30, 400, *range(401, 424), 600]
    plan = plan_windows(
        load_stream([written(tmp_path, [message(h) for h in hours])]), "day", END, min_rows=10
    )
    assert [(w.period, w.n) for w in plan.windows] == [("2020-05-04", 24), ("2020-05-05..2020-05-29", 26)]
    assert plan.joined == 3


@pytest.mark.parametrize("window", ["day", "week", "month"])
def test_every_hour_passes_ingestion_and_nothing_is_lost(tmp_path: Path, window: Any) -> None:
    read = stream(tmp_path, 24 * 40, columns=Columns(actor="who"))
    plan = plan_windows(read, window, END)
    events, labels = [], [plan.late_labels()]
    for i, planned in enumerate(plan.windows):
        brought, arriving, truth = plan.hour(i)
        for rows, table in ((brought, "events"), (arriving, "labels")):
            outcome = ingest.conform(rows, table, planned.hour, END)
            assert (outcome.clean.height, outcome.refused.height, outcome.held_back) == (rows.height, 0, 0)
            assert outcome.clean.equals(rows)
        assert truth.height == planned.n
        assert truth["abusive"].sum() == planned.n_abuse
        assert brought["received_at"].is_between(planned.hour, planned.hour + timedelta(hours=1)).all()
        events.append(brought)
        labels.append(arriving)
    replayed, judged = pl.concat(events), pl.concat(labels)
    assert replayed["text"].to_list() == read.rows["text"].to_list()
    assert replayed["ts"].is_sorted()
    assert replayed["ts"].is_unique().all()
    assert (replayed["account_created_at"] <= replayed["ts"]).all()
    known = replayed.join(judged, on="event_id", validate="1:1")
    delay = (known["received_at_right"] - known["ts"]).dt.total_seconds() / 3600
    assert delay.min() >= 0.25  # type: ignore[operator]
    assert delay.max() < 2.1  # type: ignore[operator]


@settings(max_examples=25, deadline=None)
@given(gaps=st.lists(st.integers(0, 900), min_size=1, max_size=60), least=st.integers(1, 30))
def test_whatever_the_dates_order_and_number_are_kept(gaps: list[int], least: int) -> None:
    hours = [sum(gaps[: i + 1]) for i in range(len(gaps))]
    rows = pl.DataFrame(
        {
            "event_id": [f"e{i:03}" for i in range(len(hours))],
            "ts": [DAY + timedelta(hours=h) for h in hours],
            "text": [f"t{i:03}" for i in range(len(hours))],
            "abusive": [False] * len(hours),
            "policy": pl.Series([None] * len(hours), dtype=pl.String),
            "actor_id": [f"a{i}" for i in range(len(hours))],
            "community_id": ["imported"] * len(hours),
            "dated": [True] * len(hours),
        },
        schema_overrides={"ts": pl.Datetime("us", "UTC")},
    )
    plan = plan_windows(Stream(rows, pl.DataFrame({"reason": []}), False), "week", END, min_rows=least)
    replayed = pl.concat([plan.hour(i).events for i in range(len(plan))])
    assert replayed["text"].to_list() == rows["text"].to_list()
    assert replayed["ts"].is_sorted()
    assert len(plan) == 1 or all(window.n >= least for window in plan.windows)
    assert plan.windows[-1].hour == END - timedelta(hours=1)


def test_scam_domains_with_their_undated_background() -> None:
    read = load_stream(
        [shared("discord_scam_domains")],
        undated="spread",
        seed=1,
        where=parse_where("bulk=false,bulk_day=false"),
        policy="scam",
    )
    assert read.spread == 19_705
    assert read.filtered > 0
    plan = plan_windows(read, "month", END)
    assert len(plan) == 23
    assert all(window.n - window.n_abuse > 700 for window in plan.windows)
    assert plan.policies == ("scam",)


def test_dated_mail_with_subject_and_body() -> None:
    read = load_stream([shared("spamassassin")], Columns.parse("subject,body"))
    assert (read.rows.height, read.quarantine.height) == (6_046, 0)
    assert read.cut > 0
    plan = plan_windows(read, "week", END)
    assert all(window.n >= 50 for window in plan.windows)
    assert sum(window.n for window in plan.windows) == 6_046
