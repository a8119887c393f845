"""The poisoning guard: colluding reporters are held and shown, honest crowds are not, people decide."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from assets.environment import Environment
from assets.ingest import events, labels
from assets.partitions import partition_of
from assets.poisoning import label_guard
from cli.main import app
from redqueen import poisoning, releases
from redqueen.clock import StoreClock
from redqueen.errors import InvalidInput, Refused
from redqueen.labels import gold
from redqueen.poisoning import HISTORY, Limits, effective_weights, guard, judge_hour
from redqueen.rings import RingLimits, rings
from redqueen.schema import polars_schema
from redqueen.settings import load_settings
from redqueen.store import DirectoryStore, open_store
from redqueen.tables import HOUR, write_part

NOW = datetime(2026, 3, 1, 14, tzinfo=UTC)
LIMITS = Limits()
RING = [f"ring{n}" for n in range(8)]
VICTIMS = [f"victim{n}" for n in range(60)]
SCHEMA = polars_schema("labels")


def vote(
    rater: str, event: str, at: datetime = NOW, value: str = "abuse", source: str = "report"
) -> dict[str, Any]:
    return {
        "label_id": f"{source}-{rater}-{event}",
        "event_id": event,
        "policy": "spam" if value == "abuse" else "any",
        "value": value,
        "source": source,
        "rater_id": rater,
        "labeled_at": at,
        "received_at": at,
        "confidence": None,
    }


def table(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA)


def ago(**back: float) -> datetime:
    return NOW - timedelta(**back)


def crowd(seed: int = 0, raters: int = 400, items: int = 800, reports: int = 5_000) -> list[dict[str, Any]]:
    """Honest people over three weeks: they report popular abuse most, and meet there."""
    rng = np.random.default_rng(seed)
    popularity = (1.0 + np.arange(items)) ** -1.1
    activity = rng.pareto(1.5, raters) + 1.0
    who = rng.choice(raters, reports, p=activity / activity.sum())
    what = rng.choice(items, reports, p=popularity / popularity.sum())
    pairs = np.unique(np.stack([who, what]), axis=1).T
    return [vote(f"u{w}", f"e{i}", ago(days=float(rng.uniform(1, 22)))) for w, i in pairs]


HONEST = crowd()


def attack(members: list[str] = RING, victims: list[str] = VICTIMS, seed: int = 1) -> list[dict[str, Any]]:
    """Each victim is reported by every member, hours apart, between honest reports of popular abuse."""
    rng = np.random.default_rng(seed)
    lies = [vote(m, v, ago(days=float(rng.uniform(2, 20)))) for m in members for v in victims]
    cover = [vote(m, f"e{i}", ago(days=float(rng.uniform(2, 20)))) for m in members for i in range(20)]
    return [*lies, *cover]


POISONED = [*HONEST, *attack()]


def rater_of(rows: list[dict[str, Any]], verdicts: pl.DataFrame) -> set[str]:
    """Whose labels are among the verdicts."""
    return set(verdicts.join(table(rows).select("label_id", "rater_id"), on="label_id")["rater_id"])


def weight_of(verdicts: pl.DataFrame, label: str) -> float:
    found = verdicts.filter(pl.col("label_id") == label)["weight"]
    return float(found[0]) if len(found) else 1.0


# -- rings ---------------------------------------------------------------------------------------------------


def test_a_ring_is_held_with_all_its_labels_and_nobody_else_is() -> None:
    found = guard(table(POISONED), LIMITS, NOW)
    held = found.verdicts.filter("held")
    assert rater_of(POISONED, held) == set(RING)
    assert held.height == len(attack())
    assert set(held["reason"]) == {"ring"}
    assert held["weight"].unique().to_list() == [0.0]
    (group,) = found.groups.rows(named=True)
    assert (group["members"], group["labels"], group["held"]) == (8, len(attack()), True)
    assert found.judged == len(POISONED)


def test_held_votes_no_longer_move_the_truth() -> None:
    defence = [vote(f"d{n}", v, ago(days=2), "benign") for n in range(2) for v in VICTIMS]
    rows = table([*POISONED, *defence])

    def called_abusive(weights: pl.DataFrame | None) -> int:
        judged = gold(rows, NOW, ("spam",), weights=weights)
        return judged.filter(pl.col("event_id").is_in(VICTIMS) & (pl.col("p_abuse") > 0.5)).height

    assert called_abusive(None) == len(VICTIMS)
    assert called_abusive(guard(rows, LIMITS, NOW).verdicts.select("label_id", "weight")) == 0


def test_a_popular_scam_reported_by_two_hundred_honest_people_is_not_held() -> None:
    many = [vote(f"u{n}", "scam", ago(minutes=n % 50)) for n in range(200)]
    found = guard(table([*HONEST, *many]), LIMITS, NOW)
    assert not found.groups.height


@pytest.mark.parametrize("seed", range(4))
def test_honest_people_who_meet_on_popular_items_are_no_ring(seed: int) -> None:
    assert not guard(table(crowd(seed)), LIMITS, NOW).groups.height


def test_a_ring_that_spreads_its_targets_is_found_as_a_knot() -> None:
    # Of sixteen members three report each victim, and no pair meets more than three times.
    members, rng = [f"thin{n:02}" for n in range(16)], np.random.default_rng(3)
    met, lies = np.zeros((16, 16)), []
    for victim in range(80):
        team = [int(rng.integers(16))]
        while len(team) < 3:
            cost = met[team].sum(axis=0) + rng.random(16)
            cost[team] = np.inf
            team.append(int(cost.argmin()))
        met[np.ix_(team, team)] += 1
        lies += [vote(members[m], f"victim{victim}", ago(days=3, hours=m)) for m in team]
    np.fill_diagonal(met, 0)
    assert met.max() <= 3
    rows = [*HONEST, *lies]
    flagged = rater_of(rows, guard(table(rows), LIMITS, NOW).verdicts.filter("held"))
    assert len(flagged & set(members)) >= 12
    assert flagged <= set(members)


def test_two_who_always_agree_count_as_one_voter_and_are_not_held() -> None:
    rows = [*HONEST, *attack(["one", "two"])]
    found = guard(table(rows), LIMITS, NOW)
    (group,) = found.groups.rows(named=True)
    assert (group["held"], group["members"]) == (False, 2)
    both = sum(weight_of(found.verdicts, f"report-{m}-victim0") for m in ("one", "two"))
    assert both <= 1.0
    assert weight_of(found.verdicts, "report-one-victim0") > 0


def test_neighbours_whom_trusted_votes_found_right_count_as_one_voter() -> None:
    upheld = [vote("mod", v, ago(days=1), source="moderator") for v in VICTIMS[:20]]
    (group,) = guard(table([*POISONED, *upheld]), LIMITS, NOW).groups.rows(named=True)
    assert group["held"] is False
    refuted = [vote("mod", v, ago(days=1), "benign", "moderator") for v in VICTIMS[:20]]
    (group,) = guard(table([*POISONED, *refuted]), LIMITS, NOW).groups.rows(named=True)
    assert group["held"] is True


def test_other_sources_are_no_rings() -> None:
    rows = [{**row, "source": "vendor", "label_id": f"v{n}"} for n, row in enumerate(attack())]
    assert guard(table([*HONEST, *rows]), LIMITS, NOW).groups.height == 0


def test_a_group_keeps_its_id_while_it_grows() -> None:
    first = guard(table(POISONED), LIMITS, NOW)
    more = [*POISONED, *attack(["late0", "late1"], seed=5)]
    second = guard(table(more), LIMITS, NOW, before=first.verdicts)
    assert second.groups["group"].to_list() == first.groups["group"].to_list()
    assert second.groups["members"].to_list() == [10]


def test_a_ring_stays_held_when_most_of_its_evidence_has_left_the_history() -> None:
    lies = [vote(m, v, ago(days=2 + n)) for m in RING for n, v in enumerate(VICTIMS[:20])]
    rows = table([*HONEST, *lies])
    verdicts = guard(rows, LIMITS, NOW).verdicts
    for days in (5, 10, 15, 20, 25, 27):
        found = guard(rows, LIMITS, NOW + timedelta(days=days), before=verdicts)
        verdicts = found.verdicts
    alone = guard(rows, LIMITS, NOW + timedelta(days=days))
    assert not alone.groups.height
    assert verdicts.filter("held").height == 8
    assert found.groups["group"].n_unique() == 1


def test_items_of_all_make_no_pairs_and_the_budget_of_pairs_holds() -> None:
    raters, items = np.divmod(np.arange(3_000 * 40), 40)
    assert rings(raters, items) == []
    few = RingLimits(pairs=10)
    assert rings(*np.divmod(np.arange(8 * 60), 60), few) == []


# -- bursts --------------------------------------------------------------------------------------------------


REGULARS = [vote(f"u{n}", f"r{n}-{day}", ago(days=day, minutes=n)) for n in range(60) for day in range(6)]


def burst(size: int = 30, event: str = "target") -> list[dict[str, Any]]:
    return [vote(f"fresh{n}", event, ago(minutes=20, seconds=-10 * n)) for n in range(size)]


def test_a_burst_of_newcomers_is_held_and_the_regulars_among_them_are_not() -> None:
    rows = [*REGULARS, *burst(), vote("u1", "target", ago(minutes=18))]
    found = guard(table(rows), LIMITS, NOW)
    assert rater_of(rows, found.verdicts.filter("held")) == {f"fresh{n}" for n in range(30)}
    assert set(found.groups["reason"]) == {"burst"}


def test_as_many_newcomers_as_everywhere_are_no_burst() -> None:
    others = [vote(f"once{n}", f"x{n}", ago(hours=1, minutes=n % 60)) for n in range(400)]
    assert not guard(table([*REGULARS, *others, *burst()]), LIMITS, NOW).groups.height


def test_newcomers_over_many_hours_are_no_burst() -> None:
    slow = [vote(f"fresh{n}", "target", ago(minutes=40 * n)) for n in range(30)]
    assert not guard(table([*REGULARS, *slow]), LIMITS, NOW).groups.height


def test_a_raid_on_a_community_is_a_burst_although_each_event_is_reported_once() -> None:
    raid = [vote(f"fresh{n}", f"m{n}", ago(minutes=20, seconds=-10 * n)) for n in range(30)]
    where = pl.DataFrame({"event_id": [f"m{n}" for n in range(30)], "community_id": ["c1"] * 30})
    rows = table([*REGULARS, *raid])
    assert not guard(rows, LIMITS, NOW).groups.height
    assert guard(rows, LIMITS, NOW, communities=where).groups["labels"].to_list() == [30]


def test_a_burst_stays_held_until_people_judge_its_event() -> None:
    rows = [*REGULARS, *burst()]
    first = guard(table(rows), LIMITS, NOW)
    later = NOW + timedelta(days=4)
    again = guard(table(rows), LIMITS, later, before=first.verdicts)
    assert again.groups["group"].to_list() == first.groups["group"].to_list()
    judged = [*rows, vote("mod", "target", NOW + HOUR, source="moderator")]
    assert not guard(table(judged), LIMITS, later, before=first.verdicts).groups.height


# -- weights -------------------------------------------------------------------------------------------------


def test_a_raters_weight_grows_with_a_record_and_falls_with_refuted_reports() -> None:
    def first(*others: dict[str, Any]) -> float:
        return weight_of(guard(table([vote("new", "a"), *others]), LIMITS, NOW).verdicts, "report-new-a")

    assert first() == pytest.approx(LIMITS.new_rater_weight)
    regular = [vote("new", f"b{n}", ago(hours=n + 1)) for n in range(25)]
    assert first() < first(*regular[:5]) < first(*regular) == 1.0
    at_once = [vote("new", f"b{n}", ago(hours=1)) for n in range(25)]
    assert first(*at_once) == first(at_once[0])
    right = [vote("mod", f"b{n}", source="moderator") for n in range(5)]
    assert first(*at_once, *right) == 1.0
    wrong = [vote("mod", f"b{n}", value="benign", source="moderator") for n in range(4)]
    assert first(*regular, *wrong) == pytest.approx(0.5)


def test_what_a_rater_an_hour_and_a_ring_move_is_capped() -> None:
    limits = replace(LIMITS, new_rater_weight=1.0, rater_a_day=10.0, hour_least=50.0, hour_times=2.0)
    busy = [vote("busy", f"b{n}", ago(hours=n % 20)) for n in range(40)]
    found = guard(table(busy), limits, NOW).verdicts
    assert set(found["reason"]) == {"rater_cap"}
    assert found["weight"].sum() <= 20.0 + 1e-9  # twenty hours lie on two days
    calm = [vote(f"c{n}-{h}", f"x{n}-{h}", ago(hours=h)) for h in range(1, 10) for n in range(30)]
    flood = [vote(f"f{n}", f"y{n}", NOW) for n in range(300)]
    found = guard(table([*calm, *flood]), limits, NOW).verdicts
    assert set(found["reason"]) == {"hour_cap"}
    assert found["weight"].sum() == pytest.approx(60.0)
    pair = replace(LIMITS, new_rater_weight=1.0, ring_a_day=2.0, rater_a_day=1e9)
    both = [vote(m, v, ago(days=2)) for m in ("one", "two") for v in VICTIMS]
    found = guard(table([*HONEST, *both]), pair, NOW).verdicts.filter(pl.col("group").is_not_null())
    assert found["weight"].sum() == pytest.approx(2.0)


# -- laws ----------------------------------------------------------------------------------------------------

EAGER = replace(
    LIMITS,
    ring=RingLimits(alpha=0.9, shared_items=2, least_knot=2, knot_margin=0),
    burst=replace(LIMITS.burst, raters=3, alpha=0.9, newcomer_hours=1, prior=0.0),
    rater_a_day=2.0,
    hour_least=2.0,
)
"""So touchy that a handful of votes trips every rule."""


@st.composite
def any_votes(draw: st.DrawFn) -> list[dict[str, Any]]:
    minutes = st.integers(-3000, 3000)
    return [
        {
            **vote(
                draw(st.sampled_from("abcdef")),
                draw(st.sampled_from(["e1", "e2", "e3", "e4"])),
                NOW + timedelta(minutes=draw(minutes)),
                draw(st.sampled_from(["abuse", "abuse", "benign", "unsure"])),
                draw(st.sampled_from(["report", "report", "report", "moderator", "vendor"])),
            ),
            "label_id": f"l{draw(st.integers(0, 60))}",
        }
        for _ in range(draw(st.integers(0, 40)))
    ]


@settings(max_examples=60, deadline=None)
@given(rows=any_votes(), shuffle=st.randoms(use_true_random=False))
def test_what_came_later_copies_and_order_change_no_verdict(rows: list[dict[str, Any]], shuffle: Any) -> None:
    where = pl.DataFrame({"event_id": ["e1", "e2"], "community_id": ["c", "c"]})
    known = [row for row in rows if row["received_at"] <= NOW]
    mixed = [*rows, *known[::2]]
    shuffle.shuffle(mixed)
    plain = guard(table(known), EAGER, NOW, communities=where)
    other = guard(table(mixed), EAGER, NOW, communities=where)
    assert other.verdicts.equals(plain.verdicts)
    assert other.groups.equals(plain.groups)
    assert plain.verdicts["weight"].is_between(0.0, 1.0).all()
    assert plain.verdicts["released_weight"].is_between(0.0, 1.0).all()


def test_no_labels_no_verdicts() -> None:
    assert dict(guard(table([]), LIMITS, NOW).verdicts.schema) == poisoning.VERDICT
    assert guard(table([vote("a", "e", NOW - HISTORY - HOUR)]), LIMITS, NOW).judged == 0


def test_200000_reports_take_a_second_or_so() -> None:
    rng = np.random.default_rng(0)
    n = 200_000
    popularity = (1.0 + np.arange(60_000)) ** -1.1
    at = int(NOW.timestamp() * 1e6) - rng.integers(0, 29 * 86_400 * 10**6, n)
    rows = pl.DataFrame(
        {
            "label_id": [f"l{x}" for x in range(n)],
            "event_id": pl.Series(rng.choice(60_000, n, p=popularity / popularity.sum())).cast(pl.String),
            "policy": "spam",
            "value": "abuse",
            "source": "report",
            "rater_id": pl.Series(rng.integers(0, 20_000, n)).cast(pl.String),
            "received_at": pl.Series(at).cast(pl.Datetime("us", "UTC")),
        }
    )
    start = time.process_time()
    guard(rows, LIMITS, NOW)
    assert time.process_time() - start < 4.0  # 0.8 s of CPU on a quiet core


# -- the table and people's word -----------------------------------------------------------------------------


def land(store: DirectoryStore, rows: list[dict[str, Any]]) -> None:
    """Take labels in, each in the hour in which it was received."""
    frame = table(rows)
    for (hour,), part in frame.group_by(pl.col("received_at").dt.truncate("1h"), maintain_order=True):
        write_part(store, "ingested/labels", hour, part)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


LAST = NOW - HOUR
"""The last hour that is over at `NOW`."""


def weights(store: DirectoryStore, as_of: datetime) -> dict[str, float]:
    return dict(effective_weights(store, as_of).iter_rows())


def test_weights_are_the_last_verdicts_and_an_hour_counts_once_it_is_over(store: DirectoryStore) -> None:
    land(store, [*REGULARS, *burst(), vote("u1", "target", ago(minutes=18))])
    judge_hour(store, LAST - HOUR)
    judge_hour(store, LAST)
    now = weights(store, NOW)
    assert {now[f"report-fresh{n}-target"] for n in range(30)} == {0.0}
    before = weights(store, LAST)
    assert "report-fresh0-target" not in before
    assert before == dict(
        poisoning.read_verdicts(store, LAST - HOUR).select("label_id", "weight").iter_rows()
    )


def test_labels_that_no_verdict_has_seen_yet_are_judged_before_they_count(store: DirectoryStore) -> None:
    land(store, [*REGULARS, *burst()])
    judge_hour(store, LAST - 2 * HOUR)
    assert weights(store, NOW)["report-fresh0-target"] == 0.0
    assert not store.list("guard/dt=2026-03-01/hr=13/")


def test_a_label_that_left_the_history_keeps_its_verdict(store: DirectoryStore) -> None:
    land(store, [*REGULARS, *burst()])
    judge_hour(store, LAST)
    last = LAST
    for days in (10, 20, 31, 40):
        last = LAST + timedelta(days=days)
        land(store, [vote("u2", f"day{days}", last)])
        judge_hour(store, last)
    assert not poisoning.read_verdicts(store, last)["held"].any()
    assert weights(store, last + HOUR)["report-fresh0-target"] == 0.0


def test_a_release_counts_from_its_own_time_on_and_can_be_taken_back(store: DirectoryStore) -> None:
    land(store, [*REGULARS, *burst()])
    group = judge_hour(store, LAST).groups["group"][0]
    later = NOW + timedelta(minutes=10)
    word = poisoning.release(store, group, by="ana", reason="a school class", now=later)
    assert "released by ana" in word.sentence()
    label = "report-fresh0-target"
    assert weights(store, NOW)[label] == 0.0
    assert weights(store, later)[label] == pytest.approx(LIMITS.new_rater_weight)
    last = later + timedelta(minutes=5)
    releases.hold_again(store, group, by="bo", reason="no, it is not", now=last)
    assert [weights(store, t)[label] for t in (NOW, later, last)] == [0.0, pytest.approx(0.25), 0.0]
    assert [w.action for w in releases.words(store)] == ["release", "hold again"]
    poisoning.release(store, label, by="ana", reason="this one is fine", now=last)
    assert weights(store, last)[label] > 0.0 == weights(store, last)["report-fresh1-target"]


def test_of_two_releases_at_once_one_wins_and_the_other_is_told(store: DirectoryStore) -> None:
    land(store, [*REGULARS, *burst()])
    group = judge_hour(store, LAST).groups["group"][0]

    def attempt(who: str) -> str:
        try:
            return poisoning.release(store, group, by=who, reason="mine", now=NOW).by
        except Refused as error:
            return str(error)

    with ThreadPoolExecutor(4) as pool:
        told = list(pool.map(attempt, ["ana", "bo", "cy", "di"]))
    (winner,) = [who for who in told if who in ("ana", "bo", "cy", "di")]
    assert sum(f"was released by {winner}" in message for message in told) == 3
    assert len(releases.words(store)) == 1


def test_what_is_not_held_is_not_released_and_what_is_not_released_not_held_again(
    store: DirectoryStore,
) -> None:
    with pytest.raises(InvalidInput, match="'ring-1' is held by the last verdict"):
        poisoning.release(store, "ring-1", by="ana", reason="x", now=NOW)
    with pytest.raises(Refused, match="is not released"):
        releases.hold_again(store, "ring-1", by="ana", reason="x", now=NOW)


def test_judging_an_hour_again_gives_the_same_object(store: DirectoryStore) -> None:
    land(store, [*REGULARS, *burst()])
    judge_hour(store, LAST)
    key = "guard/dt=2026-03-01/hr=13/part.parquet"
    first = store.get(key).data
    judge_hour(store, LAST)
    assert store.get(key).data == first


def test_suspects_are_counted_for_the_policy(store: DirectoryStore) -> None:
    land(store, [*REGULARS, *burst()])
    judge_hour(store, LAST)
    assert poisoning.held_since(store, NOW - HOUR, NOW) == 30
    assert poisoning.held_since(store, NOW, NOW) == 0


# -- Dagster and the command ---------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a burst in its last hour, whose clock stands at the end of that hour."""
    home = tmp_path / "home"
    store = open_store(load_settings(home))
    assert isinstance(store, DirectoryStore)
    land(store, [*REGULARS, *burst()])
    StoreClock(store).set(NOW)
    return home


