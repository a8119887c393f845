"""The online compiler: the declared windows event by event, as functions written for each key.

Belongs here: the semantics of `redqueen.features.declared`, incrementally, in one process. Does not belong
here: what an event is (`redqueen.features.prepared`), floating point (`redqueen.features.finish`), Redis
(`redqueen.features.onredis`), and any clock: time is what the events say.

How it counts. The state of one key is what happened in the tile in progress, a record of every tile before
(`past`), and running totals of each window. An event adds to the tile and to the totals; when the key's clock
enters a new tile, the records that a window leaves are taken out of its totals. A distinct value belongs to
the record in which it was last seen (`last`, by its number): seen again, it moves, and a window gains one
only if it was not inside before. So an event costs a few additions a key, whatever a window holds.

What it costs most is reaching ten keys in memory, and Python's garbage collector, which walks over objects
that hold objects. Most keys are seen once (a pair, a text): of these only the event's values are kept, as a
tuple, and a state is made when they are seen again.

The function of a key is generated from the declarations (`source_of` shows it), because a loop over
declarations for every event would cost ten times as much as what it does.
"""

from __future__ import annotations

import json
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from redqueen.errors import InvalidInput
from redqueen.features.declared import (
    AGGREGATES,
    FEATURES_VERSION,
    HORIZON,
    HOUR,
    KEYS,
    TILE,
    WATERMARK,
    Aggregate,
    Key,
    Window,
)
from redqueen.features.finish import clogc_table
from redqueen.features.prepared import Prepared

__all__ = ["Engine", "InProcess", "alone", "source_of"]


class Engine(Protocol):
    """Whatever keeps the windows."""

    def observe(self, events: Sequence[Prepared]) -> NDArray[np.int64]:
        """Take the events in, in the order they become known; their aggregates [n, len(AGGREGATES)]."""
        ...


class InProcess:
    """The windows in the memory of this process. Not thread-safe.

    Memory grows with what happened within `HORIZON`, not with the age of the process: keys that were idle for
    longer are forgotten, also those that never come again.
    """

    def __init__(self) -> None:
        self._now = -(2**62)
        self._known: dict[str, _Arrival] = {}
        self._arrivals: deque[_Arrival] = deque()
        self._leaving: list[tuple[_Table, int, list[Any]]] = []
        self._tables = {key: _Table(plan) for key, plan in _PLANS.items()}
        names = {f"of_{key}": table.step for key, table in self._tables.items()}
        self._take: Callable[..., None] = _compiled(
            _loop_source(), "take", {**names, **_LOOP_NAMES, "known": self._known, "arrived": self._arrivals}
        )

    @property
    def actors(self) -> int:
        """Accounts of which something is remembered."""
        return len(self._tables["actor"].states)

    @property
    def keys(self) -> int:
        """Keys of all kinds of which something is remembered."""
        return sum(len(table.states) for table in self._tables.values())

    def observe(self, events: Sequence[Prepared]) -> NDArray[np.int64]:
        """The aggregates [n, A] of events in the order they become known; each is taken in once."""
        rows = array("q")
        self._take(events, rows.fromlist)
        if events:
            self._forget(max(event.received for event in events), len(events))
        return np.frombuffer(rows, dtype=np.int64).reshape(-1, len(AGGREGATES))[:, _ORDER]

    def _forget(self, now: int, events: int) -> None:
        if now <= self._now:
            return
        before, self._now = self._now, now
        arrivals = self._arrivals
        while arrivals and arrivals[0][3] + WATERMARK < now:
            gone = arrivals.popleft()
            if self._known.get(gone[2]) is gone:
                del self._known[gone[2]]
        if now // HOUR != before // HOUR:
            idle = (now - HORIZON - WATERMARK) // HOUR
            for table in self._tables.values():
                for hour in [hour for hour in table.due if hour < idle]:
                    self._leaving.append((table, hour, table.due.pop(hour)))
        # A share with every call, so that no call pays for an hour's keys at once.
        share = 32 * events
        while self._leaving and share:
            table, hour, keys = self._leaving[-1]
            going, keys[-share:] = keys[-share:], []
            table.forget(going, hour)
            share -= len(going)
            if not keys:
                self._leaving.pop()

    def dump(self) -> bytes:
        """All that is remembered, for `load`: compressed JSON."""
        body = {
            "version": FEATURES_VERSION,
            "now": self._now,
            "arrivals": list(self._arrivals),
            "tables": {key: table.dump() for key, table in self._tables.items()},
        }
        return zlib.compress(json.dumps(body, separators=(",", ":")).encode(), 1)

    @classmethod
    def load(cls, dumped: bytes) -> InProcess:
        """The engine that was dumped: it goes on exactly as the other would have.

        Raises InvalidInput where `dumped` is no dump, or one of other features.
        """
        try:
            body = json.loads(zlib.decompress(dumped))
            version = body["version"]
        except (zlib.error, ValueError, KeyError, TypeError) as error:
            raise InvalidInput(
                "this is no dump of online features, or it is damaged; start with an empty engine and replay"
            ) from error
        if version != FEATURES_VERSION:
            raise InvalidInput(
                f"the dump holds features of version {version}, this is {FEATURES_VERSION}: windows of "
                "different declarations cannot be continued. Start with an empty engine and replay"
            )
        engine = cls()
        engine._now = body["now"]
        for until, row, event_id, received in body["arrivals"]:
            arrival = (until, tuple(row), event_id, received)
            engine._arrivals.append(arrival)
            engine._known[event_id] = arrival
        for key, table in engine._tables.items():
            table.load(body["tables"][key])
        return engine


