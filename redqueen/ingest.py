"""What a landed row must be to enter the house: read the files of one hour, conform their rows to the
schema, tell the refused ones apart with a reason, and know what was taken in before.

Pure but for `read_landed` and `take_in`. What is known of other hours is kept in `redqueen.ledger`, vendors'
own formats are read in `redqueen.vendors`. Writing what was refused is `redqueen.quarantine`; the share and
shape of what came in is judged by `assets.expectations`. No row raises: everything lands in exactly one of
clean, refused, duplicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import polars as pl

from redqueen import arrivals, ledger, loose, vendors
from redqueen.errors import InvalidInput, NotFound
from redqueen.schema import ANY_POLICY, KINDS, LABEL_SOURCES, LABEL_VALUES, RESPONSES, TABLES, polars_schema
from redqueen.store import ObjectStore
from redqueen.tables import HOUR
from redqueen.tombstones import REASON as ERASED
from redqueen.tombstones import Tombstones

CLOCK_SKEW = timedelta(minutes=5)
"""How far ahead of ours another's clock may run."""
MAX_EVENT_AGE = timedelta(days=30)
"""An event that took longer to arrive is refused: no window, label or feature would ever see it in its
place.
"""
EPOCH_OF_LABELS = datetime.fromisoformat("2000-01-01T00:00:00+00:00")
FILE = "_file"
ID = {"events": "event_id", "labels": "label_id"}
ACTORS = ("actor_id", "recipient_id", "rater_id")
CONFLICT = "conflicting duplicate"
ELSEWHERE = "taken in before with other content"
SETTLED = (CONFLICT, ELSEWHERE, ERASED)
"""Reasons that no change of rules takes back."""
_RANGES = {"community_size": (0, 2**31 - 1), "confidence": (0.0, 1.0)}


class Landed(NamedTuple):
    """What landed in one hour of a table.

    rows: every row as it came, loosely typed, with `_file`, `_row` and, for broken lines, `_problem`.
    unreadable: (key, reason) of each file of which nothing could be read.
    """

    rows: pl.DataFrame
    unreadable: list[tuple[str, str]]


@dataclass(frozen=True)
class Conformed:
    """The rows of one hour, sorted out. Unpacks as `clean, refused`.

    clean: the table's schema, one row an id, in order of arrival.
    refused: the rows as they came (strings), with `reason`, `_file` and `_row`. Of rows that were erased on
        request nothing else is there.
    duplicates: how many rows were a re-sent identical copy of another, and dropped.
    known: how many of these were copies of a row that another hour took in.
    held_back: how many rows claimed to have been received before the hour they landed in (set to its start:
        what was known when is ours to say, or a backfill with old dates would leak into the past).
    unknown_columns: columns of the files that the schema has not.
    erased_in: the files that brought back, or name, what was erased on request.
    """

    clean: pl.DataFrame
    refused: pl.DataFrame
    duplicates: int
    known: int
    held_back: int
    unknown_columns: tuple[str, ...]
    erased_in: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[pl.DataFrame]:
        return iter((self.clean, self.refused))


def read_landed(store: ObjectStore, table: str, hour: datetime, keys: Sequence[str] | None = None) -> Landed:
    """Everything that landed in one hour of `table` (events or labels), as it came.

    Args:
        keys: the files, where the caller has listed them already.
    """
    frames, unreadable = [], []
    for key in arrivals.landed(store, table, hour) if keys is None else keys:
        try:
            frames.append(read_file(store.get(key).data, key))
        except InvalidInput as error:
            unreadable.append((key, str(error)))
        except NotFound:
            # Erased or purged since it was listed.
            continue
    return Landed(loose.stack(frames), unreadable)


def read_file(data: bytes, key: str) -> pl.DataFrame:
    """The rows of one landed file as they came, with `_file`; a vendor's file goes through its adapter.

    Raises:
        InvalidInput: nothing of it can be read.
    """
    name = key.rpartition("/")[2]
    rows = vendors.read(data, name) if vendors.is_vendors(name) else loose.read_rows(data, name)
    return rows.with_columns(pl.lit(key).alias(FILE))


