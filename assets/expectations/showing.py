"""A suite's result as asset checks, one that blocks and one that warns, and what an asset calls for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    Config,
    MetadataValue,
    TableRecord,
)
from pydantic import Field

from assets.environment import Environment
from assets.expectations.running import Expectation, SuiteResult, validate
from assets.expectations.suites import SUITES, Facts
from assets.partitions import hour_of_partition


class Showing(Config):
    """What a person may ask for when launching an asset whose table has a suite."""

    data_docs: bool = Field(False, description="Write Great Expectations' Data Docs of these rows.")


def judge(
    env: Environment,
    context: AssetExecutionContext,
    suite: str,
    rows: pl.DataFrame,
    config: Showing,
    *,
    asset: str,
    expected: int | None = None,
) -> tuple[dict[str, Any], list[AssetCheckResult]]:
    """Run a suite over what an asset made: metadata (a link to Data Docs, where asked for) and the checks.

    Args:
        asset: its name; it is declared with `check_specs`.
        expected: how many rows there must be, for a suite that wants to know.
    """
    facts = Facts(env.settings.policies, env.settings.behaviour, expected)
    shown: dict[str, Any] = {}
    if config.data_docs and rows.columns:
        from assets.expectations.docs import Subject, publish

        keys = context.partition_keys
        if SUITES[suite].cut == "hour":
            keys = [f"{hour_of_partition(key):%Y-%m-%dT%H}" for key in keys]
        label = keys[0] if len(keys) == 1 else f"{keys[0]}_to_{keys[-1]}"
        subject = Subject(suite, rows, facts, label, env.clock.now())
        shown["data_docs"] = MetadataValue.url(publish(env, subject))
    if not rows.columns:
        return shown, _nothing(suite, facts, asset)
    return shown, checks(validate(rows, suite, facts), asset)


def _nothing(suite: str, facts: Facts, asset: str) -> list[AssetCheckResult]:
    """The checks of a table of which nothing is there, not even its columns."""
    levels = {rule.severity for rule in SUITES[suite].rules(facts)}
    names = [name for name, level in (("expectations", "error"), ("quality", "warn")) if level in levels]
    return [
        AssetCheckResult(check_name=f"{asset}_{name}", passed=True, metadata={"verdict": "there are no rows"})
        for name in names
    ]


def check_specs(asset: str, what: str, *, quality: bool = True) -> list[AssetCheckSpec]:
    """The checks that `checks` answers: `<asset>_expectations` blocks, `<asset>_quality` does not.

    Args:
        what: the table, for the sentence a person reads.
        quality: whether the suite has rules that only warn.
    """
    contract = f"Contract of {what}."
    specs = [AssetCheckSpec(f"{asset}_expectations", asset=asset, blocking=True, description=contract)]
    if quality:
        specs.append(
            AssetCheckSpec(f"{asset}_quality", asset=asset, description="Worth a look, stops nothing.")
        )
    return specs


def checks(result: SuiteResult, asset: str) -> list[AssetCheckResult]:
    """Great Expectations' verdict on a batch, for an asset declared with `check_specs`."""
    found = []
    for name, level, severity in (
        ("expectations", "error", AssetCheckSeverity.ERROR),
        ("quality", "warn", AssetCheckSeverity.WARN),
    ):
        rows = [row for row in result.rows if row.severity == level]
        if rows:
            found.append(
                AssetCheckResult(
                    check_name=f"{asset}_{name}",
                    passed=all(row.success for row in rows),
                    severity=severity,
                    metadata=metadata(rows),
                )
            )
    return found


def metadata(rows: Sequence[Expectation]) -> dict[str, Any]:
    """What a check shows: verdict and figures in plain entries, then every expectation in a table."""
    failed = [row for row in rows if not row.success]
    told = "; ".join(f"not so: {row.meaning} ({_broken(row)})" for row in failed)
    records = [
        TableRecord(
            {
                "expected": row.meaning,
                "holds": row.success,
                "rows that break it": row.unexpected_count or 0,
                "column": ", ".join(row.about) or row.column or "(the table)",
                "expectation": row.name,
            }
        )
        for row in rows
    ]
    return {
        "verdict": told or f"all {len(rows)} hold",
        "failed": len(failed),
        "expectations": len(rows),
        "all expectations": MetadataValue.table(records),
    }


def _broken(row: Expectation) -> str:
    about = f": {', '.join(row.about)}" if row.about else ""
    if row.unexpected_count is None:
        return f"the table as a whole{about}"
    return f"{row.unexpected_count} rows, {row.unexpected_percent or 0.0:.1f}%{about}"
