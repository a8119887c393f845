"""What is past its time goes; what is live, its parents, and what it can go back to does not."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from assets import retention as purging
from assets.environment import Environment
from assets.ingest import _take_in
from redqueen import ledger, retention, state
from redqueen.clock import StoreClock
from redqueen.errors import InvalidInput
from redqueen.rollout import RolloutState
from redqueen.settings import load_settings
from redqueen.store import DirectoryStore
from redqueen.tables import hour_key, read_hours
from tests.test_ingest import as_json, event

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
LONG_AGO = NOW - timedelta(days=500)


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    found = Environment(home=str(tmp_path / "home"))
    StoreClock(found.store).set(NOW)
    return found


def candidate(env: Environment, name: str, model: str, at: datetime, status: str = "superseded") -> None:
    """A candidate with all it leaves behind."""
    state.advance_candidate(env.store, name, status, at, "told", model_id=model)
    for key in (
        f"models/{model}/weights.safetensors",
        f"evaluations/{model}/attack.json",
        f"references/{model}/reference.json",
        f"gold/candidate={name}/part.parquet",
        f"training_sets/candidate={name}/part.parquet",
        f"hard_examples/v={name}/part.parquet",
    ):
        env.store.put(key, b"{}")
    env.store.put_json(f"models/{model}/manifest.json", {"parent": f"parent-of-{model}"})
    (env.settings.home / "work" / name).mkdir(parents=True)
    (env.settings.home / "cache" / model).mkdir(parents=True)
    os.utime(env.settings.home / "cache" / model, (0, 0))


def going(env: Environment) -> set[str]:
    plan = retention.plan(env.store, env.settings, NOW)
    return {key for keys in plan.keys.values() for key in keys}


def test_every_table_of_the_contracts_has_a_rule_with_a_reason() -> None:
    contracts = (Path(__file__).resolve().parents[1] / "docs" / "data-contracts.md").read_text()
    section = contracts.split("## Where everything is")[1].split("Beside the store")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    declared = {rule.table for rule in retention.RULES}
    for row in rows:
        for key in row.replace("`", "").split(","):
            first = key.strip().split("/")
            if "/" in key:
                assert first[0] in declared or "/".join(first[:2]) in declared, key
    assert [rule.table for rule in retention.RULES if len(rule.why) < 15] == []


@pytest.mark.parametrize("table", ["events", "ingested/labels", "predictions", "served", "review", "graph"])
def test_hours_past_their_time_go_and_younger_ones_stay(env: Environment, table: str) -> None:
    days = retention.days_of(env.settings, table)
    assert days is not None
    old, young = (
        f"{hour_key(table, NOW - timedelta(days=days, hours=hours))}part.parquet" for hours in (2, -2)
    )
    for key in (old, young):
        env.store.put(key, b"x")
    assert going(env) == {old}
    assert retention.apply(env.store, env.settings, retention.plan(env.store, env.settings, NOW)) == {
        table: 1
    }
    assert not env.store.exists(old)
    assert env.store.exists(young)
    assert retention.apply(env.store, env.settings, retention.plan(env.store, env.settings, NOW)) == {}


def test_windows_and_days_are_read_from_the_key(env: Environment) -> None:
    keys = [
        f"signals/window={LONG_AGO - timedelta(days=300):%Y-%m-%dT%H}.json",
        f"reports/window={LONG_AGO:%Y-%m-%dT%H}/drift.html",
        f"graph/day={LONG_AGO:%Y-%m-%d}/nodes.parquet",
    ]
    undated = "graph/notes.txt"
    for key in (*keys, undated):
        env.store.put(key, b"x")
    assert going(env) == set(keys)
    assert retention.plan(env.store, env.settings, NOW).undated["graph"] == 1


def test_nothing_that_is_live_or_can_be_gone_back_to_is_touched(env: Environment) -> None:
    for name in ("champion", "former", "coming", "parent-of-champion", "forgotten"):
        candidate(env, f"c-{name}", name, LONG_AGO - timedelta(days=999), "superseded")
    candidate(env, "c-training", "training", LONG_AGO - timedelta(days=999), "trained")
    live = RolloutState(
        champion="champion", champion_candidate="c-champion",
        previous="former", previous_candidate="c-former", challenger="coming", candidate="c-coming",
        stage="5%", stage_since=NOW, ramp_since=NOW, version=3,
    )  # fmt: skip
    env.store.put_json(state.LIVE_KEY, live.to_dict())
    plan = retention.plan(env.store, env.settings, NOW)
    named = {
        key.split("/")[1].split("=")[-1].removeprefix("c-") for keys in plan.keys.values() for key in keys
    }
    # A parent is needed as a model; its training set is not.
    assert named == {"forgotten", "parent-of-champion"}
    assert {k for k in plan.keys["models"] if "forgotten" not in k} == set()
    assert [folder.name for folder in plan.folders["work"]] == ["c-forgotten", "c-parent-of-champion"]
    assert [folder.name for folder in plan.folders["cache"]] == ["forgotten"]
    retention.apply(env.store, env.settings, plan)
    assert not (env.settings.home / "cache" / "forgotten").exists()
    assert env.store.exists("models/champion/weights.safetensors")
    assert len(state.all_candidates(env.store)) == 6


def test_a_canary_that_runs_for_long_keeps_its_evidence(env: Environment) -> None:
    since = NOW - timedelta(days=120)
    live = RolloutState(
        challenger="m", candidate="c", stage="1%", ramp_since=since, stage_since=since, version=2
    )
    env.store.put_json(state.LIVE_KEY, live.to_dict())
    keys = [f"{hour_key('predictions', since + timedelta(days=d))}a.parquet" for d in (-5, 5)]
    for key in keys:
        env.store.put(key, b"x")
    assert going(env) == {keys[0]}


def test_decisions_the_log_and_the_loops_memory_are_never_purged(env: Environment) -> None:
    for key in (
        f"decisions/{LONG_AGO:%Y-%m-%dT%H}/drift.json", "rollout/log/000001.json", "candidates/x.json",
        "state/alerts/dt=2001-01-01.json",
    ):  # fmt: skip
        env.store.put(
            key, b'{"candidate": "x", "status": "failed", "updated_at": "2001-01-01T00:00:00+00:00"}'
        )
    assert going(env) == set()


def test_settings_change_a_table_and_mistakes_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQ_RETENTION_DAYS", "events=30, served=never")
    assert retention.days_of(load_settings(), "events") == 30
    assert retention.days_of(load_settings(), "served") is None
    for wrong, said in (
        ("evnts=3", "names 'evnts'"),
        ("decisions=3", "'decisions' is always kept"),
        ("events=1", "at least 2"),
        ("events", "at least 2"),
    ):
        monkeypatch.setenv("RQ_RETENTION_DAYS", wrong)
        with pytest.raises(InvalidInput, match=said):
            retention.rules(load_settings())


def test_what_no_rule_is_about_stays_and_is_named(env: Environment) -> None:
    env.store.put("notes/dt=2001-01-01/a.parquet", b"x")
    assert retention.plan(env.store, env.settings, NOW).undeclared == ("notes",)
    assert going(env) == set()


def test_an_hour_whose_files_are_gone_keeps_what_passed_when_it_is_run_again(env: Environment) -> None:
    hour = (NOW - timedelta(days=20)).replace(minute=0)
    row = event(1, ts=hour, received_at=hour, account_created_at=hour)
    env.store.put(f"{hour_key('events', hour)}a.jsonl", as_json(row).encode())
    _take_in(env, "events", [hour])
    settings = env.settings.model_copy(update={"retention_days": ("events=10",)})
    assert retention.apply(env.store, settings, retention.plan(env.store, settings, NOW)) == {"events": 1}
    rows, counts = _take_in(env, "events", [hour])
    assert (rows.height, counts["purged_hours"]) == (1, 1)
    assert read_hours(env.store, "ingested/events", hour, NOW).height == 1
    # Nor does the id come in again by another hour: the index knows it as long as the row is kept.
    env.store.put(f"{hour_key('events', NOW - timedelta(hours=3))}b.jsonl", as_json(row).encode())
    _, counts = _take_in(env, "events", [NOW - timedelta(hours=3)])
    assert counts["known_from_other_hours"] == 1


def test_the_index_forgets_what_is_no_longer_kept(env: Environment) -> None:
    hour = NOW - timedelta(days=20)
    row = event(1, ts=hour, received_at=hour, account_created_at=hour)
    env.store.put(f"{hour_key('events', hour)}a.jsonl", as_json(row).encode())
    _take_in(env, "events", [hour])
    assert ledger.entries(env.store, "events").height == 1
    settings = env.settings.model_copy(update={"retention_days": ("ingested/events=10",)})
    retention.apply(env.store, settings, retention.plan(env.store, settings, NOW))
    assert ledger.entries(env.store, "events").is_empty()
    assert [k for k in env.store.list("index/events/") if k.endswith(".parquet")] == []


# -- Dagster -------------------------------------------------------------------------------------------------


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as found:
        yield found


@dg.asset(partitions_def=dg.StaticPartitionsDefinition(["a", "b", "c"]))
def toy() -> None:
    """An asset with three partitions."""


def test_old_runs_go_but_every_assets_latest_materialization_stays(
    instance: dg.DagsterInstance, env: Environment
) -> None:
    for key in ("a", "b", "c"):
        assert dg.materialize([toy], instance=instance, partition_key=key).success
    future = datetime.now(UTC) + timedelta(days=40)
    assert purging.plan_runs(instance, env, [toy.key], datetime.now(UTC)) == []
    runs = purging.plan_runs(instance, env, [toy.key], future)
    assert len(runs) == 2
    in_use = purging.old_runs(instance, [toy.key], frozenset({"a"}), future)
    assert len(in_use) == 1
    assert purging.purge_runs(instance, runs) == 2
    (left,) = instance.get_runs()
    assert left.tags["dagster/partition"] == "c"
    latest = instance.get_latest_materialization_event(toy.key)
    assert latest is not None
    assert latest.run_id == left.run_id
    assert purging.plan_runs(instance, env, [toy.key], future) == []


def test_the_asset_purges_and_reports_counts(instance: dg.DagsterInstance, env: Environment) -> None:
    env.store.put(f"{hour_key('served', LONG_AGO)}part.parquet", b"x")
    result = dg.materialize([purging.retention], instance=instance, resources={"env": env})
    assert result.success
    (done,) = result.asset_materializations_for_node("retention")
    assert done.metadata["deleted_objects"].value == 1
    assert not DirectoryStore(env.settings.home / "store").list("served/")
    assert retention.record(env.store)["last"]["deleted"] == {"served": 1}
