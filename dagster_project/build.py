"""Puts the definitions together. Tests build the same graph on another home through `build_defs`."""

from __future__ import annotations

import dagster as dg

from assets import adversarial, deployment, features, ingest, labels, monitoring, training
from assets.environment import Environment
from dagster_project.jobs import JOBS
from sensors import adaptation, alerts, drift, rollout
from sensors import labels as label_sensors

ASSET_MODULES = (ingest, labels, features, training, adversarial, deployment, monitoring)


def build_defs(*, environment: Environment | None = None) -> dg.Definitions:
    """All assets, checks, jobs and sensors.

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
        sensors=[
            label_sensors.label_arrival,
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
