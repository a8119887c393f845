"""A person's own dated, labelled messages, made into a stream that the loop can replay.

Reading the files (whatever their columns are called), telling what had to be left out, and planning hourly
windows out of days, weeks or months. Writing events and labels into the store is the caller's. Nothing of
the data is copied anywhere else.

Time is compressed: one period of the stream becomes one hourly window, and the windows end now, where
Dagster's partitions are. The order of messages is kept; the distance between two of them is kept in
proportion.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from redqueen import loose
from redqueen.errors import InvalidInput
from redqueen.schema import ANY_POLICY, polars_schema

Undated = Literal["quarantine", "spread"]
Window = Literal["day", "week", "month"]

MAX_TEXT = 2_000
"""Characters of a message that are kept: a detector reads its beginning, and mail bodies run to megabytes."""
MIN_WINDOW_ROWS = 50
"""A period with fewer messages is joined to the next one: no rate can be read from it."""

TEXT_NAMES = ("text", "body", "message", "content")
TIME_NAMES = ("date", "time", "timestamp", "ts", "created_at")
LABEL_NAMES = ("label", "is_spam", "y", "class")
ABUSE_WORDS = frozenset(
    {
        "1",
        "1.0",
        "spam",
        "abuse",
        "abusive",
        "true",
        "yes",
        "scam",
        "phishing",
        "bad",
        "malicious",
        "positive",
    }
)
BENIGN_WORDS = frozenset(
    {"0", "0.0", "ham", "benign", "false", "no", "legit", "ok", "good", "normal", "clean", "negative"}
)
_EVERY: Mapping[str, str] = {"day": "1d", "week": "1w", "month": "1mo"}
_HOUR = timedelta(hours=1)
_ARRIVAL = timedelta(seconds=2)
_STREAM: dict[str, pl.DataType] = {
    "event_id": pl.String(),
    "ts": loose.TIME,
    "text": pl.String(),
    "abusive": pl.Boolean(),
    "policy": pl.String(),
    "actor_id": pl.String(),
    "community_id": pl.String(),
    "dated": pl.Boolean(),
}


@dataclass(frozen=True)
class Columns:
    """What the columns are called; None is looked up among the usual names (actor, policy, community are
    not).

    text: one or several columns, joined by a line break in this order.
    """

    text: tuple[str, ...] | None = None
    time: str | None = None
    label: str | None = None
    actor: str | None = None
    policy: str | None = None
    community: str | None = None

    @classmethod
    def parse(cls, text: str | None = None, **named: str | None) -> Columns:
        """From options as typed: `text="subject,body"`."""
        return cls(text=tuple(text.split(",")) if text else None, **named)

    def __post_init__(self) -> None:
        if self.text is not None:
            names = tuple(name.strip() for name in self.text if name.strip())
            object.__setattr__(self, "text", names or None)


@dataclass(frozen=True)
class Stream:
    """Dated, labelled messages in order of time.

    rows: event_id, ts (their own time), text, abusive, policy (null where benign), actor_id, community_id,
    dated.
    quarantine: the rows left out: reason, _file, _row and, beside them, the file's columns as strings.
    behaviour: whether a column named the senders; without one each message is its own actor, and what a
        sender does over time cannot be seen.
    filtered: rows dropped because `where` asked for it. cut: texts cut to 2,000 characters. spread: undated
        rows that were given a date.
    """

    rows: pl.DataFrame
    quarantine: pl.DataFrame
    behaviour: bool
    filtered: int = 0
    cut: int = 0
    spread: int = 0
    policies: tuple[str, ...] = ("spam",)

    @property
    def told(self) -> tuple[str, ...]:
        """What a person should know about the import, a sentence each."""
        n_abuse = int(self.rows["abusive"].sum())
        first, last = self.rows["ts"].min(), self.rows["ts"].max()
        assert isinstance(first, datetime)
        assert isinstance(last, datetime)
        span = f"{first:%Y-%m-%d} to {last:%Y-%m-%d}"
        notes = [f"{self.rows.height:,} messages, {n_abuse:,} abusive, {span}"]
        if self.filtered:
            notes.append(f"{self.filtered:,} rows were left out by the filter")
        if self.spread:
            notes.append(f"{self.spread:,} undated rows were spread evenly over that time")
        if self.cut:
            notes.append(f"{self.cut:,} texts were cut to {MAX_TEXT:,} characters")
        for reason, n in self.quarantine["reason"].value_counts(sort=True).iter_rows():
            notes.append(f"{n:,} rows went to quarantine: {reason}")
        if not self.behaviour:
            notes.append("no sender column: behaviour features are off (name one with --actor)")
        return tuple(notes)


def parse_where(where: str | None) -> dict[str, str]:
    """`"bulk=false,bulk_day=false"` as a mapping; raises `InvalidInput` where a part is not column=value."""
    wanted = {}
    for part in (where or "").split(","):
        if not part.strip():
            continue
        name, equals, value = part.partition("=")
        if not equals or not name.strip():
            raise InvalidInput(f"--where '{part}' is not column=value: write it as bulk=false,lang=en")
        wanted[name.strip()] = value.strip()
    return wanted


def load_stream(
    paths: Sequence[Path],
    columns: Columns | None = None,
    undated: Undated = "quarantine",
    seed: int = 0,
    policy: str = "spam",
    *,
    where: str | Mapping[str, str] | None = None,
    salt: str = "red-queen",
) -> Stream:
    """Read files and directories of Parquet, CSV and JSON lines into one stream.

    Args:
        paths: files, or directories that are searched for them.
        columns: what the columns are called.
        undated: rows without a date go to quarantine, or are spread evenly over the time of the dated ones,
            so that every period gets its share.
        seed: of the spreading.
        policy: what an abusive message breaks, where no column says so.
        where: column -> value, or `"bulk=false,lang=en"`: only rows with that value are kept; files without
            the column keep all of theirs.
        salt: of the actors' names, which are never kept.

    Raises:
        InvalidInput: a path is not there or holds nothing readable, a named column is in no file, or no row
            is left.
    """
    named = columns or Columns()
    files = [(path, _read(path)) for path in _files(paths)]
    wanted = parse_where(where) if isinstance(where, str) else where or {}
    _check_names(files, named, wanted)
    parts = [_file_rows(path, frame, named, wanted, policy) for path, frame in files]
    kept = pl.concat([part.rows for part in parts])
    refused = [part.refused for part in parts]
    if undated == "quarantine":
        refused += [_told(part.raw, part.rows, "no date") for part in parts]
        kept = kept.filter("dated")
    quarantine = loose.stack(refused)
    if not kept["dated"].any():
        counts = dict(quarantine["reason"].value_counts(sort=True).iter_rows())
        raise InvalidInput(
            f"no dated, labelled message is left of {sum(part.seen for part in parts):,} rows in "
            f"{', '.join(path.name for path, _ in files)} (refused: {counts}). Name the columns with "
            "--text, --time and --label; labels are 0/1, ham/spam, benign/abuse or false/true."
        )
    rows = _finish(kept, seed, salt, named.actor is not None)
    return Stream(
        rows=rows.select(pl.col(name).cast(kind) for name, kind in _STREAM.items()),
        quarantine=quarantine,
        behaviour=named.actor is not None,
        filtered=sum(part.filtered for part in parts),
        cut=int(kept["cut"].sum()),
        spread=int((~kept["dated"]).sum()),
        policies=tuple(sorted(rows["policy"].drop_nulls().unique().to_list())) or (policy,),
    )


def _files(paths: Sequence[Path]) -> list[Path]:
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise InvalidInput(f"'{path}' does not exist")
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        usable = [file for file in inside if file.suffix in loose.SUFFIXES and file.is_file()]
        if not usable:
            raise InvalidInput(f"'{path}' holds no file of {', '.join(loose.SUFFIXES)}")
        found += usable
    return found


def _read(path: Path) -> pl.DataFrame:
    try:
        return loose.read_rows(path.read_bytes(), path.name)
    except InvalidInput as error:
        raise InvalidInput(f"'{path}': {error}") from error


def _check_names(
    files: Sequence[tuple[Path, pl.DataFrame]], columns: Columns, where: Mapping[str, str]
) -> None:
    """A named column must be in one file at least: a typing error must not end as an empty stream."""
    there = {name for _, frame in files for name in frame.columns if not name.startswith("_")}
    options = [("--time", columns.time), ("--label", columns.label), ("--actor", columns.actor)]
    options += [("--policy-column", columns.policy), ("--community", columns.community)]
    options += [("--text", name) for name in columns.text or ()] + [("--where", name) for name in where]
    for option, name in options:
        if name is not None and name not in there:
            raise InvalidInput(
                f"{option} names column '{name}', but the files have {', '.join(sorted(there))}"
            )
    for option, usual, given in (
        ("--text", TEXT_NAMES, columns.text),
        ("--time", TIME_NAMES, columns.time),
        ("--label", LABEL_NAMES, columns.label),
    ):
        if given is None and not _first({name.lower() for name in there}, usual):
            raise InvalidInput(
                f"no column is called {', '.join(usual)}: name yours with {option} (the files have "
                f"{', '.join(sorted(there))})"
            )


def _first(there: Sequence[str] | set[str], usual: Sequence[str]) -> str | None:
    return next((name for name in usual if name in there), None)


def _found(frame: pl.DataFrame, given: str | None, usual: Sequence[str]) -> str | None:
    """The name of a column of `frame`, as given or the first of the usual ones (in any case), or None."""
    if given is not None:
        return given if given in frame.columns else None
    by_lower = {name.lower(): name for name in frame.columns}
    usual_name = _first(list(by_lower), usual)
    return by_lower[usual_name] if usual_name else None


@dataclass(frozen=True)
class _Part:
    """One file: its raw rows, those that can be used (by `_row`), and those that cannot."""

    raw: pl.DataFrame
    rows: pl.DataFrame
    refused: pl.DataFrame
    seen: int
    filtered: int


def _file_rows(
    path: Path, frame: pl.DataFrame, columns: Columns, where: Mapping[str, str], policy: str
) -> _Part:
    raw = frame.with_columns(pl.lit(path.name).alias("_file"))
    wanted = raw
    for name, value in where.items():
        if name in raw.columns:
            same = loose.text_of(wanted[name]).str.to_lowercase() == value.lower()
            wanted = wanted.filter(same.fill_null(False) | wanted[loose.PROBLEM].is_not_null())
    rows = _usable(wanted, columns, policy)
    reasons = rows.select(
        "_row",
        reason=pl.coalesce(
            pl.col("problem"),
            pl.when(pl.col("text").fill_null("").str.strip_chars() == "").then(pl.lit("no text")),
            pl.when(pl.col("abusive").is_null()).then(pl.lit("no label that says abuse or benign")),
        ),
    )
    bad = reasons.filter(pl.col("reason").is_not_null())
    refused = _as_text(wanted.drop(loose.PROBLEM).join(bad, on="_row", how="inner"))
    good = rows.filter(reasons["reason"].is_null()).drop("problem")
    return _Part(wanted, good, refused, frame.height, frame.height - wanted.height)


def _as_text(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.with_columns(loose.text_of(frame[name]) for name in frame.columns if name != "_row")


def _told(raw: pl.DataFrame, rows: pl.DataFrame, reason: str) -> pl.DataFrame:
    """The raw rows behind the undated ones of `rows`, with their reason."""
    undated = rows.filter(~pl.col("dated")).select("_row", reason=pl.lit(reason))
    return _as_text(raw.drop(loose.PROBLEM).join(undated, on="_row", how="inner"))


def _usable(frame: pl.DataFrame, columns: Columns, policy: str) -> pl.DataFrame:
    """text, written (the date as written), ts, dated, abusive, policy, actor, community, cut; one row a raw
    row.
    """

    def column(name: str | None) -> pl.Series:
        absent = pl.Series("", [None] * frame.height, pl.String)
        return absent if name is None else loose.text_of(frame[name])

    text_name = _found(frame, None, TEXT_NAMES)
    text_names = columns.text or ((text_name,) if text_name else ())
    texts = [column(name) for name in text_names if name in frame.columns]
    time_name = _found(frame, columns.time, TIME_NAMES)
    times = _times(frame[time_name]) if time_name else pl.Series([None] * frame.height, dtype=loose.TIME)
    said = column(_found(frame, columns.label, LABEL_NAMES)).str.strip_chars().str.to_lowercase()
    at_hand = pl.DataFrame(
        {f"t{i}": text for i, text in enumerate(texts)} or {"t0": column(None)},
    ).select(text=pl.concat_str(pl.all(), separator="\n", ignore_nulls=True))
    return at_hand.with_columns(
        frame["_row"],
        frame[loose.PROBLEM].alias("problem"),
        frame["_file"],
        written=column(time_name).fill_null(""),
        ts=times,
        dated=times.is_not_null(),
        abusive=pl.Series(_abusive(said)),
        actor=column(_found(frame, columns.actor, ())),
        policy=column(_found(frame, columns.policy, ())).str.strip_chars(),
        community=column(_found(frame, columns.community, ())),
    ).with_columns(
        cut=pl.col("text").str.len_chars().fill_null(0) > MAX_TEXT,
        text=pl.col("text").str.slice(0, MAX_TEXT),
        policy=pl.when("abusive").then(pl.coalesce(pl.col("policy").replace("", None), pl.lit(policy))),
    )


def _abusive(said: pl.Series) -> pl.Series:
    abuse, benign = said.is_in(list(ABUSE_WORDS)), said.is_in(list(BENIGN_WORDS))
    frame = pl.DataFrame({"a": abuse.fill_null(False), "b": benign.fill_null(False)})
    return frame.select(pl.when("a").then(True).when("b").then(False)).to_series()


def _times(column: pl.Series) -> pl.Series:
    """Instants; beyond what tables hold, the dates of mail headers are understood too."""
    times = loose.parse_times(column)
    odd = column.filter(times.is_null() & column.is_not_null()).unique()
    if column.dtype != pl.String or odd.is_empty():
        return times
    mail = {text: _mail_date(text) for text in odd}
    late = column.replace_strict(mail, default=None, return_dtype=loose.TIME)
    return pl.DataFrame({"a": times, "b": late}).select(pl.coalesce("a", "b")).to_series()


def _mail_date(text: str) -> datetime | None:
    try:
        when = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    aware = when if when.tzinfo else when.replace(tzinfo=UTC)
    return aware.astimezone(UTC) if 1980 <= aware.year < 2200 else None


def _digest(*parts: str) -> str:
    return hashlib.blake2b("\0".join(parts).encode("utf-8", "replace"), digest_size=10).hexdigest()


def _finish(kept: pl.DataFrame, seed: int, salt: str, behaviour: bool) -> pl.DataFrame:
    """Dates for the undated, names for all; in order of time."""
    # The same message twice is two events: the nth copy has its own name, whatever the order of the files.
    same = ["text", "written", "actor", "abusive"]
    rows = kept.sort("_file", "_row").with_columns(nth=pl.int_range(pl.len()).over(same).cast(pl.String))
    named = zip(rows["text"], rows["written"], rows["actor"].fill_null(""), rows["nth"], strict=True)
    rows = rows.with_columns(
        event_id=pl.Series([f"im-{_digest(*parts)}" for parts in named], dtype=pl.String)
    )
    rows = rows.with_columns(ts=_spread(rows, seed))
    if behaviour:
        hashed = {actor: f"actor-{_digest(salt, actor)}" for actor in rows["actor"].drop_nulls().unique()}
        known = pl.col("actor").replace_strict(hashed, default=None, return_dtype=pl.String)
    else:
        known = pl.lit(None, pl.String)
    places = {name: f"c-{_digest(salt, name)}" for name in rows["community"].drop_nulls().unique()}
    place = pl.col("community").replace_strict(places, default="imported", return_dtype=pl.String)
    anonymous = pl.concat_str(pl.lit("anon-"), pl.col("event_id").str.strip_prefix("im-"))
    return rows.with_columns(actor_id=pl.coalesce(known, anonymous), community_id=place).sort(
        "ts", "event_id"
    )


def _spread(rows: pl.DataFrame, seed: int) -> pl.Series:
    """The rows' times, the undated ones shuffled and laid evenly over the time of the dated."""
    undated = rows["ts"].is_null().to_numpy()
    count = int(undated.sum())
    if not count:
        return rows["ts"]
    rng = np.random.default_rng(seed)
    first, last = rows["ts"].drop_nulls().dt.epoch("us").min(), rows["ts"].drop_nulls().dt.epoch("us").max()
    assert isinstance(first, int)
    assert isinstance(last, int)
    # One row in each of `count` equal slots: at random within it, so no period is left without its share.
    at = (rng.permutation(count) + rng.random(count)) / count
    micros = rows["ts"].dt.epoch("us").fill_null(0).to_numpy().copy()
    micros[undated] = first + (at * (last - first)).astype(np.int64)
    return pl.Series("ts", micros).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")


