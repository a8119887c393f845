"""Drives the real code location through Dagster's own sensor iteration, here, one sensor at a time.

The simulation decides *when* a sensor is looked at; what happens then (cursor, run keys, dynamic partitions,
tick and run records) is Dagster's own doing and is found by `make ui` afterwards. Nothing of the simulation
belongs here, and no other module touches Dagster's internals for driving; `INTERNALS` lists those used.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, Self, TextIO

import dagster as dg
import yaml  # type: ignore[import-untyped]
from dagster._core.definitions.selector import JobSubsetSelector
from dagster._core.errors import DagsterInvalidSubsetError
from dagster._core.execution.plan.resume_retry import ReexecutionStrategy
from dagster._core.instance.ref import InstanceRef
from dagster._core.remote_origin import (
    CodeLocationOrigin,
    InProcessCodeLocationOrigin,
    RemoteInstigatorOrigin,
    RemoteRepositoryOrigin,
)
from dagster._core.remote_representation.code_location import InProcessCodeLocation
from dagster._core.remote_representation.external import RemoteJob, RemoteRepository, RemoteSensor
from dagster._core.scheduler.instigation import InstigatorTick, SensorInstigatorData, TickStatus
from dagster._core.storage.tags import PARENT_RUN_ID_TAG
from dagster._core.types.loadable_target_origin import LoadableTargetOrigin
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load import location_origin_from_module_name
from dagster._core.workspace.load_target import InProcessWorkspaceLoadTarget
from dagster._daemon.sensor import execute_sensor_iteration

from arena.launcher import STRANDED_TAG, InlineRunLauncher
from arena.storage import close_connections
from dagster_project.instance import CONFIG_FILE, LOCATION_NAME, claim_home, dagster_home, write_dagster_yaml
from redqueen.errors import InvalidInput, NotFound, RedQueenError

PINNED_DAGSTER = "1.13.27"
INTERNALS: Mapping[str, tuple[str, ...]] = {
    "dagster._daemon.sensor:execute_sensor_iteration": (
        "workspace_process_context", "logger", "threadpool_executor", "submit_threadpool_executor",
        "sensor_tick_futures", "debug_crash_flags", "instrument_elapsed",
    ),
    "dagster._core.remote_representation.external:RemoteSensor": ("sensor_snap", "handle"),
    "dagster._core.remote_representation.external:RemoteSensor.get_remote_origin": ("self",),
    "dagster._core.workspace.load:location_origin_from_module_name": (
        "module_name", "attribute", "working_directory", "location_name", "executable_path",
    ),
    "dagster._core.workspace.context:WorkspaceProcessContext": (
        "instance", "workspace_load_target", "version", "read_only", "grpc_server_registry",
        "code_server_log_level", "server_command",
    ),
    "dagster._core.workspace.context:WorkspaceProcessContext.create_request_context": ("self", "source"),
    "dagster._core.workspace.context:WorkspaceRequestContext.get_code_location_entries": ("self",),
    "dagster._core.instance.ref:InstanceRef.from_dir": (
        "base_dir", "config_dir", "config_filename", "overrides",
    ),
    "dagster._core.remote_origin:InProcessCodeLocationOrigin": (
        "loadable_target_origin", "container_image", "entry_point", "container_context", "location_name",
    ),
    "dagster._core.remote_representation.code_location:InProcessCodeLocation._get_repo_def": ("self", "name"),
    "dagster._core.execution.api:execute_run": ("job", "dagster_run", "instance", "raise_on_error"),
    "dagster._utils.hosted_user_process:recon_job_from_origin": ("origin",),
    "dagster._core.execution.compute_logs:redirect_to_file": ("stream", "filepath"),
    "dagster._core.storage.local_compute_log_manager:LocalComputeLogManager.capture_logs": (
        "self", "log_key",
    ),
    "dagster._core.storage.runs:SqliteRunStorage.connect": ("self",),
    "dagster._core.storage.schedules:SqliteScheduleStorage.connect": ("self",),
    "dagster._core.storage.event_log:SqliteEventLogStorage._connect": ("self", "shard"),
    "dagster._core.storage.event_log:SqliteEventLogStorage._initdb": ("self", "engine", "for_index_shard"),
    "dagster._core.storage.event_log:SqliteEventLogStorage.conn_string_for_shard": ("self", "shard_name"),
    "dagster._core.storage.event_log:SqliteEventLogStorage.path_for_shard": ("self", "run_id"),
    "dagster._core.storage.sqlite_storage:DagsterSqliteStorage": ("base_dir", "inst_data"),
    "dagster:DagsterInstance.create_reexecuted_run": (
        "self", "parent_run", "request_context", "code_location", "remote_job", "strategy", "extra_tags",
        "run_config", "use_parent_run_tags",
    ),
    "dagster:DagsterInstance.report_run_failed": ("self", "dagster_run", "message", "job_failure_data"),
    "dagster:DagsterInstance.submit_run": ("self", "run_id", "workspace"),
}  # fmt: skip
"""Every internal of Dagster that is called or overridden here, with its parameters in `PINNED_DAGSTER`."""

UNFINISHED = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)
STORAGE_KEYS = {"storage", "run_storage", "event_log_storage", "schedule_storage", "instance_class"}


class SensorFailed(RedQueenError):
    """A sensor's evaluation raised, or what it requested could not be launched."""

    def __init__(self, tick: Tick) -> None:
        super().__init__(
            f"sensor '{tick.sensor}' failed: {tick.error}. Its page in the UI has tick {tick.tick_id}."
        )
        self.tick = tick


