"""Training sets: one as-of, one set of rows; thinning forgets no campaign; hard examples teach."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from assets.environment import Environment
from assets.labels import gold_key
from assets.partitions import candidates
from assets.training import inputs_key, training_set, training_set_key
from redqueen import features as declared
from redqueen import labels, state, trainingset
from redqueen.store import DirectoryStore, to_parquet
from redqueen.tables import write_part
from tests.test_expectations import clean_events

T0 = datetime(2026, 1, 3, tzinfo=UTC)
POLICIES = ("spam", "scam")
NAMES = ("rate",)
N = 120


def events(n: int = N) -> pl.DataFrame:
    rows = [
        {"event_id": f"e{i:03}", "ts": T0 + timedelta(minutes=i), "text": f"message {i * 7919} of {i}"}
        for i in range(n)
    ]
    return pl.DataFrame(rows)


def gold(n: int = N) -> pl.DataFrame:
    """Every fourth event is abusive, by turns spam and scam; the last ten are not mature."""
    rows = [
        {
            "event_id": f"e{i:03}",
            "policy": policy,
            "p_abuse": 0.95 if i % 4 == 0 and policy == POLICIES[i // 4 % 2] else 0.02,
            "mature": i < n - 10,
        }
        for i in range(n)
        for policy in POLICIES
    ]
    return pl.DataFrame(rows)


def features(n: int = N) -> pl.DataFrame:
    frame = pl.DataFrame({"event_id": [f"e{i:03}" for i in range(n)], "rate": [float(i) for i in range(n)]})
    return frame.with_columns(pl.col("rate").cast(pl.Float32))


def hard(*pairs: tuple[str, str]) -> pl.DataFrame:
    return pl.DataFrame(list(pairs), schema={"event_id": pl.String, "text": pl.String}, orient="row")


def build(**over: Any) -> trainingset.TrainingSet:
    tables = {"gold": gold(), "events": events(), "features": features(), "hard_examples": hard()}
    given = {"policies": POLICIES, "feature_names": NAMES, "max_rows": 10_000}
    return trainingset.build(**(tables | given | over))


def test_a_row_has_a_target_for_each_policy_a_weight_a_group_and_its_features() -> None:
    rows = build().rows
    assert rows.height == N
    assert rows.columns == trainingset.columns(POLICIES, NAMES)
    first = rows.row(0, named=True)
    assert (first["p_spam"], first["p_scam"]) == (pytest.approx(0.95), pytest.approx(0.02))
    assert rows["weight"].to_list() == [1.0] * (N - 10) + [trainingset.IMMATURE_WEIGHT] * 10
    assert rows["ts"].is_sorted()


def test_the_order_in_which_tables_are_read_changes_nothing() -> None:
    shuffled = {
        name: frame.sample(fraction=1.0, shuffle=True, seed=3)
        for name, frame in (("gold", gold()), ("events", events()), ("features", features()))
    }
    assert build(**shuffled).digest == build().digest
    assert build(**shuffled, max_rows=60).digest == build(max_rows=60).digest


def test_the_digest_is_the_same_in_another_process_and_another_for_other_rows() -> None:
    rows = "pl.DataFrame({'event_id': ['a', 'b'], 'x': [1.5, None]})"
    code = f"import polars as pl; from redqueen.trainingset import digest; print(digest({rows}))"
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = pl.DataFrame({"event_id": ["a", "b"], "x": [1.5, None]})
    assert there.stdout.strip() == trainingset.digest(here)
    assert trainingset.digest(here.reverse()) != trainingset.digest(here)


def test_what_reached_us_after_the_instant_changes_nothing() -> None:
    def vote(i: int, at: datetime, value: str) -> dict[str, Any]:
        policy = "spam" if value == "abuse" else "any"
        return {
            "label_id": f"l{i}-{value}", "event_id": f"e{i:03}", "policy": policy, "value": value,
            "source": "moderator", "rater_id": f"r{i % 3}", "labeled_at": T0, "received_at": at,
            "confidence": None,
        }  # fmt: skip

    as_of = T0 + timedelta(hours=6)
    known = [vote(i, T0 + timedelta(hours=1), "abuse" if i % 4 == 0 else "benign") for i in range(40)]
    # Backdated: judged long before the instant, but known only after it.
    later = [vote(i, as_of + timedelta(seconds=1), "abuse") for i in range(1, 40, 4)]
    overrides = {"confidence": pl.Float64}
    digests = {
        build(gold=labels.gold(pl.DataFrame(rows, schema_overrides=overrides), as_of, POLICIES)).digest
        for rows in (known, known + later, later + known)
    }
    assert len(digests) == 1


@pytest.mark.parametrize("max_rows", [60, N - 1])
def test_thinning_keeps_all_abuse_up_to_half_and_picks_the_same_benign_rows_again(max_rows: int) -> None:
    whole, thin = build(), build(max_rows=max_rows)
    assert thin.n_abuse == whole.n_abuse
    assert thin.rows.height == max_rows
    assert thin.thinned == whole.rows.height - thin.rows.height
    assert thin.digest == build(max_rows=max_rows).digest


ABUSE = pl.max_horizontal("p_spam", "p_scam") >= 0.5


@st.composite
def histories(draw: st.DrawFn) -> tuple[dict[str, pl.DataFrame], int]:
    """Some hundred messages over some days, of campaigns of any size, and how many may stay."""
    days = draw(st.lists(st.tuples(st.integers(0, 20), st.integers(1, 40)), min_size=1, max_size=6))
    campaigns = draw(st.lists(st.integers(1, 40), max_size=5))
    rows = [
        (T0 + timedelta(days=day, minutes=i), f"hello {i} of day {day}", 0.02)
        for day, n in days
        for i in range(n)
    ]
    for c, n in enumerate(campaigns):
        said = f"free gift number {chr(97 + c) * 9} for everybody who joins our server today"
        rows += [(T0 + timedelta(days=c, seconds=i), f"{said} {i}", 0.9) for i in range(n)]
    frame = pl.DataFrame(rows, schema=["ts", "text", "p_abuse"], orient="row").with_row_index("i")
    ids = frame.select(pl.format("e{}", "i").alias("event_id"))["event_id"]
    tables = {
        "events": frame.select("ts", "text").with_columns(ids),
        "gold": frame.select(ids, "p_abuse", policy=pl.lit("spam"), mature=pl.lit(True)),
        "features": frame.select(ids, rate=pl.lit(1.0, pl.Float32)),
    }
    return tables, draw(st.integers(4, 150))


@settings(max_examples=40, deadline=None)
@given(history=histories())
def test_thinning_forgets_neither_old_campaigns_nor_what_is_normal_now(
    history: tuple[dict[str, pl.DataFrame], int],
) -> None:
    tables, most = history
    whole, thin = build(**tables), build(**tables, max_rows=most)
    assert thin.rows.height == min(most, whole.rows.height)
    assert (thin.thinned, thin.thinned_abuse) == (
        whole.n_benign - thin.n_benign, whole.n_abuse["spam"] - thin.n_abuse["spam"],
    )  # fmt: skip
    # Abuse gives way only beyond half, and then the largest campaigns do.
    room = max(most // 2, most - whole.n_benign)
    assert thin.n_abuse["spam"] == min(whole.n_abuse["spam"], room)
    before, after = (dict(t.rows.filter(ABUSE)["group"].value_counts().iter_rows()) for t in (whole, thin))
    if len(before) <= room:
        assert after.keys() == before.keys()
    largest = max(after.values(), default=0)
    assert all(n == before[name] or n >= largest - 1 for name, n in after.items())
    # The newest benign rows are all there.
    benign = whole.rows.filter(~ABUSE)
    fresh = -(-thin.n_benign // 4)
    assert set(benign.tail(fresh)["event_id"]) <= set(thin.rows["event_id"])
    # What was kept stands for what was not.
    for name, inclusion in thin.rows.filter(ABUSE).select("group", "inclusion").iter_rows():
        assert inclusion * before[name] == pytest.approx(after[name])
    assert thin.rows["inclusion"].is_between(0, 1, closed="right").all()


def test_one_loud_day_does_not_crowd_out_the_others() -> None:
    n, loud = 600, 6000
    ts = [T0 + timedelta(hours=i) for i in range(n)] + [
        T0 + timedelta(hours=300, seconds=i / 10) for i in range(loud)
    ]
    ids = [f"e{i:04}" for i in range(n + loud)]
    rows = pl.DataFrame(
        {"event_id": ids, "ts": ts, "text": [f"message {i * 7919} of {i}" for i in range(n + loud)]}
    )
    judged = pl.DataFrame({"event_id": ids}).with_columns(policy=pl.lit("spam"), p_abuse=0.02, mature=True)
    known = pl.DataFrame({"event_id": ids}).with_columns(rate=pl.lit(1.0, pl.Float32))
    kept = build(events=rows, gold=judged, features=known, max_rows=500).rows
    loudest = kept["ts"].is_between(T0 + timedelta(hours=300), T0 + timedelta(hours=301)).sum()
    assert loudest < 0.1 * kept.height
    assert (1 / kept["inclusion"]).sum() == pytest.approx(n + loud, rel=1e-4)


def test_what_results_are_sliced_by_comes_with_the_rows_where_it_is_known() -> None:
    told = events(3).with_columns(
        language=pl.Series(["de", "und", None]),
        account_created_at=pl.Series([T0 - timedelta(days=3), None, T0], dtype=pl.Datetime("us", "UTC")),
        community_size=pl.Series([50, 0, None], dtype=pl.Int32),
    )
    rows = build(events=told, gold=gold(3), features=features(3)).rows
    assert rows["language"].to_list() == ["de", None, None]
    assert rows["account_age_days"].to_list() == [3.0, None, pytest.approx(2 / 1440)]
    assert rows["community_size"].to_list() == [50, None, None]
    assert build().rows["language"].null_count() == N


def test_a_hard_example_carries_the_targets_and_features_of_its_original() -> None:
    found = build(hard_examples=hard(("e004", "m e s s a g e"), ("e000", "rnessage"), ("gone", "x")))
    assert found.n_hard == 2
    original, variant = (
        found.rows.filter(event_id=name).row(0, named=True) for name in ("e004", "hard:e004")
    )
    for column in ("p_spam", "p_scam", "f_rate", "ts"):
        assert variant[column] == original[column]
    assert variant["text"] == "m e s s a g e"
    assert variant["weight"] == trainingset.HARD_EXAMPLE_WEIGHT


def test_one_lesson_met_twice_is_one_row() -> None:
    pairs = [("e004", "m e s s a g e")] * 3
    assert build(hard_examples=hard(*pairs)).n_hard == 1


def test_events_without_judgement_are_no_rows_and_without_text_they_have_no_words() -> None:
    silent = events().with_columns(
        pl.when(pl.col("event_id").is_in(["e001", "e003"])).then(None).otherwise("text").alias("text")
    )
    judged = gold().filter(pl.col("event_id") != "e002")
    rows = build(events=silent, gold=judged).rows
    assert rows.height == N - 1
    assert "e002" not in rows["event_id"]
    wordless = rows.filter(pl.col("text") == "")
    assert wordless["event_id"].to_list() == ["e001", "e003"]
    assert wordless["group"].n_unique() == 2, "having no words in common makes no near-duplicates"


def test_near_duplicates_share_a_group_and_strangers_do_not() -> None:
    texts = ["free gift cards at our shop today", "FREE g1ft cards at our shop today", "who won the match"]
    rows = events(3).with_columns(text=pl.Series(texts))
    groups = dict(
        zip(texts, build(events=rows, gold=gold(3), features=features(3)).rows["group"], strict=True)
    )
    assert groups[texts[0]] == groups[texts[1]] != groups[texts[2]]


TEMPLATE = "your account will be closed tomorrow unless you verify it right now at our help desk, code {}"


def test_fillings_of_one_template_are_one_family_and_keep_its_name_when_more_come() -> None:
    def families(n: int) -> list[int]:
        rows = events(n).with_columns(text=pl.Series([TEMPLATE.format(chr(97 + i) * 3) for i in range(n)]))
        return build(events=rows, gold=gold(n), features=features(n)).rows["group"].to_list()

    assert len(set(families(12))) == 1
    assert families(12)[0] == families(30)[0]


def test_a_rewriting_stays_with_its_original_and_brings_its_own_likes_along() -> None:
    said = [
        "join our giveaway of golden coins before midnight",
        "quite another thing is said here, by chance, today",
    ]
    variant = said[1] + "!"
    rows = events(2).with_columns(text=pl.Series(said))
    plain = build(events=rows, gold=gold(2), features=features(2)).rows
    assert plain["group"].n_unique() == 2
    found = build(events=rows, gold=gold(2), features=features(2), hard_examples=hard(("e000", variant))).rows
    assert found["group"].n_unique() == 1
    assert found["group"][0] in plain["group"], "named by what was sent, not by what was made of it"


@settings(max_examples=25, deadline=None)
@given(
    texts=st.lists(
        st.sampled_from([TEMPLATE.format("x"), TEMPLATE.format("yes please"), "hi", "HI", "", "good bye"]),
        min_size=1,
        max_size=12,
    ),
    seed=st.integers(0, 99),
)
def test_families_do_not_hang_on_the_order_of_messages(texts: list[str], seed: int) -> None:
    from redqueen.campaigns import near_duplicates
    from redqueen.text import canonicalise

    canonical = pl.Series([canonicalise(t) for t in texts])
    there = canonical.sample(fraction=1.0, shuffle=True, seed=seed).to_list()
    for one in (canonical.to_list(), there):
        found = near_duplicates(one)
        for i, a in enumerate(one):
            for j, b in enumerate(one):
                alike = a != "" and (a == b or (a[:12] == b[:12] == "your account"))
                assert (found[i] == found[j]) == (alike or i == j)


# -- what a set is made from ---------------------------------------------------------------------------------


def test_every_object_read_is_told_and_equal_inputs_have_one_digest(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    for key in ("gold/a", "features/b"):
        store.put(key, key.encode())

    def made(keys: list[str], **settings: Any) -> dict[str, Any]:
        view, digests = trainingset.recording(store)
        for key in keys:
            assert view.get(key).data == store.get(key).data
        return trainingset.provenance(digests, **settings)

    first = made(["gold/a", "features/b"], max_rows=5)
    assert [i["key"] for i in first["inputs"]] == ["features/b", "gold/a"]
    assert made(["features/b", "gold/a", "gold/a"], max_rows=5) == first
    assert made(["gold/a", "features/b"], max_rows=6)["digest"] != first["digest"]
    assert made(["gold/a"], max_rows=5)["digest"] != first["digest"]
    store.put("gold/a", b"another")
    assert made(["gold/a", "features/b"], max_rows=5)["digest"] != first["digest"]


def test_a_lap_learns_from_attacks_of_earlier_laps_and_not_from_its_own_or_later_ones() -> None:
    def record(name: str, *moves: tuple[str, int]) -> dict[str, Any]:
        history = [{"status": status, "at": (T0 + timedelta(hours=h)).isoformat()} for status, h in moves]
        return {"candidate": name, "history": history}

    records = [
        record("early", ("evaluated", 1), ("attacked", 2), ("rejected", 9)),
        record("failed-gate", ("evaluated", 1), ("rejected", 3)),
        record("late", ("evaluated", 1), ("attacked", 6)),
        record("own", ("attacked", 2)),
        record("attacked-by-hand-later", ("trained", 1), ("rejected", 2), ("attacked", 7)),
    ]
    names = ("early", "failed-gate", "late", "own", "attacked-by-hand-later", "by-hand")
    keys = [f"hard_examples/v={name}/part.parquet" for name in names] + ["hard_examples/v=early/notes.txt"]
    known = trainingset.lessons(keys, records, "own", T0 + timedelta(hours=5))
    assert [key.split("/")[1] for key in known] == ["v=early", "v=failed-gate", "v=by-hand"]


# -- the asset -----------------------------------------------------------------------------------------------


def test_run_again_a_lap_finds_its_own_snapshot_and_an_earlier_laps_lesson_makes_another(
    tmp_path: Path,
) -> None:
    env, as_of = Environment(home=str(tmp_path / "home")), T0 + timedelta(hours=3)
    rows = clean_events(60).with_columns(ts=pl.lit(T0), received_at=pl.lit(T0 + timedelta(minutes=1)))
    rows = rows.with_columns(pl.col("ts", "received_at").cast(pl.Datetime("us", "UTC")))
    late = rows.tail(5).with_columns(
        event_id="late" + pl.col("event_id"),
        received_at=pl.lit(as_of + timedelta(seconds=1)).cast(pl.Datetime("us", "UTC")),
    )
    everything = pl.concat([rows, late])
    write_part(env.store, "ingested/events", T0, everything)
    write_part(env.store, "features", T0, declared.stamped(declared.featurise(everything)))
    names = everything["event_id"]
    judged = pl.DataFrame({"event_id": names}).with_columns(policy=pl.lit("spam"), p_abuse=0.5, mature=True)

    def made(candidate: str) -> tuple[str, dict[str, Any]]:
        state.advance_candidate(env.store, candidate, "launched", as_of, "told", as_of=as_of.isoformat())
        env.store.put(gold_key(candidate), to_parquet(judged.to_arrow()))
        with dg.DagsterInstance.ephemeral() as instance:
            instance.add_dynamic_partitions(candidates.name or "", [candidate])
            assert dg.materialize(
                [training_set], instance=instance, partition_key=candidate, resources={"env": env}
            ).success
        table = pl.read_parquet(env.store.get(training_set_key(candidate)).data)
        return trainingset.digest(table), env.store.get_json(inputs_key(candidate))

    def lesson(by: str, at: datetime) -> None:
        state.advance_candidate(env.store, by, "attacked", at, "told")
        text = pl.DataFrame({"event_id": [rows["event_id"][0]], "family": ["leet"], "text": [f"l33t {by}"]})
        env.store.put(f"hard_examples/v={by}/part.parquet", to_parquet(text.to_arrow()))

    first, inputs = made("lap-1")
    table = pl.read_parquet(env.store.get(training_set_key("lap-1")).data)
    assert table.height == 60, "what reached us later is not there"
    assert inputs["snapshot"] == first
    read = {i["key"]: i["sha256"] for i in inputs["inputs"]}
    assert {key.split("/")[0] for key in read} == {"ingested", "features", "gold"}
    assert all(hashlib.sha256(env.store.get(key).data).hexdigest() == read[key] for key in read)
    lesson("lap-1", as_of)
    lesson("lap-after", as_of + timedelta(hours=1))
    assert made("lap-1") == (first, inputs)
    lesson("lap-before", as_of - timedelta(hours=1))
    second, others = made("lap-1")
    assert second != first
    assert others["digest"] != inputs["digest"]
    assert [i["key"] for i in others["inputs"] if "hard" in i["key"]] == [
        "hard_examples/v=lap-before/part.parquet"
    ]
