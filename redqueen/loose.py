"""Files of rows as other people write them, read without judging: Parquet, CSV and JSON lines, and the
times in them.

What a row must be is `redqueen.ingest`'s business (the hourly tables) or `redqueen.importing`'s (a person's
own data). Only a file of which nothing can be read raises here; a broken line becomes a row that says so.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import polars as pl

from redqueen.errors import InvalidInput

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")
PROBLEM = "_problem"
"""Why a row could not be read; null where it could."""
RAW = "_raw"
"""The beginning of a line that could not be read."""
ROW = "_row"
"""The row's place in its file, from 1 (for text formats: the line)."""

TIME = pl.Datetime("us", "UTC")
_RAW_KEPT = 2_000
_TIME_FORMATS = (
    "%Y-%m-%dT%H:%M:%S%.f%:z",
    "%Y-%m-%dT%H:%M:%S%.f",
    "%Y-%m-%dT%H:%M%:z",
    "%Y-%m-%dT%H:%M",
    "%Y-%m-%d",
    "%Y/%m/%d %H:%M:%S",
    "%Y/%m/%d",
)
_EARLIEST = datetime(1980, 1, 1, tzinfo=UTC)
_LATEST = datetime(2200, 1, 1, tzinfo=UTC)


def read_rows(data: bytes, name: str) -> pl.DataFrame:
    """All rows of one file, in order, with `_row`, `_problem` and `_raw` beside the file's own columns.

    Parquet keeps its types; JSON lines and CSV come as strings (an empty CSV field is null).

    Raises:
        InvalidInput: nothing of the file can be read; the message says why, and quotes nothing of it.
    """
    try:
        if name.endswith(".parquet"):
            return _marked(pl.read_parquet(io.BytesIO(data)))
        if name.endswith((".jsonl", ".ndjson")):
            return _json_lines(data)
        if name.endswith(".csv"):
            return _csv(data)
    except InvalidInput:
        raise
    except Exception as error:
        # Whatever a reader thinks of a damaged file, the other files must still be taken.
        raise InvalidInput(f"not readable as {name.rpartition('.')[2]} ({type(error).__name__})") from error
    raise InvalidInput(f"neither {', '.join(SUFFIXES[:-1])} nor {SUFFIXES[-1]}")


def _marked(frame: pl.DataFrame) -> pl.DataFrame:
    own = frame.select(pl.exclude(PROBLEM, RAW, ROW))
    return own.with_columns(
        pl.int_range(1, pl.len() + 1, dtype=pl.Int64).alias(ROW),
        pl.lit(None, pl.String).alias(PROBLEM),
        pl.lit(None, pl.String).alias(RAW),
    )


def _json_lines(data: bytes) -> pl.DataFrame:
    # Undecodable bytes are replaced, not refused: a message must not escape us by holding one odd byte.
    lines = data.decode("utf-8-sig", errors="replace").split("\n")
    rows, places, problems = [], [], []
    for place, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = None if isinstance(row, dict) else "the line is not a JSON object"
        except (ValueError, RecursionError):
            row, problem = None, "the line is not JSON"
        rows.append(row if problem is None else {})
        places.append(place)
        problems.append((problem, line[:_RAW_KEPT]) if problem else (None, None))
    if rows and all(problem for problem, _ in problems):
        raise InvalidInput("not one line is a JSON object")
    names = dict.fromkeys(name for row in rows for name in row)
    columns = {name: [_as_text(row.get(name)) for row in rows] for name in names}
    return _text_frame(columns, places, problems)


def _as_text(value: Any) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return json.dumps(value)


def _csv(data: bytes) -> pl.DataFrame:
    text = data.decode("utf-8-sig", errors="replace")
    reader = csv.reader(io.StringIO(text, newline=""))
    header = next(reader, None)
    if not header or len(set(header)) != len(header):
        raise InvalidInput("the first line names no columns, or one of them twice")
    columns: list[list[str | None]] = [[] for _ in header]
    places, problems = [], []
    for fields in reader:
        if not fields:
            continue
        whole = len(fields) == len(header)
        for column, field in zip(columns, fields if whole else [""] * len(header), strict=True):
            column.append(field or None)
        places.append(reader.line_num)
        told = f"the line has {len(fields)} fields where the header has {len(header)}"
        problems.append((None, None) if whole else (told, ",".join(fields)[:_RAW_KEPT]))
    return _text_frame(dict(zip(header, columns, strict=True)), places, problems)


def _text_frame(
    columns: dict[str, list[str | None]],
    places: Sequence[int],
    problems: Sequence[tuple[str | None, str | None]],
) -> pl.DataFrame:
    marks = {ROW: places, PROBLEM: [p for p, _ in problems], RAW: [_encodable(raw) for _, raw in problems]}
    own = {name: values for name, values in columns.items() if name not in marks}
    schema = {_encodable(name): pl.String for name in own}
    try:
        frame = pl.DataFrame({_encodable(name): values for name, values in own.items()}, schema=schema)
    except UnicodeEncodeError:
        # JSON may escape half a surrogate pair, which is no character; the rest of the text is still a text.
        mended = {_encodable(name): [_encodable(value) for value in values] for name, values in own.items()}
        frame = pl.DataFrame(mended, schema=schema)
    marked = pl.DataFrame(marks, schema={ROW: pl.Int64, PROBLEM: pl.String, RAW: pl.String})
    return pl.concat([frame, marked], how="horizontal")


