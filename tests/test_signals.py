"""A window's record: what is measured on, when it can be believed, and whose baseline it is held to."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest

from redqueen import signals
from redqueen.adaptation import OBFUSCATION, AdaptationFigures
from redqueen.policy import LabelCounts
from redqueen.schema import LABELS, PREDICTIONS

T0 = datetime(2026, 1, 3, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)
NAMES = ("rate", "age")
POLICIES = ("spam", "scam")
COUNTS = LabelCounts(100, 10)


def predictions(rows: list[dict[str, Any]]) -> pl.DataFrame:
    """Rows as the service logs them, through the table's own schema."""
    base = {
        "actor_id": "a", "ts": T0, "model_id": "m1", "arm": "champion", "stage": "100%",
        "scores": [("spam", 0.1), ("scam", 0.2)], "action": "allow", "features": [1.0, 2.0],
        "features_version": "f1", "latency_us": 900, "propensity": 1.0, "degraded": False,
        "obfuscation": 0.0, "fingerprint": 1, "threshold_ratio": 0.1,
    }  # fmt: skip
    import pyarrow as pa

    full = [{"event_id": f"e{i}", **base, **row} for i, row in enumerate(rows)]
    frame = pl.from_arrow(pa.Table.from_pylist(full, schema=PREDICTIONS))
    assert isinstance(frame, pl.DataFrame)
    return frame


def votes(rows: list[dict[str, Any]]) -> pl.DataFrame:
    import pyarrow as pa

    base = {"policy": "any", "value": "benign", "source": "moderator", "rater_id": "r", "labeled_at": T0}
    full = [
        {"label_id": f"l{i}", "event_id": f"e{i}", **base, "received_at": T0, **row}
        for i, row in enumerate(rows)
    ]
    frame = pl.from_arrow(pa.Table.from_pylist(full, schema=LABELS))
    assert isinstance(frame, pl.DataFrame)
    return frame


def record(
    hour: int, figures: AdaptationFigures | None, past: list[signals.Watched], champion: str | None = "m1",
    n_events: int = 100, n_served: int = 100, expected: bool = False,
) -> signals.Watched:  # fmt: skip
    return signals.watch(
        T0 + hour * HOUR, champion, figures, None, past,
        n_events=n_events, n_served=n_served, counts=COUNTS, stage="none", expected=expected,
    )  # fmt: skip


def window(hour: int, obfuscating: int, actors: int = 200) -> AdaptationFigures:
    rows = [{"actor_id": f"a{i}", "obfuscation": 0.5 * (i < obfuscating)} for i in range(actors)]
    figures, _missed = signals.adaptation_figures(
        predictions([{**row, "ts": T0 + hour * HOUR} for row in rows]), votes([]), T0 + hour * HOUR,
        POLICIES, 4.0,
    )  # fmt: skip
    return figures


# -- rows ---------------------------------------------------------------------------------------------------


def test_a_prediction_logged_twice_counts_once_and_shadow_rows_answer_nobody() -> None:
    rows = predictions(
        [
            {"event_id": "x"},
            {"event_id": "x"},
            {"event_id": "x", "arm": "shadow", "model_id": "m2"},
            {"event_id": "y", "arm": "shadow", "model_id": "m2"},
        ]
    )
    assert signals.once(rows).height == 3
    assert signals.answered(rows)["event_id"].to_list() == ["x"]
    assert signals.once(pl.DataFrame()).is_empty()
    assert signals.answered(pl.DataFrame()).is_empty()


def test_the_drift_frame_has_features_as_served_and_scores_by_policy() -> None:
    frame = signals.drift_frame(predictions([{}, {"scores": [("spam", 0.9)]}]), NAMES, POLICIES)
    assert frame.columns == ["rate", "age", "score_spam", "score_scam"]
    assert frame["age"].to_list() == [2.0, 2.0]
    assert frame["score_spam"].to_list() == pytest.approx([0.1, 0.9])
    assert np.isnan(frame["score_scam"][1])


def test_rows_served_without_features_stay_in_the_drift_frame_as_missing() -> None:
    frame = signals.drift_frame(predictions([{}, {"features": [], "degraded": True}]), NAMES, POLICIES)
    assert frame.height == 2
    assert np.isnan(frame["rate"][1])


def test_a_reference_leaves_out_what_was_never_seen_and_codes_later_windows() -> None:
    rng = np.random.default_rng(1)
    rows = [{"features": [float(rng.normal()), float("nan")]} for _ in range(400)]
    reference = signals.make_reference(predictions(rows), NAMES, POLICIES)
    assert "age" not in reference.names
    assert "rate" in reference.names
    kept = type(reference).from_dict(json.loads(json.dumps(reference.to_dict())))
    later = signals.drift_frame(predictions([{"features": [1e9, 0.0]}]), NAMES, POLICIES)
    assert kept.codes(later).height == 1


# -- labels -------------------------------------------------------------------------------------------------


def test_only_trusted_decided_labels_count_and_each_event_once() -> None:
    rows = votes(
        [
            {"event_id": "a"},
            {"event_id": "a", "source": "audit"},
            {"event_id": "b", "source": "report"},
            {"event_id": "c", "value": "unsure"},
            {"event_id": "d", "received_at": T0 + HOUR},
        ]
    )
    assert signals.label_counts(rows, None, ("moderator", "audit")) == LabelCounts(2, 2)
    assert signals.label_counts(rows, T0, ("moderator", "audit")) == LabelCounts(2, 1)
    assert signals.label_counts(pl.DataFrame(), None, ("audit",)) == LabelCounts(0, 0)


# -- the record ---------------------------------------------------------------------------------------------