@dataclass(frozen=True)
class PlannedWindow:
    """One hour of the replay. `period` is what it stands for (`2002-08`, `2002-W31`, or two joined by
    `..`).
    """

    hour: datetime
    period: str
    period_start: datetime
    period_end: datetime
    n: int
    n_abuse: int


@dataclass(frozen=True)
class ImportedHour:
    """What one hour brings; unpacks as `events, labels, truth`.

    events: the events table's rows of this window. labels: the labels table's rows that *arrive* in this
    hour, most of them about earlier windows. truth: event_id, abusive, policy of this window's events, for
    measuring only.
    """

    events: pl.DataFrame
    labels: pl.DataFrame
    truth: pl.DataFrame

    def __iter__(self) -> Iterator[pl.DataFrame]:
        return iter((self.events, self.labels, self.truth))


@dataclass(frozen=True)
class Plan:
    """The stream in hourly windows, oldest first, the last of which ends at `end`.

    joined: how many periods had too few messages to stand alone and were joined to a neighbour.
    """

    windows: tuple[PlannedWindow, ...]
    end: datetime
    behaviour: bool
    joined: int
    policies: tuple[str, ...]
    _rows: pl.DataFrame = field(repr=False)
    _labels: pl.DataFrame = field(repr=False)

    def __len__(self) -> int:
        return len(self.windows)

    def hour(self, i: int) -> ImportedHour:
        """What window `i` brings; raises `InvalidInput` where there is no such window."""
        if not 0 <= i < len(self.windows):
            raise InvalidInput(f"there is no window {i}: the plan has {len(self.windows)}, counted from 0")
        start = self.windows[i].hour
        here = self._rows.filter(pl.col("window") == i)
        arriving = self._labels.filter(pl.col("received_at").is_between(start, start + _HOUR, closed="left"))
        return ImportedHour(_events(here), arriving, here.select("event_id", "abusive", "policy"))

    def late_labels(self) -> pl.DataFrame:
        """The labels that arrive only after the last window."""
        return self._labels.filter(pl.col("received_at") >= self.end)


