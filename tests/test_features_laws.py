"""Laws of the features: online, offline and by brute force the same comes out, and never the future."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redqueen.errors import InvalidInput
from redqueen.features import (
    LOOKBACK,
    NAMES,
    InProcess,
    Prepared,
    compute,
    featurise,
    featurise_prepared,
    finish,
    in_blocks,
    prepare,
    prepare_frame,
    rows_of,
)
from redqueen.features.declared import AGGREGATES, SECOND, TILE
from redqueen.features.finish import SNAPSHOTS
from redqueen.features.offline import aggregate
from tests.feature_oracle import Oracle

T0 = datetime(2026, 1, 3, tzinfo=UTC)
TEXTS = [
    None, "hi", "see you at the usual place tomorrow", "claim free nitro at evil.com/1 now",
    "FREE n1tro evil.com/22 and at worse.example now", "claim free nitro at evil[.]com/7 now",
]  # fmt: skip
few = st.sampled_from
MOMENTS = st.one_of(
    st.integers(0, 60 * 3600 * 1000).map(lambda ms: ms * 1000),
    # On the edges of tiles and hops, and just beside them.
    st.builds(lambda tile, off: max(0, tile * TILE + off), st.integers(0, 720), few([-1, 0, 1])),
    st.integers(0, 20 * 60).map(lambda s: s * SECOND),
)
DELAYS = few([0, 0, 0, 1, 20, 600, 3000, 3600, 3601, 4000, 40_000, -1, -600, -20_000]).map(
    lambda seconds: seconds * SECOND
)
EVENTS = st.fixed_dictionaries(
    {
        "at": MOMENTS,
        "delay": DELAYS,
        "actor_id": few(["ann", "ann", "bob", "cy", None]),
        "recipient_id": few([None, "r1", "r2", "ann"]),
        "channel_id": few([None, "h1", "h2"]),
        "community_id": few([None, "c1", "c2"]),
        "kind": few(["message", "dm", "friend_request", "join"]),
        "text": few(TEXTS),
        "age": few([0, 5, 23, 24, 500]),
        "ip_hash": few([None, "i1"]),
        "device_hash": few([None, "d1", "d2"]),
        "again": few([None, None, None, 0, 1800, 3600, 4000, 90_000]),
    }
)


def raw(number: int, drawn: dict[str, Any]) -> list[dict[str, Any]]:
    """One drawn event, and the copy of it where it comes again."""
    drawn = dict(drawn)
    ts = T0 + timedelta(microseconds=drawn.pop("at"))
    received = ts + timedelta(microseconds=drawn.pop("delay"))
    again, age = drawn.pop("again"), drawn.pop("age")
    event = {
        **drawn, "event_id": f"e{number * 7919 % 1000:03}", "ts": ts, "received_at": received,
        "community_size": 50, "account_created_at": ts - timedelta(hours=age),
    }  # fmt: skip
    copies = [] if again is None else [{**event, "received_at": received + timedelta(seconds=again)}]
    return [event, *copies]


def as_known(drawn: list[dict[str, Any]]) -> list[dict[str, Any]]:
    events = [event for i, one in enumerate(drawn) for event in raw(i, one)]
    return sorted(events, key=lambda event: (event["received_at"], event["event_id"]))


STREAMS = st.lists(EVENTS, min_size=1, max_size=45).map(as_known)
law = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def frame(events: list[dict[str, Any]]) -> pl.DataFrame:
    names = dict.fromkeys(
        ("actor_id", "recipient_id", "channel_id", "community_id", "text", "ip_hash", "device_hash"),
        pl.String,
    )
    return pl.DataFrame(events, infer_schema_length=None, schema_overrides=names)


def first_of_each(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    first: dict[str, dict[str, Any]] = {}
    for event in events:
        first.setdefault(event["event_id"], event)
    return list(first.values())


def finished(rows: list[Prepared], counted: np.ndarray) -> np.ndarray:
    direct = np.array([row.direct for row in rows])
    unknown = np.full((len(rows), len(SNAPSHOTS)), np.nan)
    return finish(counted, direct, unknown, np.array([row.actor is not None for row in rows]))


def names_of(columns: np.ndarray) -> list[str]:
    return [f"{AGGREGATES[i]}" for i in np.flatnonzero(columns)]


def demand_equal(found: np.ndarray, expected: np.ndarray) -> None:
    wrong = found != expected
    assert not wrong.any(), (names_of(wrong.any(axis=0)), np.flatnonzero(wrong.any(axis=1)))


@law
@given(STREAMS, st.data())
def test_online_says_what_brute_force_says_whatever_the_batches_and_restarts(
    events: list[dict[str, Any]], data: st.DataObject
) -> None:
    rows = [prepare(event) for event in events]
    oracle = Oracle()
    expected = np.array([oracle.observe(row) for row in rows], dtype=np.int64)
    engine, found, start = InProcess(), [], 0
    while start < len(rows):
        size = data.draw(st.integers(1, 9))
        found.append(engine.observe(rows[start : start + size]))
        start += size
        if data.draw(st.booleans()):
            engine = InProcess.load(engine.dump())
    demand_equal(np.concatenate(found), expected)


@law
@given(STREAMS, st.integers(1, 4))
def test_offline_says_what_brute_force_says_in_any_number_of_shards(
    events: list[dict[str, Any]], shards: int
) -> None:
    events = first_of_each(events)
    rows = [prepare(event) for event in events]
    oracle = Oracle()
    expected = np.array([oracle.observe(row) for row in rows], dtype=np.int64)
    demand_equal(aggregate(prepare_frame(frame(events)), shards=shards), expected)


@law
@given(STREAMS)
def test_hour_by_hour_with_lookback_is_what_is_known_online(events: list[dict[str, Any]]) -> None:
    """Copies included: a copy in a later hour gets the row of the first."""
    rows = [prepare(event) for event in events]
    served = finished(rows, InProcess().observe(rows))
    table = frame(events).with_row_index("row")
    for (hour,), part in table.group_by(pl.col("received_at").dt.truncate("1h"), maintain_order=True):
        assert isinstance(hour, datetime)
        part = part.unique("event_id", keep="first", maintain_order=True)
        before = pl.col("received_at").is_between(hour - LOOKBACK, hour, closed="left")
        found = compute(prepare_frame(part), prepare_frame(table.filter(before)))
        np.testing.assert_array_equal(found, served[part["row"]])


@law
@given(STREAMS, st.integers(1, 12), st.randoms(use_true_random=False))
def test_in_blocks_of_any_size_is_in_one_go_and_in_any_order_of_rows(
    events: list[dict[str, Any]], size: int, rng: Any
) -> None:
    table = prepare_frame(frame(first_of_each(events)))
    whole = featurise_prepared(table)
    blocks = [table[i : i + size] for i in range(0, table.height, size)]
    assert pl.concat(in_blocks(blocks)).equals(whole)
    order = list(range(table.height))
    rng.shuffle(order)
    assert featurise_prepared(table[order]).equals(whole[order])


@law
@given(STREAMS, STREAMS, st.integers(0, 60))
def test_no_value_depends_on_what_becomes_known_later(
    events: list[dict[str, Any]], others: list[dict[str, Any]], hour: int
) -> None:
    now = T0 + timedelta(hours=hour)
    past = first_of_each([event for event in events if event["received_at"] < now])
    later = [
        {**event, "event_id": "x" + event["event_id"]} for event in others if event["received_at"] >= now
    ]
    if not past:
        return
    known = featurise(frame(past))
    assert featurise(frame(past + first_of_each(later)))[: len(past)].equals(known)
    assert featurise(frame(past), frame(later) if later else None).equals(known)


@law
@given(STREAMS)
def test_every_event_keeps_its_row_and_rows_keep_their_order(events: list[dict[str, Any]]) -> None:
    events = first_of_each(events)
    table = featurise(frame(events))
    assert table["event_id"].to_list() == [event["event_id"] for event in events]
    assert table.columns == ["event_id", *NAMES]


@law
@given(STREAMS)
def test_a_frame_is_prepared_as_its_rows_are(events: list[dict[str, Any]]) -> None:
    assert repr(rows_of(prepare_frame(frame(events)))) == repr([prepare(event) for event in events])


@law
@given(STREAMS)
def test_a_table_equals_the_matrix_it_was_narrowed_from(events: list[dict[str, Any]]) -> None:
    prepared = prepare_frame(frame(first_of_each(events)))
    table = featurise_prepared(prepared).select(NAMES).to_numpy()
    np.testing.assert_array_equal(table, compute(prepared).astype(np.float32))


@law
@given(STREAMS, st.integers(27, 80))
def test_after_the_horizon_nothing_is_left_but_the_newcomers(
    events: list[dict[str, Any]], hours: int
) -> None:
    engine = InProcess()
    engine.observe([prepare(event) for event in events])
    end = max(event["received_at"] for event in events) + timedelta(hours=hours + 1)
    fresh = [prepare({"event_id": f"n{i}", "ts": end, "actor_id": "new"}) for i in range(40)]
    engine.observe(fresh)
    engine.observe([prepare({"event_id": "m", "ts": end + timedelta(hours=1), "actor_id": "new"})])
    assert engine.keys == 1


@pytest.mark.parametrize(("events", "days"), [(300, 4), (300, 0.1)])
def test_a_few_busy_keys_over_days_with_many_values(events: int, days: float) -> None:
    """Long enough for records to be dropped and values to be forgotten, in the middle of restarts."""
    rng = np.random.default_rng(4)
    rows = []
    for i, at in enumerate(np.sort(rng.integers(0, int(days * 86_400), events))):
        ts = T0 + timedelta(seconds=int(at) - int(rng.integers(0, 2)) * int(rng.integers(0, 3700)))
        rows.append(
            prepare({
                "event_id": f"e{i:04}", "ts": ts, "received_at": T0 + timedelta(seconds=int(at)),
                "actor_id": f"a{rng.integers(0, 1 + i // 40)}", "recipient_id": f"r{rng.integers(40)}",
                "channel_id": f"h{rng.integers(30)}", "community_id": f"c{rng.integers(20)}",
                "text": f"look at evil{rng.integers(3)}.com " + "ab"[rng.integers(2)] * 12, "ip_hash": "i",
                "device_hash": "d", "account_created_at": ts - timedelta(hours=int(rng.integers(0, 48))),
            })
        )  # fmt: skip
    oracle, engine, found = Oracle(), InProcess(), []
    for start in range(0, events, 7):
        found.append(engine.observe(rows[start : start + 7]))
        if rng.random() < 0.2:
            engine = InProcess.load(engine.dump())
    demand_equal(np.concatenate(found), np.array([oracle.observe(row) for row in rows]))


def test_repeated_ids_are_refused() -> None:
    events = [{"event_id": "e", "ts": T0, "actor_id": "a"}] * 2
    with pytest.raises(InvalidInput, match="repeat an event_id"):
        featurise(pl.DataFrame(events))


def test_a_dump_of_other_features_or_damaged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    dumped = InProcess().dump()
    with pytest.raises(InvalidInput, match="no dump of online features"):
        InProcess.load(dumped[:-3])
    monkeypatch.setattr("redqueen.features.online.FEATURES_VERSION", "9-other")
    with pytest.raises(InvalidInput, match="9-other"):
        InProcess.load(dumped)
