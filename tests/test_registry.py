"""The registry tells what there is, and clears up without ever touching what is needed."""

from __future__ import annotations

import json
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cli.main import app
from models import bundle, registry
from models.bundle import MANIFEST, Manifest
from models.signing import SIGNATURE
from redqueen import state
from redqueen.errors import BundleError, InvalidInput, NotFound
from redqueen.rollout import RolloutState
from redqueen.settings import Settings
from redqueen.store import DirectoryStore, open_store
from tests.keys import keys
from tests.toy_model import toy_bundle

SIGNER, TRUST = keys()
NOW = datetime(2026, 6, 1, tzinfo=UTC)
OLD = NOW - timedelta(days=90)


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def model(
    store: DirectoryStore, folder: Path, name: str, *, parent: str | None = None, made: datetime = OLD
) -> str:
    """Publish a model that differs from others by its linear file alone."""
    copy = Path(shutil.copytree(toy_bundle(), folder / name))
    (copy / bundle.LINEAR).write_bytes(name.encode())
    old = Manifest.from_bytes((copy / MANIFEST).read_bytes())
    bundle.write_manifest(
        copy, policies=old.policies, features_version=old.features_version, feature_names=old.feature_names,
        selected=old.selected, snapshot=f"s-{name}", code_version=old.code_version, parent=parent,
        created_at=made.isoformat(),
    )  # fmt: skip
    SIGNER.sign(copy)
    return bundle.publish(store, copy, TRUST)


def candidate(store: DirectoryStore, name: str, model_id: str, status: str) -> None:
    state.advance_candidate(store, name, "launched", NOW, "asked")
    state.advance_candidate(store, name, status, NOW, "so it went", model_id=model_id)


def live(store: DirectoryStore, **roles: str) -> None:
    store.put_json(state.LIVE_KEY, RolloutState(**roles).to_dict())  # type: ignore[arg-type]


def test_what_is_live_on_its_way_or_an_ancestor_is_never_collected(
    store: DirectoryStore, tmp_path: Path
) -> None:
    grandparent = model(store, tmp_path, "grandparent")
    parent = model(store, tmp_path, "parent", parent=grandparent)
    champion = model(store, tmp_path, "champion", parent=parent)
    challenger = model(store, tmp_path, "challenger", parent=champion)
    previous = model(store, tmp_path, "previous")
    under_way = model(store, tmp_path, "under_way")
    rejected = model(store, tmp_path, "rejected", parent=champion)
    young = model(store, tmp_path, "young", made=NOW - timedelta(days=3))
    for model_id, status in ((under_way, "attacked"), (rejected, "rejected"), (young, "rejected")):
        candidate(store, f"of-{model_id}", model_id, status)
    live(store, champion=champion, challenger=challenger, previous=previous)

    found = registry.garbage(store, NOW)
    assert found.models == (rejected,)
    assert found.kept[champion] == "it is the champion"
    assert champion in found.kept[parent]
    assert "attacked" in found.kept[under_way]
    assert registry.ids(store) == sorted(
        [grandparent, parent, champion, challenger, previous, under_way, rejected, young]
    )
    registry.collect(store, NOW)
    assert rejected not in registry.ids(store)
    assert len(registry.ids(store)) == 7
    assert registry.collect(store, NOW).models == ()
    for kept in registry.ids(store):
        bundle.fetch(store, kept, tmp_path / "cache", TRUST)


def test_a_collection_that_was_killed_leaves_no_half_model_behind_for_ever(
    store: DirectoryStore, tmp_path: Path
) -> None:
    gone = model(store, tmp_path, "gone")
    store.delete(f"models/{gone}/{MANIFEST}")  # where a collection, or an upload, was killed
    assert registry.collect(store, NOW).orphans == ()
    assert registry.entries(store)[0].problem.startswith("no manifest")
    assert registry.collect(store, NOW + timedelta(hours=1)).orphans == ()
    assert registry.collect(store, NOW + timedelta(days=2)).orphans == (gone,)
    assert store.list("models/") == []
    assert state.read(store, registry.ORPHANS_KEY) == {}


