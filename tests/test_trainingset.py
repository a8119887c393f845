"""Training sets: one as-of, one set of rows; thinning costs no abuse; hard examples teach."""

from __future__ import annotations

import subprocess
import sys
from datetime import UTC, datetime, timedelta
from typing import Any

import polars as pl
import pytest

from redqueen import labels, trainingset

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
    assert {"event_id", "ts", "text", "p_spam", "p_scam", "weight", "group", "f_rate"} == set(rows.columns)
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


@pytest.mark.parametrize("max_rows", [10, 60, N - 1])
def test_thinning_keeps_all_abuse_and_picks_the_same_benign_rows_again(max_rows: int) -> None:
    whole, thin = build(), build(max_rows=max_rows)
    assert thin.n_abuse == whole.n_abuse
    assert thin.rows.height == max(max_rows, sum(whole.n_abuse.values()))
    assert thin.thinned == whole.rows.height - thin.rows.height
    assert thin.digest == build(max_rows=max_rows).digest


def test_thinning_is_even_over_time() -> None:
    n = 2000
    big = build(gold=gold(n), events=events(n), features=features(n), max_rows=1000).rows
    benign = big.filter(pl.max_horizontal("p_spam", "p_scam") < 0.5)
    early = (benign["ts"] < T0 + timedelta(minutes=n // 2)).sum()
    assert 0.4 < early / benign.height < 0.6


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


def test_events_without_text_or_judgement_are_no_rows() -> None:
    silent = events().with_columns(
        pl.when(pl.col("event_id") == "e001").then(None).otherwise("text").alias("text")
    )
    judged = gold().filter(pl.col("event_id") != "e002")
    ids = build(events=silent, gold=judged).rows["event_id"].to_list()
    assert "e001" not in ids
    assert "e002" not in ids
    assert len(ids) == N - 2


def test_near_duplicates_share_a_group_and_strangers_do_not() -> None:
    texts = ["free gift cards at our shop today", "FREE g1ft cards at our shop today", "who won the match"]
    rows = events(3).with_columns(text=pl.Series(texts))
    groups = dict(
        zip(texts, build(events=rows, gold=gold(3), features=features(3)).rows["group"], strict=True)
    )
    assert groups[texts[0]] == groups[texts[1]] != groups[texts[2]]
