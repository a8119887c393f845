"""Vendors' formats become labels, or say why not."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen import ingest, vendors
from redqueen.errors import InvalidInput
from redqueen.store import DirectoryStore
from redqueen.tables import hour_key
from redqueen.vendors import AcmeModeration
from tests.vendor_contract import VendorContract

HOUR = datetime(2026, 1, 3, 14, tzinfo=UTC)
DECIDED = int((HOUR + timedelta(minutes=7)).timestamp() * 1000)


def result(uid: str, verdict: str = "clean", *categories: tuple[str, float | None], **more: Any) -> dict:
    named = [
        {"name": name, "violates": True} | ({"score": score} if score is not None else {})
        for name, score in categories
    ]
    return {
        "uid": uid,
        "content_ref": f"e-{uid}",
        "verdict": verdict,
        "decided_at_ms": DECIDED,
        "reviewer": {"kind": "model", "id": "m7"},
        "categories": [*named, {"name": "NUDITY", "score": 0.01, "violates": False}],
    } | more


def delivery(*results: Any) -> bytes:
    return json.dumps({"schema": "acme-moderation/2", "delivery": "d1", "results": results}).encode()


class TestAcmeModeration(VendorContract):
    adapter = AcmeModeration()
    hour = HOUR
    good = (
        delivery(
            result("1", "violating", ("UNSOLICITED_BULK", 0.93), ("PHISHING", 0.8)),
            result("2", "violating", ("BULLYING", None)),
            result("3", "clean"),
        ),
        delivery(
            result("4", "violating", ("FINANCIAL_FRAUD", None), ("THREAT", None)), result("5", "escalated")
        ),
    )
    states_confidence = ("acme:1:UNSOLICITED_BULK", "acme:1:PHISHING")
    unreadable = (b"<results/>", b'{"results": 5}', b"[]", b"")
    unknown_category = delivery(
        result("6", "violating", ("TERRIBLE_PUNS", 0.99), ("PHISHING", 0.7)), result("7", "clean")
    )


def read(*results: Any) -> pl.DataFrame:
    return vendors.read(delivery(*results), "vendor=acme-moderation__x.json")


def test_a_result_that_violates_two_categories_is_two_labels() -> None:
    rows = read(result("1", "violating", ("UNSOLICITED_BULK", 0.93), ("PHISHING", None)))
    assert rows.select("label_id", "policy", "value", "confidence").rows() == [
        ("acme:1:UNSOLICITED_BULK", "spam", "abuse", "0.93"),
        ("acme:1:PHISHING", "scam", "abuse", None),
    ]
    assert rows["rater_id"].to_list() == ["acme:m7"] * 2


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("nonsense", "the result is not an object"),
        (result("1", "shrug"), "value: a verdict the adapter does not know"),
        (result("1", "violating"), "policy: violating, but no category is"),
        (result("1", "violating", ("TERRIBLE_PUNS", 1.0)), "policy: a category the adapter does not know"),
        (result("1", "violating", ("PHISHING", 7.0)), "confidence: out of range or not a number"),
        (result("1", decided_at_ms="soon"), "labeled_at: not a time"),
        (result("1", content_ref=None), "event_id: missing"),
        (result("1", reviewer=None), "rater_id: missing"),
        ({**result("1"), "uid": None}, "label_id: missing"),
    ],
)
def test_a_bad_result_is_refused_by_itself(broken: Any, reason: str) -> None:
    rows = ingest.read_file(
        delivery(broken, result("9")), f"{hour_key('labels', HOUR)}vendor=acme-moderation__x.json"
    )
    outcome = ingest.conform(rows, "labels", HOUR, HOUR + timedelta(hours=1))
    assert outcome.refused["reason"].to_list() == [reason]
    assert outcome.clean["label_id"].to_list() == ["acme:9"]


@pytest.mark.parametrize("name", ["vendor=nobody__x.json", "vendor=acme-moderation.json", "vendor=__x.json"])
def test_a_file_of_an_unknown_vendor_is_unreadable_with_the_remedy(name: str, tmp_path) -> None:
    store = DirectoryStore(tmp_path)
    store.put(f"{hour_key('labels', HOUR)}{name}", delivery(result("1")))
    landed = ingest.read_landed(store, "labels", HOUR)
    assert landed.rows.is_empty()
    ((key, reason),) = landed.unreadable
    assert key.endswith(name)
    assert "vendor=<name>__" in reason or "acme-moderation" in reason


def test_an_adapter_with_a_fault_is_told_and_stops_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Faulty(AcmeModeration):
        name = "faulty"

        def parse(self, data: bytes, filename: str) -> pl.DataFrame:
            raise KeyError("secret text")

    monkeypatch.setitem(vendors.ADAPTERS, "faulty", Faulty())
    with pytest.raises(InvalidInput, match=r"the adapter faulty failed \(KeyError\)") as told:
        vendors.read(b"{}", "vendor=faulty__x.json")
    assert "secret" not in str(told.value)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(changes=st.dictionaries(st.sampled_from(list(result("1"))), json_values, max_size=4))
def test_no_result_makes_the_adapter_raise(changes: dict[str, Any]) -> None:
    rows = read(result("1", "violating", ("PHISHING", 0.5)) | changes)
    outcome = ingest.conform(rows, "labels", HOUR, HOUR + timedelta(hours=1))
    assert outcome.clean.height + outcome.refused.height + outcome.duplicates == rows.height
