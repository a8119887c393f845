"""The two ways this house is cut: data by the hour of its arrival, candidates by the decision that asked for
them. Nothing else is partitioned, and nothing else belongs here."""

from __future__ import annotations

from datetime import UTC, datetime

from dagster import AssetExecutionContext, DynamicPartitionsDefinition, HourlyPartitionsDefinition

from redqueen.settings import load_settings

PARTITION_FORMAT = "%Y-%m-%d-%H:%M"

_settings = load_settings()

hourly = HourlyPartitionsDefinition(
    start_date=_settings.partitions_start.astimezone(UTC).strftime(PARTITION_FORMAT),
    end_offset=_settings.partitions_ahead_hours,
)
candidates = DynamicPartitionsDefinition(name="candidates")


def partition_of(hour: datetime) -> str:
    """The key of the hourly partition that starts at `hour`."""
    return hour.astimezone(UTC).strftime(PARTITION_FORMAT)


def hour_of_partition(key: str) -> datetime:
    """The start of the hourly partition `key`."""
    return datetime.strptime(key, PARTITION_FORMAT).replace(tzinfo=UTC)


def hours_of(context: AssetExecutionContext) -> list[datetime]:
    """The hours that this run materializes: one, or a range when it catches up."""
    return [hour_of_partition(key) for key in context.partition_keys]