def plan_windows(stream: Stream, window: Window, end: datetime, *, min_rows: int = MIN_WINDOW_ROWS) -> Plan:
    """Lay the stream out in hours: each day, week or month of it becomes one.

    Args:
        stream: the messages.
        window: the period that becomes an hour. Periods without a message are skipped.
        end: where the last hour ends (cut to the full hour).
        min_rows: a period with fewer messages is joined to the next (the last one to the one before).

    Labels arrive a quarter of a window to two windows after their message, from source `vendor`, the same
    delay for the same message in every plan.

    Raises:
        InvalidInput: `window` is none of day, week, month.
    """
    if window not in _EVERY:
        raise InvalidInput(f"--window '{window}' is not a period: use day, week or month")
    last = end.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    numbered, starts, joined = _periods(stream.rows, window, min_rows)
    first = last - _HOUR * len(starts)
    ends = [*starts[1:], _next(starts[-1], numbered["period"].max(), window)]
    rows = _place(numbered, starts, ends, first)
    sizes = rows.group_by("window").agg(n=pl.len(), n_abuse=pl.col("abusive").sum()).sort("window")
    spans = rows.group_by("window").agg(a=pl.col("period").min(), b=pl.col("period").max()).sort("window")
    windows = tuple(
        PlannedWindow(first + _HOUR * i, _label(a, b, window), starts[i], ends[i], n, n_abuse)
        for i, ((_, n, n_abuse), (_, a, b)) in enumerate(
            zip(sizes.iter_rows(), spans.iter_rows(), strict=True)
        )
    )
    return Plan(windows, last, stream.behaviour, joined, stream.policies, rows, _labels(rows))


