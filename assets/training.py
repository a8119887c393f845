"""From gold labels to a trained candidate and its evaluation.

Training runs in a process of its own (Dagster Pipes), so that the orchestrator never loads torch and a
training that runs wild can be stopped. What is learnt, and how, is in `models.training`; what a training set
is made of in `redqueen.trainingset`.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import polars as pl
from dagster import (
    AssetCheckResult,
    AssetCheckSpec,
    AssetExecutionContext,
    DataVersion,
    Failure,
    MaterializeResult,
    MetadataValue,
    PipesSubprocessClient,
    RetryPolicy,
    TableRecord,
    asset,
)

from assets import expectations
from assets.common import OWNERS, RETRY, picture
from assets.environment import Environment
from assets.features import features, read_features
from assets.labels import gold_key, gold_labels
from assets.partitions import candidates
from redqueen import evaluation as judging
from redqueen import state, trainingset
from redqueen.clock import hour_of
from redqueen.features import ACTORLESS, FEATURES_VERSION, NAMES
from redqueen.store import to_parquet
from redqueen.tables import HOUR, landed_hours, read_hours, read_keys


def training_set_key(candidate: str) -> str:
    """Where a candidate's training set is kept."""
    return f"training_sets/candidate={candidate}/part.parquet"


def work_folder(env: Environment, candidate: str) -> Path:
    """Local scratch of a candidate: dataset, checkpoints, bundle. Lost, it is made again."""
    return env.settings.home / "work" / candidate


@asset(
    partitions_def=candidates,
    deps=[gold_labels, features],
    group_name="training",
    owners=OWNERS,
    kinds={"polars", "greatexpectations"},
    tags={"stage": "training"},
    code_version="1",
    retry_policy=RETRY,
    check_specs=expectations.check_specs("training_set", "training sets"),
)
def training_set(
    context: AssetExecutionContext, env: Environment, config: expectations.Showing
) -> MaterializeResult:
    """Every judged message of all time with its features, and the attacks that once worked.

    All history, not a recent window: a detector that forgets old campaigns is beaten by them again.
    """
    candidate = context.partition_key
    record = state.candidate(env.store, candidate)
    end = hour_of(trainingset.instant(record)) + HOUR
    start = min(landed_hours(env.store, "ingested/events"))
    received = pl.col("received_at") <= trainingset.instant(record)
    events = read_hours(env.store, "ingested/events", start, end).filter(received)
    hard_keys = [key for key in env.store.list("hard_examples/") if key.endswith(".parquet")]
    gold = pl.read_parquet(env.store.get(gold_key(candidate)).data)
    table = read_features(env.store, start, end)
    built = trainingset.build(
        gold,
        events,
        table,
        read_keys(env.store, hard_keys),
        policies=env.settings.policies,
        feature_names=NAMES,
        max_rows=env.settings.train_max_rows,
    )
    env.store.put(training_set_key(candidate), to_parquet(built.rows.to_arrow()))
    judged = events.filter(pl.col("text").is_not_null()).join(gold, on="event_id", how="semi")
    lacking = judged.join(table, on="event_id", how="anti").height if table.height else judged.height
    shown, checks = expectations.judge(env, context, "training_set", built.rows, config, asset="training_set")
    return MaterializeResult(
        data_version=DataVersion(built.digest),
        metadata={
            "dagster/row_count": built.rows.height,
            "snapshot": built.digest,
            "benign": built.n_benign,
            **{f"abuse_{policy}": n for policy, n in built.n_abuse.items()},
            "hard_examples": built.n_hard,
            "thinned_benign": built.thinned,
            "left_out_for_lack_of_features": lacking,
            **shown,
        },
        check_results=checks,
    )


@asset(
    partitions_def=candidates,
    deps=[training_set],
    group_name="training",
    owners=OWNERS,
    kinds={"pytorch", "xgboost", "huggingface"},
    tags={"stage": "training"},
    code_version="1",
    # A killed training resumes from its last epoch; a third failure is not bad luck.
    retry_policy=RetryPolicy(max_retries=1, delay=5),
    pool="training",
)
def candidate_model(
    context: AssetExecutionContext, env: Environment, pipes: PipesSubprocessClient
) -> MaterializeResult:
    """The trained detector: text encoder, trees on behaviour, a linear baseline beside them, calibrated.

    Progress streams into this run's log. `selected` says which is served: the baseline wins where it is as
    good.
    """
    from models.bundle import publish
    from models.signing import signer_of, trust_of
    from models.train import TrainingSpec

    candidate = context.partition_key
    settings = env.settings
    folder = work_folder(env, candidate)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = folder / "dataset.parquet"
    dataset.write_bytes(env.store.get(training_set_key(candidate)).data)
    record = state.candidate(env.store, candidate)
    spec = TrainingSpec(
        dataset=str(dataset),
        out=str(folder),
        policies=settings.policies,
        feature_names=NAMES if settings.behaviour else ACTORLESS,
        features_version=FEATURES_VERSION,
        fpr_budget=settings.fpr_budget,
        label_error=settings.label_error,
        snapshot=trainingset.digest(pl.read_parquet(dataset)),
        parent=state.rollout_state(env.store).champion,
        created_at=record["created_at"],
        encoder=settings.encoder,
        layers=settings.encoder_layers,
        width=settings.encoder_width,
        heads=settings.encoder_heads,
        max_tokens=settings.max_tokens,
        epochs=settings.train_epochs,
        seed=settings.train_seed,
    )
    pipes.run(
        command=[sys.executable, "-m", "models.train"], context=context, extras={"spec": spec.to_dict()}
    ).get_results()
    result = json.loads((folder / "result.json").read_text())
    signer_of(settings).sign(Path(result["bundle"]))
    model_id = publish(env.store, Path(result["bundle"]), trust_of(settings))
    state.advance_candidate(
        env.store, candidate, "trained", env.clock.now(), f"trained as {model_id}",
        model_id=model_id, selected=result["selected"],
    )  # fmt: skip
    return MaterializeResult(data_version=DataVersion(model_id), metadata=_training_metadata(result))


