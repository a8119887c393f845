"""The suites hold on clean tables, name what is wrong with bad ones, and never take a crash for a failure."""

from __future__ import annotations

import math
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pyarrow as pa
import pytest

from assets import expectations
from assets.environment import Environment
from assets.expectations import SUITES, ExpectationCrashed, Facts, docs, validate
from assets.features import features as features_asset
from assets.features import read_features
from redqueen import campaigns, graph, ingest, ties, trainingset
from redqueen import features as declared
from redqueen.errors import InvalidInput
from redqueen.review import review_requests
from redqueen.schema import TABLES
from redqueen.store import DirectoryStore, ObjectStore, to_parquet
from redqueen.tables import hour_key, write_part
from tests.test_ingest import HOUR, NOW, event, frame, label

POLICIES = ("spam", "scam")
PARTITION = f"{HOUR:%Y-%m-%d-%H:%M}"


def clean_events(n: int = 200, **changes: Any) -> pl.DataFrame:
    return ingest.conform(frame(*(event(i, **changes) for i in range(n))), "events", HOUR, NOW).clean


def clean_labels(n: int = 50) -> pl.DataFrame:
    return ingest.conform(frame(*(label(i) for i in range(n))), "labels", HOUR, NOW).clean


def served(n: int = 60) -> pl.DataFrame:
    rows = [
        {
            "event_id": f"e{i}",
            "actor_id": f"secret-actor-{i}",
            "ts": HOUR,
            "model_id": "m1",
            "arm": "champion",
            "stage": "live",
            "scores": [("spam", 0.5), ("scam", 0.1)],
            "action": "allow",
            "features": [0.0] * len(declared.NAMES),
            "features_version": declared.FEATURES_VERSION,
            "latency_us": 900,
            "propensity": 0.12,
            "degraded": False,
            "obfuscation": 0.0,
            "fingerprint": i,
            "threshold_ratio": 0.7,
        }
        for i in range(n)
    ]
    table = pl.from_arrow(pa.Table.from_pylist(rows, schema=TABLES["predictions"]))
    assert isinstance(table, pl.DataFrame)
    return table


def gold(n: int = 60) -> pl.DataFrame:
    rows = {
        "event_id": [f"e{i}" for i in range(n)],
        "policy": ["spam"] * n,
        "p_abuse": [float(i % 2) for i in range(n)],
        "n_votes": [1] * n,
        "disagreement": [0.0] * n,
        "mature": [True] * n,
        "first_labeled_at": [HOUR] * n,
        "sources": [["moderator"]] * n,
    }
    return _table("gold", rows)


def guard(n: int = 60) -> pl.DataFrame:
    rows = {
        "label_id": [f"l{i}" for i in range(n)],
        "received_at": [HOUR] * n,
        "weight": [0.0] * n,
        "released_weight": [1.0] * n,
        "held": [True] * n,
        "reason": ["ring"] * n,
        "group": ["g1"] * n,
        "members": [None] * n,
    }
    return _table("guard", rows)


def _table(name: str, rows: dict[str, list[Any]]) -> pl.DataFrame:
    made = pl.from_arrow(pa.table(rows, schema=TABLES[name]))
    assert isinstance(made, pl.DataFrame)
    return made


def training(n: int = 60) -> pl.DataFrame:
    rows = clean_events(n)
    return trainingset.build(
        gold(n), rows, declared.featurise(rows), pl.DataFrame(),
        policies=POLICIES, feature_names=declared.NAMES, max_rows=1000,
    ).rows  # fmt: skip


def review(n: int = 200) -> pl.DataFrame:
    return review_requests(clean_events(n), None, salt="s", audit_rate=0.5, budget=n, severe=())


def grouped(n: int = 12) -> pl.DataFrame:
    said = [f"win free nitro today at gift-{i % 3}.example friends" for i in range(n)]
    rows = clean_events(n).with_columns(text=pl.Series(said))
    return campaigns.group(rows.select(*campaigns.MESSAGES)).rows


def snapshot(n: int = 60) -> pl.DataFrame:
    """The rows of a snapshot of messages, half of them with a link."""
    rows = clean_events(n).with_columns(
        recipient_id=pl.lit("someone"), response=pl.lit("reply"), response_ts=pl.col("received_at")
    )
    linked = pl.Series("hosts", [["a.example"] if i % 2 else [] for i in range(n)])
    with tempfile.TemporaryDirectory() as folder:
        store = DirectoryStore(Path(folder))
        marker = graph.write(store, (HOUR + timedelta(days=1)).date(), ties.ties(rows, linked))
        return graph.rows_of(store, marker)


