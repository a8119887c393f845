"""The graph snapshot: every number by hand, nothing known later in it, the same however it was built."""

from __future__ import annotations

import io
import json
import math
import os
import re
import subprocess
import sys
import time
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from polars.testing import assert_frame_equal

from assets.environment import Environment
from assets.graph import graph_snapshot
from assets.partitions import daily, hourly, partition_of
from redqueen import graph, graphmath, ties
from redqueen.clock import StoreClock
from redqueen.features.declared import FEATURES, SNAPSHOT_LAG, Snapshot
from redqueen.schema import polars_schema
from redqueen.store import DirectoryStore
from redqueen.tables import HOUR, write_part
from sensors.graph import daily_graph

DAY = timedelta(days=1)
AS_OF = datetime(2026, 1, 10, tzinfo=UTC)
TODAY = AS_OF.date()
OLD = AS_OF - 400 * DAY
ROOT = Path(__file__).resolve().parents[1]


def frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Events with what the rows leave out filled in."""
    usual = {
        "ts": AS_OF - DAY, "received_at": AS_OF - DAY, "actor_id": "a", "community_id": "c",
        "community_size": 9,
        "channel_id": "h", "kind": "dm", "text": "hello", "account_created_at": AS_OF - 3 * DAY,
    }  # fmt: skip
    full = [usual | {"event_id": f"e{i}"} | row for i, row in enumerate(rows)]
    return pl.DataFrame(full, schema=polars_schema("events"), infer_schema_length=None)


def event(actor: str, to: str | None = None, response: str | None = None, **more: Any) -> dict[str, Any]:
    return {"actor_id": actor, "recipient_id": to, "response": response, **more}


def computed(rows: list[dict[str, Any]], as_of: datetime = AS_OF) -> graphmath.Numbers:
    events = frame(rows)
    return graphmath.numbers(ties.known_before(ties.ties(events, ties.hosts_of(events)), as_of), as_of)


def of(found: graphmath.Numbers, actor: str) -> dict[str, float]:
    """An account's numbers; a newcomer's where it has no row."""
    rows = found.actors.filter(pl.col("actor_id") == actor).to_dicts()
    return rows[0] if rows else found.newcomer


def near(value: float) -> Any:
    return pytest.approx(value, abs=1e-6)


# --- by hand ------------------------------------------------------------------------------------------------


def test_the_declared_snapshot_features_are_what_is_computed() -> None:
    found = computed([event("a", "b")])
    domains, _ = graphmath.domains(pl.DataFrame(schema=ties.DOMAINS), None, AS_OF)
    have = {("actor", c) for c in found.actors.columns} | {("recipient", c) for c in found.recipients.columns}
    have |= {("domain", c) for c in domains.columns}
    declared = [f.value for f in FEATURES if isinstance(f.value, Snapshot)]
    assert [(value.of, value.column) for value in declared] == list(graph.COLUMNS)
    assert set(graph.COLUMNS) <= have


def test_reach_counts_people_not_messages() -> None:
    found = computed([event("a", "b")] * 5 + [event("a", "c"), event("a", "a"), event("a", None)])
    assert of(found, "a")["reach_log"] == near(math.log(3))


def test_reciprocity_is_the_share_that_wrote_back_drawn_to_the_mean_over_accounts() -> None:
    # a: b wrote back and c replied, of four. b: a wrote to it. x: nobody of one.
    rows = [event("a", to) for to in "bde"] + [event("a", "c", "reply"), event("b", "a"), event("x", "y")]
    found = computed(rows)
    usual = (2 / 4 + 1 + 0) / 3
    assert found.newcomer["reciprocity"] == near(usual)
    assert of(found, "a")["reciprocity"] == near((2 + 4 * usual) / (4 + 4))
    assert of(found, "x")["reciprocity"] == near((0 + 4 * usual) / (1 + 4))
    assert of(found, "nobody")["reciprocity"] == near(usual)


def test_acceptance_counts_each_answering_person_once_and_a_block_outweighs_what_came_before() -> None:
    rows = [event("a", "b", "accept")] * 50  # one accomplice, however often
    rows += [event("a", "c", "decline"), event("a", "d", "reply"), event("a", "d", "block"), event("a", "e")]
    rows += [event("z", "y", "accept")]
    found = computed(rows)
    usual = (1 / 3 + 1) / 2
    assert of(found, "a")["acceptance"] == near((1 + 4 * usual) / (3 + 4))
    blocked = (1 / 4 + 0) / 2
    assert of(found, "a")["blocked"] == near((1 + 4 * blocked) / (4 + 4))
    assert of(found, "z")["blocked"] == near((0 + 4 * blocked) / (1 + 4))


def test_nobody_was_ever_answered() -> None:
    assert computed([event("a", "b")]).newcomer["acceptance"] == 0.5


def test_the_busiest_machine_counts() -> None:
    rows = [event(f"u{i}", device_hash="farm", ip_hash=f"ip{i}") for i in range(7)]
    rows += [event("u0", device_hash="phone", ip_hash="ip1"), event("u9", device_hash="phone")]
    found = computed(rows)
    assert of(found, "u0")["device_accounts_log"] == near(math.log(7))
    assert of(found, "u9")["device_accounts_log"] == near(math.log(2))
    assert of(found, "u1")["ip_accounts_log"] == near(math.log(2))
    assert of(found, "u9")["ip_accounts_log"] == of(found, "nobody")["ip_accounts_log"] == 0.0


def test_neighbour_reciprocity_is_the_mean_over_those_written_to() -> None:
    rows = [event("a", "b"), event("a", "c"), event("b", "d"), event("d", "b")]
    found = computed(rows)
    usual = (0 / 2 + 1 + 1) / 3
    b, c = (1 + 4 * usual) / (1 + 4), usual
    assert of(found, "a")["neighbour_reciprocity"] == near((b + c) / 2)


def test_popularity_counts_distinct_senders() -> None:
    found = computed([event("a", "v"), event("a", "v"), event("b", "v"), event("v", "a")])
    popular = dict(found.recipients.iter_rows())
    assert popular["v"] == near(math.log(3))
    assert popular["a"] == near(math.log(2))
    assert "b" not in popular


def test_a_domain_is_as_old_as_its_first_sight_and_known_by_its_senders() -> None:
    rows = [
        event("a", received_at=AS_OF - 9 * DAY, text="see evil.com"),
        event("b", received_at=AS_OF - 3 * DAY, text="see https://www.evil.com/x"),
        event("b", received_at=AS_OF - DAY, text="see evil.com or fresh.com"),
    ]
    events = frame(rows)
    found = ties.known_before(ties.ties(events, ties.hosts_of(events)), AS_OF)
    table, _ = graphmath.domains(found.domains, None, AS_OF)
    by_host = {row["host"]: row for row in table.iter_rows(named=True)}
    assert by_host["evil.com"]["domain_age_days_log"] == near(math.log1p(9))
    assert by_host["evil.com"]["domain_actors_log"] == near(math.log1p(2))
    assert by_host["fresh.com"]["domain_age_days_log"] == near(math.log1p(1))


def test_hosts_prepared_before_are_taken_and_the_others_read() -> None:
    events = frame([{"text": "go to one.com"}, {"text": "go to two.com"}, {"text": None}])
    prepared = pl.DataFrame({"event_id": ["e0", "other"], "hosts": [["known.com"], []]})
    assert ties.hosts_of(events, prepared).to_list() == [["known.com"], ["two.com"], None]
    assert ties.hosts_of(events).to_list() == [["one.com"], ["two.com"], None]


# --- lockstep -----------------------------------------------------------------------------------------------


def _lockstep(targets: dict[str, list[str]], answered: tuple[tuple[str, str], ...] = ()) -> dict[str, float]:
    rows = [event(a, to) for a, many in targets.items() for to in many] + [event(b, a) for a, b in answered]
    found = computed(rows)
    return {actor: of(found, actor)["lockstep"] for actor in targets}


def test_lockstep_is_the_cosine_over_unanswered_recipients_weighted_by_rarity() -> None:
    targets = {"a": list("rstu"), "b": list("rstv"), "c": ["r", "x"], "d": ["y"]}
    found = _lockstep(targets)
    r, pair, alone = math.log(4 / 3) ** 2, math.log(4 / 2) ** 2, math.log(4 / 1) ** 2
    shared = r + 2 * pair
    assert found["a"] == found["b"] == near(shared / (shared + alone))
    assert found["c"] == found["d"] == 0.0, "fewer than three in common is chance"


def test_friends_who_answer_each_other_are_not_in_lockstep() -> None:
    group = [f"f{i}" for i in range(6)]
    targets = {a: [b for b in group if b != a] for a in group} | {"stranger": ["q"]}
    assert set(_lockstep(targets).values()) == {0.0}


def test_whom_everybody_writes_to_weighs_nothing() -> None:
    targets = {f"u{i}": ["bot", "help", "mod", f"own{i}"] for i in range(9)}
    assert set(_lockstep(targets).values()) == {0.0}


def test_a_crowd_does_not_hide_a_crowd() -> None:
    """A victim list that 300 accounts share makes its victims popular; it must show all the same."""
    victims = [f"v{i}" for i in range(12)]
    crowd = {f"spam{i}": victims[i % 3 : i % 3 + 9] for i in range(300)}
    honest = {f"u{i}": [f"p{i}", f"q{i}", f"r{i}", victims[i % 12]] for i in range(1000)}
    found = _lockstep(crowd | honest)
    assert min(found[name] for name in crowd) > 0.9
    assert max(found[name] for name in honest) == 0.0


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_lockstep_is_what_comparing_all_pairs_gives(data: st.DataObject) -> None:
    edge = st.tuples(st.integers(0, 11), st.integers(12, 22))
    pairs = sorted(data.draw(st.sets(edge, min_size=1, max_size=90)))
    src, dst = np.array(pairs, dtype=np.int64).T
    best, partner = graphmath.lockstep(src, dst, np.ones(len(src), dtype=bool), 23)
    assert best == pytest.approx(_all_pairs(pairs, 23), abs=1e-12)
    assert ((best == 0) | (partner >= 0)).all()


def _all_pairs(pairs: list[tuple[int, int]], n: int) -> list[float]:
    senders = {a for a, _ in pairs}
    of_sender = {a: {b for x, b in pairs if x == a} for a in senders}
    degree = {b: sum(y == b for _, y in pairs) for _, b in pairs}
    weight = {b: math.log(len(senders) / d) ** 2 for b, d in degree.items()}
    norm = {a: math.sqrt(sum(weight[b] for b in to)) for a, to in of_sender.items()}
    best = [0.0] * n
    for a in senders:
        for other in senders - {a}:
            shared = {b for b in of_sender[a] & of_sender[other] if weight[b] > 0}
            if len(shared) >= graphmath.MIN_SHARED:
                best[a] = max(best[a], sum(weight[b] for b in shared) / norm[a] / norm[other])
    return best


# --- trust --------------------------------------------------------------------------------------------------


def test_trust_by_hand() -> None:
    # A path s - m - f, seeded at s; two steps of a lazy walk.
    src, dst = np.array([0, 1]), np.array([1, 2])
    found = graphmath.trust(src, dst, np.array([True, False, False, False]), 4)
    # After one step (1/2, 1/2, 0), after two (1/4 + 1/8, 1/4 + 1/4, 1/8); over degrees 1, 2, 1; of 4 in all.
    fair = np.array([3 / 8 / 1, 1 / 2 / 2, 1 / 8 / 1]) * 4
    assert found[:3] == pytest.approx(fair / (1 + fair))
    assert found[3] == 0.0


def test_fakes_get_only_what_flows_through_their_few_ties_to_people() -> None:
    rng = np.random.default_rng(5)
    people, fakes = 400, 200
    honest = [(i, (i + step) % people) for i in range(people) for step in (1, 2, int(rng.integers(3, 200)))]
    ring = [(people + i, people + (i + step) % fakes) for i in range(fakes) for step in (1, 2, 3, 5, 8)]
    bridges = [(0, people), (77, people + 50)]
    src, dst = np.array(honest + ring + bridges).T
    seeds = np.zeros(people + fakes, dtype=bool)
    seeds[rng.choice(people, 20, replace=False)] = True
    found = graphmath.trust(src, dst, seeds, people + fakes)
    assert np.quantile(found[:people], 0.05) > np.quantile(found[people:], 0.95)
    assert found[people:].mean() < 0.1 * found[:people].mean()


def test_seeds_are_old_answered_and_unblocked() -> None:
    def mutual(a: str, others: str, **more: Any) -> list[dict[str, Any]]:
        return [event(a, b, **more) for b in others] + [event(b, a) for b in others]

    good = mutual("good", "xyz", account_created_at=OLD)
    assert computed(good).facts["seeds"] == 1
    young = mutual("young", "xyz", account_created_at=AS_OF - 89 * DAY)
    few = mutual("few", "xy", account_created_at=OLD)
    loud = mutual("loud", "xyz", account_created_at=OLD) + [event("loud", f"n{i}") for i in range(4)]
    blocked = [*mutual("hated", "xyz", account_created_at=OLD), event("hated", "x", "block")]
    for rows in (young, few, loud, blocked):
        assert computed(rows).facts["seeds"] == 0
        assert of(computed(rows), rows[0]["actor_id"])["trust"] == 0.0
    assert of(computed(good), "good")["trust"] > of(computed(good), "nobody")["trust"] == 0.0


def test_a_block_in_either_direction_ends_a_friendship() -> None:
    rows = [event("good", b, account_created_at=OLD) for b in "xyz"] + [event(b, "good") for b in "xyz"]
    rows += [event("x", "bad"), event("bad", "x")]
    assert of(computed(rows), "bad")["trust"] > 0
    assert of(computed([*rows, event("x", "bad", "block")]), "bad")["trust"] == 0.0
    assert of(computed([*rows, event("bad", "x", "block")]), "bad")["trust"] == 0.0


# --- laws ---------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["a", "b", "c", "d", "e", "f"])
HOURS = st.integers(-24 * 8, 24 * 3)


@st.composite
def streams(draw: st.DrawFn) -> list[dict[str, Any]]:
    """Events around the instant: answers before, at and after it, copies, machines, links."""
    rows = []
    for i in range(draw(st.integers(0, 25))):
        received = AS_OF + timedelta(hours=draw(HOURS))
        answer = draw(st.sampled_from([None, *ties.ANSWERS]))
        answered = received + timedelta(hours=draw(st.integers(-2, 60)))
        rows.append(
            event(
                draw(NAMES),
                draw(st.none() | NAMES),
                answer,
                event_id=f"e{draw(st.integers(0, i))}",
                received_at=received,
                ts=received,
                response_ts=draw(st.sampled_from([None, answered])) if answer else None,
                account_created_at=draw(st.sampled_from([OLD, received])),
                device_hash=draw(st.none() | st.sampled_from(["d1", "d2"])),
                text=draw(st.sampled_from(["hello", "see one.com", "see one.com and two.com"])),
            )
        )
    return rows


def everything(events: pl.DataFrame, as_of: datetime = AS_OF) -> list[pl.DataFrame]:
    known = ties.known_before(ties.ties(events, ties.hosts_of(events)), as_of)
    found = graphmath.numbers(known, as_of)
    newcomer = pl.DataFrame([found.newcomer])
    return [found.actors, found.recipients, newcomer, *graphmath.domains(known.domains, None, as_of)]


def assert_same(one: list[pl.DataFrame], other: list[pl.DataFrame]) -> None:
    for left, right in zip(one, other, strict=True):
        assert_frame_equal(left, right, check_exact=True)


@given(streams(), st.randoms())
@settings(max_examples=40, deadline=None)
def test_nothing_known_later_changes_anything(rows: list[dict[str, Any]], chance: Any) -> None:
    before = everything(frame(rows))
    changed = []
    for row in rows:
        if row["received_at"] >= AS_OF:
            if chance.random() < 0.5:
                changed.append(
                    row | event("f", "a", "block") | {"text": "see later.com", "device_hash": "d1"}
                )
        elif row["response"] and (row["response_ts"] or row["received_at"]) >= AS_OF:
            changed.append(row | {"response": chance.choice([None, "accept", "block"])})
        else:
            changed.append(row)
    assert_same(everything(frame(changed)), before)


@given(streams(), st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_rows_and_copies_of_them_do_not_matter(rows: list[dict[str, Any]], chance: Any) -> None:
    before = everything(frame(rows))
    shuffled = rows + [row for row in rows if chance.random() < 0.3]
    chance.shuffle(shuffled)
    assert_same(everything(frame(shuffled)), before)


@given(streams(), st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_ties_of_parts_merge_to_the_ties_of_the_whole(rows: list[dict[str, Any]], parts: int) -> None:
    events = frame(rows)
    whole = ties.ties(events, ties.hosts_of(events))
    pieces = [frame(rows[i::parts]) for i in range(parts)]
    merged = ties.merge([ties.ties(piece, ties.hosts_of(piece)) for piece in pieces])
    for name in ties.KEYS:
        assert_frame_equal(getattr(merged, name), getattr(whole, name), check_row_order=False)


def test_answers_and_events_count_strictly_before_the_instant() -> None:
    early, late = AS_OF - timedelta(microseconds=1), AS_OF
    told = [event("a", "b", "accept", received_at=early - HOUR, response_ts=early)]
    for rows, accepted in ((told, 1.0), ([told[0] | {"response_ts": late}], 0.5)):
        assert computed(rows).newcomer["acceptance"] == accepted
    assert computed([event("a", "b", received_at=late)]).facts["edges"] == 0
    assert computed([event("a", "b", received_at=early)]).facts["edges"] == 1


def test_an_answer_without_a_time_is_known_with_its_event() -> None:
    assert computed([event("a", "b", "accept")]).newcomer["acceptance"] == 1.0


# --- kept and looked up -------------------------------------------------------------------------------------


def land(store: DirectoryStore, rows: list[dict[str, Any]]) -> None:
    """Write rows as ingestion does, by the hour they were received in."""
    events = frame(rows)
    for (hour,), part in events.group_by(pl.col("received_at").dt.truncate("1h")):
        assert isinstance(hour, datetime)
        write_part(store, "ingested/events", hour, part)


def stream(days: int = 6, seed: int = 1) -> list[dict[str, Any]]:
    """Traffic of the days before the instant."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(days * 120):
        at = AS_OF - days * DAY + i * timedelta(hours=24 / 120)
        a, b = (f"u{k}" for k in rng.integers(0, 40, 2))
        answer = [None, None, "reply", "accept", "block", "decline"][rng.integers(0, 6)]
        rows.append(
            event(
                a,
                b,
                answer,
                event_id=f"s{seed}-{i}",
                received_at=at,
                ts=at,
                response_ts=at + timedelta(hours=float(rng.exponential(6))),
                account_created_at=OLD if rng.random() < 0.7 else at - DAY,
                device_hash=f"d{rng.integers(0, 30)}",
                text=f"look at site{rng.integers(0, 25)}.com",
            )
        )
    return rows


