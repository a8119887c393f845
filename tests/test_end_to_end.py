"""The whole house with its real processes: web server, daemon, scoring service and feed, each by itself, with
a small model and short intervals. What the daemon did is asked for over GraphQL, as on call would see it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from redqueen import state
from redqueen.clock import StoreClock
from redqueen.operate import roll_back
from redqueen.policy import Hold
from redqueen.rollout import ORDER
from redqueen.store import DirectoryStore
from tests.services import answers, free_port, wait_for

pytestmark = pytest.mark.slow

REPO = Path(__file__).resolve().parent.parent
SELECTOR = {"repositoryLocationName": "redqueen", "repositoryName": "__repository__"}
SMALL = {
    "RQ_SENSOR_INTERVAL_SECONDS": "1",
    "RQ_SERVING_REFRESH_SECONDS": "0.5",
    "RQ_ENCODER_LAYERS": "1",
    "RQ_ENCODER_WIDTH": "64",
    "RQ_TRAIN_EXAMPLES": "0",
    # A threshold out in the tail of so little traffic would be luck, and so would be the gate's verdict.
    "RQ_FPR_BUDGET": "0.03",
    "RQ_ATTACK_MESSAGES": "60",
    "RQ_MIN_TRUSTED_LABELS": "400",
    "RQ_MIN_CLASS_LABELS": "60",
    "RQ_MIN_NEW_LABELS": "60",
    "RQ_MIN_MISSED_LABELS": "40",
}
FEED = ("demo", "--feed", "--seed", "3", "--scale", "0.4", "--hours", "18", "--seconds-per-hour", "1")
LIVE_SECONDS, CANARY_SECONDS, RUN_SECONDS = 600, 900, 300  # on a busy machine; half that is usual
CANARY = ORDER.index("1%")


@dataclass
class House:
    """One home and the processes that work on it."""

    home: Path
    web: str
    scoring: str
    env: dict[str, str]
    processes: dict[str, subprocess.Popen[bytes]]

    @property
    def store(self) -> DirectoryStore:
        return DirectoryStore(self.home / "store")

    def start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        """Start `redqueen` with these arguments; its output goes to `<name>.out` in the home."""
        with (self.home / f"{name}.out").open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "cli.main", "--home", str(self.home), *arguments],
                cwd=REPO, env=self.env, stdout=out, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.processes[name] = process
        return process

    def output(self, name: str) -> str:
        return (self.home / f"{name}.out").read_text(errors="replace")

    def await_(self, condition: Any, seconds: float, what: str) -> None:
        """Wait for the daemon to bring something about; a process that died says so at once."""

        def met() -> bool:
            for name, process in self.processes.items():
                if process.poll() not in (None, 0):
                    pytest.fail(f"{name} ended ({process.returncode}): {self.output(name)[-2000:]}")
            return bool(condition())

        try:
            wait_for(met, seconds, what)
        except pytest.fail.Exception:
            print(self.output("feed")[-6000:])
            raise

    def ask(self, query: str, **variables: Any) -> Any:
        """The answer to a GraphQL query; fails on errors."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"{self.web}/graphql", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def serving(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.scoring}/v1/state", timeout=10) as response:
            found: dict[str, Any] = json.load(response)
        return found

    # what Dagster knows

    def runs(self, job: str, status: str | None = None) -> list[dict[str, Any]]:
        """Runs of a job, newest first, tags as a dict."""
        wanted = {"pipelineName": job} | ({"statuses": [status]} if status else {})
        found = self.ask(
            """query Runs($filter: RunsFilter!) { runsOrError(filter: $filter) {
                 ... on Runs { results { runId status tags { key value } } } } }""",
            filter=wanted,
        )["runsOrError"]["results"]
        return [{**run, "tags": {tag["key"]: tag["value"] for tag in run["tags"]}} for run in found]

    def materializations(self, asset: str, partition: str | None = None) -> list[dict[str, Any]]:
        """Materializations of an asset, newest first, metadata by label."""
        found = self.ask(
            """query Asset($key: AssetKeyInput!, $partitions: [String!]) { assetOrError(assetKey: $key) {
                 ... on Asset { assetMaterializations(partitions: $partitions, limit: 200) {
                   partition runId metadataEntries { label
                     ... on TextMetadataEntry { text } ... on IntMetadataEntry { intValue }
                     ... on FloatMetadataEntry { floatValue } } } } } }""",
            key={"path": [asset]}, partitions=[partition] if partition else None,
        )["assetOrError"]  # fmt: skip
        return [
            {**one, "metadata": {e["label"]: _value(e) for e in one["metadataEntries"]}}
            for one in found.get("assetMaterializations", [])
        ]

    def launch(self, job: str, candidate: str, config: dict[str, Any]) -> str:
        """Launch a job for a candidate by hand, as the launchpad does; the run's id."""
        result = self.ask(
            """mutation Launch($params: ExecutionParams!) { launchRun(executionParams: $params) {
                 __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }""",
            params={
                "selector": {**SELECTOR, "jobName": job},
                "runConfigData": config,
                "executionMetadata": {"tags": [{"key": "dagster/partition", "value": candidate}]},
            },
        )["launchRun"]
        assert result["__typename"] == "LaunchRunSuccess", result
        return str(result["run"]["runId"])

    def finished(self, run_id: str) -> str:
        """Wait for a run; its status."""

        def status() -> str:
            found = self.ask(
                "query Run($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }", id=run_id
            )
            return str(found["runOrError"]["status"])

        done = ("SUCCESS", "FAILURE", "CANCELED")
        self.await_(lambda: status() in done, RUN_SECONDS, f"the end of run {run_id}")
        return status()

    def failures(self, run_id: str) -> str:
        """Everything that a failed run says about its failure."""
        found = self.ask(
            """query Logs($id: ID!) { logsForRun(runId: $id) { ... on EventConnection { events {
                 ... on ExecutionStepFailureEvent { error { message causes { message } }
                   failureMetadata { description } } } } } }""",
            id=run_id,
        )["logsForRun"]["events"]
        return json.dumps([event for event in found if event])


