"""Labels from moderation vendors: each speaks a format of its own, and an adapter turns it into the table
`labels`.

A file that lands as `labels/dt=/hr=/vendor=<name>__<anything>` goes through the adapter of that name. An
adapter only translates: what a label must be is judged afterwards by `redqueen.ingest`, like any other row.
To add one, write a class, put it into `ADAPTERS`, and put it through `tests/vendor_contract.py`.

What an adapter must not do: guess a policy for a category it does not know, invent a confidence that the
vendor did not state, give a row an id that changes when the file is sent again, or say when *we* received it
(`received_at` stays null; the hour in which the file landed decides).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import polars as pl

from redqueen import loose
from redqueen.errors import InvalidInput
from redqueen.schema import ANY_POLICY, LABELS

MARK = "vendor="
_NAMED = re.compile(r"vendor=(?P<name>[a-z0-9][a-z0-9-]*)__.+")
_RAW_KEPT = 2_000


class VendorAdapter(Protocol):
    """One vendor's format."""

    name: str
    """As in the file's name: lower case, digits and dashes."""

    categories: Mapping[str, str]
    """The vendor's abuse categories and the policy that each stands for here."""

    def parse(self, data: bytes, filename: str) -> pl.DataFrame:
        """The labels of one file: the columns of `labels`, and `_row`, `_problem`, `_raw` as
        `redqueen.loose` has them.

        `_problem` says why a result is no label (an unknown category, say), `_raw` holds its beginning.
        Deterministic: the same bytes give the same rows.

        Raises:
            InvalidInput: nothing of the file can be read; the message quotes nothing of it.
        """
        ...


class AcmeModeration:
    """ "acme-moderation", an invented vendor with the habits of real ones: JSON with nested results, its own
    ids and category names, several categories a result, times in epoch milliseconds.

    A result that violates is one label a category that it says is violated, a clean one is benign under every
    policy, an escalated one is unsure. Acme states a score only where its model judged: a person's verdict
    has no confidence.
    """

    name = "acme-moderation"
    categories: Mapping[str, str] = {
        "UNSOLICITED_BULK": "spam",
        "PHISHING": "scam",
        "FINANCIAL_FRAUD": "scam",
        "BULLYING": "harassment",
        "THREAT": "harassment",
    }
    _VERDICTS: Mapping[str, str] = {"violating": "abuse", "clean": "benign", "escalated": "unsure"}

    def parse(self, data: bytes, filename: str) -> pl.DataFrame:
        try:
            delivery = json.loads(data.decode("utf-8-sig"))
            results = delivery["results"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InvalidInput(f"not a delivery of {self.name} ({type(error).__name__})") from None
        if not isinstance(results, list):
            raise InvalidInput(f"not a delivery of {self.name} ('results' is no list)")
        return rows_of(
            (place, row) for place, result in enumerate(results, start=1) for row in self._labels(result)
        )

    def _labels(self, result: Any) -> Iterator[dict[str, Any]]:
        """One result's labels; a result that cannot be one is a row that says why."""
        if not isinstance(result, dict):
            yield {loose.PROBLEM: "the result is not an object", loose.RAW: result}
            return
        reviewer = result.get("reviewer")
        who = reviewer.get("id") if isinstance(reviewer, dict) else None
        base = {
            "label_id": f"acme:{result['uid']}" if result.get("uid") else None,
            "event_id": result.get("content_ref"),
            "policy": ANY_POLICY,
            "value": self._VERDICTS.get(str(result.get("verdict"))),
            "source": "vendor",
            "rater_id": f"acme:{who}" if who else None,
            "labeled_at": result.get("decided_at_ms"),
            "confidence": None,
        }
        if base["value"] is None:
            yield {**base, loose.PROBLEM: "value: a verdict the adapter does not know", loose.RAW: result}
            return
        if base["value"] != "abuse":
            yield base
            return
        violated = [c for c in _objects(result.get("categories")) if c.get("violates") is True]
        if not violated:
            yield {**base, loose.PROBLEM: "policy: violating, but no category is", loose.RAW: result}
        for category in violated:
            name = str(category.get("name"))
            row = {
                **base,
                "label_id": f"{base['label_id']}:{name}" if base["label_id"] else None,
                "policy": self.categories.get(name),
                "confidence": category.get("score"),
            }
            unknown = {loose.PROBLEM: "policy: a category the adapter does not know", loose.RAW: result}
            yield row if row["policy"] else {**row, **unknown}


def _objects(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def rows_of(rows: Iterator[tuple[int, dict[str, Any]]]) -> pl.DataFrame:
    """(place in the file, label) pairs as the frame that `VendorAdapter.parse` returns; every value is text.

    Values that are no text stay visible as JSON, so that the rules of `redqueen.ingest` can refuse them.
    """
    wanted = [*LABELS.names, loose.PROBLEM, loose.RAW]
    columns: dict[str, list[Any]] = {name: [] for name in wanted}
    places = []
    for place, row in rows:
        places.append(place)
        for name in wanted:
            told = _text(row.get(name))
            columns[name].append(told[:_RAW_KEPT] if told and name == loose.RAW else told)
    return pl.DataFrame(
        {**columns, loose.ROW: places},
        schema={**dict.fromkeys(wanted, pl.String()), loose.ROW: pl.Int64()},
    )


def _text(value: Any) -> str | None:
    if value is None:
        return None
    said = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    # JSON may escape half a surrogate pair, which is no character.
    return said.encode("utf-8", "replace").decode()


ADAPTERS: dict[str, VendorAdapter] = {adapter.name: adapter for adapter in (AcmeModeration(),)}


def is_vendors(filename: str) -> bool:
    """Whether a landed file is a vendor's."""
    return filename.startswith(MARK)


def adapter_of(filename: str) -> VendorAdapter:
    """The adapter that a file's name asks for.

    Raises:
        InvalidInput: the name follows no convention, or names no adapter there is.
    """
    named = _NAMED.fullmatch(filename)
    if named is None:
        raise InvalidInput("a vendor's file is called vendor=<name>__<anything>")
    adapter = ADAPTERS.get(named["name"])
    if adapter is None:
        raise InvalidInput(f"no adapter is called '{named['name']}': there are {', '.join(ADAPTERS)}")
    return adapter


def read(data: bytes, filename: str) -> pl.DataFrame:
    """The labels of a vendor's file; raises `InvalidInput` where nothing of it can be read."""
    adapter = adapter_of(filename)
    try:
        return adapter.parse(data, filename)
    except InvalidInput:
        raise
    except Exception as error:
        # An adapter with a fault must not take the other files of the hour with it.
        raise InvalidInput(f"the adapter {adapter.name} failed ({type(error).__name__})") from error
