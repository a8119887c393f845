"""The contract that every vendor's adapter is put through: derive from `VendorContract`, give it samples.

class TestAcme(VendorContract):
    adapter = AcmeModeration()
    good = [...]            # bytes of files as the vendor sends them; together they use every category
    unreadable = [...]      # bytes of which nothing can be read
    unknown_category = ...  # a file with a category that no policy stands for
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import ClassVar

import polars as pl
import pytest

from redqueen import ingest, loose, vendors
from redqueen.errors import InvalidInput
from redqueen.schema import LABELS
from redqueen.store import DirectoryStore
from redqueen.tables import hour_key


class VendorContract:
    """What an adapter promises. `hour` is one in which the samples could have landed."""

    adapter: ClassVar[vendors.VendorAdapter]
    good: ClassVar[Sequence[bytes]]
    unreadable: ClassVar[Sequence[bytes]]
    unknown_category: ClassVar[bytes]
    states_confidence: ClassVar[Sequence[str]]
    """Ids of labels for which the vendor states a confidence; all others must have none."""
    hour: ClassVar[datetime]
    suffix: ClassVar[str] = "json"

    @property
    def filename(self) -> str:
        return f"vendor={self.adapter.name}__sample.{self.suffix}"

    def taken_in(self, data: bytes) -> ingest.Conformed:
        """What becomes of a file that lands."""
        rows = ingest.read_file(data, f"{hour_key('labels', self.hour)}{self.filename}")
        policies = tuple(sorted(set(self.adapter.categories.values())))
        return ingest.conform(rows, "labels", self.hour, self.hour + timedelta(hours=1), policies)

    def test_it_is_found_by_the_name_of_the_file(self) -> None:
        assert vendors.ADAPTERS[self.adapter.name].name == self.adapter.name
        assert vendors.adapter_of(self.filename).name == self.adapter.name

    def test_every_label_of_a_good_file_passes(self) -> None:
        for data in self.good:
            outcome = self.taken_in(data)
            assert outcome.clean.height
            assert outcome.refused["reason"].to_list() == []
            assert outcome.unknown_columns == ()
            assert set(outcome.clean["source"]) == {"vendor"}

    def test_the_samples_use_every_category_and_only_known_policies(self) -> None:
        rows = pl.concat([self.taken_in(data).clean for data in self.good])
        abusive = rows.filter(pl.col("value") == "abuse")
        assert set(abusive["policy"]) == set(self.adapter.categories.values())

    def test_times_are_instants_and_when_we_knew_is_left_to_us(self) -> None:
        for data in self.good:
            raw = self.adapter.parse(data, self.filename)
            assert raw["received_at"].null_count() == raw.height
            clean = self.taken_in(data).clean
            assert clean.schema["labeled_at"] == loose.TIME
            assert (clean["labeled_at"] <= clean["received_at"]).all()
            # Taken in once the hour is over: nobody can have known it earlier.
            assert set(clean["received_at"]) == {self.hour + timedelta(hours=1, microseconds=-1)}

    def test_ids_are_stable_and_distinct(self) -> None:
        for data in self.good:
            first, again = (
                self.adapter.parse(data, name) for name in (self.filename, "vendor=x__resent.json")
            )
            assert first.equals(again)
            assert first["label_id"].is_unique().all()
            assert first["label_id"].null_count() == 0

    def test_a_file_sent_again_in_another_hour_changes_nothing(self, tmp_path) -> None:  # type: ignore[no-untyped-def]
        store = DirectoryStore(tmp_path)
        heights = []
        for n, data in enumerate((*self.good, *self.good)):
            hour = self.hour + timedelta(hours=n)
            rows = ingest.read_file(data, f"{hour_key('labels', hour)}{self.filename}")
            outcome = ingest.take_in(store, rows, "labels", hour, hour + timedelta(hours=1))
            assert outcome.refused.height == 0
            heights.append((outcome.clean.height, outcome.duplicates))
        for (kept, _), (nothing, copies) in zip(
            heights[: len(self.good)], heights[len(self.good) :], strict=True
        ):
            assert (nothing, copies) == (0, kept)

    def test_no_confidence_is_invented(self) -> None:
        rows = pl.concat([self.taken_in(data).clean for data in self.good])
        stated = rows.filter(pl.col("confidence").is_not_null())["label_id"].to_list()
        assert sorted(stated) == sorted(self.states_confidence)

    def test_an_unknown_category_is_refused_with_a_reason_and_not_guessed(self) -> None:
        outcome = self.taken_in(self.unknown_category)
        assert outcome.refused.height
        assert all("categor" in reason or "policy" in reason for reason in outcome.refused["reason"])
        assert set(outcome.clean["policy"]) <= {*self.adapter.categories.values(), "any"}

    def test_a_file_that_cannot_be_read_says_so_and_quotes_nothing(self) -> None:
        for data in self.unreadable:
            with pytest.raises(InvalidInput) as refused:
                vendors.read(data, self.filename)
            excerpt = data[:12].decode("utf-8", "replace")
            assert not excerpt.strip() or excerpt not in str(refused.value)

    def test_the_adapter_keeps_to_the_columns_of_labels(self) -> None:
        for data in self.good:
            names = set(self.adapter.parse(data, self.filename).columns)
            assert names - {loose.ROW, loose.PROBLEM, loose.RAW} <= set(LABELS.names)

    def test_its_sample_hour_is_a_real_one(self) -> None:
        assert self.hour.tzinfo is UTC
