"""Claims about the scoring service: what it takes, who answers, and what it gives away: nothing."""

from __future__ import annotations

import json
import signal
import threading
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen.actions import ActionRules, choose
from redqueen.clock import hour_of
from redqueen.errors import BundleError, InvalidInput, ServiceUnavailable
from redqueen.features import FEATURES
from redqueen.rollout import RolloutState
from redqueen.schema import PREDICTIONS
from redqueen.state import LIVE_KEY
from redqueen.store import DirectoryStore
from redqueen.tables import read_hours
from serving.client import HttpClient
from serving.events import InvalidEvents, parse
from tests.miniature import POLICIES, SECRET, Platform, event, service
from tests.services import free_port, wait_for

# -- the rule ------------------------------------------------------------------------------------------------

probability = st.floats(0, 1, width=32)
STRENGTH = {"allow": 0, "review": 1, "limit": 2, "block": 3}


@given(
    st.lists(st.tuples(probability, probability), min_size=1, max_size=20), probability, st.floats(0.01, 1)
)
def test_a_higher_probability_never_earns_a_milder_action(
    pairs: list[tuple[float, float]], raised: float, threshold: float
) -> None:
    rules = ActionRules(severe=frozenset({"harassment"}))
    before = np.array(pairs)
    after = np.maximum(before, raised)
    names = ("spam", "harassment")
    first = choose(before, (threshold, threshold), names, rules)
    second = choose(after, (threshold, threshold), names, rules)
    assert all(STRENGTH[a] <= STRENGTH[b] for a, b in zip(first, second, strict=True))


@given(probability, st.floats(0.01, 1))
def test_a_message_is_acted_on_exactly_from_the_threshold_on(p: float, threshold: float) -> None:
    (action,) = choose([[p]], [threshold], ("spam",), ActionRules())
    assert (action in ("limit", "block")) == (p >= threshold)


def test_mild_policies_limit_first_and_severe_ones_block() -> None:
    rules = ActionRules(severe=frozenset({"harassment"}), block_probability=0.95)
    rows = [[0.7, 0.0], [0.96, 0.0], [0.0, 0.7], [0.35, 0.0], [0.2, 0.2]]
    assert choose(rows, [0.6, 0.6], ("spam", "harassment"), rules) == [
        "limit",
        "block",
        "block",
        "review",
        "allow",
    ]


# -- what may be sent ----------------------------------------------------------------------------------------


def encoded(value: object) -> bytes:
    return json.dumps(value, default=lambda d: d.isoformat()).encode()


def test_one_event_is_answered_with_one_object_and_a_list_with_a_list(platform: Platform) -> None:
    one = platform.client._exchange("POST", "/v1/score", encoded(event()))
    many = platform.client._exchange("POST", "/v1/score", encoded({"events": [event(1), event(2)]}))
    assert one.json() == {"event_id": "e0", "action": "allow", "degraded": False}
    assert [r["event_id"] for r in many.json()["results"]] == ["e1", "e2"]


def test_an_answer_holds_an_action_and_nothing_to_probe_with(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    response = platform.client._exchange(
        "POST", "/v1/score", encoded({"events": [event(0, "spam"), event(1)]})
    )
    assert {key for r in response.json()["results"] for key in r} == {"event_id", "action", "degraded"}
    assert "m-old" not in response.text
    assert "m-old" not in str(response.headers)


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        ({"ts": "yesterday"}, "ts", "datetime"),
        ({"ts": "2026-03-02T12:00:00"}, "ts", "timezone"),
        ({"ts": "9999-12-31T23:59:59-23:00"}, "ts", "between the years"),
        ({"actor_id": ""}, "actor_id", "at least 1"),
        ({"actor_id": None}, "actor_id", "string"),
        ({"community_size": -1}, "community_size", "greater"),
        ({"kind": "carrier pigeon"}, "kind", "'message'"),
        ({"text": {"secret": SECRET}}, "text", "string"),
        ({"colour": SECRET}, "colour", "no such field"),
        ({SECRET: 1}, "(a field with an odd name)", "no such field"),
    ],
)
def test_a_refusal_names_index_and_field_and_repeats_nothing(
    platform: Platform, change: dict[str, Any], where: str, says: str
) -> None:
    bad = event(1, SECRET) | change
    response = platform.client._exchange("POST", "/v1/score", encoded({"events": [event(0), bad]}))
    assert response.status_code == 422
    (problem,) = response.json()["error"]["problems"]
    assert (problem["index"], problem["field"]) == (1, where)
    assert says in problem["message"]
    assert "swordfish" not in response.text
    assert "pigeon" not in response.text
    assert platform.logged().is_empty(), "all or nothing is scored"


