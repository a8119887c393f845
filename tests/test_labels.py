"""Gold labels: what is known as of an instant, whoever says it, in whatever order."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen import labels as gold_labels
from redqueen.labels import gold
from redqueen.schema import LABEL_SOURCES, polars_schema

T0 = datetime(2026, 1, 3, 14, tzinfo=UTC)
POLICIES = ("spam", "scam")
SCHEMA = polars_schema("labels")


def vote(
    n: int, event: str = "e1", value: str = "abuse", source: str = "moderator", **changes: Any
) -> dict[str, Any]:
    row = {
        "label_id": f"l{n}",
        "event_id": event,
        "policy": "any" if value == "benign" else "spam",
        "value": value,
        "source": source,
        "rater_id": f"r{n}",
        "labeled_at": T0 + timedelta(minutes=n),
        "received_at": T0 + timedelta(minutes=n, seconds=30),
        "confidence": None,
    }
    return {**row, **changes}


def table(*rows: dict[str, Any]) -> pl.DataFrame:
    return pl.DataFrame(list(rows), schema=SCHEMA)


def p_abuse(frame: pl.DataFrame, event: str = "e1", policy: str = "spam") -> float:
    return float(frame.filter((pl.col("event_id") == event) & (pl.col("policy") == policy))["p_abuse"].item())


LATER = T0 + timedelta(days=3)


def test_a_source_counts_as_much_as_it_is_reliable() -> None:
    rows = table(*(vote(n, f"e{n}", source=source) for n, source in enumerate(LABEL_SOURCES)))
    told = gold(rows, LATER, POLICIES)
    for n, source in enumerate(LABEL_SOURCES):
        assert p_abuse(told, f"e{n}") == pytest.approx(gold_labels.RELIABILITY[source])


def test_benign_under_any_is_benign_under_every_policy() -> None:
    told = gold(table(vote(1, value="benign")), LATER, POLICIES)
    assert told["policy"].to_list() == ["scam", "spam"]
    assert told["p_abuse"].max() == pytest.approx(0.02)


def test_an_abuse_vote_says_nothing_of_other_policies_and_unsure_nothing_at_all() -> None:
    told = gold(table(vote(1), vote(2, "e2", value="unsure")), LATER, POLICIES)
    assert told.select("event_id", "policy").rows() == [("e1", "spam")]


def test_a_moderator_outweighs_any_number_of_reports() -> None:
    reports = [vote(n, source="report") for n in range(200)]
    assert p_abuse(gold(table(*reports), LATER, POLICIES)) == pytest.approx(0.95)
    assert p_abuse(gold(table(*reports, vote(999, value="benign")), LATER, POLICIES)) < 0.5


def test_a_rater_has_one_vote_an_event_and_the_last_word_is_theirs() -> None:
    again = [vote(n, source="report", rater_id="same") for n in range(5)]
    told = gold(table(*again), LATER, POLICIES)
    assert (told["n_votes"].item(), p_abuse(told)) == (1, pytest.approx(0.75))
    changed = table(vote(1, rater_id="mod"), vote(2, rater_id="mod", policy="spam", value="benign"))
    assert p_abuse(gold(changed, LATER, POLICIES)) == pytest.approx(0.02)


def test_a_rater_who_reports_by_the_hundred_weighs_less() -> None:
    hasty = [vote(n % 50, f"e{n}", source="report", rater_id="hasty", label_id=f"h{n}") for n in range(300)]
    told = gold(table(*hasty, vote(1, "calm", source="report")), LATER, POLICIES)
    assert p_abuse(told, "calm") == pytest.approx(0.75)
    assert p_abuse(told, "e7") < 0.52


def test_an_event_matures_by_age_or_by_a_trusted_vote() -> None:
    rows = table(vote(1, "e1", source="report"), vote(2, "e2", source="moderator"))
    soon = gold(rows, T0 + timedelta(hours=2), POLICIES, maturity_hours=24)
    assert soon["mature"].to_list() == [False, True]
    assert gold(rows, T0 + timedelta(hours=25), POLICIES, maturity_hours=24)["mature"].all()
    events = pl.DataFrame({"event_id": ["e1"], "ts": [T0 - timedelta(hours=40)]})
    assert gold(rows, T0 + timedelta(hours=2), POLICIES, events=events)["mature"].all()


def test_an_unreliable_source_is_found_out_where_others_overlap_with_it() -> None:
    rng = np.random.default_rng(5)
    rows: list[dict[str, Any]] = []
    for n in range(300):
        truth = bool(rng.random() < 0.5)
        said = "abuse" if truth else "benign"
        rows.append(vote(3 * n, f"e{n}", said, "moderator", received_at=T0))
        coin = "abuse" if rng.random() < 0.5 else "benign"
        rows.append(vote(3 * n + 1, f"e{n}", coin, "vendor", received_at=T0))
        rows.append(vote(3 * n + 2, f"e{n}", "abuse", "rule", received_at=T0))
    rows.append(vote(9999, "alone", "abuse", "vendor", received_at=T0))
    rows.append(vote(9998, "ruled", "abuse", "rule", received_at=T0))
    told = gold(table(*rows), LATER, ("spam",))
    assert p_abuse(told, "alone") < 0.65
    assert p_abuse(told, "ruled") < 0.65


def test_no_labels_no_gold() -> None:
    for rows in (table(), table(vote(1, received_at=LATER))):
        told = gold(rows, T0, POLICIES)
        assert told.height == 0
        assert dict(told.schema) == gold_labels.GOLD_SCHEMA


MINUTES = st.integers(-600, 600)


@st.composite
def any_votes(draw: st.DrawFn) -> list[dict[str, Any]]:
    count = draw(st.integers(0, 14))
    return [
        vote(
            n,
            event=draw(st.sampled_from(["e1", "e2", "e3"])),
            value=draw(st.sampled_from(["abuse", "benign", "unsure"])),
            source=draw(st.sampled_from(LABEL_SOURCES)),
            rater_id=draw(st.sampled_from(["r1", "r2"])),
            labeled_at=T0 + timedelta(minutes=draw(MINUTES)),
            received_at=T0 + timedelta(minutes=draw(MINUTES)),
            confidence=draw(st.sampled_from([None, 0.3, 1.0])),
        )
        for n in range(count)
    ]


EAGER = gold_labels.Fusion(min_overlap=1)


@settings(max_examples=60, deadline=None)
@given(rows=any_votes(), seed=st.randoms(use_true_random=False))
def test_what_came_later_copies_and_order_change_nothing(rows: list[dict[str, Any]], seed: Any) -> None:
    earlier = [row for row in rows if row["received_at"] <= T0]
    copies = earlier[: len(earlier) // 2]
    shuffled = [*rows, *copies]
    seed.shuffle(shuffled)
    for fusion in (None, EAGER):
        plain = gold(table(*earlier), T0, POLICIES, fusion=fusion)
        assert gold(table(*shuffled), T0, POLICIES, fusion=fusion).equals(plain)


def test_a_label_sent_again_with_other_content_stays_what_it_was_first() -> None:
    first, changed = vote(1), vote(1, value="benign", received_at=T0 + timedelta(hours=9))
    for rows in ([first, changed], [changed, first]):
        assert p_abuse(gold(table(*rows), LATER, POLICIES)) == pytest.approx(0.98)


def test_not_even_the_last_bit_depends_on_the_order() -> None:
    rng = np.random.default_rng(2)
    rows = [
        vote(n, f"e{n % 40}", rng.choice(["abuse", "benign"]), "vendor", confidence=float(rng.random()))
        for n in range(2_000)
    ]
    plain = gold(table(*rows), LATER, POLICIES)
    assert gold(table(*(rows[i] for i in rng.permutation(len(rows)))), LATER, POLICIES).equals(plain)


def test_30000_labels_take_no_time() -> None:
    rng = np.random.default_rng(1)
    n = 30_000
    rows = pl.DataFrame(
        {
            "label_id": [f"l{i}" for i in range(n)],
            "event_id": [f"e{i}" for i in rng.integers(0, 20_000, n)],
            "policy": np.where(rng.random(n) < 0.3, "spam", "any"),
            "value": np.where(rng.random(n) < 0.3, "abuse", "benign"),
            "source": rng.choice(LABEL_SOURCES, n),
            "rater_id": [f"r{i}" for i in rng.integers(0, 500, n)],
            "labeled_at": [T0] * n,
            "received_at": [T0 + timedelta(seconds=int(s)) for s in rng.integers(0, 90_000, n)],
            "confidence": [None] * n,
        },
        schema_overrides=SCHEMA,
    )
    gold(rows.head(100), LATER, POLICIES)
    start = time.perf_counter()
    gold(rows, LATER, POLICIES)
    assert time.perf_counter() - start < 1.5  # some 0.1 s on a quiet core


# What the guard holds, how late labels come, who disagrees.


def weights(**held: float) -> pl.DataFrame:
    return pl.DataFrame({"label_id": list(held), "weight": list(held.values())}, schema_overrides=WEIGHTS)


WEIGHTS: dict[str, Any] = {"label_id": pl.String, "weight": pl.Float64}


def test_a_held_label_is_no_vote_and_a_discounted_one_less_of_one() -> None:
    rows = table(vote(1, source="report"), vote(2, "e2", source="report"), vote(3, "e2", source="report"))
    told = gold(rows, LATER, POLICIES, weights=weights(l1=0.0, l2=0.0, l3=0.5))
    assert told.select("event_id", "n_votes").rows() == [("e2", 1)]
    assert 0.5 < p_abuse(told, "e2") < 0.75
    assert gold(rows, LATER, POLICIES, weights=weights()).equals(gold(rows, LATER, POLICIES))


def test_where_the_last_word_is_held_the_word_before_it_stands() -> None:
    rows = table(vote(1, rater_id="same"), vote(2, rater_id="same", policy="spam", value="benign"))
    assert p_abuse(gold(rows, LATER, POLICIES, weights=weights(l2=0.0))) == pytest.approx(0.98)


def test_disagreement_is_the_weight_of_those_who_lost() -> None:
    reports = [vote(n, source="report") for n in range(9)]
    told = gold(table(*reports, vote(99, value="benign"), vote(98, "e2")), LATER, ("spam",))
    assert told["disagreement"].to_list() == [pytest.approx(0.9), 0.0]


def test_maturity_is_by_policy_where_one_is_given() -> None:
    rows = table(vote(1, source="report"), vote(2, source="report", policy="scam"))
    told = gold(rows, T0 + timedelta(hours=9), POLICIES, maturity_hours={"spam": 4.0, "scam": 12.0})
    assert dict(told.select("policy", "mature").rows()) == {"spam": True, "scam": False}


def test_raters_of_one_source_are_told_apart_by_policy() -> None:
    rng = np.random.default_rng(6)
    rows: list[dict[str, Any]] = []
    for n in range(400):
        truth = bool(rng.random() < 0.5)
        for rater, right in (("good", 0.97), ("sloppy", 0.6)):
            said = truth if rng.random() < right else not truth
            value = "abuse" if said else "benign"
            rows.append(vote(len(rows), f"e{n}", value, "vendor", rater_id=rater, policy="spam"))
        value = "abuse" if truth else "benign"
        rows.append(vote(len(rows), f"e{n}", value, "moderator", policy="spam"))
    for rater in ("good", "sloppy", "newcomer"):
        rows.append(vote(len(rows), f"by {rater}", source="vendor", rater_id=rater))
        rows.append(vote(len(rows), f"scam by {rater}", source="vendor", rater_id=rater, policy="scam"))
    told = gold(table(*rows), LATER, POLICIES)
    good, sloppy, newcomer = (p_abuse(told, f"by {rater}") for rater in ("good", "sloppy", "newcomer"))
    assert good > 0.9
    assert sloppy < 0.7
    assert sloppy < newcomer < good
    for rater in ("good", "sloppy"):
        assert p_abuse(told, f"scam by {rater}", "scam") == pytest.approx(0.9)


def test_delays_are_told_by_policy() -> None:
    rows = table(
        *(vote(n, f"e{n}", labeled_at=T0, received_at=T0 + timedelta(hours=n)) for n in range(1, 11)),
        vote(11, "e1", "benign", labeled_at=T0, received_at=T0 + timedelta(hours=2)),
    )
    events = pl.DataFrame({"event_id": ["e1"], "ts": [T0 - timedelta(hours=3)]})
    told = {row["policy"]: row for row in gold_labels.delays(rows, events, POLICIES).iter_rows(named=True)}
    assert told["scam"]["labels"] == 1
    assert (told["spam"]["labels"], told["spam"]["arrival_median"]) == (11, 5.0)
    assert told["spam"]["arrival_p90"] == 9.0
    assert (told["spam"]["judged_median"], told["scam"]["judged_p90"]) == (3.0, 3.0)
    assert gold_labels.delays(table(), None, POLICIES).is_empty()


def test_a_source_that_errs_is_shown_with_its_error_and_an_interval() -> None:
    rows: list[dict[str, Any]] = []
    for n in range(600):
        truth = n % 2 == 0
        for source, said in (("moderator", truth), ("vendor", truth != (n % 5 == 0))):
            rows.append(vote(len(rows), f"e{n}", "abuse" if said else "benign", source, policy="spam"))
    heard = gold_labels.spread(gold_labels.known(table(*rows), LATER), ("spam",), gold_labels.Fusion())
    judged = gold_labels.judge(gold_labels.elect(heard), gold_labels.Fusion())
    told = gold_labels.source_errors(gold_labels.Learnt.of(judged)).row(0, named=True)
    assert (told["policy"], told["source"], told["votes"]) == ("spam", "vendor", 600.0)
    assert told["low"] < 0.2 < told["high"]
    assert told["high"] - told["low"] < 0.08
    assert told["error"] == pytest.approx(0.2, abs=0.04)
    assert told["worth_abuse"] == pytest.approx(0.8, abs=0.05)
