"""The daily graph snapshot: what an account's ties said about it at midnight, for every event of the day.

Belongs here: when a snapshot is due, building it from one day's new events and what is kept of the days
before, keeping it, and looking it up. From events to ties is `redqueen.ties`, the numbers are
`redqueen.graphmath`.

A snapshot of day D holds what was known before D 00:00 UTC and nothing else. It is written once: files first,
then the marker that names them, and without the marker there is no snapshot. Files that arrive late make no
new one, because what was served stays true; they are in the next day's.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import accumulate
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from redqueen.errors import Conflict, NotFound
from redqueen.features.declared import FEATURES, SNAPSHOT_LAG, Snapshot
from redqueen.store import ObjectStore, to_json, to_parquet
from redqueen.tables import HOUR
from redqueen.ties import DOMAINS, KEYS, READS, Ties, hosts_of, known_before, latest, merge, ties

logger = logging.getLogger(__name__)

DAY = timedelta(days=1)
HORIZON_DAYS = 30
"""Ties older than this no longer count; a domain's first sight counts for ever."""
LATE_DAYS = 2
"""The newest days' ties are made again for each snapshot: their files may have come late."""
MOST_DAYS = 7
"""Snapshots of so many missed days are made up for; older ones stay missing, and their features NaN."""
GRACE = timedelta(microseconds=SNAPSHOT_LAG) / 2
"""How long a snapshot waits for a last hour in which nothing has landed."""
STRAGGLING_HOURS = 6
"""An hour that landed and was not taken in holds a snapshot up until so many hours after it were."""

COLUMNS = tuple((f.value.of, f.value.column) for f in FEATURES if isinstance(f.value, Snapshot))
"""The columns of a look-up: whose number, and which; in the order of the declared features."""

_REVISION = 1
"""Raise it when a number changes its meaning under the same name."""
VERSION = f"{_REVISION}-{hashlib.sha256(repr(COLUMNS).encode()).hexdigest()[:8]}"

_ID = {"actor": "actor_id", "recipient": "recipient_id", "domain": "host"}
NUMBERS = {of: [column for kind, column in COLUMNS if kind == of] for of in _ID}
"""The columns of each kind of row."""


def day_key(day: date) -> str:
    """The prefix of one day's snapshot."""
    return f"graph/day={day:%Y-%m-%d}/"


def marker_key(day: date, version: str = VERSION) -> str:
    """What says that a day's snapshot is complete, and of which files it is made."""
    return f"{day_key(day)}complete-{version}.json"


def midnight(day: date) -> datetime:
    """The instant that the snapshot of `day` is as of."""
    return datetime(day.year, day.month, day.day, tzinfo=UTC)


def snapshot_day(received_us: int) -> date:
    """The day whose snapshot an event received at this instant (microseconds) reads."""
    return (datetime.fromtimestamp(0, UTC) + timedelta(microseconds=received_us - SNAPSHOT_LAG)).date()


# --- looking up ---------------------------------------------------------------------------------------------


class _Table:
    """Rows by name: 8 bytes a name and 4 a number. Names that are not in it have the last row."""

    def __init__(self, names: pl.Series, values: NDArray[np.float32], absent: NDArray[np.float32]) -> None:
        # hash() differs from process to process but never leaves this one, and costs a hundredth of a digest.
        hashed = np.fromiter(map(hash, names), dtype=np.int64, count=len(names))
        order = np.argsort(hashed, kind="stable")
        self._hashes = np.r_[hashed[order], np.iinfo(np.int64).max]
        self._rows = np.vstack([values[order], absent[None, :]]).astype(np.float32)
        self.nbytes = self._hashes.nbytes + self._rows.nbytes

    def __len__(self) -> int:
        return len(self._hashes) - 1

    def rows(self, names: Sequence[str | None]) -> NDArray[np.float32]:
        """A row for each name [n, k]."""
        if len(names) == 1:
            # Serving asks for one event at a time, and arrays of one cost five times as much as a number.
            one = hash(names[0])
            place = int(self._hashes.searchsorted(one))
            if self._hashes[place] != one:
                place = len(self)
            return self._rows[place : place + 1]
        wanted = np.fromiter(map(hash, names), dtype=np.int64, count=len(names))
        at = self._hashes.searchsorted(wanted)
        at[self._hashes[at] != wanted] = len(self)
        return self._rows[at]


