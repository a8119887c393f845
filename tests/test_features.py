"""Claims about features: laws of the windows, stories of what they count, refusals."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen.errors import InvalidInput
from redqueen.features import (
    FEATURES,
    FEATURES_VERSION,
    NAMES,
    TEXT_FEATURES,
    BehaviourState,
    check_columns,
    featurise,
    with_text,
)

T0 = datetime(2026, 1, 3, tzinfo=UTC)
TEXTS = ["hi", "see you at the usual place tomorrow", "claim free nitro at evil.com/1 now",
         "FREE n1tro evil.com/22 now",
         "", "привет как дела друзья"]  # fmt: skip


def event(number: int, at: float, **columns: Any) -> dict[str, Any]:
    """An event `at` minutes after T0."""
    return {
        "event_id": f"e{number:04}", "ts": T0 + timedelta(minutes=at), "actor_id": "ann",
        "community_id": "c1",
        "community_size": 100, "channel_id": "h1", "recipient_id": None, "kind": "message", "text": "hello",
        "account_created_at": T0 - timedelta(days=30), "ip_hash": None, "device_hash": None, **columns,
    }  # fmt: skip


def value(row: np.ndarray, name: str) -> float:
    return float(row[NAMES.index(name)])


few = st.sampled_from
streams = st.lists(
    st.fixed_dictionaries(
        {
            "at": st.integers(0, 1200) | few([0, 60, 360, 420, 720]),
            "actor_id": few(["ann", "bob", "cy"]),
            "recipient_id": few([None, "r1", "r2"]),
            "channel_id": few(["h1", "h2"]),
            "community_id": few(["c1", "c2"]),
            "kind": few(["message", "dm"]),
            "text": few(TEXTS),
            "ip_hash": few([None, "i1"]),
            "device_hash": few([None, "d1", "d2"]),
        }
    ),
    min_size=1,
    max_size=40,
).map(lambda rows: [event(i, **row) for i, row in enumerate(sorted(rows, key=lambda r: r["at"]))])


def frame(events: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(events, infer_schema_length=None, schema_overrides={
        "recipient_id": pl.String, "ip_hash": pl.String, "device_hash": pl.String})  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(streams, st.integers(0, 19))
def test_replaying_six_hours_equals_a_state_that_lived_for_ever(
    events: list[dict[str, Any]], hour: int
) -> None:
    start, end = T0 + timedelta(hours=hour), T0 + timedelta(hours=hour + 1)
    lasting = dict(zip([e["event_id"] for e in events], BehaviourState().observe_many(events), strict=True))
    wanted = [e for e in events if start <= e["ts"] < end]
    before = [e for e in events if start - timedelta(hours=6) <= e["ts"] < start]
    if not wanted:
        return
    table = featurise(frame(wanted), frame(before) if before else None)
    served = np.stack([lasting[e["event_id"]] for e in wanted])
    np.testing.assert_array_equal(table.select(NAMES).to_numpy(), served)


@settings(max_examples=40, deadline=None)
@given(streams, streams, st.integers(0, 20))
def test_no_value_depends_on_what_happens_later(
    events: list[dict[str, Any]], other: list[dict[str, Any]], hour: int
) -> None:
    now = T0 + timedelta(hours=hour)
    past = [e for e in events if e["ts"] < now]
    future = [{**e, "event_id": "x" + e["event_id"]} for e in other if e["ts"] >= now]
    changed = BehaviourState().observe_many(past + future)[: len(past)]
    np.testing.assert_array_equal(changed, BehaviourState().observe_many(past))


@settings(max_examples=40, deadline=None)
@given(streams, st.randoms(use_true_random=False))
def test_rows_keep_their_number_and_order(events: list[dict[str, Any]], rng: Any) -> None:
    shuffled = list(events)
    rng.shuffle(shuffled)
    table = featurise(frame(shuffled))
    assert table["event_id"].to_list() == [e["event_id"] for e in shuffled]
    assert table.columns == ["event_id", *NAMES]
    assert table.join(featurise(frame(events)), on=table.columns, nulls_equal=True).height == len(events)


@settings(max_examples=40, deadline=None)
@given(streams)
def test_nothing_is_left_when_six_hours_have_passed(events: list[dict[str, Any]]) -> None:
    state = BehaviourState()
    state.observe_many(events)
    row = state.observe(event(9999, 1200 + 361))
    np.testing.assert_array_equal(row, BehaviourState().observe(event(9999, 1200 + 361)))
    assert len(state) == 1
    assert all(len(table) <= 1 for table in (state._actors, state._campaigns, state._domains, state._ips))


def test_windows_hold_what_is_younger_than_their_length() -> None:
    state = BehaviourState()
    rows = state.observe_many([event(0, 0), event(1, 59), event(2, 60), event(3, 360), event(4, 419.5)])
    assert [value(row, "actor_events_1h") for row in rows] == [1, 2, 2, 1, 2]
    assert [value(row, "actor_events_6h") for row in rows] == [1, 2, 3, 3, 3]


def test_fan_out_and_gap() -> None:
    state = BehaviourState()
    rows = state.observe_many(
        [event(i, i / 60, recipient_id=f"r{i % 3}", channel_id=f"h{i}", kind="dm") for i in range(6)]
    )
    assert value(rows[-1], "actor_recipients_1h") == 3
    assert value(rows[-1], "new_recipient_share_6h") == pytest.approx(0.5)
    assert value(rows[-1], "actor_channels_1h") == 6
    assert value(rows[-1], "actor_gap_log") == pytest.approx(np.log1p(1))
    assert value(rows[0], "actor_gap_log") == pytest.approx(np.log1p(6 * 3600))
    assert value(rows[-1], "is_dm") == 1


def test_a_campaign_is_counted_by_actors_however_it_is_written() -> None:
    texts = [
        "Claim FREE nitro at evil.com/1 now",
        "claim fr\u200bee nitro at evil.com/22 now",
        "claim free nitro at evil[.]com/1 now",
    ]
    state = BehaviourState()
    rows = [state.observe(event(i, i, actor_id=f"a{i}", text=text)) for i, text in enumerate(texts)]
    again = state.observe(event(3, 3, actor_id="a0", text=texts[0]))
    assert [value(row, "campaign_actors_1h") for row in rows] == [1, 2, 3]
    assert value(again, "campaign_actors_1h") == 3
    assert value(again, "domain_actors_6h") == 3
    assert value(state.observe(event(4, 4, text="hi")), "campaign_actors_1h") == 1


def test_accounts_behind_an_address_and_a_device() -> None:
    state = BehaviourState()
    rows = [
        state.observe(event(i, i, actor_id=f"a{i}", ip_hash="i", device_hash=f"d{i % 2}")) for i in range(4)
    ]
    assert value(rows[-1], "ip_actors_6h") == 4
    assert value(rows[-1], "device_actors_6h") == 2


def test_a_brand_new_account_keeps_its_row() -> None:
    table = featurise(
        frame([event(0, 0, account_created_at=T0), event(1, 1, account_created_at=T0 + timedelta(hours=1))])
    )
    assert table.height == 2
    assert table["account_age_hours_log"].to_list() == [0.0, 0.0]


def test_without_a_sender_behaviour_is_nan_and_text_is_not() -> None:
    events = [event(i, i) for i in range(3)]
    table = featurise(frame(events), behaviour=False)
    assert table.height == 3
    for feature in FEATURES:
        assert table[feature.name].is_nan().all() == feature.needs_actor
    alone = BehaviourState().observe(event(0, 0, actor_id=None))
    np.testing.assert_array_equal(alone, BehaviourState(has_actor=False).observe(event(0, 0)))


def test_a_repeated_event_gets_its_first_row_and_changes_nothing() -> None:
    state = BehaviourState()
    first = state.observe(event(0, 0))
    second = state.observe(event(1, 1))
    np.testing.assert_array_equal(state.observe(event(0, 0)), first)
    np.testing.assert_array_equal(state.observe(event(1, 1)), second)
    assert len(state) == 2


def test_a_late_event_counts_as_of_the_newest_time_and_moves_no_clock() -> None:
    state = BehaviourState()
    state.observe(event(0, 600))
    late = state.observe(event(1, 0))
    assert value(late, "actor_events_1h") == 2
    assert value(state.observe(event(2, 601)), "actor_events_1h") == 3


def test_repeated_ids_are_refused() -> None:
    with pytest.raises(InvalidInput, match="repeat an event_id"):
        featurise(frame([event(0, 0), event(0, 1)]))


def test_an_event_without_time_is_refused() -> None:
    with pytest.raises(InvalidInput, match="needs an event_id and a ts"):
        BehaviourState().observe({"event_id": "e1", "ts": None})


def test_no_events_give_a_table_with_all_columns() -> None:
    assert featurise(frame([event(0, 0)]).clear()).columns == ["event_id", *NAMES]


def test_rewriting_a_text_changes_text_features_alone() -> None:
    rows = BehaviourState().observe_many([event(0, 0, text="claim nitro"), event(1, 1, text="hello")])
    changed = with_text(rows, ["cl\u200baim nitr0 at evil.com", "hello"])
    np.testing.assert_array_equal(changed[:, TEXT_FEATURES:], rows[:, TEXT_FEATURES:])
    np.testing.assert_array_equal(changed[1], rows[1])
    assert value(changed[0], "text_obfuscation") > 0 == value(rows[0], "text_obfuscation")
    assert value(changed[0], "text_domains") == 1
    names = ["actor_gap_log", "text_domains", "is_dm"]
    some = with_text(np.zeros((1, 3), dtype=np.float32), ["evil.com"], names)
    np.testing.assert_array_equal(some, [[0, 1, 0]])
    with pytest.raises(InvalidInput, match="do not fit"):
        with_text(np.zeros((1, 3), dtype=np.float32), ["evil.com"])


def test_a_table_with_extra_missing_or_repeated_columns_is_refused() -> None:
    check_columns(["event_id", *NAMES, "features_version"])
    for columns in ([*NAMES, "surprise"], NAMES[1:], [*NAMES, NAMES[0]]):
        with pytest.raises(InvalidInput, match="does not have the columns"):
            check_columns(columns)


def test_the_declaration_is_complete() -> None:
    assert len(set(NAMES)) == len(NAMES)
    assert all(feature.sentence.endswith(".") for feature in FEATURES)
    assert [f.family for f in FEATURES] == sorted((f.family for f in FEATURES), reverse=True)
    assert FEATURES_VERSION.startswith("1-")
