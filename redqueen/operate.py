"""Moving the rollout: the one way in which a step becomes state, for the deployment asset and for people
alike.

Deciding is `redqueen.rollout`'s, keeping is `redqueen.state`'s; this module joins them, so that the log, the
pointer and the candidates' records always tell one story.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime

from redqueen import rollout, state
from redqueen.errors import Refused
from redqueen.rollout import Limits, RolloutState, Step
from redqueen.store import ObjectStore


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


def reflect(store: ObjectStore, now: datetime) -> None:
    """Bring the candidates' records in line with the rollout; completes a move whose writer was killed."""
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
        record = state.read(store, state.candidate_key(name))
        if record and record["status"] != status:
            state.advance_candidate(store, name, status, now, reason)


def roll_back(
    store: ObjectStore,
    now: datetime,
    who: str,
    why: str,
    pause_hours: float,
    problem: Callable[[str], str] = lambda model_id: "",
) -> RolloutState:
    """A person's rollback: drop the challenger, or put the previous champion back.

    Args:
        problem: why a model cannot be loaded; empty if it can. Nobody is helped by one that cannot.

    Raises:
        Refused: there is nothing to go back to, or it cannot be loaded.
        Conflict: the rollout moved at the same moment; look and try again.
    """
    seen = state.rollout_state(store)
    if seen.challenger is None and seen.previous is not None and (damaged := problem(seen.previous)):
        raise Refused(f"{seen.previous}, the model before, cannot go live: {damaged}")
    step = rollout.rollback(seen, who, why, Limits(pause_hours=pause_hours))
    return move(store, seen, step, now)