def materialized(home: Path, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [label_guard, labels.to_source_asset(), events.to_source_asset()],
        partition_key=partition_of(LAST),
        instance=instance,
        resources={"env": Environment(home=str(home))},
    )


def verdict(result: dg.ExecuteInProcessResult) -> Any:
    return next(c for c in result.get_asset_check_evaluations() if c.check_name == "labels_not_poisoned")


def test_the_asset_warns_says_why_and_names_nobody(home: Path) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        result = materialized(home, instance)
        assert result.success
        check, _ = result.get_asset_check_evaluations()
        assert (check.passed, check.severity, check.blocking) == (False, dg.AssetCheckSeverity.WARN, False)
        assert check.description is not None
        assert check.description.startswith("30 labels are held (30 new this hour): 1 burst (30).")
        (event,) = result.asset_materializations_for_node("label_guard")
        assert event.metadata["held_burst"].value == 30
        (row,) = event.metadata["groups"].records  # type: ignore[attr-defined]
        assert row.data["state"] == "held"
        told = json.dumps([str(event.metadata), str(check.metadata)])
        assert not [who for who in ("fresh", "u1-", "target", "report-") if who in told]

        store = open_store(load_settings(home))
        poisoning.release(store, row.data["group"], by="ana", reason="a class", now=NOW)
        again = materialized(home, instance)
        check = verdict(again)
        assert check.passed
        (event,) = again.asset_materializations_for_node("label_guard")
        (row,) = event.metadata["groups"].records  # type: ignore[attr-defined]
        assert row.data["state"].startswith("released by ana")


def test_the_command_lists_releases_and_holds_again(home: Path) -> None:
    def call(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["--home", str(home), "labels", *arguments], env={"COLUMNS": "200"})
        assert result.exit_code == 0, result.output
        return result.output

    store = open_store(load_settings(home))
    assert "nothing is held" in call("held")
    group = judge_hour(store, LAST).groups["group"][0]
    assert group in call("held")
    assert "released by ana" in call("release", group, "--reason", "a class", "--owner", "ana")
    assert "a class" in call("held")
    assert "held again by ana" in call("hold-again", group, "--owner", "ana")
