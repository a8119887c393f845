"""The loop's authoritative state in the store: decisions, candidates, rollout, retrains, holds.

Everything that must survive a process and be agreed upon by several lives here, moved by compare-and-swap,
and nowhere else: a sensor's cursor is a hint, never the truth. What to do with the state is decided in
`redqueen.policy` and `redqueen.rollout`; this module only keeps it.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any

from redqueen.errors import Conflict, InvalidInput, NotFound
from redqueen.policy import Decision, Hold, LoopState
from redqueen.rollout import RolloutState, Step
from redqueen.store import ObjectStore, decoded, from_json, to_json

LIVE_KEY = "rollout/live.json"
LOG = "rollout/log/"
LOOP_KEY = "state/loop.json"
HOLDS_KEY = "state/holds.json"
CLAIM_KEY = "state/lap.json"
ORPHANED_AFTER_HOURS = 2.0
"""A candidate whose run stopped reporting for this long no longer blocks the next one."""

UNDER_WAY = ("launched", "trained", "evaluated", "attacked")
"""Statuses before a verdict; after it the rollout's own clock applies."""

FINISHED = ("live", "rejected", "rolled_back", "superseded", "failed")
"""Statuses from which a candidate moves no further by itself."""


def update(
    store: ObjectStore, key: str, change: Callable[[dict[str, Any]], dict[str, Any] | None], tries: int = 10
) -> dict[str, Any]:
    """Apply `change` to the JSON under `key` by compare-and-swap, reading again whenever another writer won.

    `change` gets `{}` where nothing is stored, and returns None to leave things as they are.

    Raises:
        Conflict: `tries` writers in a row came first.
    """
    for attempt in range(tries):
        if attempt:
            # Losers that all come back at once only lose again.
            time.sleep(random.uniform(0, 0.005 * 2 ** min(attempt, 6)))
        try:
            blob = store.get(key)
            current, etag = from_json(key, blob.data), blob.etag
        except NotFound:
            current, etag = {}, None
        wanted = change(dict(current))
        if wanted is None or wanted == current:
            return dict(current)
        try:
            if etag is None:
                store.put_if_absent(key, to_json(wanted))
            else:
                store.put_if_match(key, to_json(wanted), etag)
            return wanted
        except Conflict:
            continue
    raise Conflict(key, f"{tries} other writers came first; try again")


def read(store: ObjectStore, key: str) -> dict[str, Any]:
    """The JSON under `key`, `{}` where nothing is stored."""
    try:
        return store.get_json(key)
    except NotFound:
        return {}


# -- decisions -----------------------------------------------------------------------------------------------


def decision_key(window: datetime, scope: str) -> str:
    """Where the one decision of a window and a scope is kept."""
    return f"decisions/{window:%Y-%m-%dT%H}/{scope}.json"


def record_decision(store: ObjectStore, scope: str, decision: Decision) -> Decision:
    """Claim the window for `decision`; returns the decision that stands, which may be an earlier writer's."""
    key = decision_key(decision.window, scope)
    try:
        store.put_if_absent(key, to_json(decision.to_dict()))
        return decision
    except Conflict:
        return Decision.from_dict(store.get_json(key))


def recorded_decision(store: ObjectStore, window: datetime, scope: str) -> Decision | None:
    """The decision already taken for a window and scope, if any."""
    found = read(store, decision_key(window, scope))
    return Decision.from_dict(found) if found else None


def decisions(store: ObjectStore, limit: int | None = None) -> list[dict[str, Any]]:
    """The newest decisions, newest first, as stored."""
    keys = [k for k in reversed(store.list("decisions/")) if k.endswith(".json")]
    return [{**store.get_json(k), "scope": k.rsplit("/", 1)[1].removesuffix(".json")} for k in keys[:limit]]


# -- candidates ----------------------------------------------------------------------------------------------


def candidate_key(candidate: str) -> str:
    """Where a candidate's life is kept."""
    return f"candidates/{candidate}.json"


def advance_candidate(
    store: ObjectStore, candidate: str, status: str, now: datetime, reason: str, **facts: Any
) -> dict[str, Any]:
    """Move a candidate to `status` with a reason, keeping its history; the same move again is no move."""

    def change(record: dict[str, Any]) -> dict[str, Any] | None:
        history = record.get("history", [])
        if history and history[-1]["status"] == status and all(record.get(k) == v for k, v in facts.items()):
            return None
        history = [*history, {"status": status, "at": now.isoformat(), "reason": reason}]
        kept = {"candidate": candidate, "status": status, "reason": reason, "updated_at": now.isoformat()}
        return {**record, **facts, **kept, "history": history}

    return update(store, candidate_key(candidate), change)


