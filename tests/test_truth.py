"""Truth as kept between days: an increment is as good as a refit, and nothing knows the future."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.environment import Environment
from assets.labels import gold_key, gold_labels, truth_state
from redqueen import truth
from redqueen.aggregation import TRUSTED, Fusion
from redqueen.clock import StoreClock
from redqueen.labels import gold, ripe
from redqueen.schema import LABEL_SOURCES, polars_schema
from redqueen.store import DirectoryStore
from redqueen.tables import write_part
from redqueen.truth import TruthState

T0 = datetime(2026, 1, 3, tzinfo=UTC)
HOUR = timedelta(hours=1)
POLICIES = ("spam", "scam")
EAGER = Fusion(min_overlap=1)
STIFF = Fusion(min_overlap=10**9)
SCHEMA = polars_schema("labels")


def random_labels(n: int, hours: int, seed: int = 1, right: float = 0.5) -> pl.DataFrame:
    """Labels of which the share `right` is right: by default noise, where verdicts are on edge."""
    rng = np.random.default_rng(seed)
    event = rng.integers(0, n // 3 + 1, n)
    benign = (event % 2 == 0) == (rng.random(n) < right)
    at = [T0 + timedelta(seconds=int(s)) for s in rng.integers(0, hours * 3600, n)]
    return pl.DataFrame(
        {
            "label_id": [f"l{i}" for i in rng.permutation(n)],
            "event_id": [f"e{i}" for i in event],
            "policy": np.where(benign, "any", np.array(POLICIES)[event % 3 % 2]),
            "value": np.where(benign, "benign", "abuse"),
            "source": rng.choice(LABEL_SOURCES, n),
            "rater_id": [f"r{i}" for i in rng.integers(0, 8, n)],
            "labeled_at": at,
            "received_at": at,
            "confidence": [None] * n,
        },
        schema_overrides=SCHEMA,
    )


def land(store: DirectoryStore, labels: pl.DataFrame, until: datetime | None = None) -> None:
    for (hour,), rows in labels.group_by(pl.col("received_at").dt.truncate("1h")):
        if until is None or hour < until:
            write_part(store, "ingested/labels", hour, rows)


def as_gold(state: TruthState, at: datetime) -> pl.DataFrame:
    return ripe(state.items(), at, 4.0)


HELD: dict[str, Any] = {"label_id": pl.String, "weight": pl.Float64}


@st.composite
def lives(draw: st.DrawFn) -> tuple[pl.DataFrame, list[datetime], list[pl.DataFrame]]:
    """Labels, hours at which the state is brought up to date, and what the guard holds at each."""
    labels = random_labels(draw(st.integers(1, 25)), 6, draw(st.integers(0, 10_000)))
    # Some labels are sent again later with other content.
    again = labels.head(draw(st.integers(0, 3))).with_columns(
        pl.col("received_at") + HOUR * draw(st.integers(0, 4)), value=pl.lit("unsure")
    )
    labels = pl.concat([labels, again])
    hours = sorted(draw(st.sets(st.integers(1, 9), min_size=2, max_size=4)))
    ids = st.sampled_from(sorted(labels["label_id"].unique()))
    held = draw(
        st.lists(
            st.dictionaries(ids, st.sampled_from([0.0, 0.5, 1.0]), max_size=4),
            min_size=len(hours),
            max_size=len(hours),
        )
    )
    frames = [
        pl.DataFrame({"label_id": list(h), "weight": list(h.values())}, schema_overrides=HELD) for h in held
    ]
    return labels, [T0 + HOUR * h for h in hours], frames


@settings(max_examples=30, deadline=None)
@given(lives())
def test_increments_give_what_a_refit_gives_while_nothing_is_learnt(
    life: tuple[pl.DataFrame, list[datetime], list[pl.DataFrame]],
) -> None:
    labels, hours, held = life
    state = TruthState.fit(labels, hours[0], POLICIES, STIFF, held[0])
    for at, weights in zip(hours[1:], held[1:], strict=True):
        state = state.update(labels.filter(pl.col("received_at") >= state.as_of), at, weights)
        exact = TruthState.fit(labels, at, POLICIES, STIFF, weights)
        assert state.items().equals(exact.items())
        assert dict(state.learnt.shared) | dict(exact.learnt.shared) == dict(state.learnt.shared)
        assert as_gold(state, at).equals(
            gold(labels, at, POLICIES, maturity_hours=4.0, fusion=STIFF, weights=weights)
        )
        ours, theirs = (
            s.learnt.records.filter(pl.sum_horizontal(pl.selectors.float()) > 1e-9).sort(pl.all())
            for s in (state, exact)
        )
        assert ours.select(pl.selectors.string()).equals(theirs.select(pl.selectors.string()))
        assert np.allclose(*(x.select(pl.selectors.float()).to_numpy() for x in (ours, theirs)), atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(lives(), st.integers(0, 1000))
def test_nothing_received_later_enters_a_state_or_gold_made_from_it(
    tmp_path_factory: pytest.TempPathFactory,
    life: tuple[pl.DataFrame, list[datetime], list[pl.DataFrame]],
    seed: int,
) -> None:
    """Any future, and any states saved in it, give the same gold as of an instant of the past."""
    labels, hours, _ = life
    at = hours[0] + timedelta(minutes=25)
    other = random_labels(30, 8, seed).with_columns(pl.col("received_at") + (at - T0) + timedelta(minutes=1))
    past = labels.filter(pl.col("received_at") <= at)
    known = []
    for future in (labels, pl.concat([past, other.with_columns(pl.col("label_id") + "x")])):
        store = DirectoryStore(tmp_path_factory.mktemp("store"))
        land(store, future)
        base = None
        for hour in (T0 + HOUR, *hours):
            state, base = truth.known_at(store, hour, POLICIES, EAGER)
            if base is None or base.as_of < hour:
                truth.save(store, state, base)
        known.append(truth.known_at(store, at, POLICIES, EAGER)[0])
    first, second = known
    assert as_gold(first, at).equals(as_gold(second, at))
    assert first.learnt.records.equals(second.learnt.records)
    assert (first.rows()["received_at"] <= at).all()


def test_a_day_of_news_changes_few_verdicts_against_a_refit() -> None:
    labels = random_labels(20_000, 720, right=0.9)
    before, end = T0 + HOUR * 696, T0 + HOUR * 720
    base = TruthState.fit(labels, before, POLICIES)
    grown = base.update(labels.filter(pl.col("received_at") > before), end)
    exact = TruthState.fit(labels, end, POLICIES)
    ours, theirs = grown.items(), exact.items()
    assert ours.drop("p_abuse", "disagreement").equals(theirs.drop("p_abuse", "disagreement"))
    assert ((ours["p_abuse"] >= 0.5) != (theirs["p_abuse"] >= 0.5)).mean() <= 0.005


def test_what_is_kept_is_read_back_whole(tmp_path: Path) -> None:
    labels, store = random_labels(600, 48), DirectoryStore(tmp_path)
    state = truth.save(store, TruthState.fit(labels, T0 + HOUR * 12, POLICIES))
    for hours in (24, 36, 48):
        news = labels.filter(pl.col("received_at") > state.as_of)
        state = truth.save(store, state.update(news, T0 + HOUR * hours), state)
    found = truth.saved(store, T0 + HOUR * 50, POLICIES)
    assert found is not None
    assert found.as_of == state.as_of
    assert found.items().equals(state.items())
    assert found.learnt.records.equals(state.learnt.records)
    assert found.learnt.shared == state.learnt.shared
    again = found.update(labels, T0 + HOUR * 60)
    assert again.items().equals(found.items())
    errors = store.get_json(f"{state.prefix}state.json")["source_errors"]
    assert {row["source"] for row in errors} == set(LABEL_SOURCES)


def test_an_increment_is_kept_only_over_what_is_kept(tmp_path: Path) -> None:
    labels, store = random_labels(60, 5), DirectoryStore(tmp_path)
    loose = TruthState.fit(labels, T0 + HOUR, POLICIES)
    grown = loose.update(labels, T0 + HOUR * 2)
    kept = truth.save(store, loose)
    for state, base in ((grown, loose), (grown.update(labels, T0 + HOUR * 3), kept)):
        with pytest.raises(ValueError, match="save that first"):
            truth.save(store, state, base)
    assert truth.save(store, grown, kept).prefix is not None


def test_a_state_under_other_policies_or_constants_is_not_this_one(tmp_path: Path) -> None:
    labels, store = random_labels(60, 5), DirectoryStore(tmp_path)
    truth.save(store, TruthState.fit(labels, T0 + HOUR * 6, POLICIES))
    assert truth.saved(store, T0 + HOUR * 9, POLICIES) is not None
    assert truth.saved(store, T0 + HOUR * 5, POLICIES) is None
    assert truth.saved(store, T0 + HOUR * 9, ("spam",)) is None
    assert truth.saved(store, T0 + HOUR * 9, POLICIES, Fusion(prior_votes=1.0)) is None


class Dying(DirectoryStore):
    """A store whose process is killed after some writes."""

    def __init__(self, root: Path, writes: int) -> None:
        super().__init__(root)
        self.left = writes

    def put(self, key: str, data: bytes) -> str:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return super().put(key, data)


@pytest.mark.parametrize("writes", range(4))
def test_killed_half_way_and_run_again_gives_the_same(tmp_path: Path, writes: int) -> None:
    labels = random_labels(300, 24)
    whole, torn = DirectoryStore(tmp_path / "whole"), DirectoryStore(tmp_path / "torn")
    states = []
    for store in (whole, torn):
        base = truth.save(store, TruthState.fit(labels, T0 + HOUR * 12, POLICIES))
        grown = base.update(labels, T0 + HOUR * 24)
        if store is torn:
            with pytest.raises(KeyboardInterrupt):
                truth.save(Dying(tmp_path / "torn", writes), grown, base)
            half = truth.saved(store, T0 + HOUR * 24, POLICIES)
            assert half is not None
            assert half.as_of == base.as_of
        truth.save(store, grown, base)
        states.append(truth.saved(store, T0 + HOUR * 24, POLICIES))
    assert [whole.get(k).data for k in whole.list("truth/")] == [
        torn.get(k).data for k in torn.list("truth/")
    ]
    assert states[0] is not None
    assert states[1] is not None
    assert states[0].items().equals(states[1].items())


def test_an_hour_written_again_voids_what_was_learnt_from_it(tmp_path: Path) -> None:
    labels, store = random_labels(300, 30), DirectoryStore(tmp_path)
    land(store, labels)
    for hours in (10, 20, 30):
        state, base = truth.known_at(store, T0 + HOUR * hours, POLICIES, refit=True)
        truth.save(store, state, base)
    assert truth.forget(store, T0 + HOUR * 20) == 1
    found = truth.saved(store, T0 + HOUR * 40, POLICIES)
    assert found is not None
    assert found.as_of == T0 + HOUR * 20
    assert truth.forget(store) == 2
    assert store.list("truth/") == []


def test_old_generations_go_with_their_increments(tmp_path: Path) -> None:
    labels, store = random_labels(300, 60), DirectoryStore(tmp_path)
    base = None
    for n, hours in enumerate(range(10, 70, 10)):
        state = TruthState.fit(labels, T0 + HOUR * hours, POLICIES) if n % 2 == 0 or base is None else None
        if state is not None:
            base = truth.save(store, state)
        else:
            assert base is not None
            truth.save(store, base.update(labels, T0 + HOUR * hours), base)
    assert truth.prune(store) == 2
    left = {key.split("/")[1] for key in store.list("truth/")}
    assert left == {f"asof={T0 + HOUR * h:%Y-%m-%dT%H}" for h in (30, 40, 50, 60)}
    assert truth.prune(store) == 0


def test_without_a_saved_state_or_with_too_much_news_it_is_fitted(tmp_path: Path) -> None:
    labels, store = random_labels(400, 40), DirectoryStore(tmp_path)
    land(store, labels)
    at = T0 + HOUR * 40
    exact = TruthState.fit(labels, at, POLICIES)
    fitted, base = truth.known_at(store, at, POLICIES)
    assert base is None
    assert fitted.items().equals(exact.items())
    truth.save(store, TruthState.fit(labels, T0 + HOUR * 20, POLICIES))
    assert truth.known_at(store, at, POLICIES)[1] is None
    truth.save(store, TruthState.fit(labels, T0 + HOUR * 39, POLICIES))
    grown, base = truth.known_at(store, at, POLICIES)
    assert base is not None
    assert grown.rows().height == exact.rows().height


def test_no_labels_at_all_are_no_trouble(tmp_path: Path) -> None:
    state, base = truth.known_at(DirectoryStore(tmp_path), T0, POLICIES)
    assert (base, state.items().height, state.rows().height) == (None, 0, 0)
    assert state.update(random_labels(9, 1), T0 + HOUR * 2).items().height > 0


# -- in Dagster ----------------------------------------------------------------------------------------------


class House:
    """A home with labels and events of two days, its clock after them, and a Dagster instance."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RQ_POLICIES", "spam,scam")
        monkeypatch.setenv("RQ_SEVERE_POLICIES", "")
        monkeypatch.setenv("RQ_MATURITY_BY_POLICY", "scam=1000")
        self.env = Environment(home=str(home))
        self.labels = random_labels(900, 48, right=0.9)
        for hour in range(48):
            at = T0 + HOUR * hour
            rows = self.labels.filter(pl.col("received_at").dt.truncate("1h") == at)
            write_part(self.env.store, "ingested/labels", at, rows)
            events = rows.select("event_id", ts=pl.col("received_at") - timedelta(minutes=30))
            write_part(self.env.store, "ingested/events", at, events.unique("event_id"))
        (home / "dagster").mkdir()
        self.instance = dg.DagsterInstance.local_temp(str(home / "dagster"))

    def run(
        self, asset: dg.AssetsDefinition, hours: float, partition: str | None = None, **config: Any
    ) -> Any:
        """Materialize at an hour of the simulated clock; the metadata."""
        StoreClock(self.env.store).set(T0 + HOUR * hours)
        if partition:
            self.instance.add_dynamic_partitions("candidates", [partition])
        result = dg.materialize(
            [asset],
            instance=self.instance,
            partition_key=partition,
            resources={"env": self.env},
            run_config={"ops": {asset.op.name: {"config": config}}} if config else None,
        )
        (event,) = result.get_asset_materialization_events()
        shown = event.materialization.metadata.items()
        return {name: value.records if hasattr(value, "records") else value.value for name, value in shown}

    def gold(self, candidate: str) -> pl.DataFrame:
        return pl.from_arrow(self.env.store.read_table(gold_key(candidate)))  # type: ignore[return-value]


