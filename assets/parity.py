"""The check that what was served is what is recomputed, hour by hour. Causes are named in `redqueen.parity`;
here the hour's tables are read and the report is put into words for the UI.
"""

from datetime import datetime
from typing import Any

import polars as pl
from dagster import AssetCheckResult, AssetCheckSeverity, AssetCheckSpec, MetadataValue, TableRecord

from assets.environment import Environment
from redqueen.features import read_prepared
from redqueen.parity import ERROR_SHARE, WARN_SHARE, ParityReport, compare
from redqueen.tables import HOUR, read_hours

CHECK = "features_parity"
SPEC = AssetCheckSpec(
    CHECK,
    asset="features",
    description="What the scoring service computed online is what is recomputed here, and why not where not.",
)
SHOWN = 12
_NEEDED = ["event_id", "ts", "features", "features_version"]


def check_parity(env: Environment, hours: list[datetime], table: pl.DataFrame) -> AssetCheckResult:
    """Compare the features of these hours of arrival with what was served in them. Never raises: features do
    not wait for a comparison.

    Args:
        table: the hours' features, as just computed.
    """
    try:
        report = _report(env, hours, table)
    except Exception as error:
        return AssetCheckResult(
            check_name=CHECK, passed=False, severity=AssetCheckSeverity.WARN,
            metadata={"verdict": f"could not be compared ({type(error).__name__})"},
        )  # fmt: skip
    severe = report.share > ERROR_SHARE
    return AssetCheckResult(
        check_name=CHECK,
        passed=report.share <= WARN_SHARE,
        severity=AssetCheckSeverity.ERROR if severe else AssetCheckSeverity.WARN,
        metadata=_metadata(report),
    )


def _report(env: Environment, hours: list[datetime], table: pl.DataFrame) -> ParityReport:
    start, end = hours[0], hours[-1] + HOUR
    served = read_hours(env.store, "predictions", start, end)
    if served.is_empty():
        return compare(served, table)
    prepared = read_prepared(env.store, start, end)
    served = served.select(_NEEDED)
    if served.join(table, on="event_id", how="anti").height:
        # What was received in the last moment of an hour is answered in the next.
        before = read_hours(env.store, "features", start - HOUR, start)
        if before.height:
            before = before.select(table.columns).join(served, on="event_id", how="semi")
            table = pl.concat([table, before.join(table, on="event_id", how="anti")])
            prepared = pl.concat([prepared, read_prepared(env.store, start - HOUR, start)])
    return compare(served, table, prepared)


def _metadata(report: ParityReport) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "verdict": report.verdict,
        "served": report.served,
        "compared": report.compared,
        "differing": report.differing,
        "share": round(report.share, 5),
        "causes": "; ".join(f"{n} {cause}" for cause, n in report.causes.items()) or "none",
    }
    if report.features:
        metadata["features"] = MetadataValue.table(
            [
                TableRecord(
                    {
                        "feature": one.name,
                        "events": one.events,
                        "share": round(one.share, 4),
                        "max_abs": round(one.max_abs, 6),
                        "cause": one.cause,
                    }
                )
                for one in report.features[:SHOWN]
            ]
        )
    return metadata