def _periods(rows: pl.DataFrame, window: Window, min_rows: int) -> tuple[pl.DataFrame, list[datetime], int]:
    """The rows with `period` and `window`, the first period of each window, and how many periods were
    joined.
    """
    dated = rows.with_columns(period=pl.col("ts").dt.truncate(_EVERY[window]))
    counts = dated.group_by("period").len().sort("period")
    window_of: dict[datetime, int] = {}
    starts: list[datetime] = []
    held = min_rows
    for period, n in counts.iter_rows():
        if held >= min_rows:
            starts.append(period)
            held = 0
        window_of[period] = len(starts) - 1
        held += n
    if held < min_rows and len(starts) > 1:
        starts.pop()
        window_of = {period: min(number, len(starts) - 1) for period, number in window_of.items()}
    number = pl.col("period").replace_strict(window_of, return_dtype=pl.Int64)
    return dated.with_columns(window=number), starts, counts.height - len(starts)


def _next(start: datetime, latest: Any, window: Window) -> datetime:
    after = pl.Series([max(start, latest)]).dt.offset_by(_EVERY[window]).item()
    assert isinstance(after, datetime)
    return after


def _label(first: datetime, last: datetime, window: Window) -> str:
    form = {"day": "%Y-%m-%d", "week": "%G-W%V", "month": "%Y-%m"}[window]
    a, b = first.strftime(form), last.strftime(form)
    return a if a == b else f"{a}..{b}"


