"""What all assets share: owners, retries, freshness and the small pictures. No stage's logic here."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from dagster import Backoff, FreshnessPolicy, Jitter, MetadataValue, RetryPolicy

OWNERS = ["team:trust-and-safety-ml"]

RETRY = RetryPolicy(max_retries=2, delay=2, backoff=Backoff.EXPONENTIAL, jitter=Jitter.PLUS_MINUS)
"""For stages that only read and write the store: they are idempotent, and a store may hiccup."""

MAX_PICTURE_BYTES = 50_000


def freshness(*, fail_hours: float, warn_hours: float) -> FreshnessPolicy:
    """Stale after `fail_hours` without a materialization."""
    return FreshnessPolicy.time_window(
        fail_window=timedelta(hours=fail_hours), warn_window=timedelta(hours=warn_hours)
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
