"""The training process: `python -m models.train`, a Dagster Pipes child or, with `--spec FILE`, a plain
command.

Belongs here: what the parent hands over (`TrainingSpec`), reporting back, dying with the parent. The work
itself is `models.training`, which is imported late: this module is light, so that assets can build a spec
from it.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from redqueen.errors import InvalidInput, RedQueenError

NO_ENCODER = "none"

Progress = Callable[[dict[str, Any]], None]
"""Is told of each stage: `{"stage": ..., ...figures}`; never sees a text."""


@dataclass(frozen=True)
class TrainingSpec:
    """All that decides a training run; plain values, so that it travels as JSON.

    Attributes:
        dataset: Parquet with `event_id`, `ts`, `text`, a float column `p_<policy>` per policy, `weight`,
            `group` (int64, near-duplicates share one) and a float32 column `f_<name>` per feature.
        out: directory for checkpoints, `bundle/` and `result.json`; a killed run resumes from what is there.
        policies: label columns, and the order of scores.
        feature_names: feature columns, and their order; empty trains without behaviour.
        fpr_budget: share of benign messages that may be acted on, all policies together.
        label_error: share of abusive messages that judges call benign; thresholds do not pay for those.
        miss_costs: what a missed message of each policy costs, in false actions; empty: the same for all.
        snapshot: digest of the dataset.
        parent: model_id of the champion, None without one; `parent_bundle` is its verified folder.
        warm_start: begin with the champion's encoder where that can still be judged (`models.warm`).
        created_at: ISO 8601 time for the manifest; None is now.
        encoder: a Hugging Face encoder by name or path; None trains the compact one from scratch, "none" does
            without.
        epochs: passes over the messages at most, the last of which is the refresh (see `models.training`).
        examples: examples that a compact encoder sees at least, all passes together.
        seconds: time after which the encoder learns no more; it stops at its best epoch then. None is no
            limit.
        memory_mb: memory that its process may hold, in MiB; beyond it the process ends. None is no limit.
        checkpoint_seconds: so often it writes down where it is, besides at the end of each epoch.
    """

    dataset: str
    out: str
    policies: tuple[str, ...]
    feature_names: tuple[str, ...]
    features_version: str
    fpr_budget: float = 0.01
    label_error: float = 0.0
    miss_costs: tuple[float, ...] = ()
    snapshot: str = ""
    parent: str | None = None
    parent_bundle: str | None = None
    warm_start: bool = False
    created_at: str | None = None
    encoder: str | None = None
    layers: int = 2
    width: int = 96
    heads: int = 4
    max_tokens: int = 48
    epochs: int = 3
    examples: int = 0
    seed: int = 7
    seconds: float | None = None
    memory_mb: int | None = None
    checkpoint_seconds: float = 30.0

    @property
    def encodes(self) -> bool:
        """Whether there is a text encoder at all."""
        return self.encoder != NO_ENCODER

    def to_dict(self) -> dict[str, Any]:
        """For JSON and Pipes extras."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> TrainingSpec:
        """The inverse of `to_dict`.

        Raises:
            InvalidInput: a field is missing or unknown.
        """
        known = {f.name for f in fields(TrainingSpec)}
        if unknown := sorted(data.keys() - known):
            raise InvalidInput(
                f"training spec has the unknown field '{unknown[0]}': known are {sorted(known)}"
            )
        try:
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
            return TrainingSpec(**values)
        except TypeError as error:
            raise InvalidInput(f"training spec is incomplete: {error}") from None


def train(spec: TrainingSpec, progress: Progress = lambda event: None) -> Path:
    """Train, and return the directory of the verified bundle; see `models.training.run`."""
    from models import training

    return training.run(spec, progress)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent dies: an orphan would train on, unseen (Linux
    only).
    """
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


FAILURE = "failure.json"
"""What a training that failed leaves in its folder: `error`, the sentence that a person should read."""


def bound_memory(spec: TrainingSpec, every: float = 0.05) -> None:
    """End this process with a clear error as soon as it holds more memory than its spec allows (Linux only).

    Resident memory is measured. A limit on address space would say little: torch maps gigabytes that it never
    touches, and dies of a refused one without a word.
    """
    if spec.memory_mb is None or not STATUS.exists():
        return

    def watch(limit: int) -> None:
        while (held := resident_mb()) <= limit:
            time.sleep(every)
        fail(spec, memory_error(held, limit))
        os._exit(1)

    threading.Thread(target=watch, args=(spec.memory_mb,), daemon=True).start()


STATUS = Path("/proc/self/statm")


def resident_mb() -> float:
    """Memory that this process holds now, in MiB."""
    return int(STATUS.read_text().split()[1]) * resource.getpagesize() / 2**20


def memory_error(held: float, limit: int) -> str:
    """What a person is told when the limit of memory is passed."""
    return (
        f"the training held {held:.0f} MiB, its limit is {limit} MiB: raise RQ_TRAINING_MEMORY_MB, or lower "
        "RQ_TRAIN_MAX_ROWS so that it needs less"
    )


def fail(spec: TrainingSpec, error: str) -> None:
    """Leave the reason where the parent finds it."""
    print(error, file=sys.stderr, flush=True)
    folder = Path(spec.out)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FAILURE).write_text(json.dumps({"error": error}))


def line(event: Mapping[str, Any]) -> str:
    """One progress event as a person reads it."""
    figures = [
        f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in event.items() if k != "stage"
    ]
    return f"{event['stage']}: {', '.join(figures)}" if figures else str(event["stage"])


def main() -> None:
    """Entry point of the process."""
    die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m models.train", description="Train one detector.")
    parser.add_argument(
        "--spec", type=Path, help="JSON of a TrainingSpec; without it, Dagster Pipes hands it over"
    )
    spec_file = parser.parse_args().spec
    if spec_file is not None:
        spec = TrainingSpec.from_dict(json.loads(spec_file.read_text()))
        bounded(spec, lambda event: print(line(event), flush=True))
        print((Path(spec.out) / "result.json").read_text())
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:
        spec = TrainingSpec.from_dict(pipes.extras["spec"])

        def tell(event: dict[str, Any]) -> None:
            pipes.log.info(line(event))
            pipes.report_custom_message({"event": event})

        bounded(spec, tell)
        pipes.report_custom_message({"result": json.loads((Path(spec.out) / "result.json").read_text())})


def bounded(spec: TrainingSpec, progress: Progress) -> None:
    """Train within the limits of the spec; a failure that a person can mend leaves its reason behind."""
    (Path(spec.out) / FAILURE).unlink(missing_ok=True)
    bound_memory(spec)
    try:
        train(spec, progress)
    except RedQueenError as error:
        fail(spec, str(error))
        raise


if __name__ == "__main__":
    main()