@dataclass(frozen=True)
class GraphSnapshot:
    """What was known of accounts and domains at an instant.

    facts: what the graph looked like, as shown to people; `newcomer`: what an unknown account reads.
    """

    as_of: datetime
    facts: Mapping[str, Any]
    newcomer: Mapping[str, float]
    _tables: Mapping[str, _Table] = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Memory that the tables take."""
        return sum(table.nbytes for table in self._tables.values())

    def lookup(
        self,
        actors: Sequence[str | None],
        recipients: Sequence[str | None],
        hosts: Sequence[Sequence[str]],
    ) -> NDArray[np.float64]:
        """The snapshot's numbers for n events [n, S], in the order of the declared features.

        An account that is unknown, or absent, reads what a newcomer does. Of several domains the least number
        counts, each column by itself; an event without a domain reads 0 there.
        """
        parts = [self._tables["actor"].rows(actors), self._tables["recipient"].rows(recipients)]
        found = np.concatenate([*parts, self._least(hosts)], axis=1, dtype=np.float64)
        return found if _IN_ORDER else found[:, _ORDER]

    def _least(self, hosts: Sequence[Sequence[str]]) -> NDArray[np.float32]:
        linked = [place for place, names in enumerate(hosts) if names]
        found = np.zeros((len(hosts), _WIDTH["domain"]), dtype=np.float32)
        if linked:
            flat = [name for place in linked for name in hosts[place]]
            starts = [0, *accumulate(len(hosts[place]) for place in linked)][:-1]
            found[linked] = np.minimum.reduceat(self._tables["domain"].rows(flat), starts, axis=0)
        return found


_WIDTH = {of: len(columns) for of, columns in NUMBERS.items()}
_ORDER = np.argsort([i for of in _ID for i, (kind, _) in enumerate(COLUMNS) if kind == of])
_IN_ORDER = _ORDER.tolist() == list(range(len(COLUMNS)))


def open_snapshot(store: ObjectStore, day: date) -> GraphSnapshot | None:
    """The snapshot of `day`; None where it was not (or not completely) written, or by another version."""
    marker = complete(store, day)
    if marker is None:
        return None
    try:
        tables = {of: _open_table(store, of, marker) for of in _ID}
    except NotFound as error:
        logger.warning("the graph snapshot of %s is marked complete, but a file is gone: %s", day, error)
        return None
    return GraphSnapshot(midnight(day), marker["facts"], marker["newcomer"], tables)


def complete(store: ObjectStore, day: date) -> dict[str, Any] | None:
    """The marker of a complete snapshot: as_of, latest instants in it, files, newcomer, facts."""
    try:
        return store.get_json(marker_key(day))
    except NotFound:
        return None


def rows_of(store: ObjectStore, marker: Mapping[str, Any]) -> pl.DataFrame:
    """All rows of a snapshot: `day`, `of` (actor, recipient, domain), `name`, and a column for each number,
    null where it is none of that kind.
    """
    day = pl.lit(marker["as_of"][:10])
    parts = [
        _read(store, marker["files"][f"{of}s"], [name, *NUMBERS[of]]).select(
            day.alias("day"), pl.lit(of).alias("of"), pl.col(name).alias("name"), *NUMBERS[of]
        )
        for of, name in _ID.items()
    ]
    return pl.concat(parts, how="diagonal")


def _open_table(store: ObjectStore, of: str, marker: Mapping[str, Any]) -> _Table:
    columns = NUMBERS[of]
    rows = _read(store, marker["files"][f"{of}s"], [_ID[of], *columns])
    absent = np.array([marker["newcomer"].get(column, 0.0) for column in columns], dtype=np.float32)
    return _Table(rows[_ID[of]], rows.select(columns).to_numpy().astype(np.float32), absent)


# --- building -----------------------------------------------------------------------------------------------


def build(store: ObjectStore, day: date) -> dict[str, Any]:
    """Make the snapshot of `day` unless it is there; its marker. Killed at any point and run again: the same.

    Reads the events of the newest days and the kept ties of the others; domains come from the snapshot
    before.
    """
    there = complete(store, day)
    if there is not None:
        return there
    as_of = midnight(day)
    days = [day - DAY * back for back in range(HORIZON_DAYS, 0, -1)]
    parts = [_ties_of(store, one, fresh=one >= day - LATE_DAYS * DAY) for one in days]
    return write(store, day, known_before(merge([part for part in parts if part is not None]), as_of))


def write(store: ObjectStore, day: date, known: Ties) -> dict[str, Any]:
    """Compute and keep the snapshot of `day` from ties that were known by then; its marker."""
    from redqueen import graphmath

    as_of = midnight(day)
    found = graphmath.numbers(known, as_of)
    carried, first_seen = _carried_domains(store, day)
    pairs = pl.concat([known.domains, carried]).group_by("host", "actor_id").agg(pl.col("known_at").min())
    domains, carry = graphmath.domains(pairs, first_seen, as_of)
    received, answered = latest(known)
    tables = {
        "actors": found.actors,
        "recipients": found.recipients,
        "domains": domains,
        "domain_actors": carry,
    }
    files = {name: _put(store, day, name, rows) for name, rows in tables.items()}
    marker: dict[str, Any] = {
        "as_of": as_of.isoformat(),
        "version": VERSION,
        "latest_received": received.isoformat() if received else None,
        "latest_answer": answered.isoformat() if answered else None,
        "files": files,
        "newcomer": found.newcomer,
        "facts": found.facts | {"domains": domains.height},
    }
    try:
        store.put_if_absent(marker_key(day), to_json(marker))
    except Conflict:
        # Two runs built the same day; what the first has named is what is served.
        winner = store.get_json(marker_key(day))
        for key in set(files.values()) - set(winner["files"].values()):
            store.delete(key)
        return winner
    return marker


def as_of_holds(marker: Mapping[str, Any]) -> bool:
    """Whether everything that a snapshot counted was known before its instant."""
    as_of = datetime.fromisoformat(marker["as_of"])
    instants = [marker["latest_received"], marker["latest_answer"]]
    return all(datetime.fromisoformat(instant) < as_of for instant in instants if instant)


def _ties_of(store: ObjectStore, day: date, *, fresh: bool) -> Ties | None:
    """The ties of one day's events: as kept, or made from the events; None where there are neither."""
    keys = {name: f"graph/edges/dt={day:%Y-%m-%d}/{name}.parquet" for name in KEYS}
    # The edges are written last: where they are, the others are.
    if not fresh and store.exists(keys["edges"]):
        return Ties(**{name: _read(store, key) for name, key in keys.items()})
    events = _read_day(store, day)
    if events is None:
        return None
    whole = ties(events.drop("hosts"), events["hosts"])
    for name in reversed(KEYS):
        store.put(keys[name], to_parquet(getattr(whole, name).sort(KEYS[name]).to_arrow()))
    return whole


