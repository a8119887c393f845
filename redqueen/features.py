"""The features: declared once in `FEATURES`, computed one event at a time by `BehaviourState`.

Belongs here: what a feature is and how its value follows from the events up to that moment. Does not belong
here: labels, scores, models (a feature knows none of them), storage, or anything that reads a clock.

One implementation serves both sides: serving keeps a long-lived `BehaviourState`, the offline build replays
`LOOKBACK` before the hour through a fresh one (`featurise`). Windows are exact and at most six hours long, so
the two agree to the last bit whenever they see the same events in the same order, (ts, event_id).

To add a feature: a line in `FEATURES` and its value, in the same place of the order, in `_text_values` or
`BehaviourState._behaviour_values`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from redqueen import text as reading
from redqueen.errors import InvalidInput

__all__ = ["FEATURES", "FEATURES_VERSION", "LOOKBACK", "BehaviourState", "Feature", "featurise", "with_text"]

HORIZON = timedelta(hours=6)
"""The longest window: nothing that happened earlier changes a value."""

LOOKBACK = HORIZON + timedelta(hours=1)
"""What to replay before an hour *of arrival*: its events may have happened an hour before they arrived."""


@dataclass(frozen=True)
class Feature:
    """One declared feature: a column, a sentence a person understands, where it comes from, what it costs."""

    name: str
    sentence: str
    family: Literal["text", "behaviour"]
    cost: Literal["free", "window"]
    needs_actor: bool = False
    """NaN where the sender is not known (a stream without one, or an event without one)."""


_TEXT: tuple[Literal["text"], Literal["free"]] = ("text", "free")
_WINDOW: tuple[Literal["behaviour"], Literal["window"], bool] = ("behaviour", "window", True)

FEATURES: tuple[Feature, ...] = (
    Feature("text_length_log", "ln(1 + characters of the raw text).", *_TEXT),
    Feature("text_obfuscation", "Share of characters that canonicalising had to change.", *_TEXT),
    Feature("text_domains", "Distinct domains linked or named, cloaked ones included.", *_TEXT),
    Feature("text_caps_share", "Share of letters that are capitals.", *_TEXT),
    Feature("text_digit_share", "Share of characters that are digits.", *_TEXT),
    Feature("text_non_ascii_share", "Share of characters outside ASCII.", *_TEXT),
    Feature("is_dm", "1 for a direct message or friend request, else 0.", "behaviour", "free"),
    Feature("community_size_log", "ln(1 + members of the community).", "behaviour", "free"),
    Feature("account_age_hours_log", "ln(1 + hours since the account was made).", "behaviour", "free", True),
    Feature("actor_events_1h", "Events of this actor in the last hour, this one included.", *_WINDOW),
    Feature("actor_events_6h", "Events of this actor in the last 6 h, this one included.", *_WINDOW),
    Feature("actor_recipients_1h", "Distinct recipients this actor wrote to in the last hour.", *_WINDOW),
    Feature("actor_recipients_6h", "Distinct recipients this actor wrote to in the last 6 h.", *_WINDOW),
    Feature("actor_channels_1h", "Distinct channels this actor wrote in during the last hour.", *_WINDOW),
    Feature("actor_communities_6h", "Distinct communities this actor was active in, last 6 h.", *_WINDOW),
    Feature(
        "new_recipient_share_6h",
        "Distinct recipients over addressed events of the actor, last 6 h; 0 if none.",
        *_WINDOW,
    ),
    Feature(
        "actor_gap_log",
        "ln(1 + seconds since this actor's previous event); 6 h where there is none.",
        *_WINDOW,
    ),
    Feature(
        "campaign_actors_1h",
        "Distinct actors who sent the same text (links and digits aside) in the last hour.",
        *_WINDOW,
    ),
    Feature(
        "domain_actors_6h",
        "Distinct actors who sent one of the domains in the last 6 h (the most); 0 if none.",
        *_WINDOW,
    ),
    Feature("ip_actors_6h", "Distinct actors behind this IP hash in the last 6 h; 0 if not known.", *_WINDOW),
    Feature(
        "device_actors_6h", "Distinct actors on this device hash in the last 6 h; 0 if not known.", *_WINDOW
    ),
)

NAMES = tuple(feature.name for feature in FEATURES)
TEXT_FEATURES = sum(feature.family == "text" for feature in FEATURES)
"""The first so many features follow from the text alone."""

_REVISION = 1
"""Raise it when a value changes its meaning under the same name."""

FEATURES_VERSION = f"{_REVISION}-" + hashlib.sha256("\n".join(NAMES).encode()).hexdigest()[:10]
"""Order, names and meaning of the columns, in one word."""

_HOUR_US = 3_600_000_000
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_NUMBER = re.compile(r"\d+")
_LINK_OR_NUMBER = re.compile(r"https?://\S+|\b[\w-]+(?:\.[\w-]+)+(?:/\S*)?|\d+")
_MIN_CAMPAIGN_CHARS = 12
"""Shorter texts ("ok", "good morning") are everybody's: they form no campaign."""