def candidate(store: ObjectStore, name: str) -> dict[str, Any]:
    """A candidate's record; raises `InvalidInput` with the known names where there is none."""
    record = read(store, candidate_key(name))
    if not record:
        known = ", ".join(c["candidate"] for c in all_candidates(store)[-5:]) or "none yet"
        raise InvalidInput(f"no candidate is called '{name}'; the latest are: {known}")
    return record


def all_candidates(store: ObjectStore) -> list[dict[str, Any]]:
    """Every candidate's record, oldest first; raises `InvalidInput` where one was damaged."""
    return [record(store, key) for key in store.list("candidates/") if key.endswith(".json")]


def record(store: ObjectStore, key: str) -> dict[str, Any]:
    """The candidate's record under `key`; raises `InvalidInput` where it was damaged."""
    return decoded(key, store.get_json(key), _whole_record)


def _whole_record(record: dict[str, Any]) -> dict[str, Any]:
    """The record, if it has what every one has; else raises."""
    for name in ("candidate", "status"):
        str(record[name])
    datetime.fromisoformat(record["updated_at"])
    return record


def waiting_candidate(store: ObjectStore, live: RolloutState) -> str | None:
    """The newest candidate that has passed its gates and waits for a rollout."""
    waiting = [
        c for c in all_candidates(store) if c["status"] == "waiting" and c["candidate"] not in live.blocked
    ]
    return str(max(waiting, key=lambda c: c["updated_at"])["candidate"]) if waiting else None


# -- rollout -------------------------------------------------------------------------------------------------


def rollout_state(store: ObjectStore) -> RolloutState:
    """What is live and what is on its way.

    Raises:
        InvalidInput: it was damaged, or is gone although the rollout has moved: then nobody may take this for
            a home in which nothing is live.
    """
    if found := read(store, LIVE_KEY):
        return decoded(LIVE_KEY, found, RolloutState.from_dict)
    # One entry alone may be of a first move that is not made yet.
    if len(log := store.list(LOG)) > 1:
        raise InvalidInput(
            f"'{LIVE_KEY}' is gone from the store, though the rollout has moved: put it back from a backup, "
            f"or from `state` in '{log[-1]}', which is what it held"
        )
    return RolloutState.initial()


def move_rollout(
    store: ObjectStore, seen: RolloutState, wanted: RolloutState, step: Mapping[str, Any]
) -> None:
    """Swap the rollout state from `seen` to `wanted`, and append the step to the log.

    The log entry is claimed first: its number is the new version, so of two racing writers one cannot even
    write its entry, and a writer killed between the two writes is completed by whoever comes next.

    Raises:
        Conflict: the state is no longer `seen`; read it again and decide again.
    """
    log_key = _log_key(wanted.version)
    entry = to_json({"step": dict(step), "state": wanted.to_dict()})
    try:
        store.put_if_absent(log_key, entry)
    except Conflict:
        _complete(store, log_key)
        raise
    _swap(store, seen, wanted)


def finish_move(store: ObjectStore) -> dict[str, Any] | None:
    """Bring `live.json` up to a log entry whose writer was killed before the swap; that entry's step, None
    where no move was left half-way.
    """
    log_key = _log_key(rollout_state(store).version + 1)
    entry = read(store, log_key)
    if not entry:
        return None
    _complete(store, log_key)
    return dict(entry["step"])


def _log_key(version: int) -> str:
    return f"{LOG}{version:06d}.json"


def _complete(store: ObjectStore, log_key: str) -> None:
    """Bring `live.json` up to a log entry whose writer was killed before the swap."""
    logged = RolloutState.from_dict(store.get_json(log_key)["state"])
    current = rollout_state(store)
    if current.version == logged.version - 1:
        _swap(store, current, logged)


def _swap(store: ObjectStore, seen: RolloutState, wanted: RolloutState) -> None:
    def change(current: dict[str, Any]) -> dict[str, Any] | None:
        version = int(current.get("version", 0))
        if version == wanted.version and RolloutState.from_dict(current) == wanted:
            # Whoever lost to our log entry has finished our move for us: nobody must make it twice.
            return None
        if version != seen.version:
            raise Conflict(LIVE_KEY, f"it is at version {version}, version {seen.version} was read")
        return wanted.to_dict()

    update(store, LIVE_KEY, change)


def rollout_log(store: ObjectStore) -> list[dict[str, Any]]:
    """Every move of the rollout, oldest first."""
    return [store.get_json(k) for k in store.list(LOG)]


# -- retrains and holds --------------------------------------------------------------------------------------


def spend_retrain(store: ObjectStore, candidate_name: str, at: datetime) -> None:
    """Count a launched retrain against the budget, once per candidate."""

    def change(loop: dict[str, Any]) -> dict[str, Any] | None:
        spent = loop.get("retrains", {})
        return (
            None
            if candidate_name in spent
            else {**loop, "retrains": {**spent, candidate_name: at.isoformat()}}
        )

    update(store, LOOP_KEY, change)


