"""Whatever breaks around scoring, messages flow, no prediction is lost, and the service says what broke."""

from __future__ import annotations

import json
import logging
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from models import baseline, bundle, fusion, trees
from models.signing import signer_of, trust_of
from redqueen.errors import BundleError
from redqueen.features import FEATURES, FEATURES_VERSION, NAMES
from redqueen.rollout import RolloutState, assign
from redqueen.settings import Settings
from redqueen.state import LIVE_KEY
from redqueen.store import DirectoryStore, ObjectStore
from redqueen.tables import read_hours
from serving.app import create_app
from serving.client import InProcessClient
from serving.live import ScoringFailed, serve_model
from serving.predictions import PredictionLog
from tests.miniature import NOON, POLICIES, SECRET, Keyword, MovableClock, Platform, event

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
def test_a_service_that_starts_on_a_damaged_rollout_state_says_that_it_knows_of_no_model(
    platform: Platform, damage: str
) -> None:
    for version in (1, 2):
        platform.store.put_json(f"rollout/log/{version:06d}.json", {})
    if damage == "garbage":
        platform.store.put(LIVE_KEY, b"{")
    assert platform.scored(event(0, "spam")) == [("allow", True)]
    assert platform.logged()["degraded"].all()
    assert "what is live is not known" in platform.client.state()["note"]
    assert platform.client._exchange("GET", "/readyz").status_code == 503
    platform.live(stage="100%", champion="m-old")
    assert platform.scored(event(0, "spam")) == [("limit", False)]


def test_a_champion_that_cannot_be_loaded_is_named_and_not_taken_for_none(platform: Platform) -> None:
    platform.models["m-old"].refused = BundleError("it was changed")
    platform.live(stage="100%", champion="m-old")
    assert platform.scored(event(0, "spam")) == [("allow", True)]
    assert "m-old is live and could not be loaded" in platform.client.state()["note"]


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


def test_a_feature_that_is_no_longer_there_is_told_of(platform: Platform) -> None:
    platform.live(stage="100%", champion="m-old")
    lacking = platform.models["m-old"].lacking
    lacking.note(1_000, 10, {"graph_trust": 10})
    assert not platform.client.state()["degraded"], "a trifle wakes nobody"
    lacking.note(1_000, 300, {"graph_trust": 300, "graph_lockstep": 0})
    found = platform.client.state()
    assert (found["counts"]["behaviour_scored"], found["counts"]["behaviour_lacking"]) == (2_000, 310)
    assert "behaviour, m-old: 310 of 2000 messages lacked graph_trust, which" in str(
        found["degraded_reasons"]
    )


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


def test_a_store_that_hangs_does_not_stop_whoever_scores(tmp_path: Path) -> None:
    class Hanging(DirectoryStore):
        hangs = True

        def put(self, key: str, data: bytes) -> str:
            assert not self.hangs, "whoever scores asked the store"
            return super().put(key, data)

    store = Hanging(tmp_path / "s")
    log = PredictionLog(store, tmp_path / "spool", max_rows=2)
    with log._writing:  # a flush that hangs holds this
        log.append([row(n) for n in range(8)], NOON)
        assert log.crowded()
        log.spill()
        assert not log.crowded()
    assert (log.state().buffered, log.state().spooled) == (0, 8)
    store.hangs = False
    assert log.flush() == 8
    assert stored(store) == [f"e{n}" for n in range(8)]


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
