"""Which ids have been taken in, by which hour, and what they said: so that a row sent again, in another file
or another hour, is known for what it is.

Per table a manifest (`index/<table>/manifest.json`, compare-and-swap) names the segments
(`index/<table>/<hours>-<random>.parquet`, never changed): sorted 64-bit hashes of id and content, with the
hour that took the row in and the instant it carries. An hour claims its rows by swapping the manifest, before
it writes them: of two hours that race for an id one loses the swap, reads again and finds it taken. A process
killed between claim and data runs again and finds its own claims. What is a duplicate is decided in
`redqueen.ingest`; nothing here reads a row's meaning.

The whole index can be made again from `ingested/`: delete the manifest, and the next hour does so.
"""

from __future__ import annotations

import hashlib
import io
import json
import random
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from redqueen import state
from redqueen.errors import Conflict, NotFound
from redqueen.store import ObjectStore, to_json
from redqueen.tables import HOUR, hour_key, landed_hours, read_keys

PREFIX = "index"
OWN_TIME = {"events": "ts", "labels": "labeled_at"}
"""The row's own time: a row sent again carries the same one, so its day says where to look."""

WINDOW = timedelta(days=7)
"""An id that comes back with another time of its own lies in another day; for so long it is known all the
same.
"""
TRIES = 20
LEFT_FOR = timedelta(hours=6)
"""A segment that no manifest has named for so long never will be: its writer was killed."""
MAX_DAYS_NAMED = 1000
CACHED_BYTES = 64_000_000

KNOWN = {"id": pl.UInt64(), "content": pl.UInt64(), "received": pl.Int64(), "hour": pl.Int32()}
"""id, content: hashes. received: its `received_at`, in epoch microseconds. hour: the hour that took it in, in
hours since the epoch.
"""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Segment:
    """One file of the index, as the manifest names it: hours `first` to `last`, own days (None: too many)."""

    key: str
    first: int
    last: int
    days: tuple[int, ...] | None
    rows: int

    def concerns(self, hour: int, days: Collection[int]) -> bool:
        """Whether a row of these days, landed in `hour`, may lie in it already."""
        reach = WINDOW // HOUR
        near = self.first <= hour + reach and self.last >= hour - reach
        return near or self.days is None or not set(self.days).isdisjoint(days)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "days": None if self.days is None else list(self.days)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Segment:
        return cls(**{**data, "days": None if data["days"] is None else tuple(data["days"])})


# -- hashing -------------------------------------------------------------------------------------------------


