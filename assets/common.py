"""What all assets share: owners, retries, freshness, the head of the hourly ones and the small pictures. No
stage's logic here."""

from __future__ import annotations

import base64
import io
import sys
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from dagster import (
    AssetCheckSpec,
    AssetsDefinition,
    Backoff,
    Failure,
    FreshnessPolicy,
    Jitter,
    MaterializeResult,
    MetadataValue,
    RetryPolicy,
    asset,
)

from assets.partitions import hourly
from redqueen.errors import RedQueenError

OWNERS = ["team:trust-and-safety-ml"]


class RetryWhatMayPass(RetryPolicy):
    """Tries again, but not after an error that would only come again: the step fails at once, by its message.

    Dagster shows a policy no error; it asks for the delay while it handles one.
    """

    def calculate_delay(self, attempt_num: int) -> float:
        error = sys.exception()
        if isinstance(error, RedQueenError) and error.lasting:
            raise Failure(str(error), allow_retries=False) from error
        return super().calculate_delay(attempt_num)


RETRY = RetryWhatMayPass(max_retries=2, delay=2, backoff=Backoff.EXPONENTIAL, jitter=Jitter.PLUS_MINUS)
"""For stages that only read and write the store: they are idempotent, and a store may hiccup."""

MAX_PICTURE_BYTES = 50_000


def freshness(*, fail_hours: float, warn_hours: float) -> FreshnessPolicy:
    """Stale after `fail_hours` without a materialization."""
    return FreshnessPolicy.time_window(
        fail_window=timedelta(hours=fail_hours), warn_window=timedelta(hours=warn_hours)
    )


FRESH = freshness(fail_hours=6, warn_hours=3)
"""For what every run of the job `hour` makes."""


def hourly_asset(
    stage: str,
    *,
    deps: Sequence[AssetsDefinition] = (),
    kinds: set[str],
    code_version: str,
    check_specs: Sequence[AssetCheckSpec],
    fresh: FreshnessPolicy = FRESH,
) -> Callable[[Callable[..., MaterializeResult]], AssetsDefinition]:
    """The decorator of an asset that is cut by the hour of arrival; `stage` is its group and its tag."""
    return asset(
        partitions_def=hourly,
        deps=deps,
        group_name=stage,
        owners=OWNERS,
        kinds=kinds,
        tags={"stage": stage},
        code_version=code_version,
        freshness_policy=fresh,
        retry_policy=RETRY,
        check_specs=check_specs,
    )


def picture(draw: Callable[[Any], None], *, size: tuple[float, float] = (5.0, 2.6)) -> MetadataValue:
    """What `draw` puts on the axes it is given, as an inline PNG small enough for the event log."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=72, layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure.subplots())
    out = io.BytesIO()
    figure.savefig(out, format="png")
    if out.tell() > MAX_PICTURE_BYTES:
        return MetadataValue.text("The picture was left out: it would not fit the event log.")
    return MetadataValue.md(f"![](data:image/png;base64,{base64.b64encode(out.getvalue()).decode()})")
