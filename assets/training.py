"""From gold labels to a trained candidate and its evaluation.

Training runs in a process of its own (Dagster Pipes), so that the orchestrator never loads torch and a
training that runs wild can be stopped. What is learnt, and how, is in `models.training`; what a training set
is made of in `redqueen.trainingset`.
"""

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import polars as pl
from dagster import (
    AssetCheckResult,
    AssetCheckSpec,
    AssetExecutionContext,
    DataVersion,
    MaterializeResult,
    MetadataValue,
    PipesSubprocessClient,
    TableRecord,
    asset,
)

from assets import expectations, trainer
from assets.common import OWNERS, RETRY, RetryWhatMayPass
from assets.environment import Environment
from assets.features import features, read_features
from assets.labels import gold_key, gold_labels
from assets.partitions import candidates
from redqueen import evaluation as judging
from redqueen import state, trainingset
from redqueen.clock import hour_of
from redqueen.errors import BundleError, InvalidInput, NotFound, RedQueenError
from redqueen.features import ACTORLESS, FEATURES_VERSION, NAMES
from redqueen.store import to_parquet
from redqueen.tables import HOUR, landed_hours, read_hours, read_keys


def training_set_key(candidate: str) -> str:
    """Where a candidate's training set is kept."""
    return f"training_sets/candidate={candidate}/part.parquet"


