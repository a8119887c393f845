"""Runs launched inside the driving process, and their output kept off the terminal. Only for `arena.driver`.

Both classes are named to Dagster as overrides of this process's instance and never written to `dagster.yaml`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import dagster as dg
from dagster._core.events import RunFailureReason
from dagster._core.execution.api import execute_run
from dagster._core.execution.compute_logs import redirect_to_file
from dagster._core.launcher import LaunchRunContext, RunLauncher
from dagster._core.storage.compute_log_manager import CapturedLogContext, ComputeIOType
from dagster._core.storage.local_compute_log_manager import IO_TYPE_EXTENSION, LocalComputeLogManager
from dagster._core.storage.tags import RUN_FAILURE_REASON_TAG
from dagster._serdes import ConfigurableClass, ConfigurableClassData
from dagster._utils import ensure_file, touch_file
from dagster._utils.hosted_user_process import recon_job_from_origin

STRANDED_TAG = "redqueen/stranded"
"""On runs whose process went away: "true" until they are re-executed; "recovered" on the re-execution."""


@contextmanager
def output_to_file(out_path: str, err_path: str) -> Iterator[None]:
    """Send this process's standard output and error, children's included, to two files (appending)."""
    with ExitStack() as stack:
        stack.enter_context(redirect_to_file(sys.stdout, out_path))
        stack.enter_context(redirect_to_file(sys.stderr, err_path))
        yield


class InlineRunLauncher(RunLauncher, ConfigurableClass):
    """Executes each run before `launch_run` returns, in this process.

    `interrupted` turns true when Ctrl-C or SIGTERM ended a run: Dagster swallows the signal, the driver
    must not.
    """

    def __init__(self, log_path: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._inst_data = inst_data
        self._log_path = log_path
        self.interrupted = False
        super().__init__()

    @property
    def inst_data(self) -> ConfigurableClassData | None:
        """How Dagster made this object."""
        return self._inst_data

    @classmethod
    def config_type(cls) -> dict[str, Any]:
        """`log_path`: where a run's console output goes."""
        return {"log_path": str}

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Mapping[str, Any]) -> Self:
        """Called by Dagster."""
        return cls(config_value["log_path"], inst_data=inst_data)

    def launch_run(self, context: LaunchRunContext) -> None:
        """Execute the run. A failed run is recorded and returns normally, as from any other launcher."""
        origin = context.job_code_origin
        if origin is None:
            raise dg.DagsterInvariantViolationError(f"run {context.dagster_run.run_id} names no code to run")
        with output_to_file(self._log_path, self._log_path):
            result = execute_run(recon_job_from_origin(origin), context.dagster_run, self._instance)
        if not result.success:
            self._note_interruption(context.dagster_run.run_id)

    def _note_interruption(self, run_id: str) -> None:
        run = self._instance.get_run_by_id(run_id)
        if run and run.tags.get(RUN_FAILURE_REASON_TAG) == RunFailureReason.UNEXPECTED_TERMINATION.value:
            self._instance.add_run_tags(run_id, {STRANDED_TAG: "true"})
            self.interrupted = True

    def terminate(self, run_id: str) -> bool:
        """False: a run ends before anyone could ask for its end."""
        return False


class QuietComputeLogManager(LocalComputeLogManager):
    """Writes a run's output to the files that the UI shows, and not to the terminal.

    The stock one mirrors it through two `tail` and two watcher processes a run: 0.4 s and a flooded terminal.
    """

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Mapping[str, Any]
    ) -> QuietComputeLogManager:
        """Called by Dagster."""
        return cls(inst_data=inst_data, **config_value)

    @contextmanager
    def capture_logs(self, log_key: Sequence[str]) -> Iterator[CapturedLogContext]:
        """Capture standard output and error under `log_key` until the block ends."""
        out, err = (
            self.get_captured_local_path(log_key, IO_TYPE_EXTENSION[kind])
            for kind in (ComputeIOType.STDOUT, ComputeIOType.STDERR)
        )
        ensure_file(out)
        with output_to_file(out, err):
            yield CapturedLogContext(log_key)
        touch_file(self.complete_artifact_path(log_key))
