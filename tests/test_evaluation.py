"""How a candidate is judged on unseen messages, and when the gate lets it through."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assets.training import features_for
from redqueen.evaluation import MIN_RECALL, RECALL_SLACK, Report, gate, headline, judge
from redqueen.features import FEATURES_VERSION

POLICIES = ("spam", "scam")


def rows(spam: list[int], scam: list[int], ids: list[str] | None = None) -> pl.DataFrame:
    n = len(spam)
    return pl.DataFrame(
        {"event_id": ids or [f"e{i}" for i in range(n)], "p_spam": spam, "p_scam": scam},
        schema_overrides={"p_spam": pl.Float32, "p_scam": pl.Float32},
    )


def report(recall: float = 0.9, fpr: float = 0.005, fpr_low: float = 0.002) -> Report:
    return Report(200, 2000, recall, recall - 0.05, fpr, fpr_low, {})


def test_a_message_is_acted_on_when_any_policy_reaches_its_own_threshold() -> None:
    scores = np.array([[0.9, 0.0], [0.5, 0.0], [0.0, 0.5], [0.0, 0.49]])
    found = judge(rows([1, 1, 0, 0], [0, 0, 1, 0]), scores, [0.6, 0.5], POLICIES)
    assert (found.n_abuse, found.n_benign) == (3, 1)
    assert found.recall == pytest.approx(2 / 3)
    assert found.fpr == 0.0
    assert found.recall_low < found.recall


def test_slices_are_kept_where_there_is_enough_to_say() -> None:
    n = 100
    spam = [1] * 40 + [0] * 60
    scores = np.array([[0.9, 0.0]] * 20 + [[0.1, 0.0]] * 80)
    ids = [f"{'hard:' if i % 2 else ''}e{i}" for i in range(n)]
    frame = rows(spam, [0] * n, ids).with_columns(f_account_age=pl.Series([1.0] * 90 + [9.0] * 10))
    found = judge(frame, scores, [0.5, 0.5], POLICIES).slices
    assert found["policy spam"].recall == pytest.approx(0.5)
    assert found["attacks that once worked"].n_abuse == 20
    assert found["account new"].n_abuse == 40
    assert "account old" not in found


def test_with_no_abuse_at_all_recall_is_no_division_by_zero() -> None:
    found = judge(rows([0, 0], [0, 0]), np.zeros((2, 2)), [0.5, 0.5], POLICIES)
    assert (found.recall, found.fpr, found.recall_low) == (0.0, 0.0, 0.0)
    assert not gate(found, None, 0.01).passed


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1)), min_size=1, max_size=40))
def test_a_lower_threshold_never_loses_recall(messages: list[tuple[bool, float]]) -> None:
    spam = [int(abusive) for abusive, _ in messages]
    scores = np.array([[score, 0.0] for _, score in messages])
    strict, lax = (judge(rows(spam, [0] * len(spam)), scores, [t, 1.1], POLICIES) for t in (0.7, 0.3))
    assert lax.recall >= strict.recall
    assert lax.fpr >= strict.fpr


def test_a_good_candidate_passes_and_says_by_how_much() -> None:
    verdict = gate(report(0.93), report(0.9), 0.01)
    assert verdict.passed
    assert "93.0%" in verdict.reasons[0]
    assert "champion 90.0%" in verdict.reasons[0]


def test_every_broken_condition_is_named() -> None:
    bad = report(recall=MIN_RECALL - 0.1, fpr=0.2, fpr_low=0.15)
    verdict = gate(bad, report(0.9), 0.01)
    assert not verdict.passed
    assert len(verdict.reasons) == 3


@pytest.mark.parametrize(("loss", "passes"), [(RECALL_SLACK - 0.01, True), (RECALL_SLACK + 0.01, False)])
def test_a_little_recall_may_be_lost_to_newer_data(loss: float, passes: bool) -> None:
    assert gate(report(0.9 - loss), report(0.9), 0.01).passed is passes


def test_false_positives_break_the_gate_only_when_they_are_sure() -> None:
    few = replace(report(), fpr=0.05, fpr_low=0.015)
    assert gate(few, None, 0.01).passed
    assert not gate(replace(few, fpr_low=0.021), None, 0.01).passed


def test_the_headline_is_plain_numbers_one_level_deep() -> None:
    metrics = {
        "auc": 0.98765432,
        "name": "fusion",
        "ok": True,
        "recall": {"spam": 0.5, "note": "x", "b": False},
    }
    assert headline(metrics) == {"auc": 0.98765, "recall_spam": 0.5}


def test_a_champion_that_knows_other_features_is_judged_as_it_is_served_by_text_alone() -> None:
    rows = pl.DataFrame({"f_a": [1.0, 2.0], "f_b": [3.0, 4.0]})

    def detector(version: str, *names: str) -> SimpleNamespace:
        return SimpleNamespace(feature_names=names, manifest=SimpleNamespace(features_version=version))

    assert features_for(detector(FEATURES_VERSION, "b", "a"), rows).tolist() == [[3.0, 1.0], [4.0, 2.0]]
    assert features_for(detector("of-old", "b", "gone"), rows) is None
    assert features_for(detector(FEATURES_VERSION), rows) is None
