"""What was refused is counted, and comes back once, when the rules have changed."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from assets.environment import Environment
from assets.ingest import _take_in
from redqueen import quarantine, state, vendors
from redqueen.clock import StoreClock
from redqueen.errors import InvalidInput
from redqueen.tables import hour_key, read_hours
from tests.test_ingest import as_json, event, label
from tests.test_vendors import delivery, result

HOUR = datetime(2026, 1, 3, 14, tzinfo=UTC)
LATER = HOUR + timedelta(hours=30, minutes=20)
ALL = ("spam", "scam", "harassment", "gambling")


@pytest.fixture
def env(tmp_path: Path) -> Environment:
    found = Environment(home=str(tmp_path / "home"))
    StoreClock(found.store).set(LATER)
    return found


def land(env: Environment, table: str, rows: list[dict[str, Any]], hour: datetime = HOUR) -> None:
    data = "\n".join(as_json(row) for row in rows).encode()
    env.store.put(f"{hour_key(table, hour)}a.jsonl", data)


def taken(env: Environment, table: str) -> Any:
    return read_hours(env.store, f"ingested/{table}", HOUR, LATER + timedelta(hours=9))


def refused_labels(env: Environment) -> None:
    """Two labels of a policy that is added later, one that nothing can mend."""
    rows = [label(1, policy="gambling"), label(2, policy="gambling"), label(3, value="bad"), label(4)]
    land(env, "labels", rows)
    _take_in(env, "labels", [HOUR])


def test_the_list_counts_by_hour_and_reason_and_shows_nothing_of_the_rows(env: Environment) -> None:
    refused_labels(env)
    found = quarantine.listing(env.store, "labels")
    assert dict(found.select("reason", "rows").rows()) == {
        "policy: not one of spam, scam, harassment, any": 2,
        "value: not one of abuse, benign, unsure": 1,
    }
    assert quarantine.listing(env.store, "labels", "policy")["rows"].to_list() == [2]
    assert quarantine.tables(env.store) == ["labels"]


def test_what_passes_now_lands_once_as_known_from_now_and_the_rest_stays(env: Environment) -> None:
    refused_labels(env)
    found = quarantine.retry(env.store, "labels", LATER, policies=ALL)
    assert (found.tried, found.passed) == (3, 2)
    assert found.still == {"value: not one of abuse, benign, unsure": 1}
    assert found.landed is not None
    assert found.landed.startswith(hour_key("labels", LATER.replace(minute=0)))
    assert b'"_origin": "labels/dt=2026-01-03/hr=14"' in env.store.get(found.landed).data
    again = quarantine.retry(env.store, "labels", LATER, policies=ALL)
    assert (again.tried, again.passed, again.landed) == (1, 0, None)

    mended = Environment(home=env.home)
    object.__setattr__(mended.settings, "policies", ALL)
    StoreClock(env.store).set(LATER + timedelta(hours=1))
    _take_in(mended, "labels", [LATER.replace(minute=0)])
    rows = taken(env, "labels")
    assert sorted(rows["label_id"]) == ["l1", "l2", "l4"]
    # No training set as of an instant before could hold them: they are known from the retry on.
    assert set(rows.filter(rows["policy"] == "gambling")["received_at"]) == {LATER}
    assert set(rows.filter(rows["policy"] == "gambling")["labeled_at"]) == {
        HOUR + timedelta(seconds=1),
        HOUR + timedelta(seconds=2),
    }


def test_killed_before_the_marks_and_run_in_another_hour_no_row_is_doubled(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused_labels(env)

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(quarantine, "_mark", die)
        with pytest.raises(Killed):
            quarantine.retry(env.store, "labels", LATER, policies=ALL)
    next_hour = LATER + timedelta(hours=1)
    assert quarantine.retry(env.store, "labels", next_hour, policies=ALL).passed == 2
    object.__setattr__(env.settings, "policies", ALL)
    StoreClock(env.store).set(LATER + timedelta(hours=3))
    hours = [LATER.replace(minute=0), next_hour.replace(minute=0)]
    _, counts = _take_in(env, "labels", hours)
    assert counts["known_from_other_hours"] == 2
    assert sorted(taken(env, "labels")["label_id"]) == ["l1", "l2", "l4"]


def test_killed_between_and_run_again_in_the_hour_it_is_the_same_file(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused_labels(env)
    with monkeypatch.context() as patch:
        patch.setattr(quarantine, "_mark", lambda *_: None)
        first = quarantine.retry(env.store, "labels", LATER, policies=ALL)
    second = quarantine.retry(env.store, "labels", LATER + timedelta(minutes=9), policies=ALL)
    assert first.landed == second.landed
    assert len(env.store.list(hour_key("labels", LATER.replace(minute=0)))) == 1


def test_hour_and_reason_narrow_a_retry(env: Environment) -> None:
    refused_labels(env)
    assert quarantine.retry(env.store, "labels", LATER, policies=ALL, reason="value").tried == 1
    assert quarantine.retry(env.store, "labels", LATER, policies=ALL, hour=LATER.replace(minute=0)).tried == 0
    assert quarantine.retry(env.store, "labels", LATER, policies=ALL, hour=HOUR).tried == 3


def test_waiting_makes_no_impossible_time_possible(env: Environment) -> None:
    ahead = event(1, ts=HOUR + timedelta(hours=5), received_at=HOUR + timedelta(minutes=1))
    land(env, "events", [ahead, event(2, ts=HOUR - timedelta(days=31))])
    _take_in(env, "events", [HOUR])
    assert sum(quarantine.counts(env.store, "events").values()) == 2
    assert quarantine.retry(env.store, "events", LATER).passed == 0


def test_contradictions_and_broken_lines_are_not_tried_for_ever(env: Environment) -> None:
    key = f"{hour_key('events', HOUR)}a.jsonl"
    env.store.put(key, f"{as_json(event(1))}\n{as_json(event(1, text='no'))}\nbroken".encode())
    _take_in(env, "events", [HOUR])
    found = quarantine.retry(env.store, "events", LATER)
    assert (found.tried, found.passed, found.landed) == (2, 0, None)
    assert set(found.still) == {"event_id: conflicting duplicate", "the line is not JSON"}


def test_a_vendors_results_come_back_when_its_mapping_is_mended(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = f"{hour_key('labels', HOUR)}vendor=acme-moderation__1.json"
    bad = result("1", "violating", ("SPAMVERTISING", 0.9), ("PHISHING", 0.8))
    env.store.put(key, delivery(bad, result("2", "shrug")))
    _take_in(env, "labels", [HOUR])
    assert sum(quarantine.counts(env.store, "labels").values()) == 2
    assert quarantine.retry(env.store, "labels", LATER).passed == 0
    adapter = vendors.ADAPTERS["acme-moderation"]
    monkeypatch.setattr(type(adapter), "categories", {**adapter.categories, "SPAMVERTISING": "spam"})
    found = quarantine.retry(env.store, "labels", LATER)
    assert (found.passed, sum(found.still.values())) == (1, 1)
    StoreClock(env.store).set(LATER + timedelta(hours=1))
    _take_in(env, "labels", [LATER.replace(minute=0)])
    rows = taken(env, "labels")
    assert sorted(rows["label_id"]) == ["acme:1:PHISHING", "acme:1:SPAMVERTISING"]


def test_a_file_of_a_vendor_that_has_an_adapter_now_comes_back_whole(
    env: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(vendors.AcmeModeration):
        name = "other"

    key = f"{hour_key('labels', HOUR)}vendor=other__1.json"
    env.store.put(key, delivery(result("1"), result("2", "shrug")))
    _take_in(env, "labels", [HOUR])
    monkeypatch.setitem(vendors.ADAPTERS, "other", Other())
    found = quarantine.retry(env.store, "labels", LATER)
    assert found.passed == 1
    assert quarantine.counts(env.store, "labels") == {"value: a verdict the adapter does not know": 1}


def test_an_import_is_not_retried_from_here(env: Environment) -> None:
    with pytest.raises(InvalidInput, match="mend their source"):
        quarantine.retry(env.store, "import", LATER)


def test_marks_are_kept_beside_the_rows_which_never_change(env: Environment) -> None:
    refused_labels(env)
    before = {key: env.store.get(key).data for key in env.store.list("quarantine/")}
    quarantine.retry(env.store, "labels", LATER, policies=ALL)
    after = env.store.list("quarantine/")
    (marks,) = set(after) - set(before)
    assert all(env.store.get(key).data == data for key, data in before.items())
    assert len(state.read(env.store, marks)) == 2
    assert "gambling" not in json.dumps(state.read(env.store, marks))