@pytest.fixture(scope="module")
def tables() -> dict[str, tuple[pl.DataFrame, Facts]]:
    """A clean table of each suite, and what the suite is told."""
    rows = clean_events()
    facts = Facts(POLICIES, rows=rows.height)
    return {
        "events": (rows, facts),
        "labels": (clean_labels(), facts),
        "features": (declared.featurise(rows), facts),
        "served": (served(), facts),
        "review": (review(), facts),
        "gold": (gold(), facts),
        "guard": (guard(), facts),
        "campaigns": (grouped(), facts),
        "graph": (snapshot(), facts),
        "training_set": (training(), facts),
    }


def broken(result: expectations.SuiteResult) -> set[tuple[str, str | None]]:
    return {(row.name, row.column) for row in result.failed}


def test_importing_the_module_loads_no_great_expectations() -> None:
    code = "import sys, assets.expectations; print('great_expectations' in sys.modules)"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout.strip() == "False"


def test_every_table_has_a_suite_that_its_clean_rows_pass(tables: dict[str, Any]) -> None:
    assert set(tables) == set(SUITES)
    for name, (rows, facts) in tables.items():
        result = validate(rows, name, facts)
        assert (name, result.passed, result.failed) == (name, True, ())
        assert result.checked == rows.height
        assert expectations.metadata(result.rows)["verdict"].startswith("all")


@pytest.mark.parametrize("name", SUITES)
def test_no_table_that_lacks_a_column_passes(name: str, tables: dict[str, Any]) -> None:
    rows, facts = tables[name]
    columns = rows.columns
    if name in ("features", "training_set"):
        # One of each kind: a hundred validations would show the same.
        of_feature = [c for c in columns if c.removeprefix("f_") in declared.NAMES]
        columns = [c for c in columns if c not in of_feature] + of_feature[:1] + of_feature[-1:]
    for column in columns:
        try:
            passed = validate(rows.drop(column), name, facts).passed
        except ExpectationCrashed:
            passed = False
        assert not passed, f"{name} without {column}"


def test_every_rule_says_what_it_means_and_shows_no_value() -> None:
    for suite in SUITES.values():
        rules = suite.rules(Facts(POLICIES))
        assert all(rule.meaning for rule in rules)
        assert {rule.severity for rule in rules} <= {"error", "warn"}
        # Their observed value is a value of the data.
        assert not [rule for rule in rules if {"Min", "Max", "Mean", "Mode", "Sum"} & set(_words(rule.kind))]


def _words(kind: str) -> list[str]:
    return "".join(f" {c}" if c.isupper() else c for c in kind).split()


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


def test_impossible_campaigns_and_broken_graph_numbers_fail(tables: dict[str, Any]) -> None:
    rows, facts = tables["campaigns"]
    assert rows.height == 12
    crowd = validate(rows.with_columns(actors=pl.col("size") + 1), "campaigns", facts)
    assert [(row.column, row.about) for row in crowd.failed] == [("crowd_impossible", ("actors",))]
    twice = validate(pl.concat([rows, rows.head(1)]), "campaigns", facts)
    assert broken(twice) == {("column_values_to_be_in_set", "copies")}
    rows, facts = tables["graph"]
    assert set(rows["of"]) == set(graph.NUMBERS)
    for column, value in (("trust", 1.5), ("reach_log", -1.0), ("domain_age_days_log", math.inf)):
        of_kind = pl.when(pl.col(column).is_not_null()).then(pl.lit(value, pl.Float32))
        found = validate(rows.with_columns(of_kind.alias(column)), "graph", facts)
        assert (found.passed, [row.about for row in found.failed]) == (False, [(column,)])
    absent = validate(rows.with_columns(popularity_log=pl.lit(math.nan, pl.Float32)), "graph", facts)
    assert [row.about for row in absent.failed] == [("popularity_log",)]
    assert not validate(pl.concat([rows, rows.tail(1)]), "graph", facts).passed
    nobody = validate(rows.clear(), "graph", facts)
    assert (nobody.passed, len(nobody.failed)) == (True, 1)


def test_an_empty_hour_and_missing_languages_warn_and_pass() -> None:
    for rows in (clean_events().clear(), clean_events(language=None)):
        result = validate(rows, "events")
        assert result.passed
        assert result.failed


