"""The feed: traffic and labels for a home whose daemon and scoring service run by themselves.

It posts events to the scoring service over HTTP, drops events, labels and rubbish into the store, and moves
the simulated clock. It starts no run and ticks no sensor: taking in, measuring, retraining and the canary are
the daemon's. Killed at any instant and started again with the same options, it takes up the hour it was in.

The clock is paced. A simulated hour lasts at least `seconds_per_hour`, and longer wherever the real daemon
needs longer: the clock stands still while a lap is being trained and judged (minutes of computing would
otherwise be half a simulated day), until the hour before has been measured, and, on a home without a model,
after the history until a first lap has had its verdict. Each of these waits has an end, so that a daemon that
is down does not stop the platform for ever; only a first lap is waited for as long as it takes.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from math import inf
from pathlib import Path
from typing import Any

from rich.console import Console

from arena.delivery import Delivery, save
from arena.world import Row
from arena.worlds import HISTORY_HOURS, SimulatedWorld
from dagster_project.instance import claim_home, initialise
from redqueen import state
from redqueen.clock import StoreClock, hour_of
from redqueen.errors import InvalidInput, Refused, ServiceUnavailable
from redqueen.settings import Settings, load_settings
from redqueen.store import ObjectStore, open_store
from redqueen.tables import HOUR
from serving.client import HttpClient

LIVE_HOURS = 42
"""Live hours on a new home, where nothing else is asked for."""

MORE_HOURS = 24
"""Hours by which a home that has a clock already is taken further."""

CALM_BEFORE = 6
"""Hours a first model is given at least before the world changes: its shadow, its reference, its cooldown."""

CALM_AGAIN = 3
"""The same where a model has been live for long."""

POLL_SECONDS = 0.5
QUIET_SECONDS = 15
"""A wait shorter than this is not worth a line; a longer one is told, and told again."""

REMIND_SECONDS = 60
MEASURE_SECONDS = 180
START_SECONDS = 120


@dataclass
class Progress:
    """What the feed must remember to go on after a kill."""

    wanted: dict[str, Any]
    seed: int
    start: str
    history: int
    calm: int
    hours: int
    next_hour: int = 0
    shocked: bool = False
    pending_labels: list[Row] = field(default_factory=list)
    world: dict[str, Any] = field(default_factory=dict)

    @property
    def finished(self) -> bool:
        return self.next_hour >= self.history + self.hours

    @property
    def begin(self) -> datetime:
        return datetime.fromisoformat(self.start)


def run_feed(
    settings: Settings,
    scenario: str,
    seed: int,
    hours: int | None,
    seconds_per_hour: float,
    console: Console,
    *,
    scale: float = 1.0,
) -> None:
    """Feed a home until its hours are played; see the module for what it waits for.

    Args:
        hours: live hours; default 42 on a new home (after 36 of history), else as many as there are
            partitions for, at most 24.
        seconds_per_hour: least wall time of an hour.
        scale: traffic, in shares of the built-in platform's.

    Raises:
        ServiceUnavailable: no scoring service answers.
        Refused: the home's data is not a demo's or a feed's, or another feed is running.
        InvalidInput: `hours` reach beyond the hourly partitions.
    """
    if settings.clock == "wall":
        raise Refused("RQ_CLOCK=wall: this home lives on the wall's clock, and a feed moves a simulated one")
    for line in initialise(settings.home):
        console.print(line, soft_wrap=True)
    settings = load_settings(settings.home)
    store = open_store(settings)
    with (
        claim_home(settings.home / "demo", "the feed"),
        closing(HttpClient(settings.serving_url, operator_token=settings.serving_operator_token)) as service,
    ):
        _expect(service, settings)
        wanted = {"scenario": scenario, "seed": seed, "hours": hours, "scale": scale}
        progress = _progress(settings, store, wanted)
        feed = Feed(settings, store, progress, service, seconds_per_hour, console)
        try:
            feed.run()
        except KeyboardInterrupt:
            console.print("Stopped. The same command goes on where this one stopped.")
        except ServiceUnavailable as error:
            raise ServiceUnavailable(f"{error}. Then run the same command again: it goes on") from None


def _expect(service: HttpClient, settings: Settings) -> None:
    try:
        service.state()
    except ServiceUnavailable as error:
        raise ServiceUnavailable(f"{error} (start it with: redqueen --home {settings.home} serve)") from None


# -- what to play --------------------------------------------------------------------------------------------


def _path(home: Path) -> Path:
    return home / "demo" / "feed.json"


def _progress(settings: Settings, store: ObjectStore, wanted: Mapping[str, Any]) -> Progress:
    """The feed of these options, taken up where it stopped; else a new one from where the clock stands."""
    path = _path(settings.home)
    before = Progress(**json.loads(path.read_text())) if path.exists() else None
    if before is not None and before.wanted == dict(wanted) and not before.finished:
        return before
    now = hour_of(datetime.now(UTC))
    if StoreClock(store).is_simulated():
        pending = before.pending_labels if before else _left_by_demo(settings.home)
        return _further(settings, store, wanted, now, pending)
    if store.list("events/"):
        raise Refused(
            f"{settings.home} holds data that is neither a demo's nor a feed's; it stays untouched. "
            "Give the feed a home of its own: redqueen --home .redqueen-feed ..."
        )
    return _anew(settings, wanted, now)


def _left_by_demo(home: Path) -> list[Row]:
    """Labels that the demo of this home had earned and not yet landed."""
    meta = home / "demo" / "meta.json"
    if not meta.exists():
        return []
    if not json.loads(meta.read_text())["finished"]:
        raise Refused(f"the demo in {home} has not ended; complete it first (make demo), then feed it")
    pending: list[Row] = json.loads((home / "demo" / "progress.json").read_text())["pending_labels"]
    return pending


def _anew(settings: Settings, wanted: Mapping[str, Any], now: datetime) -> Progress:
    hours = wanted["hours"] or LIVE_HOURS
    first = hour_of(settings.partitions_start + HOUR - timedelta(microseconds=1))
    start = max(first, now - (HISTORY_HOURS + hours) * HOUR)
    _fits(start + HISTORY_HOURS * HOUR, hours, settings, now)
    calm = max(CALM_BEFORE, hours // 3)
    return Progress(dict(wanted), wanted["seed"], start.isoformat(), HISTORY_HOURS, calm, hours)


def _further(
    settings: Settings, store: ObjectStore, wanted: Mapping[str, Any], now: datetime, pending: list[Row]
) -> Progress:
    start = hour_of(StoreClock(store).now() + HOUR - timedelta(microseconds=1))
    room = _room(start, settings, now)
    hours = wanted["hours"] or max(1, min(MORE_HOURS, room))
    _fits(start, hours, settings, now)
    # Another platform every time: an event id seen before would be a duplicate, and dropped.
    seed = int.from_bytes(blake2b(f"{wanted['seed']}:{start}".encode(), digest_size=4).digest(), "big")
    return Progress(dict(wanted), seed, start.isoformat(), 0, CALM_AGAIN, hours, pending_labels=pending)


def _room(start: datetime, settings: Settings, now: datetime) -> int:
    """Hours from `start` to the last hourly partition's end."""
    return (now + settings.partitions_ahead_hours * HOUR - start) // HOUR


