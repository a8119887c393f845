"""The driver: real ticks, cursors, run keys and runs, one sensor a call; killed, recovered, and in the UI."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.remote_origin import ManagedGrpcPythonEnvCodeLocationOrigin
from dagster._core.storage.compute_log_manager import ComputeIOType
from dagster._core.workspace.load import location_origin_from_module_name
from dagster._core.workspace.load_target import WorkspaceFileTarget

from arena.driver import INTERNALS, PINNED_DAGSTER, Driver, SensorFailed, internals_changed
from dagster_project.instance import DAGSTER_YAML, dagster_home, write_dagster_yaml
from dagster_project.ui import WORKSPACE
from redqueen.errors import InvalidInput, NotFound, Refused

TOY = "tests.toy_location"
HOURS = [f"2026-01-01-{hour:02d}:00" for hour in range(3)]
REPO = Path(__file__).resolve().parent.parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home whose toy location has three hours due."""
    monkeypatch.setenv("TOY_DIR", str(tmp_path))
    due(tmp_path, HOURS)
    return tmp_path


@pytest.fixture
def driver(home: Path) -> Iterator[Driver]:
    with Driver(home, TOY) as opened:
        opened.start_sensors(opened.sensor_names)
        yield opened


def due(home: Path, hours: list[str]) -> None:
    (home / "hours.json").write_text(json.dumps(hours))


def effects(home: Path) -> list[str]:
    path = home / "effects.log"
    return path.read_text().splitlines() if path.exists() else []


def materialized(driver: Driver, asset: str) -> set[str]:
    return set(driver.instance.get_materialized_partitions(dg.AssetKey(asset)))


# the internals


def test_dagster_internals_are_those_the_driver_was_written_for() -> None:
    changed = internals_changed()
    assert not changed, (
        f"dagster {dg.__version__} differs from {PINNED_DAGSTER}: " + "; ".join(changed) + ". Read "
        "dagster/_daemon/sensor.py again, adapt arena/driver.py, arena/launcher.py and arena/storage.py, "
        "then INTERNALS and PINNED_DAGSTER."
    )


def test_a_changed_internal_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(INTERNALS, "dagster:DagsterInstance.submit_run", ("self",))  # type: ignore[misc]
    monkeypatch.setitem(INTERNALS, "dagster._daemon.sensor:gone", ())  # type: ignore[misc]
    changed = "; ".join(internals_changed())
    assert "submit_run takes (self, run_id, workspace)" in changed
    assert "gone is gone" in changed


def test_the_driver_and_the_ui_name_the_code_location_alike() -> None:
    (origin,) = WorkspaceFileTarget([str(WORKSPACE)]).create_origins()
    assert isinstance(origin, ManagedGrpcPythonEnvCodeLocationOrigin)
    target = origin.loadable_target_origin
    assert (target.module_name, origin.location_name) == ("dagster_project.definitions", "redqueen")
    assert origin == location_origin_from_module_name("dagster_project.definitions", None, None, "redqueen")


# ticks


def test_a_tick_runs_what_its_sensor_requests_and_moves_the_cursor(driver: Driver, home: Path) -> None:
    tick = driver.tick("hours_due")
    assert tick.status == "success"
    assert [run.partition_key for run in tick.runs] == HOURS
    assert all(run.succeeded and run.tags["redqueen/sim_time"].endswith("sim") for run in tick.runs)
    assert driver.cursor("hours_due") == tick.cursor == HOURS[-1]
    assert materialized(driver, "signals") == set(HOURS)
    assert len(effects(home)) == 12


def test_an_idle_tick_is_skipped_with_its_reason_and_no_interval_holds_it_back(driver: Driver) -> None:
    driver.tick("hours_due")
    skipped = [driver.tick("hours_due") for _ in range(3)]  # its minimum interval is ten minutes
    assert {(t.status, t.skip_reason, t.runs) for t in skipped} == {("skipped", "no new hour", ())}
    assert len({tick.tick_id for tick in skipped}) == 3


def test_only_the_named_sensor_is_evaluated(driver: Driver) -> None:
    driver.tick("hours_due")
    ticked = {name: driver._latest_tick(driver._sensor(name)) is not None for name in driver.sensor_names}
    assert ticked == {name: name == "hours_due" for name in driver.sensor_names}


