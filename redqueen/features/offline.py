"""The offline compiler: the declared windows over whole tables at once, in integer arrays.

Belongs here: the semantics of `redqueen.features.declared`, vectorised. Does not belong here: reading events
(`redqueen.features.prepared`), floating point (`redqueen.features.finish`), storage.

How it counts. Rows are sorted by (key, the order in which they became known). There a window is a stretch
that ends at the row itself, and its beginning `low` never moves back. So

- counts and sums are differences of running totals;
- a row adds a *distinct* value from itself on until either the next row with the same key and value takes
  over or it falls out of the window: +1 here, -1 there, and a running total;
- c ln c of whole tiles is a running total as well; only the tile in progress is looked up.

All of it is O(n) after the sorts, for any length of window.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any, Protocol

import numpy as np
import polars as pl
from numpy.typing import NDArray

from redqueen.errors import InvalidInput
from redqueen.features.declared import (
    AGGREGATES,
    HORIZON,
    HOUR,
    KEYS,
    NAMES,
    SNAPSHOT_LAG,
    TILE,
    WATERMARK,
    Aggregate,
    Key,
    Window,
)
from redqueen.features.finish import SNAPSHOTS, clogc_table, finish
from redqueen.features.prepared import DIRECT, prepare_frame

__all__ = [
    "LOOKBACK",
    "DaySnapshot",
    "aggregate",
    "compute",
    "featurise",
    "featurise_prepared",
    "in_blocks",
]

LOOKBACK = timedelta(microseconds=-(-(HORIZON + WATERMARK) // HOUR) * HOUR)
"""Events received this long before a stretch of arrivals decide its values; older ones change none."""

Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]


class DaySnapshot(Protocol):
    """What one day's graph says of accounts and domains: float64 [n, S]; strangers read as newcomers."""

    def lookup(
        self, actors: Sequence[str | None], recipients: Sequence[str | None], hosts: Sequence[Sequence[str]]
    ) -> NDArray[np.float64]: ...


Snapshots = Callable[[date], DaySnapshot | None]
"""The snapshot of a day, or None where there is none: its features are NaN then."""


def featurise(
    events: pl.DataFrame,
    lookback: pl.DataFrame | None = None,
    *,
    behaviour: bool = True,
    snapshots: Snapshots | None = None,
    shards: int = 1,
) -> pl.DataFrame:
    """Features of a stretch of events: event_id and a float32 column a feature, row for row as in `events`.

    Args:
        events: rows of the events table. Raises InvalidInput where an event_id occurs twice.
        lookback: what became known before (see `LOOKBACK`); rows of it that are in `events` too count once.
        behaviour: off for streams without a sender; features that need one are NaN.
        snapshots: the days' graph snapshots; without them graph features are NaN.
        shards: in so many parts, by key, are the windows computed: the more, the less memory. Same result.
    """
    earlier = None if lookback is None else prepare_frame(lookback)
    return featurise_prepared(
        prepare_frame(events), earlier, behaviour=behaviour, snapshots=snapshots, shards=shards
    )


def featurise_prepared(
    prepared: pl.DataFrame,
    lookback: pl.DataFrame | None = None,
    *,
    behaviour: bool = True,
    snapshots: Snapshots | None = None,
    shards: int = 1,
) -> pl.DataFrame:
    """`featurise` for events that are prepared already (`redqueen.features.prepared.SCHEMA`)."""
    finished = _finished(prepared, lookback, behaviour, snapshots, shards)
    # Column by column and a few rows at a time: in float64 the whole would be twice the table.
    columns = np.empty((len(NAMES), prepared.height), dtype=np.float32)
    for start in range(0, prepared.height, _STEP):
        part = slice(start, start + _STEP)
        columns[:, part] = finished(part).T
    return pl.DataFrame(
        {"event_id": prepared["event_id"], **{name: columns[i] for i, name in enumerate(NAMES)}}
    )


_STEP = 65_536


def in_blocks(
    blocks: Iterable[pl.DataFrame],
    lookback: pl.DataFrame | None = None,
    *,
    behaviour: bool = True,
    snapshots: Snapshots | None = None,
    shards: int = 1,
) -> Iterator[pl.DataFrame]:
    """The features of a long stretch of prepared events, block by block: memory is a block and `LOOKBACK`.

    The blocks follow one another by `received`. An event_id may come again in another block, not in the same.
    """
    for block in blocks:
        yield featurise_prepared(block, lookback, behaviour=behaviour, snapshots=snapshots, shards=shards)
        lookback = _still_read(_lay_out(block, lookback))


