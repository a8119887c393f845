"""The models of a store: what there is, how two differ, and which may go.

A model is there once its manifest is. Garbage collection removes only what nothing refers to: never what is
live, on its way, the one to go back to, or an ancestor of any of these; never one whose candidate may still
move; never one made lately.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from models.bundle import FUSION, MANIFEST, METRICS, Manifest, load_manifest, prefix
from redqueen import state
from redqueen.errors import BundleError, NotFound
from redqueen.store import ObjectStore

ROOT = "models/"
KEEP_DAYS = 30
ORPHANS_KEY = "state/orphaned_models.json"
ORPHANED_AFTER = timedelta(days=1)
"""An upload writes its manifest last; what has had none for so long died on the way."""


@dataclass(frozen=True)
class Entry:
    """One model of the registry; `role` is champion, challenger, previous, or its candidate's status."""

    model_id: str
    role: str
    candidate: str | None
    created_at: str
    selected: str
    parent: str | None
    problem: str = ""


def ids(store: ObjectStore) -> list[str]:
    """Every model id under `models/`, whether it is whole or not."""
    return sorted({key.removeprefix(ROOT).split("/", 1)[0] for key in store.list(ROOT)})


def entries(store: ObjectStore) -> list[Entry]:
    """The registry, newest first; what cannot be read is listed with its problem."""
    candidates = _by_model(store)
    roles = _roles(store)
    found = []
    for model_id in ids(store):
        record = candidates.get(model_id, {})
        role, candidate = roles.get(model_id) or str(record.get("status", "unknown")), record.get("candidate")
        try:
            manifest = load_manifest(store, model_id)
        except (NotFound, BundleError) as error:
            why = "no manifest: its upload did not finish" if isinstance(error, NotFound) else str(error)
            found.append(Entry(model_id, role, candidate, "", "", None, why))
            continue
        found.append(
            Entry(model_id, role, candidate, manifest.created_at, manifest.selected, manifest.parent)
        )
    return sorted(found, key=lambda entry: (entry.created_at, entry.model_id), reverse=True)


def _by_model(store: ObjectStore) -> dict[str, Mapping[str, Any]]:
    return {c["model_id"]: c for c in state.all_candidates(store) if c.get("model_id")}


def _roles(store: ObjectStore) -> dict[str, str]:
    live = state.rollout_state(store)
    named = {"previous": live.previous, "challenger": live.challenger, "champion": live.champion}
    return {model_id: role for role, model_id in named.items() if model_id is not None}


# -- one, and two --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A manifest with what the bundle measured of itself and at which thresholds it acts."""

    manifest: Manifest
    metrics: dict[str, Any]
    thresholds: dict[str, float]


def describe(store: ObjectStore, model_id: str) -> Model:
    """One published model.

    Raises:
        NotFound: there is no such model.
        BundleError: its manifest does not hold.
    """
    manifest = load_manifest(store, model_id)
    metrics = json.loads(store.get(prefix(model_id) + METRICS).data)
    fusion = json.loads(store.get(prefix(model_id) + FUSION).data)
    cuts = dict(zip(manifest.policies, map(float, fusion["thresholds"]), strict=True))
    return Model(manifest, metrics, cuts)


@dataclass(frozen=True)
class Change:
    """One thing in which two models differ."""

    what: str
    before: Any
    after: Any


def diff(store: ObjectStore, before: str, after: str) -> list[Change]:
    """What changed from one model to another: provenance, features, files, thresholds, figures."""
    old, new = describe(store, before), describe(store, after)
    changes = [
        Change(name, getattr(old.manifest, name), getattr(new.manifest, name))
        for name in ("selected", "snapshot", "code_version", "parent", "created_at", "features_version")
    ]
    gone = sorted(set(old.manifest.feature_names) - set(new.manifest.feature_names))
    come = sorted(set(new.manifest.feature_names) - set(old.manifest.feature_names))
    changes += [Change("features", _names(gone) or None, _names(come) or None)]
    files = sorted(old.manifest.files.keys() | new.manifest.files.keys())
    changes += [Change(f"file {f}", old.manifest.files.get(f), new.manifest.files.get(f)) for f in files]
    policies = sorted(old.thresholds.keys() | new.thresholds.keys())
    changes += [Change(f"threshold {p}", old.thresholds.get(p), new.thresholds.get(p)) for p in policies]
    told = dict(_leaves(old.metrics)), dict(_leaves(new.metrics))
    for name in sorted(told[0].keys() | told[1].keys()):
        changes.append(Change(name, told[0].get(name), told[1].get(name)))
    return [change for change in changes if change.before != change.after]