def inputs_key(candidate: str) -> str:
    """Where it is kept what a candidate's training set was made from."""
    return f"training_sets/candidate={candidate}/inputs.json"


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

    All history, not a recent window: a detector that forgets old campaigns is beaten by them again. What it
    was made from is kept beside it, each object with its sha256.
    """
    candidate = context.partition_key
    as_of = trainingset.instant(state.candidate(env.store, candidate))
    store, digests = trainingset.recording(env.store)
    start, end = min(landed_hours(env.store, "ingested/events")), hour_of(as_of) + HOUR
    events = read_hours(store, "ingested/events", start, end).filter(pl.col("received_at") <= as_of)
    lessons = trainingset.lessons(
        env.store.list("hard_examples/"), state.all_candidates(env.store), candidate, as_of
    )
    gold = pl.read_parquet(store.get(gold_key(candidate)).data)
    table = read_features(store, start, end)
    chosen: dict[str, Any] = {
        "policies": env.settings.policies,
        "feature_names": NAMES,
        "max_rows": env.settings.train_max_rows,
    }
    built = trainingset.build(gold, events, table, read_keys(store, lessons), **chosen)
    made_from = trainingset.provenance(
        digests, **chosen, as_of=as_of.isoformat(), features_version=FEATURES_VERSION
    )
    env.store.put_json(inputs_key(candidate), {**made_from, "snapshot": built.digest})
    env.store.put(training_set_key(candidate), to_parquet(built.rows.to_arrow()))
    judged = events.join(gold, on="event_id", how="semi")
    lacking = judged.join(table, on="event_id", how="anti").height if table.height else judged.height
    shown, checks = expectations.judge(env, context, "training_set", built.rows, config, asset="training_set")
    return MaterializeResult(
        data_version=DataVersion(built.digest),
        metadata={
            "dagster/row_count": built.rows.height,
            "snapshot": built.digest,
            "inputs": made_from["digest"],
            "inputs_read": len(digests),
            "inputs_listed_in": MetadataValue.url(env.store.url(inputs_key(candidate))),
            "benign": built.n_benign,
            **{f"abuse_{policy}": n for policy, n in built.n_abuse.items()},
            "hard_examples": built.n_hard,
            "near_duplicate_families": built.families,
            "largest_family": built.largest_family,
            "thinned_benign": built.thinned,
            "thinned_abuse": built.thinned_abuse,
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
    # A killed training resumes where it was; a third failure is not bad luck.
    retry_policy=RetryWhatMayPass(max_retries=1, delay=5),
    pool="training",
)
def candidate_model(
    context: AssetExecutionContext, env: Environment, pipes: PipesSubprocessClient
) -> MaterializeResult:
    """The trained detector: encoder, linear and Markov models of the text, trees on behaviour, calibrated.

    Progress streams into this run's log, its figures into this asset's plots. `selected` says which is
    served: the baseline wins where it is as good.
    """
    from models.bundle import publish
    from models.signing import signer_of, trust_of
    from models.train import TrainingSpec

    candidate = context.partition_key
    settings = env.settings
    signer = signer_of(settings)  # one that will not do is better known before the training than after it
    folder = work_folder(env, candidate)
    folder.mkdir(parents=True, exist_ok=True)
    dataset = folder / "dataset.parquet"
    dataset.write_bytes(env.store.get(training_set_key(candidate)).data)
    record = state.candidate(env.store, candidate)
    champion = state.rollout_state(env.store).champion
    spec = TrainingSpec(
        dataset=str(dataset),
        out=str(folder),
        policies=settings.policies,
        feature_names=NAMES if settings.behaviour else ACTORLESS,
        features_version=FEATURES_VERSION,
        fpr_budget=settings.fpr_budget,
        label_error=settings.label_error,
        miss_costs=settings.miss_costs,
        snapshot=trainingset.digest(pl.read_parquet(dataset)),
        parent=champion,
        parent_bundle=_folder_of(context, env, champion),
        warm_start=settings.train_warm_start,
        created_at=record["created_at"],
        encoder=settings.encoder,
        layers=settings.encoder_layers,
        width=settings.encoder_width,
        heads=settings.encoder_heads,
        max_tokens=settings.max_tokens,
        epochs=settings.train_epochs,
        examples=settings.train_examples,
        seed=settings.train_seed,
        seconds=float(settings.training_timeout_s),
        memory_mb=settings.training_memory_mb,
    )
    result = trainer.train(context, pipes, spec)
    signer.sign(Path(result["bundle"]))
    model_id = publish(env.store, Path(result["bundle"]), trust_of(settings))
    state.advance_candidate(
        env.store, candidate, "trained", env.clock.now(), f"trained as {model_id}",
        model_id=model_id, selected=result["selected"],
    )  # fmt: skip
    return MaterializeResult(data_version=DataVersion(model_id), metadata=trainer.metadata_of(result))


def _folder_of(context: AssetExecutionContext, env: Environment, champion: str | None) -> str | None:
    """The champion's verified folder. One that cannot be had does not hold up its successor."""
    from models.bundle import fetch
    from models.signing import trust_of

    if champion is None:
        return None
    try:
        return str(fetch(env.store, champion, env.settings.home / "cache", trust_of(env.settings)))
    except RedQueenError as error:
        context.log.warning(f"trained without a look at the champion: {error}")
        return None


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
        ),
        AssetCheckSpec(
            "slices_hold",
            asset="evaluation",
            blocking=True,
            description="In no policy, language, account age or community size, nor on campaigns that are "
            "over, significantly behind the champion on the same messages.",
        ),
    ],
)
def evaluation(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """The candidate against the champion on held-out messages, by policy and by slice.

    If the gate fails here, or a slice falls behind, the candidate goes no further and the champion stays.
    """
    candidate = context.partition_key
    record = state.candidate(env.store, candidate)
    detectors, against = contenders(context, env, record["model_id"])
    champion = detectors.pop("champion", None)
    # All by today's policies: a champion of yesterday's is judged by whom it acts on, like any other.
    budget, policies = env.settings.fpr_budget, env.settings.policies
    held = _held(env, candidate, champion)
    ours = _scores(detectors["candidate"], held)
    reports = {"candidate": judging.judge(held, *ours, policies)}
    compared, alike = [], None
    if champion is not None:
        both = held.filter("fair")
        theirs, same = _scores(champion, both), (ours[0][held["fair"].to_numpy()], ours[1])
        reports["champion"] = judging.judge(both, *theirs, policies)
        compared = judging.compare(both, judging.acted_on(*same), judging.acted_on(*theirs), policies, budget)
        if both.height < held.height:
            alike = judging.judge(both, *same, policies)
            against += f", on {both.height} of {held.height} messages: it may have learnt from the others"
    verdicts = {
        "evaluation_gate": judging.gate(reports["candidate"], reports.get("champion"), budget, alike),
        "slices_hold": judging.slice_verdict(compared),
    }
    # A failed verdict alone tells why; the good news of the other one would only hide it.
    broken = [reason for v in verdicts.values() if not v.passed for reason in v.reasons]
    reasons = (broken or [reason for v in verdicts.values() for reason in v.reasons]) + [against]
    report = {
        "candidate": candidate,
        "model_id": record["model_id"],
        "passed": not broken,
        "reasons": reasons,
        "reports": {role: r.to_dict() for role, r in reports.items()},
        "compared": [asdict(c) for c in compared],
    }
    env.store.put_json(f"evaluations/{record['model_id']}/evaluation.json", report)
    status = "rejected" if broken else "evaluated"
    state.advance_candidate(env.store, candidate, status, env.clock.now(), "; ".join(reasons))
    return MaterializeResult(
        metadata={
            **_evaluation_metadata(reports, compared),
            **({} if alike is None else {"candidate_recall_where_compared": round(alike.recall, 4)}),
            "abuse_of_campaigns_over": int(judging.slices(held, env.settings.policies)[judging.OVER].sum()),
            "judged": against,
        },
        check_results=[
            AssetCheckResult(check_name=name, passed=v.passed, metadata={"verdict": "; ".join(v.reasons)})
            for name, v in verdicts.items()
        ],
    )


def contenders(context: AssetExecutionContext, env: Environment, model_id: str) -> tuple[dict[str, Any], str]:
    """The detectors of `candidate` and, where it can be had, `champion`; and a word on who is compared.

    A champion that is refused, or gone, does not hold up its successor, which is judged as a first model is:
    after a change of keys or of the bundles' format no lap would ever end well again. A store that does not
    answer is no such reason, and raises.
    """
    from models.detector import Detector

    found = {"candidate": Detector.of_home(env.settings, env.store, model_id)}
    live = state.rollout_state(env.store).champion
    if live is None:
        return found, "judged alone: no model is live yet"
    try:
        found["champion"] = Detector.of_home(env.settings, env.store, live)
    except (BundleError, NotFound) as error:
        alone = f"judged alone: the champion cannot be loaded: {error}"
        context.log.warning(alone)
        return found, alone
    return found, f"judged against {live}"


def features_for(detector: Any, rows: pl.DataFrame) -> Any:
    """The features [n, F] of training rows as serving would give them to the detector; None: text alone.

    A champion trained with another version of the features is served by text alone, so it is judged so too.
    """
    if not detector.feature_names or detector.manifest.features_version != FEATURES_VERSION:
        return None
    return rows.select([f"f_{name}" for name in detector.feature_names]).to_numpy()


def _scores(detector: Any, rows: pl.DataFrame) -> tuple[Any, Any]:
    """Probabilities [n, policies] and the thresholds on them."""
    return detector.score(rows["text"].to_list(), features_for(detector, rows)), detector.thresholds


def _held(env: Environment, candidate: str, champion: Any | None) -> pl.DataFrame:
    """The rows of the training set that the candidate's training never learnt from: held messages, and what
    attacks once made of them. `over` says whether their campaigns are, `fair` that neither did the champion
    learn from them.
    """
    from models.dataset import not_learnt_by

    rows = pl.read_parquet(env.store.get(training_set_key(candidate)).data)
    sent_at, group = rows["ts"].dt.epoch("us").to_numpy(), rows["group"].to_numpy()
    abusive = rows.select(pl.max_horizontal(f"p_{p}" for p in env.settings.policies) >= 0.5).to_series()
    fair = not_learnt_by({} if champion is None else champion.training, sent_at, group, abusive.to_numpy())
    rows = rows.with_columns(over=judging.over(sent_at, group), fair=fair)
    return rows.filter(pl.col("event_id").str.strip_prefix("hard:").is_in(held_ids(env, candidate)))


def held_ids(env: Environment, candidate: str) -> list[str]:
    """The events that the candidate's training held back; raises `InvalidInput` if what it left is gone."""
    result = work_folder(env, candidate) / "result.json"
    if not result.exists():
        raise InvalidInput(f"the work folder of {candidate} is gone: materialize candidate_model again")
    ids: list[str] = json.loads(result.read_text())["held_event_ids"]
    return ids


def _evaluation_metadata(
    reports: dict[str, judging.Report], compared: list[judging.Comparison]
) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for role, report in reports.items():
        metadata |= {f"{role}_recall": round(report.recall, 4), f"{role}_fpr": round(report.fpr, 4)}
        metadata[f"{role}_recall_95"] = _interval(report.recall_low, report.recall_high, 3)
        metadata[f"{role}_fpr_95"] = _interval(report.fpr_low, report.fpr_high, 4)
    slices = [
        TableRecord(
            {
                "slice": name,
                "abusive": s.n_abuse,
                "recall": f"{s.recall:.3f}" if s.n_abuse else "",
                "recall 95%": _interval(s.recall_low, s.recall_high, 3) if s.n_abuse else "",
                "benign": s.n_benign,
                "fpr": f"{s.fpr:.4f}" if s.n_benign else "",
                "fpr 95%": _interval(s.fpr_low, s.fpr_high, 4) if s.n_benign else "",
                **_against(name, compared),
            }
        )
        for name, s in reports["candidate"].slices.items()
    ]
    behind = sum(c.behind for c in compared)
    return metadata | {"slices_behind": behind, "slices": MetadataValue.table(slices)}


def _interval(low: float, high: float, digits: int) -> str:
    return f"{low:.{digits}f} to {high:.{digits}f}"


def _against(name: str, compared: list[judging.Comparison]) -> dict[str, str]:
    """The champion's figures in one slice, with the adjusted p value; empty where it was not compared."""
    found = {c.what: c for c in compared if c.slice == name}
    told = {what: f"{c.champion:.4f} (p {c.p:.2g})" for what, c in found.items()}
    return {
        "champion's recall": told.get("recall", ""),
        "champion's fpr": told.get("false positives", ""),
    }


def clean_work(env: Environment, candidate: str) -> None:
    """Remove a finished candidate's scratch; everything that counts is in the store."""
    shutil.rmtree(work_folder(env, candidate), ignore_errors=True)
