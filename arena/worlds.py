"""The two worlds there are: the built-in platform with its attackers, and a real stream that is replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from arena.labellers import Labellers
from arena.platform import Platform
from arena.world import Probe, Row, Traffic
from redqueen.importing import Plan
from redqueen.review import is_audited
from redqueen.schema import ACTED_ON
from redqueen.tables import HOUR

HISTORY_HOURS = 36
"""Judged traffic from before the first lap."""

CALM_HOURS = 11
"""Live hours before the world changes: the shadow of the first model, its reference, and quiet."""

AFTER_HOURS = 30
"""Hours after the change: to notice, to run a lap, to roll out, and twelve to look at what it was worth."""


class SimulatedWorld:
    """The built-in platform. The same arguments give the same world.

    Args:
        end: the end of its last hour.
        scale: traffic, in shares of the usual.
        history, calm, after: hours before the first scored one, from there to the change, and from there on.
    """

    def __init__(
        self,
        scenario: str,
        seed: int,
        end: datetime,
        *,
        scale: float = 1.0,
        history: int = HISTORY_HOURS,
        calm: int = CALM_HOURS,
        after: int = AFTER_HOURS,
    ) -> None:
        total = history + calm + after
        self._hours = [end - (total - i) * HOUR for i in range(total)]
        change = self._hours[history] + calm * HOUR
        self._scenario, self._history = scenario, history
        self.platform = Platform(
            seed, self._hours[0], scenario, change,  # type: ignore[arg-type]
            benign_per_hour=round(2200 * scale), abusive_per_hour=round(260 * scale),
        )  # fmt: skip
        self.labellers = Labellers(seed)
        self.traffic = lru_cache(maxsize=3)(self._traffic)  # type: ignore[method-assign]

    @property
    def hours(self) -> Sequence[datetime]:
        return self._hours

    @property
    def first_scored(self) -> int:
        return self._history

    @property
    def shock_at(self) -> datetime | None:
        return self.platform.shock_at

    def name_of(self, index: int) -> str:
        return f"{self._hours[index]:%a %H}h"

    def _traffic(self, index: int) -> Traffic:
        hour = self.platform.hour(self._hours[index])
        return Traffic(hour.events, hour.truth, hour.rubbish)

    def traffic(self, index: int) -> Traffic:
        """The hour's traffic; see `World`."""
        return self._traffic(index)

    def shock(self, probe: Probe) -> None:
        """Attackers look for what the live detector lets through; in other scenarios nobody looks."""
        if self._scenario == "attack":
            self.platform.attackers.retool(probe)
            self.traffic.cache_clear()  # type: ignore[attr-defined]

    def labels(
        self, index: int, traffic: Traffic, actions: Mapping[str, str], asked: Sequence[tuple[str, str]]
    ) -> list[Row]:
        """Reports, honeypots and appeals of this hour; moderators' answers to what they were asked."""
        hour = self._hours[index]
        rows = self.labellers.report(traffic.events, traffic.truth)
        rows += self.labellers.honeypot(traffic.events, traffic.truth)
        if index < self.first_scored:
            # Before Red Queen is switched on, moderators judge a slice that they draw themselves.
            drawn = [(e, "audit") for e in traffic.truth if is_audited(e, "before", 0.15)]
            rows += self.labellers.moderate(drawn, traffic.truth, hour + HOUR)
        before = self.traffic(index - 1).truth if index else {}
        # Attackers' probes are messages like any other: reviewed, and moderators know abuse when they see it.
        judged = {**before, **self.platform.attackers.probe_truth}
        # What somebody else sent to this home, by hand or by an earlier feed, is judged by nobody here.
        known = [(event, reason) for event, reason in asked if event in judged]
        rows += self.labellers.moderate(known, judged, hour + timedelta(minutes=5))
        acted = [
            (row["event_id"], row["ts"]) for row in traffic.events if actions.get(row["event_id"]) in ACTED_ON
        ]
        return rows + self.labellers.appeal(acted, traffic.truth)

    def state(self) -> dict[str, Any]:
        return self.platform.state()

    def restore(self, state: dict[str, Any]) -> None:
        if state:
            self.platform.restore(state)


class ReplayWorld:
    """A real stream, one of its periods an hour. Labels arrive with it; nobody attacks on purpose."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self._labels = lru_cache(maxsize=2)(self._arriving)
        self.traffic = lru_cache(maxsize=2)(self._traffic)  # type: ignore[method-assign]

    @property
    def hours(self) -> Sequence[datetime]:
        return [window.hour for window in self.plan.windows]

    @property
    def first_scored(self) -> int:
        return 1

    @property
    def shock_at(self) -> datetime | None:
        return None

    def name_of(self, index: int) -> str:
        return self.plan.windows[index].period

    def _arriving(self, index: int) -> list[Row]:
        return self.plan.hour(index).labels.to_dicts()

    def _traffic(self, index: int) -> Traffic:
        hour = self.plan.hour(index)
        truth = {e: (policy if abusive else None) for e, abusive, policy in hour.truth.iter_rows()}
        return Traffic(hour.events.to_dicts(), truth)

    def traffic(self, index: int) -> Traffic:
        """The period's traffic; see `World`."""
        return self._traffic(index)

    def shock(self, probe: Probe) -> None:
        """A stream is what it is."""

    def labels(
        self, index: int, traffic: Traffic, actions: Mapping[str, str], asked: Sequence[tuple[str, str]]
    ) -> list[Row]:
        """The labels that arrive in this hour, most of them about earlier ones."""
        return self._labels(index)

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing is remembered: the plan follows from the data and the seed."""
