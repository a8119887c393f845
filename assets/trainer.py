"""The training process as Dagster sees it: what it tells while it runs, how it failed, how it went.

Belongs here: the parent's side of Dagster Pipes and the figures in the UI. What is trained is decided by the
asset `candidate_model`, how by `models.training`.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dagster import (
    AssetExecutionContext,
    AssetObservation,
    Failure,
    MetadataValue,
    PipesSubprocessClient,
    PipesTempFileMessageReader,
    TableRecord,
)

from assets.common import picture
from redqueen import evaluation as judging

if TYPE_CHECKING:
    from models.train import TrainingSpec

CURVES = ("epoch", "loss", "validation_loss", "validation_pr_auc", "examples_per_s")
"""Figures of an event that are plotted on the asset's page while the training runs."""


def train(context: AssetExecutionContext, pipes: PipesSubprocessClient, spec: TrainingSpec) -> dict[str, Any]:
    """Run a training to its end; returns what its `result.json` says.

    Each stage is a line in the run's log; figures of the learning curve are also observations of the asset,
    which plots them at once: a materialization would come only when all is over.

    Raises:
        Failure: the process failed; its own reason, where it left one, and then there is no use in retrying.
    """
    from models.train import FAILURE

    folder = Path(spec.out)
    (folder / FAILURE).unlink(missing_ok=True)
    client = PipesSubprocessClient(
        env=pipes.env,
        cwd=pipes.cwd,
        message_reader=LiveReader(lambda event: _observe(context, event)),
        forward_termination=pipes.forward_termination,
        termination_timeout_seconds=pipes.termination_timeout_seconds,
    )
    try:
        client.run(
            command=[sys.executable, "-m", "models.train"], context=context, extras={"spec": spec.to_dict()}
        ).get_results()
    except Exception as error:  # what Dagster raises then is not public
        if (folder / FAILURE).exists():
            why = json.loads((folder / FAILURE).read_text())["error"]
            raise Failure(f"the training stopped: {why}", allow_retries=False) from error
        raise
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def _observe(context: AssetExecutionContext, event: Mapping[str, Any]) -> None:
    figures = {name: float(event[name]) for name in CURVES if name in event}
    if "loss" in figures:
        partition = context.partition_key if context.has_partition_key else None
        context.log_event(
            AssetObservation(
                context.asset_key,
                description=str(event["stage"]),
                partition=partition,
                metadata={"stage": str(event["stage"]), **figures},
            )
        )


class LiveReader(PipesTempFileMessageReader):
    """Hands on each event of the training when it comes: the client shows messages only after the end."""

    def __init__(self, tell: Callable[[Mapping[str, Any]], None]) -> None:
        super().__init__()
        self._tell = tell

    @contextlib.contextmanager
    def read_messages(self, handler: Any) -> Iterator[Any]:
        with super().read_messages(_Tee(handler, self._tell)) as params:  # type: ignore[arg-type]
            yield params


class _Tee:
    """A message handler in front of Dagster's own."""

    def __init__(self, handler: Any, tell: Callable[[Mapping[str, Any]], None]) -> None:
        self._handler, self._tell = handler, tell

    def handle_message(self, message: Any) -> None:
        self._handler.handle_message(message)
        if message["method"] == "report_custom_message":
            event = message["params"]["payload"].get("event")
            # A figure that the event log would not take must not end the reading of all later messages.
            with contextlib.suppress(Exception):
                if event is not None:
                    self._tell(event)

    def report_pipes_framework_exception(self, origin: str, exc_info: Any) -> None:
        self._handler.report_pipes_framework_exception(origin, exc_info)


SHOWN_ELSEWHERE = ("training", "miss_costs", "fpr_budget")
"""Metrics that are told in words or in a table; a plot of a setting tells nothing."""


def metadata_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """What the materialization shows: verdict and figures first, then the time it took and the curves."""
    seconds = [TableRecord({"part": k, "seconds": round(float(v), 2)}) for k, v in result["seconds"].items()]
    training, old = result["metrics"]["training"], result["metrics"]["old_campaigns"]
    shown: dict[str, Any] = {
        "model_id": result["model_id"],
        "selected": result["selected"],
        "stopped": STOPPED[training["stopped"]],
        "started": training["start"],
        "training_seconds": float(result["total_seconds"]),
        "peak_memory_mb": float(result["peak_memory_mb"]),
        **judging.headline({k: v for k, v in result["metrics"].items() if k not in SHOWN_ELSEWHERE}),
        "seconds_by_part": MetadataValue.table(seconds),
        "at_thresholds": MetadataValue.table(
            [TableRecord(row) for row in judging.at_thresholds(result["metrics"])]
        ),
    }
    if old["recall"] is None:
        shown["old_campaigns"] = "no held message of a campaign that is over"
    if result["curve"]:
        best = training["best_epoch"]
        shown["learning_curve"] = picture(lambda axes: _draw(axes, result["curve"], best))
    return shown


STOPPED = {
    None: "the schedule was carried out",
    "early": "early: validation had stopped improving; the best epoch was kept",
    "time": "at the limit of time (RQ_TRAINING_TIMEOUT_S); the best epoch so far was kept",
}


def _draw(axes: Any, curve: Sequence[Mapping[str, float]], best: int | None) -> None:
    epochs = [point["epoch"] for point in curve]
    axes.plot(epochs, [point["loss"] for point in curve], marker="o", color="#0b6e4f", label="training")
    judged = [point for point in curve if "validation_loss" in point]
    if judged:
        places = [point["epoch"] for point in judged]
        losses = [point["validation_loss"] for point in judged]
        axes.plot(places, losses, marker="s", color="#b5541c", label="validation")
        if best and best <= len(places):
            at = places[best - 1], losses[best - 1]
            axes.plot(*at, marker="*", markersize=14, color="#b5541c", linestyle="", label="kept")
    axes.set_xlabel("epoch (the last one is the refresh)")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
