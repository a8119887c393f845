"""Erasing an actor or an event from everything that is kept: tables, landed files, quarantine, reports, the
index, and the folders of the home.

How it stays complete when the process is killed: the ids are found first and kept as tombstones (salted
hashes, `redqueen.tombstones`); from then on every row is compared with the tombstones, so a run that goes on
finds the rest although the table that joined actor and events is already clean. Every object is replaced
whole, by compare-and-swap; passes are made until one changes nothing.

What happens to a row:
- about an erased event, or sent by an erased actor: it goes, in whatever table;
- of other people, naming an erased actor as recipient or as rater: it stays under a pseudonym, because the
  message is its sender's, and a judgement is about somebody else's message. The pseudonym is the same
  everywhere (a rater's reliability can still be estimated) and cannot be turned back without the id.
- a list of ids (which messages were held out, attacked, grouped): the place says "erased".

What is not changed: bundles in `models/` (hashed and signed; they hold weights, and the snapshot they were
trained on is named so that a person can decide), the simulator's world in `demo/`, and what other people
wrote, even where it mentions the erased one by name. No row, id or text goes into a log or a report.
"""

from __future__ import annotations

import csv
import html
import io
import json
import os
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from redqueen import ingest, ledger, state, tombstones, truth, vendors
from redqueen.errors import Conflict, InvalidInput, NotFound
from redqueen.settings import Settings
from redqueen.store import DirectoryStore, ObjectStore
from redqueen.tombstones import ERASED, Tombstones

EVENT_COLUMNS = ("event_id",)
ACTOR_COLUMNS = ("actor_id",)
LABEL_COLUMNS = ("label_id",)
VEILED_COLUMNS = ("recipient_id", "rater_id")
LISTED = re.compile(r"(_ids|^ids|^actors|^events|^raters|^recipients)$")
"""Lists of ids, in Parquet and JSON: the places of erased ones say so."""

ID_KEYS = frozenset({*EVENT_COLUMNS, *ACTOR_COLUMNS, *LABEL_COLUMNS, *VEILED_COLUMNS, "id", "target"})
"""What a JSON object is about, where one of these names an erased id."""

NEVER = ("models/", "index/", f"{tombstones.PREFIX}/")
LOOSE = ("quarantine/",)
"""Rows that follow no schema: any value of theirs may be the id."""

UNKEYED = (
    *("evaluations/", "signals/", "references/", "rollout/", "decisions/", "candidates/", "reports/"),
    *("state/", "graph/", "training_sets/"),
)
"""JSON whose objects are never keyed by an id: an actor who is called "spam" must not take a policy away."""

SKIPPED_HOME = ("dagster", "cache", "demo", "keys", "logs")
"""Folders of the home that hold nothing of a person, or only what the store has."""

TEXTS = (".html", ".md", ".txt", ".log")
LANDING = ("events/", "labels/")
LONGEST_ID = 300
PASSES = 5
SWEPT_FOR = timedelta(days=7)
"""So long after an erasure each day's housekeeping looks for what came back."""
SCRATCH_SECONDS = 600


@dataclass
class Report:
    """What an erasure did. Counts are by table: rows gone, rows pseudonymised (or places in lists), objects
    rewritten.

    models: (candidate, model) trained on rows about the erased. unreadable: objects in which nothing can be
    looked for. clean: whether the last pass found nothing more.
    """

    request: str
    removed: Counter[str] = field(default_factory=Counter)
    veiled: Counter[str] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    models: list[tuple[str, str]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    events: int = 0
    clean: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "models": [list(pair) for pair in self.models]}