def _still_read(rows: pl.DataFrame) -> pl.DataFrame:
    newest = rows["received"].max()
    if not isinstance(newest, int):
        return rows
    return rows.filter(pl.col("received") >= newest - LOOKBACK // timedelta(microseconds=1))


def compute(
    prepared: pl.DataFrame,
    lookback: pl.DataFrame | None = None,
    *,
    behaviour: bool = True,
    snapshots: Snapshots | None = None,
    shards: int = 1,
) -> NDArray[np.float64]:
    """The features of prepared events before they are narrowed for a table: float64 [n, F]."""
    return _finished(prepared, lookback, behaviour, snapshots, shards)(slice(None))


def _finished(
    prepared: pl.DataFrame,
    lookback: pl.DataFrame | None,
    behaviour: bool,
    snapshots: Snapshots | None,
    shards: int,
) -> Callable[[slice], NDArray[np.float64]]:
    """Count, and say how to finish a stretch of the rows."""
    _demand_unique(prepared["event_id"])
    has_actor = prepared["actor"].is_not_null().to_numpy() & behaviour
    if behaviour:
        raw = aggregate(prepared, lookback, shards=shards)
    else:
        raw = np.zeros((prepared.height, len(AGGREGATES)), dtype=np.int64)
    direct = prepared["direct"].to_numpy().reshape(prepared.height, len(DIRECT))
    graph = _look_up(prepared, snapshots)
    return lambda part: finish(raw[part], direct[part], graph[part], has_actor[part])


def _demand_unique(ids: pl.Series) -> None:
    hashes = np.sort(ids.hash().to_numpy())
    if not (hashes[1:] == hashes[:-1]).any():
        return
    twice = ids.len() - ids.n_unique()
    if twice:
        raise InvalidInput(
            f"{twice} of {ids.len()} events repeat an event_id; each event has one row of features. "
            "Drop the copies (ingestion keeps the first) and compute the features again"
        )


def _look_up(prepared: pl.DataFrame, snapshots: Snapshots | None) -> NDArray[np.float64]:
    found = np.full((prepared.height, len(SNAPSHOTS)), np.nan)
    if snapshots is None or prepared.is_empty():
        return found
    days = (prepared["received"].to_numpy() - SNAPSHOT_LAG) // (24 * HOUR)
    for day in np.unique(days):
        snapshot = snapshots((datetime(1970, 1, 1, tzinfo=UTC) + timedelta(days=int(day))).date())
        if snapshot is not None:
            rows = np.flatnonzero(days == day)
            part = prepared[rows]
            found[rows] = snapshot.lookup(
                part["actor"].to_list(), part["recipient"].to_list(), part["hosts"].to_list()
            )
    return found


# --- which rows count, and in which order -------------------------------------------------------------------


def aggregate(prepared: pl.DataFrame, lookback: pl.DataFrame | None = None, *, shards: int = 1) -> Ints:
    """The raw aggregates [n, A] of prepared events, in the order of `AGGREGATES`."""
    if shards < 1:
        raise InvalidInput(f"shards is {shards}; it is a number of parts, 1 or more")
    rows = _lay_out(prepared, lookback)
    height = prepared.height
    if not height:
        return np.empty((0, len(AGGREGATES)), dtype=np.int64)
    live = rows["actor"].is_not_null().to_numpy()
    late = rows["late"].to_numpy()
    received, at = rows["received"].to_numpy(), rows["at"].to_numpy()
    order = _by_arrival(received, rows["event_id"], np.flatnonzero(live))
    source = np.arange(len(rows))
    kept = _settle_copies(rows["event_id"], received, at, late, order, source)

    wanted = source[len(rows) - height :]
    lonely = live[-height:] & late[wanted]
    counted = np.flatnonzero(live[-height:] & ~lonely)
    needed, place = np.unique(wanted[counted], return_inverse=True)
    # One row of memory an aggregate: they come one after the other.
    raw = np.zeros((len(AGGREGATES), height), dtype=np.int64)
    for column, values in _Stream(rows, kept, needed, shards).columns():
        raw[column, counted] = values[place]
    if lonely.any():
        raw[:, lonely] = _alone(prepared.filter(lonely)).T
    return raw.T


_READ = ("event_id", "received", "at", "late")


def _lay_out(prepared: pl.DataFrame, lookback: pl.DataFrame | None) -> pl.DataFrame:
    used = dict.fromkeys(column for columns in KEYS.values() for column in columns)
    for one in AGGREGATES:
        used |= dict.fromkeys(column for column in (one.value, one.where) if column)
    columns = list(dict.fromkeys([*_READ, *used]))
    prepared = prepared.select(columns)
    if lookback is None or lookback.is_empty():
        return prepared
    return pl.concat([lookback.select(columns), prepared])


def _by_arrival(received: Ints, ids: pl.Series, rows: Ints) -> Ints:
    """The rows, sorted by (received, event_id)."""
    moments = received[rows]
    if (moments[1:] > moments[:-1]).all():
        return rows
    rows = rows[np.argsort(moments, kind="stable")]
    moments = received[rows]
    same = moments[1:] == moments[:-1]
    tied = np.flatnonzero(np.append(same, False) | np.insert(same, 0, False))
    if tied.size:
        among = pl.DataFrame({"received": moments[tied], "id": ids[rows[tied]], "row": rows[tied]})
        rows[tied] = among.sort("received", "id", maintain_order=True)["row"].to_numpy()
    return rows


def _settle_copies(ids: pl.Series, received: Ints, at: Ints, late: Bools, order: Ints, source: Ints) -> Ints:
    """The rows of `order` that count; `source` of a copy becomes the row whose values it gets."""
    hashes = ids.hash().to_numpy()[order]
    sorted_hashes = np.sort(hashes)
    again = np.unique(sorted_hashes[1:][sorted_hashes[1:] == sorted_hashes[:-1]])
    counts = ~late[order]
    if again.size:
        first: dict[str, int] = {}
        # Ids that come more than once are few; only they are walked.
        for position in np.flatnonzero(np.isin(hashes, again)):
            row = int(order[position])
            known = first.get(ids[row])
            if known is not None and received[row] <= at[known] + WATERMARK:
                source[row] = known
                counts[position] = False
            elif counts[position]:
                first[ids[row]] = row
    return order[counts]


def _alone(prepared: pl.DataFrame) -> Ints:
    """The aggregates [n, A] of events that are alone in the world."""
    raw = np.zeros((prepared.height, len(AGGREGATES)), dtype=np.int64)
    for column, one in enumerate(AGGREGATES):
        present = np.ones(prepared.height, dtype=bool)
        for name in KEYS[one.key]:
            present &= _present(prepared[name])
        if one.where is not None:
            present &= prepared[one.where].to_numpy()
        match one.op:
            case "count":
                raw[present, column] = 1
            case "distinct":
                raw[present & _present(prepared[one.value or ""]), column] = 1
            case "sum":
                raw[present, column] = prepared[one.value or ""].to_numpy()[present]
            case "gap":
                raw[present, column] = one.window.length
    return raw


def _present(column: pl.Series) -> Bools:
    if column.dtype == pl.List:
        return column.list.len().fill_null(0).to_numpy() > 0
    return column.is_not_null().to_numpy()


# --- key by key ---------------------------------------------------------------------------------------------


class _Stream:
    """The rows that count, in the order in which they became known.

    Args:
        rows: all rows; kept: those that count, in order; needed: those whose values are asked for, ascending.
    """

    def __init__(self, rows: pl.DataFrame, kept: Ints, needed: Ints, shards: int) -> None:
        self._rows, self._kept, self._shards = rows, kept, shards
        slot = np.full(len(rows), -1, dtype=np.int64)
        slot[needed] = np.arange(len(needed))
        self._slot = slot[kept]
        self._needed = len(needed)
        self._codes: dict[str, Ints] = {}
        self._numbers: dict[str, NDArray[Any]] = {}
        self._at = rows["at"].to_numpy()[kept]

    def columns(self) -> Iterator[tuple[int, Ints]]:
        """(place in AGGREGATES, values of the needed rows), one aggregate after the other."""
        if not self._needed:
            return
        for key, columns in KEYS.items():
            places = [place for place, one in enumerate(AGGREGATES) if one.key == key]
            if places:
                yield from zip(places, self._of(key, columns, places), strict=True)

    def _of(self, key: Key, columns: tuple[str, ...], places: list[int]) -> list[Ints]:
        members, code = self._members(columns)
        kinds = int(code.max(initial=-1)) + 1
        asked = np.zeros(kinds, dtype=bool)
        asked[code[self._slot[members] >= 0]] = True
        keep = asked[code]
        members, code = members[keep], code[keep]
        found = [np.zeros(self._needed, dtype=np.int64) for _ in places]
        for shard in range(self._shards):
            part = slice(None) if self._shards == 1 else np.flatnonzero(code % self._shards == shard)
            ordered = _Ordered(self, members[part], code[part])
            for out, place in zip(found, places, strict=True):
                ordered.write(AGGREGATES[place], out)
        return found

    def _members(self, columns: tuple[str, ...]) -> tuple[Ints, Ints]:
        """Positions that have the key (several times where the key has several values), and its code."""
        if columns == ("hosts",):
            hosts = self._rows["hosts"]
            many = hosts.list.len().fill_null(0).to_numpy().astype(np.int64)
            code = _codes(hosts.filter(pl.Series(many > 0)).explode())
            place = np.full(len(many), -1, dtype=np.int64)
            place[self._kept] = np.arange(len(self._kept))
            members = np.repeat(place, many)
            known = np.flatnonzero(members >= 0)
            order = known[_sorted_by(members[known])]
            return members[order], code[order]
        code = self.code(columns[0])
        for column in columns[1:]:
            other = self.code(column)
            both = code * (int(other.max(initial=0)) + 1) + other
            code = np.where((code >= 0) & (other >= 0), both, -1)
        members = np.flatnonzero(code >= 0)
        code = code[members]
        return members, _dense(code) if len(columns) > 1 else code

    def code(self, column: str) -> Ints:
        """The column's values as numbers from 0 on; -1 where there is none."""
        if column not in self._codes:
            self._codes[column] = _codes(self._rows[column])[self._kept]
        return self._codes[column]

    def number(self, column: str) -> NDArray[Any]:
        """A flag or an integer column."""
        if column not in self._numbers:
            self._numbers[column] = self._rows[column].to_numpy()[self._kept]
        return self._numbers[column]

    @property
    def at(self) -> Ints:
        return self._at

    @property
    def slot(self) -> Ints:
        return self._slot


class _Ordered:
    """Some keys' rows, sorted by (key, the order in which they became known)."""

    def __init__(self, stream: _Stream, members: Ints, code: Ints) -> None:
        order = _sorted_by(code)
        self._stream = stream
        self._rows = members[order]
        self._key = _runs(code[order])
        self._n = len(order)
        tile = stream.at[self._rows] // TILE
        self._earliest = int(tile.min(initial=0))
        self._span = int(tile.max(initial=0)) - self._earliest + 1
        self._base = self._key * self._span
        # Key and clock in one rising number: the clock of a key never moves back.
        self._clock = np.maximum.accumulate(self._base + (tile - self._earliest))
        self._slot = stream.slot[self._rows]
        self._low: dict[Window, Ints] = {}
        self._exit: dict[Window, Ints] = {}
        self._next: dict[tuple[str, str | None], tuple[Ints, Ints]] = {}

    def write(self, one: Aggregate, out: Ints) -> None:
        """The aggregate of every needed row into its place of `out`; the largest where a row comes twice."""
        if not self._n:
            return
        values = getattr(self, f"_{one.op}")(one)
        asked = self._slot >= 0
        if one.key == "domain":
            np.maximum.at(out, self._slot[asked], values[asked])
        else:
            out[self._slot[asked]] = values[asked]

    def low(self, window: Window) -> Ints:
        """The first row inside the window of each row."""
        if window not in self._low:
            length, hop = window.length // TILE, window.hop // TILE
            tile = self._clock - self._base + self._earliest
            start = np.maximum((tile - length) // hop * hop - self._earliest, 0)
            self._low[window] = np.searchsorted(self._clock, self._base + start)
        return self._low[window]

    def exit(self, window: Window) -> Ints:
        """The first row in whose window each row is no more."""
        if window not in self._exit:
            self._exit[window] = np.cumsum(np.bincount(self.low(window), minlength=self._n))
        return self._exit[window]

    def _total(self, one: Aggregate, numbers: NDArray[Any]) -> Ints:
        total = np.zeros(self._n + 1, dtype=np.int64)
        np.cumsum(numbers, out=total[1:])
        return np.asarray(total[1:] - total[self.low(one.window)])

    def _count(self, one: Aggregate) -> Ints:
        if one.where is None:
            return np.arange(1, self._n + 1) - self.low(one.window)
        return self._total(one, self._stream.number(one.where)[self._rows])

    def _sum(self, one: Aggregate) -> Ints:
        assert one.value is not None
        numbers = self._stream.number(one.value)[self._rows]
        if one.where is not None:
            numbers = numbers * self._stream.number(one.where)[self._rows]
        return self._total(one, numbers)

    def _distinct(self, one: Aggregate) -> Ints:
        assert one.value is not None
        which, following = self._following(one.value, one.where)
        end = np.minimum(following, self.exit(one.window)[which])
        change = np.zeros(self._n + 1, dtype=np.int64)
        change[which] = 1
        change -= np.bincount(end, minlength=self._n + 1)
        return np.asarray(np.cumsum(change[:-1]))

    def _following(self, value: str, where: str | None) -> tuple[Ints, Ints]:
        """The rows with the value (and the flag), and the next with the same key and value; n if none."""
        if (value, where) not in self._next:
            code = self._stream.code(value)[self._rows]
            has = code >= 0
            if where is not None:
                has &= self._stream.number(where)[self._rows]
            which = np.flatnonzero(has)
            both = self._key[which] * (int(code.max(initial=0)) + 1) + code[which]
            order = _sorted_by(both)
            both = both[order]
            following = np.full(len(which), self._n)
            same = np.flatnonzero(both[1:] == both[:-1])
            following[order[same]] = which[order[same + 1]]
            self._next[value, where] = which, following
        return self._next[value, where]

    def _clogc(self, one: Aggregate) -> Ints:
        tile = _runs(self._clock)
        first = np.flatnonzero(np.diff(tile, prepend=-1))
        sizes = np.diff(np.append(first, self._n))
        table = np.array(clogc_table(int(sizes.max())), dtype=np.int64)
        whole = np.concatenate([[0], np.cumsum(table[sizes])])
        in_progress = table[np.arange(1, self._n + 1) - first[tile]]
        return np.asarray(whole[tile] - whole[tile[self.low(one.window)]] + in_progress)

    def _gap(self, one: Aggregate) -> Ints:
        moments, rank = np.unique(self._stream.at[self._rows], return_inverse=True)
        base = self._key * len(moments)
        clock = moments[np.maximum.accumulate(base + rank) - base]
        gap = np.full(self._n, one.window.length)
        same = self._key[1:] == self._key[:-1]
        gap[1:][same] = np.minimum(clock[1:] - clock[:-1], one.window.length)[same]
        return gap


# --- numbers for names --------------------------------------------------------------------------------------


def _codes(names: pl.Series) -> Ints:
    """Different names as different numbers from 0 on, -1 for null: by one hash, checked by another."""
    present = names.is_not_null().to_numpy()
    if not present.all():
        code = np.full(len(names), -1, dtype=np.int64)
        code[present] = _codes(names.drop_nulls())
        return code
    code = _dense(names.hash(_SEEDS[0]).to_numpy())
    check = names.hash(_SEEDS[1]).to_numpy()
    any_of = np.empty(int(code.max(initial=-1)) + 1, dtype=np.uint64)
    any_of[code] = check
    if (any_of[code] != check).any():
        # Two names share a hash: sort the names themselves.
        return names.rank("dense").to_numpy().astype(np.int64) - 1
    return code


_SEEDS = (secrets.randbits(63), secrets.randbits(63))
"""Nobody can choose names that collide."""


def _dense(numbers: NDArray[np.integer]) -> Ints:
    """The numbers' ranks, equal numbers alike, from 0 on."""
    order = np.argsort(numbers)
    code = np.empty(len(numbers), dtype=np.int64)
    code[order] = _runs(numbers[order])
    return code


def _runs(rising: NDArray[np.integer]) -> Ints:
    """Which run of equal numbers each one is in, from 0 on."""
    if not len(rising):
        return np.empty(0, dtype=np.int64)
    return np.concatenate([[0], np.cumsum(rising[1:] != rising[:-1])])


def _sorted_by(code: Ints) -> Ints:
    """The stable order of non-negative numbers; packed into one word with the position where both fit."""
    bits = max(1, len(code).bit_length())
    if int(code.max(initial=0)).bit_length() + bits > 63:
        return np.argsort(code, kind="stable")
    packed = (code << bits) | np.arange(len(code))
    packed.sort()
    return np.asarray(packed & ((1 << bits) - 1))
