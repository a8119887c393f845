"""The training process: from the request to a verified candidate, its speed, and whether kills leave a mark.

- `trigger_to_candidate_s`: seconds from the request to a candidate that is trained, signed, published,
  fetched, verified and loaded, on `messages` judged messages; `parts` says where they go. The real assets
  `training_set` and `candidate_model` run, and the real process `python -m models.train` under Dagster Pipes;
  `peak_memory_mb` is what that held. Not counted: taking in and judging the messages, launching the run.
- `speedup`: examples a CPU second, one thread, of our training loop over the best of Hugging Face's `Trainer`
  at its defaults (float32) on the same network, messages, tokens, batch size and loss, each with dynamic
  padding: its own sampling, and grouped by length. Ours runs as it does by default (bfloat16 where the
  processor has it); `speedup_same_precision` is over `Trainer` told to use bfloat16 too. Ours reads the
  messages in this time, `Trainer` gets them as tokens; neither disturbs them. `trainer` holds its speeds.
- `resumed_equal`: a training that is killed with SIGKILL amid an epoch and started again ends with the same
  `model_id` as the one that was left alone; `killed_at` says where it was.

The messages are the arena's: the built-in platform with its attackers, 3 days, thinned to the number wanted,
with features of behaviour and graph as they were at the time. Judges are right about all of them.
Hugging Face's `Trainer` needs `accelerate`, which is put into `.bench/accelerate` from the package index.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
from common import QUICK, finish, show

MESSAGES = 800 if QUICK else 20_000
COMPARED = 600 if QUICK else 6_000
"""Messages of one epoch of the loops that are compared."""
REPEATS = 2 if QUICK else 3
HOURS = 72
CANDIDATE = "bench"
ACCELERATE = "accelerate==1.15.0"
BATCH = 64


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(globals()[sys.argv[1]](*sys.argv[2:])))
        return
    os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
    with tempfile.TemporaryDirectory(prefix="rq-training-") as folder:
        home = Path(folder) / "home"
        messages = make_home(home)
        made = candidate(home)
        with ThreadPoolExecutor(2) as pool:
            killed = pool.submit(kill_and_resume, home, Path(folder) / "again")
            compared = pool.submit(apart, "loops", home)
            figures = {"messages": messages, **made, **compared.result(), **killed.result()}
    figures["resumed_equal"] = figures.pop("resumed_id") == figures.pop("model_id")
    rows = [(name, value) for name, value in figures.items() if not isinstance(value, dict)]
    rows += [(f"{name}: {k}", v) for name in ("parts", "trainer") for k, v in figures[name].items()]
    show("training", ["figure", "value"], rows)
    finish(figures)


# --- the world ----------------------------------------------------------------------------------------------


def make_home(home: Path) -> int:
    """A home that has taken in and judged `MESSAGES` messages, and a candidate that was asked for."""
    from arena.worlds import SimulatedWorld
    from redqueen import state
    from redqueen.features import featurise, stamped
    from redqueen.schema import TABLES
    from redqueen.settings import load_settings, write_env
    from redqueen.store import open_store, to_parquet
    from redqueen.tables import write_part

    end = datetime(2026, 3, 4, tzinfo=UTC)
    write_env(home, partitions_start=(end - timedelta(days=7)).isoformat())
    store = open_store(load_settings(home))
    # Some more than wanted: a small world is quieter than its scale, and not every event has a text.
    scale = (1.2 * MESSAGES + 1_500) / HOURS / 2460
    world = SimulatedWorld("attack", 5, end, scale=scale, history=24, calm=24, after=HOURS - 48)
    world.shock(lambda rows: ["block"] * len(rows))
    traffic = [world.traffic(i) for i in range(HOURS)]
    said = [row["event_id"] for hour in traffic for row in hour.events if row["text"]]
    if len(said) < MESSAGES:
        raise SystemExit(f"the world said {len(said)} things, {MESSAGES} are needed")
    wanted = [said[i * len(said) // MESSAGES] for i in range(MESSAGES)]
    truth = {event: policy for hour in traffic for event, policy in hour.truth.items()}
    rows = [row for hour in traffic for row in hour.events]
    events = pl.DataFrame(pa.Table.from_pylist(rows, schema=TABLES["events"]))
    table = stamped(events.select("event_id").join(featurise(events), on="event_id", how="left"))
    of = events["received_at"].dt.truncate("1h")
    for hour in of.unique().to_list():
        write_part(store, "ingested/events", hour, events.filter(of == hour))
        write_part(store, "features", hour, table.filter(of == hour))
    gold = pl.DataFrame(
        {
            "event_id": wanted,
            "policy": [truth[event] or "spam" for event in wanted],
            "p_abuse": [0.98 if truth[event] else 0.02 for event in wanted],
            "mature": [True] * len(wanted),
        }
    )
    store.put(f"gold/candidate={CANDIDATE}/part.parquet", to_parquet(gold.to_arrow()))
    at = end.isoformat()
    state.advance_candidate(store, CANDIDATE, "proposed", end, "asked for", as_of=at, created_at=at)
    return len(wanted)


def candidate(home: Path) -> dict[str, Any]:
    """Ask for it and wait until it can score."""
    import dagster as dg

    from assets.environment import Environment
    from assets.partitions import candidates
    from assets.training import candidate_model, training_set
    from models.detector import Detector
    from redqueen import state

    env = Environment(home=str(home))
    (home / "dagster").mkdir(parents=True, exist_ok=True)
    with dg.DagsterInstance.local_temp(str(home / "dagster")) as instance:
        instance.add_dynamic_partitions(candidates.name or "", [CANDIDATE])
        began = time.perf_counter()
        done = dg.materialize(
            [training_set, candidate_model], instance=instance, partition_key=CANDIDATE,
            resources={"env": env, "pipes": dg.PipesSubprocessClient()},
            run_config={"loggers": {"console": {"config": {"log_level": "ERROR"}}}},
        )  # fmt: skip
        materialized = time.perf_counter()
        model_id = state.candidate(env.store, CANDIDATE)["model_id"]
        detector = Detector.of_home(env.settings, env.store, model_id)
        detector.score(["claim your free gift"])
        ended = time.perf_counter()
        took = {
            step.step_key: step.end_time - step.start_time
            for step in instance.get_run_step_stats(done.run_id)
            if step.start_time and step.end_time
        }
    result = json.loads((home / "work" / CANDIDATE / "result.json").read_text())
    parts = {
        "training set": took["training_set"],
        "start of the process, signing, publishing": took["candidate_model"] - result["total_seconds"],
        **result["seconds"],
        "fetch, verify, load": ended - materialized,
    }
    parts["orchestration"] = ended - began - sum(parts.values())
    return {
        "trigger_to_candidate_s": round(ended - began, 2),
        "peak_memory_mb": result["peak_memory_mb"],
        "parts": {name: round(seconds, 2) for name, seconds in parts.items()},
        "model_id": model_id,
    }


def plan(home: Path, out: Path) -> Any:
    """The spec that `candidate_model` trains by, with results elsewhere."""
    from models.train import TrainingSpec
    from redqueen.features import FEATURES_VERSION, NAMES
    from redqueen.settings import load_settings

    settings = load_settings(home)
    return TrainingSpec(
        dataset=str(home / "work" / CANDIDATE / "dataset.parquet"), out=str(out),
        policies=settings.policies, feature_names=NAMES, features_version=FEATURES_VERSION,
        fpr_budget=settings.fpr_budget, label_error=settings.label_error, miss_costs=settings.miss_costs,
        encoder=settings.encoder, layers=settings.encoder_layers, width=settings.encoder_width,
        heads=settings.encoder_heads, max_tokens=settings.max_tokens, epochs=settings.train_epochs,
        examples=settings.train_examples, seed=settings.train_seed,
    )  # fmt: skip


# --- killed and resumed -------------------------------------------------------------------------------------


def kill_and_resume(home: Path, out: Path) -> dict[str, Any]:
    """Kill the process amid its second epoch, start it again, and say what it made."""
    out.mkdir()
    spec = out / "spec.json"
    spec.write_text(json.dumps(replace(plan(home, out), checkpoint_seconds=0.5).to_dict()))
    command = [sys.executable, "-m", "models.train", "--spec", str(spec)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        for place in _places(process, out / "checkpoint.safetensors"):
            if place["epoch"] >= 1 and place["step"] > 0:
                break
        os.kill(process.pid, signal.SIGKILL)
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    result = json.loads((out / "result.json").read_text())
    return {
        "resumed_id": result["model_id"],
        "killed_at": f"epoch {place['epoch'] + 1}, step {place['step']}",
    }


def _places(process: subprocess.Popen[bytes], file: Path) -> Iterator[dict[str, Any]]:
    """How far the training has come, by its checkpoint."""
    import safetensors

    while process.poll() is None:
        if file.exists():
            with safetensors.safe_open(file, "np") as saved:
                yield json.loads(saved.metadata()["place"])
        time.sleep(0.01)
    raise SystemExit("the training ended before it could be killed")


# --- the loop against Hugging Face's ------------------------------------------------------------------------


def apart(work: str, *arguments: object) -> Any:
    """One piece of work in a process of its own, with one thread, and with `accelerate`."""
    extra = Path(__file__).resolve().parents[1] / ".bench" / "accelerate"
    if not (extra / "ready").exists():
        install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(extra)]
        subprocess.run([*install, ACCELERATE, "psutil"], check=True)
        (extra / "ready").write_text(ACCELERATE)
    root = str(Path(__file__).resolve().parents[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([root, str(extra)])}
    done = subprocess.run(
        [sys.executable, __file__, work, *map(str, arguments)],
        stdout=subprocess.PIPE, check=True, text=True, env=env,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def loops(home: str) -> dict[str, Any]:
    """Examples a CPU second of one epoch: our loop and `Trainer`, the best of `REPEATS`."""
    import torch

    from models.dataset import load

    torch.set_num_threads(1)
    spec = plan(Path(home), Path(home))
    data = load(spec)
    ours, theirs = Ours(spec, data), HuggingFace(spec, data)
    found = dict.fromkeys(("ours", *theirs.KINDS), 0.0)
    for _ in range(REPEATS):
        found["ours"] = max(found["ours"], ours.speed())
        for name in theirs.KINDS:
            found[name] = max(found[name], theirs.speed(name))
    own = found.pop("ours")
    default = max(found["float32"], found["float32, by length"])
    return {
        "examples_per_cpu_s": round(own),
        "speedup": round(own / default, 2),
        "speedup_same_precision": round(own / max(v for k, v in found.items() if "bfloat16" in k), 2),
        "trainer": {name: round(speed) for name, speed in found.items()},
    }


def _cpu_seconds(work: Any) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


class Ours:
    """Our loop, reading its messages each time."""

    def __init__(self, spec: Any, data: Any) -> None:
        from models.encoder import Examples, Trainer, make_reader
        from models.encoding import config_of

        config = replace(config_of(spec), noise=0.0, padding=0.0)
        rows = np.arange(min(COMPARED, len(data.views)))
        self.n = len(rows)
        examples = Examples(data.views, data.targets, data.weight)
        self.trainer = Trainer(config, make_reader(config), examples, [rows] * REPEATS, [], spec.seed)
        self.epoch = 0

    def speed(self) -> float:
        steps = self.trainer.steps(self.epoch)
        self.epoch += 1
        return self.n / _cpu_seconds(lambda: list(steps))


class HuggingFace:
    """The same network and tokens in `transformers.Trainer`."""

    KINDS = ("float32", "float32, by length", "bfloat16", "bfloat16, by length")

    def __init__(self, spec: Any, data: Any) -> None:
        from models.encoder import make_reader
        from models.encoding import config_of

        self.spec, self.config = spec, config_of(spec)
        self.reader = make_reader(self.config)
        n = min(COMPARED, len(data.views))
        sequences = [parts[0] for parts in self.reader.parts(data.views[:n])]
        self.rows = [
            {"input_ids": s, "target": data.targets[i], "weight": data.weight[i]}
            for i, s in enumerate(sequences)
        ]
        self.positive_weight = Ours(spec, data).trainer.positive_weight

    def speed(self, kind: str) -> float:
        import torch
        import transformers
        from torch import nn

        from models import encoder

        reader, positive_weight = self.reader, self.positive_weight

        class Network(nn.Module):
            def __init__(self, config: Any, policies: int) -> None:
                super().__init__()
                self.inner = encoder.build(config, policies)

            def forward(self, target: Any, weight: Any, **feeds: Any) -> dict[str, Any]:
                logits = self.inner(**feeds)
                loss = nn.functional.binary_cross_entropy_with_logits(
                    logits.float(), target, weight=weight, pos_weight=positive_weight
                )
                return {"loss": loss, "logits": logits}

        def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
            feeds = reader.padded([row["input_ids"] for row in rows])
            return {
                **{name: torch.from_numpy(values) for name, values in feeds.items()},
                "target": torch.from_numpy(np.stack([row["target"] for row in rows])),
                "weight": torch.tensor([[float(row["weight"])] for row in rows]),
            }

        with tempfile.TemporaryDirectory() as folder:
            arguments = transformers.TrainingArguments(
                output_dir=folder, num_train_epochs=1, per_device_train_batch_size=BATCH,
                learning_rate=self.config.peak_rate, weight_decay=self.config.weight_decay,
                train_sampling_strategy="group_by_length" if "by length" in kind else "random",
                bf16="bfloat16" in kind, use_cpu=True, report_to=[],
                save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
                seed=self.spec.seed,
            )  # fmt: skip
            trainer = transformers.Trainer(
                model=Network(self.config, len(self.spec.policies)),
                args=arguments,
                train_dataset=self.rows,
                data_collator=collate,
            )
            return len(self.rows) / _cpu_seconds(trainer.train)


if __name__ == "__main__":
    main()