def _encodable(value: Any) -> Any:
    return mended(value) if isinstance(value, str) else value


def mended(text: str) -> str:
    """Text that can be stored: halves of surrogate pairs, which JSON may escape, joined or made U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def stack(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """The frames one after the other, columns by name; where files disagree on a type, the column is a
    string.
    """
    held = list(frames)
    if not held:
        return pl.DataFrame()
    kinds: dict[str, set[pl.DataType]] = {}
    for frame in held:
        for name, kind in frame.schema.items():
            kinds.setdefault(name, set()).add(kind)
    mixed = [name for name, seen in kinds.items() if len(seen - {pl.Null()}) > 1]
    as_text = [
        frame.with_columns(text_of(frame[name]) for name in mixed if name in frame.columns) for frame in held
    ]
    return pl.concat(as_text, how="diagonal_relaxed") if len(as_text) > 1 else as_text[0]


def text_of(column: pl.Series) -> pl.Series:
    """A column of any type as strings (times in ISO 8601), null where it was null."""
    if column.dtype == pl.String:
        return column
    if column.dtype == pl.Binary:
        return pl.Series(
            column.name, [None if v is None else v.decode("utf-8", "replace") for v in column], pl.String
        )
    if isinstance(column.dtype, pl.Datetime):
        return parse_times(column).dt.strftime("%Y-%m-%dT%H:%M:%S%.6f+00:00")
    if column.dtype.is_nested() or column.dtype in (pl.Object, pl.Duration):
        texts = [None if value is None else json.dumps(value, default=str) for value in column.to_list()]
        return pl.Series(column.name, texts, pl.String)
    return column.cast(pl.String)


def parse_times(column: pl.Series) -> pl.Series:
    """The instants a column names, in UTC; null where it names none between 1980 and 2200.

    Strings are ISO 8601 or an epoch; numbers are an epoch in seconds, milli-, micro- or nanoseconds (told
    apart by size); a time without a zone is UTC.
    """
    kind = column.dtype
    if isinstance(kind, pl.Datetime):
        aware = column if kind.time_zone else column.dt.replace_time_zone("UTC")
        times = aware.dt.convert_time_zone("UTC").dt.cast_time_unit("us")
    elif kind == pl.Date:
        times = column.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    elif kind.is_integer() or kind.is_float():
        times = _epoch(column.cast(pl.Float64) if kind.is_float() else column.cast(pl.Int64, strict=False))
    elif kind == pl.String:
        times = _iso(column)
    else:
        times = pl.Series(column.name, [None] * len(column), TIME)
    sane = pl.Series((times >= _EARLIEST) & (times < _LATEST)).fill_null(False)
    return (
        times.to_frame("t").select(pl.when(sane).then(pl.col("t"))).to_series().cast(TIME).alias(column.name)
    )


def _epoch(column: pl.Series) -> pl.Series:
    v = pl.col("v")
    # A second of 2200 is 7e9 and a microsecond of 1980 is 3e14: the units cannot be confused within our
    # range.
    micros = (
        pl.when(v < 20_000_000_000)
        .then(v * 1_000_000)
        .when(v < 20_000_000_000_000)
        .then(v * 1_000)
        .when(v < 20_000_000_000_000_000)
        .then(v)
        .otherwise(v / 1_000)
    )
    if column.dtype.is_float():
        micros = pl.when(v.is_finite() & (v.abs() < 9e18)).then(micros)
    picked = column.to_frame("v").select(micros.cast(pl.Int64, strict=False)).to_series()
    return picked.cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


def _iso(column: pl.Series) -> pl.Series:
    text = (
        column.str.strip_chars()
        .str.replace(r"(?:[Zz]|\s?(?:UTC|GMT))$", "+00:00")
        .str.replace(r"^(\d{4}-\d{2}-\d{2})[ t]", "${1}T")
        .str.replace(r"([+-]\d{2})(\d{2})$", "${1}:${2}")
    )
    # "2026-01-03" ends like an offset without its colon; only a time has an offset.
    text = pl.select(
        pl.when(column.str.contains(r"^\s*\d{4}-\d{2}-\d{2}\s*$"))
        .then(column.str.strip_chars())
        .otherwise(text)
    ).to_series()
    found = pl.Series(column.name, [None] * len(column), TIME)
    for form in _TIME_FORMATS:
        if found.null_count() == column.null_count():
            return found
        times = text.str.to_datetime(form, strict=False, time_unit="us")
        aware = times if times.dtype == TIME else times.dt.replace_time_zone("UTC")
        found = found.to_frame("f").with_columns(g=aware).select(pl.coalesce("f", "g")).to_series()
    numbers = _epoch(text.cast(pl.Float64, strict=False))
    return found.to_frame("f").with_columns(g=numbers).select(pl.coalesce("f", "g")).to_series()