def _value(entry: dict[str, Any]) -> Any:
    return next((entry[k] for k in ("text", "intValue", "floatValue") if k in entry), None)


def _sensor(run: dict[str, Any]) -> str | None:
    found = run["tags"].get("dagster/sensor_name")
    return str(found) if found else None


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """A home whose daemon has run two laps, the second because of an attack, up to its canary."""
    home = tmp_path_factory.mktemp("house") / "home"
    home.mkdir()
    web, scoring = free_port(), free_port()
    env = {k: v for k, v in os.environ.items() if not k.startswith("RQ_")} | SMALL
    env["RQ_SERVING_URL"] = f"http://127.0.0.1:{scoring}"
    house = House(home, f"http://127.0.0.1:{web}", env["RQ_SERVING_URL"], env, {})
    try:
        house.start("ui", "ui", "--port", str(web))
        house.start("serve", "serve", "--port", str(scoring))
        house.await_(lambda: answers(f"{house.scoring}/healthz"), 60, "an answer of the scoring service")
        house.start("feed", *FEED)
        house.await_(lambda: answers(f"{house.web}/server_info"), 60, "an answer of the web server")
        _play(house)
        yield house
    finally:
        _end(house)


def _play(house: House) -> None:
    """Until a first model is live and a second one is in its canary. The feed is killed once on the way."""
    store = house.store
    house.await_(lambda: state.rollout_state(store).champion, LIVE_SECONDS, "a first model that is live")
    house.processes.pop("feed").kill()
    house.start("feed", *FEED)

    def second_is_out() -> bool:
        live = state.rollout_state(store)
        return live.previous is not None or ORDER.index(live.stage) in range(CANARY, len(ORDER) - 1)

    house.await_(second_is_out, CANARY_SECONDS, "a second model in its canary")
    feed = house.processes.pop("feed")
    feed.terminate()
    feed.wait(180)


def _end(house: House) -> None:
    for process in house.processes.values():
        process.terminate()
    for process in house.processes.values():
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        process.kill()
        process.wait()


def test_every_run_succeeded_and_was_launched_by_a_sensor(house: House) -> None:
    for job, sensors in (
        ("hour", {"label_arrival"}),
        ("lap", {"first_lap", "drift", "adaptation"}),
        ("rollout", {"rollout"}),
    ):
        runs = house.runs(job, "SUCCESS")
        assert runs, job
        assert {_sensor(run) for run in runs} <= sensors, job
        assert not house.runs(job, "FAILURE"), job


def test_the_attack_brought_a_second_lap_by_a_sensor(house: House) -> None:
    first, *later = reversed(house.runs("lap", "SUCCESS"))
    assert _sensor(first) == "first_lap"
    assert later, "no second lap"
    assert _sensor(later[0]) in ("drift", "adaptation")
    assert later[0]["tags"]["redqueen/reason"]
    feed = house.output("feed")
    assert "the world changes (attack)" in feed
    changed = feed.index("the world changes (attack)")
    assert feed.index(f"lap {later[0]['tags']['dagster/partition']}: launched") > changed


