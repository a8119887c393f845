"""One event as the compilers read it: times, keys, flags, and the numbers it carries by itself.

Belongs here: what follows from a single event. Does not belong here: windows and whatever other events say
(`redqueen.features.offline`, `redqueen.features.online`), and raw text, which ends here: a prepared event
holds none, so it may be stored and sent where texts may not.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from hashlib import blake2b
from typing import Any, NamedTuple, get_args

import numpy as np
import polars as pl
from numpy.typing import NDArray

from redqueen import text as reading
from redqueen.errors import InvalidInput
from redqueen.features.declared import (
    FEATURES,
    HOUR,
    NAMES,
    NEW_ACCOUNT,
    OBFUSCATED,
    TEXT_FEATURES,
    WATERMARK,
    Direct,
    Flag,
)

__all__ = [
    "DIRECT",
    "FLAGS",
    "SCHEMA",
    "Prepared",
    "prepare",
    "prepare_frame",
    "rows_of",
    "text_values",
    "with_text",
]


class Prepared(NamedTuple):
    """One event as the compilers read it. Times are microseconds UTC; None is what is not known."""

    event_id: str
    received: int
    at: int
    late: bool
    actor: str | None
    recipient: str | None
    channel: str | None
    community: str | None
    campaign: str | None
    """What near-duplicates have in common: 16 hex characters, the same in every process."""
    hosts: tuple[str, ...]
    ip: str | None
    device: str | None
    addressed: bool
    dm: bool
    friend_request: bool
    join: bool
    linked: bool
    obfuscated: bool
    new_account: bool
    written: bool
    """Long enough to be told from other texts: it has a campaign."""
    chars: int
    direct: tuple[float, ...]
    """The `Direct` features, in the order of `FEATURES`."""


FLAGS = get_args(Flag)
"""The fields of a prepared event that an aggregate may ask for in its `where`."""

DIRECT = tuple(feature.value.column for feature in FEATURES if isinstance(feature.value, Direct))
"""The columns of `Prepared.direct`."""

_COMPUTED = (*NAMES[:TEXT_FEATURES], "is_dm", "community_size_log", "account_age_hours_log")
if DIRECT != _COMPUTED:
    raise AssertionError("a Direct feature was declared that redqueen.features.prepared does not compute")

_TYPES: dict[str, pl.DataType] = {
    **dict.fromkeys(("received", "at", "chars"), pl.Int64()),
    **dict.fromkeys(("late", *FLAGS), pl.Boolean()),
    "hosts": pl.List(pl.String()),
    "direct": pl.Array(pl.Float64(), len(DIRECT)),
}
SCHEMA = pl.Schema([(name, _TYPES.get(name, pl.String())) for name in Prepared._fields])
"""A frame of prepared events: one column a field of `Prepared`."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def prepare(event: Mapping[str, Any]) -> Prepared:
    """One row of the events table, prepared. Every column but event_id and ts may be missing or None.

    Raises InvalidInput where event_id or ts (a datetime; without a zone it is UTC) is missing.
    """
    get = event.get
    event_id, ts = get("event_id"), get("ts")
    if not event_id or not isinstance(ts, datetime):
        raise InvalidInput(
            f"an event needs an event_id and a ts (a datetime); event_id is {event_id!r}, ts is a "
            f"{type(ts).__name__}. Refuse it at ingestion"
        )
    happened = _micros(ts)
    known, made = get("received_at"), get("account_created_at")
    received = happened if known is None else _micros(known)
    at = min(happened, received)
    age = None if made is None else at - _micros(made)
    said = _said(get("text") or "")
    kind, recipient = get("kind"), get("recipient_id") or None
    return Prepared(
        event_id, received, at, received - at > WATERMARK,
        get("actor_id") or None, recipient, get("channel_id") or None, get("community_id") or None,
        said.campaign, said.hosts, get("ip_hash") or None, get("device_hash") or None,
        recipient is not None, kind == "dm", kind == "friend_request", kind == "join",
        bool(said.hosts), said.values[_OBFUSCATION] >= OBFUSCATED, age is not None and age < NEW_ACCOUNT,
        said.campaign is not None, said.chars,
        (
            *said.values,
            float(kind in ("dm", "friend_request")),
            math.log1p(max(0, get("community_size") or 0)),
            math.nan if age is None else math.log1p(max(0, age) / HOUR),
        ),
    )  # fmt: skip


