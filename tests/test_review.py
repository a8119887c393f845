"""Reviews: which events a person sees, within which budget, and what their answers let us estimate."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import settings as budget_of
from hypothesis import strategies as st

from assets.environment import Environment
from assets.review import audit_estimates, estimates_key
from assets.review import review_requests as asking
from redqueen.review import (
    Estimates,
    Interval,
    Tally,
    allotment,
    is_audited,
    review_requests,
    tally,
    top_policy,
)
from redqueen.review import estimate as estimated
from redqueen.schema import LABELS, PREDICTIONS
from redqueen.tables import HOUR, read_hours, write_part

POLICIES = ("spam", "harassment")
RATE = 0.12
NOON = datetime(2026, 1, 3, 12, tzinfo=UTC)


def events(n: int, kind: str = "message") -> pl.DataFrame:
    return pl.DataFrame({"event_id": [f"e{i}" for i in range(n)], "kind": [kind] * n})


def predictions(n: int) -> pl.DataFrame:
    """One in ten acted on (a fifth of these harassment), one in ten nearly."""
    ratio = [1.5 if i % 10 == 0 else 0.7 if i % 10 == 1 else 0.1 for i in range(n)]
    policy = ["harassment" if i % 50 == 0 else "spam" for i in range(n)]
    return pl.DataFrame(
        {
            "event_id": [f"e{i}" for i in range(n)],
            "action": ["limit" if r >= 1 else "allow" for r in ratio],
            "threshold_ratio": pl.Series(ratio, dtype=pl.Float32),
            "scores": [[{"key": p, "value": 0.9}, {"key": "scam", "value": 0.1}] for p in policy],
        }
    )


def campaigns(*sizes: int, novel: bool = True) -> pl.DataFrame:
    rows = [(f"e{i}", f"c{c}", novel) for c, size in enumerate(sizes) for i in range(100 * c, 100 * c + size)]
    return pl.DataFrame(rows, schema=["event_id", "campaign_id", "novel"], orient="row")


# -- asking --------------------------------------------------------------------------------------------------


def test_the_audit_slice_is_the_same_for_everyone_and_blind_to_the_score() -> None:
    chosen = review_requests(events(4000), None, salt="s", audit_rate=0.1, budget=4000, severe=())
    assert 320 < chosen.height < 480
    assert all(is_audited(e, "s", 0.1) for e in chosen["event_id"])
    scored = review_requests(
        events(4000), predictions(4000), salt="s", audit_rate=0.1, budget=4000, severe=()
    )
    audits = scored.filter(pl.col("reason") == "audit")
    assert audits.drop("inclusion").equals(chosen.drop("inclusion"))
    assert chosen["propensity"].unique().to_list() == chosen["inclusion"].unique().to_list() == [0.1]
    other = review_requests(events(4000), None, salt="t", audit_rate=0.1, budget=4000, severe=())
    assert set(other["event_id"]) != set(chosen["event_id"])
    assert [is_audited("e1", "s", rate) for rate in (0.0, 1.0)] == [False, True]


def test_a_flood_thins_the_audit_and_says_so() -> None:
    calm = review_requests(events(1000), predictions(1000), salt="s", audit_rate=0.1, budget=60, severe=())
    assert calm.height == 60
    assert calm["reason"].unique().to_list() == ["audit"]
    assert calm["propensity"].unique().to_list() == [0.06]
    assert all(is_audited(event, "s", 0.1) for event in calm["event_id"])
    assert review_requests(events(9), None, salt="s", audit_rate=1, budget=0, severe=()).is_empty()


def test_joins_are_not_audited() -> None:
    assert (
        review_requests(events(500, "join"), None, salt="s", audit_rate=0.5, budget=9, severe=()).height == 0
    )


def test_the_rest_of_the_budget_goes_to_severe_then_uncertain_and_acted_on() -> None:
    n = 2000
    asked = review_requests(
        events(n), predictions(n), salt="s", audit_rate=0.05, budget=200, severe=("harassment",)
    )
    extra = asked.filter(pl.col("reason") != "audit")
    assert asked.height == 200
    assert asked["event_id"].is_unique().all()
    severe = {f"e{i}" for i in range(0, n, 50)}
    assert severe <= set(asked["event_id"])
    assert set(extra["reason"]) == {"acted_on", "uncertain"}
    assert extra["propensity"].is_between(0, 1, closed="right").all()


def test_a_campaign_nobody_has_seen_is_worth_two_requests() -> None:
    sizes = (40, 3, 1)
    asked = review_requests(
        events(1000), None, salt="s", audit_rate=0.01, budget=900, severe=(), campaigns=campaigns(*sizes)
    )
    novel = asked.filter(pl.col("reason") == "novel_campaign")
    audited = set(asked.filter(pl.col("reason") == "audit")["event_id"])
    per = {c: [e for e in novel["event_id"] if int(e[1:]) // 100 == c] for c in range(3)}
    free = {c: size - len(audited & {f"e{100 * c + i}" for i in range(size)}) for c, size in enumerate(sizes)}
    assert {c: len(found) for c, found in per.items()} == {c: min(2, free[c]) for c in free}
    large = novel.filter(pl.col("event_id").is_in(per[0]))
    assert large["propensity"].unique().to_list() == [2 / free[0]]
    assert large["inclusion"].to_list() == pytest.approx([1 - 0.99 * (1 - 2 / free[0])] * 2)
    known = campaigns(*sizes, novel=False)
    told = review_requests(
        events(1000), None, salt="s", audit_rate=0.01, budget=900, severe=(), campaigns=known
    )
    assert set(told["reason"]) == {"audit"}


@given(
    n=st.integers(0, 300),
    budget=st.integers(0, 200),
    rate=st.floats(0.01, 1.0),
    sizes=st.lists(st.integers(1, 90), max_size=3),
)
@budget_of(max_examples=60, deadline=None)
def test_requests_keep_the_budget_ask_once_and_know_their_chances(
    n: int, budget: int, rate: float, sizes: list[int]
) -> None:
    def ask() -> pl.DataFrame:
        return review_requests(
            events(n), predictions(n), salt="s", audit_rate=rate, budget=budget, severe=("harassment",),
            campaigns=campaigns(*sizes) if sizes else None,
        )  # fmt: skip

    asked = ask()
    assert asked.height <= budget
    assert asked["event_id"].is_unique().all()
    assert asked.equals(ask())
    if asked.height:
        assert asked["propensity"].is_between(0, 1, closed="right").all()
        assert asked["inclusion"].is_between(0, 1, closed="right").all()
        assert (asked["inclusion"] >= asked["propensity"] - 1e-9).all()


def test_what_is_written_as_inclusion_is_how_often_an_event_is_asked_for() -> None:
    n, times = 60, 1500
    seen: dict[str, int] = {}
    told: dict[str, list[float]] = {}
    for salt in range(times):
        asked = review_requests(
            events(n), predictions(n), salt=str(salt), audit_rate=0.2, budget=22, severe=(),
            campaigns=campaigns(15),
        )  # fmt: skip
        for event, chance in asked.select("event_id", "inclusion").iter_rows():
            seen[event] = seen.get(event, 0) + 1
            told.setdefault(event, []).append(chance)
    # 1 / inclusion, summed over the draws in which an event was asked for, counts every draw once.
    counted = [sum(1 / chance for chance in told[event]) / times for event in seen]
    assert len(seen) == n
    assert np.mean(counted) == pytest.approx(1, abs=0.02)
    assert np.abs(np.array(counted) - 1).max() < 0.2


@given(
    per_day=st.integers(0, 5000),
    per_hour=st.integers(0, 800),
    wanted=st.lists(st.integers(0, 900), min_size=24, max_size=24),
    order=st.permutations(range(24)),
)
@budget_of(max_examples=60, deadline=None)
def test_no_order_of_runs_exceeds_the_day_or_the_hour(
    per_day: int, per_hour: int, wanted: list[int], order: list[int]
) -> None:
    asked: dict[int, int] = {}
    for hour in [*order, *order[:5]]:
        asked[hour] = min(wanted[hour], allotment(hour, asked, per_day=per_day, per_hour=per_hour))
        assert asked[hour] <= per_hour
        assert sum(asked.values()) <= per_day


def test_what_an_hour_leaves_the_next_may_use() -> None:
    assert allotment(0, {}, per_day=240, per_hour=999) == 10
    assert allotment(5, {0: 10, 1: 0, 2: 4}, per_day=240, per_hour=999) == 46
    assert allotment(5, {0: 10, 1: 0, 2: 4}, per_day=240, per_hour=30) == 30
    assert allotment(5, {5: 46}, per_day=240, per_hour=999) == 60
    # By default, 24 times the hour's, what was left over changes nothing.
    assert [allotment(h, dict.fromkeys(range(h), 3), per_day=14_400, per_hour=600) for h in range(24)] == (
        [600] * 24
    )


# -- estimating ----------------------------------------------------------------------------------------------


def estimate(
    asked: pl.DataFrame,
    table: pl.DataFrame,
    labels: pl.DataFrame,
    policies: tuple[str, ...],
    label_error: float = 0.0,
) -> Estimates:
    return estimated(tally(asked, table, labels, policies), policies, label_error=label_error)


def judge(asked: pl.DataFrame, truth: dict[str, str | None], answer: float = 1.0) -> pl.DataFrame:
    """Labels that answer requests; with `answer` below 1 some are never given."""
    rng = np.random.default_rng(len(asked))
    rows = []
    for event, reason in asked.select("event_id", "reason").iter_rows():
        if rng.random() < answer:
            policy, source = truth[event], "audit" if reason == "audit" else "moderator"
            rows.append((event, policy or "any", "abuse" if policy else "benign", source))
    return pl.DataFrame(
        rows, schema=dict.fromkeys(("event_id", "policy", "value", "source"), pl.String), orient="row"
    )


def simulated(seed: int, n: int = 1200) -> tuple[pl.DataFrame, dict[str, str | None]]:
    """Served messages of which a tenth is abuse, seven tenths of it caught, and the truth."""
    rng = np.random.default_rng(seed)
    ids = [f"{seed}-{i}" for i in range(n)]
    abuse, policy = rng.random(n) < 0.1, rng.choice(POLICIES, n, p=[0.7, 0.3])
    caught = rng.random(n) < np.where(abuse, 0.7, 0.012)
    below = np.where(abuse, rng.uniform(0, 0.99, n), rng.beta(1, 6, n) * 0.99)
    ratio = np.where(caught, 1.4, below)
    table = pl.DataFrame(
        {
            "event_id": ids,
            "action": np.where(caught, "limit", "allow"),
            "threshold_ratio": pl.Series(ratio, dtype=pl.Float32),
            "scores": [[{"key": p, "value": 0.9}] for p in policy],
        }
    )
    return table, {e: str(p) if a else None for e, a, p in zip(ids, abuse, policy, strict=True)}


def true_rates(table: pl.DataFrame, truth: dict[str, str | None]) -> dict[str, float]:
    caught = (table["threshold_ratio"] >= 1).to_numpy()
    abuse = np.array([truth[event] is not None for event in table["event_id"]])
    return {
        "recall": float((abuse & caught).sum() / abuse.sum()),
        "precision": float((abuse & caught).sum() / caught.sum()),
        "prevalence": float(abuse.mean()),
        "fpr": float((caught & ~abuse).sum() / (~abuse).sum()),
    }


def test_the_intervals_hold_the_truth_and_the_naive_estimate_does_not() -> None:
    times, held, errors, naive = 400, {}, {}, []
    for seed in range(times):
        table, truth = simulated(seed)
        kinds = table.select("event_id", kind=pl.lit("message"))
        asked = review_requests(
            kinds, table, salt=f"x{seed}", audit_rate=RATE, budget=200, severe=("harassment",)
        )
        found = estimate(asked, table, judge(asked, truth), ())
        real = true_rates(table, truth)
        for name, value in real.items():
            interval = getattr(found.overall, name)
            held.setdefault(name, []).append(interval.low - 1e-9 <= value <= interval.high + 1e-9)
            errors.setdefault(name, []).append(interval.value - value)
        judged = table.filter(pl.col("event_id").is_in(asked["event_id"].to_list()))
        naive.append(true_rates(judged, truth)["recall"] - real["recall"])
    assert {name: np.mean(of) >= 0.93 for name, of in held.items()} == dict.fromkeys(held, True)
    assert {name: abs(np.mean(of)) < 0.02 for name, of in errors.items()} == dict.fromkeys(errors, True)
    # Of what reviewers were shown much had been chosen by the score: taken at its word, recall looks better.
    assert np.mean(naive) > 0.05


def test_the_estimates_are_by_policy_too() -> None:
    table, truth = simulated(1, n=6000)
    kinds = table.select("event_id", kind=pl.lit("message"))
    asked = review_requests(kinds, table, salt="s", audit_rate=0.5, budget=6000, severe=())
    found = estimate(asked, table, judge(asked, truth), (*POLICIES, "scam"))
    for policy in POLICIES:
        rates = found.policies[policy]
        of_it = [event for event, named in truth.items() if named == policy]
        caught = set(table.filter(pl.col("threshold_ratio") >= 1)["event_id"])
        assert rates.recall is not None
        assert rates.recall.low <= len(caught & set(of_it)) / len(of_it) <= rates.recall.high
        assert rates.prevalence is not None
        assert rates.prevalence.low <= len(of_it) / 6000 <= rates.prevalence.high
    assert found.policies["scam"].recall is None
    assert found.policies["scam"].n_abuse == 0
    parts = [found.policies[p].n_abuse for p in POLICIES]
    assert sum(parts) == found.overall.n_abuse


def test_only_answers_to_what_was_asked_count() -> None:
    table, truth = simulated(2)
    kinds = table.select("event_id", kind=pl.lit("message"))
    asked = review_requests(kinds, table, salt="s", audit_rate=0.3, budget=400, severe=())
    answers = judge(asked, truth)
    caught = table.filter(pl.col("threshold_ratio") >= 1)["event_id"].to_list()
    # Users report what was acted on; moderators look there by themselves; someone is not sure.
    noise = [(e, "spam", "abuse", source) for e in caught for source in ("report", "moderator")]
    unsure = [(e, "any", "unsure", "audit") for e in asked["event_id"]]
    more = pl.concat([answers, pl.DataFrame([*noise, *unsure], schema=answers.schema, orient="row")])
    unasked = more.filter(~pl.col("event_id").is_in(asked["event_id"].to_list()))
    assert unasked.height
    audits = asked.filter(pl.col("reason") == "audit")
    plain = estimate(audits, table, judge(audits, truth), POLICIES)
    assert estimate(audits, table, more, POLICIES) == plain


def test_silence_is_taken_to_be_like_the_answers_of_its_kind() -> None:
    table, truth = simulated(3, n=8000)
    kinds = table.select("event_id", kind=pl.lit("message"))
    asked = review_requests(kinds, table, salt="s", audit_rate=0.3, budget=8000, severe=())
    acted = set(table.filter(pl.col("threshold_ratio") >= 1)["event_id"])
    # Reviewers are slow with what was acted on: half of it is never answered.
    late = asked.filter(~pl.col("event_id").is_in(list(acted)) | (pl.int_range(pl.len()) % 2 == 0))
    found = estimate(asked, table, judge(late, truth), ()).overall
    real = true_rates(table, truth)
    assert found.recall is not None
    assert found.recall.low <= real["recall"] <= found.recall.high
    assert found.precision is not None
    assert found.precision.low <= real["precision"] <= found.precision.high


def test_judges_who_err_are_allowed_for_and_taken_at_their_word_they_hide_recall() -> None:
    held: dict[str, list[bool]] = {}
    plain, error = [], 0.02
    for seed in range(100):
        table, truth = simulated(seed, n=3000)
        rng = np.random.default_rng([seed, 1])
        told = {
            event: (None if policy else str(rng.choice(POLICIES))) if rng.random() < error else policy
            for event, policy in truth.items()
        }
        kinds = table.select("event_id", kind=pl.lit("message"))
        asked = review_requests(kinds, table, salt=f"x{seed}", audit_rate=0.2, budget=900, severe=())
        real = true_rates(table, truth)
        found = estimate(asked, table, judge(asked, told), (), label_error=error).overall
        for name, value in real.items():
            interval = getattr(found, name)
            held.setdefault(name, []).append(interval.low - 1e-9 <= value <= interval.high + 1e-9)
        taken = estimate(asked, table, judge(asked, told), ()).overall.recall
        assert taken is not None
        plain.append(taken.value - real["recall"])
    assert {name: np.mean(of) >= 0.93 for name, of in held.items()} == dict.fromkeys(held, True)
    assert np.mean(plain) < -0.08


def test_few_or_no_answers_give_wide_intervals_or_none() -> None:
    table, truth = simulated(4)
    kinds = table.select("event_id", kind=pl.lit("message"))
    asked = review_requests(kinds, table, salt="s", audit_rate=RATE, budget=300, severe=())
    nothing = estimate(asked, table, judge(asked, truth).clear(), POLICIES)
    assert (nothing.overall.recall, nothing.judged) == (None, 0)
    assert nothing.overall.figures() == {}
    empty = estimate(pl.DataFrame(), pl.DataFrame(), pl.DataFrame(), POLICIES)
    assert (empty.requested, empty.overall.precision) == (0, None)
    # All abuse among the answers was caught: that leaves room for what was not drawn.
    acted = table.filter(pl.col("threshold_ratio") >= 1)["event_id"].to_list()
    good = {event: (truth[event] if event in acted else None) for event in truth}
    recall = estimate(asked, table, judge(asked, good), ()).overall.recall
    assert recall is not None
    assert recall.value == recall.high == 1
    assert 0.5 < recall.low < 0.9


def test_parts_written_before_there_was_an_inclusion_count_by_their_audits() -> None:
    table, truth = simulated(5)
    kinds = table.select("event_id", kind=pl.lit("message"))
    asked = review_requests(kinds, table, salt="s", audit_rate=0.3, budget=600, severe=())
    old = estimate(asked.drop("inclusion"), table, judge(asked, truth), ())
    assert old.requested == (asked["reason"] == "audit").sum()
    mixed = pl.concat([asked.head(300), asked.tail(300).drop("inclusion")], how="diagonal_relaxed")
    assert 0 < estimate(mixed, table, judge(asked, truth), ()).judged < asked.height


def test_hours_add_up_to_their_span() -> None:
    parts, asked, tables, answers = [], [], [], []
    for seed in range(4):
        table, truth = simulated(seed)
        kinds = table.select("event_id", kind=pl.lit("message"))
        asked.append(review_requests(kinds, table, salt="s", audit_rate=0.2, budget=300, severe=()))
        tables.append(table)
        answers.append(judge(asked[-1], truth))
        parts.append(Tally.from_dict(tally(asked[-1], table, answers[-1], POLICIES).to_dict()))
    whole = estimate(pl.concat(asked), pl.concat(tables), pl.concat(answers), POLICIES)
    added = estimated(sum(parts, Tally()), POLICIES)
    assert (added.requested, added.judged) == (whole.requested, whole.judged)
    assert added.overall.figures(9) == pytest.approx(whole.overall.figures(9))
    for policy in POLICIES:
        assert added.policies[policy].figures(9) == pytest.approx(whole.policies[policy].figures(9))


def test_scores_are_read_whatever_wrote_them() -> None:
    for scores in ({"a": 0.1, "b": 0.2}, [("a", 0.1), ("b", 0.2)], [{"key": "b", "value": 0.2}]):
        assert top_policy(scores) == "b"
    assert top_policy(None) is None


# -- in Dagster ----------------------------------------------------------------------------------------------


def _served(table: pl.DataFrame, hour: datetime) -> pa.Table:
    rows = [
        {
            **row, "scores": [(pair["key"], pair["value"]) for pair in row["scores"]],
            "actor_id": "a", "ts": hour, "model_id": "m1", "arm": "champion", "stage": "live", "features": [],
            "features_version": "1", "latency_us": 9, "propensity": RATE, "degraded": False,
            "obfuscation": 0.0, "fingerprint": 1,
        }
        for row in table.to_dicts()
    ]  # fmt: skip
    return pa.Table.from_pylist(rows, schema=PREDICTIONS)


def _run(env: Environment, asset: Any, hour: datetime, **config: Any) -> dg.ExecuteInProcessResult:
    name = asset.key.to_user_string()
    return dg.materialize(
        [asset],
        partition_key=f"{hour:%Y-%m-%d-%H:%M}",
        resources={"env": env},
        run_config={"ops": {name: {"config": config}}} if config else None,
    )


def _hour_of_traffic(env: Environment, hour: datetime, seed: int) -> None:
    """Events and predictions of an hour, asked about, and answered two hours later."""
    table, truth = simulated(seed, n=400)
    rows = pl.DataFrame(
        {
            "event_id": table["event_id"],
            "kind": "message",
            "received_at": pl.Series([hour] * table.height, dtype=pl.Datetime("us", "UTC")),
        }
    )
    write_part(env.store, "ingested/events", hour, rows)
    write_part(env.store, "predictions", hour, _served(table, hour))
    write_part(env.store, "served", hour, _served(table, hour))
    assert _run(env, asking, hour).success
    asked = read_hours(env.store, "review", hour, hour + HOUR)
    answers = judge(asked, truth).with_columns(
        label_id=pl.col("event_id"), rater_id=pl.lit("r"), labeled_at=pl.lit(hour), received_at=pl.lit(hour),
        confidence=pl.lit(None, pl.Float64),
    )  # fmt: skip
    part = answers.select(LABELS.names)
    write_part(env.store, "ingested/labels", hour + 2 * HOUR, part, name=f"of-{hour:%H}")


def test_an_hour_is_asked_about_and_estimated_once_its_answers_are_due(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path))
    for i in range(4):
        _hour_of_traffic(env, NOON + i * HOUR, seed=i)
    asked = read_hours(env.store, "review", NOON, NOON + HOUR)
    assert set(asked.columns) == {"event_id", "reason", "propensity", "inclusion"}

    result = _run(env, audit_estimates, NOON + 7 * HOUR)
    (made,) = result.asset_materializations_for_node("audit_estimates")
    figures = {name: entry.value for name, entry in made.metadata.items()}
    record = env.store.get_json(estimates_key(NOON + 7 * HOUR))
    # Four hours after its end a request is no longer waited for: those of noon to three o'clock are matured.
    assert record["hour"] == (NOON + 3 * HOUR).isoformat()
    assert figures["requested"] == read_hours(env.store, "review", NOON, NOON + 4 * HOUR).height
    assert figures["judged"] == figures["requested"]
    assert figures["recall_low"] <= figures["recall"] <= figures["recall_high"]
    assert 0.4 < figures["recall"] < 0.95
    assert {"precision_low", "prevalence_high", "fpr"} <= set(figures)
    assert [check.passed for check in result.get_asset_check_evaluations()] == [True]
    assert Interval(**record["overall"]["recall"]).value == pytest.approx(figures["recall"], abs=1e-3)
    again = _run(env, audit_estimates, NOON + 7 * HOUR)
    assert again.success
    assert env.store.get_json(estimates_key(NOON + 7 * HOUR)) == record


def test_a_thin_slice_warns_with_its_labels_and_no_model_is_nothing_to_estimate(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path))
    result = _run(env, audit_estimates, NOON)
    (check,) = result.get_asset_check_evaluations()
    assert check.passed
    assert "nothing to estimate yet" in check.metadata["verdict"].text
    _hour_of_traffic(env, NOON, seed=1)
    env.store.delete(f"ingested/labels/dt={NOON:%Y-%m-%d}/hr=14/of-12.parquet")
    (check,) = _run(env, audit_estimates, NOON + 5 * HOUR).get_asset_check_evaluations()
    assert not check.passed
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert "too thin: 0 of" in check.metadata["verdict"].text


def test_the_days_budget_is_kept_and_campaigns_are_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQ_REVIEW_BUDGET_PER_DAY", "240")
    monkeypatch.setenv("RQ_AUDIT_RATE", "0.01")
    env = Environment(home=str(tmp_path))
    start = NOON.replace(hour=0)
    table, _ = simulated(1, n=400)
    novel = table.head(6).select("event_id", campaign_id=pl.lit("c"), novel=pl.lit(True))
    write_part(env.store, "campaigns", start, novel)
    _hour_of_traffic(env, start, seed=1)
    first = read_hours(env.store, "review", start, start + HOUR)
    assert first.height == 10
    assert (first["reason"] == "novel_campaign").sum() == 2
    _hour_of_traffic(env, start + 3 * HOUR, seed=2)
    assert read_hours(env.store, "review", start, start + 4 * HOUR).height == 40
