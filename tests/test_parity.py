"""Claims about the parity check: agreement is told as such, and every difference has its reason."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import numpy as np
import polars as pl
import pytest

from assets.environment import Environment
from assets.parity import check_parity
from redqueen import parity
from redqueen.errors import InvalidInput
from redqueen.features import FEATURES_VERSION, NAMES, InProcess, featurise, prepare, prepare_frame, stamped
from redqueen.features.finish import SNAPSHOTS, finish
from redqueen.parity import compare
from redqueen.schema import polars_schema
from redqueen.tables import write_part
from tests.test_features_laws import frame

T0 = datetime(2026, 3, 2, 12, tzinfo=UTC)


def happenings(n: int, seed: int = 1) -> list[dict[str, Any]]:
    """An hour of a small platform, in the order of receipt."""
    rng = Random(seed)
    texts = ["claim free nitro at evil.com/1 now", "see you at the usual place tomorrow", "hello"]
    return [
        {
            "event_id": f"e{i:05}", "ts": (at := T0 + timedelta(seconds=3599 * i / n)),
            "received_at": at + timedelta(milliseconds=400), "actor_id": f"a{rng.randrange(1 + n // 8)}",
            "recipient_id": rng.choice([None, "r1", "r2", "r3"]), "channel_id": f"h{rng.randrange(3)}",
            "community_id": f"c{rng.randrange(3)}", "kind": "dm", "text": rng.choice(texts),
            "community_size": 10, "account_created_at": T0 - timedelta(days=3), "ip_hash": None,
            "device_hash": f"d{rng.randrange(1 + n // 8)}",
        }
        for i in range(n)
    ]  # fmt: skip


class Graph:
    """A snapshot that says the same number of everybody."""

    def __init__(self, number: float) -> None:
        self.number = number

    def lookup(self, actors: Any, recipients: Any, hosts: Any) -> np.ndarray:
        return np.full((len(actors), len(SNAPSHOTS)), self.number)


def served(events: list[dict[str, Any]], graph: float = 0.5, engine: InProcess | None = None) -> pl.DataFrame:
    """What a service logs that is told these events in this order."""
    rows = [prepare(event) for event in events]
    raw = (engine or InProcess()).observe(rows)
    known = np.full((len(rows), len(SNAPSHOTS)), graph)
    features = finish(raw, np.array([r.direct for r in rows]), known, np.ones(len(rows), dtype=bool))
    return pl.DataFrame({
        "event_id": [event["event_id"] for event in events],
        "ts": [event["ts"] for event in events],
        "features": features.astype(np.float32).tolist(),
        "features_version": FEATURES_VERSION,
    }, schema_overrides={"features": pl.List(pl.Float32)})  # fmt: skip


def recomputed(events: list[dict[str, Any]]) -> pl.DataFrame:
    return featurise(frame(events), snapshots=lambda day: Graph(0.5))


def judged(log: pl.DataFrame, events: list[dict[str, Any]]) -> parity.ParityReport:
    return compare(log, recomputed(events), prepare_frame(frame(events)))


def test_what_agrees_is_said_to_agree() -> None:
    events = happenings(300)
    report = judged(served(events), events)
    assert (report.served, report.compared, report.differing, report.causes) == (300, 300, 0, {})
    assert report.verdict == "300 events, every feature as served"


def test_nothing_served_is_nothing_to_compare() -> None:
    events = happenings(3)
    report = judged(pl.DataFrame(), events)
    assert (report.share, report.verdict) == (0.0, "nothing was served")


def without_features(log: pl.DataFrame) -> pl.DataFrame:
    return log.with_columns(features=pl.lit([], pl.List(pl.Float32)))


def of_another_version(log: pl.DataFrame) -> pl.DataFrame:
    return log.with_columns(features_version=pl.lit("1-other"))


@pytest.mark.parametrize(
    ("change", "cause"), [(without_features, parity.NO_FEATURES), (of_another_version, parity.OTHER_VERSION)]
)
def test_what_cannot_be_compared_is_counted_by_reason(
    change: Callable[[pl.DataFrame], pl.DataFrame], cause: str
) -> None:
    events = happenings(40)
    log = served(events)
    report = judged(pl.concat([change(log[:10]), log[10:]]), events)
    assert (report.compared, report.differing, report.causes) == (30, 0, {cause: 10})


def test_an_event_on_one_side_alone_is_counted_there() -> None:
    events = happenings(40)
    report = compare(served(events)[:35], recomputed(events)[4:], prepare_frame(frame(events)))
    assert report.causes == {parity.NOT_SERVED: 5, parity.NOT_RECOMPUTED: 4}
    assert report.compared == 31


def test_the_first_row_of_an_event_counts_and_a_repeated_recomputation_is_refused() -> None:
    events = happenings(10)
    log = served(events)
    assert judged(pl.concat([log, without_features(log)]), events).compared == 10
    twice = recomputed(events)
    with pytest.raises(InvalidInput, match="repeat an event_id"):
        compare(log, pl.concat([twice, twice[:1]]))


def test_events_that_overtook_one_another_are_named_where_it_shows() -> None:
    events = happenings(200)
    swapped = [*events[:50], events[58], *events[51:58], events[50], *events[59:]]
    report = judged(served(swapped), events)
    assert report.causes == {parity.OUT_OF_ORDER: report.differing}
    assert 0 < report.differing < 60
    assert {feature.name for feature in report.features} >= {"recipient_actors_24h", "recipient_events_1h"}


def test_a_service_that_did_not_know_the_past_is_a_cold_start() -> None:
    events = happenings(400)
    engine = InProcess()
    log = pl.concat([served(events[:200]), served(events[200:], engine=engine)])
    report = judged(log, events)
    assert set(report.causes) == {parity.COLD}
    assert report.share > 0.3
    assert {feature.cause for feature in report.features} == {parity.COLD}
    assert "cold start" in report.verdict


def test_lateness_that_the_request_did_not_tell_is_named() -> None:
    events = happenings(60)
    late = {**events[30], "received_at": events[30]["ts"] + timedelta(hours=2)}
    report = judged(served(events), [*events[:30], late, *events[31:]])
    assert report.causes[parity.LATE] == 1


def test_another_text_under_the_same_id_is_another_message() -> None:
    events = happenings(60)
    other = [*events]
    other[7] = {**events[7], "text": "what the client scored was something else entirely"}
    report = judged(served(other), events)
    assert report.causes[parity.OTHER_EVENT] == 1
    assert report.features[0].cause


@pytest.mark.parametrize(("graph", "cause"), [(np.nan, parity.NO_GRAPH), (0.7, parity.OTHER_GRAPH)])
def test_graph_features_have_reasons_of_their_own(graph: float, cause: str) -> None:
    events = happenings(60)
    report = judged(served(events, graph), events)
    assert report.causes == {cause: 60}
    assert {f.name for f in report.features} == {name for name in NAMES if name.startswith("graph_")}
    assert report.features[0].max_abs == pytest.approx(0.0 if np.isnan(graph) else 0.2)


def test_what_has_no_reason_is_unknown() -> None:
    events = happenings(60)
    log = served(events)
    raised = [[*row[:20], row[20] + 3, *row[21:]] for row in log["features"].to_list()]
    log = log.with_columns(features=pl.Series(raised, dtype=pl.List(pl.Float32)))
    report = judged(log, events)
    assert report.causes == {parity.UNKNOWN: 60}
    (feature,) = report.features
    assert (feature.name, feature.max_abs, feature.share) == (NAMES[20], 3.0, 1.0)


def test_an_hour_is_compared_in_a_twentieth_of_a_second() -> None:
    events = happenings(3000)
    log, again, table = served(events), recomputed(events), prepare_frame(frame(events))
    began = time.process_time()
    assert not compare(log, again, table).differing
    assert time.process_time() - began < 0.1


# -- the asset check -----------------------------------------------------------------------------------------


@pytest.fixture
def env(tmp_path: Any) -> Environment:
    return Environment(home=str(tmp_path / "home"))


def landed(env: Environment, events: list[dict[str, Any]], hour: datetime = T0) -> pl.DataFrame:
    """The hour as ingested, and its features as the asset writes them."""
    rows = pl.concat([pl.DataFrame(schema=polars_schema("events")), frame(events)], how="diagonal_relaxed")
    write_part(env.store, "ingested/events", hour, rows)
    table = recomputed(events)
    write_part(env.store, "features", hour, stamped(table))
    return table


def test_the_check_tells_feature_and_cause_and_warns_or_fails_by_how_much_differs(env: Environment) -> None:
    events = happenings(300)
    table = landed(env, events)
    found = check_parity(env, [T0], table)
    assert (found.passed, found.metadata["verdict"].value) == (True, "nothing was served")
    for differing, passed, severity in ((1, True, "WARN"), (30, False, "WARN"), (200, False, "ERROR")):
        log = pl.concat([served(events[:-differing]), served(events[-differing:])])
        write_part(env.store, "predictions", T0, log)
        found = check_parity(env, [T0], table)
        assert (found.passed, found.severity.value) == (passed, severity)
    assert "cold start" in str(found.metadata["verdict"].value)
    shown = found.metadata["features"].records
    assert {record.data["cause"] for record in shown} == {parity.COLD}
    assert "a1" not in str(found.metadata)


def test_what_was_received_in_the_last_moment_of_an_hour_is_compared_in_the_next(env: Environment) -> None:
    events = happenings(40)
    shifted = [{**e, "ts": e["ts"] + timedelta(hours=1), "received_at": e["received_at"] + timedelta(hours=1),
                "event_id": "n" + e["event_id"]} for e in events]  # fmt: skip
    landed(env, events)
    both = featurise(frame(shifted), frame(events), snapshots=lambda day: Graph(0.5))
    landed(env, shifted, T0 + timedelta(hours=1))
    log = served([*events, *shifted])
    write_part(env.store, "predictions", T0 + timedelta(hours=1), log[35:])
    found = check_parity(env, [T0 + timedelta(hours=1)], both)
    assert found.metadata["verdict"].value == "45 events, every feature as served"


def test_a_comparison_that_fails_is_a_warning_and_says_no_more_than_its_kind(env: Environment) -> None:
    events = happenings(3)
    table = landed(env, events)
    write_part(env.store, "predictions", T0, pl.DataFrame({"event_id": ["e1"]}))
    found = check_parity(env, [T0], table)
    assert (found.passed, found.severity.value) == (False, "WARN")
    assert found.metadata["verdict"].value == "could not be compared (ColumnNotFoundError)"
