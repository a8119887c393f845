"""The ways this house is cut: data by the hour of its arrival, the graph by the midnight it is as of,
candidates by the decision that asked for them. Nothing else is partitioned, and nothing else belongs here."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

from dagster import (
    AssetExecutionContext,
    DailyPartitionsDefinition,
    DynamicPartitionsDefinition,
    HourlyPartitionsDefinition,
)

from redqueen.settings import load_settings

PARTITION_FORMAT = "%Y-%m-%d-%H:%M"
DAY_FORMAT = "%Y-%m-%d"

_settings = load_settings()

hourly = HourlyPartitionsDefinition(
    start_date=_settings.partitions_start.astimezone(UTC).strftime(PARTITION_FORMAT),
    end_offset=_settings.partitions_ahead_hours,
)
daily = DailyPartitionsDefinition(
    # The first midnight after the first hour. A day's partition is there as soon as the day begins, because
    # it is made of what was known by then; a feed whose clock runs ahead of the wall's needs the next too.
    start_date=(_settings.partitions_start.astimezone(UTC) + timedelta(days=1)).strftime(DAY_FORMAT),
    end_offset=1 + -(-_settings.partitions_ahead_hours // 24),
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


def day_partition(day: date) -> str:
    """The key of the daily partition of `day`."""
    return day.strftime(DAY_FORMAT)


def days_of(context: AssetExecutionContext) -> list[date]:
    """The days that this run materializes, in order."""
    return [datetime.strptime(key, DAY_FORMAT).date() for key in context.partition_keys]
