"""The jobs. Their descriptions are sentences for a person who meets them in the UI at night."""

from __future__ import annotations

from functools import partial

import dagster as dg

hour = dg.define_asset_job(
    "hour",
    selection=(
        dg.AssetSelection.groups("ingest", "features", "monitoring")
        | dg.AssetSelection.assets("review_requests", "label_guard")
    )
    - dg.AssetSelection.assets("graph_snapshot"),
    description="One hour of traffic: take in what arrived, check it, compute features, ask people to judge "
    "a sample, and write the hour's monitoring signals. Safe to run again at any time.",
)

graph = dg.define_asset_job(
    "graph",
    selection=dg.AssetSelection.assets("graph_snapshot"),
    description="The graph snapshot of a day, as of its midnight: accounts' and domains' standing, which the "
    "day's features read. Safe to run again: a snapshot that is there stays as it is.",
)

lap = dg.define_asset_job(
    "lap",
    selection=dg.AssetSelection.groups("training", "adversarial")
    | dg.AssetSelection.assets("gold_labels", "candidate_bundle"),
    description="One lap of the race: labels as of now, a training set, a new detector, its evaluation, "
    "attacks against it, and a verdict. Nothing goes live here. Safe to run again: a killed training "
    "resumes.",
)

rollout = dg.define_asset_job(
    "rollout",
    selection=dg.AssetSelection.assets("rollout_step"),
    description="One step of a candidate towards live, or back: shadow, canary shares, live, rollback. "
    "Verifies gate, verdict and digest by itself, also when launched by hand.",
)

housekeeping = dg.define_asset_job(
    "housekeeping",
    selection=dg.AssetSelection.assets("retention"),
    description="Housekeeping, once a day: what is older than its table's retention goes, and Dagster's old "
    "runs with it. Nothing that is live or can be gone back to is touched. Safe to run again at any time.",
)

truth = dg.define_asset_job(
    "truth",
    selection=dg.AssetSelection.assets("truth_state"),
    description="What raters have proved, kept up to date so that a lap need not read the labels of all "
    "time. Laps do without it. Safe to run again: an hour that is there stays, unless a refit is asked for.",
)

JOBS = [hour, graph, lap, rollout, housekeeping, truth]

_schedule = partial(
    dg.ScheduleDefinition, execution_timezone="UTC", default_status=dg.DefaultScheduleStatus.RUNNING
)

SCHEDULES = [
    _schedule(
        "daily_retention",
        job=housekeeping,
        cron_schedule="17 3 * * *",
        description="Purges what is past its retention, at a quiet hour; `redqueen retention` shows what.",
    ),
    _schedule(
        "daily_truth",
        job=truth,
        cron_schedule="40 2 * * 1-6",
        description="Adds the day's labels to what raters have proved.",
    ),
    _schedule(
        "weekly_truth_refit",
        job=truth,
        cron_schedule="40 2 * * 0",
        run_config={"ops": {"truth_state": {"config": {"refit": True}}}},
        description="Fits what raters have proved anew from all labels: increments drift, a little.",
    ),
]