def prepare_frame(events: pl.DataFrame) -> pl.DataFrame:
    """The events table, prepared row for row: a frame of `SCHEMA`. Columns may be missing as in `prepare`."""
    if events.is_empty():
        return pl.DataFrame(schema=SCHEMA)
    _demand(events)
    absent = [pl.lit(None, kind).alias(name) for name, kind in _USED.items() if name not in events.columns]
    events = events.select(*(name for name in _USED if name in events.columns), *absent)
    said = _said_many(events["text"].fill_null("").to_list())
    sizes = events["community_size"].fill_null(0).clip(0).to_list()
    happened = _us("ts")
    table = events.select(
        "event_id", "kind", _us("account_created_at").alias("made"),
        pl.coalesce(_us("received_at"), happened).alias("received"),
        pl.min_horizontal(happened, _us("received_at")).alias("at"),
        *(_name(column).alias(name) for name, column in _KEYS.items()),
    ).with_columns(age=pl.col("at") - pl.col("made"))  # fmt: skip
    direct = np.empty((events.height, len(DIRECT)))
    direct[:, :TEXT_FEATURES] = [one.values for one in said]
    direct[:, -3] = table["kind"].is_in(["dm", "friend_request"]).fill_null(False).to_numpy()
    direct[:, -2] = [math.log1p(size) for size in sizes]
    direct[:, -1] = [math.nan if age is None else math.log1p(max(0, age) / HOUR) for age in table["age"]]
    kind = pl.col("kind")
    return table.with_columns(
        pl.Series("campaign", [one.campaign for one in said], pl.String),
        pl.Series("hosts", [one.hosts for one in said], pl.List(pl.String)),
        pl.Series("chars", [one.chars for one in said], pl.Int64),
        pl.Series("obfuscated", direct[:, _OBFUSCATION] >= OBFUSCATED),
        pl.Series("direct", direct, SCHEMA["direct"]),
        (pl.col("received") - pl.col("at") > WATERMARK).alias("late"),
        pl.col("recipient").is_not_null().alias("addressed"),
        *((kind == name).fill_null(False).alias(name) for name in ("dm", "friend_request", "join")),
        (pl.col("age") < NEW_ACCOUNT).fill_null(False).alias("new_account"),
    ).with_columns(
        linked=pl.col("hosts").list.len() > 0, written=pl.col("campaign").is_not_null()
    ).select(list(SCHEMA))  # fmt: skip


def rows_of(prepared: pl.DataFrame) -> list[Prepared]:
    """A frame of `SCHEMA` as prepared events, for the engines."""
    rows = prepared.select(list(SCHEMA)).iter_rows()
    return [
        Prepared._make((*row[:_HOSTS], tuple(row[_HOSTS] or ()), *row[_HOSTS + 1 : -1], tuple(row[-1])))
        for row in rows
    ]


_HOSTS = Prepared._fields.index("hosts")
_OBFUSCATION = DIRECT.index("text_obfuscation")
_KEYS = {
    "actor": "actor_id", "recipient": "recipient_id", "channel": "channel_id", "community": "community_id",
    "ip": "ip_hash", "device": "device_hash",
}  # fmt: skip
_TIME = pl.Datetime("us", "UTC")
_USED: dict[str, pl.DataType] = {
    "event_id": pl.String(), "ts": _TIME, "received_at": _TIME, "account_created_at": _TIME,
    "community_size": pl.Int64(), "kind": pl.String(), "text": pl.String(),
    **dict.fromkeys(_KEYS.values(), pl.String()),
}  # fmt: skip


def _demand(events: pl.DataFrame) -> None:
    for column, why in (("event_id", "has no id"), ("ts", "does not say when it happened")):
        if column not in events.columns:
            raise InvalidInput(f"the events have no column {column!r}; they have {events.columns}")
        lacking = events[column].null_count()
        if lacking:
            raise InvalidInput(f"{lacking} of {events.height} events: {column} {why}. Refuse it at ingestion")
    if not isinstance(events.schema["ts"], pl.Datetime):
        raise InvalidInput(f"ts is a {events.schema['ts']}; it must be a datetime (UTC). Conform the events")


def _us(column: str) -> pl.Expr:
    return pl.col(column).dt.epoch("us")


def _name(column: str) -> pl.Expr:
    return pl.when(pl.col(column) != "").then(pl.col(column))


def _micros(ts: datetime) -> int:
    gap = (ts if ts.tzinfo is not None else ts.replace(tzinfo=UTC)) - _EPOCH
    return gap // _MICROSECOND


_MICROSECOND = timedelta(microseconds=1)

# --- texts --------------------------------------------------------------------------------------------------

_MOST_HOSTS = 64
"""A message that names more is counted as one that names so many: each is looked up and remembered."""

_MIN_CAMPAIGN_CHARS = 12
"""Shorter texts ("ok", "good morning") are everybody's: they form no campaign."""
# A word is read once: beginning anew at each of its hyphens would take time with the square of its length.
_LINK_OR_NUMBER = re.compile(r"https?://\S+|(?<![\w-])[\w-]++(?:\.[\w-]++)+(?:/\S*)?|\d+")
_NUMBER = re.compile(r"\d+")
_FOREIGN = re.compile(r"[^\x00-\x7f]")
_CAPITALS = string.ascii_uppercase.encode()
_LETTERS = string.ascii_letters.encode()
_DIGITS = string.digits.encode()
_PUNCTUATION = string.punctuation.encode()
_REMEMBERED = 16_384


class _Said(NamedTuple):
    """What follows from a text alone."""

    values: tuple[float, ...]
    campaign: str | None
    hosts: tuple[str, ...]
    chars: int