def _fits(start: datetime, hours: int, settings: Settings, now: datetime) -> None:
    room = _room(start, settings, now)
    if hours > room:
        raise InvalidInput(
            f"{hours} hours from {start:%Y-%m-%d %H:%M} UTC reach beyond the hourly partitions, which end "
            f"{settings.partitions_ahead_hours} h from now (RQ_PARTITIONS_AHEAD_HOURS): there is room for "
            f"{max(0, room)}. Ask for fewer with --hours, or feed a new home"
        )


# -- playing it ----------------------------------------------------------------------------------------------


class Feed:
    """One simulated platform, fed to one home over one service."""

    def __init__(
        self,
        settings: Settings,
        store: ObjectStore,
        progress: Progress,
        service: HttpClient,
        seconds_per_hour: float,
        console: Console,
    ) -> None:
        self.settings, self.store, self.progress = settings, store, progress
        self.seconds_per_hour, self.console = seconds_per_hour, console
        self.clock = StoreClock(store)
        total = progress.history + progress.hours
        self.world = SimulatedWorld(
            progress.wanted["scenario"],
            progress.seed,
            progress.begin + total * HOUR,
            scale=progress.wanted["scale"],
            history=progress.history,
            calm=min(progress.calm, progress.hours),
            after=max(0, progress.hours - progress.calm),
        )
        self.world.restore(progress.world)
        self.delivery = Delivery(store, self.world, service, progress, self._save)
        self.watch = Watch(store, self._say)

    def run(self) -> None:
        """Play every hour that has not been played yet, and wait for the last one to be measured."""
        hours = self.world.hours
        self._say(
            f"{len(hours)} hours from {hours[0]:%a %H:%M}, {len(hours) - self.progress.next_hour} to go"
        )
        if self.progress.next_hour == 0:
            self.clock.set(hours[0])
            self._save()
        if self.progress.next_hour < self.progress.history:
            self._land_history()
        for index in range(self.progress.next_hour, len(hours)):
            self._settle(index, began=-inf)
            began = time.monotonic()
            self._hour(index)
            self._settle(index + 1, began)
        self._say(f"every hour is played; the clock stands at {self.clock.now():%a %H:%M}")

    def _save(self) -> None:
        self.progress.world = self.world.state()
        save(_path(self.settings.home), asdict(self.progress))

    def _say(self, sentence: str) -> None:
        self.console.print(sentence, soft_wrap=True, markup=False)

    def _land_history(self) -> None:
        """All hours before the first scored one; the clock passes them once all have landed."""
        for index in range(self.progress.next_hour, self.progress.history):
            self.delivery.land_hour(index, self.world.traffic(index), {})
            self._close(index, clock=False)
        self.clock.set(self.world.hours[0] + self.progress.history * HOUR)
        self._say(f"{self.progress.history} hours of history have landed")

    def _close(self, index: int, *, clock: bool = True) -> None:
        self.progress.next_hour = index + 1
        if clock:
            self.clock.set(self.world.hours[index] + HOUR)
        self._save()

    def _hour(self, index: int) -> None:
        hour = self.world.hours[index]
        self.clock.set(hour + timedelta(minutes=1))
        if self.delivery.shock(index):
            self._say(f"{hour:%a %H}h  the world changes ({self.progress.wanted['scenario']})")
        traffic = self.world.traffic(index)
        # `score` ends with a flush: the hour's predictions are in the store before the clock passes the hour.
        actions = self.delivery.score(traffic.events)
        labels = self.delivery.land_hour(index, traffic, actions)
        self._close(index)
        counts = ", ".join(f"{n} {action}" for action, n in Counter(actions.values()).most_common())
        self._say(f"{hour:%a %H}h  {len(traffic.events)} events ({counts}), {labels} labels landed")

    # -- waiting for the daemon

    def _settle(self, index: int, began: float) -> None:
        """Let hour `index` begin once its time has come and the daemon has caught up with what was before."""
        reason, since, remind = "", 0.0, 0.0
        while True:
            self.watch.look()
            now = time.monotonic()
            held = self._held(index)
            if held is None:
                if now - began >= self.seconds_per_hour:
                    return
            elif held[0] != reason:
                reason, since, remind = held[0], now, now + QUIET_SECONDS
            elif now - since > held[1]:
                self._say(f"  {reason}; after {held[1]:.0f} s the clock goes on all the same")
                return
            elif now >= remind:
                self._say(f"  the clock waits: {reason}")
                remind = now + REMIND_SECONDS
            time.sleep(POLL_SECONDS)

    def _held(self, index: int) -> tuple[str, float] | None:
        """Why hour `index` may not begin yet, and how long (s) that may hold it; None when it may."""
        records = state.all_candidates(self.store)
        for record in records:
            if record["status"] in state.UNDER_WAY:
                reason = f"lap {record['candidate']} is {record['status']}"
                return reason, float(self.settings.training_timeout_s)
        claimed = state.read(self.store, state.CLAIM_KEY).get("candidate")
        if claimed and not any(record["candidate"] == claimed for record in records):
            return f"lap {claimed} is starting", START_SECONDS
        ui = f"redqueen --home {self.settings.home} ui"
        if not records and state.rollout_state(self.store).champion is None:
            return f"no lap has been started yet; the daemon does that, with its sensors on ({ui})", inf
        closed = self.world.hours[0] + (index - 1) * HOUR
        if not self.store.exists(f"signals/window={closed:%Y-%m-%dT%H}.json"):
            return f"{closed:%a %H}h has not been measured yet by the daemon ({ui})", MEASURE_SECONDS
        return None


class Watch:
    """Tells what the daemon did, as the store shows it: laps, their verdicts, every step of a rollout."""

    def __init__(self, store: ObjectStore, say: Any) -> None:
        self.store, self.say = store, say
        self.version = state.rollout_state(store).version
        self.statuses = {c["candidate"]: c["status"] for c in state.all_candidates(store)}

    def look(self) -> None:
        """Say what is new since the last look."""
        for record in state.all_candidates(self.store):
            name, status = record["candidate"], record["status"]
            if self.statuses.get(name) != status:
                self.statuses[name] = status
                trigger = f" by {record.get('trigger', 'hand')}" if status == "launched" else ""
                self.say(f"  lap {name}: {status}{trigger}: {record['reason']}")
        live = state.rollout_state(self.store)
        if live.version != self.version:
            self.version = live.version
            self.say(f"  rollout: {live.message} (stage {live.stage}, champion {live.champion or 'none'})")
