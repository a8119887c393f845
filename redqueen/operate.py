"""Moving the rollout: the one way in which a step becomes state, for the deployment asset and for people
alike.

Deciding is `redqueen.rollout`'s, keeping is `redqueen.state`'s; this module joins them, so that the log, the
pointer and the candidates' records always tell one story.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

from redqueen import rollout, state
from redqueen.errors import InvalidInput, Refused
from redqueen.rollout import Limits, RolloutState, Step
from redqueen.store import ObjectStore

logger = logging.getLogger(__name__)

AGAIN = timedelta(hours=1)
"""So soon after a person's rollback another one may well be meant for the same model."""


def move(store: ObjectStore, seen: RolloutState, step: Step, now: datetime) -> RolloutState:
    """Apply `step` to the rollout; hold and none change nothing.

    Raises:
        Conflict: somebody else moved it since it was read.
        Refused: the step was decided on another version or would start a blocked candidate.
    """
    wanted = rollout.apply(seen, step, now)
    if wanted.version != seen.version:
        state.move_rollout(store, seen, wanted, state.step_dict(step))
        reflect(store, now)
    return wanted


def settle(store: ObjectStore, now: datetime) -> dict[str, Any] | None:
    """Finish what a killed writer left half-way: the pointer, and the candidates' records. Returns the step
    that was finished; None where the pointer had moved.
    """
    step = state.finish_move(store)
    reflect(store, now)
    return step


def reflect(store: ObjectStore, now: datetime) -> None:
    """Bring the candidates' records in line with the rollout. The rollout has moved by then: a record that
    cannot be read is told of and left.
    """
    live = state.rollout_state(store)
    wanted: dict[str, tuple[str, str]] = {}
    if live.previous_candidate:
        wanted[live.previous_candidate] = ("superseded", f"{live.champion_candidate} took its place")
    if live.champion_candidate:
        wanted[live.champion_candidate] = ("live", live.message if live.stage == rollout.LIVE else "live")
    if live.candidate:
        wanted[live.candidate] = (live.stage, live.message)
    for name, why in live.blocked.items():
        wanted[name] = ("rolled_back", why)
    for name, (status, reason) in wanted.items():
        try:
            record = state.read(store, state.candidate_key(name))
            if record and record.get("status") != status:
                state.advance_candidate(store, name, status, now, reason)
        except InvalidInput as error:
            logger.warning("the rollout moved, the record of %s did not: %s", name, error)


def roll_back(
    store: ObjectStore,
    now: datetime,
    who: str,
    why: str,
    pause_hours: float,
    problem: Callable[[str], str] = lambda model_id: "",
    *,
    again: bool = False,
) -> RolloutState:
    """A person's rollback: drop the challenger, or put the previous champion back.

    Args:
        problem: why a model cannot be loaded; empty if it can. Nobody is helped by one that cannot.
        again: also right after another rollback.

    Raises:
        Refused: there is nothing to go back to, or it cannot be loaded; or the rollout was just moved, and
            what is asked for would now be something else.
        Conflict: the rollout moved at the same moment; look and try again.
    """
    finished = settle(store, now)
    seen = state.rollout_state(store)
    if finished is not None:
        if finished.get("action") == "rollback":
            return seen
        raise Refused(f"another move was half-way and is finished now: {seen.message} Ask again")
    # Two who roll back at once, or one who asks twice, must not take down the model that is good.
    recent = seen.reason == "by_hand" and seen.updated_at is not None and now - seen.updated_at < AGAIN
    if recent and seen.challenger is None and seen.previous is not None and not again:
        raise Refused(
            f"it was done at {seen.updated_at:%H:%M} UTC: {seen.message} Once more would take down "
            f"{seen.champion}, which is live: --again does"
        )
    if seen.challenger is None and seen.previous is not None and (damaged := problem(seen.previous)):
        raise Refused(f"{seen.previous}, the model before, cannot go live: {damaged}")
    step = rollout.rollback(seen, who, why, Limits(pause_hours=pause_hours))
    return move(store, seen, step, now)
