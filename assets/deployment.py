"""From a candidate with a verdict to live, and back. Steps are decided in `redqueen.rollout`, moved in
`redqueen.operate`. A manual materialization bypasses asset checks: everything is therefore verified here
again."""

import hashlib
from datetime import datetime
from typing import Any

import polars as pl
from dagster import (
    AssetExecutionContext,
    DataVersion,
    Failure,
    MaterializeResult,
    asset,
)

from assets.adversarial import attack_report
from assets.common import OWNERS, RETRY
from assets.environment import Environment
from assets.monitoring import reference_key
from assets.partitions import candidates
from assets.training import clean_work
from redqueen import adaptation, alerts, labels, operate, poisoning, rollout, signals, state
from redqueen.clock import hour_of
from redqueen.errors import BundleError, Conflict, NotFound, Refused
from redqueen.features import NAMES
from redqueen.rollout import Candidate, Evidence, RolloutState, Step
from redqueen.store import ObjectStore
from redqueen.tables import HOUR, read_hours


def verdict_key(model_id: str) -> str:
    """Where the verdict on a model is kept."""
    return f"evaluations/{model_id}/verdict.json"


def _manifest_digest(store: ObjectStore, model_id: str) -> str:
    return hashlib.sha256(store.get(f"models/{model_id}/manifest.json").data).hexdigest()