def text_values(texts: Sequence[str]) -> NDArray[np.float64]:
    """The text features of some raw texts, [n, TEXT_FEATURES]."""
    return np.array([one.values for one in _said_many(texts)]).reshape(-1, TEXT_FEATURES)


def with_text(
    rows: NDArray[np.float32], texts: Sequence[str], names: Sequence[str] = NAMES
) -> NDArray[np.float32]:
    """Copies of feature rows [n, F] as they would be had the messages read `texts`: text features differ.

    `names` are the columns of `rows` (the declared features in their order by default). An attack that
    rewrites a message asks with this, so that its obfuscation is seen and its behaviour kept. Raises
    InvalidInput where names and columns disagree.
    """
    changed = np.array(rows, dtype=np.float32)
    if changed.ndim != 2 or changed.shape != (len(texts), len(names)):
        raise InvalidInput(
            f"feature rows {changed.shape} do not fit {len(texts)} texts and {len(names)} columns; "
            "pass the names of the columns that the rows have"
        )
    places = [(column, _TEXT_PLACE[name]) for column, name in enumerate(names) if name in _TEXT_PLACE]
    if places:
        columns, values = zip(*places, strict=True)
        changed[:, columns] = text_values(texts)[:, values]
    return changed


_TEXT_PLACE = {name: place for place, name in enumerate(NAMES[:TEXT_FEATURES])}


class _Recent:
    """The last texts read, two generations of them: campaigns repeat themselves, and attacks ask again.

    Reading and writing a dictionary is atomic; two threads at once can at worst read a text twice.
    """

    def __init__(self) -> None:
        self._young: dict[str, _Said] = {}
        self._old: dict[str, _Said] = {}

    def get(self, raw: str) -> _Said | None:
        found = self._young.get(raw)
        if found is None and (found := self._old.get(raw)) is not None:
            self.put(raw, found)
        return found

    def put(self, raw: str, said: _Said) -> None:
        if len(self._young) >= _REMEMBERED:
            self._old, self._young = self._young, {}
        self._young[raw] = said


_recent = _Recent()


def _said(raw: str) -> _Said:
    found = _recent.get(raw)
    if found is None:
        found = _read(raw, reading.read(raw))
        _recent.put(raw, found)
    return found


def _said_many(texts: Sequence[str]) -> list[_Said]:
    said = {raw: _recent.get(raw) for raw in texts}
    new = [raw for raw, found in said.items() if found is None]
    for raw, read in zip(new, reading.read_many(new), strict=True):
        said[raw] = _read(raw, read)
        _recent.put(raw, said[raw])  # type: ignore[arg-type]
    return [said[raw] for raw in texts]  # type: ignore[misc]


def _read(raw: str, read: reading.Reading) -> _Said:
    canonical = read.canonical
    hosts = tuple(reading.hosts(canonical)[:_MOST_HOSTS])
    return _Said(_text_values(raw, canonical, read.obfuscation, hosts), _campaign(canonical), hosts, len(raw))


def _text_values(raw: str, canonical: str, obfuscation: float, hosts: tuple[str, ...]) -> tuple[float, ...]:
    if not raw:
        return _SILENCE
    size, data = len(raw), raw.encode("utf-8", "surrogatepass")
    # Deleting bytes and comparing lengths counts them at the speed of C.
    total = len(data)
    capitals = total - len(data.translate(None, _CAPITALS))
    letters = total - len(data.translate(None, _LETTERS))
    foreign: list[str] = [] if total == size else _FOREIGN.findall(raw)
    if foreign:
        capitals += sum(map(str.isupper, foreign))
        letters += sum(map(str.isalpha, foreign))
    cloaked = 0
    if hosts and (obfuscation or total != size):
        # Where nothing had to be changed, nothing was cloaked: most links are spared the second look.
        cloaked = len(set(hosts).difference(reading.hosts(raw.lower())))
    words = canonical.split(" ") if canonical else []
    spoken = len(words)
    return (
        math.log1p(size),
        obfuscation,
        float(len(hosts)),
        float(cloaked),
        min(1.0, capitals / letters) if letters else 0.0,
        (total - len(data.translate(None, _DIGITS))) / size,
        len(foreign) / size,
        (total - len(data.translate(None, _PUNCTUATION))) / size,
        math.log1p(spoken),
        (len(canonical) - spoken + 1) / spoken if spoken else 0.0,
        len(set(words)) / spoken if spoken else 1.0,
        float(sum(len(word) > 1 and word[0] == "@" for word in raw.split())) if "@" in raw else 0.0,
    )


_SILENCE = (*(0.0,) * 10, 1.0, 0.0)
"""The text features of no text."""


def _campaign(canonical: str) -> str | None:
    """What near-duplicates have in common; None for texts too short to be anybody's."""
    if len(canonical) < _MIN_CAMPAIGN_CHARS:
        return None
    skeleton = (_LINK_OR_NUMBER if "." in canonical else _NUMBER).sub("#", canonical)
    return blake2b(skeleton.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