def test_the_ui_shows_what_was_made(house: House) -> None:
    candidates = {run["tags"]["dagster/partition"] for run in house.runs("lap", "SUCCESS")}
    for asset in ("gold_labels", "training_set", "candidate_model", "evaluation", "attack_report"):
        assert candidates <= {m["partition"] for m in house.materializations(asset)}, asset
    model = house.materializations("candidate_model", min(candidates))[0]
    assert model["metadata"]["model_id"]
    hours = {m["partition"] for m in house.materializations("signals")}
    assert len(hours) > 40  # history, caught up in one run, and live hours
    for asset in ("events", "labels", "features", "served", "review_requests"):
        assert hours <= {m["partition"] for m in house.materializations(asset)}, asset
    steps = house.materializations("rollout_step")
    assert {m["partition"] for m in steps} == candidates


def test_models_were_swapped_without_a_restart(house: House) -> None:
    assert house.processes["serve"].poll() is None

    def same() -> bool:
        live = state.rollout_state(house.store)
        return bool(house.serving()["serving"] == {"champion": live.champion, "challenger": live.challenger})

    house.await_(same, 30, "the service's change to what is live")
    serving = house.serving()
    assert not serving["degraded"], serving["degraded_reasons"]
    # One process answered without a model, with the first one, and with a second one in its shadow.
    assert {"arm_none", "arm_champion", "arm_shadow"} <= serving["counts"].keys()
    assert serving["counts"]["degraded"] == 0


def test_a_killed_feed_went_on_where_it_was(house: House) -> None:
    feed = house.output("feed")
    assert feed.count("history have landed") == 1
    played = [line.split("  ")[0] for line in feed.splitlines() if " events (" in line]
    # At most the hour that was being played when it was killed is played again.
    assert len(played) - len(set(played)) <= 1
    served = house.materializations("served")
    assert sum(m["metadata"]["duplicates"] for m in served) == 0


def test_a_training_by_hand_and_a_refused_deployment(house: House) -> None:
    """One candidate, launched by hand on what was known after a few hours only, while promotion is frozen."""
    store, name = house.store, "by-hand"
    until = StoreClock(store).now() + timedelta(days=9)
    state.freeze(store, Hold("promotion", "on call", "trying something out", until))
    start = min(datetime.fromisoformat(f"{p[:10]}T{p[11:]}+00:00") for p in _hours(house))
    as_of = start + timedelta(hours=4)
    added = house.ask(
        """mutation Add($repository: RepositorySelector!, $key: String!) {
             addDynamicPartition(repositorySelector: $repository, partitionsDefName: "candidates",
               partitionKey: $key) { __typename } }""",
        repository=SELECTOR, key=name,
    )  # fmt: skip
    assert added["addDynamicPartition"]["__typename"] == "AddDynamicPartitionSuccess"
    config = {"ops": {"gold_labels": {"config": {"as_of": as_of.isoformat()}}}}
    house.finished(house.launch("lap", name, config))
    gold, model = (house.materializations(a, name)[0] for a in ("gold_labels", "candidate_model"))
    assert gold["metadata"]["as_of"] == as_of.isoformat()
    record = state.candidate(store, name)
    assert model["metadata"]["model_id"] == record["model_id"]
    assert record["trigger"] == "manual"

    assert record["status"] in ("waiting", "rejected"), record
    refusal = record["reason"]
    if record["status"] == "waiting":
        # It passed; then somebody touches what it was judged by.
        key = f"evaluations/{record['model_id']}/attack.json"
        store.put_json(key, store.get_json(key) | {"digest": "of another report"})
        refusal = "is not the one that was judged"
    if state.rollout_state(store).challenger:
        # The attack's candidate can still be on its way, and would be the reason why this one has to wait.
        roll_back(store, StoreClock(store).now(), "on call", "makes room", pause_hours=0)
    before = state.rollout_state(store)
    run_id = house.launch("rollout", name, {})
    assert house.finished(run_id) == "FAILURE"
    said = house.failures(run_id)
    assert "Refused" in said
    assert json.dumps(refusal)[1:-1] in said.replace("\\\\", "\\")
    after = state.rollout_state(store)
    assert (after.champion, after.challenger) == (before.champion, before.challenger)
    assert StoreClock(store).is_simulated()


def _hours(house: House) -> set[str]:
    return {m["partition"] for m in house.materializations("events")}
