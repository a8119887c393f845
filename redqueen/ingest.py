"""What a landed row must be to enter the house: read the files of one hour, conform their rows to the
schema, tell the refused ones apart with a reason.

Pure but for reading the store. Writing what was refused is `redqueen.quarantine`; the share and shape of
what came in is judged by `assets.expectations`. No row raises: everything lands in exactly one of clean,
refused, duplicate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import NamedTuple

import polars as pl

from redqueen import loose
from redqueen.errors import InvalidInput
from redqueen.schema import ANY_POLICY, KINDS, LABEL_SOURCES, LABEL_VALUES, RESPONSES, TABLES
from redqueen.store import ObjectStore
from redqueen.tables import hour_key

CLOCK_SKEW = timedelta(minutes=5)
"""How far ahead of ours another's clock may run."""
MAX_EVENT_AGE = timedelta(days=30)
"""An event that took longer to arrive is refused: no window, label or feature would ever see it in its
place.
"""
EPOCH_OF_LABELS = datetime.fromisoformat("2000-01-01T00:00:00+00:00")
FILE = "_file"
ID = {"events": "event_id", "labels": "label_id"}
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
    refused: the rows as they came (strings), with `reason`, `_file` and `_row`.
    duplicates: how many rows were a re-sent identical copy of another, and dropped.
    held_back: how many rows claimed to have been received before the hour they landed in (set to its start:
        what was known when is ours to say, or a backfill with old dates would leak into the past).
    unknown_columns: columns of the files that the schema has not.
    """

    clean: pl.DataFrame
    refused: pl.DataFrame
    duplicates: int
    held_back: int
    unknown_columns: tuple[str, ...]

    def __iter__(self) -> Iterator[pl.DataFrame]:
        return iter((self.clean, self.refused))


def polars_schema(table: str) -> dict[str, pl.DataType]:
    """The columns of `table` and their polars types, in order."""
    return {
        field.name: loose.TIME if str(field.type).startswith("timestamp") else _polars_type(str(field.type))
        for field in TABLES[table]
    }


def _polars_type(arrow: str) -> pl.DataType:
    return {"string": pl.String(), "int32": pl.Int32(), "double": pl.Float64()}[arrow]


def read_landed(store: ObjectStore, table: str, hour: datetime) -> Landed:
    """Everything that landed in one hour of `table` (events or labels), as it came.

    Names that begin with `_` or `.` are markers, not data.
    """
    frames, unreadable = [], []
    for key in store.list(hour_key(table, hour)):
        name = key.rpartition("/")[2]
        if name.startswith(("_", ".")):
            continue
        try:
            rows = loose.read_rows(store.get(key).data, name)
            frames.append(rows.with_columns(pl.lit(key).alias(FILE)))
        except InvalidInput as error:
            unreadable.append((key, str(error)))
    return Landed(loose.stack(frames), unreadable)


def conform(
    df: pl.DataFrame, table: str, hour: datetime, now: datetime, policies: Sequence[str] | None = None
) -> Conformed:
    """Sort the rows of one hour into clean, refused and duplicate.

    Args:
        df: rows as `read_landed` gives them; plain frames without its marks do too.
        table: events or labels.
        hour: the hour they landed in.
        now: the present; nothing may claim to be later (but for a clock's skew).
        policies: the policies a label may name; None takes any.

    Raises:
        InvalidInput: `table` is not one that rows land in.
    """
    if table not in ID:
        raise InvalidInput(f"rows do not land in '{table}': use one of {', '.join(ID)}")
    schema = polars_schema(table)
    unknown = tuple(name for name in df.columns if name not in schema and not name.startswith("_"))
    raw = _complete(df, schema)
    typed = pl.DataFrame([_cast(raw[name], kind) for name, kind in schema.items()])
    early = typed["received_at"] < hour
    typed = typed.with_columns(
        received_at=pl.when(early).then(pl.lit(hour).cast(loose.TIME)).otherwise("received_at")
    )
    rules = _event_rules(now) if table == "events" else _label_rules(now, policies)
    reasons = _reasons(raw, typed, table, rules)
    conflicting, again = _repeats(typed.filter(reasons.is_null()), ID[table], reasons)
    reasons = (
        reasons.to_frame("r")
        .with_columns(c=conflicting)
        .select(pl.coalesce("r", pl.when("c").then(pl.lit(f"{ID[table]}: conflicting duplicate"))))
        .to_series()
    )
    kept = reasons.is_null() & ~again
    return Conformed(
        clean=typed.filter(kept),
        refused=_refused(raw, reasons, again),
        duplicates=int(again.sum()),
        held_back=int((early.fill_null(False) & kept).sum()),
        unknown_columns=unknown,
    )


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


def _repeats(sound: pl.DataFrame, key: str, reasons: pl.Series) -> tuple[pl.Series, pl.Series]:
    """For every row: does it contradict another of the same id; is it a copy of another.

    The first received of an id stays. A copy may differ in `received_at` alone: it was sent twice, and we
    knew it from the first.
    """
    length = len(reasons)
    conflicting = pl.Series("c", [False] * length, pl.Boolean)
    again = pl.Series("a", [False] * length, pl.Boolean)
    if not sound[key].is_duplicated().any():
        return conflicting, again
    content = sound.select(pl.exclude("received_at")).hash_rows(seed=1)
    places = pl.Series("place", range(length), pl.Int64).filter(reasons.is_null())
    twins = sound.select(key, "received_at").with_columns(content.alias("content"), places.alias("place"))
    # Ties are broken by content, so that the order in which files are listed cannot matter.
    ranked = (
        twins.sort(key, "received_at", "content", "place")
        .with_columns(original=pl.col("content").first().over(key), nth=pl.int_range(pl.len()).over(key))
        .filter(pl.col("nth") > 0)
    )
    differs = ranked.filter(pl.col("content") != pl.col("original"))["place"].to_list()
    same = ranked.filter(pl.col("content") == pl.col("original"))["place"].to_list()
    return conflicting.scatter(differs, True), again.scatter(same, True)


def _refused(raw: pl.DataFrame, reasons: pl.Series, again: pl.Series) -> pl.DataFrame:
    told = raw.with_columns(reasons.alias("reason")).filter(reasons.is_not_null() & ~again)
    as_text = told.with_columns(loose.text_of(told[name]) for name in raw.columns if name != loose.ROW)
    return as_text.select("reason", FILE, loose.ROW, pl.exclude("reason", FILE, loose.ROW, loose.PROBLEM))
