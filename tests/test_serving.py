"""Claims about the scoring service: it always answers, swaps without a restart, and gives nothing away."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models import baseline, bundle, fusion, trees
from models.signing import signer_of, trust_of
from redqueen import graph
from redqueen.actions import ActionRules, choose
from redqueen.clock import hour_of
from redqueen.errors import BundleError, InvalidInput, ServiceUnavailable
from redqueen.features import FEATURES, FEATURES_VERSION, NAMES, prepare
from redqueen.features.journal import KEPT, Journal
from redqueen.ingest import polars_schema
from redqueen.rollout import RolloutState, assign
from redqueen.schema import PREDICTIONS
from redqueen.settings import Settings
from redqueen.state import LIVE_KEY
from redqueen.store import DirectoryStore, ObjectStore
from redqueen.tables import read_hours, write_part
from serving.app import create_app
from serving.client import HttpClient, InProcessClient
from serving.events import InvalidEvents, parse
from serving.live import ScoringFailed, serve_model
from serving.predictions import PredictionLog
from tests.services import RedisServer, answers, free_port, wait_for

NOON = datetime(2026, 3, 2, 12, 0, tzinfo=UTC)
POLICIES = ("spam", "scam", "harassment")
SECRET = "meet me at the old mill, password swordfish"


# -- a platform in miniature ---------------------------------------------------------------------------------


@dataclass
class Keyword:
    """A detector that is sure of a policy wherever its name stands in the text, and can be broken at will."""

    model_id: str
    feature_names: tuple[str, ...] = tuple(f.name for f in FEATURES)
    policies: tuple[str, ...] = POLICIES
    thresholds: tuple[float, ...] = (0.6, 0.6, 0.6)
    broken: str | None = None
    refused: Exception | None = None
    seen: list[tuple[int, bool]] = field(default_factory=list)

    def score(self, texts: Sequence[str], features: Any = None) -> np.ndarray:
        self.seen.append((len(texts), features is not None))
        if self.broken == "always" or (self.broken == "features" and features is not None):
            raise RuntimeError(f"cannot read {texts[0]}")
        if any("CRASH" in text for text in texts):
            raise RuntimeError("cannot read CRASH")
        p = np.array([[0.9 if policy in text else 0.01 for policy in POLICIES] for text in texts], np.float32)
        p[["maybe" in text for text in texts], 0] = 0.4
        return p * np.nan if self.broken == "nan" else p


@dataclass
class MovableClock:
    at: datetime = NOON

    def now(self) -> datetime:
        return self.at


class Platform:
    """A store, a clock, some models, and the service on top of them in this process."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self.settings = Settings(home=home, **settings)
        self.store = DirectoryStore(home / "store")
        self.clock = MovableClock()
        self.models: dict[str, Keyword] = {"m-old": Keyword("m-old"), "m-new": Keyword("m-new")}
        self._client: InProcessClient | None = None

    def load(self, model_id: str) -> Keyword:
        model = self.models[model_id]
        if model.refused is not None:
            raise model.refused
        return model

    def live(self, **state: Any) -> None:
        version = getattr(self, "_version", 0) + 1
        self._version = version
        wanted = {**RolloutState.initial().to_dict(), **state, "version": version}
        self.store.put_json(LIVE_KEY, wanted)
        self.client.refresh()

    @property
    def client(self) -> InProcessClient:
        if self._client is None:
            app = create_app(
                self.settings, store=self.store, clock=self.clock, load=self.load, background=False
            )
            self._client = InProcessClient(app)
        return self._client

    def scored(self, *events: dict[str, Any]) -> list[tuple[str, bool]]:
        return [(a["action"], a["degraded"]) for a in self.client.score(events)]

    def logged(self) -> pl.DataFrame:
        self.client.flush()
        return read_hours(self.store, "predictions", NOON - timedelta(hours=12), NOON + timedelta(hours=12))

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None


@pytest.fixture
def platform(tmp_path: Path) -> Iterator[Platform]:
    made = Platform(tmp_path / "home")
    yield made
    made.close()