def erase(
    store: ObjectStore,
    settings: Settings,
    kind: str,
    one: str,
    now: datetime,
    by: str,
    on_step: Callable[[str], None] = lambda _: None,
) -> Report:
    """Erase an actor and everything of theirs, or one event. Killed and run again it goes on.

    Args:
        kind: "actor" or "event".
        one: the id.
        on_step: told, in words without the id, what is done next.

    Raises:
        InvalidInput: the id is empty or the kind unknown.
        Conflict: objects keep changing under the erasure; run it again.
    """
    if kind not in ("actor", "event") or not one.strip():
        raise InvalidInput(f"'{kind}' with an empty id cannot be erased: name an actor or an event")
    request = tombstones.request_name(store, kind, one)
    report = Report(request)
    on_step("looking for what is about it")
    found = {one} if kind == "event" else _events_of(store, settings, one)
    if kind == "actor":
        tombstones.add(store, request, "actor", [one])
    tombstones.add(store, request, "event", sorted(found))
    labels = _labels_on(store, tombstones.load(store, request))
    tombstones.add(store, request, "label", sorted(labels))
    stones = replace(tombstones.load(store, request), spelt=_spellings(one))
    report.events = len(stones.events)
    report.models = _trained_on(store, stones)
    _keep_record(store, report, kind, now, by, "running")
    if kind == "actor" and settings.redis_url is not None:
        on_step("the windows in Redis")
        report.objects["redis"] += _forget_windows(settings.redis_url.get_secret_value(), settings.salt, one)
    on_step("the index, and what is derived from labels")
    _clean_index(store, stones, report)
    report.objects["truth"] += truth.forget(store)
    for number in range(1, PASSES + 1):
        on_step(f"pass {number} over everything that is stored")
        report.unreadable = []
        if not _pass(store, settings, stones, report):
            report.clean = True
            break
    _clean_scratch(store)
    report.objects["truth"] += truth.forget(store)
    _keep_record(store, report, kind, now, by, "done" if report.clean else "running")
    if not report.clean:
        raise Conflict(
            "the store", f"after {PASSES} passes rows still come back; stop what writes them and run it again"
        )
    return report


def _spellings(one: str) -> tuple[re.Pattern[str], ...]:
    """The id as a word of its own in a text of no format: as it is, as JSON escapes it, and as a page does.
    Only who asks for the erasure knows it: what is kept is a hash, which finds words without punctuation.
    """
    forms = {one, json.dumps(one)[1:-1], html.escape(one), html.escape(one, quote=False)}
    return tuple(re.compile(rf"(?<!\w){re.escape(form)}(?!\w)") for form in sorted(forms))


def sweep(store: ObjectStore, settings: Settings, now: datetime) -> Report:
    """Go over everything once more for what was erased of late: what a lap or the scoring service held in
    memory was written when the erasure was done. Changes nothing where nothing came back.
    """
    report = Report("sweep", clean=True)
    updated = [datetime.fromisoformat(record["updated_at"]) for record in tombstones.records(store)]
    if any(now - at <= SWEPT_FOR for at in updated):
        report.clean = not _pass(store, settings, tombstones.load(store), report)
    return report


def _forget_windows(url: str, salt: str, actor: str) -> int:
    """Delete the actor from the behaviour windows that scoring services share; how many keys held it."""
    from redqueen.features.onredis import RedisEngine, connect

    return RedisEngine(connect(url), salt=salt).forget(actor)


def scrub(store: ObjectStore, keys: Iterable[str], stones: Tombstones) -> None:
    """Take what was erased out of these landed files, which brought it back."""
    for key in keys:
        _rewrite(store, key, stones, Report("scrub"))


def _keep_record(store: ObjectStore, report: Report, kind: str, now: datetime, by: str, status: str) -> None:
    def change(known: dict[str, Any]) -> dict[str, Any]:
        models = {tuple(pair) for pair in known.get("models", ())} | set(report.models)
        report.models = sorted(models)
        counts = {name: dict(getattr(report, name)) for name in ("removed", "veiled", "objects")}
        return {
            **known, "request": report.request, "kind": kind, "status": status, "by": by,
            "asked_at": known.get("asked_at", now.isoformat()), "updated_at": now.isoformat(),
            "events": report.events, "models": [list(pair) for pair in report.models], "last": counts,
        }  # fmt: skip

    state.update(store, tombstones.record_key(report.request), change)


# -- finding -------------------------------------------------------------------------------------------------


def _events_of(store: ObjectStore, settings: Settings, actor: str) -> set[str]:
    """The ids of everything that the actor sent, wherever a row still joins the two."""
    found: set[str] = set()
    for _, data in _everything(store, settings):
        for rows in _id_columns(*data, ("event_id", "actor_id")):
            mine = rows.filter(pl.col("actor_id").cast(pl.String) == actor)["event_id"].cast(pl.String)
            found.update(one.removeprefix(tombstones.HARD) for one in mine.drop_nulls().to_list())
    return found


