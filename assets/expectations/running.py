"""Runs a suite over rows: the one place that knows Great Expectations' objects and its three ways to fail."""

from __future__ import annotations

import functools
import os
import threading
from dataclasses import asdict, dataclass
from typing import Any

import polars as pl

from assets.expectations.suites import SUITES, Derived, Facts, Rule, Suite
from redqueen.errors import InvalidInput, RedQueenError

RESULT_FORMAT = {"result_format": "BASIC", "partial_unexpected_count": 0}
"""Counts and no values: what is unexpected is never listed."""


class ExpectationCrashed(RedQueenError):
    """An expectation could not be evaluated: nothing is known of the data, which is neither pass nor fail."""


@dataclass(frozen=True)
class Expectation:
    """One expectation's verdict. Severity is `error` (blocks) or `warn`; counts are of rows, None for a
    table's. `about` names the columns to blame, where it failed and more than one may be.
    """

    name: str
    column: str | None
    meaning: str
    severity: str
    success: bool
    unexpected_count: int | None
    unexpected_percent: float | None
    about: tuple[str, ...] = ()


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


def suite_named(name: str, facts: Facts) -> Suite:
    """The suite of that name. Raises: InvalidInput where there is none, or a fact that it needs is not
    given."""
    if name not in SUITES:
        raise InvalidInput(f"there is no expectation suite '{name}': use one of {', '.join(SUITES)}")
    if SUITES[name].needs_rows and facts.rows is None:
        raise InvalidInput(f"the suite '{name}' must be told how many rows there are to be (Facts.rows)")
    return SUITES[name]


def validate(df: pl.DataFrame, suite_name: str, facts: Facts | None = None) -> SuiteResult:
    """Run a suite over rows of its table.

    Some 3 s for the first call of a process (the import), then well under 0.15 s for 2,500 rows.

    Raises:
        InvalidInput: there is no such suite, or it must be told more.
        ExpectationCrashed: an expectation raised, for instance because a column is missing.
    """
    facts = facts or Facts()
    suite = suite_named(suite_name, facts)
    # Great Expectations keeps state in module globals; two checks of one process take turns.
    with LOCK:
        batches, expected = _prepared(suite_name, facts.policies, facts.behaviour)
        batch = batches.get_batch({"dataframe": judged(df, suite_name, facts).to_pandas()})
        outcome = batch.validate(
            expected, result_format=RESULT_FORMAT, expectation_parameters={"rows": facts.rows}
        )
    made = {derived.name: derived for derived in suite.derived(facts)}
    rows = [_verdict(result, suite_name, df, made) for result in outcome.results]
    rows.sort(key=lambda row: (row.success, row.severity, row.name, row.column or ""))
    return SuiteResult(suite_name, df.height, tuple(rows))


LOCK = threading.RLock()


def judged(df: pl.DataFrame, suite_name: str, facts: Facts) -> pl.DataFrame:
    """What is handed to Great Expectations: the columns that rules read, the derived ones, and the others as
    empty columns, by name alone. Texts stay behind.

    Raises: ExpectationCrashed where a derived column cannot be computed.
    """
    suite = SUITES[suite_name]
    made = [d for d in suite.derived(facts) if set(d.needs) <= set(df.columns)]
    unread = [name for name in df.columns if name not in (*suite.columns, *suite.optional)]
    try:
        frame = df.drop(suite.optional, strict=False).with_columns(derived.expression for derived in made)
    except pl.exceptions.PolarsError as problem:
        # Its message may quote rows.
        raise ExpectationCrashed(
            f"suite '{suite_name}' could not be evaluated ({type(problem).__name__} in one of "
            f"{', '.join(d.name for d in made)}): the data are neither good nor bad but unknown. Compare the "
            "types of the columns with redqueen/schema.py and run the check again."
        ) from None
    return frame.with_columns(pl.lit(None).alias(name) for name in unread)


def build(suite_name: str, facts: Facts, gx: Any) -> Any:
    """The suite as an object of Great Expectations."""
    rules = SUITES[suite_name].rules(facts)
    return gx.ExpectationSuite(
        name=suite_name, expectations=[_expectation(gx.expectations, rule) for rule in rules]
    )


def _expectation(gxe: Any, rule: Rule) -> Any:
    column = {} if rule.column is None else {"column": rule.column}
    severity = "critical" if rule.severity == "error" else "warning"
    meta = {"meaning": rule.meaning, "severity": rule.severity}
    return getattr(gxe, f"Expect{rule.kind}")(
        **column, **rule.options, severity=severity, meta=meta, notes=rule.meaning
    )


@functools.cache
def _prepared(suite_name: str, policies: tuple[str, ...], behaviour: bool) -> tuple[Any, Any]:
    """The batch definition and the suite, built once a process."""
    context, gx = _context()
    name = "-".join((suite_name, *policies, str(behaviour)))
    source = context.data_sources.add_pandas(name)
    batches = source.add_dataframe_asset(suite_name).add_batch_definition_whole_dataframe("rows")
    return batches, build(suite_name, Facts(policies, behaviour), gx)


@functools.cache
def _context() -> tuple[Any, Any]:
    return new_context()


def new_context() -> tuple[Any, Any]:
    """A context that leaves nothing behind, and the library; loads it."""
    os.environ["GX_ANALYTICS_ENABLED"] = "false"
    import great_expectations as gx
    import great_expectations.expectations
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    return context, gx


def _verdict(result: Any, suite_name: str, df: pl.DataFrame, made: dict[str, Derived]) -> Expectation:
    config = result.expectation_config
    column = config.kwargs.get("column")
    crash = _crash(result.exception_info or {})
    if crash:
        on = f" on column '{column}'" if column else ""
        lacking = sorted(set(made[column].needs) - set(df.columns)) if column in made else []
        if lacking:
            crash = f"it is made of columns that do not exist: {', '.join(lacking)}"
        raise ExpectationCrashed(
            f"{config.type}{on} of suite '{suite_name}' could not be evaluated ({crash}): the data are "
            "neither good nor bad but unknown. Compare the columns with redqueen/schema.py and run the check "
            "again."
        )
    found = result.result
    meta = config.meta or {}
    return Expectation(
        name=config.type.removeprefix("expect_"),
        column=column,
        meaning=meta.get("meaning", ""),
        severity=meta.get("severity", "error"),
        success=bool(result.success),
        unexpected_count=found.get("unexpected_count"),
        unexpected_percent=found.get("unexpected_percent"),
        about=() if result.success else _blamed(found, df, made.get(column or "")),
    )


def _blamed(found: dict[str, Any], df: pl.DataFrame, derived: Derived | None) -> tuple[str, ...]:
    """The columns at fault: parts of a derived column that hold anywhere, or names that do not match."""
    if derived is not None and derived.parts:
        held = df.select(part.fill_null(False).any().alias(name) for name, part in derived.parts.items())
        return tuple(name for name, bad in held.row(0, named=True).items() if bad)
    mismatched = (found.get("details") or {}).get("mismatched") or {}
    words = {"missing": "missing", "unexpected": "not declared"}
    return tuple(f"{name} ({words[how]})" for how in words for name in mismatched.get(how) or ())


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