def _read_day(store: ObjectStore, day: date) -> pl.DataFrame | None:
    """What ties are made of in a day's events, with the `hosts` of each; None where there are none."""
    events, prepared = (_files_by_hour(store, table, day) for table in ("ingested/events", "prepared"))
    hours = [_read_hour(store, keys, prepared.get(hour, [])) for hour, keys in events.items()]
    return pl.concat(hours) if hours else None


def _files_by_hour(store: ObjectStore, table: str, day: date) -> dict[str, list[str]]:
    prefix = f"{table}/dt={day:%Y-%m-%d}/"
    found: dict[str, list[str]] = {}
    for key in store.list(prefix):
        if key.endswith(".parquet"):
            found.setdefault(key.removeprefix(prefix).split("/")[0], []).append(key)
    return found


def _read_hour(store: ObjectStore, keys: list[str], prepared: list[str]) -> pl.DataFrame:
    events = pl.concat(_read(store, key, list(READS)) for key in keys)
    before = pl.concat([_read(store, key, ["event_id", "hosts"]) for key in prepared]) if prepared else None
    if before is None or not events["event_id"].is_in(before["event_id"].implode()).all():
        # Texts are most of the bytes: they are fetched only where the features have not read them already.
        events = pl.concat(_read(store, key, [*READS, "text"]) for key in keys)
    return events.select(READS).with_columns(hosts=hosts_of(events, before))


def _carried_domains(store: ObjectStore, day: date) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """What the newest snapshot before `day` knows of domains: pairs, and when each was first seen.

    Of whatever version: these two files never change their columns, and no domain becomes new by an upgrade.
    """
    markers = [key for key in store.list("graph/day=") if "/complete-" in key and key < day_key(day)]
    if not markers:
        return pl.DataFrame(schema=DOMAINS), None
    files = store.get_json(markers[-1])["files"]
    return _read(store, files["domain_actors"], list(DOMAINS)), _read(
        store, files["domains"], ["host", "first_seen"]
    )


def _put(store: ObjectStore, day: date, name: str, rows: pl.DataFrame) -> str:
    """Write one file of a snapshot under a name of its own content: no run overwrites what another serves."""
    data = to_parquet(rows.to_arrow())
    key = f"{day_key(day)}{name}-{hashlib.sha256(data).hexdigest()[:8]}.parquet"
    store.put(key, data)
    return key


def _read(store: ObjectStore, key: str, columns: list[str] | None = None) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(store.get(key).data), columns=columns)


# --- when ---------------------------------------------------------------------------------------------------


def recent_days(now: datetime) -> list[date]:
    """The days whose snapshot is still made, were it missing."""
    today = now.astimezone(UTC).date()
    return [today - DAY * back for back in range(MOST_DAYS - 1, -1, -1)]


def due_days(
    now: datetime, landed: Sequence[datetime], taken_in: Sequence[datetime], made: Iterable[date]
) -> tuple[list[date], str]:
    """The days whose snapshot should be built now, oldest first, and why those.

    Args:
        landed, taken_in: hours of events that arrived, and those that ingestion has written; in order.
        made: the days that are complete.
    """
    if not taken_in:
        return [], "no event has been taken in yet"
    there = set(made)
    wanted = [day for day in recent_days(now) if day > taken_in[0].date() and day not in there]
    if not wanted:
        return [], "every snapshot is there" if there else "no day has ended yet"
    done = set(taken_in)
    waiting = [h for h in landed if h not in done and h > taken_in[-1] - STRAGGLING_HOURS * HOUR]
    due: list[date] = []
    for day in wanted:
        last = midnight(day) - HOUR
        held = [hour for hour in waiting if hour <= last]
        if held:
            return due, f"{day} waits for {held[0]:%m-%d %H}h to be taken in"
        if last not in done and now < midnight(day) + GRACE:
            return due, f"{day} waits until {midnight(day) + GRACE:%H:%M} for files of its last hour"
        due.append(day)
    return due, f"ties known by {due[-1]} 00:00 UTC"