def _everything(store: ObjectStore, settings: Settings) -> Iterator[tuple[str, tuple[str, bytes]]]:
    """(table, (name, bytes)) of every object that may hold rows, in the store and in the home."""
    for key in store.list(""):
        if not key.startswith(NEVER):
            try:
                yield _table_of(key), (key, store.get(key).data)
            except NotFound:
                continue
    for path in _home_files(store, settings):
        try:
            yield path.relative_to(settings.home).parts[0], (path.name, path.read_bytes())
        except FileNotFoundError:
            continue


def _home_files(store: ObjectStore, settings: Settings) -> Iterator[Path]:
    if not settings.home.is_dir():
        return
    for folder, folders, files in os.walk(settings.home):
        here = Path(folder)
        if isinstance(store, DirectoryStore):
            folders[:] = [name for name in folders if (here / name).resolve() != store.root]
        if here == settings.home:
            folders[:] = [name for name in folders if name not in SKIPPED_HOME]
            continue
        yield from (here / name for name in sorted(files))


def _table_of(key: str) -> str:
    parts = key.split("/")
    return "/".join(parts[:2]) if parts[0] in ("ingested", "quarantine") else parts[0]


def _id_columns(name: str, data: bytes, wanted: Sequence[str]) -> Iterator[pl.DataFrame]:
    """The wanted columns of a file, where it has all of them."""
    try:
        if name.endswith(".parquet"):
            if set(wanted) <= set(pq.read_schema(io.BytesIO(data)).names):
                yield pl.DataFrame(pl.from_arrow(pq.read_table(io.BytesIO(data), columns=list(wanted))))
        elif name.endswith((".jsonl", ".ndjson", ".csv")):
            rows = ingest.read_file(data, name)
            if set(wanted) <= set(rows.columns):
                yield rows.select(wanted)
    except (InvalidInput, pa.ArrowException):
        return


def _labels_on(store: ObjectStore, stones: Tombstones) -> set[str]:
    """The ids of the labels on erased events: some tables know a label by nothing else."""
    found: set[str] = set()
    for key in [*store.list("labels/"), *store.list("ingested/labels/")]:
        for rows in _id_columns(key, store.get(key).data, ("event_id", "label_id")):
            hit = rows.filter(stones.is_event(rows["event_id"]))["label_id"]
            found.update(hit.cast(pl.String).drop_nulls().to_list())
    return found


def _trained_on(store: ObjectStore, stones: Tombstones) -> list[tuple[str, str]]:
    """(candidate, model) whose training snapshot holds rows about what is erased."""
    found = []
    for key in store.list("training_sets/"):
        if not key.endswith(".parquet"):
            continue
        for rows in _id_columns(key, store.get(key).data, ("event_id",)):
            if stones.is_event(rows["event_id"]).any():
                name = key.split("/")[1].removeprefix("candidate=")
                model = state.read(store, state.candidate_key(name)).get("model_id")
                found.append((name, str(model or "not trained")))
    return sorted(set(found))


# -- the index -----------------------------------------------------------------------------------------------


def _clean_index(store: ObjectStore, stones: Tombstones, report: Report) -> None:
    """Drop the entries of rows that go, and give rows that stay under a pseudonym their new content.

    Before the tables are touched: they are what the entries are found by.
    """
    for table, key in ingest.ID.items():
        gone: set[int] = set()
        changed: dict[int, int] = {}
        for name in store.list(f"ingested/{table}/"):
            if not name.endswith(".parquet"):
                continue
            rows = pl.read_parquet(io.BytesIO(store.get(name).data))
            if not rows.height:
                continue
            hit = _about(rows, stones)
            gone.update(ledger.hash_ids(rows.filter(hit)[key].to_list()).tolist())
            veiled = rows.with_columns(stones.veil(rows[c]) for c in VEILED_COLUMNS if c in rows.columns)
            other = rows.filter(~hit)
            renamed = veiled.filter(~hit)
            if not other.equals(renamed):
                before, after = (ledger.fingerprints(part, key) for part in (other, renamed))
                moved = after.filter(after["content"] != before["content"])
                changed.update(zip(moved["id"].to_list(), moved["content"].to_list(), strict=True))
        count = ledger.forget(store, table, ids=gone, changed=changed)
        if count:
            report.removed[f"index/{table}"] += count


