"""The Great Expectations suites on what was ingested, as code, and one function that runs them.

What a single row must be is `redqueen.ingest`'s business; a suite judges an hour as a whole and is a second
pair of eyes: it must hold on clean rows, and it tells which share breaks what on any other. The checks are
made of it in `assets.ingest`. No value of any row is in what comes out: counts, columns, verdicts.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from redqueen.errors import InvalidInput, RedQueenError
from redqueen.ingest import CLOCK_SKEW, MAX_EVENT_AGE
from redqueen.schema import KINDS, LABEL_SOURCES, LABEL_VALUES, RESPONSES

MAX_TEXT = 4_000
_SKEW = CLOCK_SKEW.total_seconds()


class ExpectationCrashed(RedQueenError):
    """An expectation could not be evaluated: nothing is known of the data, which is neither pass nor fail."""


@dataclass(frozen=True)
class Expectation:
    """One expectation's verdict. Severity is `error` (blocks) or `warn`; counts are of rows, None for a
    table's.
    """

    name: str
    column: str | None
    meaning: str
    severity: str
    success: bool
    unexpected_count: int | None
    unexpected_percent: float | None


@dataclass(frozen=True)
class SuiteResult:
    """What a suite found in `checked` rows: its expectations, failed ones first, errors before warnings."""

    suite: str
    checked: int
    rows: tuple[Expectation, ...]

    @property
    def passed(self) -> bool:
        """No expectation of severity `error` failed."""
        return all(row.success for row in self.rows if row.severity == "error")

    @property
    def failed(self) -> tuple[Expectation, ...]:
        """The expectations that failed, warnings too."""
        return tuple(row for row in self.rows if not row.success)

    @property
    def table(self) -> pl.DataFrame:
        """A row an expectation: the fields of `Expectation`."""
        return pl.DataFrame([asdict(row) for row in self.rows], infer_schema_length=None)


def metadata(rows: Sequence[Expectation]) -> dict[str, Any]:
    """What a check shows: verdict and figures in plain entries, then every expectation in a table."""
    from dagster import MetadataValue, TableRecord

    failed = [row for row in rows if not row.success]
    told = "; ".join(f"not so: {row.meaning} ({_broken(row)})" for row in failed)
    records = [
        TableRecord(
            {
                "expected": row.meaning,
                "holds": row.success,
                "rows that break it": row.unexpected_count or 0,
                "column": row.column or "(the table)",
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
    if row.unexpected_count is None:
        return "the table as a whole"
    return f"{row.unexpected_count} rows, {row.unexpected_percent or 0.0:.1f}%"


def validate(df: pl.DataFrame, suite_name: str) -> SuiteResult:
    """Run the suite `events` or `labels` over rows of that table.

    Some 3 s for the first call of a process (the import), then well under 0.15 s for 2,500 rows.

    Raises:
        InvalidInput: there is no such suite.
        ExpectationCrashed: an expectation raised, for instance because a column is missing.
    """
    if suite_name not in _SUITES:
        raise InvalidInput(f"there is no expectation suite '{suite_name}': use one of {', '.join(_SUITES)}")
    # Great Expectations keeps state in module globals; two checks of one process take turns.
    with _LOCK:
        batches, suite = _prepared(suite_name)
        batch = batches.get_batch({"dataframe": _judged(df, suite_name).to_pandas()})
        outcome = batch.validate(
            suite, result_format={"result_format": "BASIC", "partial_unexpected_count": 0}
        )
    rows = [_verdict(result, suite_name) for result in outcome.results]
    rows.sort(key=lambda row: (row.success, row.severity, row.name, row.column or ""))
    return SuiteResult(suite_name, df.height, tuple(rows))


_LOCK = threading.Lock()


def _judged(df: pl.DataFrame, suite_name: str) -> pl.DataFrame:
    """The columns that the suites speak of. Texts stay behind: only their lengths are judged."""
    happened = "ts" if suite_name == "events" else "labeled_at"
    derived = []
    if {happened, "received_at"} <= set(df.columns):
        derived.append((pl.col("received_at") - pl.col(happened)).dt.total_seconds().alias("delay_s"))
    if {"account_created_at", "ts"} <= set(df.columns):
        derived.append(
            (pl.col("ts") - pl.col("account_created_at")).dt.total_seconds().alias("account_age_s")
        )
    if {"text", "kind"} <= set(df.columns):
        spoken = pl.col("kind").is_in(["message", "dm"])
        derived.append(pl.when(spoken).then(pl.col("text").str.len_chars().fill_null(0)).alias("text_length"))
    plain = [name for name in _COLUMNS[suite_name] if name in df.columns]
    return df.select(*plain, *derived)


_COLUMNS: dict[str, tuple[str, ...]] = {
    "events": ("event_id", "actor_id", "ts", "received_at", "kind", "response", "community_size", "language"),
    "labels": ("label_id", "event_id", "policy", "value", "source", "rater_id", "received_at", "confidence"),
}


def _events_suite(gxe: Any) -> Sequence[Any]:
    oldest = MAX_EVENT_AGE.total_seconds()
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=1, **_mild("something arrived")),
        *(
            gxe.ExpectColumnValuesToNotBeNull(column=c, **_grave(f"every event has {c}"))
            for c in _COLUMNS["events"][:5]
        ),
        gxe.ExpectColumnValuesToBeUnique(column="event_id", **_grave("an event appears once")),
        gxe.ExpectColumnValuesToBeInSet(column="kind", value_set=list(KINDS), **_grave("kinds are known")),
        gxe.ExpectColumnValuesToBeInSet(
            column="response", value_set=list(RESPONSES), **_grave("responses are known")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="delay_s",
            min_value=-_SKEW,
            max_value=oldest,
            **_grave("events arrive after they happened"),
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="delay_s",
            max_value=6 * 3600,
            mostly=0.95,
            **_mild("95% of events arrive within six hours"),
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="account_age_s", min_value=-_SKEW, **_grave("accounts are older than what they send")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="community_size", min_value=0, **_grave("communities have a size")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="text_length", min_value=1, **_grave("messages have a text")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="text_length",
            max_value=MAX_TEXT,
            mostly=0.99,
            **_mild(f"99% of texts are below {MAX_TEXT} characters"),
        ),
        gxe.ExpectColumnValuesToNotBeNull(
            column="language", mostly=0.2, **_mild("a fifth of the events at least has a language")
        ),
    ]


def _labels_suite(gxe: Any) -> Sequence[Any]:
    return [
        gxe.ExpectTableRowCountToBeBetween(min_value=1, **_mild("some label arrived")),
        *(
            gxe.ExpectColumnValuesToNotBeNull(column=c, **_grave(f"every label has {c}"))
            for c in _COLUMNS["labels"][:7]
        ),
        gxe.ExpectColumnValuesToBeUnique(column="label_id", **_grave("a label appears once")),
        gxe.ExpectColumnValuesToBeInSet(
            column="value", value_set=list(LABEL_VALUES), **_grave("values are known")
        ),
        gxe.ExpectColumnValuesToBeInSet(
            column="source", value_set=list(LABEL_SOURCES), **_grave("sources are known")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="confidence", min_value=0, max_value=1, **_grave("confidence is a share")
        ),
        gxe.ExpectColumnValuesToBeBetween(
            column="delay_s", min_value=-_SKEW, **_grave("labels are received after they were given")
        ),
        gxe.ExpectColumnValuesToNotBeInSet(
            column="value", value_set=["unsure"], mostly=0.5, **_mild("half of the labels at least decide")
        ),
    ]


_SUITES: dict[str, Callable[[Any], Sequence[Any]]] = {"events": _events_suite, "labels": _labels_suite}


def _grave(meaning: str) -> dict[str, Any]:
    return {"severity": "critical", "meta": {"meaning": meaning}}


def _mild(meaning: str) -> dict[str, Any]:
    return {"severity": "warning", "meta": {"meaning": meaning}}


@functools.cache
def _prepared(suite_name: str) -> tuple[Any, Any]:
    """The batch definition and the suite, built once a process."""
    context, gx = _context()
    source = context.data_sources.add_pandas(suite_name)
    batches = source.add_dataframe_asset(suite_name).add_batch_definition_whole_dataframe("hour")
    suite = gx.ExpectationSuite(name=suite_name, expectations=list(_SUITES[suite_name](gx.expectations)))
    return batches, suite


@functools.cache
def _context() -> tuple[Any, Any]:
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    import great_expectations.expectations
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    return context, gx


def _verdict(result: Any, suite_name: str) -> Expectation:
    config = result.expectation_config
    column = config.kwargs.get("column")
    crash = _crash(result.exception_info or {})
    if crash:
        on = f" on column '{column}'" if column else ""
        raise ExpectationCrashed(
            f"{config.type}{on} of suite '{suite_name}' could not be evaluated ({crash}): the data are "
            "neither good nor bad but unknown. Compare the columns with redqueen/schema.py and run the check "
            "again."
        )
    found = result.result
    severity = getattr(config.severity, "value", config.severity)
    return Expectation(
        name=config.type.removeprefix("expect_"),
        column=column,
        meaning=(config.meta or {}).get("meaning", ""),
        severity="error" if str(severity) == "critical" else "warn",
        success=bool(result.success),
        unexpected_count=found.get("unexpected_count"),
        unexpected_percent=found.get("unexpected_percent"),
    )


def _crash(info: dict[str, Any]) -> str | None:
    """What kind of error an expectation raised; None where it raised none. Messages may quote rows: left
    out.
    """
    several = [info] if "raised_exception" in info else list(info.values())
    for one in several:
        if one.get("raised_exception"):
            message = str(one.get("exception_message") or "")
            if "does not exist" in message:
                return "its column does not exist"
            trace = str(one.get("exception_traceback") or "").strip().splitlines()
            return trace[-1].partition(":")[0] if trace else "no error was given"
    return None