@dataclass(frozen=True)
class _Judged:
    """Rows of one hour, each judged by itself; which of them are copies is still open."""

    table: str
    hour: datetime
    raw: pl.DataFrame
    typed: pl.DataFrame
    reasons: pl.Series
    early: pl.Series
    unknown_columns: tuple[str, ...]
    erased_in: tuple[str, ...]
    sound: pl.DataFrame
    """`place, id, content, received` of the rows that break no rule."""


def conform(
    df: pl.DataFrame, table: str, hour: datetime, now: datetime, policies: Sequence[str] | None = None
) -> Conformed:
    """Sort the rows of one hour into clean, refused and duplicate, as if no other hour were known.

    Args:
        df: rows as `read_landed` gives them; plain frames without its marks do too.
        table: events or labels.
        hour: the hour they landed in.
        now: the present; nothing may claim to be later (but for a clock's skew).
        policies: the policies a label may name; None takes any.

    Raises:
        InvalidInput: `table` is not one that rows land in.
    """
    judged = _judge(df, table, hour, now, policies, None)
    return _settle(judged, pl.DataFrame(schema=ledger.KNOWN))[1]


def take_in(
    store: ObjectStore,
    landed: pl.DataFrame,
    table: str,
    hour: datetime,
    now: datetime,
    policies: Sequence[str] | None = None,
    erased: Tombstones | None = None,
) -> Conformed:
    """`conform`, against everything that other hours have taken in, and claim what is kept for this hour.

    The claim is made before anything is written: run again, also after a kill, it gives the same rows to the
    last byte. A copy of what another hour took in is a duplicate; the same id with other content is refused.

    Args:
        erased: rows about what was erased on request are refused, and nothing of them is kept; erased actors
            that others' rows name go by their pseudonyms.
    """
    judged = _judge(landed, table, hour, now, policies, erased)
    days = ledger.days_of(
        judged.typed.filter(judged.reasons.is_null())[ledger.OWN_TIME[table]],
    )
    return ledger.claim(store, table, hour, judged.sound["id"], days, lambda known: _settle(judged, known))


def _judge(
    df: pl.DataFrame,
    table: str,
    hour: datetime,
    now: datetime,
    policies: Sequence[str] | None,
    erased: Tombstones | None,
) -> _Judged:
    if table not in ID:
        raise InvalidInput(f"rows do not land in '{table}': use one of {', '.join(ID)}")
    schema = polars_schema(table)
    unknown = tuple(name for name in df.columns if name not in schema and not name.startswith("_"))
    raw = _complete(df, schema)
    gone = pl.Series("gone", [False] * raw.height, pl.Boolean)
    erased_in: tuple[str, ...] = ()
    if erased:
        gone = erased.is_event(raw["event_id"])
        gone = gone | erased.is_actor(raw["actor_id"]) if "actor_id" in raw.columns else gone
        named = gone
        for name in (n for n in ACTORS if n in raw.columns):
            named = named | erased.is_actor(raw[name])
        erased_in = tuple(raw.filter(named)[FILE].drop_nulls().unique().sort().to_list())
        raw = raw.with_columns(erased.veil(raw[name]) for name in ACTORS if name in raw.columns)
    raw = raw.with_columns(_received(raw, hour, now))
    typed = pl.DataFrame([_cast(raw[name], kind) for name, kind in schema.items()])
    early = typed["received_at"] < hour
    typed = typed.with_columns(
        received_at=pl.when(early).then(pl.lit(hour).cast(loose.TIME)).otherwise("received_at")
    )
    rules = _event_rules(now) if table == "events" else _label_rules(now, policies)
    reasons = _reasons(raw, typed, table, rules)
    reasons = pl.select(pl.when(gone).then(pl.lit(ERASED)).otherwise(reasons)).to_series()
    places = pl.Series("place", range(raw.height), pl.Int64).filter(reasons.is_null())
    sound = ledger.fingerprints(typed.filter(reasons.is_null()), ID[table]).with_columns(places)
    return _Judged(table, hour, raw, typed, reasons, early, unknown, erased_in, sound)