def _about(rows: pl.DataFrame, stones: Tombstones) -> pl.Series:
    hit = pl.Series("hit", [False] * rows.height, pl.Boolean)
    for name in rows.columns:
        if name in EVENT_COLUMNS:
            hit = hit | stones.is_event(rows[name])
        elif name in ACTOR_COLUMNS:
            hit = hit | stones.is_actor(rows[name])
        elif name in LABEL_COLUMNS:
            hit = hit | stones.is_label(rows[name])
    return hit


# -- rewriting -----------------------------------------------------------------------------------------------


@dataclass
class _Changed:
    """A file's new bytes (None: nothing of it is left to keep), and what was done to it."""

    data: bytes | None
    removed: int = 0
    veiled: int = 0


class _Unsearchable(Exception):
    """Nothing can be looked for in a file."""


def _pass(store: ObjectStore, settings: Settings, stones: Tombstones, report: Report) -> int:
    """Go over everything once; returns how many objects were changed."""
    changed = 0
    for key in store.list(""):
        if not key.startswith(NEVER):
            changed += _rewrite(store, key, stones, report)
    for path in _home_files(store, settings):
        changed += _rewrite_file(path, str(path.relative_to(settings.home)), stones, report)
    return changed


def _rewrite(store: ObjectStore, key: str, stones: Tombstones, report: Report) -> int:
    for _ in range(10):
        try:
            blob = store.get(key)
            done = _cleaned(key, blob.data, stones)
            if done is None:
                return 0
            if done.data is None:
                store.delete(key)
            else:
                store.put_if_match(key, done.data, blob.etag)
        except NotFound:
            return 0
        except Conflict:
            # Somebody else wrote it meanwhile: look again.
            continue
        except _Unsearchable:
            report.unreadable.append(key)
            return 0
        _count(report, _table_of(key), done)
        return 1
    raise Conflict(key, "it keeps changing; run the erasure again")


def _rewrite_file(path: Path, name: str, stones: Tombstones, report: Report) -> int:
    try:
        data = path.read_bytes()
        done = _cleaned(name, data, stones)
        if done is None:
            return 0
        if done.data is None:
            path.unlink(missing_ok=True)
        elif not _replace_file(path, done.data, len(data)):
            return 1  # the service wrote to it meanwhile: the next pass looks again
    except FileNotFoundError:
        return 0
    except _Unsearchable:
        report.unreadable.append(name)
        return 0
    _count(report, name.partition("/")[0], done)
    return 1


def _replace_file(path: Path, data: bytes, seen: int) -> bool:
    """Put `data` in the place of a file that was `seen` bytes long; False where it has grown since."""
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=".erase-")
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if path.stat().st_size != seen:
        os.unlink(draft)
        return False
    os.replace(draft, path)
    return True


def _count(report: Report, table: str, done: _Changed) -> None:
    report.objects[table] += 1
    report.removed[table] += done.removed
    report.veiled[table] += done.veiled


def _cleaned(name: str, data: bytes, stones: Tombstones) -> _Changed | None:
    """The file without what is erased; None where nothing of it is there, or it is of a kind that holds no
    rows. A page that names it goes whole: it is made again on request.

    Raises:
        _Unsearchable: a landed file that nobody can read.
    """
    leaf = name.rpartition("/")[2]
    loose = name.startswith(LOOSE) or vendors.is_vendors(leaf)
    if leaf.startswith((".erase-", "lock-")) or not data:
        return None
    try:
        if leaf.endswith(".parquet"):
            done = _parquet(data, stones)
        elif leaf.endswith((".jsonl", ".ndjson")):
            done = _json_lines(data, stones, loose=loose)
        elif leaf.endswith(".csv"):
            done = _csv(data, stones, loose=loose)
        elif leaf.endswith(".json"):
            done = _json(data, stones, loose=loose, keyed=not name.startswith(UNKEYED))
        elif leaf.endswith(TEXTS):
            return _Changed(None, removed=1) if _mentions(data.decode("utf-8", "replace"), stones) else None
        elif name.startswith(LANDING):
            return _garbage(data, stones)
        else:
            return None
    except (pa.ArrowException, OSError, ValueError, csv.Error, RecursionError) as error:
        if isinstance(error, UnicodeEncodeError):
            raise
        return _garbage(data, stones)
    return done if done.removed or done.veiled else None