@dataclass(frozen=True)
class Run:
    """A run as it stands in the instance; `error` is the first failure's message, None unless it failed."""

    run_id: str
    job: str
    status: str
    partition_key: str | None
    tags: Mapping[str, str]
    error: str | None

    @property
    def succeeded(self) -> bool:
        """Whether it ended well."""
        return self.status == dg.DagsterRunStatus.SUCCESS.value


@dataclass(frozen=True)
class Tick:
    """One evaluation of one sensor, with the runs that it launched, all of them over."""

    sensor: str
    tick_id: str
    status: Literal["success", "skipped", "failure"]
    skip_reason: str | None
    cursor: str | None
    error: str | None
    runs: tuple[Run, ...]

    @property
    def run_ids(self) -> tuple[str, ...]:
        """The ids of `runs`."""
        return tuple(run.run_id for run in self.runs)

    @property
    def failed_runs(self) -> tuple[Run, ...]:
        """Those of `runs` that did not succeed."""
        return tuple(run for run in self.runs if not run.succeeded)


def internals_changed() -> list[str]:
    """What no longer looks as it did in `PINNED_DAGSTER`, one sentence each; empty when all is well."""
    changed = []
    for name, expected in INTERNALS.items():
        module, _, path = name.partition(":")
        try:
            target: Any = import_module(module)
            for part in path.split("."):
                target = getattr(target, part)
            found = tuple(inspect.signature(target).parameters)
        except (ImportError, AttributeError) as error:
            changed.append(f"{name} is gone ({error})")
            continue
        found = found[1:] if found[:1] == ("cls",) else found
        if sorted(found) != sorted(expected):
            changed.append(f"{name} takes ({', '.join(found)}), it took ({', '.join(expected)})")
    return changed


class _EagerSensor(RemoteSensor):
    """A sensor that is due whenever it is asked: intervals are wall time, the simulation's clock is not.

    It gives its origin as `workspace.yaml` would: the UI's list of sensors shows no tick that was recorded
    under another.
    """

    def __init__(
        self, sensor: RemoteSensor, repository: RemoteRepository, location: CodeLocationOrigin
    ) -> None:
        super().__init__(sensor._sensor_snap, repository.handle)
        self._origin = RemoteInstigatorOrigin(
            repository_origin=RemoteRepositoryOrigin(
                code_location_origin=location, repository_name=repository.name
            ),
            instigator_name=sensor.name,
        )

    def get_remote_origin(self) -> RemoteInstigatorOrigin:
        return self._origin

    @property
    def min_interval_seconds(self) -> int:
        return 0


class _OneSensor:
    """The workspace as the iteration sees it: everything, with one sensor in it.

    The iteration shuffles the sensors that it finds and evaluates all; the simulation states the order.
    """

    def __init__(self, workspace: WorkspaceProcessContext, sensor: RemoteSensor) -> None:
        self._workspace = workspace
        repository = SimpleNamespace(get_sensors=lambda: [sensor])
        location = SimpleNamespace(get_repositories=lambda: {"only": repository})
        name = sensor.handle.location_name
        self._entries = {
            name: SimpleNamespace(origin=SimpleNamespace(location_name=name), code_location=location)
        }

    def __getattr__(self, name: str) -> Any:
        return getattr(self._workspace, name)

    def create_request_context(self, source: object | None = None) -> Any:
        request = self._workspace.create_request_context(source)
        # Only the iteration's listing of sensors asks for this; launching a run asks the location by name.
        request.get_code_location_entries = lambda: self._entries  # type: ignore[method-assign,assignment,return-value]
        return request


