"""Housekeeping: once a day what is older than its table's retention goes, and Dagster's old runs with it.

What is kept how long, and what is never touched, is declared in `redqueen.retention`. Dagster's runs and
event logs are purged here, because only this floor knows Dagster.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from dagster import (
    AssetExecutionContext,
    AssetKey,
    DagsterInstance,
    DagsterRunStatus,
    MaterializeResult,
    MetadataValue,
    RunsFilter,
    TableRecord,
    asset,
)

from assets.common import OWNERS, RETRY
from assets.environment import Environment
from redqueen import erasure
from redqueen import retention as keeping

FINISHED = [DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE, DagsterRunStatus.CANCELED]
BATCH = 200


def old_runs(
    instance: DagsterInstance, keys: Iterable[AssetKey], candidates: frozenset[str], before: datetime
) -> list[str]:
    """Finished runs that ended before `before` and may go; oldest first.

    A run's event log goes with it, and with the log the materializations it made. So the run of each asset's
    latest materialization stays, and the runs of candidates that are in use: their life is shown there.
    Older hours turn to "missing" in the partition bar; their data has a retention of its own, and
    nothing is made again because of it.
    """
    latest = {}
    for key in keys:
        event = instance.get_latest_materialization_event(key)
        latest[key] = event.run_id if event else None
    runs = instance.get_run_records(RunsFilter(statuses=FINISHED, updated_before=before), ascending=True)
    return [
        record.dagster_run.run_id
        for record in runs
        if record.dagster_run.run_id not in latest.values()
        and record.dagster_run.tags.get("dagster/partition") not in candidates
    ]


def purge_runs(instance: DagsterInstance, run_ids: Iterable[str]) -> int:
    """Delete these runs with their event logs and captured output; returns how many."""
    count = 0
    for run_id in run_ids:
        instance.compute_log_manager.delete_logs(prefix=[run_id])
        instance.delete_run(run_id)
        count += 1
    return count


def plan_runs(
    instance: DagsterInstance, env: Environment, keys: Iterable[AssetKey], now: datetime
) -> list[str]:
    """The runs that may go by the home's retention; `now` is the wall's, which Dagster lives on."""
    days = keeping.days_of(env.settings, keeping.RUNS)
    if days is None:
        return []
    in_use = keeping.needed(env.store, env.clock.now())
    return old_runs(instance, keys, in_use.candidates, now - timedelta(days=days))


@asset(
    group_name="housekeeping",
    owners=OWNERS,
    kinds={"python"},
    tags={"stage": "housekeeping"},
    code_version="1",
    retry_policy=RETRY,
)
def retention(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """What is older than its table's retention goes, once a day: data, scratch, and Dagster's old runs.

    Nothing that is live, on its way, or can be gone back to is touched. `redqueen retention` shows what the
    next run would delete, and why each table is kept as long as it is; `RQ_RETENTION_DAYS` changes it.
    """
    plan = keeping.plan(env.store, env.settings, env.clock.now())
    deleted = keeping.apply(env.store, env.settings, plan)
    keys = [key for key in context.instance.all_asset_keys() if key != context.asset_key]
    runs = purge_runs(context.instance, plan_runs(context.instance, env, keys, datetime.now(UTC)))
    swept = erasure.sweep(env.store, env.settings, env.clock.now())
    context.log.info(f"deleted {sum(deleted.values())} objects and {runs} runs")
    rows = [
        TableRecord(
            {
                "table": rule.table,
                "days": str(rule.days or "always"),
                "deleted": deleted.get(rule.table, 0),
                "kept_for_use": plan.kept_for_use.get(rule.table, 0),
                "undated": plan.undated.get(rule.table, 0),
            }
        )
        for rule in plan.rules
    ]
    return MaterializeResult(
        metadata={
            "deleted_objects": sum(deleted.values()),
            "deleted_runs": runs,
            "erased_again": sum(swept.objects.values()),
            "undeclared": ", ".join(plan.undeclared) or "none",
            "by_table": MetadataValue.table(rows),
        }
    )