def _garbage(data: bytes, stones: Tombstones) -> _Changed | None:
    """A broken file of a known format goes whole where it names what is erased."""
    if _mentions(data.decode("utf-8", "replace"), stones):
        return _Changed(None, removed=1)
    if not data.isascii():
        raise _Unsearchable
    return None


_TOKEN = re.compile(r"[^\s\"'\\,;:{}\[\]()<>=]+")


def _mentions(text: str, stones: Tombstones) -> bool:
    """Whether a text that follows no format holds an erased id as a word of its own."""
    if any(spelt.search(text) for spelt in stones.spelt):
        return True
    words = pl.Series("w", list(set(_TOKEN.findall(text))), pl.String)
    return bool(stones.is_event(words).any() or stones.is_actor(words).any())


def _parquet(data: bytes, stones: Tombstones) -> _Changed:
    file = pq.ParquetFile(io.BytesIO(data))
    schema = file.schema_arrow
    wanted = [n for n in schema.names if _concerns(n, schema.field(n).type)]
    if not wanted:
        return _Changed(data)
    ids = file.read(columns=wanted)
    hit = pl.Series("hit", [False] * ids.num_rows, pl.Boolean)
    replaced: dict[str, pa.Array] = {}
    touched = pl.Series("t", [False] * ids.num_rows, pl.Boolean)
    for name in wanted:
        if pa.types.is_list(schema.field(name).type) or pa.types.is_large_list(schema.field(name).type):
            lists = ids.column(name).to_pylist()
            new = [None if row is None else _listed(row, stones)[0] for row in lists]
            changed = pl.Series([a != b for a, b in zip(lists, new, strict=True)], dtype=pl.Boolean)
            if changed.any():
                replaced[name] = pa.array(new, type=schema.field(name).type)
                touched = touched | changed
            continue
        column = pl.Series(name, pl.from_arrow(ids.column(name).combine_chunks())).cast(pl.String)
        if name in VEILED_COLUMNS:
            veiled = stones.veil(column)
            if not veiled.equals(column):
                replaced[name] = veiled.to_arrow().cast(schema.field(name).type)
                touched = touched | (veiled != column).fill_null(False)
        elif name in ACTOR_COLUMNS:
            hit = hit | stones.is_actor(column)
        elif name in LABEL_COLUMNS:
            hit = hit | stones.is_label(column)
        else:
            hit = hit | stones.is_event(column)
    if not hit.any() and not replaced:
        return _Changed(data)
    table = file.read()
    for name, array in replaced.items():
        table = table.set_column(schema.get_field_index(name), schema.field(name), array)
    table = table.filter((~hit).to_arrow())
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return _Changed(out.getvalue(), removed=int(hit.sum()), veiled=int((touched & ~hit).sum()))


def _concerns(name: str, kind: pa.DataType) -> bool:
    listed = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if listed:
        inner = kind.value_type
        return bool(LISTED.search(name)) and (pa.types.is_string(inner) or pa.types.is_large_string(inner))
    return name in (*EVENT_COLUMNS, *ACTOR_COLUMNS, *LABEL_COLUMNS, *VEILED_COLUMNS)


def _listed(values: Sequence[Any], stones: Tombstones) -> tuple[list[Any], int]:
    """A list of ids with erased ones' places saying so, and how many there were."""
    texts = pl.Series("v", [v if isinstance(v, str) else None for v in values], pl.String)
    hit = (stones.is_event(texts) | stones.is_actor(texts) | stones.is_label(texts)).to_list()
    return [ERASED if h else v for v, h in zip(values, hit, strict=True)], sum(hit)


def _json_lines(data: bytes, stones: Tombstones, *, loose: bool) -> _Changed:
    """Lines that go become empty ones: the others keep the numbers that quarantine knows them by."""
    lines, done = data.split(b"\n"), _Changed(data)
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        text = line.decode("utf-8-sig", "replace")
        try:
            row = json.loads(text)
        except (ValueError, RecursionError):
            if _mentions(text, stones):
                lines[i], done.removed = b"", done.removed + 1
            continue
        cleaned, removed, veiled = _walk([row], stones, loose=loose, keyed=False)
        if removed and not cleaned:
            lines[i] = b""
        elif removed or veiled:
            lines[i] = json.dumps(cleaned[0]).encode()
        done.removed += removed
        done.veiled += veiled
    done.data = b"\n".join(lines)
    return done


