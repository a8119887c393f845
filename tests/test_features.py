"""Claims about features: stories of what they count, what is refused, and the tables that keep them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest

from assets.environment import Environment
from assets.features import features as features_asset
from assets.partitions import partition_of
from redqueen.errors import InvalidInput
from redqueen.features import (
    ACTORLESS,
    AGGREGATES,
    FEATURES,
    FEATURES_VERSION,
    LOOKBACK,
    NAMES,
    TEXT_FEATURES,
    InProcess,
    check_columns,
    check_table,
    featurise,
    finish,
    prepare,
    prepare_hour,
    read_prepared,
    stamped,
    with_text,
)
from redqueen.features.finish import SNAPSHOTS
from redqueen.features.online import source_of
from redqueen.store import DirectoryStore
from redqueen.tables import hour_key, read_hours, write_part

T0 = datetime(2026, 1, 3, tzinfo=UTC)
BAIT = "claim free nitro at evil.com/1 now"


def event(number: int, at: float, **columns: Any) -> dict[str, Any]:
    """An event `at` minutes after T0, known at once."""
    return {
        "event_id": f"e{number:04}", "ts": T0 + timedelta(minutes=at), "actor_id": "ann",
        "community_id": "c1", "community_size": 100, "channel_id": "h1", "recipient_id": None,
        "kind": "message", "text": "hello",
        "account_created_at": T0 - timedelta(days=30), "ip_hash": None, "device_hash": None, **columns,
    }  # fmt: skip


def observe(engine: InProcess, *events: dict[str, Any]) -> np.ndarray:
    """The features [n, F] of events as they are served."""
    rows = [prepare(one) for one in events]
    return finish(
        engine.observe(rows),
        np.array([row.direct for row in rows]),
        np.full((len(rows), len(SNAPSHOTS)), np.nan),
        np.array([row.actor is not None for row in rows]),
    )


def value(row: np.ndarray, name: str) -> float:
    return float(row[NAMES.index(name)])


def frame(events: list[dict[str, Any]]) -> pl.DataFrame:
    names = dict.fromkeys(("actor_id", "recipient_id", "ip_hash", "device_hash"), pl.String)
    return pl.DataFrame(events, infer_schema_length=None, schema_overrides=names)


# --- stories ------------------------------------------------------------------------------------------------


def test_a_window_is_between_its_length_and_a_hop_longer() -> None:
    rows = observe(InProcess(), event(0, 0), event(1, 59), event(2, 64), event(3, 65), event(4, 130))
    assert [value(row, "actor_events_1h") for row in rows] == [1, 2, 3, 3, 1]
    assert [value(row, "actor_events_6h") for row in rows] == [1, 2, 3, 4, 5]


def test_fan_out_and_gap() -> None:
    rows = observe(
        InProcess(),
        *(event(i, i / 60, recipient_id=f"r{i % 3}", channel_id=f"h{i}", kind="dm") for i in range(6)),
    )
    assert value(rows[-1], "actor_recipients_1h") == 3
    assert value(rows[-1], "new_recipient_share_24h") == pytest.approx(0.5)
    assert value(rows[-1], "actor_channels_1h") == 6
    assert value(rows[-1], "actor_gap_log") == pytest.approx(np.log1p(1))
    assert value(rows[0], "actor_gap_log") == pytest.approx(np.log1p(6 * 3600))
    assert value(rows[-1], "is_dm") == value(rows[-1], "actor_dm_share_6h") == 1
    assert value(rows[-1], "pair_events_24h") == 2


def test_a_campaign_is_counted_by_actors_however_it_is_written() -> None:
    engine = InProcess()
    texts = [
        "Claim FREE nitro at evil.com/1 now",
        "claim fr\u200bee nitro at evil.com/22 now",
        "claim free nitro at evil[.]com/1 now",
    ]
    rows = [observe(engine, event(i, i, actor_id=f"a{i}", text=text))[0] for i, text in enumerate(texts)]
    (again,) = observe(engine, event(3, 3, actor_id="a0", text=texts[0]))
    assert [value(row, "campaign_actors_1h") for row in rows] == [1, 2, 3]
    assert value(again, "campaign_actors_1h") == value(again, "domain_actors_6h") == 3
    assert value(again, "actor_repeats_24h") == 2
    assert value(again, "actor_text_variety_24h") == 0.5
    assert value(rows[2], "text_cloaked_domains") == 1
    (short,) = observe(engine, event(4, 4, text="hi"))
    assert value(short, "campaign_actors_1h") == 0


def test_a_campaign_has_the_same_name_in_every_process() -> None:
    assert prepare(event(0, 0, text=BAIT)).campaign == "7c3c8447f7955121"


def test_of_several_domains_the_busiest_counts() -> None:
    engine = InProcess()
    observe(engine, *(event(i, i, actor_id=f"a{i}", text="look at busy.com") for i in range(3)))
    (row,) = observe(engine, event(9, 9, text="look at quiet.com and busy.com"))
    assert (value(row, "domain_actors_6h"), value(row, "domain_events_1h")) == (4, 4)


def test_accounts_behind_an_address_and_a_device() -> None:
    rows = observe(
        InProcess(),
        *(event(i, i, actor_id=f"a{i}", ip_hash="i", device_hash=f"d{i % 2}") for i in range(4)),
    )
    assert value(rows[-1], "ip_actors_6h") == 4
    assert value(rows[-1], "device_actors_24h") == 2


def test_bursts_have_no_entropy_and_an_even_hour_has_much() -> None:
    burst = observe(InProcess(), *(event(i, 0) for i in range(12)))[-1]
    even = observe(InProcess(), *(event(i, 5 * i) for i in range(12)))[-1]
    assert value(burst, "actor_burst_entropy_1h") == 0
    assert value(even, "actor_burst_entropy_1h") == pytest.approx(np.log(12), abs=1e-6)


def test_a_brand_new_account_keeps_its_row() -> None:
    table = featurise(
        frame([event(0, 0, account_created_at=T0), event(1, 1, account_created_at=T0 + timedelta(hours=1))])
    )
    assert table.height == 2
    assert table["account_age_hours_log"].to_list() == [0.0, 0.0]


def test_without_a_sender_only_what_needs_none_has_a_value() -> None:
    table = featurise(frame([event(i, i) for i in range(3)]), behaviour=False)
    assert [name for name in NAMES if not table[name].is_nan().all()] == list(ACTORLESS)
    (alone,) = observe(InProcess(), event(0, 0, actor_id=None))
    np.testing.assert_array_equal(table.select(NAMES).to_numpy()[0], alone.astype(np.float32))


def test_a_copy_gets_the_first_row_and_a_backfill_looks_like_no_burst() -> None:
    engine = InProcess()
    first, second = observe(engine, event(0, 0)), observe(engine, event(1, 1))
    copy = event(0, 0, received_at=T0 + timedelta(minutes=50))
    np.testing.assert_array_equal(observe(engine, copy), first)
    backfill = [event(i, 2, received_at=T0 + timedelta(hours=2)) for i in range(10, 20)]
    assert {value(row, "actor_events_24h") for row in observe(engine, *backfill)} == {1.0}
    assert value(observe(engine, event(30, 3))[0], "actor_events_24h") == 3
    assert value(second[0], "actor_events_24h") == 2


def test_each_day_reads_its_own_snapshot_and_a_day_without_one_is_nan() -> None:
    asked = []

    class Told:
        def lookup(self, actors: Any, recipients: Any, hosts: Any) -> np.ndarray:
            assert (actors, recipients, hosts) == (["ann"], [None], [["evil.com"]])
            return np.full((len(actors), len(SNAPSHOTS)), 7.0)

    def of_day(day: Any) -> Told | None:
        asked.append(f"{day}")
        return Told() if f"{day}" == "2026-01-03" else None

    table = featurise(frame([event(0, 119), event(1, 120, text=BAIT)]), snapshots=of_day)
    assert asked == ["2026-01-02", "2026-01-03"]
    assert np.isnan(table["graph_trust"][0])
    assert table["graph_trust"][1] == 7


# --- what is refused ----------------------------------------------------------------------------------------


def test_an_event_without_id_or_time_is_refused() -> None:
    for lacking in ({"event_id": "e1", "ts": None}, {"ts": T0}):
        with pytest.raises(InvalidInput, match="needs an event_id and a ts"):
            prepare(lacking)
    with pytest.raises(InvalidInput, match="1 of 2 events: ts does not say when"):
        featurise(frame([event(0, 0), {**event(1, 1), "ts": None}]))
    with pytest.raises(InvalidInput, match="no column 'event_id'"):
        featurise(frame([event(0, 0)]).drop("event_id"))


def test_no_events_give_a_table_with_all_columns() -> None:
    assert featurise(frame([event(0, 0)]).clear()).columns == ["event_id", *NAMES]
    assert InProcess().observe([]).shape == (0, len(AGGREGATES))


def test_columns_that_are_not_exactly_the_declared_ones_are_refused() -> None:
    check_columns(["event_id", *NAMES, "features_version"])
    check_columns(NAMES)
    for columns, why in (
        ([*NAMES, "surprise"], "extra .'surprise'"),
        (NAMES[1:], f"missing .'{NAMES[0]}'"),
        ([*NAMES, NAMES[0]], f"repeated .'{NAMES[0]}'"),
        (["event_id", "event_id", *NAMES], "repeated .'event_id'"),
        (NAMES[::-1], "another order"),
        ([*NAMES, "event_id"], "another order"),
    ):
        with pytest.raises(InvalidInput, match=why):
            check_columns(columns)


def test_a_table_with_rows_twice_or_of_another_version_is_refused() -> None:
    table = stamped(featurise(frame([event(0, 0), event(1, 1)])))
    check_table(table)
    with pytest.raises(InvalidInput, match="1 of 3 rows repeat an event_id"):
        check_table(pl.concat([table, table[:1]]))
    with pytest.raises(InvalidInput, match=f"of version 1-old, not {FEATURES_VERSION}"):
        check_table(table.with_columns(features_version=pl.lit("1-old")))


def test_rewriting_a_text_changes_text_features_alone() -> None:
    rows = observe(InProcess(), event(0, 0, text="claim nitro"), event(1, 1, text="hello")).astype(np.float32)
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


def test_the_declaration_is_complete() -> None:
    assert len(set(NAMES)) == len(NAMES) >= 40
    assert all(feature.sentence.endswith(".") and feature.fake for feature in FEATURES)
    assert [f.family for f in FEATURES] == sorted(
        (f.family for f in FEATURES), key="text behaviour graph".find
    )
    assert {feature.cost for feature in FEATURES} == {"free", "window", "snapshot"}
    assert FEATURES_VERSION.startswith("3-")
    assert timedelta(hours=27) == LOOKBACK


def test_the_generated_source_can_be_read() -> None:
    assert source_of("pair").startswith("def step(key, tile):")


# --- tables -------------------------------------------------------------------------------------------------


def fill(store: DirectoryStore, hours: int) -> list[datetime]:
    """Some traffic by the hour of arrival; in every hour an event of the hour before."""
    rng = np.random.default_rng(5)
    for hour in range(hours):
        rows = [
            event(
                100 * hour + i, at, received_at=T0 + timedelta(hours=hour, minutes=1 + i), text=BAIT,
                actor_id=f"a{rng.integers(3)}", recipient_id=f"a{rng.integers(4)}",
            )
            for i, at in enumerate([60 * hour - 20, 60 * hour, 60 * hour + 2])
        ]  # fmt: skip
        write_part(store, "ingested/events", T0 + timedelta(hours=hour), frame(rows))
    return [T0 + timedelta(hours=hour) for hour in range(hours)]


def test_prepared_events_hold_no_text_and_are_made_again_where_they_are_missing_or_old(
    tmp_path: Path,
) -> None:
    store = DirectoryStore(tmp_path)
    hours = fill(store, 3)
    whole = read_prepared(store, hours[0], hours[-1] + timedelta(hours=1))
    assert whole.height == 9
    (key,) = store.list(hour_key("prepared", hours[1]))
    table = pl.read_parquet(store.get(key).data)
    assert {"event_id", "actor_id", "recipient_id"} < set(table.columns)
    assert BAIT not in str(table.rows())
    write_part(store, "prepared", hours[1], table.head(1).with_columns(features_version=pl.lit("0-old")))
    store.delete(store.list(hour_key("prepared", hours[2]))[0])
    assert read_prepared(store, hours[0], hours[-1] + timedelta(hours=1)).equals(whole)
    assert read_prepared(store, hours[-1] + timedelta(hours=1), hours[-1] + timedelta(hours=2)).is_empty()
    assert prepare_hour(store, hours[0]).height == 3


def test_a_range_of_hours_in_one_run_is_what_the_hours_are_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("assets.features.BLOCK_HOURS", 3)
    tables = []
    for folder, ranges in (("one", [(0, 7)]), ("by one", [(i, i) for i in range(8)])):
        env = Environment(home=str(tmp_path / folder))
        assert isinstance(env.store, DirectoryStore)
        hours = fill(env.store, 8)
        for start, end in ranges:
            tags = {
                "dagster/asset_partition_range_start": partition_of(hours[start]),
                "dagster/asset_partition_range_end": partition_of(hours[end]),
            }
            done = dg.materialize(
                [features_asset], resources={"env": env}, instance=dg.DagsterInstance.ephemeral(), tags=tags
            )
            assert done.success
        tables.append(read_hours(env.store, "features", hours[0], hours[-1] + timedelta(hours=1)))
    events = read_hours(env.store, "ingested/events", hours[0], hours[-1] + timedelta(hours=1))
    assert tables[0].equals(tables[1])
    assert tables[0].equals(stamped(featurise(events)))


@pytest.mark.parametrize("text", ["ab-" * 60_000 + " x.y", "-" * 150_000 + ".a", "a." * 90_000])
def test_no_message_holds_the_others_up(text: str) -> None:
    # Some milliseconds; with time that grows with the square of the length it would be minutes.
    assert prepare(event(1, 0, text=text)).chars == len(text)


def test_a_message_that_names_thousands_of_hosts_is_counted_as_one_with_many() -> None:
    row = prepare(event(1, 0, text=" ".join(f"host{i}.com" for i in range(9_000))))
    assert len(row.hosts) == 64