def _place(
    rows: pl.DataFrame, starts: Sequence[datetime], ends: Sequence[datetime], first: datetime
) -> pl.DataFrame:
    """Each row's instant in the replay, `at`: in proportion within its window, in order, no two alike."""
    number = rows["window"].to_numpy()
    begin = np.array([start.timestamp() for start in starts])[number]
    until = np.array([end.timestamp() for end in ends])[number]
    share = np.clip((rows["ts"].dt.epoch("us").to_numpy() / 1e6 - begin) / (until - begin), 0.0, 1.0)
    nth = rows.select(pl.int_range(pl.len()).over("window")).to_series().to_numpy()
    # Messages of the same second stay in order by a microsecond each; the last seconds of the hour are left
    # free so that all of it arrives within it.
    micros = number * 3_600_000_000 + (share * 3_590_000_000).astype(np.int64) + nth
    offset = pl.Series("offset", micros).cast(pl.Duration("us"))
    placed = rows.with_columns(at=pl.lit(first).cast(loose.TIME) + offset)
    return placed.with_columns(born=pl.col("at").min().over("actor_id"))


def _events(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the events table. What an import cannot know is null, or says so (size 0, language und)."""
    told: dict[str, pl.Expr] = {
        "ts": pl.col("at"),
        "received_at": pl.col("at") + _ARRIVAL,
        "community_size": pl.lit(0),
        "channel_id": pl.concat_str("community_id", pl.lit("/import")),
        "kind": pl.lit("message"),
        "language": pl.lit("und"),
        "account_created_at": pl.col("born"),
    }
    kept = {"event_id", "actor_id", "community_id", "text"}
    return rows.select(
        told.get(name, pl.col(name) if name in kept else pl.lit(None)).cast(kind).alias(name)
        for name, kind in polars_schema("events").items()
    )


def _labels(rows: pl.DataFrame) -> pl.DataFrame:
    """Rows of the labels table for all events, in order of arrival."""
    delays = [0.25 + 1.75 * (int(_digest("delay", event)[:8], 16) / 2**32) for event in rows["event_id"]]
    delay = (pl.Series("delay", delays) * 3_600_000_000).cast(pl.Int64).cast(pl.Duration("us"))
    told: dict[str, pl.Expr] = {
        "label_id": pl.concat_str(pl.lit("l-"), pl.col("event_id")),
        "event_id": pl.col("event_id"),
        "policy": pl.col("policy").fill_null(ANY_POLICY),
        "value": pl.when("abusive").then(pl.lit("abuse")).otherwise(pl.lit("benign")),
        "source": pl.lit("vendor"),
        "rater_id": pl.lit("import"),
        "labeled_at": pl.col("at") + pl.col("delay"),
        "received_at": pl.col("at") + pl.col("delay") + _ARRIVAL,
        "confidence": pl.lit(None),
    }
    whole = rows.with_columns(delay)
    return whole.select(
        told[name].cast(kind).alias(name) for name, kind in polars_schema("labels").items()
    ).sort("received_at", "label_id")