def test_a_run_key_is_spent_for_ever(driver: Driver) -> None:
    driver.tick("hours_due")
    sensor = driver._sensor("hours_due")
    state = driver.instance.get_instigator_state(sensor.get_remote_origin_id(), sensor.selector_id)
    assert state is not None
    driver.instance.update_instigator_state(state.with_data(state.instigator_data._replace(cursor=None)))
    assert driver.tick("hours_due").runs == ()


def test_a_sensor_mints_a_partition_and_its_run_in_one_tick(driver: Driver, home: Path) -> None:
    (home / "candidate.txt").write_text("2026-01-01T14-attack-7f3a")
    tick = driver.tick("candidate_due")
    assert [run.partition_key for run in tick.runs] == ["2026-01-01T14-attack-7f3a"]
    assert materialized(driver, "trained") == {"2026-01-01T14-attack-7f3a"}


def test_a_failed_run_is_data_and_reaches_the_failure_sensor(driver: Driver, home: Path) -> None:
    driver.tick("on_failure")  # its first tick only notes where the log ends
    (home / "candidate.txt").write_text("bad")
    tick = driver.tick("candidate_due")
    assert tick.status == "success"
    assert [run.error for run in tick.failed_runs] == ["step trained: ValueError: the toy candidate is bad"]
    assert driver.tick("on_failure").status == "success"
    assert "alert bad" in effects(home)


def test_a_run_status_sensor_sees_the_runs(driver: Driver, home: Path) -> None:
    driver.tick("after_hour")
    due(home, HOURS[:1])
    driver.tick("hours_due")
    driver.tick("after_hour")
    assert f"seen {HOURS[0]}" in effects(home)


def test_a_failing_sensor_raises_what_it_raised(driver: Driver) -> None:
    with pytest.raises(SensorFailed, match="'broken' failed: RuntimeError: the toy sensor is broken"):
        driver.tick("broken")
    tick = driver.tick("broken", raise_on_error=False)
    assert (tick.status, tick.error) == ("failure", "RuntimeError: the toy sensor is broken")


def test_unknown_names_and_sensors_that_are_off_are_refused_plainly(driver: Driver) -> None:
    with pytest.raises(InvalidInput, match=r"no sensor 'nope'.*hours_due"):
        driver.tick("nope")
    with pytest.raises(InvalidInput, match=r"no job 'nope'.*hour, lap"):
        driver.launch("nope")
    with pytest.raises(NotFound):
        driver.run("nope")
    driver.stop_sensors(["hours_due"])
    with pytest.raises(InvalidInput, match="switched off"):
        driver.tick("hours_due")


# runs by hand


def test_a_job_is_launched_by_hand_for_a_partition_and_some_of_its_assets(driver: Driver, home: Path) -> None:
    run = driver.launch("hour", HOURS[0], tags={"redqueen/reason": "by hand"}, asset_selection=["raw"])
    assert run.succeeded
    assert run.tags["redqueen/reason"] == "by hand"
    assert effects(home) == [f"raw {HOURS[0]}"]
    with pytest.raises(dg.DagsterUnknownPartitionError):
        driver.launch("hour", "2031-01-01-00:00")


# the home


def test_what_is_particular_to_this_process_is_not_written_down(driver: Driver) -> None:
    written = (driver.dagster_home / "dagster.yaml").read_text()
    assert written == DAGSTER_YAML
    assert "inline" not in written.lower()


def test_an_operators_configuration_is_left_alone(tmp_path: Path) -> None:
    path = dagster_home(tmp_path) / "dagster.yaml"
    path.parent.mkdir()
    path.write_text("telemetry: {enabled: false}\n")
    assert write_dagster_yaml(path.parent) == path
    assert path.read_text() == "telemetry: {enabled: false}\n"