def opened(store: DirectoryStore, day: date = TODAY) -> graph.GraphSnapshot:
    snapshot = graph.open_snapshot(store, day)
    assert snapshot is not None
    return snapshot


def looked_up(snapshot: graph.GraphSnapshot) -> np.ndarray:
    names = [f"u{i}" for i in range(45)]
    hosts = [[f"site{i}.com", f"site{i + 1}.com"] if i % 3 else [] for i in range(45)]
    return snapshot.lookup(names, names[::-1], hosts)


def test_a_snapshot_built_day_by_day_is_the_one_built_from_scratch(tmp_path: Path) -> None:
    daily, scratch = DirectoryStore(tmp_path / "daily"), DirectoryStore(tmp_path / "scratch")
    for store in (daily, scratch):
        land(store, stream())
    for back in (4, 3, 2, 1, 0):
        marker = graph.build(daily, TODAY - back * DAY)
    assert marker == graph.build(scratch, TODAY)
    for key in marker["files"].values():
        assert daily.get(key).data == scratch.get(key).data
    assert np.array_equal(looked_up(opened(daily)), looked_up(opened(scratch)))


def test_an_hour_that_came_late_is_in_the_next_snapshot_and_changes_no_earlier_one(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    rows = stream()
    cut = AS_OF - DAY - 2 * HOUR
    late = [row for row in rows if cut <= row["received_at"] < cut + HOUR]
    land(store, [row for row in rows if row not in late])
    first = graph.build(store, TODAY - DAY)
    land(store, late)
    assert graph.build(store, TODAY - DAY) == first
    complete = DirectoryStore(tmp_path / "complete")
    land(complete, rows)
    assert graph.build(store, TODAY) == graph.build(complete, TODAY)


def test_a_domain_stays_old_when_its_ties_have_left_the_horizon_and_its_senders_were_erased(
    tmp_path: Path,
) -> None:
    store = DirectoryStore(tmp_path)
    seen = AS_OF - 40 * DAY
    land(store, [event("a", text="old.com", received_at=seen), event("b", text="new.com")])
    graph.build(store, (seen + DAY).date())
    carried = graph.complete(store, (seen + DAY).date())
    assert carried is not None
    key = carried["files"]["domain_actors"]
    gone = pl.read_parquet(io.BytesIO(store.get(key).data)).clear()
    out = io.BytesIO()
    gone.write_parquet(out)
    store.put(key, out.getvalue())
    # Neither does an upgrade make it new.
    day = (seen + DAY).date()
    store.put(graph.marker_key(day, "0-before"), store.get(graph.marker_key(day)).data)
    store.delete(graph.marker_key(day))
    graph.build(store, TODAY)
    age = graph.COLUMNS.index(("domain", "domain_age_days_log"))
    found = opened(store).lookup(
        ["x"] * 4, [None] * 4, [["old.com"], ["new.com"], ["old.com", "new.com"], []]
    )
    assert found[:, age] == pytest.approx([math.log1p(40), math.log1p(1), math.log1p(1), 0.0])


def test_whoever_is_not_known_reads_as_a_newcomer(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    land(store, stream())
    graph.build(store, TODAY)
    snapshot = opened(store)
    expected = [snapshot.newcomer.get(column, 0.0) for _, column in graph.COLUMNS]
    found = snapshot.lookup(["nobody", None], ["nobody", None], [["nowhere.com"], []])
    assert found.tolist() == [expected, expected]
    assert found.dtype == np.float64
    assert not np.isnan(looked_up(snapshot)).any()
    assert snapshot.lookup([], [], []).shape == (0, len(graph.COLUMNS))
    assert len(np.unique(looked_up(snapshot)[:40], axis=0)) == 40


def test_a_store_without_events_gives_a_snapshot_in_which_nobody_is_known(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    marker = graph.build(store, TODAY)
    assert marker["facts"]["accounts"] == 0
    assert marker["latest_received"] is None
    assert graph.as_of_holds(marker)
    assert opened(store).lookup(["a"], ["b"], [["c.com"]]).shape == (1, len(graph.COLUMNS))


def test_ties_older_than_the_horizon_do_not_count(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    land(
        store, [event("a", "b", received_at=AS_OF - 31 * DAY), event("c", "d", received_at=AS_OF - 29 * DAY)]
    )
    assert graph.build(store, TODAY)["facts"]["edges"] == 1


def test_only_complete_snapshots_of_this_version_are_opened(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    assert graph.open_snapshot(store, TODAY) is None
    marker = graph.build(store, TODAY)
    store.delete(graph.marker_key(TODAY))
    assert graph.open_snapshot(store, TODAY) is None
    store.put_json(graph.marker_key(TODAY, "0-other"), marker)
    assert graph.complete(store, TODAY) is None
    assert graph.open_snapshot(store, TODAY) is None
    store.put_json(graph.marker_key(TODAY), marker)
    assert graph.open_snapshot(store, TODAY) is not None
    store.delete(marker["files"]["recipients"])
    assert graph.open_snapshot(store, TODAY) is None


def test_of_two_that_build_the_same_day_the_first_is_served(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    one, two = ([event("a", to) for to in many] for many in ("bc", "bcd"))
    known = [
        ties.known_before(ties.ties(frame(rows), ties.hosts_of(frame(rows))), AS_OF) for rows in (one, two)
    ]
    first = graph.write(store, TODAY, known[0])
    assert graph.write(store, TODAY, known[1]) == first
    named = {*first["files"].values(), graph.marker_key(TODAY)}
    assert set(store.list(graph.day_key(TODAY))) == named


def test_the_manifest_tells_the_latest_instant_that_counted(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    rows = stream(days=7)
    land(store, [row | {"received_at": row["received_at"] + DAY} for row in rows])
    marker = graph.build(store, TODAY)
    assert AS_OF - HOUR < datetime.fromisoformat(marker["latest_received"]) < AS_OF
    assert datetime.fromisoformat(marker["latest_answer"]) < AS_OF
    assert graph.as_of_holds(marker)
    assert not graph.as_of_holds(marker | {"latest_answer": AS_OF.isoformat()})


def test_the_snapshot_keeps_what_erasure_looks_for(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    land(store, stream())
    graph.build(store, TODAY)
    for key in store.list("graph/"):
        if key.endswith(".parquet") and "/domains-" not in key:
            columns = pl.read_parquet_schema(io.BytesIO(store.get(key).data))
            assert {"actor_id", "recipient_id"} & set(columns), key


def test_the_day_an_event_reads_turns_with_the_lag() -> None:
    turn = int(AS_OF.timestamp() * 1_000_000) + SNAPSHOT_LAG
    assert graph.snapshot_day(turn) == TODAY
    assert graph.snapshot_day(turn - 1) == TODAY - DAY


# --- when it is due -----------------------------------------------------------------------------------------

LAST = AS_OF - HOUR


def hours(start: datetime, end: datetime) -> list[datetime]:
    return [start + HOUR * i for i in range((end - start) // HOUR)]


def test_a_snapshot_is_due_once_the_last_hour_was_taken_in() -> None:
    before = hours(AS_OF - 20 * HOUR, LAST)
    assert graph.due_days(AS_OF, [*before, LAST], [*before, LAST], [])[0] == [TODAY]
    due, why = graph.due_days(AS_OF, [*before, LAST], before, [])
    assert (due, why) == ([], "2026-01-10 waits for 01-09 23h to be taken in")
    assert graph.due_days(AS_OF, before, before, [])[0] == []
    assert graph.due_days(AS_OF + graph.GRACE, before, before, [])[0] == [TODAY]
    assert graph.due_days(AS_OF - HOUR, before, before, [])[0] == []
    assert graph.due_days(AS_OF, [*before, LAST], [*before, LAST], [TODAY])[0] == []
    assert graph.due_days(AS_OF, [], [], [])[0] == []


def test_missed_days_are_made_up_for_in_order_and_within_bounds() -> None:
    landed = hours(AS_OF - 20 * DAY, AS_OF)
    due, _ = graph.due_days(AS_OF, landed, landed, [TODAY - 2 * DAY])
    assert due == [TODAY - back * DAY for back in (6, 5, 4, 3, 1, 0)]
    # A backlog is still being taken in: what has not ended waits, and so does what comes after it.
    halfway = [hour for hour in landed if hour < AS_OF - 30 * HOUR]
    due, why = graph.due_days(AS_OF, landed, halfway, [])
    assert due == [TODAY - back * DAY for back in (6, 5, 4, 3, 2)]
    assert "waits for 01-08 18h" in why


def test_an_hour_that_cannot_be_taken_in_does_not_hold_snapshots_up_for_ever() -> None:
    landed = hours(AS_OF - DAY, AS_OF + 8 * HOUR)
    broken = [hour for hour in landed if hour != LAST]
    assert graph.due_days(AS_OF + 2 * HOUR, landed, broken[:-6], [])[0] == []
    assert graph.due_days(AS_OF + 8 * HOUR, landed, broken, [])[0] == [TODAY]


# --- in Dagster ---------------------------------------------------------------------------------------------


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    return Environment(home=str(tmp_path / "home"))


def materialize(
    env: Environment, instance: dg.DagsterInstance, day: date = TODAY
) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [graph_snapshot],
        partition_key=f"{day}",
        resources={"env": env},
        instance=instance,
        raise_on_error=False,
    )


def test_the_asset_tells_what_the_graph_looks_like(env: Environment) -> None:
    assert isinstance(env.store, DirectoryStore)
    land(env.store, stream())
    with dg.DagsterInstance.ephemeral() as instance:
        result = materialize(env, instance)
        assert result.success
        checks = {check.check_name: check.passed for check in result.get_asset_check_evaluations()}
        suite = {"graph_snapshot_expectations": True, "graph_snapshot_quality": True}
        assert checks == {"graph_as_of": True, **suite}
        (event_,) = result.asset_materializations_for_node("graph_snapshot")
        told = {name: value.value for name, value in event_.metadata.items()}
        assert {"accounts", "edges", "reciprocated_share", "seeds", "domains", "seconds"} <= set(told)
        assert not {f"u{i}" for i in range(40)} & set(re.findall(r"\w+", str(told))), "no account is named"
        before = {key: env.store.get(key).etag for key in env.store.list("graph/day=")}
        land(env.store, stream(seed=2))
        assert materialize(env, instance).success
        assert {key: env.store.get(key).etag for key in env.store.list("graph/day=")} == before


def test_a_day_that_has_not_begun_is_refused(env: Environment) -> None:
    StoreClock(env.store).set(AS_OF - HOUR)
    with dg.DagsterInstance.ephemeral() as instance:
        result = materialize(env, instance)
    assert not result.success
    assert not result.retry_attempts_for_node("graph_snapshot"), "waiting two seconds helps nobody"
    assert not env.store.list("graph/")


def test_a_day_is_made_of_the_hours_of_the_day_before() -> None:
    (dep,) = next(iter(graph_snapshot.specs)).deps
    assert isinstance(dep.partition_mapping, dg.TimeWindowPartitionMapping)
    found = dep.partition_mapping.get_upstream_mapped_partitions_result_for_partitions(
        daily.subset_with_partition_keys([f"{TODAY}"]), daily, hourly, None
    )
    keys = sorted(found.partitions_subset.get_partition_keys())
    assert keys == [partition_of(AS_OF - DAY + HOUR * i) for i in range(24)]


KILLED = """
import os, signal, sys
from datetime import date
import dagster as dg
from assets.environment import Environment
from assets.graph import graph_snapshot
from redqueen.store import DirectoryStore

left, write = [int(sys.argv[2])], DirectoryStore._write
def dies(self, path, data):
    if "graph" in str(path.relative_to(self.root)):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
    write(self, path, data)
DirectoryStore._write = dies
env = Environment(home=sys.argv[1])
with dg.DagsterInstance.ephemeral() as instance:
    dg.materialize([graph_snapshot], partition_key=sys.argv[3], resources={"env": env}, instance=instance)
"""


@pytest.mark.slow
@pytest.mark.parametrize("writes", [2, 10, 12])  # ties, tables, marker
def test_killed_half_way_it_is_not_there_and_run_again_it_is(
    env: Environment, tmp_path: Path, writes: int
) -> None:
    assert isinstance(env.store, DirectoryStore)
    land(env.store, stream(days=2))
    command = [sys.executable, "-c", KILLED, str(tmp_path / "home"), str(writes), f"{TODAY}"]
    died = subprocess.run(
        command, cwd=ROOT, capture_output=True, check=False, env={**os.environ, "DO_NOT_TRACK": "1"}
    )
    assert died.returncode == -9, died.stderr
    assert env.store.list("graph/")
    assert graph.open_snapshot(env.store, TODAY) is None
    with dg.DagsterInstance.ephemeral() as instance:
        assert materialize(env, instance).success
    whole = DirectoryStore(tmp_path / "whole")
    land(whole, stream(days=2))
    assert graph.complete(env.store, TODAY) == graph.build(whole, TODAY)


def tick(env: Environment, instance: dg.DagsterInstance, cursor: str | None = None) -> dg.SensorResult:
    context = dg.build_sensor_context(instance=instance, cursor=cursor, resources={"env": env})
    result = daily_graph(context)
    return result if isinstance(result, dg.SensorResult) else dg.SensorResult(skip_reason=result)


def test_the_sensor_asks_once_the_last_hour_was_taken_in_and_is_then_quiet(env: Environment) -> None:
    assert isinstance(env.store, DirectoryStore)
    clock = StoreClock(env.store)
    clock.set(AS_OF)
    rows = stream(days=1)
    with dg.DagsterInstance.ephemeral() as instance:
        for row in rows[::5]:
            write_part(env.store, "events", row["received_at"].replace(minute=0), frame([row]))
        waiting = tick(env, instance)
        assert not waiting.run_requests
        land(env.store, rows)
        asked = tick(env, instance, waiting.cursor)
        (request,) = asked.run_requests or ()
        assert request.tags["dagster/partition"] == f"{TODAY}"
        again = tick(env, instance, asked.cursor)
        assert [r.run_key for r in again.run_requests or ()] == [request.run_key]
        assert materialize(env, instance).success
        there = tick(env, instance, again.cursor)
        assert not there.run_requests
        assert json.loads(there.cursor or "")["there"] == f"{TODAY}"
        assert not tick(env, instance, there.cursor).run_requests


def test_a_backlog_is_one_run_over_a_range(env: Environment) -> None:
    from dagster_project.build import build_defs

    assert isinstance(env.store, DirectoryStore)
    StoreClock(env.store).set(AS_OF + 3 * HOUR)
    rows = stream(days=4)
    land(env.store, rows)
    with dg.DagsterInstance.ephemeral() as instance:
        (request,) = tick(env, instance).run_requests or ()
        job = build_defs(environment=env).resolve_job_def("graph")
        assert job.execute_in_process(tags=request.tags, instance=instance).success
        made = instance.get_materialized_partitions(dg.AssetKey("graph_snapshot"))
    # The instant's fourth day before is the first day of traffic: nothing was known at its midnight.
    assert made == {f"{TODAY - back * DAY}" for back in (3, 2, 1, 0)}
    assert all(graph.open_snapshot(env.store, TODAY - back * DAY) for back in (3, 2, 1, 0))


def test_a_stream_without_senders_has_no_graph(env: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQ_BEHAVIOUR", "false")
    with dg.DagsterInstance.ephemeral() as instance:
        assert not tick(env, instance).run_requests


# --- real accounts ------------------------------------------------------------------------------------------


def _otc(shared_data: Path) -> pl.DataFrame:
    """Bitcoin OTC's ratings as events: the rated wrote to the rater, who accepted it or blocked it."""
    ratings = pl.read_parquet(shared_data / "accounts_graph" / "bitcoin_otc.parquet")
    rows = ratings.select(
        pl.int_range(pl.len()).cast(pl.String).alias("event_id"),
        pl.col("date").dt.replace_time_zone("UTC").alias("received_at"),
        pl.col("dst").cast(pl.String).alias("actor_id"),
        pl.col("src").cast(pl.String).alias("recipient_id"),
        pl.when(pl.col("rating") > 0).then(pl.lit("accept")).otherwise(pl.lit("block")).alias("response"),
        pl.lit(None, ties.TIME).alias("response_ts"),
        pl.lit(None, pl.String).alias("ip_hash"),
        pl.lit(None, pl.String).alias("device_hash"),
        "rating",
    )
    seen = pl.concat([rows.select("received_at", a=who) for who in ("actor_id", "recipient_id")])
    first = seen.group_by("a").agg(pl.col("received_at").min().alias("account_created_at"))
    return rows.join(first, left_on="actor_id", right_on="a", how="left")


def _auc(bad: np.ndarray, value: np.ndarray) -> float:
    """The chance that a bad one has the lower value; ties count half."""
    low, high = value[bad][:, None], value[~bad][None, :]
    return float(((low < high) + 0.5 * (low == high)).mean())


def test_accounts_that_will_be_reported_as_scammers_stand_out_before_they_are(shared_data: Path) -> None:
    """Snapshots of 30 months; who is rated in the week after, and by somebody as the worst (-10)."""
    rows = _otc(shared_data)
    whole = ties.ties(rows, ties.hosts_of(rows))
    found = []
    for month in range(30):
        as_of = datetime(2011, 7, 1, tzinfo=UTC) + 30 * DAY * month
        actors = graphmath.numbers(ties.known_before(whole, as_of), as_of).actors
        week = rows.filter(pl.col("received_at").is_between(as_of, as_of + 7 * DAY, closed="left"))
        reported = rows.filter((pl.col("received_at") < as_of) & (pl.col("rating") == -10))["actor_id"]
        rated = week.group_by("actor_id").agg(bad=(pl.col("rating") == -10).any())
        found.append(
            rated.join(actors, on="actor_id").with_columns(
                clean=~pl.col("actor_id").is_in(reported.unique().implode())
            )
        )
    known = pl.concat(found)
    told = {}
    for who, some in (("all", known), ("not yet reported", known.filter("clean"))):
        bad = some["bad"].to_numpy()
        told[who] = {
            c: round(_auc(bad, some[c].to_numpy()), 3) for c in ("acceptance", "reciprocity", "trust")
        }
        print(who, f"{int(bad.sum())} of {len(bad)}", told[who])
    assert told["all"]["acceptance"] > 0.75
    assert told["all"]["reciprocity"] > 0.6
    assert told["all"]["trust"] > 0.53
    assert told["not yet reported"]["acceptance"] > 0.62


@pytest.mark.slow
def test_a_million_edges(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    n, accounts = 1_000_000, 200_000
    to = np.minimum(rng.zipf(1.3, n), accounts - 1)
    at = AS_OF - 30 * DAY
    events = pl.DataFrame(
        {
            "event_id": np.arange(n).astype(str), "actor_id": rng.integers(0, accounts, n).astype(str),
            "recipient_id": to.astype(str), "ip_hash": rng.integers(0, accounts, n).astype(str),
        }
    ).with_columns(
        pl.lit(at).alias("received_at"), pl.lit(OLD).alias("account_created_at"),
        pl.lit(None, pl.String).alias("device_hash"), pl.lit(at).alias("response_ts"),
        pl.Series("response", rng.choice(["", "reply", "block"], n)),
    )  # fmt: skip
    began = time.perf_counter()
    whole = ties.ties(events, ties.hosts_of(events))
    middle = time.perf_counter()
    found = graphmath.numbers(whole, AS_OF)
    end = time.perf_counter()
    assert found.facts["edges"] > 0.4 * n
    with capsys.disabled():
        print(
            f"\n{n} events, {found.facts['edges']} edges: ties {middle - began:.1f} s, "
            f"numbers {end - middle:.1f} s"
        )