NO_EVENTS = [
    b"", b"not json", b"[1]", b'"text"', b"null", b'{"events": []}', b'{"events": {}}', b'{"events": [7]}',
    b'{"events": [' + b"7," * 600 + b"7]}", b"[" * 100_000, b'{"text": "\xff\xfe"}', b"9" * 5000,
]  # fmt: skip


@pytest.mark.parametrize("body", NO_EVENTS)
def test_no_body_is_a_server_error(platform: Platform, body: bytes) -> None:
    response = platform.client._exchange("POST", "/v1/score", body)
    assert response.status_code == 422
    assert response.json()["error"]["problems"]


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=60)
@given(json_values)
def test_any_json_is_read_or_refused_in_words(value: object) -> None:
    with pytest.raises(InvalidEvents) as refusal:
        parse(json.dumps({"events": [value]}).encode())
    assert refusal.value.problems


def test_a_million_unknown_fields_are_one_problem() -> None:
    with pytest.raises(InvalidEvents) as refusal:
        parse(encoded(event(0) | {f"field{i}": i for i in range(50_000)}))
    assert len(refusal.value.problems) == 1
    assert "50" in refusal.value.problems[0].message


def test_half_a_surrogate_pair_does_not_escape_scoring(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    body = encoded(event(0, "spam \ud83d"))
    assert platform.client._exchange("POST", "/v1/score", body).json()["action"] == "limit"
    assert platform.logged().height == 1
    assert parse(encoded(event(0, "\U0001f600 \ud83d"))).events[0]["text"] == "\U0001f600 \ufffd"


def test_the_client_names_the_event_by_its_place_in_the_whole_list(platform: Platform) -> None:
    events = [event(n) for n in range(520)]
    events[515]["kind"] = "carrier pigeon"
    with pytest.raises(InvalidInput, match="event 515, kind"):
        platform.client.score(events)


# -- who answers ---------------------------------------------------------------------------------------------


def test_without_a_model_everything_is_allowed_and_logged_as_such(platform: Platform) -> None:
    assert platform.scored(event(0, "spam")) == [("allow", False)]
    row = platform.logged().row(0, named=True)
    assert (row["model_id"], row["arm"], row["action"], row["degraded"]) == ("none", "none", "allow", False)
    assert "no model is live" in platform.client.state()["note"]
    assert not platform.client.state()["degraded"]


def test_the_champion_answers_and_the_log_has_what_the_loop_needs(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    texts = ["spam", "harassment", "maybe", "hello"]
    events = [event(n, text) for n, text in enumerate(texts)]
    assert [a for a, _ in platform.scored(*events)] == ["limit", "block", "review", "allow"]
    log = platform.logged().sort("event_id")
    assert log.columns == PREDICTIONS.names
    assert log["threshold_ratio"].to_list() == pytest.approx([1.5, 1.5, 0.4 / 0.6, 0.01 / 0.6], rel=1e-3)
    assert {len(row) for row in log["features"].to_list()} == {len(FEATURES)}
    row = log.row(0, named=True)
    assert set(row["scores"]) == set(POLICIES)
    assert row["scores"]["spam"] == pytest.approx(0.9)
    assert row["propensity"] == platform.settings.audit_rate
    assert row["latency_us"] > 0


def test_in_a_canary_senders_stick_to_their_arm_and_the_share_holds(platform: Platform) -> None:
    platform.live(stage="25%", champion="m-old", challenger="m-new", share=0.25)
    events = [event(n, actor_id=f"actor-{n % 1000}") for n in range(2000)]
    platform.client.score(events)
    log = platform.logged()
    arms = log.group_by("actor_id").agg(pl.col("arm").n_unique().alias("arms"), pl.col("arm").first())
    assert arms["arms"].max() == 1
    assert (arms["arm"] == "challenger").mean() == pytest.approx(0.25, abs=0.05)
    by_arm = log.group_by("arm").agg(pl.col("model_id").unique())
    assert dict(by_arm.iter_rows()) == {"champion": ["m-old"], "challenger": ["m-new"]}


def test_a_shadow_scores_everything_and_decides_nothing(platform: Platform) -> None:
    platform.models["m-new"].thresholds = (0.001, 0.001, 0.001)
    platform.live(stage="shadow", champion="m-old", challenger="m-new", share=0.0)
    assert platform.scored(event(0), event(1, "spam")) == [("allow", False), ("limit", False)]
    log = platform.logged()
    assert sorted(log["arm"].to_list()) == ["champion", "champion", "shadow", "shadow"]
    assert set(log.filter(pl.col("arm") == "shadow")["action"]) != {"allow"}


def test_the_first_model_is_shadowed_without_a_champion(platform: Platform) -> None:
    platform.live(stage="shadow", champion=None, challenger="m-new", share=0.0)
    assert platform.scored(event(0, "spam")) == [("allow", False)]
    rows = {r["arm"]: r for r in platform.logged().to_dicts()}
    assert rows["none"]["model_id"] == "none"
    assert rows["shadow"]["model_id"] == "m-new"
    assert rows["shadow"]["threshold_ratio"] > 1


@pytest.mark.parametrize("how", ["fails to score", "is refused", "cannot be reached"])
def test_a_shadow_that_breaks_is_logged_against_itself_unless_the_store_is_at_fault(
    platform: Platform, how: str
) -> None:
    errors = {"is refused": BundleError("its digest does not hold"), "cannot be reached": ConnectionError()}
    platform.models["m-new"].refused = errors.get(how)
    platform.live(stage="shadow", champion="m-old", challenger="m-new", share=0.0)
    platform.models["m-new"].broken = "always"
    assert platform.scored(event(0, "spam")) == [("limit", False)]
    shadow = platform.logged().filter(pl.col("arm") == "shadow").to_dicts()
    wanted = [] if how == "cannot be reached" else [("m-new", True)]
    assert [(r["model_id"], r["degraded"]) for r in shadow] == wanted
    assert "m-new" in str(platform.client.state()["degraded_reasons"])


def test_models_swap_without_a_restart_under_concurrent_requests(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    stop, failures = threading.Event(), []

    def ask(worker: int) -> None:
        n = 0
        while not stop.is_set() or n < 20:
            got = platform.client.score([event(worker * 100_000 + n, "spam")])
            n += 1
            if got[0]["action"] != "limit" or got[0]["degraded"]:
                failures.append(got)

    workers = [threading.Thread(target=ask, args=(w,)) for w in range(4)]
    for worker in workers:
        worker.start()
    for champion in ["m-new", "m-old"] * 5 + ["m-new"]:
        platform.live(stage="100%", champion=champion)
    stop.set()
    for worker in workers:
        worker.join()
    assert not failures
    log = platform.logged()
    assert set(log["model_id"]) >= {"m-new"}
    assert log["event_id"].n_unique() == log.height >= 80


def test_a_message_sent_again_gets_the_same_answer_and_one_row(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    once = platform.scored(event(0, "spam"), event(0, "spam"))
    assert once == platform.scored(event(0, "spam")) * 2
    assert platform.logged().height == 1
    assert platform.client.state()["counts"]["repeated"] == 2


def test_a_harmless_message_cannot_vouch_for_another_of_the_same_id(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    assert platform.scored(event(0), event(0, "spam")) == [("allow", False), ("limit", False)]


# -- people on call ------------------------------------------------------------------------------------------


def test_operators_see_how_it_stands_and_others_do_not_where_a_token_is_set(tmp_path: Path) -> None:
    platform = Platform(tmp_path, serving_operator_token="open sesame")
    platform.live(stage="25%", champion="m-old", challenger="m-new", share=0.05)
    try:
        state = platform.client.state()
        wanted = {
            "stage": "25%",
            "champion": "m-old",
            "challenger": "m-new",
            "share": 0.05,
            "generation": 1,
        }
        assert wanted.items() <= state.items()
        assert "redqueen_generation 1\n" in platform.client._exchange("GET", "/metrics").text
        platform.client._http.headers["authorization"] = "Bearer open simsim"
        for method, path in (
            ("GET", "/v1/state"),
            ("GET", "/metrics"),
            ("POST", "/v1/refresh"),
            ("POST", "/v1/flush"),
        ):
            assert platform.client._exchange(method, path).status_code == 401
        assert platform.client.score([event()])[0]["action"] == "allow"
    finally:
        platform.close()


def test_a_service_that_is_not_there_is_a_sentence() -> None:
    with pytest.raises(ServiceUnavailable, match="redqueen serve"):
        HttpClient(f"http://127.0.0.1:{free_port()}").score([event()])


@pytest.mark.slow
def test_a_real_process_flushes_on_sigterm_and_follows_the_rollout_by_itself(tmp_path: Path) -> None:
    home, port = tmp_path / "home", free_port()
    store, url = DirectoryStore(home / "store"), f"http://127.0.0.1:{port}"
    with service(home, port, serving_flush_seconds=600, serving_refresh_seconds=0.1) as process:
        with HttpClient(url) as client:
            assert len(client.score([event(n) for n in range(1200)])) == 1200
            assert client.state()["prediction_log"]["buffered"] == 1200
            nobody = {**RolloutState.initial().to_dict(), "champion": "m-missing", "version": 3}
            store.put_json(LIVE_KEY, nobody)
            wait_for(lambda: client.state()["generation"] == 3, 20, "the look at the new rollout state")
            assert client.score([event(5000)])[0] == {
                "event_id": "e5000",
                "action": "allow",
                "degraded": True,
            }
        assert httpx.post(f"{url}/v1/score", content=b"{", timeout=5).status_code == 422
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    now = hour_of(datetime.now(UTC))
    rows = read_hours(store, "predictions", now - timedelta(hours=2), now + timedelta(hours=1))
    assert rows.height == 1201
