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
import signal
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from redqueen.errors import InvalidInput

Progress = Callable[[dict[str, Any]], None]
"""Is told of each stage: `{"stage": ..., ...figures}`; never sees a text."""


@dataclass(frozen=True)
class TrainingSpec:
    """All that decides a training run; plain values, so that it travels as JSON.

    Attributes:
        dataset: Parquet with `event_id`, `ts`, `text`, a float column `p_<policy>` per policy, `weight`,
        `group`
            (int64, near-duplicates share one) and a float32 column `f_<name>` per feature.
        out: directory for checkpoints, `bundle/` and `result.json`; a killed run resumes from what is there.
        policies: label columns, and the order of scores.
        feature_names: feature columns, and their order; empty trains without behaviour.
        fpr_budget: share of benign messages that may be acted on, all policies together.
        label_error: share of abusive messages that judges call benign; thresholds do not pay for those.
        snapshot: digest of the dataset.
        created_at: ISO 8601 time for the manifest; None is now.
        encoder: a Hugging Face encoder by name or path; None trains the compact one from scratch.
        epochs: passes over the messages, the last of which is the refresh (see `models.training`).
    """

    dataset: str
    out: str
    policies: tuple[str, ...]
    feature_names: tuple[str, ...]
    features_version: str
    fpr_budget: float = 0.01
    label_error: float = 0.0
    snapshot: str = ""
    parent: str | None = None
    created_at: str | None = None
    encoder: str | None = None
    layers: int = 2
    width: int = 96
    heads: int = 4
    max_tokens: int = 48
    epochs: int = 3
    seed: int = 7

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
        train(spec, lambda event: print(line(event), flush=True))
        print((Path(spec.out) / "result.json").read_text())
        return
    from dagster_pipes import open_dagster_pipes

    with open_dagster_pipes() as pipes:
        spec = TrainingSpec.from_dict(pipes.extras["spec"])
        train(spec, lambda event: pipes.log.info(line(event)))
        pipes.report_custom_message(json.loads((Path(spec.out) / "result.json").read_text()))


if __name__ == "__main__":
    main()
