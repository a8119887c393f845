"""What watches the watchers: failed runs and silent monitoring. They alert and start nothing."""

from __future__ import annotations

from datetime import timedelta

from dagster import (
    DefaultSensorStatus,
    RunFailureSensorContext,
    SensorEvaluationContext,
    SkipReason,
    run_failure_sensor,
)

from assets.environment import Environment
from redqueen import alerts, state
from redqueen.tables import HOUR
from sensors.asking import latest_signals
from sensors.common import INTERVAL, watcher


@run_failure_sensor(
    name="run_failed",
    minimum_interval_seconds=INTERVAL,
    default_status=DefaultSensorStatus.RUNNING,
    description="Alerts about every failed run, and marks its candidate as failed: it blocks no other then.",
)
def run_failed(context: RunFailureSensorContext, env: Environment) -> None:
    """Alert, and free the lap that the run held."""
    run = context.dagster_run
    now = env.clock.now()
    candidate = run.tags.get("dagster/partition", "") if run.job_name == "lap" else ""
    record = state.read(env.store, state.candidate_key(candidate)) if candidate else {}
    # A rejected candidate also fails its run (the gate is a blocking check): a verdict, not a fault. Somebody
    # asked for that lap, though, and what it was to mend goes on.
    if record.get("status") == "rejected":
        told = f"{candidate} was rejected and the champion stays: {record['reason']}"
        alerts.send(env.store, env.settings, f"rejected-{candidate}", told, now)
        return
    own = not record or record.get("run_id") == run.run_id
    if candidate and own and record.get("status") not in state.FINISHED:
        state.advance_candidate(env.store, candidate, "failed", now, f"run {run.run_id[:8]} failed")
    message = (
        f"run {run.run_id[:8]} of job {run.job_name} failed; open it in Dagster for the step and its error"
    )
    alerts.send(env.store, env.settings, f"run-{run.run_id}", message, now)


@watcher(
    interval=max(60, INTERVAL),
    description="Alerts when a live model has gone unmeasured for too long. Silence is unknown, never calm.",
)
def watch_the_watchers(context: SensorEvaluationContext, env: Environment) -> SkipReason:
    """Alert once an hour while signals are stale; send again what no webhook took."""
    alerts.redeliver(env.store, env.settings, env.clock.now())
    live = state.rollout_state(env.store)
    if live.champion is None:
        return SkipReason("no model is live, so there is nothing to measure")
    now = env.clock.now()
    newest = latest_signals(env.store, 1)
    ended = newest[-1].window + HOUR if newest else None
    allowed = timedelta(hours=env.settings.stale_after_hours)
    if ended is not None and now - ended <= allowed:
        return SkipReason(f"the latest window ended at {ended:%Y-%m-%d %H:%M} UTC")
    since = f"since {ended:%Y-%m-%d %H:%M} UTC" if ended else "yet"
    message = f"no window has been measured {since}: drift and evasion are unknown. Is the daemon up?"
    alerts.send(env.store, env.settings, f"stale-{now:%Y-%m-%dT%H}", message, now)
    return SkipReason(f"ALERT: {message}")
