"""The doctor: an empty home is fit, and what is broken is named with its remedy."""

from __future__ import annotations

import errno
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import redis

from models.signing import keys_told
from redqueen import state
from redqueen.clock import StoreClock
from redqueen.doctor import Finding, examine
from redqueen.policy import Hold
from redqueen.rollout import RolloutState
from redqueen.settings import Settings
from redqueen.store import DirectoryStore, ObjectStore, open_store
from tests.services import RedisServer, S3Server, free_port

NOW = datetime.now(UTC)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


def found(settings: Settings) -> dict[str, Finding]:
    return {finding.name: finding for finding in examine(settings, damaged, lambda: keys_told(settings))}


def damaged(store: ObjectStore, model_id: str) -> str:
    """A model is whole here if it has a manifest."""
    return "" if store.exists(f"models/{model_id}/manifest.json") else f"{model_id} is gone"


def test_a_home_that_is_not_there_is_told_of_and_not_made(settings: Settings) -> None:
    findings = found(settings)
    assert not [f for f in findings.values() if f.ok is False]
    assert "there is no home at" in findings["store"].message
    assert not settings.home.exists()


def test_an_empty_home_is_fit_and_keeps_nothing_of_the_examination(settings: Settings) -> None:
    settings.home.mkdir()
    findings = found(settings)
    assert not [f for f in findings.values() if f.ok is False]
    assert "conditional writes hold" in findings["store"].message
    assert "no model is live" in findings["rollout"].message
    assert open_store(settings).list("") == []


def test_a_home_that_cannot_be_a_directory_is_broken(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file")
    findings = found(Settings(home=tmp_path / "home"))
    assert findings["store"].ok is False
    assert "RQ_HOME" in findings["store"].message


def test_a_store_that_does_not_answer_is_broken_and_what_does_not_need_it_is_looked_at(
    tmp_path: Path,
) -> None:
    settings = Settings(
        home=tmp_path, store_url="s3://bucket/x", s3_endpoint_url=f"http://127.0.0.1:{free_port()}"
    )
    findings = found(settings)
    assert findings["store"].ok is False
    assert "RQ_STORE_URL" in findings["store"].message
    assert list(findings) == ["settings", "home", "store", "redis", "encoder", "keys", "alerts"]


def test_on_a_full_disk_the_rest_is_still_looked_at(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_store(settings).put_json(state.LIVE_KEY, RolloutState(champion="m1", version=1).to_dict())

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DirectoryStore, "_write", full)
    findings = found(settings)
    assert "No space left on device" in findings["store"].message
    assert "S3" not in findings["store"].message
    assert "m1 is gone" in findings["models"].message


@pytest.mark.parametrize(
    ("key", "left"),
    [
        (state.candidate_key("2026-01-03T14-drift-0001"), b'{"cand'),
        (state.LOOP_KEY, b'{"retrains": {"x": "soon"}}'),
        (state.CLAIM_KEY, b'{"a": 1}'),
        ("signals/window=2026-01-03T14.json", b"{"),
    ],
)
def test_a_small_record_that_cannot_be_read_is_named(settings: Settings, key: str, left: bytes) -> None:
    store = open_store(settings)
    assert found(settings)["records"].ok is True
    store.put(key, left)
    finding = found(settings)["records"]
    assert finding.ok is False
    assert f"'{key}' in the store was damaged" in finding.message


def test_keys_that_may_not_be_read_do_not_keep_the_rest_from_being_looked_at(settings: Settings) -> None:
    def kept_away() -> tuple[bool | None, str]:
        raise PermissionError(errno.EACCES, "Permission denied", "signing.pem")

    settings.home.mkdir()
    findings = {f.name: f for f in examine(settings, damaged, kept_away)}
    assert findings["keys"].ok is False
    assert "signing.pem" in findings["keys"].message
    assert findings["alerts"].ok is None


def test_a_bucket_of_its_own_is_fit(tmp_path: Path, s3_server: S3Server) -> None:
    bucket = s3_server.new_bucket()
    settings = Settings(home=tmp_path, store_url=f"s3://{bucket}/rq", s3_endpoint_url=s3_server.url)
    assert found(settings)["store"].ok is True


def test_a_live_model_that_is_gone_is_broken(settings: Settings) -> None:
    store: ObjectStore = open_store(settings)
    store.put_json(state.LIVE_KEY, RolloutState(champion="m1", stage="100%", version=1).to_dict())
    finding = found(settings)["models"]
    assert finding.ok is False
    assert "the champion: m1 is gone" in finding.message
    assert "none to go back to" in finding.message
    store.put_json(state.LIVE_KEY, RolloutState(champion="m1", previous="m0", stage="100%").to_dict())
    assert "none to go back to" in found(settings)["models"].message
    store.put("models/m0/manifest.json", b"{}")
    assert "`redqueen rollback` goes back to m0" in found(settings)["models"].message
    store.put("models/m1/manifest.json", b"{}")
    assert found(settings)["models"].ok is True


def test_what_on_call_should_know_is_a_note(settings: Settings) -> None:
    store = open_store(settings)
    assert isinstance(store, DirectoryStore)
    state.freeze(store, Hold("all", "ana", "incident", NOW + timedelta(hours=2)))
    StoreClock(store).set(NOW)
    findings = found(settings)
    assert findings["holds"].ok is None
    assert "incident" in findings["holds"].message
    assert findings["clock"].ok is None
    assert findings["alerts"].ok is None


def test_state_that_cannot_be_read_is_broken_and_the_rest_is_still_looked_at(settings: Settings) -> None:
    open_store(settings).put(state.LIVE_KEY, b"not json")
    findings = found(settings)
    assert findings["rollout"].ok is False
    assert findings["holds"].ok is True


def test_keys_that_are_named_and_not_there_are_broken_and_a_homes_own_come_with_the_first_training(
    tmp_path: Path,
) -> None:
    assert found(Settings(home=tmp_path / "home"))["keys"].ok is None
    absent = tmp_path / "nowhere.pem"
    for setting in ({"signing_key": absent}, {"verify_key": absent}):
        finding = found(Settings(home=tmp_path / "home", **setting))["keys"]
        assert finding.ok is False
        assert str(absent) in finding.message


def test_a_redis_is_looked_at_where_one_is_set(tmp_path: Path) -> None:
    def said(url: str | None) -> Finding:
        return found(Settings(home=tmp_path, redis_url=url))["redis"]  # type: ignore[arg-type]

    assert "is not used" in said(None).message
    assert said("http://me:swordfish@somewhere").ok is False
    assert "swordfish" not in said("http://me:swordfish@somewhere").message
    assert "does not answer" in said(f"redis://:swordfish@127.0.0.1:{free_port()}/0").message
    server = RedisServer.start()
    try:
        assert (said(server.url).ok, "appendonly" in said(server.url).message) == (None, True)
        client = redis.Redis.from_url(server.url)
        client.config_set("appendonly", "yes")
        assert said(server.url).ok is True
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert (said(server.url).ok, "noeviction" in said(server.url).message) == (None, True)
    finally:
        server.stop()