def holds(store: ObjectStore, now: datetime) -> tuple[Hold, ...]:
    """The freezes in force at `now`."""
    kept = decoded(
        HOLDS_KEY, read(store, HOLDS_KEY), lambda found: [Hold.from_dict(h) for h in found.get("holds", ())]
    )
    return tuple(hold for hold in kept if hold.until > now)


def freeze(store: ObjectStore, hold: Hold) -> None:
    """Put a hold in force, replacing one of the same scope."""

    def change(found: dict[str, Any]) -> dict[str, Any]:
        others = [h for h in found.get("holds", ()) if h["scope"] != hold.scope]
        return {"holds": [*others, hold.to_dict()]}

    update(store, HOLDS_KEY, change)


def unfreeze(store: ObjectStore, scope: str) -> bool:
    """Lift the hold of `scope`; whether there was one."""
    before = len(read(store, HOLDS_KEY).get("holds", ()))
    after = update(
        store, HOLDS_KEY, lambda f: {"holds": [h for h in f.get("holds", ()) if h["scope"] != scope]}
    )
    return len(after.get("holds", ())) < before


def loop_state(store: ObjectStore, now: datetime) -> LoopState:
    """The loop as `redqueen.policy.decide` wants to see it."""
    spent = decoded(LOOP_KEY, read(store, LOOP_KEY), _spent)
    state = rollout_state(store)
    return LoopState(
        champion=state.champion,
        last_retrain=max(spent.values(), default=None),
        retrains_today=sum((now - at).total_seconds() < 86_400 for at in spent.values()),
        in_flight=in_flight(store, now),
        holds=holds(store, now),
    )


def _spent(loop: dict[str, Any]) -> dict[str, datetime]:
    """When each retrain was launched, by candidate."""
    return {name: datetime.fromisoformat(at) for name, at in loop.get("retrains", {}).items()}


def claim_lap(store: ObjectStore, candidate_name: str, now: datetime) -> bool:
    """Claim the one place on the track for a lap; whether it was had. Asking again is a yes again."""
    if in_flight(store, now) not in (None, candidate_name):
        return False
    claim = {"candidate": candidate_name, "at": now.isoformat()}

    def change(held: dict[str, Any]) -> dict[str, Any] | None:
        if held and _claimed(held)[0] != candidate_name and not _free(store, held, now):
            return None
        return None if held.get("candidate") == candidate_name else claim

    return bool(update(store, CLAIM_KEY, change)["candidate"] == candidate_name)


def release_lap(store: ObjectStore, candidate_name: str) -> None:
    """Give the place back, for a lap that is not run after all."""
    update(store, CLAIM_KEY, lambda held: {} if held.get("candidate") == candidate_name else None)


def lost_lap(store: ObjectStore, scope: str) -> Decision | None:
    """The decision of this scope that claimed the place and whose lap nobody has seen start."""
    held = read(store, CLAIM_KEY)
    if not held or store.exists(candidate_key(name := _claimed(held)[0])):
        return None
    key = f"decisions/{name[: len('2026-01-03T14')]}/{scope}.json"  # a candidate is called after its window
    found = read(store, key)
    decision = decoded(key, found, Decision.from_dict) if found else None
    return decision if decision is not None and decision.id == name else None


def _free(store: ObjectStore, held: Mapping[str, Any], now: datetime) -> bool:
    """Whether the lap that holds the place is over, or died before it left a record."""
    name, since = _claimed(held)
    try:
        found = record(store, candidate_key(name))
    except NotFound:
        return (now - since).total_seconds() > ORPHANED_AFTER_HOURS * 3600
    return found["status"] in FINISHED or _orphaned(found, now)


def _claimed(held: Mapping[str, Any]) -> tuple[str, datetime]:
    """Which lap holds the place, and since when."""
    return decoded(CLAIM_KEY, dict(held), lambda h: (str(h["candidate"]), datetime.fromisoformat(h["at"])))


def _orphaned(record: Mapping[str, Any], now: datetime) -> bool:
    """Whether a candidate stopped before its verdict and nobody has heard of it since."""
    age = (now - datetime.fromisoformat(record["updated_at"])).total_seconds()
    return record["status"] in UNDER_WAY and age > ORPHANED_AFTER_HOURS * 3600


def in_flight(store: ObjectStore, now: datetime) -> str | None:
    """The candidate that is being trained or rolled out, if any."""
    held = read(store, CLAIM_KEY)
    if held and not _free(store, held, now):
        return _claimed(held)[0]
    for record in reversed(all_candidates(store)):
        if record["status"] not in FINISHED and not _orphaned(record, now):
            return str(record["candidate"])
    return None


def step_dict(step: Step) -> dict[str, Any]:
    """A rollout step as JSON."""
    return asdict(step)