class _Seen(NamedTuple):
    """What the state remembers of one event until it leaves the windows."""

    at: int
    event_id: str
    actor: str | None
    recipient: str | None
    channel: str
    community: str
    campaign: int
    hosts: tuple[str, ...]
    ip: str | None
    device: str | None


@dataclass(slots=True)
class _Actor:
    """Counts of one actor; the dictionaries hold how many events of the window name each key."""

    last: int = -1
    events_1h: int = 0
    events_6h: int = 0
    addressed_6h: int = 0
    recipients_1h: dict[str, int] = field(default_factory=dict)
    recipients_6h: dict[str, int] = field(default_factory=dict)
    channels_1h: dict[str, int] = field(default_factory=dict)
    communities_6h: dict[str, int] = field(default_factory=dict)


class BehaviourState:
    """What happened in the last six hours, kept so that each event's features cost a few look-ups.

    A window of length w at an event of time t holds the events with t - w < ts <= t that came before it in
    the order (ts, event_id), and the event itself. Observe events in that order. Where they are not:

    - an event older than the newest one seen is taken in *as if it happened at that newest time* (its account
      age still follows its own time): late events change no row already given, time never runs backwards;
    - an event id seen within the last six hours gets its first row again and changes nothing (a copy of it).

    `has_actor=False` is for streams without a sender: every feature with `needs_actor` is NaN and nothing is
    remembered. The same holds for a single event whose actor_id is missing or empty.

    Memory grows with the events of six hours, not with the age of the state. Not thread-safe.
    """

    def __init__(self, horizon: timedelta = HORIZON, *, has_actor: bool = True) -> None:
        if not timedelta(hours=1) <= horizon <= HORIZON:
            raise InvalidInput(
                f"the horizon is {horizon}; it must lie between 1 and 6 hours: the windows end there"
            )
        self.has_actor = has_actor
        self._horizon = horizon // _MICROSECOND
        self._now = -(2**62)
        self._hour: deque[_Seen] = deque()
        self._all: deque[_Seen] = deque()
        self._rows: dict[str, NDArray[np.float32] | None] = {}
        self._actors: dict[str, _Actor] = {}
        self._campaigns: dict[int, dict[str, int]] = {}
        self._domains: dict[str, dict[str, int]] = {}
        self._ips: dict[str, dict[str, int]] = {}
        self._devices: dict[str, dict[str, int]] = {}

    def __len__(self) -> int:
        """Events still remembered."""
        return len(self._all)

    def observe(self, event: Mapping[str, Any]) -> NDArray[np.float32]:
        """Features of one event as of its moment, float32 [F] as `FEATURES` orders them; then remember it.

        Needs the keys event_id and ts (a datetime; without a zone it is UTC); every other column of the
        events table may be missing or None. Raises InvalidInput where one of the two is missing.
        """
        event_id, at = _identity(event)
        known = self._rows.get(event_id)
        if known is not None:
            return known.copy()
        if event_id in self._rows:
            raise InvalidInput(
                f"event {event_id!r} was replayed without its features; observe it in the first place"
            )
        said = _said(event.get("text") or "")
        seen = self._take(event, event_id, at, said)
        row = np.array((*said.values, *self._behaviour_values(event, at, seen)), dtype=np.float32)
        if seen.actor is not None:
            self._rows[event_id] = row
        return row.copy()

    def replay(self, event: Mapping[str, Any]) -> None:
        """Remember one event, once, without computing its features: for those who only need what follows."""
        event_id, at = _identity(event)
        if event_id in self._rows:
            return
        seen = self._take(event, event_id, at, _said(event.get("text") or ""))
        if seen.actor is not None:
            self._admit(self._actors.setdefault(seen.actor, _Actor()), seen)
            self._rows[event_id] = None

    def _take(self, event: Mapping[str, Any], event_id: str, at: int, said: _Said) -> _Seen:
        self._now = max(self._now, at)
        self._evict()
        get = event.get
        actor = (get("actor_id") or None) if self.has_actor else None
        seen = _Seen(
            self._now, event_id, actor, get("recipient_id") or None, get("channel_id") or "",
            get("community_id") or "", said.campaign, said.hosts, get("ip_hash") or None,
            get("device_hash") or None,
        )  # fmt: skip
        if actor is not None:
            self._all.append(seen)
            self._hour.append(seen)
        return seen

    def observe_many(self, events: Sequence[Mapping[str, Any]]) -> NDArray[np.float32]:
        """`observe` for each event, in the order given: float32 [n, F]."""
        if not events:
            return np.empty((0, len(FEATURES)), dtype=np.float32)
        return np.stack([self.observe(event) for event in events])

    def _behaviour_values(self, event: Mapping[str, Any], at: int, seen: _Seen) -> list[float]:
        size = event.get("community_size") or 0
        free = [float(event.get("kind") in ("dm", "friend_request")), math.log1p(max(0, size))]
        if seen.actor is None:
            return free + [math.nan] * (len(FEATURES) - TEXT_FEATURES - 2)
        made = event.get("account_created_at")
        age = math.nan if made is None else math.log1p(max(0, at - _micros(made)) / _HOUR_US)
        actor = self._actors.get(seen.actor)
        if actor is None:
            actor = self._actors[seen.actor] = _Actor()
        gap = min(self._horizon, seen.at - actor.last) if actor.events_6h else self._horizon
        self._admit(actor, seen)
        return [
            *free,
            age,
            actor.events_1h,
            actor.events_6h,
            len(actor.recipients_1h),
            len(actor.recipients_6h),
            len(actor.channels_1h),
            len(actor.communities_6h),
            len(actor.recipients_6h) / actor.addressed_6h if actor.addressed_6h else 0.0,
            math.log1p(gap / 1_000_000),
            len(self._campaigns[seen.campaign]) if seen.campaign else 1.0,
            max((len(self._domains[host]) for host in seen.hosts), default=0),
            len(self._ips[seen.ip]) if seen.ip else 0.0,
            len(self._devices[seen.device]) if seen.device else 0.0,
        ]

    def _admit(self, actor: _Actor, seen: _Seen) -> None:
        actor.last = seen.at
        actor.events_1h += 1
        actor.events_6h += 1
        if seen.recipient is not None:
            actor.addressed_6h += 1
            _add(actor.recipients_1h, seen.recipient)
            _add(actor.recipients_6h, seen.recipient)
        _add(actor.channels_1h, seen.channel)
        _add(actor.communities_6h, seen.community)
        name = seen.actor or ""
        if seen.campaign:
            _add(self._campaigns.setdefault(seen.campaign, {}), name)
        for host in seen.hosts:
            _add(self._domains.setdefault(host, {}), name)
        if seen.ip is not None:
            _add(self._ips.setdefault(seen.ip, {}), name)
        if seen.device is not None:
            _add(self._devices.setdefault(seen.device, {}), name)

    def _evict(self) -> None:
        hour_ago, horizon_ago = self._now - _HOUR_US, self._now - self._horizon
        while self._hour and self._hour[0].at <= hour_ago:
            self._leave_hour(self._hour.popleft())
        while self._all and self._all[0].at <= horizon_ago:
            self._leave_horizon(self._all.popleft())

    def _leave_hour(self, seen: _Seen) -> None:
        name = seen.actor or ""
        actor = self._actors[name]
        actor.events_1h -= 1
        if seen.recipient is not None:
            _remove(actor.recipients_1h, seen.recipient)
        _remove(actor.channels_1h, seen.channel)
        if seen.campaign:
            _remove_from(self._campaigns, seen.campaign, name)

    def _leave_horizon(self, seen: _Seen) -> None:
        name = seen.actor or ""
        actor = self._actors[name]
        actor.events_6h -= 1
        if seen.recipient is not None:
            actor.addressed_6h -= 1
            _remove(actor.recipients_6h, seen.recipient)
        _remove(actor.communities_6h, seen.community)
        if not actor.events_6h:
            del self._actors[name]
        for host in seen.hosts:
            _remove_from(self._domains, host, name)
        if seen.ip is not None:
            _remove_from(self._ips, seen.ip, name)
        if seen.device is not None:
            _remove_from(self._devices, seen.device, name)
        del self._rows[seen.event_id]