def test_the_configuration_loads_and_starts_runs_without_a_queue(tmp_path: Path) -> None:
    write_dagster_yaml(tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        assert type(instance.run_coordinator).__name__ == "SyncInMemoryRunCoordinator"
        assert not instance.telemetry_enabled
        assert not instance.nux_enabled
        assert instance.get_settings("sensors") == {"use_threads": True, "num_workers": 4}


def test_the_stock_storage_reads_what_the_driver_wrote(driver: Driver) -> None:
    (run, *_) = driver.tick("hours_due").runs
    with dg.DagsterInstance.from_config(str(driver.dagster_home)) as stock:
        assert type(stock.event_log_storage).__name__ == "SqliteEventLogStorage"
        assert stock.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.SUCCESS
        assert len(stock.all_logs(run.run_id)) > 10
        sensor = driver._sensor("hours_due")
        (tick,) = stock.get_ticks(sensor.get_remote_origin_id(), sensor.selector_id)
        assert run.run_id in tick.run_ids


def test_output_of_runs_goes_to_files_and_not_to_the_terminal(
    home: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with Driver(home, TOY) as driver:
        run = driver.launch("hour", HOURS[0])
        print("progress", file=driver.terminal)
        written = capfd.readouterr()
        assert (written.out, written.err) == ("progress\n", "")
        (log_key, *_) = driver.instance.compute_log_manager.get_log_keys_for_log_key_prefix(
            [run.run_id, "compute_logs"], io_type=ComputeIOType.STDOUT
        )
        logs = driver.instance.compute_log_manager.get_log_data(log_key)
        assert b"a line on stdout" in (logs.stdout or b"")
        assert b"a line on stderr" in (logs.stderr or b"")
    assert "RUN_SUCCESS" in (home / "logs" / "dagster.log").read_text()


def test_one_process_drives_a_home(driver: Driver, home: Path) -> None:
    with pytest.raises(Refused, match=r"the simulation \(process \d+\) is doing so"):
        Driver(home, TOY).__enter__()


def test_the_environment_is_put_back(home: Path) -> None:
    before = dict(os.environ)
    with Driver(home, TOY):
        assert os.environ["RQ_HOME"] == str(home)
    assert dict(os.environ) == before


# death


DRIVE = """
import sys
from arena.driver import Driver
with Driver(sys.argv[1], "tests.toy_location") as driver:
    driver.start_sensors(["hours_due"])
    driver.recover()
    driver.tick("hours_due")
"""
DIE_IN_SUBMIT = """
import os
import dagster
dagster.DagsterInstance.submit_run = lambda self, run_id, workspace: os.kill(os.getpid(), 9)
"""
DIE_IN_RECOVERY = """
import os
import arena.driver
arena.driver.Driver._reexecute = lambda *_args: os.kill(os.getpid(), 9)
"""


def drive_until_killed(home: Path, before: str = "", **environment: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", before + DRIVE, str(home)],
        env={**os.environ, "TOY_DIR": str(home), **environment},
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr


def assert_completed(home: Path) -> None:
    """A new process reaches the state that one never killed reaches."""
    with Driver(home, TOY) as driver:
        recovered = driver.recover()
        assert all(driver.run(run_id).succeeded for run_id in recovered)
        tick = driver.tick("hours_due")
        assert sorted(str(run.partition_key) for run in tick.runs if run.succeeded) == HOURS
        for asset in ("raw", "clean", "features", "signals"):
            assert materialized(driver, asset) == set(HOURS)
        assert driver.cursor("hours_due") == HOURS[-1]
        assert tick.skip_reason == driver.tick("hours_due").skip_reason == "no new hour"
        assert driver.recover() == ()
        runs = driver.instance.get_runs()
        succeeded = [run for run in runs if run.status == dg.DagsterRunStatus.SUCCESS]
        assert sorted(run.tags["dagster/partition"] for run in succeeded) == HOURS
        assert all(run.is_finished and "redqueen/sim_time" in run.tags for run in runs)


def test_killed_in_the_middle_of_a_run_it_goes_on_from_the_unfinished_step(home: Path) -> None:
    drive_until_killed(home, TOY_KILL_AT="mid_run")
    assert effects(home) == [f"raw {HOURS[0]}"]
    assert_completed(home)
    assert effects(home).count(f"raw {HOURS[0]}") == 1


@pytest.mark.slow
@pytest.mark.parametrize(("before", "kill_at"), [("", "first_step"), (DIE_IN_SUBMIT, "")])
def test_killed_before_a_step_ended_it_begins_anew(home: Path, before: str, kill_at: str) -> None:
    drive_until_killed(home, before, TOY_KILL_AT=kill_at)
    assert_completed(home)


@pytest.mark.slow
def test_killed_while_recovering_it_recovers(home: Path) -> None:
    drive_until_killed(home, TOY_KILL_AT="mid_run")
    drive_until_killed(home, DIE_IN_RECOVERY)
    assert_completed(home)


def test_interrupted_it_stops_and_goes_on_later(home: Path) -> None:
    (home / "interrupt").touch()
    with Driver(home, TOY) as driver:
        driver.start_sensors(["hours_due"])
        with pytest.raises(KeyboardInterrupt):
            driver.tick("hours_due")
        assert len(driver.instance.get_runs()) == 1
    assert_completed(home)
    assert effects(home).count(f"raw {HOURS[0]}") == 1


# the UI on the same home


TOY_WORKSPACE = f"""
load_from:
  - python_module: {{module_name: {TOY}, location_name: redqueen}}
"""
SERVE = """
import sys
from pathlib import Path
from dagster_project.ui import serve_ui
from redqueen.errors import RedQueenError
home, port = Path(sys.argv[1]), int(sys.argv[2])
try:
    serve_ui(home, port, "--read-only" in sys.argv, workspace=home / "workspace.yaml",
             announce=lambda line: print(line, flush=True))
except RedQueenError as error:
    sys.exit(str(error))
"""
SENSORS = """
{ sensorsOrError(repositorySelector: {repositoryLocationName: "redqueen", repositoryName: "__repository__"}) {
    ... on Sensors { results { name sensorState { status typeSpecificData { ... on SensorData { lastCursor } }
    ticks(limit: 5) { status runIds } } } } } }
"""


@pytest.fixture
def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def serve(home: Path, port: int, *options: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SERVE, str(home), str(port), *options],
        env={**os.environ, "TOY_DIR": str(home), "PYTHONPATH": str(REPO)},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ask(port: int, query: str) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/graphql",
        data=json.dumps({"query": query}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["data"]


def children(pid: int) -> set[int]:
    """The processes below `pid`, at any depth."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        if parent == pid:
            child = int(stat.parent.name)
            found |= {child, *children(child)}
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.2)


@pytest.mark.slow
def test_the_ui_finds_what_the_driver_did_and_its_daemon_goes_on(home: Path, free_port: int) -> None:
    with Driver(home, TOY) as driver:
        driver.start_sensors(["hours_due", "candidate_due"])
        run_ids = list(driver.tick("hours_due").run_ids)
        driver.tick("candidate_due")
    (home / "workspace.yaml").write_text(TOY_WORKSPACE)
    process = serve(home, free_port)
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{free_port}" in process.stdout.readline(), process.stderr
        sensors = {s["name"]: s["sensorState"] for s in ask(free_port, SENSORS)["sensorsOrError"]["results"]}
        assert sensors["hours_due"]["status"] == "RUNNING"
        assert sensors["hours_due"]["typeSpecificData"]["lastCursor"] == HOURS[-1]
        assert {"status": "SUCCESS", "runIds": run_ids} in sensors["hours_due"]["ticks"]

        (home / "candidate.txt").write_text("by-the-daemon")
        with pytest.raises(Refused, match="the UI's daemon"):
            Driver(home, TOY).__enter__()
        wait_until(lambda: "trained by-the-daemon" in effects(home), 90)
        below = children(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0
        wait_until(lambda: not any(map(alive, below)))
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_ui_that_only_looks_stands_beside_a_simulation(driver: Driver, home: Path, free_port: int) -> None:
    (home / "workspace.yaml").write_text(TOY_WORKSPACE)
    process = serve(home, free_port, "--read-only")
    try:
        assert process.stdout is not None
        assert "without a daemon" in process.stdout.readline()
        assert f"http://127.0.0.1:{free_port}" in process.stdout.readline()
        driver.tick("hours_due")
        sensors = {s["name"]: s["sensorState"] for s in ask(free_port, SENSORS)["sensorsOrError"]["results"]}
        assert [tick["status"] for tick in sensors["hours_due"]["ticks"]] == ["SUCCESS"]
    finally:
        process.terminate()
        process.communicate()


@pytest.mark.slow
def test_the_ui_leaves_nothing_behind_when_killed_and_watches_its_parts(home: Path, free_port: int) -> None:
    (home / "workspace.yaml").write_text(TOY_WORKSPACE)
    process = serve(home, free_port)
    assert process.stdout is not None
    process.stdout.readline()
    second = serve(home, free_port)
    assert second.wait(60) == 1
    assert second.stderr is not None
    assert f"port {free_port}" in second.stderr.read()
    below = children(process.pid)
    process.kill()
    process.communicate()
    wait_until(lambda: not any(map(alive, below)))

    process = serve(home, free_port)
    assert process.stdout is not None
    process.stdout.readline()
    (daemon,) = [pid for pid in children(process.pid) if b"dagster._daemon\0run" in cmdline(pid)]
    os.kill(daemon, signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "the daemon ended" in said
    assert "daemon.log" in said


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
