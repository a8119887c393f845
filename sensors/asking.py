"""How a sensor asks for a retrain: one way for all, so that every decision is recorded and claimed once."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime

from dagster import RunRequest, SensorResult

from assets.environment import Environment
from assets.partitions import candidates
from redqueen import alerts, state
from redqueen.policy import Ask, Decision, LabelCounts, Limits, Signals, decide
from redqueen.store import ObjectStore
from sensors.common import run_tags

HISTORY_WINDOWS = 6


def latest_signals(store: ObjectStore, windows: int = HISTORY_WINDOWS) -> list[Signals]:
    """The newest windows' records, oldest first."""
    return [Signals.from_dict(store.get_json(key)) for key in store.list("signals/window=")[-windows:]]


def cursor_of(window: datetime | None, why: str) -> str:
    """A cursor a person can read: the UI always shows it, and shows skip reasons only on hover."""
    return json.dumps({"window": f"{window:%Y-%m-%dT%H}" if window else None, "why": why[:180]})


def ask(
    env: Environment, sensor: str, trigger: Ask, history: list[Signals], labels: LabelCounts | None = None
) -> SensorResult:
    """Decide about the latest window, record the decision, and request the lap where the answer is yes.

    Idempotent: a tick that is evaluated again finds its decision recorded and requests the same run key.
    """
    now = env.clock.now()
    lost = state.lost_lap(env.store, sensor)
    decision = _decide(env, history, trigger, labels, now)
    kept = state.record_decision(env.store, sensor, decision)
    if decision.action == "retrain" and (kept.id, kept.action) != (decision.id, "retrain"):
        state.release_lap(env.store, decision.id)  # what was decided of this window first stands
    if kept.page:
        alerts.send(env.store, env.settings, f"{sensor}-{kept.window:%Y-%m-%dT%H}", kept.message, now)
    cursor = cursor_of(kept.window, kept.message)
    # A lap that was decided on and requested in a tick that was lost is requested again, by the same key.
    laps = {d.id: d for d in (lost, kept) if d is not None and d.action == "retrain"}
    if not laps:
        return SensorResult(skip_reason=kept.message, cursor=cursor)
    return SensorResult(
        dynamic_partitions_requests=[candidates.build_add_request(list(laps))],
        run_requests=[lap_request(decision, now) for decision in laps.values()],
        cursor=cursor,
    )


def _decide(
    env: Environment, history: list[Signals], trigger: Ask, labels: LabelCounts | None, now: datetime
) -> Decision:
    """The policy's answer; a yes must also win the claim, because two sensors may fire on the same window."""
    limits = Limits.of(env.settings)
    for _ in range(2):
        loop = state.loop_state(env.store, now)
        decision = decide(history, loop, limits, trigger, now=now, labels=labels)
        if loop.in_flight == decision.id:
            # A tick that was killed after its claim and before its record: this is the same question again.
            decision = decide(history, replace(loop, in_flight=None), limits, trigger, now=now, labels=labels)
        if decision.action != "retrain" or state.claim_lap(env.store, decision.id, now):
            return decision
    # The claim was lost twice: the winner is now in flight, and the policy's third answer says so.
    return decide(history, state.loop_state(env.store, now), limits, trigger, now=now, labels=labels)


def lap_request(decision: Decision, now: datetime) -> RunRequest:
    """The run of a lap; its tags say in the runs list who asked and why."""
    return RunRequest(
        run_key=f"lap:{decision.id}",
        job_name="lap",
        partition_key=decision.id,
        tags={
            "redqueen/trigger": decision.trigger,
            "redqueen/attribution": decision.attribution,
            **run_tags(now, decision.message[:250]),
        },
    )