def featurise(
    events: pl.DataFrame, lookback: pl.DataFrame | None = None, *, behaviour: bool = True
) -> pl.DataFrame:
    """Features of a stretch of events: event_id and a float32 column a feature, row for row as in `events`.

    `lookback` holds what happened before (see `LOOKBACK`); rows of it that are in `events` too count once.
    With `behaviour=False` features that need a sender are NaN. Raises InvalidInput where an id occurs twice.
    """
    if events.is_empty():
        return pl.DataFrame(schema={"event_id": pl.String, **dict.fromkeys(NAMES, pl.Float32)})
    twice = events.height - events["event_id"].n_unique()
    if twice:
        raise InvalidInput(
            f"{twice} of {events.height} events repeat an event_id; each event has one row of features. "
            "Drop the copies (ingestion keeps the first) and compute the features again"
        )
    state = BehaviourState(has_actor=behaviour)
    used = [column for column in _COLUMNS if column in events.columns]
    wanted = events.select(used).with_row_index("_row")
    stream = wanted.with_columns(pl.col("_row").cast(pl.Int64))
    if behaviour and lookback is not None and lookback.height:
        earlier = lookback.unique("event_id", keep="first").join(events, on="event_id", how="anti")
        earlier = earlier.select([column for column in used if column in earlier.columns])
        stream = pl.concat([stream, earlier], how="diagonal_relaxed")
    stream = stream.sort("ts", "event_id")
    rows = np.empty((events.height, len(FEATURES)), dtype=np.float32)
    for event in stream.iter_rows(named=True):
        if event["_row"] is None:
            state.replay(event)
        else:
            rows[event["_row"]] = state.observe(event)
    return pl.DataFrame(
        {"event_id": events["event_id"], **{name: rows[:, i] for i, name in enumerate(NAMES)}}
    )


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
    places = [
        (column, NAMES.index(name)) for column, name in enumerate(names) if name in NAMES[:TEXT_FEATURES]
    ]
    if places:
        columns, values = zip(*places, strict=True)
        said = np.array([_said(raw).values for raw in texts], dtype=np.float32).reshape(-1, TEXT_FEATURES)
        changed[:, columns] = said[:, values]
    return changed


