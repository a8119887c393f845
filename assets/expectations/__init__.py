"""The Great Expectations suites, as code: what a table of an hour or of a candidate must be as a whole.

What a single row must be is `redqueen.ingest`'s business; a suite is a second pair of eyes: it must hold on
clean rows, and it tells which share breaks what on any other. Which suites there are is declared in `suites`
(a new table is added there, in one place), `running` runs one, `docs` writes its Data Docs on request. Assets
turn a result into their checks with `checks`. No value of any row is in what comes out: counts, columns,
verdicts.

Importing this loads no Great Expectations; the first validation of a process does.
"""

from __future__ import annotations

from assets.expectations.running import Expectation, ExpectationCrashed, SuiteResult, validate
from assets.expectations.showing import Showing, check_specs, checks, judge, metadata
from assets.expectations.suites import SUITES, Facts

__all__ = [
    "SUITES",
    "Expectation",
    "ExpectationCrashed",
    "Facts",
    "Showing",
    "SuiteResult",
    "check_specs",
    "checks",
    "judge",
    "metadata",
    "validate",
]
