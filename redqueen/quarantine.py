"""Refused rows: kept with their reason, counted, never dropped silently, and tried again when the rules have
changed.

What is refused, and why, is decided elsewhere (`redqueen.ingest`, `redqueen.importing`). Rows here are raw:
they never go into logs or metadata, only their counts and reasons do.

An object of refused rows is never changed; which of its rows were landed again is kept beside it
(`_retried.json`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import polars as pl

from redqueen import ingest, loose, state, vendors
from redqueen.clock import hour_of
from redqueen.errors import Conflict, InvalidInput, NotFound
from redqueen.schema import polars_schema
from redqueen.store import ObjectStore
from redqueen.tables import hour_key

PREFIX = "quarantine"
MARKS = "_retried.json"
NO_REASON = "no reason given"


def refuse(store: ObjectStore, table: str, hour: datetime, refused: pl.DataFrame) -> str | None:
    """Keep the refused rows of one hour; returns the key, or None where there is nothing to keep.

    The key is a digest of the rows, whatever their order: the same rows again are the same object. Columns
    that are null throughout a row are left out of it.
    """
    lines = sorted(_line(row) for row in refused.iter_rows(named=True))
    if not lines:
        return None
    data = ("\n".join(lines) + "\n").encode("utf-8", "replace")
    digest = hashlib.blake2b(data, digest_size=12).hexdigest()
    key = f"{PREFIX}/{hour_key(table, hour)}{digest}.jsonl"
    with contextlib.suppress(Conflict):
        store.put_if_absent(key, data)
    return key


def refuse_files(
    store: ObjectStore, table: str, hour: datetime, unreadable: Iterable[tuple[str, str]]
) -> str | None:
    """Keep (file, reason) of files of which nothing could be read; the files themselves stay where they
    landed.
    """
    schema = {"_file": pl.String, "reason": pl.String}
    return refuse(store, table, hour, pl.DataFrame(list(unreadable), schema=schema, orient="row"))


def _line(row: dict[str, Any]) -> str:
    kept = {name: value for name, value in row.items() if value is not None}
    return json.dumps(kept, sort_keys=True, default=str)


# -- reading -------------------------------------------------------------------------------------------------


def read(store: ObjectStore, table: str, hour: datetime | None = None) -> list[dict[str, Any]]:
    """The refused rows of `table`, of one hour or of all, each once, in order of hour; not those that were
    landed again.

    An hour that is ingested again after more files landed refuses some rows twice, in two objects: rows
    that are equal to the last byte (file and line included) are one.
    """
    return [
        {**json.loads(line), "_hour": folder.split("/", 2)[2]} for folder, line in _lines(store, table, hour)
    ]


def _lines(store: ObjectStore, table: str, hour: datetime | None) -> Iterator[tuple[str, bytes]]:
    """(folder, line) of the rows that wait."""
    prefix = f"{PREFIX}/{hour_key(table, hour)}" if hour else f"{PREFIX}/{table}/"
    folders: dict[str, dict[bytes, None]] = {}
    for key in store.list(prefix):
        if key.endswith(".jsonl"):
            with contextlib.suppress(NotFound):
                lines = [line for line in store.get(key).data.splitlines() if line.strip()]
                folders.setdefault(key.rpartition("/")[0], {}).update(dict.fromkeys(lines))
    for folder, held in folders.items():
        done = state.read(store, f"{folder}/{MARKS}")
        yield from ((folder, line) for line in held if _digest(line) not in done)


def _digest(line: bytes) -> str:
    return hashlib.blake2b(line, digest_size=8).hexdigest()


def tables(store: ObjectStore) -> list[str]:
    """The tables of which anything was ever refused."""
    return sorted({key.split("/")[1] for key in store.list(f"{PREFIX}/") if key.count("/") > 1})


def counts(store: ObjectStore, table: str, hour: datetime | None = None) -> dict[str, int]:
    """How many rows were refused for each reason, the commonest first."""
    return dict(Counter(row.get("reason", NO_REASON) for row in read(store, table, hour)).most_common())


def listing(store: ObjectStore, table: str, reason: str | None = None) -> pl.DataFrame:
    """Hour (`dt=../hr=..`), reason and rows, for a person: counts only, nothing of the rows.

    `reason` keeps the reasons that contain it.
    """
    tally = Counter((row["_hour"], row.get("reason", NO_REASON)) for row in read(store, table))
    rows = [(hour, why, n) for (hour, why), n in sorted(tally.items()) if (reason or "") in why]
    return pl.DataFrame(rows, schema={"hour": pl.String, "reason": pl.String, "rows": pl.Int64}, orient="row")


# -- trying again --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Retried:
    """What came of a retry. `landed`: the file that the rows went into, None where there were none;
    `still`: why the others stay, with how many.
    """

    tried: int
    passed: int
    still: dict[str, int]
    landed: str | None


@dataclass(frozen=True)
class _Waiting:
    folder: str
    hour: datetime
    digest: str
    row: dict[str, Any]

    @property
    def whole(self) -> bool:
        """Whether it is about a whole file, of which nothing could be read."""
        return not set(self.row) - {"_file", "reason"}


def retry(
    store: ObjectStore,
    table: str,
    now: datetime,
    *,
    policies: Iterable[str] | None = None,
    hour: datetime | None = None,
    reason: str | None = None,
) -> Retried:
    """Land again the refused rows that pass the rules of today; those that do not stay, counted.

    They land as one file in the current hour and are taken in with it. Their `received_at` is now: they did
    reach us earlier, but no training set, figure or threshold of that time could hold them, and a training
    set as of that time must stay what it was. Rules on times are asked with the old `received_at`, so
    that waiting does not make an impossible time possible. `_origin` names where they were refused.

    The file is named by its rows and written before they are marked: killed in between and run again, in
    this hour it is the same file, in a later one the ids are known and the rows are counted as copies.

    Args:
        reason: try only rows whose reason contains it.

    Raises:
        InvalidInput: rows of this table were not landed here (an import's, say).
    """
    if table not in ingest.ID:
        raise InvalidInput(
            f"rows of '{table}' cannot be tried again from here: mend their source, or use one of "
            f"{', '.join(ingest.ID)}"
        )
    waiting = [
        w for w in _waiting(store, table, hour) if (reason or "") in str(w.row.get("reason", NO_REASON))
    ]
    passed: list[_Waiting] = []
    rows: list[dict[str, Any]] = []
    still: Counter[str] = Counter()
    for origin in sorted({w.hour for w in waiting}):
        group = [w for w in waiting if w.hour == origin]
        for entries, frame in _sources(store, table, group, still):
            good, fine = _passing(store, entries, frame, table, now, policies, still)
            passed += fine
            rows += good
    landed = _land(store, table, rows, now) if rows else None
    _mark(store, passed, now, landed)
    return Retried(len(waiting), len(passed), dict(still.most_common()), landed)


def _waiting(store: ObjectStore, table: str, hour: datetime | None) -> Iterator[_Waiting]:
    for folder, line in _lines(store, table, hour):
        with contextlib.suppress(ValueError):
            at = datetime.strptime(folder.split("/", 2)[2], "dt=%Y-%m-%d/hr=%H").replace(tzinfo=UTC)
            yield _Waiting(folder, at, _digest(line), json.loads(line))


_ENTRY = "_entry"


def _sources(
    store: ObjectStore, table: str, group: list[_Waiting], still: Counter[str]
) -> Iterator[tuple[list[_Waiting], pl.DataFrame]]:
    """The rows to judge again, with `_entry`, the place of the entry that each belongs to.

    A row is judged as it was kept. What was refused of a vendor's file, and whole files, are read again: the
    adapter or the reader is what has changed.
    """
    again: dict[str, list[_Waiting]] = {}
    as_kept: list[_Waiting] = []
    for entry in group:
        file = str(entry.row.get("_file", ""))
        if str(entry.row.get("reason", "")).endswith(ingest.SETTLED):
            still[str(entry.row["reason"])] += 1
        elif entry.whole or vendors.is_vendors(file.rpartition("/")[2]):
            again.setdefault(file, []).append(entry)
        elif loose.RAW in entry.row:
            still[str(entry.row.get("reason", NO_REASON))] += 1
        else:
            as_kept.append(entry)
    if as_kept:
        columns = {name: [w.row.get(name) for w in as_kept] for name in polars_schema(table)}
        frame = pl.DataFrame(columns, schema=dict.fromkeys(columns, pl.String()))
        yield as_kept, frame.with_row_index(_ENTRY).cast({_ENTRY: pl.Int64})
    for file, entries in again.items():
        try:
            frame = ingest.read_file(store.get(file).data, file)
        except (InvalidInput, NotFound):
            still.update(str(entry.row.get("reason", NO_REASON)) for entry in entries)
            continue
        yield entries, _claimed(frame, table, entries, still)


def _claimed(frame: pl.DataFrame, table: str, entries: list[_Waiting], still: Counter[str]) -> pl.DataFrame:
    """Of a file that was read again, the rows that the entries are about: all of them for a whole file."""
    key = ingest.ID[table]
    whole = [i for i, entry in enumerate(entries) if entry.whole]
    if whole:
        return frame.with_columns(pl.lit(whole[0], pl.Int64).alias(_ENTRY))
    places = {str(entry.row[key]): i for i, entry in enumerate(entries) if entry.row.get(key)}
    lost = [entry for entry in entries if str(entry.row.get(key)) not in places]
    still.update(str(entry.row.get("reason", NO_REASON)) for entry in lost)
    wanted = frame.filter(pl.col(key).is_in(list(places)))
    return wanted.with_columns(pl.Series(_ENTRY, [places[one] for one in wanted[key].to_list()], pl.Int64))


def _passing(
    store: ObjectStore,
    entries: list[_Waiting],
    frame: pl.DataFrame,
    table: str,
    now: datetime,
    policies: Iterable[str] | None,
    still: Counter[str],
) -> tuple[list[dict[str, Any]], list[_Waiting]]:
    """The rows that pass today, ready to land, and the entries that are settled by it."""
    named = tuple(policies) if policies is not None else None
    key, origin = ingest.ID[table], entries[0].hour
    numbered = frame.drop(_ENTRY).with_columns(pl.int_range(pl.len(), dtype=pl.Int64).alias(loose.ROW))
    then = ingest.conform(numbered, table, origin, now, named)
    landing = then.clean.with_columns(received_at=pl.lit(now).cast(loose.TIME))
    today = ingest.conform(landing, table, hour_of(now), now, named)
    for outcome in (then, today):
        still.update(outcome.refused["reason"].to_list())
    late = set(today.refused[key].to_list())
    failed = set(then.refused[loose.ROW].to_list()) | {
        place for place, one in enumerate(frame[key].cast(pl.String).to_list()) if one in late
    }
    rows = [
        {**{name: value for name, value in row.items() if value is not None},
         "_origin": hour_key(table, origin).rstrip("/")}
        for row in today.clean.iter_rows(named=True)
    ]  # fmt: skip
    if any(entry.whole for entry in entries):
        # A file that can be read now is settled as a file: what fails in it is refused row by row.
        refuse(store, table, origin, then.refused.drop(loose.ROW))
        refuse(store, table, origin, today.refused.drop(loose.ROW))
        return rows, entries
    of = frame[_ENTRY].to_list()
    stay = {of[place] for place in failed}
    return rows, [entries[i] for i in sorted(set(of) - stay)]


def _land(store: ObjectStore, table: str, rows: list[dict[str, Any]], now: datetime) -> str:
    lines = sorted(json.dumps(row, sort_keys=True, default=_iso) for row in rows)
    timeless = sorted(json.dumps({**row, "received_at": None}, sort_keys=True, default=_iso) for row in rows)
    digest = hashlib.blake2b("\n".join(timeless).encode(), digest_size=8).hexdigest()
    key = f"{hour_key(table, hour_of(now))}retry-{digest}.jsonl"
    with contextlib.suppress(Conflict):
        store.put_if_absent(key, ("\n".join(lines) + "\n").encode())
    return key


def _iso(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def _mark(store: ObjectStore, passed: list[_Waiting], now: datetime, landed: str | None) -> None:
    for folder in sorted({w.folder for w in passed}):
        new = {w.digest: {"at": now.isoformat(), "landed": landed} for w in passed if w.folder == folder}

        def change(known: dict[str, Any], new: dict[str, Any] = new) -> dict[str, Any] | None:
            return None if new.keys() <= known.keys() else {**new, **known}

        state.update(store, f"{folder}/{MARKS}", change)