_COLUMNS = (
    "event_id", "ts", "actor_id", "community_id", "community_size", "channel_id", "recipient_id", "kind",
    "text", "account_created_at", "ip_hash", "device_hash",
)  # fmt: skip
_CAPITALS = bytes(range(65, 91))
_LETTERS = _CAPITALS + bytes(range(97, 123))
_DIGITS = bytes(range(48, 58))
_FOREIGN = re.compile(r"[^\x00-\x7f]")


class _Said(NamedTuple):
    """What follows from a text alone."""

    values: tuple[float, ...]
    campaign: int
    hosts: tuple[str, ...]


@lru_cache(maxsize=32_768)
def _said(raw: str) -> _Said:
    # Cached because campaigns repeat themselves, and because each hour is built with the hours before it.
    read = reading.read(raw)
    hosts = tuple(reading.hosts(read.canonical))
    return _Said(_text_values(raw, read.obfuscation, len(hosts)), _campaign(read.canonical), hosts)


def _text_values(raw: str, obfuscation: float, hosts: int) -> tuple[float, ...]:
    if not raw:
        return (0.0,) * TEXT_FEATURES
    size, data = len(raw), raw.encode("utf-8", "surrogatepass")
    # Deleting bytes and comparing lengths counts them at the speed of C.
    capitals = len(data) - len(data.translate(None, _CAPITALS))
    letters = len(data) - len(data.translate(None, _LETTERS))
    digits = len(data) - len(data.translate(None, _DIGITS))
    foreign: list[str] = [] if len(data) == size else _FOREIGN.findall(raw)
    if foreign:
        capitals += sum(map(str.isupper, foreign))
        letters += sum(map(str.isalpha, foreign))
    share = min(1.0, capitals / letters) if letters else 0.0
    return (math.log1p(size), obfuscation, float(hosts), share, digits / size, len(foreign) / size)


