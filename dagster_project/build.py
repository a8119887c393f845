"""Puts the definitions together. Tests build the same graph on another home through `build_defs`."""

from __future__ import annotations

import dagster as dg

from assets import (
    adversarial,
    campaigns,
    deployment,
    features,
    graph,
    ingest,
    labels,
    monitoring,
    poisoning,
    retention,
    review,
    training,
)
from assets.environment import Environment
from dagster_project.jobs import JOBS, SCHEDULES
from sensors import adaptation, alerts, drift, rollout
from sensors import graph as graph_sensor
from sensors import labels as label_sensors

ASSET_MODULES = (
    ingest,
    labels,
    poisoning,
    features,
    campaigns,
    graph,
    training,
    adversarial,
    deployment,
    monitoring,
    retention,
    review,
)


def build_defs(*, environment: Environment | None = None) -> dg.Definitions:
    """All assets, checks, jobs, schedules and sensors.

    Args:
        environment: the home to work on; default: the one `RQ_HOME` names when a run starts.
    """
    assets = [
        value
        for module in ASSET_MODULES
        for value in vars(module).values()
        if isinstance(value, dg.AssetsDefinition)
    ]
    return dg.Definitions(
        assets=list({id(a): a for a in assets}.values()),
        jobs=JOBS,
        schedules=SCHEDULES,
        sensors=[
            label_sensors.label_arrival,
            graph_sensor.daily_graph,
            label_sensors.first_lap,
            drift.drift,
            adaptation.adaptation,
            rollout.rollout,
            alerts.run_failed,
            alerts.watch_the_watchers,
        ],
        resources={"env": environment or Environment(), "pipes": dg.PipesSubprocessClient()},
        # Light steps: a process each would cost more than the work. Training has a process of its own
        # (Pipes).
        executor=dg.in_process_executor,
    )