def test_an_expectation_that_crashes_is_an_error_not_a_failure() -> None:
    with pytest.raises(ExpectationCrashed, match=r"columns that do not exist: kind"):
        validate(clean_events().drop("kind", "text"), "events")
    assert validate(clean_events(), "events").passed
    # A column of another type breaks the making of a derived one.
    with pytest.raises(ExpectationCrashed, match="text_length"):
        validate(clean_events().with_columns(text=pl.lit(7)), "events")


def test_there_is_no_such_suite_or_it_wants_to_be_told_more() -> None:
    with pytest.raises(InvalidInput, match="events, labels"):
        validate(clean_events(5), "weather")
    with pytest.raises(InvalidInput, match="how many rows"):
        validate(declared.featurise(clean_events(5)), "features")


def test_answers_out_of_their_ranges_are_named_by_column(tables: dict[str, Any]) -> None:
    rows, facts = tables["served"]
    bad = rows.with_columns(
        threshold_ratio=pl.lit(-1.0, pl.Float32),
        features=pl.col("features").list.head(3),
        arm=pl.lit("gambit"),
        actor_id=pl.lit(None, pl.String),
    )
    verdict = expectations.metadata(validate(bad, "served", facts).rows)["verdict"]
    assert "60 rows, 100.0%: threshold_ratio, features)" in verdict
    assert "arm is one of those known" in verdict
    assert ": actor_id)" in verdict
    twice = validate(pl.concat([rows, rows.head(1)]), "served", facts)
    assert [row.unexpected_count for row in twice.failed] == [2]


def test_requests_gold_and_training_rows_out_of_range_fail(tables: dict[str, Any]) -> None:
    for name, change in (
        ("review", {"reason": pl.lit("curiosity")}),
        ("review", {"inclusion": pl.lit(0.0)}),
        ("gold", {"p_abuse": pl.lit(1.5)}),
        ("gold", {"policy": pl.lit("treason")}),
        ("training_set", {"p_spam": pl.lit(float("nan"), pl.Float32)}),
        ("training_set", {"weight": pl.lit(0.0, pl.Float32)}),
        ("training_set", {f"f_{declared.NAMES[0]}": pl.lit(float("inf"), pl.Float32)}),
    ):
        rows, facts = tables[name]
        result = validate(rows.with_columns(**change), name, facts)
        assert len([row for row in result.failed if row.severity == "error"]) == 1, (name, change)
    rows, facts = tables["training_set"]
    assert not validate(pl.concat([rows, rows.head(3)]), "training_set", facts).passed


# -- a feature table as it took a large fleet down in November 2025: rows and columns that come twice --------


def _feature_tables() -> dict[str, pa.Table]:
    good = declared.featurise(clean_events(40)).to_arrow()
    last = good.column(good.num_columns - 1)
    return {
        "rows that come twice": pa.concat_tables([good, good.slice(0, 5)]),
        "a column that comes twice": good.append_column(declared.NAMES[-1], last),
        "an extra column": good.append_column("unheard_of", last),
        "a missing column": good.drop_columns([declared.NAMES[3]]),
    }


