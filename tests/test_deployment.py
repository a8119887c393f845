"""The step of a rollout: what it refuses, whom it judges by, and what is measured beside it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest

from assets.deployment import _evidence, rollout_step
from assets.environment import Environment
from assets.features import features
from assets.monitoring import signals
from assets.partitions import candidates, partition_of
from redqueen import operate, state
from redqueen.clock import StoreClock
from redqueen.rollout import SHADOW, RolloutState
from redqueen.tables import HOUR, write_part
from sensors.rollout import rollout as rollout_sensor
from tests.test_signals import predictions

NOW = datetime(2026, 1, 3, 14, 30, tzinfo=UTC)
NAME = "2026-01-03T12-attack-0001"


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    found = Environment(home=str(tmp_path / "home"))
    StoreClock(found.store).set(NOW)
    return found


def ran(env: Environment, asset: dg.AssetsDefinition, partition: str) -> tuple[bool, str]:
    """Whether the asset materialized, and what it said where it did not."""
    with dg.DagsterInstance.ephemeral() as instance:
        instance.add_dynamic_partitions(candidates.name or "", [NAME])
        done = dg.materialize(
            [asset], instance=instance, partition_key=partition, resources={"env": env},
            selection=[asset], raise_on_error=False,
        )  # fmt: skip
    failures = [e.step_failure_data for e in done.all_events if e.is_step_failure]
    return done.success, " ".join(
        f"{f.error_display_string} {f.user_failure_data.description if f.user_failure_data else ''}"
        for f in failures
    )


def test_a_waiting_candidate_that_no_longer_verifies_makes_way_for_the_next_lap(env: Environment) -> None:
    state.advance_candidate(env.store, NAME, "waiting", NOW, "passed", model_id="m-1")
    assert state.in_flight(env.store, NOW) == NAME
    verdict = {"passed": True, "candidate": NAME, "manifest_sha256": "of other bytes", "attack_digest": "x"}
    env.store.put_json("evaluations/m-1/verdict.json", verdict)
    env.store.put("models/m-1/manifest.json", b"{}")
    success, said = ran(env, rollout_step, NAME)
    assert not success
    assert "is not the one that was judged" in said
    assert state.candidate(env.store, NAME)["status"] == "rejected"
    assert state.in_flight(env.store, NOW) is None


def test_a_candidate_in_shadow_is_judged_by_its_own_rows_alone(env: Environment) -> None:
    since = NOW - timedelta(minutes=10)
    rows = [
        {"event_id": f"{model}{i}", "model_id": model, "arm": "shadow", "stage": SHADOW, "ts": ts,
         "degraded": model == "former"}
        for model, ts in (("former", since - timedelta(minutes=5)), ("former", since), ("m2", since))
        for i in range(30)
    ]  # fmt: skip
    write_part(env.store, "predictions", NOW.replace(minute=0), predictions(rows))
    seen = RolloutState("m1", "one", "m2", NAME, stage=SHADOW, stage_since=since)
    shadow = _evidence(env, seen, None, NOW).shadow
    assert shadow is not None
    assert (shadow.n, shadow.errors) == (30, 0)


@pytest.mark.parametrize(("ahead", "age"), [(timedelta(days=2), None), (-HOUR, 1.0)])
def test_a_message_of_tomorrow_is_no_sign_of_life(
    env: Environment, ahead: timedelta, age: float | None
) -> None:
    write_part(env.store, "predictions", NOW.replace(minute=0) - HOUR, predictions([{"ts": NOW + ahead}]))
    seen = RolloutState("m1", "one", "m2", NAME, stage="25%", share=0.25, stage_since=NOW - 3 * HOUR)
    assert _evidence(env, seen, None, NOW).telemetry_age_hours == age


def test_an_hour_that_is_not_over_leaves_no_record_that_would_be_the_latest(env: Environment) -> None:
    for hour in (NOW.replace(minute=0), NOW.replace(minute=0) + 20 * HOUR):
        success, said = ran(env, signals, partition_of(hour))
        assert not success
        assert "is measured when it is over" in said
    assert env.store.list("signals/") == []
    assert ran(env, signals, partition_of(NOW.replace(minute=0) - HOUR)) == (True, "")


def test_an_hour_in_which_nobody_wrote_has_features_too(env: Environment) -> None:
    assert ran(env, features, partition_of(NOW.replace(minute=0) - HOUR)) == (True, "")


def test_the_sensor_brings_records_in_line_that_a_killed_rollback_left_behind(env: Environment) -> None:
    state.advance_candidate(env.store, NAME, "shadow", NOW, "on its way", model_id="m2")
    live = RolloutState("m1", "one", stage="100%", version=3, blocked={NAME: "rolled back by hand"})
    env.store.put_json(state.LIVE_KEY, live.to_dict())
    assert state.in_flight(env.store, NOW + timedelta(days=30)) == NAME
    with dg.DagsterInstance.ephemeral() as instance:
        rollout_sensor(dg.build_sensor_context(instance=instance, resources={"env": env}))
    assert state.candidate(env.store, NAME)["status"] == "rolled_back"
    assert state.in_flight(env.store, NOW) is None
    assert operate.settle(env.store, NOW) is None