def test_an_upload_that_finishes_meanwhile_is_no_orphan(store: DirectoryStore, tmp_path: Path) -> None:
    late = model(store, tmp_path, "late", made=NOW)
    sealed = store.get(f"models/{late}/{MANIFEST}").data
    store.delete(f"models/{late}/{MANIFEST}")
    registry.collect(store, NOW)
    store.put(f"models/{late}/{MANIFEST}", sealed)
    assert registry.collect(store, NOW + timedelta(days=2)).orphans == ()
    assert bundle.fetch(store, late, tmp_path / "cache", TRUST).name == late


def test_a_model_that_was_just_published_stays_though_its_candidate_does_not_know_it_yet(
    store: DirectoryStore, tmp_path: Path
) -> None:
    asked = NOW - timedelta(days=40)
    new, old = model(store, tmp_path, "new", made=asked), model(store, tmp_path, "old")
    state.advance_candidate(store, "slow", "launched", NOW, "told", created_at=asked.isoformat())
    assert "slow may have just published it" in registry.garbage(store, NOW, 0).kept[new]
    assert registry.collect(store, NOW, 0).models == (old,)
    state.advance_candidate(store, "slow", "failed", NOW, "told")
    assert registry.collect(store, NOW, 0).models == (new,)


def test_what_comes_back_while_a_collection_runs_is_not_removed_nor_said_to_be(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again, gone = sorted(model(store, tmp_path, name) for name in ("again", "gone"))
    candidate(store, "of-again", again, "rejected")
    found = registry.garbage(store, NOW)
    assert set(found.models) == {again, gone}

    def meanwhile(*_: object) -> registry.Garbage:
        candidate(store, "of-again", again, "trained")  # the lap was run again, and made the same model
        return found

    monkeypatch.setattr(registry, "garbage", meanwhile)
    assert registry.collect(store, NOW).models == (gone,)
    assert registry.ids(store) == [again]


def test_a_model_that_was_tampered_with_stays_as_evidence(store: DirectoryStore, tmp_path: Path) -> None:
    bad = model(store, tmp_path, "bad")
    store.put(f"models/{bad}/{MANIFEST}", store.get(f"models/{bad}/{MANIFEST}").data + b" ")
    assert registry.collect(store, NOW).models == ()
    assert "changed" in registry.entries(store)[0].problem


def test_a_diff_names_what_changed_and_nothing_else(store: DirectoryStore, tmp_path: Path) -> None:
    first, second = model(store, tmp_path, "a"), model(store, tmp_path, "b", parent="m-0")
    changed = {change.what for change in registry.diff(store, first, second, tmp_path / "cache", TRUST)}
    assert changed == {"snapshot", "parent", f"file {bundle.LINEAR}"}
    assert registry.diff(store, first, first, tmp_path / "cache", TRUST) == []
    with pytest.raises(NotFound):
        registry.diff(store, first, "m-000000000000", tmp_path / "cache", TRUST)


@pytest.mark.parametrize("name", [bundle.METRICS, bundle.FUSION, bundle.CARD, MANIFEST])
def test_what_a_model_says_of_itself_is_shown_only_if_it_verifies(
    store: DirectoryStore, tmp_path: Path, name: str
) -> None:
    forged = model(store, tmp_path, "forged")
    store.put(f"models/{forged}/{name}", b'{"thresholds": [0.9, 0.9]}')
    with pytest.raises(BundleError, match="refused"):
        registry.describe(store, forged, tmp_path / "cache", TRUST)


@pytest.mark.parametrize("damage", ["changed", "gone"])
def test_while_a_needed_model_cannot_be_read_nothing_is_removed(
    store: DirectoryStore, tmp_path: Path, damage: str
) -> None:
    parent = model(store, tmp_path, "parent")
    champion = model(store, tmp_path, "champion", parent=parent)
    live(store, champion=champion)
    assert registry.garbage(store, NOW).kept[parent] == f"it is the parent of {champion}"
    key = f"models/{champion}/{MANIFEST}"
    if damage == "gone":
        store.delete(key)
    else:
        store.put(key, store.get(key).data + b" ")
    with pytest.raises(BundleError, match="nothing is removed"):
        registry.collect(store, NOW)
    assert parent in registry.ids(store)


def test_a_model_of_two_candidates_stays_while_one_of_them_may_move(
    store: DirectoryStore, tmp_path: Path
) -> None:
    same = model(store, tmp_path, "same")
    for name, status in (("2026-06-01T01-a", "waiting"), ("2026-06-01T02-b", "rejected")):
        candidate(store, name, same, status)
    assert registry.garbage(store, NOW).kept == {same: "its candidate is waiting"}


def test_what_a_record_calls_live_stays_though_the_pointer_is_gone(
    store: DirectoryStore, tmp_path: Path
) -> None:
    parent = model(store, tmp_path, "parent")
    champion = model(store, tmp_path, "champion", parent=parent)
    candidate(store, "of-champion", champion, "live")
    assert registry.garbage(store, NOW).kept == {
        champion: "its candidate is live", parent: f"it is the parent of {champion}",
    }  # fmt: skip


def test_a_damaged_copy_is_mended_from_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("RQ_HOME", str(home))
    monkeypatch.setenv("RQ_VERIFY_KEY", str(TRUST.public_key))
    store = open_store(Settings(home=home))
    assert isinstance(store, DirectoryStore)
    good, other = model(store, tmp_path, "a"), model(store, tmp_path, "b")
    bundle.fetch(store, good, home / "cache", TRUST)
    store.put(f"models/{good}/{bundle.FUSION}", b"{}")
    assert f"redqueen models repair {good}" in bundle.problem(store, good, TRUST)
    run = CliRunner().invoke
    wrong = run(app, ["models", "repair", good, "--from", str(tmp_path / "b")])
    assert f"holds {other}, not {good}" in str(wrong.exception)
    assert "holds no copy" in str(run(app, ["models", "repair", other]).exception)
    assert "is whole in the store" in run(app, ["models", "repair", good]).stdout
    assert bundle.problem(store, good, TRUST) == ""


def test_the_beginning_of_just_one_id_names_it(store: DirectoryStore) -> None:
    for name in ("m-abc111111111", "m-abd222222222"):
        store.put(f"models/{name}/{MANIFEST}", b"{}")
    assert registry.resolve(store, "m-abc") == "m-abc111111111"
    for given, told in (("m-ab", "m-abc111111111, m-abd222222222"), ("m-x", "models list"), ("", "no model")):
        with pytest.raises(InvalidInput, match=told):
            registry.resolve(store, given)


def test_the_commands_list_show_diff_and_clear_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setenv("RQ_HOME", str(home))
    monkeypatch.setenv("COLUMNS", "200")
    store = open_store(Settings(home=home))
    assert isinstance(store, DirectoryStore)
    monkeypatch.setenv("RQ_VERIFY_KEY", str(TRUST.public_key))
    first, second = model(store, tmp_path, "a"), model(store, tmp_path, "b")
    live(store, champion=second)
    run = CliRunner().invoke
    listed = json.loads(run(app, ["models", "list", "--json"]).stdout)
    assert {e["model_id"]: e["role"] for e in listed} == {first: "unknown", second: "champion"}
    shown = run(app, ["models", "show", second]).stdout
    assert second in shown
    assert "# Abuse detector" in shown
    assert "s-a" in run(app, ["models", "diff", first, second]).stdout
    monkeypatch.setenv("COLUMNS", "60")
    narrow = run(app, ["models", "list"]).stdout
    assert first in narrow
    assert second in narrow
    assert "would go" in run(app, ["models", "gc", "--keep-days", "0"]).stdout
    assert first in registry.ids(store)
    assert "removed" in run(app, ["models", "gc", "--keep-days", "0", "--apply"]).stdout
    assert registry.ids(store) == [second]
    assert store.exists(f"models/{second}/{SIGNATURE}")