def number_of(hour: datetime) -> int:
    """The hour as the index counts it."""
    return int((hour - _EPOCH) // HOUR)


def days_of(times: pl.Series) -> tuple[int, ...]:
    """The days that instants lie in, since the epoch."""
    days = (times.dt.epoch("d")).unique().drop_nulls()
    return tuple(sorted(int(day) for day in days))


def hash_ids(ids: Iterable[str | None]) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """64 bits of each id, alike in every version and process."""
    made = b"".join(_eight(one or "") for one in ids)
    return np.frombuffer(made, dtype="<u8").astype(np.uint64)


def _eight(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def hash_contents(rows: pl.DataFrame) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """64 bits of what each row says, `received_at` aside: a row sent twice says the same.

    Nulls are left out, so that a column that a later version adds changes no row that does not use it.
    """
    parts = []
    for name, kind in rows.schema.items():
        if name == "received_at":
            continue
        value = pl.col(name)
        if isinstance(kind, pl.Datetime):
            value = value.dt.epoch("us")
        elif kind.is_float():
            value = (value * 1e9).round().cast(pl.Int64, strict=False)
        said = pl.concat_str(pl.lit(f"{name}\x1f"), value.cast(pl.String), pl.lit("\x1e"))
        parts.append(said.fill_null(""))
    return hash_ids(rows.select(pl.concat_str(parts)).to_series().to_list() if parts else [])


def fingerprints(rows: pl.DataFrame, id_column: str) -> pl.DataFrame:
    """`id, content, received` of rows of a table, in their order."""
    return pl.DataFrame(
        {
            "id": hash_ids(rows[id_column].to_list()),
            "content": hash_contents(rows),
            "received": rows["received_at"].dt.epoch("us"),
        },
        schema={name: kind for name, kind in KNOWN.items() if name != "hour"},
    )


# -- claiming ------------------------------------------------------------------------------------------------


def claim(
    store: ObjectStore,
    table: str,
    hour: datetime,
    ids: pl.Series,
    days: Collection[int],
    decide: Callable[[pl.DataFrame], tuple[pl.DataFrame, _Made]],
) -> _Made:
    """Settle, against what is known, which rows this hour keeps, and make that known before anything is
    written.

    Args:
        ids: hashes to look up.
        days: the days of the rows' own time.
        decide: gets what is known of the ids (`KNOWN`, each id once) and returns the rows that the hour keeps
            (`id, content, received`) and whatever it made of them. Called again when another writer came
            first.

    Raises:
        Conflict: `TRIES` writers in a row came first.
    """
    mine = number_of(hour)
    for attempt in range(TRIES):
        if attempt:
            time.sleep(random.uniform(0, 0.005 * 2 ** min(attempt, 6)))
        segments, etag = _manifest(store, table)
        try:
            known = _look_up(store, [s for s in segments if s.concerns(mine, days)], ids)
            kept, made = decide(known)
            if _commit(store, table, segments, etag, mine, kept, days):
                return made
        except NotFound:
            # A segment was merged away after the manifest was read.
            continue
    raise Conflict(f"{PREFIX}/{table}/manifest.json", f"{TRIES} other writers came first; run the hour again")


def _commit(
    store: ObjectStore,
    table: str,
    segments: list[Segment],
    etag: str | None,
    hour: int,
    kept: pl.DataFrame,
    days: Collection[int],
) -> bool:
    """Put the hour's claims in place of those it had; False where another writer swapped the manifest."""
    claims = kept.with_columns(pl.lit(hour, pl.Int32).alias("hour")).select(*KNOWN).sort("id")
    around = [s for s in segments if s.first <= hour <= s.last]
    held = {s.key: _read(store, s.key) for s in around}
    before = [rows.filter(pl.col("hour") == hour) for rows in held.values()]
    if claims.equals(pl.concat([pl.DataFrame(schema=KNOWN), *before]).sort("id")):
        return True
    wanted = [s for s in segments if s not in around]
    for segment in around:
        rest = held[segment.key].filter(pl.col("hour") != hour)
        if rest.height == segment.rows:
            wanted.append(segment)
        elif rest.height:
            wanted.append(_write(store, table, rest, segment.days))
    if claims.height:
        wanted.append(_write(store, table, claims, tuple(sorted(days))))
    after = _merged(store, table, wanted)
    swapped = _swap(store, table, segments, after, etag)
    for segment in set(wanted) - set(after) - set(segments):
        store.delete(segment.key)
    return swapped


def _swap(
    store: ObjectStore, table: str, before: list[Segment], after: list[Segment], etag: str | None
) -> bool:
    ordered = sorted(after, key=lambda s: (s.first, s.key))
    data = to_json({"segments": [s.to_dict() for s in ordered]})
    try:
        if etag is None:
            store.put_if_absent(_manifest_key(table), data)
        else:
            store.put_if_match(_manifest_key(table), data, etag)
    except Conflict:
        for segment in set(after) - set(before):
            store.delete(segment.key)
        return False
    for segment in set(before) - set(after):
        store.delete(segment.key)
    return True


def _merged(store: ObjectStore, table: str, segments: list[Segment]) -> list[Segment]:
    """Segments of a day of arrival that is over become one: a check must not cost more files every hour."""
    today = max((s.last for s in segments), default=0) // 24
    kept, by_day = [], {}  # type: tuple[list[Segment], dict[int, list[Segment]]]
    for segment in segments:
        if segment.first // 24 == segment.last // 24 < today:
            by_day.setdefault(segment.first // 24, []).append(segment)
        else:
            kept.append(segment)
    for group in by_day.values():
        if len(group) == 1:
            kept += group
            continue
        rows = pl.concat([_read(store, s.key) for s in group]).sort("id")
        named = [s.days for s in group if s.days is not None]
        days = tuple(sorted(set().union(*named))) if len(named) == len(group) else None
        kept.append(_write(store, table, rows, days))
    return kept


# -- reading and writing -------------------------------------------------------------------------------------


def _manifest_key(table: str) -> str:
    return f"{PREFIX}/{table}/manifest.json"


def _manifest(store: ObjectStore, table: str) -> tuple[list[Segment], str | None]:
    try:
        blob = store.get(_manifest_key(table))
    except NotFound:
        built = _build(store, table)
        if not built:
            return [], None
        _swap(store, table, [], built, None)
        blob = store.get(_manifest_key(table))
    return [Segment.from_dict(s) for s in json.loads(blob.data)["segments"]], blob.etag


def _build(store: ObjectStore, table: str) -> list[Segment]:
    """The index of a home that has none yet, from what it has taken in; the first hour of an id has it."""
    seen: pl.DataFrame | None = None
    segments = []
    for hour in landed_hours(store, f"ingested/{table}"):
        rows = read_keys(store, store.list(hour_key(f"ingested/{table}", hour)))
        if rows.is_empty():
            continue
        found = fingerprints(rows, "event_id" if table == "events" else "label_id")
        found = found.unique("id", keep="first", maintain_order=True)
        if seen is not None:
            found = found.join(seen, on="id", how="anti")
        seen = found.select("id") if seen is None else pl.concat([seen, found.select("id")])
        numbered = found.with_columns(pl.lit(number_of(hour), pl.Int32).alias("hour")).select(*KNOWN)
        if numbered.height:
            segments.append(_write(store, table, numbered.sort("id"), days_of(rows[OWN_TIME[table]])))
    return segments


def _write(store: ObjectStore, table: str, rows: pl.DataFrame, days: tuple[int, ...] | None) -> Segment:
    first, last = int(rows["hour"].min()), int(rows["hour"].max())  # type: ignore[arg-type]
    key = f"{PREFIX}/{table}/{first}-{last}-{uuid.uuid4().hex[:12]}.parquet"
    out = io.BytesIO()
    # Hashes do not compress, and a dictionary of them is twice their size.
    pq.write_table(rows.to_arrow(), out, compression="zstd", use_dictionary=False)
    store.put(key, out.getvalue())
    _remember(key, rows)
    named = days if days is not None and len(days) <= MAX_DAYS_NAMED else None
    return Segment(key, first, last, named, rows.height)


_cache: OrderedDict[str, pl.DataFrame] = OrderedDict()


def _remember(key: str, rows: pl.DataFrame) -> None:
    _cache[key] = rows
    while len(_cache) > 1 and sum(frame.estimated_size() for frame in _cache.values()) > CACHED_BYTES:
        _cache.popitem(last=False)


def _read(store: ObjectStore, key: str) -> pl.DataFrame:
    """A segment's rows. Segments never change and no name is used twice, so a process reads each once."""
    if key in _cache:
        return _cache[key]
    table: pa.Table = pq.read_table(io.BytesIO(store.get(key).data))
    rows = pl.DataFrame(pl.from_arrow(table)).cast(KNOWN)  # type: ignore[arg-type]
    _remember(key, rows)
    return rows


def _look_up(store: ObjectStore, segments: list[Segment], ids: pl.Series) -> pl.DataFrame:
    """What is known of the ids, each once."""
    wanted = np.unique(ids.to_numpy())
    found = [pl.DataFrame(schema=KNOWN)]
    for segment in segments:
        rows = _read(store, segment.key)
        if not wanted.size or not rows.height:
            continue
        held = rows["id"].to_numpy()
        places = np.searchsorted(held, wanted)
        places = places[(places < held.size)]
        hits = places[held[places] == wanted[: places.size]]
        if hits.size:
            found.append(rows[hits])
    # One id has one owner; an index that was built from an older home may know better of the first.
    return pl.concat(found).sort("hour", "received").unique("id", keep="first", maintain_order=True)


# -- for retention and erasure -------------------------------------------------------------------------------


def forget(
    store: ObjectStore,
    table: str,
    *,
    before: datetime | None = None,
    ids: Collection[int] = (),
    changed: Mapping[int, int] | None = None,
) -> int:
    """Drop what hours before `before` took in, and these ids; give `changed` ids their new content.

    Returns how many entries are gone or changed. Leftovers of killed writers are removed once they have been
    there for `LEFT_FOR`: a segment that no manifest names may be one that a writer is about to name.
    """
    changed = changed or {}
    if not store.exists(_manifest_key(table)):
        return 0  # made from what is there then, when it is needed
    for _ in range(TRIES):
        # Listed before the manifest is swapped: what a writer puts later is not a leftover.
        there = {key for key in store.list(f"{PREFIX}/{table}/") if key.endswith(".parquet")}
        segments, etag = _manifest(store, table)
        wanted, gone, touched = [], 0, 0
        for segment in segments:
            try:
                rows = _read(store, segment.key)
            except NotFound:
                break
            kept = rows if before is None else rows.filter(pl.col("hour") >= number_of(before))
            kept = kept.filter(~pl.col("id").is_in(list(ids))) if ids else kept
            gone += rows.height - kept.height
            new = _with_contents(kept, changed)
            if new.equals(rows):
                wanted.append(segment)
                continue
            touched += int((new["content"] != kept["content"]).sum())
            if new.height:
                wanted.append(_write(store, table, new, segment.days))
        else:
            if wanted != segments and not _swap(store, table, segments, wanted, etag):
                continue
            for key in _left(store, table, there - {s.key for s in wanted} - {s.key for s in segments}):
                store.delete(key)
                _cache.pop(key, None)
            return gone + touched
    raise Conflict(_manifest_key(table), f"{TRIES} other writers came first; try again")


def _left(store: ObjectStore, table: str, unnamed: set[str]) -> list[str]:
    """Those of the segments without a name that had none long ago; the others are noted."""
    now = datetime.now(UTC)

    def note(known: dict[str, Any]) -> dict[str, Any]:
        return {key: known.get(key, now.isoformat()) for key in sorted(unnamed)}

    noted = state.update(store, f"{PREFIX}/{table}/leftovers.json", note) if unnamed else {}
    return [key for key, at in noted.items() if now - datetime.fromisoformat(at) >= LEFT_FOR]


def _with_contents(rows: pl.DataFrame, changed: Mapping[int, int]) -> pl.DataFrame:
    if not changed:
        return rows
    swap = pl.DataFrame(
        {"id": list(changed), "new": list(changed.values())}, schema={"id": pl.UInt64, "new": pl.UInt64}
    )
    joined = rows.join(swap, on="id", how="left", maintain_order="left")
    return joined.with_columns(content=pl.coalesce("new", "content")).select(*KNOWN)


def entries(store: ObjectStore, table: str) -> pl.DataFrame:
    """Everything the index knows of a table (`KNOWN`); for tests and for people who look into it."""
    segments, _ = _manifest(store, table)
    return pl.concat([pl.DataFrame(schema=KNOWN), *(_read(store, s.key) for s in segments)]).sort("id")
