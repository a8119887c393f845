"""What the UI, the daemon and every cursor know this house by. A change here is a decision."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
import yaml  # type: ignore[import-untyped]

from dagster_project.definitions import defs
from dagster_project.instance import LOCATION_NAME
from tests.services import absent

ROOT = Path(__file__).resolve().parents[1]
REPOSITORY = defs.get_repository_def()
GRAPH = REPOSITORY.asset_graph
NODES = [GRAPH.get(key) for key in sorted(GRAPH.get_all_asset_keys())]

GROUPS = {
    "ingest": {"events", "labels"},
    "labels": {"gold_labels", "label_guard", "review_requests", "truth_state"},
    "features": {"features", "campaigns", "graph_snapshot"},
    "training": {"training_set", "candidate_model", "evaluation"},
    "adversarial": {"attack_report"},
    "deployment": {"candidate_bundle", "rollout_step"},
    "housekeeping": {"retention"},
    "monitoring": {"audit_estimates", "served", "signals"},
}
HOURLY = {
    "events",
    "labels",
    "label_guard",
    "review_requests",
    "features",
    "campaigns",
    "served",
    "signals",
    "audit_estimates",
}
DAILY = {"graph_snapshot"}
UNCUT = {"truth_state", "retention"}
BLOCKING = {
    "events:events_expectations": True,
    "events:events_quality": False,
    "features:features_parity": False,
    "labels:labels_expectations": True,
    "labels:labels_quality": False,
    "label_guard:label_guard_expectations": True,
    "label_guard:labels_not_poisoned": False,
    "features:features_expectations": True,
    "features:features_quality": False,
    "review_requests:review_requests_expectations": True,
    "gold_labels:gold_labels_expectations": True,
    "training_set:training_set_expectations": True,
    "training_set:training_set_quality": False,
    "served:served_expectations": True,
    "served:served_quality": False,
    "audit_estimates:audit_slice_suffices": False,
    "campaigns:campaigns_expectations": True,
    "graph_snapshot:graph_as_of": False,
    "graph_snapshot:graph_snapshot_expectations": True,
    "graph_snapshot:graph_snapshot_quality": False,
    "evaluation:evaluation_gate": True,
    "evaluation:slices_hold": True,
    "attack_report:adversarial_gate": True,
    "served:answers_sound": False,
    "signals:monitoring_healthy": False,
    "signals:no_alarm": False,
}
JOBS = {
    "hour": HOURLY,
    "graph": {"graph_snapshot"},
    "lap": {
        "gold_labels",
        "training_set",
        "candidate_model",
        "evaluation",
        "attack_report",
        "candidate_bundle",
    },
    "rollout": {"rollout_step"},
    "truth": {"truth_state"},
    "housekeeping": {"retention"},
}
SENSORS = {
    "label_arrival": ["hour"],
    "daily_graph": ["graph"],
    "first_lap": ["lap"],
    "drift": ["lap"],
    "adaptation": ["lap"],
    "rollout": ["rollout"],
    "run_failed": [],
    "watch_the_watchers": [],
}
SCHEDULES = {"daily_retention": "housekeeping", "daily_truth": "truth", "weekly_truth_refit": "truth"}
HEAVY = ("torch", "transformers", "sklearn", "evidently", "great_expectations", "xgboost", "matplotlib")


def test_the_assets_and_their_groups() -> None:
    found: dict[str, set[str]] = {}
    for node in NODES:
        found.setdefault(node.group_name, set()).add(node.key.to_user_string())
    assert found == GROUPS


def test_data_is_cut_by_the_hour_the_graph_by_the_day_and_candidates_by_the_decision() -> None:
    for node in NODES:
        if node.key.to_user_string() in HOURLY:
            assert isinstance(node.partitions_def, dg.HourlyPartitionsDefinition)
            assert str(node.partitions_def.start) == "2026-01-01 00:00:00+00:00"
        elif node.key.to_user_string() in DAILY:
            assert isinstance(node.partitions_def, dg.DailyPartitionsDefinition)
            assert str(node.partitions_def.start) == "2026-01-02 00:00:00+00:00"
        elif node.key.to_user_string() in UNCUT:
            assert node.partitions_def is None
        else:
            assert node.partitions_def == dg.DynamicPartitionsDefinition(name="candidates")


def test_the_checks_and_which_of_them_block() -> None:
    found = {
        f"{k.asset_key.to_user_string()}:{k.name}": GRAPH.get(k).blocking for k in GRAPH.asset_check_keys
    }
    assert found == BLOCKING


def test_the_jobs_and_what_they_run() -> None:
    jobs = {job.name: job for job in REPOSITORY.get_all_jobs() if not job.name.startswith("__")}
    found = {
        name: {key.to_user_string() for key in job.asset_layer.executable_asset_keys}
        for name, job in jobs.items()
    }
    assert found == JOBS
    assert all(job.description for job in jobs.values())


def test_the_sensors_what_they_start_and_that_they_are_on() -> None:
    sensors = REPOSITORY.sensor_defs
    assert {s.name: [target.job_name for target in s.targets] for s in sensors} == SENSORS
    assert all(s.default_status == dg.DefaultSensorStatus.RUNNING for s in sensors)
    assert all(s.description for s in sensors)


def test_the_schedules_what_they_start_and_that_they_are_on() -> None:
    schedules = REPOSITORY.schedule_defs
    assert {s.name: s.job_name for s in schedules} == SCHEDULES
    assert all(s.default_status == dg.DefaultScheduleStatus.RUNNING for s in schedules)
    assert all(s.description for s in schedules)


def test_the_location_is_named_alike_everywhere() -> None:
    (load,) = yaml.safe_load((ROOT / "workspace.yaml").read_text())["load_from"]
    assert load == {
        "python_module": {"module_name": "dagster_project.definitions", "location_name": LOCATION_NAME}
    }
    assert LOCATION_NAME == "redqueen"


@pytest.mark.parametrize("node", NODES, ids=lambda node: node.key.to_user_string())
def test_every_asset_tells_on_call_what_it_is(node) -> None:
    assert node.owners == ["team:trust-and-safety-ml"]
    assert node.kinds
    assert node.code_version
    assert node.tags["stage"] in {
        "ingest",
        "labels",
        "features",
        "training",
        "adversarial",
        "deployment",
        "monitoring",
        "housekeeping",
    }
    assert len(node.description) > 80, "a sentence of what it is, and one of what to do about it"


def test_data_that_goes_stale_is_watched() -> None:
    specs = {spec.key.to_user_string(): spec for asset in defs.assets or () for spec in asset.specs}
    assert {name for name, spec in specs.items() if spec.freshness_policy} == HOURLY | DAILY


def test_importing_the_definitions_loads_no_model_library() -> None:
    code = (
        "import sys, json, dagster_project.definitions;"
        f"print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(answer.stdout) == []


def test_the_domain_loads_neither_the_orchestrator_nor_a_model_library() -> None:
    modules = [f"redqueen.{path.stem}" for path in (ROOT / "redqueen").glob("[a-z]*.py")]
    wanted = (*HEAVY, "dagster")
    code = (
        f"import sys, json, {', '.join(sorted(modules))};"
        f"print(json.dumps([m for m in {wanted!r} if m in sys.modules]))"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert json.loads(answer.stdout) == []


def test_nothing_imports_upward() -> None:
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        absent("import-linter is not installed")
    answer = subprocess.run(
        [command, "--no-cache"], capture_output=True, text=True, cwd=ROOT, env={**os.environ, "NO_COLOR": "1"}
    )
    assert answer.returncode == 0, answer.stdout