def _names(names: Sequence[str]) -> str:
    return ", ".join(names)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, float | str]]:
    """The figures of nested metrics, as dotted names; lists (curves) are left out."""
    if isinstance(value, dict):
        for name in sorted(value):
            yield from _leaves(value[name], f"{path}.{name}" if path else name)
    elif isinstance(value, int | float | str) and not isinstance(value, bool):
        yield path, value


# -- what may go ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Garbage:
    """What a collection removes (or would): models nobody needs, and leftovers of uploads that died."""

    models: tuple[str, ...]
    orphans: tuple[str, ...]
    kept: dict[str, str]


def garbage(store: ObjectStore, now: datetime, keep_days: float = KEEP_DAYS) -> Garbage:
    """Which models may go, and why each other one stays. Changes nothing."""
    keep = _needed(store)
    candidates, old = _by_model(store), now - timedelta(days=keep_days)
    since = {k: datetime.fromisoformat(v) for k, v in state.read(store, ORPHANS_KEY).items()}
    models, orphans = [], []
    for model_id in ids(store):
        status = candidates.get(model_id, {}).get("status")
        if model_id in keep:
            continue
        if status is not None and status not in state.FINISHED:
            keep[model_id] = f"its candidate is {status}"
        elif not store.exists(prefix(model_id) + MANIFEST):
            if model_id in since and now - since[model_id] >= ORPHANED_AFTER:
                orphans.append(model_id)
            else:
                keep[model_id] = "its upload may still be under way"
        elif _made(store, model_id) > old:
            keep[model_id] = f"made within {keep_days:g} days"
        else:
            models.append(model_id)
    return Garbage(tuple(models), tuple(orphans), keep)


def _needed(store: ObjectStore) -> dict[str, str]:
    """What is live, on its way or to be gone back to, and the ancestors of these, each with the reason."""
    needed = {model_id: f"it is the {role}" for model_id, role in _roles(store).items()}
    waiting = list(needed)
    while waiting:
        child = waiting.pop()
        try:
            parent = load_manifest(store, child).parent
        except (NotFound, BundleError):
            continue
        if parent is not None and parent not in needed:
            needed[parent] = f"it is the parent of {child}"
            waiting.append(parent)
    return needed


def _made(store: ObjectStore, model_id: str) -> datetime:
    try:
        return datetime.fromisoformat(load_manifest(store, model_id).created_at)
    except BundleError:
        # Tampered with: evidence, until a person has looked at it.
        return datetime.max.replace(tzinfo=UTC)


def collect(store: ObjectStore, now: datetime, keep_days: float = KEEP_DAYS) -> Garbage:
    """Remove what may go; manifests first: what a kill leaves half-way is an orphan, and goes later."""
    found = garbage(store, now, keep_days)
    for model_id in (*found.models, *found.orphans):
        # Asked anew for each: a rollback may have brought it back while others were being removed.
        if model_id in _needed(store):
            continue
        store.delete(prefix(model_id) + MANIFEST)
        for key in store.list(prefix(model_id)):
            store.delete(key)
    _note_orphans(store, now)
    return found


def _note_orphans(store: ObjectStore, now: datetime) -> None:
    def note(known: dict[str, Any]) -> dict[str, Any]:
        without = [m for m in ids(store) if not store.exists(prefix(m) + MANIFEST)]
        return {m: known.get(m, now.isoformat()) for m in without}

    state.update(store, ORPHANS_KEY, note)
