"""Features of every event of an hour, by the same code that serving runs. Declarations are in
`redqueen.features`.
"""

from dagster import AssetExecutionContext, MaterializeResult, MetadataValue, TableRecord, asset

from assets.common import OWNERS, RETRY, freshness
from assets.environment import Environment
from assets.ingest import events
from assets.partitions import hourly, hours_of
from redqueen import features as declared
from redqueen.tables import HOUR, read_hours, write_part


@asset(
    partitions_def=hourly,
    deps=[events],
    group_name="features",
    owners=OWNERS,
    kinds={"polars"},
    tags={"stage": "features"},
    code_version=declared.FEATURES_VERSION,
    freshness_policy=freshness(fail_hours=6, warn_hours=3),
    retry_policy=RETRY,
)
def features(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """Text and behaviour features of each event, as they were at the moment the event happened.

    Computed from the hour and the lookback before it, so no value depends on anything later. A mean that
    leaves its usual range shows here first, before it shows in the scores.
    """
    hours = hours_of(context)
    start, end = hours[0], hours[-1] + HOUR
    rows = read_hours(env.store, "ingested/events", start, end)
    lookback = read_hours(env.store, "ingested/events", start - declared.LOOKBACK, start)
    table = declared.featurise(rows, lookback, behaviour=env.settings.behaviour)
    if table.height != rows.height:
        raise ValueError(
            f"features have {table.height} rows for {rows.height} events of {start:%Y-%m-%d %H}h"
        )
    by_hour = table.join(rows.select("event_id", "received_at"), on="event_id", how="left")
    for hour in hours:
        part = by_hour.filter(by_hour["received_at"].dt.truncate("1h") == hour).drop("received_at")
        write_part(env.store, "features", hour, part)
    names = [feature.name for feature in declared.FEATURES]
    means = table.select(names).mean().row(0) if table.height else ()
    return MaterializeResult(
        metadata={
            "dagster/partition_row_count": table.height,
            "features_version": declared.FEATURES_VERSION,
            "means": MetadataValue.table(
                [
                    TableRecord({"feature": name, "mean": round(float(mean or 0.0), 4)})
                    for name, mean in zip(names, means, strict=False)
                ]
            ),
        }
    )
