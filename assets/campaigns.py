"""Which messages of an hour say nearly the same, and since when. What makes two messages near-duplicates,
and how a campaign keeps its name, is in `redqueen.campaigns`.
"""

from datetime import datetime, timedelta
from typing import Any

import polars as pl
from dagster import AssetExecutionContext, MaterializeResult, MetadataValue, TableRecord

from assets import expectations
from assets.common import hourly_asset
from assets.environment import Environment
from assets.ingest import events
from assets.partitions import hours_of
from redqueen import campaigns as near
from redqueen.tables import HOUR, read_hours, write_part

FINGERPRINTS = "campaigns/fingerprints"


@hourly_asset(
    "features",
    deps=[events],
    kinds={"polars"},
    code_version="1",
    check_specs=expectations.check_specs("campaigns", "campaigns", quality=False),
)
def campaigns(
    context: AssetExecutionContext, env: Environment, config: expectations.Showing
) -> MaterializeResult:
    """Messages that say nearly the same as others of the last 24 hours, whoever sent them and however they
    hide it.

    A novel campaign with many senders is worth a look before anybody has reported it; not every campaign is
    abuse. Texts are not kept, only fingerprints, and an hour reads those of the day before it.
    """
    grouped = [_group(env, hour) for hour in hours_of(context)]
    rows = pl.concat(grouped)
    shown, checks = expectations.judge(env, context, "campaigns", rows, config, asset="campaigns")
    largest = rows.sort("size", "campaign_id", descending=[True, False]).unique(
        "campaign_id", maintain_order=True
    )
    metadata: dict[str, Any] = {
        "dagster/partition_row_count": rows.height,
        "campaigns": largest.height,
        "novel_campaigns": rows.filter("novel")["campaign_id"].n_unique(),
    }
    if largest.height:
        metadata |= {
            "largest_size": int(largest["size"][0]),
            "largest_actors": int(largest["actors"][0]),
            "largest": MetadataValue.table([_record(row) for row in largest.head(10).iter_rows(named=True)]),
        }
    return MaterializeResult(metadata=metadata | shown, check_results=checks)


def _record(row: dict[str, Any]) -> TableRecord:
    return TableRecord(
        {
            "campaign": row["campaign_id"],
            "messages": row["size"],
            "actors": row["actors"],
            "first_seen": f"{row['first_seen']:%Y-%m-%d %H:%M}",
            "novel": row["novel"],
        }
    )


def _group(env: Environment, hour: datetime) -> pl.DataFrame:
    """The campaigns of one hour, written with what the next hours need to know of them."""
    rows = read_hours(env.store, "ingested/events", hour, hour + HOUR)
    if rows.is_empty():
        rows = pl.DataFrame(schema=near.MESSAGES)
    known = read_hours(env.store, FINGERPRINTS, hour - timedelta(hours=near.WINDOW_HOURS - 1), hour)
    found = near.group(rows.select(*near.MESSAGES), known, salt=env.settings.salt)
    write_part(env.store, "campaigns", hour, found.rows)
    write_part(env.store, FINGERPRINTS, hour, found.fingerprints)
    return found.rows