def _received(raw: pl.DataFrame, hour: datetime, now: datetime) -> pl.Series:
    """`received_at`, with the end of the hour where a vendor's file leaves it open: an hour is taken in once
    it is over, so nobody can have used the row earlier.
    """
    given = raw["received_at"]
    left_open = raw[FILE].str.contains(f"/{vendors.MARK}", literal=True).fill_null(False) & given.is_null()
    if not left_open.any():
        return given
    instant = min(hour + HOUR - timedelta(microseconds=1), max(now, hour))
    told = pl.when(left_open).then(pl.lit(instant.isoformat())).otherwise(loose.text_of(given))
    return pl.select(told.alias("received_at")).to_series()


def _settle(judged: _Judged, known: pl.DataFrame) -> tuple[pl.DataFrame, Conformed]:
    """Which rows are kept, given what is known of their ids; the claims to make, and the outcome."""
    key, length = ID[judged.table], judged.raw.height
    sound = judged.sound.join(
        known.rename({"content": "then", "received": "first", "hour": "owner"}),
        on="id", how="left", maintain_order="left",
    )  # fmt: skip
    conflict, elsewhere = (f"{key}: {why}" for why in (CONFLICT, ELSEWHERE))
    mine = pl.col("owner") == ledger.number_of(judged.hour)
    told = (
        # Of one id the copy that was kept before stays, else the first received; ties are broken by content,
        # so that the order in which files are listed cannot matter.
        sound.with_columns(
            other=(~mine).fill_null(False),
            held=(mine & (pl.col("then") == pl.col("content"))).fill_null(False),
        )
        .sort("id", ~pl.col("held"), "received", "content", "place")
        .with_columns(
            original=pl.when("other").then("then").otherwise(pl.col("content").first().over("id")),
            later=pl.col("other") | (pl.int_range(pl.len()).over("id") > 0),
        )
        .with_columns(same=pl.col("content") == pl.col("original"))
    )
    again = told.filter(pl.col("later") & pl.col("same"))
    refused = told.filter(pl.col("later") & ~pl.col("same")).select(
        "place", why=pl.when("other").then(pl.lit(elsewhere)).otherwise(pl.lit(conflict))
    )
    # A copy that claims to have come earlier still does not change when we knew it.
    kept = told.filter(~pl.col("later")).with_columns(
        received=pl.when("held").then("first").otherwise("received")
    )
    reasons = judged.reasons.scatter(refused["place"].to_list(), refused["why"].to_list())
    copies = pl.Series("a", [False] * length, pl.Boolean).scatter(again["place"].to_list(), True)
    keeps = reasons.is_null() & ~copies
    when = kept.sort("place")["received"].cast(loose.TIME)
    clean = judged.typed.filter(keeps).with_columns(when.alias("received_at"))
    outcome = Conformed(
        clean=clean,
        refused=_refused(judged.raw, reasons, copies),
        duplicates=again.height,
        known=int(again["other"].sum()),
        held_back=int((judged.early.fill_null(False) & keeps).sum()),
        unknown_columns=judged.unknown_columns,
        erased_in=judged.erased_in,
    )
    return kept.select("id", "content", "received"), outcome


def _complete(df: pl.DataFrame, schema: dict[str, pl.DataType]) -> pl.DataFrame:
    marks = {loose.PROBLEM: pl.String(), loose.RAW: pl.String(), FILE: pl.String(), loose.ROW: pl.Int64()}
    wanted = {**schema, **marks}
    absent = [pl.lit(None, kind).alias(name) for name, kind in wanted.items() if name not in df.columns]
    return df.with_columns(absent).select(*wanted) if df.width else pl.DataFrame(schema=wanted)


def _cast(column: pl.Series, kind: pl.DataType) -> pl.Series:
    """The column in the schema's type; null where a value is not of it."""
    if kind == loose.TIME:
        return loose.parse_times(column)
    if column.dtype.is_nested() or column.dtype in (pl.Object, pl.Binary):
        return pl.Series(column.name, [None] * len(column), kind)
    if kind == pl.String:
        return loose.text_of(column)
    if column.dtype.is_temporal():
        return pl.Series(column.name, [None] * len(column), kind)
    number = column.cast(pl.Float64, strict=False)
    low, high = _RANGES[column.name]
    whole = pl.col("v") == pl.col("v").round() if kind.is_integer() else pl.lit(True)
    fits = pl.when(pl.col("v").is_between(low, high) & whole).then("v")
    return number.to_frame("v").select(fits).to_series().cast(kind).alias(column.name)