_Arrival = tuple[int, tuple[int, ...], str, int]
"""Until when copies get the row, the row, the event_id, when it was received."""

_TILES_AN_HOUR = HOUR // TILE


class _Table:
    """All keys of one kind: their states, and by the hour of its clock when each may be forgotten."""

    def __init__(self, plan: _Plan) -> None:
        self.plan = plan
        self.states: dict[Any, Any] = {}
        self.due: dict[int, list[Any]] = {}
        self.state_type = type(f"{plan.key.title()}State", (), {"__slots__": plan.slots})
        names = {"states": self.states, "due": self.due, "State": self.state_type, **_STEP_NAMES}
        names["begun"] = _compiled(_begun_source(plan), "begun", names)
        self.step = _compiled(source_of(plan.key), "step", names)

    def forget(self, keys: list[Any], hour: int) -> None:
        """Forget the keys whose clock has not left that hour."""
        states, first, last = self.states, hour * _TILES_AN_HOUR, (hour + 1) * _TILES_AN_HOUR
        for key in keys:
            state = states.get(key)
            if state is not None:
                tile = state[0] if state.__class__ is tuple else state.tile
                if first <= tile < last:
                    del states[key]

    def dump(self) -> list[list[Any]]:
        plain = [*self.plan.numbers, *self.plan.last]
        return [
            [key, None, *state]
            if isinstance(state, tuple)
            else [key, state.past, *(getattr(state, slot) for slot in plain)]
            for key, state in self.states.items()
        ]

    def load(self, rows: list[list[Any]]) -> None:
        plain = [*self.plan.numbers, *self.plan.last]
        for name, past, *values in rows:
            state: Any = tuple(values)
            if past is not None:
                state = self.state_type()
                state.past = past
                for slot, value in zip(plain, values, strict=True):
                    setattr(state, slot, value)
            key = tuple(name) if isinstance(name, list) else name
            self.states[key] = state
            self.due.setdefault(_tile_of(state) // _TILES_AN_HOUR, []).append(key)


def _tile_of(state: Any) -> int:
    """The tile of a key's clock: of its state, or of the one event it had."""
    tile: int = state[0] if isinstance(state, tuple) else state.tile
    return tile


def alone(event: Prepared) -> tuple[int, ...]:
    """The aggregates of an event that is alone in the world, in the order of `AGGREGATES`."""
    row = []
    for one in AGGREGATES:
        present = all(getattr(event, column) for column in KEYS[one.key])
        if not present or (one.where is not None and not getattr(event, one.where)):
            row.append(0)
        elif one.op == "count":
            row.append(1)
        elif one.op == "gap":
            row.append(one.window.length)
        elif one.op == "clogc":
            row.append(0)
        else:
            value = getattr(event, one.value or "")
            row.append(int(value is not None) if one.op == "distinct" else value)
    return tuple(row)


# --- writing a key's function -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tally:
    """One number of a record: events, a sum, or the distinct values last seen in its tile."""

    value: str | None
    where: str | None
    distinct: bool
    windows: tuple[Window, ...]
    place: int

    @property
    def name(self) -> str:
        parts = [self.value or ("events" if self.where is None else ""), self.where or ""]
        return "_".join(part for part in parts if part) + ("_seen" if self.distinct else "")

    @property
    def now(self) -> str:
        """The slot of the tile in progress."""
        return f"now_{self.name}"

    @property
    def last(self) -> str:
        """The slot that says in which record each distinct value was last seen."""
        return f"last_{self.name}"

    @property
    def longest(self) -> Window:
        return max(self.windows, key=_reach)


class _Plan:
    """What the aggregates of one key need: numbers of a record, totals of a window, columns of an event."""

    def __init__(self, key: Key) -> None:
        self.key = key
        self.aggregates = [one for one in AGGREGATES if one.key == key]
        self.windows = sorted({one.window for one in self.aggregates if one.op != "gap"}, key=_reach)
        self.clogc = [one.window for one in self.aggregates if one.op == "clogc"]
        self.gap = [one.window for one in self.aggregates if one.op == "gap"]
        wanted: dict[tuple[str | None, str | None, bool], list[Window]] = {}
        for one in self.aggregates:
            if one.op in ("count", "sum", "distinct"):
                wanted.setdefault(_tally_of(one), []).append(one.window)
        if self.clogc:
            wanted.setdefault((None, None, False), [])
        self.tallies = [
            _Tally(value, where, distinct, tuple(windows), place)
            for place, ((value, where, distinct), windows) in enumerate(wanted.items(), start=1)
        ]

    @property
    def columns(self) -> list[str]:
        """The columns of an event that its function takes, besides the key and the tile."""
        used: dict[str, None] = {"at": None} if self.gap else {}
        for tally in self.tallies:
            used |= dict.fromkeys(name for name in (tally.value, tally.where) if name)
        return list(used)

    @property
    def counters(self) -> list[str]:
        """Slots that begin at 0: of the tile in progress, of the windows, and where in `past` each begins;
        `record`, the number of the one in progress, and `gone`, how many were dropped from `past`."""
        now = [tally.now for tally in self.tallies]
        totals = [f"{tally.name}_{window.name}" for tally in self.tallies for window in tally.windows]
        clogc = [f"clogc_{window.name}" for window in self.clogc]
        first = [f"first_{window.name}" for window in self.windows]
        return [*now, *totals, *clogc, *first, *(["record", "gone"] if self.last else [])]

    @property
    def numbers(self) -> list[str]:
        return ["tile", *(["clock"] if self.gap else []), *self.counters]

    @property
    def last(self) -> list[str]:
        return [tally.last for tally in self.tallies if tally.distinct]

    @property
    def slots(self) -> list[str]:
        return [*self.numbers, "past", *self.last]

    @property
    def width(self) -> int:
        """Numbers of a record in `past`: its tile, then the tallies."""
        return 1 + len(self.tallies)

    @property
    def events(self) -> _Tally:
        """The tally of all events, which c ln c is of."""
        return next(tally for tally in self.tallies if tally.name == "events")

    def value_of(self, one: Aggregate) -> str:
        """The expression of an aggregate, once the event is taken in."""
        if one.op == "gap":
            return "gap"
        if one.op == "clogc":
            return f"s.clogc_{one.window.name}"
        (tally,) = (t for t in self.tallies if (t.value, t.where, t.distinct) == _tally_of(one))
        return f"s.{tally.name}_{one.window.name}"


def _reach(window: Window) -> int:
    return window.length + window.hop


def _tally_of(one: Aggregate) -> tuple[str | None, str | None, bool]:
    return one.value, one.where, one.op == "distinct"


def _start_of(window: Window) -> str:
    """The expression of a window's first tile."""
    length, hop = window.length // TILE, window.hop // TILE
    return f"tile - {length}" if hop == 1 else f"(tile - {length}) // {hop} * {hop}"


def source_of(key: Key) -> str:
    """The source of the function that takes one event in for one key, and returns the key's aggregates."""
    plan = _PLANS[key]
    lines = [
        f"def step({', '.join(['key', 'tile', *plan.columns])}):",
        "    s = states.get(key)",
        "    if s is None:",
        f"        states[key] = {_event(plan)}",
        f"        due.setdefault(tile // {_TILES_AN_HOUR}, []).append(key)",
        f"        return ({', '.join(map(_alone_value, plan.aggregates))},)",
        "    if s.__class__ is tuple:",
        "        s = states[key] = begun(*s)",
        *_indented([line for window in plan.gap for line in _gap(window)], 1),
        "    if tile > s.tile:",
        *_indented(_entering(plan), 2),
        "    else:",
        "        tile = s.tile",
        *_counting(plan),
        f"    return ({', '.join(plan.value_of(one) for one in plan.aggregates)},)",
    ]
    return "\n".join(lines) + "\n"


def _begun_source(plan: _Plan) -> str:
    """The source of the function that makes a state of the one event that its key had."""
    lines = [
        f"def begun{_event(plan)}:",
        "    s = State()",
        "    s.tile, s.past = tile, nothing",
        f"    {' = '.join(f's.{name}' for name in plan.counters)} = 0",
        *(f"    s.{name} = {{}}" for name in plan.last),
        *("    s.clock = at" for _ in plan.gap),
        *_counting(plan),
        "    return s",
    ]
    return "\n".join(lines) + "\n"


def _event(plan: _Plan) -> str:
    return f"({', '.join(['tile', *plan.columns])},)"


def _alone_value(one: Aggregate) -> str:
    """The expression of an aggregate for the first event of its key."""
    if one.op in ("gap", "clogc"):
        return f"{one.window.length if one.op == 'gap' else 0}"
    value = f"{one.value}" if one.op == "sum" else "1"
    needed = [f"{one.value} is not None"] if one.op == "distinct" else []
    needed += [one.where] if one.where else []
    return f"{value} if {' and '.join(needed)} else 0" if needed else value


def _counting(plan: _Plan) -> list[str]:
    """The event is counted in the tile in progress."""
    lines = []
    for tally in plan.tallies:
        lines += _distinct(tally, plan) if tally.distinct else _adding(tally, plan)
    return _indented(lines, 1)


def _gap(window: Window) -> list[str]:
    return ["gap = 0", "if at > s.clock:", f"    gap, s.clock = min(at - s.clock, {window.length}), at"]


def _entering(plan: _Plan) -> list[str]:
    """The key's clock enters a new tile: the one in progress becomes a record, and the windows move on."""
    record = ", ".join(["s.tile", *(f"s.{tally.now}" for tally in plan.tallies)])
    lines = [
        "past = s.past",
        "if past is nothing:",
        f"    past = s.past = [{record}]",
        "else:",
        f"    past += [{record}]",
        f"{' = '.join(f's.{tally.now}' for tally in plan.tallies)} = 0",
        f"if tile // {_TILES_AN_HOUR} != s.tile // {_TILES_AN_HOUR}:",
        f"    due.setdefault(tile // {_TILES_AN_HOUR}, []).append(key)",
        "s.tile, ends = tile, len(past)",
        *(["s.record += 1"] if plan.last else []),
    ]
    for window in plan.windows:
        lines += _moving(plan, window)
    return lines


def _moving(plan: _Plan, window: Window) -> list[str]:
    leaving = [
        f"s.{tally.name}_{window.name} -= past[first + {tally.place}]"
        for tally in plan.tallies
        if window in tally.windows
    ]
    if window in plan.clogc:
        leaving.append(f"s.clogc_{window.name} -= clogc[past[first + {plan.events.place}]]")
    lines = [
        f"first, start = s.first_{window.name}, {_start_of(window)}",
        "if past[first] < start:",
        "    while first < ends and past[first] < start:",
        *_indented(leaving, 2),
        f"        first += {plan.width}",
        f"    s.first_{window.name} = first",
    ]
    if window == plan.windows[-1]:
        lines += _indented(_dropping(plan), 1)
    return lines


def _dropping(plan: _Plan) -> list[str]:
    """Records that left the longest window go; values last seen there, once they are more than the others."""
    lines = [f"s.first_{window.name} -= first" for window in plan.windows]
    if plan.last:
        lines.append(f"gone = s.gone = s.gone + first // {plan.width}")
    for tally in plan.tallies:
        if tally.distinct:
            lines += [
                f"if len(s.{tally.last}) > 2 * s.{tally.name}_{tally.longest.name} + 4:",
                f"    s.{tally.last} = {{v: r for v, r in s.{tally.last}.items() if r >= gone}}",
            ]
    return [*lines, "del past[:first]"]


def _adding(tally: _Tally, plan: _Plan) -> list[str]:
    amount = tally.value or "1"
    lines = [f"s.{tally.now} += {amount}"]
    lines += [f"s.{tally.name}_{window.name} += {amount}" for window in tally.windows]
    if plan.clogc and tally == plan.events:
        lines += [
            f"c = s.{tally.now}",
            "if c >= len(clogc):",
            "    grow(c)",
            *(f"s.clogc_{window.name} += clogc[c] - clogc[c - 1]" for window in plan.clogc),
        ]
    return lines if tally.where is None else [f"if {tally.where}:", *_indented(lines, 1)]


def _distinct(tally: _Tally, plan: _Plan) -> list[str]:
    unseen = [f"s.{tally.name}_{window.name} += 1" for window in tally.windows]
    lines = [
        f"before = s.{tally.last}.get({tally.value})",
        "if before != s.record:",
        f"    s.{tally.last}[{tally.value}] = s.record",
        f"    s.{tally.now} += 1",
        "    if before is None or before < s.gone:",
        *_indented(unseen, 2),
        "    else:",
        f"        place = (before - s.gone) * {plan.width}",
        "        seen = s.past[place]",
        f"        s.past[place + {tally.place}] -= 1",
    ]
    for window in tally.windows:
        lines += [f"        if seen < {_start_of(window)}:", f"            s.{tally.name}_{window.name} += 1"]
    present = f"{tally.value} is not None" + (f" and {tally.where}" if tally.where else "")
    return [f"if {present}:", *_indented(lines, 1)]


def _indented(lines: Sequence[str], levels: int) -> list[str]:
    return ["    " * levels + line for line in lines]


def _loop_source() -> str:
    """The source of the loop over events: whose turn it is, then every key's function, then remembering."""
    lines = [
        "def take(events, give):",
        "    for event in events:",
        f"        {', '.join(Prepared._fields)} = event",
        "        if actor is None:",
        "            give([*nothing])",
        "            continue",
        "        arrival = known.get(event_id)",
        "        if arrival is not None and received <= arrival[0]:",
        "            give([*arrival[1]])",
        "            continue",
        "        if late:",
        "            give([*alone(event)])",
        "            continue",
        f"        tile = at // {TILE}",
        "        row = (",
    ]
    for key, plan in _PLANS.items():
        columns = KEYS[key]
        arguments = ", ".join(["tile", *plan.columns])
        nothing = f"({'0, ' * len(plan.aggregates)})"
        if columns == ("hosts",):
            step = f"[of_{key}(host, {arguments}) for host in hosts]"
            lines.append(f"            *(map(max, zip(*{step})) if hosts else {nothing}),")
            continue
        name = columns[0] if len(columns) == 1 else f"({', '.join(columns)})"
        present = " and ".join(f"{column} is not None" for column in columns if column != "actor")
        call = f"of_{key}({name}, {arguments})"
        lines.append(
            f"            *({call} if {present} else {nothing})," if present else f"            *{call},"
        )
    lines += [
        "        )",
        f"        arrival = known[event_id] = (at + {WATERMARK}, row, event_id, received)",
        "        arrived.append(arrival)",
        "        give([*row])",
    ]
    return "\n".join(lines) + "\n"


def _compiled(source: str, name: str, names: dict[str, Any]) -> Callable[..., Any]:
    namespace = dict(names)
    exec(compile(source, f"<online features: {name}>", "exec"), namespace)
    function: Callable[..., Any] = namespace[name]
    return function


_PLANS: dict[Key, _Plan] = {
    key: _Plan(key) for key in get_args(Key) if any(one.key == key for one in AGGREGATES)
}
_GROUPED = [one for plan in _PLANS.values() for one in plan.aggregates]
_ORDER = np.array([_GROUPED.index(one) for one in AGGREGATES])
"""The loop makes rows key by key; this puts them in the order of `AGGREGATES`."""


def _alone_grouped(event: Prepared) -> tuple[int, ...]:
    row = alone(event)
    return tuple(row[AGGREGATES.index(one)] for one in _GROUPED)


_NOTHING: list[int] = []
"""The records of a key that has not left its first tile."""

_STEP_NAMES = {"nothing": _NOTHING, "clogc": clogc_table(1), "grow": clogc_table}
_LOOP_NAMES = {"nothing": (0,) * len(AGGREGATES), "alone": _alone_grouped}