@pytest.mark.parametrize("wrong", list(_feature_tables()))
def test_a_broken_feature_file_never_reaches_training(wrong: str, tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put(f"{hour_key('features', HOUR)}part.parquet", to_parquet(_feature_tables()[wrong]))
    with pytest.raises(InvalidInput, match="materialize the asset `features`") as refused:
        read_features(store, HOUR, NOW)
    assert "e1" not in str(refused.value).split()


@pytest.mark.parametrize("wrong", ["rows that come twice", "an extra column", "a missing column"])
def test_a_broken_feature_table_fails_its_suite(wrong: str) -> None:
    table = pl.from_arrow(_feature_tables()[wrong])
    assert isinstance(table, pl.DataFrame)
    try:
        result = validate(table, "features", Facts(rows=40))
    except ExpectationCrashed:
        return
    assert not result.passed


def test_what_was_written_well_is_read_whole(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    good = declared.featurise(clean_events(40))
    write_part(store, "features", HOUR, good)
    assert read_features(store, HOUR, NOW).equals(good)
    assert read_features(store, NOW, NOW + timedelta(hours=3)).is_empty()


def test_features_out_of_range_absent_or_unknown_are_told_apart(tables: dict[str, Any]) -> None:
    rows, facts = tables["features"]
    share = next(name for name in declared.NAMES if "_share" in name and name.startswith("text_"))
    of_actor = [feature.name for feature in declared.FEATURES if feature.needs_actor]
    stamped = rows.with_columns(features_version=pl.lit(declared.FEATURES_VERSION))
    assert validate(stamped, "features", facts).failed == ()
    bad = rows.with_columns(pl.lit(1.5, pl.Float32).alias(share))
    assert [row.about for row in validate(bad, "features", facts).failed] == [(share,)]
    absent = rows.with_columns(pl.lit(float("nan"), pl.Float32).alias(share))
    assert [row.column for row in validate(absent, "features", facts).failed] == ["features_absent"]
    unknown = rows.with_columns(pl.lit(float("nan"), pl.Float32).alias(name) for name in of_actor)
    assert [row.severity for row in validate(unknown, "features", facts).failed] == ["warn"]
    assert not validate(unknown, "features", Facts(behaviour=False, rows=rows.height)).failed


# -- in Dagster ----------------------------------------------------------------------------------------------


def _materialize(env: Environment, config: dict[str, Any] | None = None) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [features_asset],
        partition_key=PARTITION,
        resources={"env": env},
        run_config={"ops": {"features": {"config": config or {}}}},
        raise_on_error=False,
    )


def test_the_features_of_an_hour_are_checked_and_documented_on_request(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path))
    write_part(env.store, "ingested/events", HOUR, clean_events(30))
    result = _materialize(env)
    assert {e.check_name: e.passed for e in result.get_asset_check_evaluations()}.items() >= {
        "features_expectations": True,
        "features_quality": True,
    }.items()
    assert not env.store.list("reports/data_docs")
    result = _materialize(env, {"data_docs": True})
    url = result.asset_materializations_for_node("features")[0].metadata["data_docs"].value
    assert url == f"{env.settings.reports_url}/data_docs/features/hour=2026-01-03T14/index.html"
    assert env.store.exists("reports/data_docs/features/hour=2026-01-03T14/index.html")


def _pages(store: ObjectStore) -> str:
    keys = [key for key in store.list("reports/data_docs/") if key.endswith(".html")]
    return "".join(store.get(key).data.decode() for key in keys)


def test_data_docs_hold_verdicts_and_no_values(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path))
    rows = clean_events(30, text="meet me at the SECRETPLACE", actor_id="secret-actor")
    bad = rows.with_columns(kind=pl.lit("SECRETKIND"), event_id=pl.lit("secret-event"), language=pl.lit("q1"))
    write_part(env.store, "ingested/events", HOUR, bad)
    write_part(env.store, "served", HOUR, pl.concat([served(), served()]))
    for table in ("events", "served"):
        subject = docs.find(env, table)
        assert (subject.rows.height, subject.label) == ({"events": 30, "served": 120}[table], "2026-01-03T14")
        docs.publish(env, subject)
    pages = _pages(env.store)
    assert "an event appears once" in pages
    assert "a row is named once by" in pages
    for value in ("SECRETPLACE", "secret-actor", "SECRETKIND", "secret-event", "2026-01-03 14:00:01"):
        assert value not in pages


def test_documents_are_asked_for_by_name(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path))
    with pytest.raises(InvalidInput, match="there is no expectation suite 'weather'"):
        docs.find(env, "weather")
    with pytest.raises(InvalidInput, match="no rows of events in any hour"):
        docs.find(env, "events")
    with pytest.raises(InvalidInput, match="no rows of events in 2026-01-03T14"):
        docs.find(env, "events", hour=HOUR)
    with pytest.raises(InvalidInput, match="there is no gold of candidate"):
        docs.find(env, "gold")
    write_part(env.store, "ingested/events", HOUR, clean_events(30))
    write_part(env.store, "features", HOUR, declared.featurise(clean_events(30)))
    with pytest.raises(InvalidInput, match="no graph snapshot of 2026-01-03"):
        docs.find(env, "graph", hour=HOUR)
    write_part(env.store, "ingested/events", HOUR - timedelta(days=1), clean_events(30))
    graph.build(env.store, HOUR.date())
    assert docs.find(env, "graph", hour=HOUR).label == "2026-01-03"
    subject = docs.find(env, "features", hour=HOUR)
    assert subject.facts.rows == 30
    page = docs.write(subject, tmp_path / "out")
    assert page.read_text().count("features")
    assert validate(subject.rows, "features", subject.facts).passed


def test_the_second_validation_of_2500_rows_is_quick() -> None:
    rows = clean_events(2500)
    validate(rows, "events")
    start = time.perf_counter()
    validate(rows, "events")
    assert time.perf_counter() - start < 1.0  # some 0.1 s on a quiet core