def _campaign(canonical: str) -> int:
    """What near-duplicates have in common, as a number; 0 for texts too short to be anybody's."""
    if len(canonical) < _MIN_CAMPAIGN_CHARS:
        return 0
    # hash() differs from process to process but never leaves this one: only equality is used.
    return hash((_LINK_OR_NUMBER if "." in canonical else _NUMBER).sub("#", canonical)) or 1


def _identity(event: Mapping[str, Any]) -> tuple[str, int]:
    event_id, ts = event.get("event_id"), event.get("ts")
    if not event_id or not isinstance(ts, datetime):
        raise InvalidInput(
            f"an event needs an event_id and a ts (a datetime); event_id is {event_id!r}, ts is a "
            f"{type(ts).__name__}. Refuse it at ingestion"
        )
    return event_id, _micros(ts)


def _micros(ts: datetime) -> int:
    gap = (ts if ts.tzinfo is not None else ts.replace(tzinfo=UTC)) - _EPOCH
    return (gap.days * 86_400 + gap.seconds) * 1_000_000 + gap.microseconds


def _add(counts: dict[str, int], key: str) -> None:
    counts[key] = counts.get(key, 0) + 1


def _remove(counts: dict[str, int], key: str) -> None:
    left = counts[key] - 1
    if left:
        counts[key] = left
    else:
        del counts[key]


def _remove_from(table: dict[Any, dict[str, int]], key: Any, name: str) -> None:
    counts = table[key]
    _remove(counts, name)
    if not counts:
        del table[key]


def check_columns(columns: Iterable[str]) -> None:
    """Raise InvalidInput unless a feature table has exactly the declared columns, each once."""
    given = [column for column in columns if column not in ("event_id", "features_version")]
    if sorted(given) != sorted(NAMES):
        missing = sorted(set(NAMES) - set(given))
        extra = sorted(set(given) - set(NAMES)) or sorted({c for c in given if given.count(c) > 1})
        raise InvalidInput(
            f"the feature table does not have the columns of version {FEATURES_VERSION}: missing {missing}, "
            f"extra or repeated {extra}. Recompute the features with this version"
        )
