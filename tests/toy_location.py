"""A small code location for the driver's tests: hourly assets, a dynamic asset, sensors with cursors.

Not a copy of the project's graph: only the Dagster features that the driver must carry.
`TOY_DIR` names a directory for effects that outlive a killed process.
"""

import json
import os
import signal
import sys
from pathlib import Path

import dagster as dg

hours = dg.HourlyPartitionsDefinition(
    start_date="2026-01-01-00:00", end_date="2026-01-02-00:00", timezone="UTC"
)
candidates = dg.DynamicPartitionsDefinition(name="toy_candidates")


def toy_dir() -> Path:
    return Path(os.environ["TOY_DIR"])


def note(what: str) -> None:
    """Append a line: the effects that a killed process leaves behind."""
    with (toy_dir() / "effects.log").open("a") as log:
        log.write(what + "\n")


def die_once(marker: str) -> None:
    """Kill this very process, the first time that it comes here with TOY_KILL_AT naming this place."""
    flag = toy_dir() / f"died-{marker}"
    if os.environ.get("TOY_KILL_AT") == marker and not flag.exists():
        flag.touch()
        os.kill(os.getpid(), signal.SIGKILL)


@dg.asset(partitions_def=hours)
def raw(context: dg.AssetExecutionContext) -> None:
    die_once("first_step")
    note(f"raw {context.partition_key}")
    print("a line on stdout")
    print("a line on stderr", file=sys.stderr)


@dg.asset(partitions_def=hours, deps=[raw])
def clean(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    die_once("mid_run")
    if (toy_dir() / "interrupt").exists():
        (toy_dir() / "interrupt").unlink()
        os.kill(os.getpid(), signal.SIGINT)
    note(f"clean {context.partition_key}")
    context.log.info("a line of the run's own log")
    return dg.MaterializeResult(metadata={"rows": 3})


@dg.asset_check(asset=clean)
def rows_present() -> dg.AssetCheckResult:
    return dg.AssetCheckResult(passed=True)


@dg.asset(partitions_def=hours, deps=[clean])
def features(context: dg.AssetExecutionContext) -> None:
    note(f"features {context.partition_key}")


@dg.asset(partitions_def=hours, deps=[features])
def signals(context: dg.AssetExecutionContext) -> None:
    note(f"signals {context.partition_key}")


@dg.asset(partitions_def=candidates)
def trained(context: dg.AssetExecutionContext) -> None:
    if "bad" in context.partition_key:
        raise ValueError("the toy candidate is bad")
    note(f"trained {context.partition_key}")


hour_job = dg.define_asset_job("hour", [raw, clean, features, signals], executor_def=dg.in_process_executor)
lap_job = dg.define_asset_job("lap", [trained], executor_def=dg.in_process_executor)


@dg.sensor(job=hour_job, minimum_interval_seconds=600)
def hours_due(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """Requests every hour named in hours.json that the cursor has not passed."""
    due = json.loads((toy_dir() / "hours.json").read_text())
    fresh = [hour for hour in due if hour > (context.cursor or "")]
    if not fresh:
        return dg.SkipReason("no new hour")
    return dg.SensorResult(
        run_requests=[
            dg.RunRequest(
                partition_key=hour, run_key=f"hour:{hour}", tags={"redqueen/sim_time": f"{hour} sim"}
            )
            for hour in fresh
        ],
        cursor=fresh[-1],
    )


@dg.sensor(job=lap_job, minimum_interval_seconds=4)
def candidate_due(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """Mints the candidate named in candidate.txt, partition and run in one tick."""
    path = toy_dir() / "candidate.txt"
    if not path.exists():
        return dg.SkipReason("no candidate")
    name = path.read_text()
    return dg.SensorResult(
        dynamic_partitions_requests=[candidates.build_add_request([name])],
        run_requests=[dg.RunRequest(partition_key=name, run_key=f"lap:{name}")],
        cursor=f"minted {name}",
    )


@dg.sensor(job=lap_job)
def broken(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    raise RuntimeError("the toy sensor is broken")


@dg.run_failure_sensor(monitored_jobs=[lap_job])
def on_failure(context: dg.RunFailureSensorContext) -> None:
    note(f"alert {context.dagster_run.tags['dagster/partition']}")


@dg.run_status_sensor(run_status=dg.DagsterRunStatus.SUCCESS, monitored_jobs=[hour_job], request_job=lap_job)
def after_hour(context: dg.RunStatusSensorContext) -> dg.SkipReason:
    note(f"seen {context.dagster_run.tags['dagster/partition']}")
    return dg.SkipReason("only looking")


defs = dg.Definitions(
    assets=[raw, clean, features, signals, trained],
    asset_checks=[rows_present],
    jobs=[hour_job, lap_job],
    sensors=[hours_due, candidate_due, broken, on_failure, after_hour],
)