def event(n: int = 0, text: str = "good morning everyone", **changes: Any) -> dict[str, Any]:
    return {
        "event_id": f"e{n}",
        "ts": NOON + timedelta(milliseconds=n),
        "actor_id": f"actor-{n}",
        "community_id": "c1",
        "community_size": 120,
        "channel_id": "general",
        "kind": "message",
        "text": text,
        "account_created_at": NOON - timedelta(days=30),
        **changes,
    }


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


# -- what may break ------------------------------------------------------------------------------------------


def test_a_challenger_that_cannot_be_loaded_leaves_its_senders_to_the_champion(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    del platform.models["m-new"]
    platform.live(stage="25%", champion="m-old", challenger="m-new", share=0.5)
    events = [event(n, "spam") for n in range(60)]
    got = platform.client.score(events)
    salt = RolloutState.from_dict(platform.store.get_json(LIVE_KEY)).salt
    meant = {e["event_id"]: assign(e["actor_id"], salt, 0.5) == "challenger" for e in events}
    assert {a["action"] for a in got} == {"limit"}
    assert {a["event_id"]: a["degraded"] for a in got} == meant
    log = platform.logged()
    assert set(log["model_id"]) == {"m-old"}
    assert dict(log.select("event_id", pl.col("arm") == "challenger").iter_rows()) == meant
    assert any("challenger: model m-new" in why for why in platform.client.state()["degraded_reasons"])


@pytest.mark.parametrize("how", ["always", "nan"])
def test_a_challenger_that_fails_while_scoring_leaves_its_senders_to_the_champion(
    platform: Platform, how: str
) -> None:
    platform.live(stage="25%", champion="m-old", challenger="m-new", share=1.0)
    platform.models["m-new"].broken = how
    assert platform.scored(event(0, "spam")) == [("limit", True)]
    row = platform.logged().row(0, named=True)
    assert (row["arm"], row["model_id"]) == ("challenger", "m-old"), "its failure is counted against it"
    platform.models["m-new"].broken = None
    assert platform.scored(event(1, "spam")) == [("limit", False)]
    assert not platform.client.state()["degraded"], "what works again is no longer a reason to worry"


def test_a_new_champion_that_fails_its_first_score_does_not_replace_the_old_one(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    platform.models["m-new"].broken = "always"
    platform.live(stage="100%", champion="m-new")
    assert platform.scored(event(0, "spam")) == [("limit", True)]
    assert platform.client.state()["serving"]["champion"] == "m-old"
    platform.models["m-new"].broken = None
    platform.client.refresh()
    assert platform.scored(event(1, "spam")) == [("limit", False)]
    assert platform.client.state()["serving"]["champion"] == "m-new"


@pytest.mark.parametrize("damage", ["garbage", "gone"])
def test_a_damaged_rollout_state_leaves_the_last_one_in_force(platform: Platform, damage: str) -> None:
    platform.live(stage="100%", champion="m-old")
    assert platform.client.state()["generation"] == 1
    if damage == "garbage":
        platform.store.put(LIVE_KEY, b"{")
    else:
        platform.store.delete(LIVE_KEY)
    assert not platform.client.refresh()
    assert platform.scored(event(0, "spam")) == [("limit", False)]
    assert any("rollout state" in why for why in platform.client.state()["degraded_reasons"])


def test_one_message_that_breaks_the_model_costs_its_neighbours_nothing(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    events = [event(n, "spam" if n % 2 else "hello") for n in range(64)]
    events[17]["text"] = "CRASH spam"
    got = platform.scored(*events)
    assert got[17] == ("allow", True)
    assert [g for i, g in enumerate(got) if i != 17] == [
        ("limit" if n % 2 else "allow", False) for n in range(64) if n != 17
    ]


def test_broken_features_mean_text_alone(platform: Platform, monkeypatch: pytest.MonkeyPatch) -> None:
    platform.live(stage="100%", champion="m-old")

    def fail(*_: object) -> None:
        raise ZeroDivisionError(SECRET)

    monkeypatch.setattr("redqueen.features.InProcess.observe", fail)
    assert platform.scored(event(0, "spam")) == [("limit", True)]
    assert platform.models["m-old"].seen[-1] == (1, False)
    assert "behaviour features failed" in str(platform.client.state()["degraded_reasons"])
    assert "swordfish" not in str(platform.client.state())
    monkeypatch.undo()
    assert platform.scored(event(1, "spam")) == [("limit", False)]


def test_a_model_that_chokes_on_features_is_asked_again_without(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    platform.models["m-old"].broken = "features"
    assert platform.scored(event(0, "spam")) == [("limit", True)]


def test_when_everything_is_broken_messages_flow_and_say_so(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    platform.models["m-old"].broken = "always"
    assert platform.scored(event(0, "spam")) == [("allow", True)]
    row = platform.logged().row(0, named=True)
    assert (row["model_id"], row["degraded"]) == ("none", True)


def test_a_model_trained_on_other_features_is_served_on_text_and_never_as_a_challenger(
    platform: Platform,
) -> None:
    platform.models["m-old"].feature_names = ("phase_of_the_moon",)
    platform.models["m-new"].feature_names = ("phase_of_the_moon",)
    platform.live(stage="25%", champion="m-old", challenger="m-new", share=1.0)
    assert platform.scored(event(0, "spam")) == [("limit", True)]
    assert platform.logged()["model_id"].to_list() == ["m-old"]
    assert "phase_of_the_moon" in str(platform.client.state()["degraded_reasons"])


@pytest.mark.parametrize("how", ["a feature twice", "a feature too many"])
def test_a_model_that_wants_a_feature_twice_is_refused(platform: Platform, how: str) -> None:
    """The feature file with duplicated rows that took a fleet down."""
    names = tuple(f.name for f in FEATURES)
    extra = names[3] if how == "a feature twice" else "one_more"
    platform.live(stage="100%", champion="m-old")
    platform.models["m-new"].feature_names = (*names, extra)
    platform.live(stage="100%", champion="m-new")
    if how == "a feature twice":
        assert platform.scored(event(0, "spam")) == [("limit", True)], "the champion before it goes on"
        assert platform.client.state()["serving"]["champion"] == "m-old"
        assert f"wants feature '{extra}' twice" in str(platform.client.state()["degraded_reasons"])
    else:
        assert platform.scored(event(0, "spam")) == [("limit", True)]
        assert platform.models["m-new"].seen[-1] == (1, False), "it is asked on text alone"


@pytest.mark.parametrize("shape", [(1, len(FEATURES) + 1), (1, len(FEATURES) - 1), (2, len(FEATURES))])
def test_rows_of_another_width_never_reach_a_model(shape: tuple[int, int]) -> None:
    model = serve_model("m", lambda _: Keyword("m"), NAMES, FEATURES_VERSION)
    with pytest.raises(ScoringFailed, match="feature rows"):
        model.probabilities(["hello"], np.zeros(shape, np.float32))


def test_a_service_whose_store_is_down_starts_and_answers(tmp_path: Path) -> None:
    class Down(DirectoryStore):
        def get(self, key: str) -> Any:
            raise ConnectionError

        list = put = get  # type: ignore[assignment]

    app = create_app(
        Settings(home=tmp_path), store=Down(tmp_path / "s"), clock=MovableClock(), background=False
    )
    with InProcessClient(app) as client:
        assert client._exchange("GET", "/readyz").status_code == 503
        assert client._exchange("GET", "/healthz").status_code == 200
        (answer,) = client.score([event()])
        assert answer["action"] == "allow"
        assert client.state()["degraded"]
        assert client.flush() == 0
        assert client.state()["prediction_log"]["spooled"] == 1


def test_nothing_said_aloud_names_a_text_or_an_actor(
    platform: Platform, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    platform.live(stage="100%", champion="m-old")
    platform.models["m-old"].broken = "always"
    platform.scored(event(0, SECRET, actor_id="jane-doe-1234"))
    monkeypatch.setattr("serving.scorer.choose", lambda *_: 1 / 0)
    platform.models["m-old"].broken = None
    assert platform.scored(event(1, SECRET, actor_id="jane-doe-1234")) == [("allow", True)]
    said = caplog.text + str(platform.client.state())
    assert "scoring failed (ZeroDivisionError)" in said
    assert "swordfish" not in said
    assert "jane-doe" not in said


# -- real bundles --------------------------------------------------------------------------------------------


def small_bundle(folder: Path, *, seed: int, names: tuple[str, ...] = NAMES) -> str:
    """A true bundle without an encoder's voice: a fitted baseline and a few trees. Returns its model id."""
    rng = np.random.default_rng(seed)
    texts = [f"free {w} prize click now" for w in "abcdefgh"] + [f"lunch at {w} today" for w in "abcdefgh"]
    targets = np.zeros((16, 3), np.float32)
    targets[:8, 0] = 1
    ones = np.ones(16, np.float32)
    linear = baseline.fit(baseline.Design.of(texts), np.arange(16), targets, ones)
    forest = trees.fit(rng.normal(size=(16, len(FEATURES))), targets, ones, rounds=2)

    def voice(*weights: float) -> fusion.Voice:
        parts = ("linear", "trees")[: len(weights)]
        return fusion.Voice(parts, (weights,) * 3, (0.0,) * 3, (1.0,) * 3, (0.0,) * 3)

    fused = fusion.Fusion(voice(1.0, 0.01 * seed), voice(1.0), (0.5, 0.5, 0.5))
    contents = {
        bundle.LINEAR: linear.to_bytes(),
        bundle.TREES: forest.to_bytes(),
        bundle.FUSION: json.dumps(fused.to_dict()).encode(),
    }
    folder.mkdir(parents=True)
    for name in {*bundle.REQUIRED, *bundle.ENCODER_FILES, bundle.TREES}:
        (folder / name).write_bytes(contents.get(name, b"unused"))
    manifest = bundle.write_manifest(
        folder, policies=POLICIES, features_version=FEATURES_VERSION,
        feature_names=names, selected="fusion", snapshot="s", code_version="c",
        parent=None, created_at="2026-03-02T00:00:00+00:00",
    )  # fmt: skip
    return manifest.model_id


def test_a_bundle_that_lists_a_feature_twice_is_refused_however_well_it_is_sealed(tmp_path: Path) -> None:
    small_bundle(tmp_path / "b", seed=1, names=(*NAMES, NAMES[0]))
    with pytest.raises(BundleError, match=f"lists feature '{NAMES[0]}' twice"):
        bundle.verify(tmp_path / "b")


def test_real_bundles_are_fetched_verified_and_swapped_and_a_tampered_one_is_refused(tmp_path: Path) -> None:
    platform = Platform(tmp_path / "home")
    platform.load = None  # type: ignore[assignment]  # the service's own way to its bundles
    ids = [small_bundle(tmp_path / f"b{seed}", seed=seed) for seed in (1, 2)]
    for seed in (1, 2):
        signer_of(platform.settings).sign(tmp_path / f"b{seed}")
        bundle.publish(platform.store, tmp_path / f"b{seed}", trust_of(platform.settings))
    try:
        platform.live(stage="100%", champion=ids[0])
        assert platform.scored(event(0, "free x prize click now"), event(1, "lunch at x today")) == [
            ("block", False),
            ("allow", False),
        ]
        key = f"models/{ids[1]}/{bundle.LINEAR}"
        whole = platform.store.get(key).data
        platform.store.put(key, whole[:-1] + b"x")
        platform.live(stage="100%", champion=ids[1])
        assert platform.scored(event(2, "free y prize click now")) == [("block", True)]
        assert "was changed" in str(platform.client.state()["degraded_reasons"])
        platform.store.put(key, whole)
        platform.client.refresh()
        assert platform.scored(event(3, "free z prize click now")) == [("block", False)]
        assert dict(platform.logged().select("event_id", "model_id").iter_rows()) == {
            "e0": ids[0], "e1": ids[0], "e2": ids[0], "e3": ids[1],
        }  # fmt: skip
    finally:
        platform.close()


# -- behaviour online ----------------------------------------------------------------------------------------


def ingest(store: ObjectStore, events: list[dict[str, Any]]) -> None:
    columns = polars_schema("events")
    frame = pl.DataFrame(
        [dict.fromkeys(columns) | {"received_at": e["ts"]} | e for e in events], schema=columns
    )
    for (hour,), rows in frame.group_by(pl.col("ts").dt.truncate("1h")):
        write_part(store, "ingested/events", hour, rows)  # type: ignore[arg-type]


def served_features(platform: Platform, event_id: str) -> list[np.ndarray]:
    rows = platform.logged().filter(pl.col("event_id") == event_id)["features"].to_list()
    return [np.array(row) for row in rows]


def named(row: np.ndarray, name: str) -> float:
    return float(row[NAMES.index(name)])


@pytest.mark.parametrize("started", ["before", "after"])
def test_a_service_without_a_journal_fills_its_windows_from_what_was_ingested(
    platform: Platform, started: str
) -> None:
    past = [event(n, actor_id="busy", ts=NOON - timedelta(minutes=50 - n)) for n in range(40)]
    platform.client.score(past)
    platform.client.score([event(99, actor_id="busy")])
    platform.client.flush()
    platform.close()
    shutil.rmtree(platform.settings.home / "journal")
    if started == "before":
        assert platform.client.state()["events_observed"] == 0
    ingest(platform.store, past)
    platform.client.score([event(99, actor_id="busy")])
    lived, fresh = served_features(platform, "e99")
    np.testing.assert_array_equal(lived, fresh)
    assert named(fresh, "actor_events_1h") == 41
    assert platform.client.state()["events_observed"] == 41


def test_a_restarted_service_takes_the_journal_in_its_own_order_and_what_came_beside_it(
    platform: Platform,
) -> None:
    """A straggler counts where it was observed, not where it was received."""

    def at(n: int, minutes: float, **more: Any) -> dict[str, Any]:
        return event(n, actor_id="busy", ts=NOON - timedelta(minutes=minutes), **more)

    platform.client.score([at(0, 100)])
    platform.client.score([at(1, 20)])
    platform.client.score([at(2, 75)])
    platform.client.score([event(98, actor_id="busy")])
    platform.close()
    ingest(platform.store, [at(0, 100), at(2, 75), at(3, 30), at(4, 150)])
    platform.client.score([event(99, actor_id="busy")])
    (before,), (after,) = served_features(platform, "e98"), served_features(platform, "e99")
    assert named(before, "actor_events_1h") == 3, "the straggler is counted at the clock of its actor"
    assert (named(after, "actor_events_1h"), named(after, "actor_events_24h")) == (5, 7)


def test_received_at_decides_what_is_late_and_in_which_order(platform: Platform) -> None:
    old = NOON - timedelta(hours=3)
    platform.client.score([
        event(0, actor_id="a", ts=old, received_at=NOON),
        event(2, actor_id="a", ts=NOON, received_at=NOON + timedelta(seconds=2)),
        event(1, actor_id="a", ts=NOON, received_at=NOON + timedelta(seconds=1)),
    ])  # fmt: skip
    rows = {n: served_features(platform, f"e{n}")[0] for n in range(3)}
    assert [named(rows[n], "actor_events_24h") for n in range(3)] == [1, 1, 2]


def test_a_receipt_from_the_far_future_does_not_stop_the_windows(platform: Platform) -> None:
    platform.client.score([event(0, actor_id="a", received_at=NOON + timedelta(days=300))])
    assert named(served_features(platform, "e0")[0], "actor_events_24h") == 1
    for n in (1, 2):
        platform.client.score([event(n, actor_id="a", ts=NOON + timedelta(minutes=n))])
    assert named(served_features(platform, "e2")[0], "actor_events_24h") == 2, (
        "it was late, and left no trace"
    )


def test_a_journal_that_cannot_be_written_is_told_and_costs_no_answer(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    folder = platform.settings.home / "journal"
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.write_text("a file where the directory should be")
    assert platform.scored(event(0, "spam")) == [("limit", False)]
    assert "journal: it could not be written" in str(platform.client.state()["degraded_reasons"])
    folder.unlink()
    assert platform.scored(event(1, "spam")) == [("limit", False)]
    assert not platform.client.state()["degraded"]


def test_the_day_s_graph_is_read_and_its_absence_is_nan(platform: Platform) -> None:
    platform.client.score([event(0)])
    assert np.isnan(named(served_features(platform, "e0")[0], "graph_reach_log"))
    ingest(
        platform.store,
        [event(7, actor_id="friend", recipient_id="r", kind="dm", ts=NOON - timedelta(days=1))],
    )
    graph.build(platform.store, NOON.date())
    platform.client.refresh()
    assert platform.client.state()["graph_days"] == [f"{NOON:%Y-%m-%d}"]
    platform.client.score([event(1, actor_id="friend")])
    assert named(served_features(platform, "e1")[0], "graph_reach_log") == pytest.approx(np.log(2))


def test_what_is_journaled_is_read_back_whatever_was_torn_and_old_hours_go(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    rows = [prepare(event(n, f"see evil{n}.com/x and tell everyone", ip_hash="i")) for n in range(6)]
    journal.append(rows[:2], NOON - KEPT - timedelta(hours=1))
    journal.append(rows[2:4], NOON)
    with (tmp_path / f"{NOON:%Y-%m-%dT%H}.jsonl").open("ab") as file:
        file.write(b'{"event_id": "torn')
    Journal(tmp_path).append(rows[4:], NOON)
    replay = Journal(tmp_path).read(NOON)
    assert replay.events == [row._replace(direct=()) for row in rows[2:]]
    assert replay.broken == 1
    assert len(list(tmp_path.iterdir())) == 1
    other = (tmp_path / f"{NOON:%Y-%m-%dT%H}.jsonl").read_text().replace(FEATURES_VERSION, "1-other")
    (tmp_path / f"{NOON:%Y-%m-%dT%H}.jsonl").write_text(other)
    assert Journal(tmp_path).read(NOON).events == [], "windows of other declarations are not these"


# -- behaviour in Redis --------------------------------------------------------------------------------------


@pytest.fixture
def redis_server() -> Iterator[RedisServer]:
    server = RedisServer.start()
    yield server
    server.stop()


def test_replicas_share_the_windows_and_the_first_fills_them(
    tmp_path: Path, redis_server: RedisServer
) -> None:
    first, second = (Platform(tmp_path / name, redis_url=redis_server.url) for name in ("a", "b"))
    alone = Platform(tmp_path / "c")
    past = [event(n, actor_id="busy", ts=NOON - timedelta(minutes=50 - n)) for n in range(40)]
    try:
        for platform in (first, second, alone):
            ingest(platform.store, past)
        first.client.score([event(50, actor_id="busy")])
        second.client.score([event(51, actor_id="busy")])
        alone.client.score([event(50, actor_id="busy"), event(51, actor_id="busy")])
        (wanted,), (found,) = served_features(alone, "e51"), served_features(second, "e51")
        np.testing.assert_array_equal(found, wanted)
        assert named(found, "actor_events_1h") == 42
        assert second.client.state()["events_observed"] == 1, "the windows were filled already"
    finally:
        for platform in (first, second, alone):
            platform.close()


def test_without_redis_text_alone_is_scored_and_said_until_it_is_back(
    tmp_path: Path, redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("redqueen.features.onredis.QUIET_S", 0.0)
    platform = Platform(tmp_path, redis_url=redis_server.url)
    try:
        platform.live(stage="100%", champion="m-old")
        assert platform.scored(event(0, "spam")) == [("limit", False)]
        platform.client.refresh()
        assert not platform.client.state()["degraded"], "there was no past to begin with"
        redis_server.stop()
        assert platform.scored(event(1, "spam")) == [("limit", True)]
        platform.client.refresh()
        reasons = str(platform.client.state()["degraded_reasons"])
        assert "Redis did not take the events" in reasons
        assert "text alone is scored" in reasons
        again = RedisServer.start(redis_server.port)
        try:
            assert platform.scored(event(2, "spam")) == [("limit", False)]
            platform.client.refresh()
            (reason,) = platform.client.state()["degraded_reasons"]
            assert reason == "windows: they began without their past, and are whole from 2026-03-03 14:00 on"
            platform.clock.at += timedelta(hours=27)
            platform.client.refresh()
            assert not platform.client.state()["degraded"]
        finally:
            again.stop()
    finally:
        platform.close()


def test_a_service_whose_redis_is_down_starts_and_answers(tmp_path: Path) -> None:
    platform = Platform(tmp_path, redis_url=f"redis://:swordfish@127.0.0.1:{free_port()}/0")
    try:
        platform.live(stage="100%", champion="m-old")
        assert platform.scored(event(0, "spam")) == [("limit", True)]
        assert platform.client.state()["degraded"]
        assert "swordfish" not in str(platform.client.state())
    finally:
        platform.close()


def test_a_date_from_the_far_future_does_not_stop_the_windows(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    far = event(0, "spam", ts=NOON + timedelta(days=300))
    assert platform.scored(far) == [("limit", True)]
    assert platform.client.state()["events_observed"] == 0
    assert platform.scored(event(1, "spam")) == [("limit", False)]
    assert platform.client.state()["events_observed"] == 1


# -- the prediction log --------------------------------------------------------------------------------------


class Flaky(DirectoryStore):
    """A directory that refuses to take predictions while `down`."""

    down = False

    def put(self, key: str, data: bytes) -> str:
        if self.down and key.startswith("predictions/"):
            raise ConnectionError
        return super().put(key, data)


def row(n: int, **changes: Any) -> dict[str, Any]:
    return {
        "event_id": f"e{n}", "actor_id": "a", "ts": NOON, "model_id": "m", "arm": "champion", "stage": "100%",
        "scores": [("spam", 0.5)], "action": "allow", "features": [0.5], "features_version": "1",
        "latency_us": 1, "propensity": 0.1, "degraded": False, "obfuscation": 0.0, "fingerprint": 7,
        "threshold_ratio": 0.8,
        **changes,
    }  # fmt: skip


def stored(store: ObjectStore) -> list[str]:
    rows = read_hours(store, "predictions", NOON - timedelta(hours=3), NOON + timedelta(hours=3))
    return rows["event_id"].to_list()


def test_rows_land_in_the_hour_in_which_they_were_received(platform: Platform) -> None:
    platform.scored(event(0, ts=NOON - timedelta(hours=3)))
    platform.clock.at = NOON + timedelta(hours=1)
    platform.scored(event(1))
    platform.client.flush()
    for n, hour in ((0, NOON), (1, NOON + timedelta(hours=1))):
        rows = read_hours(platform.store, "predictions", hour, hour + timedelta(hours=1))
        assert rows["event_id"].to_list() == [f"e{n}"]


def test_a_flush_is_due_by_count_by_age_and_when_the_hour_is_over(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "s")
    by_count = PredictionLog(store, tmp_path / "a", max_rows=3, max_age_s=1e9)
    by_count.append([row(0), row(1)], NOON)
    assert not by_count.due()
    by_count.append([row(2)], NOON)
    assert by_count.due()
    by_age = PredictionLog(store, tmp_path / "b", max_rows=100, max_age_s=0)
    by_age.append([row(0)], NOON)
    assert by_age.due()
    by_hour = PredictionLog(store, tmp_path / "c", max_rows=100, max_age_s=1e9)
    by_hour.append([row(0)], NOON)
    by_hour.append([row(1)], NOON + timedelta(hours=1))
    assert by_hour.due()


def test_a_store_that_is_down_costs_no_prediction_and_none_comes_twice(tmp_path: Path) -> None:
    store = Flaky(tmp_path / "s")
    log = PredictionLog(store, tmp_path / "spool", max_age_s=0)
    store.down = True
    for n in range(3):
        log.append([row(n)], NOON)
        assert log.flush() == 0
    assert log.state().spooled == 3
    assert log.state().store_failures > 0
    assert log.due(), "what waits on disk is tried again"

    restarted = PredictionLog(store, tmp_path / "spool")
    assert restarted.state().spooled == 3
    store.down = False
    restarted.append([row(3)], NOON)
    assert restarted.flush() == 4
    assert log.flush() == 0, "the other process finds them gone"
    assert sorted(stored(store)) == ["e0", "e1", "e2", "e3"]
    assert not list((tmp_path / "spool").rglob("*.parquet"))


def test_when_store_and_disk_are_full_memory_keeps_the_newest_and_counts_the_rest(tmp_path: Path) -> None:
    store = Flaky(tmp_path / "s")
    store.down = True
    (tmp_path / "spool").write_text("a file where the directory should be")
    log = PredictionLog(store, tmp_path / "spool", keep_rows=5)
    for n in range(8):
        log.append([row(n)], NOON)
        log.flush()
    assert (log.state().buffered, log.state().lost) == (5, 3)
    store.down = False
    assert log.flush() == 5
    assert sorted(stored(store)) == ["e3", "e4", "e5", "e6", "e7"]


def test_a_row_that_does_not_fit_does_not_take_the_others_with_it(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "s")
    log = PredictionLog(store, tmp_path / "spool")
    log.append([row(0), row(1, latency_us="soon"), row(2)], NOON)
    assert log.flush() == 2
    assert log.state().lost == 1


def test_leaving_flushes(platform: Platform) -> None:
    platform.scored(event(0))
    assert platform.client.state()["prediction_log"]["buffered"] == 1
    platform.close()
    assert stored(platform.store) == ["e0"]


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
    store = DirectoryStore(home / "store")
    code = (
        "from redqueen.settings import load_settings; from serving.app import serve; "
        f"serve(load_settings(), port={port})"
    )
    wanted = {"HOME": home, "CLOCK": "wall", "SERVING_FLUSH_SECONDS": 600, "SERVING_REFRESH_SECONDS": 0.1}
    env = {**os.environ, **{f"RQ_{name}": str(value) for name, value in wanted.items()}}
    process = subprocess.Popen([sys.executable, "-c", code], env=env)
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(lambda: answers(f"{url}/readyz"), 60, "the service's start")
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
    finally:
        process.kill()
        process.wait()
    now = hour_of(datetime.now(UTC))
    rows = read_hours(store, "predictions", now - timedelta(hours=2), now + timedelta(hours=1))
    assert rows.height == 1201


SERVICE = (
    "from redqueen.settings import load_settings; from serving.app import serve; "
    "serve(load_settings(), port={})"
)


@pytest.mark.slow
def test_a_service_killed_between_two_requests_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    """SIGKILL, twice; the features of what comes later are those of a service that lived."""
    now = datetime.now(UTC)
    text = "the very same words again: see evil{}.com/1"
    events = [
        event(
            n, text.format(n % 3), actor_id=f"actor-{n % 7}", recipient_id=f"r{n % 5}", kind="dm",
            ip_hash=f"i{n % 4}", ts=now - timedelta(minutes=(600 - n) / 10),
            received_at=now - timedelta(minutes=(600 - n) / 10 - n % 3),
        )
        for n in range(600)
    ]  # fmt: skip
    lived = Platform(tmp_path / "lived")
    lived.clock.at = now
    for start in range(0, 600, 50):
        lived.client.score(events[start : start + 50])
    lived.client.flush()
    home, port = tmp_path / "killed", free_port()
    env = {**os.environ, "RQ_HOME": str(home), "RQ_CLOCK": "wall"}
    for lap in range(3):
        process = subprocess.Popen([sys.executable, "-c", SERVICE.format(port)], env=env)
        try:
            url = f"http://127.0.0.1:{port}"
            wait_for(lambda url=url: answers(f"{url}/readyz"), 60, "the service's start")
            with HttpClient(url) as client:
                for start in range(200 * lap, 200 * lap + 200, 50):
                    client.score(events[start : start + 50])
                client.flush()
        finally:
            process.kill()
            process.wait()
    hours = hour_of(now) - timedelta(hours=2), hour_of(now) + timedelta(hours=2)
    wanted, found = (
        read_hours(DirectoryStore(at / "store"), "predictions", *hours).sort("event_id")
        for at in (tmp_path / "lived", home)
    )
    lived.close()
    assert found["event_id"].to_list() == wanted["event_id"].to_list()
    np.testing.assert_array_equal(
        np.array(found["features"].to_list()), np.array(wanted["features"].to_list())
    )
