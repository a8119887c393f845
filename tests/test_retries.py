"""A step that fails is tried again where that may help, and only there."""

from __future__ import annotations

import dagster as dg
import pytest

from assets.common import RetryWhatMayPass
from dagster_project.definitions import defs
from redqueen.errors import (
    BundleError,
    Conflict,
    InvalidInput,
    NotFound,
    Refused,
    ServiceUnavailable,
    StoreUnusable,
)


def attempts(error: Exception, needed: int) -> tuple[int, dg.ExecuteInProcessResult]:
    """How often a step was tried that raises `error` until its attempt number `needed`."""
    tried = 0

    @dg.asset(retry_policy=RetryWhatMayPass(max_retries=2, delay=0))
    def step() -> None:
        nonlocal tried
        tried += 1
        if tried < needed:
            raise error

    result = dg.materialize([step], raise_on_error=False)
    return tried, result


@pytest.mark.parametrize("kind", [InvalidInput, Refused, StoreUnusable])
def test_what_somebody_has_to_mend_first_fails_at_once_and_says_so(kind: type[Exception]) -> None:
    tried, result = attempts(kind("2026-01-11 has not begun: wait for its midnight"), needed=3)
    assert (tried, result.success) == (1, False)
    (failed,) = result.filter_events(lambda event: event.is_step_failure)
    told = failed.step_failure_data
    assert told.user_failure_data is not None
    assert told.user_failure_data.description == "2026-01-11 has not begun: wait for its midnight"
    assert told.error is not None
    assert told.error.cause is not None
    assert told.error.cause.cls_name == kind.__name__
    assert "in step" in "".join(told.error.cause.stack), "where it came from is shown too"


@pytest.mark.parametrize(
    "error",
    [
        Conflict("key", "it changed"),
        NotFound("key"),
        ServiceUnavailable("no answer"),
        BundleError("it cannot be read"),
        OSError("the disk hiccups"),
        dg.Failure("said by hand"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    tried, result = attempts(error, needed=3)
    assert (tried, result.success) == (3, True)


def test_what_does_not_pass_ends_after_the_last_attempt() -> None:
    tried, result = attempts(OSError("the disk is gone"), needed=9)
    assert (tried, result.success) == (3, False)


def test_every_asset_that_is_tried_again_is_so_only_where_that_may_help() -> None:
    policies = {a.node_def.name: a.node_def.retry_policy for a in defs.assets or () if hasattr(a, "node_def")}
    retried = {name: policy for name, policy in policies.items() if policy is not None}
    assert len(retried) > 10
    assert [name for name, policy in retried.items() if not isinstance(policy, RetryWhatMayPass)] == []