def test_with_too_few_answers_monitoring_is_broken_and_not_calm() -> None:
    found = record(0, window(0, 5), [], n_events=100, n_served=49).signals
    assert found.health == "broken"
    assert "49 of 100" in found.health_reason
    assert record(0, None, [], champion=None, n_events=100, n_served=0).signals.health == "ok"
    silent = record(0, None, [], champion=None, n_events=100, n_served=0, expected=True).signals
    assert silent.health == "broken"
    assert "0 of 100" in silent.health_reason


def test_a_standing_attack_does_not_move_into_the_baseline_when_its_first_windows_are_forgotten() -> None:
    past: list[signals.Watched] = []
    for hour in range(60):
        past.append(record(hour, window(hour, 6 if hour < 8 else 60), past[-20:]))
    assert past[-1].baselines[OBFUSCATION].mean == pytest.approx(0.03)
    assert OBFUSCATION in {alarm.figure for alarm in past[-1].signals.alarms}


def test_the_first_windows_are_the_baseline_and_later_ones_are_held_to_it() -> None:
    past: list[signals.Watched] = []
    for hour in range(signals.REFERENCE_WINDOWS):
        past.append(record(hour, window(hour, 6), past))
        assert past[-1].signals.alarms == ()
    for hour in range(signals.REFERENCE_WINDOWS, signals.REFERENCE_WINDOWS + 4):
        past.append(record(hour, window(hour, 60), past))
    assert past[-1].baselines[OBFUSCATION].mean == pytest.approx(0.03)
    assert OBFUSCATION in {alarm.figure for alarm in past[-1].signals.alarms}


def test_quiet_windows_never_alarm() -> None:
    past: list[signals.Watched] = []
    for hour in range(12):
        past.append(record(hour, window(hour, 5 + hour % 3), past))
    assert not any(watched.signals.alarms for watched in past)


def test_a_new_champion_is_held_to_its_predecessor_until_it_has_windows_of_its_own() -> None:
    past: list[signals.Watched] = []
    for hour in range(5):
        past.append(record(hour, window(hour, 6), past))
    found = record(5, window(5, 60), past, champion="m2")
    assert found.baselines[OBFUSCATION].mean == pytest.approx(0.03)


def test_a_record_survives_json_whole() -> None:
    past = [record(hour, window(hour, 6), []) for hour in range(2)]
    found = record(2, window(2, 6), past)
    assert signals.Watched.from_dict(json.loads(json.dumps(found.to_dict()))) == found


# -- what got through ---------------------------------------------------------------------------------------


def evading(hour: int, share: float, actors: int = 200) -> tuple[AdaptationFigures, int]:
    """A window in which every actor was judged abusive and `share` of them got through."""
    at = T0 + hour * HOUR
    through = round(share * actors)
    rows = [
        {
            "event_id": f"{hour}-{i}",
            "actor_id": f"{hour}-a{i}",
            "ts": at,
            "action": "allow" if i < through else "limit",
        }
        for i in range(actors)
    ]
    judged = [
        {
            "label_id": f"{hour}-{i}",
            "event_id": f"{hour}-{i}",
            "policy": "spam",
            "value": "abuse",
            "received_at": at,
        }
        for i in range(actors)
    ]
    return signals.adaptation_figures(predictions(rows), votes(judged), at, POLICIES, 4.0)


def test_judged_abuse_that_got_through_is_counted() -> None:
    assert evading(0, 0.25)[1] == 50
    assert evading(0, 0.0)[1] == 0


@pytest.mark.parametrize("first", ["held", "unsure"])
def test_what_was_reported_first_and_held_is_news_when_it_is_judged(first: str) -> None:
    at = T0 + HOUR
    rows = predictions(
        [{"event_id": f"e{i}", "actor_id": f"a{i}", "ts": T0, "action": "allow"} for i in range(40)]
    )
    base = {"policy": "spam", "value": "abuse", "source": "report"}
    early = [
        {**base, "label_id": f"r{i}", "event_id": f"e{i}", "received_at": T0, "rater_id": f"ring-{i}"}
        | ({"value": "unsure", "source": "moderator"} if first == "unsure" else {})
        for i in range(40)
    ]
    late = [
        {
            **base,
            "label_id": f"m{i}",
            "event_id": f"e{i}",
            "received_at": at + HOUR / 2,
            "source": "moderator",
        }
        for i in range(40)
    ]
    held = pl.DataFrame({"label_id": [f"r{i}" for i in range(40)], "weight": [0.0] * 40})
    weights = held if first == "held" else None
    found, missed = signals.adaptation_figures(rows, votes([*early, *late]), at, POLICIES, 4.0, weights)
    assert missed == 40
    assert found["evasion_rate"].fresh_hits == 40


def test_an_attack_that_outlives_a_retrain_does_not_become_the_new_normal() -> None:
    past: list[signals.Watched] = []
    for hour in range(6):
        past.append(record(hour, evading(hour, 0.1)[0], past))
    for hour in range(6, 14):
        past.append(record(hour, evading(hour, 0.4)[0], past, champion="m2"))
    assert past[-1].baselines["evasion_rate"].mean == past[5].baselines["evasion_rate"].mean
    assert any(alarm.figure == "evasion_rate" for alarm in past[-1].signals.alarms)


def test_a_champion_better_than_its_predecessor_is_held_to_its_own_figures() -> None:
    past: list[signals.Watched] = []
    for hour in range(6):
        past.append(record(hour, evading(hour, 0.4)[0], past))
    for hour in range(6, 12):
        past.append(record(hour, evading(hour, 0.1)[0], past, champion="m2"))
    assert past[-1].baselines["evasion_rate"].mean < 0.2
