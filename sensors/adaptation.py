"""What watches attackers: evasion, obfuscation and mass under the threshold in the latest signals record."""

from __future__ import annotations

from dagster import SensorEvaluationContext, SensorResult, SkipReason

from assets.environment import Environment
from sensors.common import watcher
from sensors.drift import on_new_window


@watcher(
    job="lap",
    description="Starts a lap when attackers have found a way: more abusers get through, more obfuscate, or "
    "more sit just under the threshold. Each figure can fire by itself.",
)
def adaptation(context: SensorEvaluationContext, env: Environment) -> SensorResult | SkipReason:
    """Ask the policy whether attackers' adaptation calls for a lap."""
    return on_new_window(context, env, "adaptation")