def _training_metadata(result: dict[str, Any]) -> dict[str, Any]:
    seconds = [TableRecord({"part": k, "seconds": round(float(v), 2)}) for k, v in result["seconds"].items()]
    return {
        "model_id": result["model_id"],
        "selected": result["selected"],
        "training_seconds": float(result["total_seconds"]),
        **judging.headline(result["metrics"]),
        "seconds_by_part": MetadataValue.table(seconds),
        "learning_curve": picture(lambda axes: _draw_curve(axes, result["curve"])),
    }


def _draw_curve(axes: Any, curve: list[dict[str, float]]) -> None:
    epochs = [point["epoch"] for point in curve]
    axes.plot(epochs, [point["loss"] for point in curve], marker="o", color="#0b6e4f")
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")


@asset(
    partitions_def=candidates,
    deps=[candidate_model],
    group_name="training",
    owners=OWNERS,
    kinds={"onnx"},
    tags={"stage": "training"},
    code_version="1",
    retry_policy=RETRY,
    check_specs=[
        AssetCheckSpec(
            "evaluation_gate",
            asset="evaluation",
            blocking=True,
            description="On messages it has not seen: enough recall, false positives within budget, and not "
            "worse than the champion.",
        )
    ],
)
def evaluation(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """The candidate against the champion on held-out messages, by policy and by slice.

    If the gate fails here, the candidate goes no further and the champion stays.
    """
    from models.detector import Detector

    candidate = context.partition_key
    record = state.candidate(env.store, candidate)
    held = _held(env, candidate)
    live = state.rollout_state(env.store).champion
    reports = {}
    for role, model_id in (("candidate", record["model_id"]), ("champion", live)):
        if model_id is not None:
            detector = Detector.of_home(env.settings, env.store, model_id)
            scores = detector.score(held["text"].to_list(), features_for(detector, held))
            reports[role] = judging.judge(held, scores, detector.thresholds, detector.policies)
    verdict = judging.gate(reports["candidate"], reports.get("champion"), env.settings.fpr_budget)
    report = {
        "candidate": candidate,
        "model_id": record["model_id"],
        "passed": verdict.passed,
        "reasons": list(verdict.reasons),
        "reports": {role: r.to_dict() for role, r in reports.items()},
    }
    env.store.put_json(f"evaluations/{record['model_id']}/evaluation.json", report)
    status = "evaluated" if verdict.passed else "rejected"
    state.advance_candidate(env.store, candidate, status, env.clock.now(), "; ".join(verdict.reasons))
    return MaterializeResult(
        metadata=_evaluation_metadata(reports),
        check_results=[
            AssetCheckResult(
                check_name="evaluation_gate",
                passed=verdict.passed,
                metadata={"verdict": "; ".join(verdict.reasons)},
            )
        ],
    )


def features_for(detector: Any, rows: pl.DataFrame) -> Any:
    """The features [n, F] of training rows as serving would give them to the detector; None: text alone.

    A champion trained with another version of the features is served by text alone, so it is judged so too.
    """
    if not detector.feature_names or detector.manifest.features_version != FEATURES_VERSION:
        return None
    return rows.select([f"f_{name}" for name in detector.feature_names]).to_numpy()


def _held(env: Environment, candidate: str) -> pl.DataFrame:
    """The rows of the training set that the candidate's training never learnt from."""
    result = work_folder(env, candidate) / "result.json"
    if not result.exists():
        raise Failure(f"the work folder of {candidate} is gone: materialize candidate_model again")
    ids = json.loads(result.read_text())["held_event_ids"]
    rows = pl.read_parquet(env.store.get(training_set_key(candidate)).data)
    return rows.filter(pl.col("event_id").is_in(ids))


def _evaluation_metadata(reports: dict[str, judging.Report]) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for role, report in reports.items():
        metadata |= {f"{role}_recall": round(report.recall, 4), f"{role}_fpr": round(report.fpr, 4)}
    slices = [
        TableRecord(
            {"slice": name, "abusive": s.n_abuse, "recall": round(s.recall, 3), "fpr": round(s.fpr, 4)}
        )
        for name, s in reports["candidate"].slices.items()
    ]
    return metadata | {"slices": MetadataValue.table(slices)}


def clean_work(env: Environment, candidate: str) -> None:
    """Remove a finished candidate's scratch; everything that counts is in the store."""
    shutil.rmtree(work_folder(env, candidate), ignore_errors=True)