Rule = tuple[str, pl.Expr]


def _known(name: str, values: Sequence[str]) -> Rule:
    return f"{name}: not one of {', '.join(values)}", ~pl.col(name).is_in(list(values))


def _clock_rules(happened: str, now: datetime) -> list[Rule]:
    limit = pl.lit(now + CLOCK_SKEW).cast(loose.TIME)
    return [
        ("received_at: in the future", pl.col("received_at") > limit),
        (
            f"{happened}: more than 5 min after received_at",
            pl.col(happened) > pl.col("received_at") + CLOCK_SKEW,
        ),
    ]


def _event_rules(now: datetime) -> list[Rule]:
    silent = pl.col("text").is_null() | (pl.col("text").str.strip_chars() == "")
    return [
        _known("kind", KINDS),
        _known("response", RESPONSES),
        *_clock_rules("ts", now),
        ("ts: more than 30 days before received_at", pl.col("ts") < pl.col("received_at") - MAX_EVENT_AGE),
        ("account_created_at: after ts", pl.col("account_created_at") > pl.col("ts") + CLOCK_SKEW),
        ("response_ts: before ts", pl.col("response_ts") < pl.col("ts") - CLOCK_SKEW),
        ("text: missing in a message", pl.col("kind").is_in(["message", "dm"]) & silent),
    ]


def _label_rules(now: datetime, policies: Sequence[str] | None) -> list[Rule]:
    old = pl.col("labeled_at") < pl.lit(EPOCH_OF_LABELS).cast(loose.TIME)
    vague = (pl.col("value") == "abuse") & (pl.col("policy") == ANY_POLICY)
    rules = [
        _known("value", LABEL_VALUES),
        _known("source", LABEL_SOURCES),
        ("policy: an abuse label must name its policy", vague),
        *_clock_rules("labeled_at", now),
        ("labeled_at: before the year 2000", old),
    ]
    return rules if policies is None else [*rules, _known("policy", (*policies, ANY_POLICY))]


def _reasons(raw: pl.DataFrame, typed: pl.DataFrame, table: str, rules: Sequence[Rule]) -> pl.Series:
    """The first rule each row breaks, null where it breaks none. A reason never quotes the row."""
    required = [field.name for field in TABLES[table] if not field.nullable]
    uncastable = {
        name: f"{name}: out of range or not a number"
        if name in _RANGES
        else f"{name}: not a {_word(typed[name])}"
        for name in typed.columns
    }
    was_null = raw.select(pl.col(name).is_null().alias(f"_null_{name}") for name in typed.columns)
    wide = pl.concat([typed, was_null, raw.select(loose.PROBLEM)], how="horizontal")
    checks = [pl.col(loose.PROBLEM)]
    for name in typed.columns:
        blank = pl.col(f"_null_{name}")
        if name in required:
            empty = (
                blank | (pl.col(name).str.strip_chars() == "") if typed[name].dtype == pl.String else blank
            )
            checks.append(pl.when(empty).then(pl.lit(f"{name}: missing")))
        checks.append(pl.when(~blank & pl.col(name).is_null()).then(pl.lit(uncastable[name])))
    checks += [pl.when(broken).then(pl.lit(reason)) for reason, broken in rules]
    return wide.select(pl.coalesce(checks).cast(pl.String)).to_series()


def _word(column: pl.Series) -> str:
    return "time" if column.dtype == loose.TIME else "string"


def _refused(raw: pl.DataFrame, reasons: pl.Series, again: pl.Series) -> pl.DataFrame:
    told = raw.with_columns(reasons.alias("reason")).filter(reasons.is_not_null() & ~again)
    erased = pl.col("reason") == ERASED
    own = [name for name in raw.columns if name not in (FILE, loose.ROW)]
    as_text = told.with_columns(loose.text_of(told[name]) for name in own)
    as_text = as_text.with_columns(pl.when(~erased).then(pl.col(name)).alias(name) for name in own)
    return as_text.select("reason", FILE, loose.ROW, pl.exclude("reason", FILE, loose.ROW, loose.PROBLEM))
