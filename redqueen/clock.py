"""What time it is: the wall's time, a fixed time, or the time a simulation says it is.

The demo and the arena move a clock kept in the store (`state/clock.json`), so that sensors, assets and the
scoring service, each in a process of its own, agree about the simulated hour. Production sets
`RQ_CLOCK=wall`.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from redqueen.errors import NotFound
from redqueen.store import decoded

if TYPE_CHECKING:
    from redqueen.settings import Settings
    from redqueen.store import ObjectStore

CLOCK_KEY = "state/clock.json"


class Clock(Protocol):
    """Anything that tells the time."""

    def now(self) -> datetime:
        """The current instant, timezone-aware, in UTC."""
        ...


class SystemClock:
    """The wall's clock."""

    def now(self) -> datetime:
        return datetime.now(UTC)


@dataclass(frozen=True)
class FixedClock:
    """A clock that stands still; for tests and replays."""

    at: datetime

    def now(self) -> datetime:
        return self.at


@dataclass(frozen=True)
class StoreClock:
    """The simulated clock in the store while there is one, the wall's clock otherwise."""

    store: ObjectStore

    def now(self) -> datetime:
        try:
            found = self.store.get_json(CLOCK_KEY)
            return decoded(CLOCK_KEY, found, lambda f: datetime.fromisoformat(f["now"]).astimezone(UTC))
        except NotFound:
            return datetime.now(UTC)

    def is_simulated(self) -> bool:
        """Whether a simulation is holding the clock."""
        return self.store.exists(CLOCK_KEY)

    def set(self, now: datetime) -> None:
        """Move the simulated clock; only the simulation's driver calls this."""
        self.store.put_json(CLOCK_KEY, {"now": now.astimezone(UTC).isoformat()})


def open_clock(settings: Settings, store: ObjectStore) -> Clock:
    """The clock that `settings.clock` asks for."""
    return SystemClock() if settings.clock == "wall" else StoreClock(store)


def hour_of(instant: datetime) -> datetime:
    """The start of the hour that holds `instant`, in UTC."""
    return instant.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
