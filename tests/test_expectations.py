"""The suites hold on clean hours, name what is wrong with bad ones, and never mistake a crash for a
failure.
"""

from __future__ import annotations

import subprocess
import sys
import time
from datetime import timedelta
from typing import Any

import polars as pl
import pytest

from assets import expectations
from assets.expectations import ExpectationCrashed, validate
from redqueen import ingest
from redqueen.errors import InvalidInput
from tests.test_ingest import HOUR, NOW, event, frame, label


def clean_events(n: int = 200, **changes: Any) -> pl.DataFrame:
    return ingest.conform(frame(*(event(i, **changes) for i in range(n))), "events", HOUR, NOW).clean


def clean_labels(n: int = 50) -> pl.DataFrame:
    return ingest.conform(frame(*(label(i) for i in range(n))), "labels", HOUR, NOW).clean


def broken(result: expectations.SuiteResult) -> set[tuple[str, str | None]]:
    return {(row.name, row.column) for row in result.failed}


def test_importing_the_module_loads_no_great_expectations() -> None:
    code = "import sys, assets.expectations; print('great_expectations' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_clean_hours_pass() -> None:
    for rows, suite in ((clean_events(), "events"), (clean_labels(), "labels")):
        result = validate(rows, suite)
        assert (result.passed, result.failed) == (True, ())
        assert result.table.height >= 8
        assert expectations.metadata(result.rows)["verdict"].startswith("all")


def test_a_bad_hour_fails_and_says_where() -> None:
    rows = clean_events()
    bad = rows.with_columns(
        kind=pl.when(pl.col("event_id") == "e7").then(pl.lit("shout")).otherwise("kind"),
        event_id=pl.when(pl.col("event_id") == "e8").then(pl.lit("e9")).otherwise("event_id"),
        ts=pl.when(pl.col("event_id") == "e5").then(pl.col("ts") + timedelta(hours=2)).otherwise("ts"),
    )
    result = validate(bad, "events")
    assert not result.passed
    assert broken(result) == {
        ("column_values_to_be_in_set", "kind"),
        ("column_values_to_be_unique", "event_id"),
        ("column_values_to_be_between", "delay_s"),
    }
    assert "kinds are known (1 rows, 0.5%)" in expectations.metadata(result.rows)["verdict"]
    told = repr(result) + repr(expectations.metadata(result.rows))
    assert not [value for value in ("shout", "hello", "'e9'") if value in told]


def test_labels_of_unknown_value_source_or_confidence_fail() -> None:
    bad = clean_labels().with_columns(value=pl.lit("bad"), source=pl.lit("gossip"), confidence=pl.lit(2.0))
    columns = {column for _, column in broken(validate(bad, "labels"))}
    assert columns == {"value", "source", "confidence"}


def test_an_empty_hour_and_missing_languages_warn_and_pass() -> None:
    for rows in (clean_events().clear(), clean_events(language=None)):
        result = validate(rows, "events")
        assert result.passed
        assert result.failed


def test_an_expectation_that_crashes_is_an_error_not_a_failure() -> None:
    with pytest.raises(ExpectationCrashed, match=r"'kind'.*column does not exist"):
        validate(clean_events().drop("kind", "text"), "events")
    assert validate(clean_events(), "events").passed


def test_there_is_no_such_suite() -> None:
    with pytest.raises(InvalidInput, match="events, labels"):
        validate(clean_events(5), "gold")


def test_the_second_validation_of_2500_rows_is_quick() -> None:
    rows = clean_events(2500)
    validate(rows, "events")
    start = time.perf_counter()
    validate(rows, "events")
    assert time.perf_counter() - start < 1.0  # some 0.1 s on a quiet core
