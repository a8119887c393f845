"""What all sensors share: how often they look, and what their runs say of themselves."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from dagster import DefaultSensorStatus, SensorDefinition, SensorResult, SkipReason, sensor

from redqueen.settings import load_settings

INTERVAL = load_settings().sensor_interval_seconds


def watcher(
    *, description: str, job: str | None = None, interval: int = INTERVAL
) -> Callable[[Callable[..., SensorResult | SkipReason]], SensorDefinition]:
    """The decorator of a sensor, named as its function, that runs until a person stops it."""
    return sensor(
        job_name=job,
        minimum_interval_seconds=interval,
        default_status=DefaultSensorStatus.RUNNING,
        description=description,
    )


def run_tags(now: datetime, reason: str) -> dict[str, str]:
    """What the list of runs shows of a run: the platform's time, which may be simulated, and why."""
    return {"redqueen/sim_time": f"{now:%Y-%m-%d %H:%M}", "redqueen/reason": reason}
