"""What moves a candidate: once a window, and at once when a candidate has passed its gates."""

from __future__ import annotations

import json

from dagster import (
    DefaultSensorStatus,
    RunRequest,
    SensorEvaluationContext,
    SensorResult,
    SkipReason,
    sensor,
)

from assets.environment import Environment
from redqueen import state
from redqueen.settings import load_settings
from sensors.asking import latest_signals

INTERVAL = load_settings().sensor_interval_seconds


@sensor(
    name="rollout",
    job_name="rollout",
    minimum_interval_seconds=INTERVAL,
    default_status=DefaultSensorStatus.RUNNING,
    description="Moves the candidate that is on its way: shadow, 1%, 5%, 25%, live, or back. Each step is "
    "decided on evidence in the run it starts.",
)
def rollout(context: SensorEvaluationContext, env: Environment) -> SensorResult | SkipReason:
    """Request one step for each new window while a candidate is on its way."""
    live = state.rollout_state(env.store)
    candidate = live.candidate or state.waiting_candidate(env.store, live)
    if candidate is None:
        return SkipReason(f"no candidate is on its way; {live.champion or 'nothing'} is live")
    newest = latest_signals(env.store, 1)
    window = f"{newest[-1].window:%Y-%m-%dT%H}" if newest else "none"
    step = f"{candidate}:{live.version}:{window}"
    if context.cursor and json.loads(context.cursor)["step"] == step:
        return SkipReason(f"{candidate} is in {live.stage}; the next window decides")
    now = env.clock.now()
    why = f"{candidate} in {live.stage}, window {window}"
    return SensorResult(
        run_requests=[
            RunRequest(
                run_key=f"rollout:{step}",
                partition_key=candidate,
                tags={
                    "redqueen/sim_time": f"{now:%Y-%m-%d %H:%M}",
                    "redqueen/reason": f"next step from {live.stage}",
                },
            )
        ],
        cursor=json.dumps({"step": step, "why": why}),
    )