def _csv(data: bytes, stones: Tombstones, *, loose: bool) -> _Changed:
    """The same for CSV: a record that goes leaves empty lines."""
    text = data.decode("utf-8-sig", "replace")
    lines = text.splitlines(keepends=True)
    reader = csv.reader(lines)
    header = next(reader, None) or []
    done, start = _Changed(data), reader.line_num
    for fields in reader:
        end = reader.line_num
        row: dict[str, Any] = dict(zip(header, fields, strict=False))
        cleaned: list[Any] = []
        whole = len(fields) == len(header)
        if not whole and _mentions(",".join(fields), stones):
            removed, veiled = 1, 0
        else:
            cleaned, removed, veiled = _walk([row] if whole else [], stones, loose=loose, keyed=False)
        if removed:
            lines[start:end] = ["\n"] * (end - start)
        elif veiled:
            out = io.StringIO()
            csv.writer(out, lineterminator="\n").writerow(cleaned[0].values())
            lines[start:end] = [out.getvalue(), *["\n"] * (end - start - 1)]
        done.removed += removed
        done.veiled += veiled
        start = end
    done.data = "".join(lines).encode()
    return done


def _json(data: bytes, stones: Tombstones, *, loose: bool, keyed: bool) -> _Changed:
    value = json.loads(data.decode("utf-8-sig"))
    cleaned, removed, veiled = _walk([value], stones, loose=loose, keyed=keyed)
    if not cleaned:
        return _Changed(None, removed=removed)
    return _Changed(json.dumps(cleaned[0], sort_keys=True, indent=1).encode(), removed, veiled)


def _walk(values: list[Any], stones: Tombstones, *, loose: bool, keyed: bool) -> tuple[list[Any], int, int]:
    """A list of JSON values without what is erased, and how many objects went and were pseudonymised.

    An object about something erased goes from its list. `loose`: any text of it may be what it is about.
    `keyed`: the names in an object may be ids too.
    """
    walker = _Walker(stones, loose=loose, keyed=keyed)
    return walker.list_(values), walker.removed, walker.veiled


class _Walker:
    """One walk through JSON; counts what it changes."""

    def __init__(self, stones: Tombstones, *, loose: bool, keyed: bool) -> None:
        self.stones, self.loose, self.keyed = stones, loose, keyed
        self.removed = self.veiled = 0

    def _hash(self, value: Any) -> int | None:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # a producer may write ids as numbers; taken in they are texts
        return self.stones.hash_of(value) if isinstance(value, str) and len(value) < LONGEST_ID else None

    def _is_erased(self, value: Any) -> bool:
        return self._hash(value) in self.stones.all

    def _is_about(self, record: dict[str, Any]) -> bool:
        for name, value in record.items():
            if name in VEILED_COLUMNS:
                continue
            if (self.loose or name in ID_KEYS) and self._is_erased(value):
                return True
            if name == "_raw" and isinstance(value, str) and _mentions(value, self.stones):
                return True
        return False

    def list_(self, values: list[Any]) -> list[Any]:
        kept = []
        for value in values:
            if isinstance(value, dict) and self._is_about(value):
                self.removed += 1
                continue
            kept.append(self.value(value))
        return kept

    def value(self, value: Any) -> Any:
        if isinstance(value, dict):
            return self.record(value)
        return self.list_(value) if isinstance(value, list) else value

    def record(self, record: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in record.items():
            if self.keyed and self._is_erased(name):
                self.removed += 1
            elif name in VEILED_COLUMNS and self._is_erased(value):
                made[name] = self.stones.pseudonym(str(value))
                self.veiled += 1
            elif isinstance(value, list) and LISTED.search(name):
                made[name], count = _listed(self.list_(value), self.stones)
                self.veiled += count
            elif name in ID_KEYS and self._is_erased(value):
                made[name] = ERASED
                self.veiled += 1
            else:
                made[name] = self.value(value)
        return made


def _clean_scratch(store: ObjectStore) -> None:
    """Remove what killed writers left half-written; a write that is under way is younger."""
    if not isinstance(store, DirectoryStore):
        return
    for path in (store.root / ".scratch").glob("tmp*"):
        try:
            if path.stat().st_mtime < time.time() - SCRATCH_SECONDS:
                path.unlink()
        except FileNotFoundError:
            continue
