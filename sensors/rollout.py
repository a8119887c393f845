"""What moves a candidate: once a window, and at once when a candidate has passed its gates."""

from __future__ import annotations

import json

from dagster import RunRequest, SensorEvaluationContext, SensorResult, SkipReason

from assets.environment import Environment
from redqueen import operate, state
from sensors.asking import latest_signals
from sensors.common import run_tags, watcher


@watcher(
    job="rollout",
    description="Moves the candidate that is on its way: shadow, 1%, 5%, 25%, live, or back. Each step is "
    "decided on evidence in the run it starts.",
)
def rollout(context: SensorEvaluationContext, env: Environment) -> SensorResult | SkipReason:
    """Request one step for each new window while a candidate is on its way."""
    operate.settle(env.store, env.clock.now())
    live = state.rollout_state(env.store)
    candidate = live.candidate or state.waiting_candidate(env.store, live)
    if candidate is None:
        return SkipReason(f"no candidate is on its way; {live.champion or 'nothing'} is live")
    newest = latest_signals(env.store, 1)
    window = f"{newest[-1].window:%Y-%m-%dT%H}" if newest else "none"
    step = f"{candidate}:{live.version}:{window}"
    if context.cursor and json.loads(context.cursor)["step"] == step:
        return SkipReason(f"{candidate} is in {live.stage}; the next window decides")
    why = f"{candidate} in {live.stage}, window {window}"
    return SensorResult(
        run_requests=[
            RunRequest(
                run_key=f"rollout:{step}",
                partition_key=candidate,
                tags=run_tags(env.clock.now(), f"next step from {live.stage}"),
            )
        ],
        cursor=json.dumps({"step": step, "why": why}),
    )
