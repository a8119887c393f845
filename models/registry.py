"""The models of a store: what there is, how two differ, and which may go.

A model is there once its manifest is. Garbage collection removes only what nothing refers to: never what is
live, on its way, the one to go back to, or an ancestor of any of these; never one whose candidate may still
move; never one made lately.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from models import bundle
from models.bundle import CARD, FUSION, MANIFEST, METRICS, Manifest, load_manifest, prefix
from models.signing import Trust
from redqueen import state
from redqueen.errors import BundleError, InvalidInput, NotFound
from redqueen.store import ObjectStore, decoded

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
            why = (
                "no manifest: its upload did not finish, or it was removed"
                if isinstance(error, NotFound)
                else str(error)
            )
            found.append(Entry(model_id, role, candidate, "", "", None, why))
            continue
        found.append(
            Entry(model_id, role, candidate, manifest.created_at, manifest.selected, manifest.parent)
        )
    return sorted(found, key=lambda entry: (entry.created_at, entry.model_id), reverse=True)


def _by_model(store: ObjectStore) -> dict[str, Mapping[str, Any]]:
    """The candidate of each model; of several with the same model one that may still move, or the last."""
    found: dict[str, Mapping[str, Any]] = {}
    for record in state.all_candidates(store):
        known = found.get(record.get("model_id") or "")
        if record.get("model_id") and (known is None or known["status"] in state.FINISHED):
            found[record["model_id"]] = record
    return found


def _roles(store: ObjectStore) -> dict[str, str]:
    live = state.rollout_state(store)
    named = {"previous": live.previous, "challenger": live.challenger, "champion": live.champion}
    return {model_id: role for role, model_id in named.items() if model_id is not None}


# -- one, and two --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A manifest with what the bundle measured of itself, at which thresholds it acts, and its card."""

    manifest: Manifest
    metrics: dict[str, Any]
    thresholds: dict[str, float]
    card: str


def describe(store: ObjectStore, model_id: str, cache: Path, trust: Trust) -> Model:
    """One published model, verified as before a load.

    Raises:
        NotFound: there is no such model.
        BundleError: it does not verify: what it says of itself may be anything.
    """
    manifest, files = bundle.read(bundle.fetch(store, model_id, cache, trust), trust)
    cuts = map(float, json.loads(files[FUSION])["thresholds"])
    thresholds = dict(zip(manifest.policies, cuts, strict=True))
    return Model(manifest, json.loads(files[METRICS]), thresholds, files[CARD].decode())


def resolve(store: ObjectStore, given: str) -> str:
    """The id that `given` names: a whole one, or the beginning of just one.

    Raises:
        InvalidInput: there is none, or several begin so.
    """
    known = ids(store)
    found = [m for m in known if m == given] or [m for m in known if given and m.startswith(given)]
    if len(found) == 1:
        return found[0]
    if not found:
        raise InvalidInput(f"there is no model '{given}': `redqueen models list` shows all {len(known)}")
    raise InvalidInput(f"'{given}' may be any of {', '.join(found)}")


@dataclass(frozen=True)
class Change:
    """One thing in which two models differ."""

    what: str
    before: Any
    after: Any


def diff(store: ObjectStore, before: str, after: str, cache: Path, trust: Trust) -> list[Change]:
    """What changed from one model to another: provenance, features, files, thresholds, figures; raises as
    `describe`.
    """
    old, new = (describe(store, model_id, cache, trust) for model_id in (before, after))
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
    """Which models may go, and why each other one stays. Changes nothing.

    Raises:
        BundleError: a model that is needed cannot be read: which others it needs is not known.
    """
    return _sorted_out(store, ids(store), now, keep_days)


def _sorted_out(store: ObjectStore, asked: Sequence[str], now: datetime, keep_days: float) -> Garbage:
    candidates = state.all_candidates(store)
    keep, asking = _needed(store, candidates), _asking(candidates)
    old = now - timedelta(days=keep_days)
    since = decoded(ORPHANS_KEY, state.read(store, ORPHANS_KEY), _instants)
    models, orphans = [], []
    for model_id in asked:
        if model_id in keep:
            continue
        if not store.exists(prefix(model_id) + MANIFEST):
            if model_id in since and now - since[model_id] >= ORPHANED_AFTER:
                orphans.append(model_id)
            else:
                keep[model_id] = "its upload may still be under way"
        elif (made := _made(store, model_id)) is None:
            keep[model_id] = "it was tampered with: evidence, until a person has looked at it"
        elif made in asking:
            keep[model_id] = f"{asking[made]} may have just published it"
        elif made > old:
            keep[model_id] = f"made within {keep_days:g} days"
        else:
            models.append(model_id)
    return Garbage(tuple(models), tuple(orphans), keep)


def _needed(store: ObjectStore, candidates: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """What is live, on its way or to be gone back to, and the ancestors of these, each with the reason."""
    roles = _roles(store)
    needed = {model_id: f"it is the {role}" for model_id, role in roles.items()}
    for record in candidates:
        if record.get("model_id") and (record["status"] == "live" or record["status"] not in state.FINISHED):
            needed.setdefault(record["model_id"], f"its candidate is {record['status']}")
    waiting = list(needed)
    while waiting:
        child = waiting.pop()
        try:
            parent = load_manifest(store, child).parent
        except (NotFound, BundleError) as error:
            if child in roles:
                raise BundleError(
                    f"nothing is removed, since the parents of {child} are not known ({needed[child]}): "
                    f"{error}"
                ) from None
            continue
        if parent is not None and parent not in needed:
            needed[parent] = f"it is the parent of {child}"
            waiting.append(parent)
    return needed


def _instants(found: dict[str, Any]) -> dict[str, datetime]:
    return {model_id: datetime.fromisoformat(at) for model_id, at in found.items()}


def _asking(candidates: Sequence[Mapping[str, Any]]) -> dict[datetime, str]:
    """Candidates that have no model yet, by when they were asked for, which their models will note."""
    return {
        datetime.fromisoformat(record.get("created_at", record["updated_at"])): str(record["candidate"])
        for record in candidates
        if record["status"] not in state.FINISHED and not record.get("model_id")
    }


def _made(store: ObjectStore, model_id: str) -> datetime | None:
    try:
        return datetime.fromisoformat(load_manifest(store, model_id).created_at)
    except BundleError:
        return None


def collect(store: ObjectStore, now: datetime, keep_days: float = KEEP_DAYS) -> Garbage:
    """Remove what may go; manifests first: what a kill leaves half-way is an orphan, and goes later."""
    found, gone = garbage(store, now, keep_days), []
    for model_id in (*found.models, *found.orphans):
        # Asked anew for each: it may have been brought back, or published again, while others were removed.
        again = _sorted_out(store, (model_id,), now, keep_days)
        if model_id not in (*again.models, *again.orphans):
            found.kept.update({model_id: again.kept[model_id]} if model_id in again.kept else {})
            continue
        store.delete(prefix(model_id) + MANIFEST)
        for key in store.list(prefix(model_id)):
            store.delete(key)
        gone.append(model_id)
    _note_orphans(store, now)
    models, orphans = (tuple(m for m in of if m in gone) for of in (found.models, found.orphans))
    return replace(found, models=models, orphans=orphans)


def _note_orphans(store: ObjectStore, now: datetime) -> None:
    def note(known: dict[str, Any]) -> dict[str, Any]:
        without = [m for m in ids(store) if not store.exists(prefix(m) + MANIFEST)]
        return {m: known.get(m, now.isoformat()) for m in without}

    state.update(store, ORPHANS_KEY, note)