@asset(
    partitions_def=candidates,
    deps=[attack_report],
    group_name="deployment",
    owners=OWNERS,
    kinds={"onnx"},
    tags={"stage": "deployment"},
    code_version="1",
    retry_policy=RETRY,
)
def candidate_bundle(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """The verdict, bound to the exact bytes it is about. Only what has one may be rolled out.

    The rollout sensor picks the candidate up from here.
    """
    from models.bundle import fetch, verify
    from models.signing import trust_of

    candidate = context.partition_key
    record = state.candidate(env.store, candidate)
    model_id = record["model_id"]
    trust = trust_of(env.settings)
    manifest = verify(fetch(env.store, model_id, env.settings.home / "cache", trust), trust)
    reports = {
        name: env.store.get_json(f"evaluations/{model_id}/{name}.json") for name in ("evaluation", "attack")
    }
    passed = all(report["passed"] for report in reports.values())
    env.store.put_json(
        verdict_key(model_id),
        {
            "candidate": candidate,
            "model_id": model_id,
            "passed": passed,
            "reasons": [reason for report in reports.values() for reason in report["reasons"]],
            "manifest_sha256": _manifest_digest(env.store, model_id),
            "attack_digest": reports["attack"]["digest"],
        },
    )
    if passed:
        state.advance_candidate(
            env.store, candidate, "waiting", env.clock.now(), "passed every gate, waits for its rollout"
        )
    clean_work(env, candidate)
    return MaterializeResult(
        data_version=DataVersion(model_id),
        metadata={
            "model_id": model_id,
            "verdict": "passed" if passed else "rejected",
            "parent": manifest.parent or "none",
            "selected": manifest.selected,
            "files": len(manifest.files),
            "size_mb": round(
                sum(len(env.store.get(f"models/{model_id}/{f}").data) for f in manifest.files) / 1e6, 2
            ),
        },
    )


@asset(
    partitions_def=candidates,
    deps=[candidate_bundle],
    group_name="deployment",
    owners=OWNERS,
    kinds={"python"},
    tags={"stage": "deployment"},
    code_version="1",
)
def rollout_step(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """One step of the candidate towards live, or back: its Events tab is its life.

    Looks at harm, exposure and non-inferiority, and at what people have frozen, and moves the rollout by at
    most one step. Launched by hand it does the same and refuses the same. To go back: `redqueen rollback`.
    """
    candidate = context.partition_key
    now = env.clock.now()
    operate.reflect(env.store, now)
    seen = state.rollout_state(env.store)
    try:
        waiting = _verified(env, candidate, seen)
        evidence = _evidence(env, seen, waiting, now)
        limits = rollout.Limits(
            stale_after_hours=env.settings.stale_after_hours, label_error=env.settings.label_error
        )
        step = rollout.next_step(seen, evidence, limits, now)
        if step.action == "promote":
            _freeze_reference(env, seen, now)
        after = operate.move(env.store, seen, step, now)
    except (Refused, Conflict) as refused:
        raise Failure(description=f"Refused: {refused}", allow_retries=False) from refused
    if step.page:
        alerts.send(
            env.store, env.settings, f"rollout-{candidate}-{step.reason}-{now:%Y-%m-%dT%H}", step.message, now
        )
    context.log.info(step.message)
    return MaterializeResult(metadata=_step_metadata(step, after))


def _verified(env: Environment, candidate: str, seen: RolloutState) -> Candidate | None:
    """The candidate, if it may be rolled out: its verdict, its bytes and its place in the queue are looked at
    anew.

    Raises:
        Refused: with the reason that a person who launched this by hand reads.
    """
    from models.bundle import fetch
    from models.signing import trust_of

    record = state.candidate(env.store, candidate)
    if candidate in seen.blocked:
        raise Refused(f"{candidate} was rolled back and is blocked: {seen.blocked[candidate]}")
    if record["status"] == "rejected":
        raise Refused(f"{candidate} was rejected: {record['reason']}. Train a new candidate.")
    if record["status"] in ("launched", "trained", "evaluated", "attacked", "failed"):
        raise Refused(
            f"{candidate} is '{record['status']}' and has no verdict yet: run the job 'lap' for it first"
        )
    if record["status"] in ("live", "superseded"):
        raise Refused(f"{candidate} is {record['status']} already; there is no step to take")
    if seen.candidate not in (None, candidate):
        raise Refused(f"{seen.candidate} is being rolled out; one candidate at a time")
    model_id = record["model_id"]
    try:
        broken = _not_what_was_judged(env, candidate, model_id)
        if not broken:
            fetch(env.store, model_id, env.settings.home / "cache", trust_of(env.settings))
    except (BundleError, NotFound) as error:
        broken = f"the bundle {model_id} does not verify: {error}"
    if broken and record["status"] == "waiting":
        # It will not become whole by waiting, and while it waits no other lap may start.
        state.advance_candidate(env.store, candidate, "rejected", env.clock.now(), broken)
    if broken:
        raise Refused(broken)
    return Candidate(candidate, model_id, gate_passed=True)


def _not_what_was_judged(env: Environment, candidate: str, model_id: str) -> str:
    """Why the verdict is not of what lies in the store; empty where it is."""
    verdict = state.read(env.store, verdict_key(model_id))
    if not verdict.get("passed") or verdict.get("candidate") != candidate:
        told = "; ".join(verdict.get("reasons", ["none was written"]))
        return f"{candidate} has no passing verdict: {told}"
    if verdict["manifest_sha256"] != _manifest_digest(env.store, model_id):
        return f"the manifest of {model_id} is not the one that was judged: train a new candidate"
    attack = env.store.get_json(f"evaluations/{model_id}/attack.json")
    if not attack["passed"] or attack["digest"] != verdict["attack_digest"]:
        return f"the attack report of {model_id} is not the one that was judged: run 'attack_report' again"
    return ""


def _evidence(env: Environment, seen: RolloutState, waiting: Candidate | None, now: datetime) -> Evidence:
    """What the step is decided on: predictions since the ramp began, with the labels known now."""
    holds = state.holds(env.store, now)
    approval = env.settings.bootstrap_approval
    if seen.challenger is None or seen.stage_since is None:
        return Evidence(waiting=waiting, approval=approval, holds=holds)
    start = hour_of(seen.ramp_since or seen.stage_since)
    end = hour_of(now) + HOUR
    rows = signals.once(read_hours(env.store, "predictions", start, end))
    if rows.is_empty():
        return Evidence(approval=approval, holds=holds)
    # A message that says it is of tomorrow must not pass for a sign of life until then.
    newest = rows.filter(pl.col("ts") <= now)["ts"].max()
    age = (now - newest).total_seconds() / 3600 if isinstance(newest, datetime) else None
    if seen.stage == rollout.SHADOW:
        # Of this candidate alone: another one may have been in shadow in the same hour.
        own = (pl.col("arm") != "shadow") | (pl.col("model_id") == seen.challenger)
        lately = (pl.col("stage") == rollout.SHADOW) & (pl.col("ts") >= seen.stage_since)
        shadow = rollout.compare_shadow(rows.filter(lately & own))
        return Evidence(shadow=shadow, telemetry_age_hours=age, approval=approval, holds=holds)
    votes = read_hours(env.store, "ingested/labels", start, end)
    # The canary is judged by people's labels, so those who could forge labels could have it rolled back.
    weights = poisoning.effective_weights(env.store, now)

    def judged(among: pl.DataFrame) -> pl.DataFrame:
        policies, maturity = env.settings.policies, env.settings.maturity
        gold = labels.gold(among, now, policies, maturity_hours=maturity, weights=weights)
        return adaptation.join_labels(rows, gold)

    joined = judged(votes).with_columns(abuse_unaimed=judged(labels.unaimed(votes))["abuse"])
    since = seen.ramp_since or seen.stage_since
    strata = rollout.collect(
        joined.filter(pl.col("ts") >= since), latency_objective_ms=env.settings.latency_objective_ms
    )
    return Evidence(strata=strata, telemetry_age_hours=age, approval=approval, holds=holds)


def _freeze_reference(env: Environment, seen: RolloutState, now: datetime) -> None:
    """Keep what the candidate's traffic looked like on its way to live: later windows are held against it."""
    assert seen.challenger is not None
    start = hour_of(seen.ramp_since or seen.stage_since or now) - HOUR
    rows = read_hours(env.store, "predictions", start, hour_of(now) + HOUR)
    own = signals.once(rows).filter(pl.col("model_id") == seen.challenger).unique("event_id", keep="first")
    reference = signals.make_reference(own, NAMES, env.settings.policies)
    env.store.put_json(
        reference_key(seen.challenger),
        {"model_id": seen.challenger, "made_at": now.isoformat(), "reference": reference.to_dict()},
    )


def _step_metadata(step: Step, after: RolloutState) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "what": step.message,
        "action": step.action,
        "stage": after.stage,
        "reason": step.reason,
        "champion": after.champion or "none",
    }
    for name, found in step.figures.get("guardrails", {}).items():
        metadata[f"{name}_evidence"] = round(float(found["e"]), 4)
    for name in ("exposed", "judged_abusive"):
        if name in step.figures:
            metadata[name] = step.figures[name]
    return metadata