def test_a_lap_starts_from_the_state_and_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path / "home", monkeypatch)
    alone = house.run(gold_labels, 47.5, "a")
    assert alone["how"] == "fitted from all labels"
    assert house.run(truth_state, 44)["how"] == "fitted from all labels"
    assert house.run(truth_state, 45)["how"].startswith("the news since 2026-01-04 20:00")
    assert house.run(truth_state, 45.5)["dagster/row_count"] > 0
    assert len(house.env.store.list("truth/")) == 8
    grown = house.run(gold_labels, 47.5, "b")
    assert grown["how"].startswith("the news since 2026-01-04 21:00")
    one, other = house.gold("a"), house.gold("b")
    assert one.drop("p_abuse", "disagreement").equals(other.drop("p_abuse", "disagreement"))
    assert ((one["p_abuse"] >= 0.5) != (other["p_abuse"] >= 0.5)).mean() < 0.01
    assert house.run(truth_state, 46, refit=True)["how"] == "fitted from all labels"


def test_a_lap_shows_who_errs_and_how_late_labels_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = House(tmp_path / "home", monkeypatch)
    shown = house.run(gold_labels, 47.5, "a")
    errors = {(row.data["policy"], row.data["source"]) for row in shown["source_errors"]}
    assert ("spam", "vendor") in errors
    delays = {row.data["policy"]: row.data for row in shown["delays"]}
    assert (delays["spam"]["matures_after"], delays["scam"]["matures_after"]) == (4.0, 1000.0)
    assert delays["spam"]["arrival_p90"] == 0.0
    assert delays["spam"]["judged_median"] >= 0.5
    gold = house.gold("a")
    mature = gold.filter(pl.col("mature")).explode("sources")
    trusted = mature.filter(pl.col("sources").is_in(TRUSTED)).select("event_id", "policy").unique()
    untrusted = mature.join(trusted, on=["event_id", "policy"], how="anti")
    assert set(untrusted["policy"]) == {"spam"}
