"""What people decided about held labels: released, or held again, by whom, when and why.

A record that only grows, moved by compare-and-swap: what counts at an instant is the last word spoken by
then. Which labels are held is `redqueen.poisoning`'s business.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from redqueen import state
from redqueen.errors import Refused
from redqueen.store import ObjectStore

KEY = "state/label_releases.json"
RELEASE, HOLD = "release", "hold again"


@dataclass(frozen=True)
class Word:
    """One person's word on one target, a group's id or a label's."""

    target: str
    action: str
    at: datetime
    by: str
    reason: str

    def sentence(self) -> str:
        done = "released" if self.action == RELEASE else "held again"
        return f"{done} by {self.by} on {self.at:%Y-%m-%d %H:%M} UTC: {self.reason}"


def words(store: ObjectStore, as_of: datetime | None = None) -> list[Word]:
    """Everything said by `as_of`, in the order in which it was said."""
    said = [_word(row) for row in state.read(store, KEY).get("words", ())]
    return [word for word in said if as_of is None or word.at <= as_of]


def last_words(store: ObjectStore, as_of: datetime) -> dict[str, Word]:
    """The last word on each target by `as_of`. It holds from its own time on, never before."""
    return {word.target: word for word in words(store, as_of)}


def released(store: ObjectStore, as_of: datetime) -> list[str]:
    """The targets that stand released at `as_of`, sorted."""
    last = last_words(store, as_of)
    return sorted(target for target, word in last.items() if word.action == RELEASE)


def release(store: ObjectStore, target: str, *, by: str, reason: str, now: datetime) -> Word:
    """Let a group's or a label's votes count again from `now` on.

    Raises:
        Refused: somebody released it before, a moment ago perhaps; the message names them.
    """
    return _say(store, Word(target, RELEASE, now, by, reason))


def hold_again(store: ObjectStore, target: str, *, by: str, reason: str, now: datetime) -> Word:
    """Take a release back from `now` on.

    Raises:
        Refused: it is not released.
    """
    return _say(store, Word(target, HOLD, now, by, reason))


def _say(store: ObjectStore, word: Word) -> Word:
    def change(found: dict[str, Any]) -> dict[str, Any]:
        said = list(found.get("words", ()))
        before = next((_word(row) for row in reversed(said) if row["target"] == word.target), None)
        if word.action == RELEASE and before is not None and before.action == RELEASE:
            raise Refused(f"'{word.target}' was {before.sentence()}; nothing is left to release")
        if word.action == HOLD and (before is None or before.action == HOLD):
            raise Refused(f"'{word.target}' is not released; `redqueen labels held` shows what is")
        return {"words": [*said, {**asdict(word), "at": word.at.isoformat()}]}

    state.update(store, KEY, change)
    return word


def _word(row: dict[str, Any]) -> Word:
    return Word(**{**row, "at": datetime.fromisoformat(row["at"])})