class Driver:
    """Dagster for one home, driven by the caller. A context manager; not safe for threads.

    Parameters:
        home: the Red Queen home; DAGSTER_HOME is `home/dagster`, logs go to `home/logs/dagster.log`.
        module: the module whose `defs` are driven.
        location_name: the code location's name, that of `workspace.yaml`.

    Raises on entering: Refused when another process drives this home; RedQueenError when Dagster's internals
    are not those this was written for; whatever loading the module raises.
    """

    def __init__(
        self, home: Path, module: str = "dagster_project.definitions", location_name: str = LOCATION_NAME
    ) -> None:
        self.home = Path(home).absolute()
        self.dagster_home = dagster_home(self.home)
        self.log_path = self.home / "logs" / "dagster.log"
        self.instance: dg.DagsterInstance
        self.terminal: TextIO
        """The terminal, also during a run (whose output goes to its log): for progress displays."""
        self._module = module
        self._location_name = location_name
        self._stack = ExitStack()
        self._logger = logging.getLogger("dagster.daemon.SensorDaemon")

    def __enter__(self) -> Self:
        if changed := internals_changed():
            raise RedQueenError(
                f"dagster {version('dagster')} is not the {PINNED_DAGSTER} that the demo was written for: "
                + "; ".join(changed)
                + ". Install the versions of constraints.txt."
            )
        with ExitStack() as stack:
            self._open(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stack.close()

    def _open(self, stack: ExitStack) -> None:
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        write_dagster_yaml(self.dagster_home)
        stack.enter_context(claim_home(self.dagster_home, "the simulation"))
        stack.enter_context(_environment(DAGSTER_HOME=str(self.dagster_home), RQ_HOME=str(self.home)))
        stack.enter_context(_logs_in(self.log_path))
        self.terminal = stack.enter_context(_terminal())
        stack.callback(close_connections, self.dagster_home)
        ref = InstanceRef.from_dir(str(self.dagster_home), overrides=self._overrides())
        self.instance = stack.enter_context(dg.DagsterInstance.from_ref(ref))
        self._workspace = stack.enter_context(
            WorkspaceProcessContext(self.instance, InProcessWorkspaceLoadTarget(self._origin()))
        )
        entry = self._workspace.get_current_workspace().code_location_entries[self._location_name]
        if entry.load_error:
            why = entry.load_error.to_string()
            raise RedQueenError(f"the definitions in {self._module} do not load: {why}")

    def _overrides(self) -> dict[str, Any]:
        """What differs in this process only; `dagster.yaml` stays what the real daemon needs."""

        def use(module: str, name: str, **config: str) -> dict[str, Any]:
            return {"module": module, "class": name, "config": config}

        overrides: dict[str, Any] = {
            "run_launcher": use("arena.launcher", "InlineRunLauncher", log_path=str(self.log_path)),
            "run_coordinator": use("dagster._core.run_coordinator", "DefaultRunCoordinator"),
            # Purging old ticks is the daemon's housekeeping: a DELETE on every tick here.
            "retention": {"sensor": {"purge_after_days": -1}},
        }
        configured = yaml.safe_load((self.dagster_home / CONFIG_FILE).read_text(encoding="utf-8")) or {}
        if not STORAGE_KEYS & configured.keys():
            storage = use("arena.storage", "KeptSqliteStorage", base_dir=str(self.dagster_home))
            overrides["storage"] = {"custom": storage}
        if "compute_logs" not in configured:
            logs = str(self.dagster_home / "storage")
            overrides["compute_logs"] = use("arena.launcher", "QuietComputeLogManager", base_dir=logs)
        return overrides

    def _origin(self) -> InProcessCodeLocationOrigin:
        target = LoadableTargetOrigin(
            executable_path=sys.executable, module_name=self._module, working_directory=os.getcwd()
        )
        return InProcessCodeLocationOrigin(target, location_name=self._location_name)

    # what the location holds

    @property
    def _location(self) -> InProcessCodeLocation:
        location = self._workspace.create_request_context().get_code_location(self._location_name)
        assert isinstance(location, InProcessCodeLocation)
        return location

    @cached_property
    def _repository(self) -> RemoteRepository:
        (repository,) = self._location.get_repositories().values()
        return repository

    @cached_property
    def _sensors(self) -> dict[str, RemoteSensor]:
        repository = self._repository
        location = location_origin_from_module_name(self._module, None, None, self._location_name)
        return {s.name: _EagerSensor(s, repository, location) for s in repository.get_sensors()}

    @property
    def sensor_names(self) -> tuple[str, ...]:
        """The names of the location's sensors, sorted."""
        return tuple(sorted(self._sensors))

    def _sensor(self, name: str) -> RemoteSensor:
        if name not in self._sensors:
            known = ", ".join(self.sensor_names)
            raise InvalidInput(f"there is no sensor '{name}' in {self._module}; there are: {known}")
        return self._sensors[name]

    def _job(self, name: str, assets: Sequence[dg.AssetKey] | None = None) -> RemoteJob:
        if not self._repository.has_job(name):
            known = ", ".join(sorted(job.name for job in self._repository.get_all_jobs()))
            raise InvalidInput(f"there is no job '{name}' in {self._module}; there are: {known}")
        return self._location.get_job(
            JobSubsetSelector(
                location_name=self._location_name,
                repository_name=self._repository.name,
                job_name=name,
                op_selection=None,
                asset_selection=assets,
            )
        )

    # sensors

    def start_sensors(self, names: Sequence[str]) -> None:
        """Switch sensors on. The state stays with the home: `make ui` finds them on."""
        for name in names:
            self.instance.start_sensor(self._sensor(name))

    def stop_sensors(self, names: Sequence[str]) -> None:
        """Switch sensors off, for the UI's daemon too."""
        for name in names:
            sensor = self._sensor(name)
            self.instance.stop_sensor(sensor.get_remote_origin_id(), sensor.selector_id, sensor)

    def cursor(self, sensor_name: str) -> str | None:
        """The sensor's cursor, None before its first tick that set one."""
        sensor = self._sensor(sensor_name)
        state = self.instance.get_instigator_state(sensor.get_remote_origin_id(), sensor.selector_id)
        data = state.instigator_data if state else None
        return data.cursor if isinstance(data, SensorInstigatorData) else None

    def tick(self, sensor_name: str, *, raise_on_error: bool = True) -> Tick:
        """Evaluate one sensor once, and run to the end whatever it requests.

        A tick that a killed process left half done is finished first; its runs, or the re-executions that
        `recover` made of them, are the first of this one's.

        Returns: the tick. A failed run is data in it (`failed_runs`), not an error.
        Raises: SensorFailed when the evaluation or a launch fails, unless `raise_on_error` is False;
            InvalidInput when there is no such sensor, or it is switched off;
            KeyboardInterrupt when Ctrl-C ended one of its runs (`recover` goes on from there).
        """
        sensor = self._sensor(sensor_name)
        before = self._latest_tick(sensor)
        cut_off = before and before.status == TickStatus.STARTED and before.unsubmitted_run_ids_with_requests
        finished = self._evaluate(sensor).runs if cut_off else ()
        tick = self._evaluate(sensor)
        tick = replace(tick, runs=(*finished, *tick.runs))
        if raise_on_error and tick.error:
            raise SensorFailed(tick)
        return tick

    def _evaluate(self, sensor: RemoteSensor) -> Tick:
        before = self._latest_tick(sensor)
        iteration = execute_sensor_iteration(
            _OneSensor(self._workspace, sensor),  # type: ignore[arg-type]
            self._logger,
            threadpool_executor=None,
            submit_threadpool_executor=None,
        )
        errors = []
        for error in iteration:
            if error is not None:
                errors.append(error.message.strip())
            if self._launcher.interrupted:
                iteration.close()  # leaves the tick as a kill would: to be resumed
            self._raise_if_interrupted()
        after = self._latest_tick(sensor)
        resumed = before and before.status == TickStatus.STARTED
        if after is None or (before and before.tick_id == after.tick_id and not resumed):
            raise InvalidInput(
                f"sensor '{sensor.name}' was not evaluated: it is switched off. "
                f"Switch it on in the UI, or call start_sensors(['{sensor.name}'])."
            )
        return self._tick(sensor.name, after, errors)

    def _latest_tick(self, sensor: RemoteSensor) -> InstigatorTick | None:
        ticks = self.instance.get_ticks(sensor.get_remote_origin_id(), sensor.selector_id, limit=1)
        return ticks[0] if ticks else None

    def _tick(self, sensor_name: str, record: InstigatorTick, errors: Sequence[str]) -> Tick:
        statuses: dict[TickStatus, Literal["success", "skipped", "failure"]] = {
            TickStatus.SUCCESS: "success",
            TickStatus.SKIPPED: "skipped",
        }
        causes = [*([_deepest(record.error)] if record.error else []), *errors]
        run_ids = dict.fromkeys([*record.run_ids, *(record.tick_data.reserved_run_ids or ())])
        return Tick(
            sensor=sensor_name,
            tick_id=str(record.tick_id),
            status=statuses.get(record.status, "failure"),
            skip_reason=record.skip_reason,
            cursor=record.cursor,
            error=causes[0] if causes else None,
            runs=tuple(self.run(self._latest(run_id)) for run_id in run_ids if self.instance.has_run(run_id)),
        )

    def _latest(self, run_id: str) -> str:
        """The run that finally stands for this one: itself, unless it was stranded and re-executed."""
        run = self.instance.get_run_by_id(run_id)
        if run is None or run.tags.get(STRANDED_TAG) is None:
            return run_id
        children = self.instance.get_runs(dg.RunsFilter(tags={PARENT_RUN_ID_TAG: run_id}), limit=1)
        return self._latest(children[0].run_id) if children else run_id

    # runs

    @property
    def _launcher(self) -> InlineRunLauncher:
        launcher = self.instance.run_launcher
        assert isinstance(launcher, InlineRunLauncher)
        return launcher

    def _raise_if_interrupted(self) -> None:
        if self._launcher.interrupted:
            self._launcher.interrupted = False
            raise KeyboardInterrupt

    def run(self, run_id: str) -> Run:
        """A run by its id. Raises: NotFound."""
        run = self.instance.get_run_by_id(run_id)
        if run is None:
            raise NotFound(f"run {run_id}")
        failed = run.status == dg.DagsterRunStatus.FAILURE
        return Run(
            run_id=run_id,
            job=run.job_name,
            status=run.status.value,
            partition_key=run.tags.get("dagster/partition"),
            tags=dict(run.tags),
            error=self._failure(run_id) if failed else None,
        )

    def run_tags(self, run_id: str) -> Mapping[str, str]:
        """A run's tags: why it was started, its partition, its simulated time. Raises: NotFound."""
        return self.run(run_id).tags

    def _failure(self, run_id: str) -> str:
        kinds = {dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE}
        events = [entry.dagster_event for entry in self.instance.all_logs(run_id, of_type=kinds)]
        for event in events:
            if event and event.event_type == dg.DagsterEventType.STEP_FAILURE:
                error = event.step_failure_data.error
                return f"step {event.step_key}: {_deepest(error) if error else event.message}"
        return next((event.message or "" for event in events if event), "") or "it says nothing about why"

    def launch(
        self,
        job_name: str,
        partition_key: str | None = None,
        tags: Mapping[str, str] | None = None,
        run_config: Mapping[str, Any] | None = None,
        asset_selection: Sequence[str | dg.AssetKey] | None = None,
    ) -> Run:
        """Run a job by hand, as "Materialize" in the UI does, and wait for its end.

        Parameters: `asset_selection` narrows the job to some of its assets ("a/b" or keys).
        Returns: the run, over; a failure is data in it.
        Raises: InvalidInput for an unknown job; Dagster's errors for an unknown partition or asset, or bad
            configuration.
        """
        assets = [dg.AssetKey.from_coercible(_key(asset)) for asset in asset_selection or ()] or None
        job = self._job(job_name, assets)
        request = dg.RunRequest(
            run_config=dict(run_config or {}), tags=dict(tags or {}), partition_key=partition_key
        )
        if partition_key is not None:
            definition = self._location._get_repo_def(self._repository.name).get_job(job_name)
            request = request.with_resolved_tags_and_config(definition, [], self.instance)
        run = self._create_run(job, request, assets)
        self._submit(run.run_id)
        return self.run(run.run_id)

    def _create_run(
        self, job: RemoteJob, request: dg.RunRequest, assets: Sequence[dg.AssetKey] | None
    ) -> dg.DagsterRun:
        plan = self._location.get_execution_plan(
            job, request.run_config, step_keys_to_execute=None, known_state=None, instance=self.instance
        )
        return self.instance.create_run(
            job_name=job.name,
            run_id=None,
            run_config=request.run_config,
            status=dg.DagsterRunStatus.NOT_STARTED,
            tags={**job.run_tags, **request.tags},
            root_run_id=None,
            parent_run_id=None,
            step_keys_to_execute=None,
            execution_plan_snapshot=plan.execution_plan_snapshot,
            job_snapshot=job.job_snapshot,
            parent_job_snapshot=job.parent_job_snapshot,
            asset_selection=frozenset(assets) if assets else None,
            asset_check_selection=None,
            resolved_op_selection=job.resolved_op_selection,
            op_selection=None,
            remote_job_origin=job.get_remote_origin(),
            job_code_origin=job.get_python_origin(),
            asset_graph=self._repository.asset_graph,
        )

    def _submit(self, run_id: str) -> None:
        self.instance.submit_run(run_id, self._workspace.create_request_context())
        self._raise_if_interrupted()

    # recovery

    def recover(self) -> tuple[str, ...]:
        """Finish what a killed process left: call it before the first tick.

        A run that had not begun is launched; one cut off is marked failed and re-executed under its own tags,
        from the first unfinished step. May itself be killed and called again. Ticks cut off are resumed by
        Dagster when their sensor is next evaluated.

        Returns: the ids of the runs launched now, oldest first; their outcome is in `run(id)`.
        """
        runs = self.instance.get_runs(dg.RunsFilter(statuses=list(UNFINISHED)))
        stranded = self.instance.get_runs(
            dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags={STRANDED_TAG: "true"})
        )
        launched = (self._recover(run) for run in reversed([*runs, *stranded]))
        return tuple(run_id for run_id in launched if run_id)

    def _recover(self, run: dg.DagsterRun) -> str | None:
        if run.status == dg.DagsterRunStatus.NOT_STARTED:
            self._submit(run.run_id)
            return run.run_id
        if run.status == dg.DagsterRunStatus.CANCELING:
            self.instance.report_run_canceled(run)
            return None
        if run.status != dg.DagsterRunStatus.FAILURE:
            self._strand(run)
        child = self.instance.get_runs(dg.RunsFilter(tags={PARENT_RUN_ID_TAG: run.run_id}), limit=1)
        return None if child else self._reexecute(run.run_id)

    def _strand(self, run: dg.DagsterRun) -> None:
        # Tag first: a kill between the two must not leave a failed run that nobody re-executes.
        self.instance.add_run_tags(run.run_id, {STRANDED_TAG: "true"})
        events = self.instance.event_log_storage
        if events.supports_global_concurrency_limits:
            events.free_concurrency_slots_for_run(run.run_id)
        self.instance.report_run_failed(run, "The process executing this run went away; re-executing it.")

    def _reexecute(self, run_id: str) -> str:
        parent = self.instance.get_run_by_id(run_id)
        assert parent is not None
        finished = self.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_SUCCESS)
        try:
            strategy = ReexecutionStrategy.FROM_FAILURE if finished else ReexecutionStrategy.ALL_STEPS
            child = self._create_reexecution(parent, strategy)
        except DagsterInvalidSubsetError:  # every step had ended, only the run's own end was missing
            child = self._create_reexecution(parent, ReexecutionStrategy.ALL_STEPS)
        self._submit(child.run_id)
        return child.run_id

    def _create_reexecution(self, parent: dg.DagsterRun, strategy: ReexecutionStrategy) -> dg.DagsterRun:
        assets = sorted(parent.asset_selection) if parent.asset_selection else None
        return self.instance.create_reexecuted_run(
            parent_run=parent,
            request_context=self._workspace.create_request_context(),
            code_location=self._location,
            remote_job=self._job(parent.job_name, assets),
            strategy=strategy,
            extra_tags={STRANDED_TAG: "recovered"},
            use_parent_run_tags=True,
        )


def _key(asset: str | dg.AssetKey) -> dg.AssetKey:
    return asset if isinstance(asset, dg.AssetKey) else dg.AssetKey.from_user_string(asset)


def _deepest(error: Any) -> str:
    """The message at the root of a chain of Dagster's wrappings."""
    while error.cause:
        error = error.cause
    return str(error.message).strip()


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _logs_in(path: Path) -> Iterator[None]:
    """Send Dagster's own warnings and errors to a file instead of the terminal."""
    logger = logging.getLogger("dagster")
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        handler.close()
        logger.level, logger.propagate = before


@contextmanager
def _terminal() -> Iterator[TextIO]:
    try:
        descriptor = os.dup(sys.stdout.fileno())
    except (OSError, ValueError):  # captured by a test runner, or closed
        yield sys.stdout
        return
    with os.fdopen(descriptor, "w", encoding="utf-8", buffering=1) as terminal:
        yield terminal
