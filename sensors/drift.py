"""What watches drift: Evidently's figures in the latest signals record."""

from __future__ import annotations

import json

from dagster import SensorEvaluationContext, SensorResult, SkipReason

from assets.environment import Environment
from sensors.asking import ask, latest_signals
from sensors.common import watcher


def on_new_window(
    context: SensorEvaluationContext, env: Environment, trigger: str
) -> SensorResult | SkipReason:
    """Ask the policy once a window; a window without a live model is nobody's business."""
    history = latest_signals(env.store)
    if not history:
        return SkipReason("no window has been measured yet")
    window = f"{history[-1].window:%Y-%m-%dT%H}"
    if context.cursor and json.loads(context.cursor)["window"] == window:
        return SkipReason(f"window {window} has been decided on; the cursor says how")
    return ask(env, trigger, "drift" if trigger == "drift" else "adaptation", history)


@watcher(
    job="lap",
    description="Starts a lap when traffic has moved away from the champion's reference: effect size and "
    "persistence decide, never a p-value.",
)
def drift(context: SensorEvaluationContext, env: Environment) -> SensorResult | SkipReason:
    """Ask the policy whether the latest window's drift calls for a lap."""
    return on_new_window(context, env, "drift")
