"""What the loop is run against: a world that sends traffic and judges it. The built-in platform and a
replayed stream are both worlds. A world knows the truth; the store never does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Protocol

Row = dict[str, Any]
Probe = Callable[[list[Row]], list[str]]
"""What an attacker can do: send messages and see what happens to them (an action each, never a score)."""


@dataclass(frozen=True)
class Traffic:
    """One hour of a world.

    Attributes:
        events: rows of table `events`, in order of `ts`.
        truth: policy by event id, None for benign; never leaves the simulation.
        rubbish: rows that break the contract, landed beside the events.
    """

    events: list[Row]
    truth: Mapping[str, str | None]
    rubbish: list[Row] = field(default_factory=list)


class World(Protocol):
    """A source of traffic, hour by hour, and of the labels it earns."""

    @property
    def hours(self) -> Sequence[datetime]:
        """The simulated hours, in order; the last one is over now."""
        ...

    @property
    def first_scored(self) -> int:
        """Index of the first hour whose traffic goes through the scoring service."""
        ...

    @property
    def shock_at(self) -> datetime | None:
        """When traffic changes, if it does."""
        ...

    def name_of(self, index: int) -> str:
        """What a person calls the hour: a time of day, or the period a replay plays in it."""
        ...

    def traffic(self, index: int) -> Traffic:
        """The hour's traffic; the same again for the same index."""
        ...

    def shock(self, probe: Probe) -> None:
        """Change: attackers look for what gets past the live detector. Called once, before that hour."""
        ...

    def labels(
        self, index: int, traffic: Traffic, actions: Mapping[str, str], asked: Sequence[tuple[str, str]]
    ) -> list[Row]:
        """Label rows that this hour's traffic earns, each with the time it will be received.

        Args:
            actions: what the service did, by event id; empty before the first scored hour.
            asked: (event id, reason) of this hour's review requests.
        """
        ...

    def state(self) -> dict[str, Any]:
        """What must survive a kill, as JSON."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Take `state` back."""
        ...
