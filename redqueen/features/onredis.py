"""The online compiler whose state lies in Redis, so that several scoring services share one.

The declarations of `redqueen.features.declared` become one Lua script, which takes an event in and reads its
aggregates: one round trip, and atomic, so replicas need no lock. Semantics are those of that module. Belongs
here: the script, its keys, and what to do when Redis is away. Does not belong here: floating point
(`redqueen.features.finish`), or what an event says by itself (`redqueen.features.prepared`).

What lies in Redis, all of it below `rq:<version>:`, ids only as keyed hashes of eight bytes:

- per key a string: its clock; for each window the counts and sums, a row a hop (`age, count, count, ...`, the
  newest last: a window of 24 hours is thirteen rows at most, whatever happened in it); for each kind of
  distinct value a list `value, tile of its last sight`.
- per key whose lists grew long a sorted set in their place: value -> tile.
- copies: per event id the row that it got, and until when a copy gets it too.

Rows may be as wide as hops because a window's tail is cut at hops. What has left every window is dropped by
tile, on the key's own clock. Redis' expiry runs on the wall's clock and only takes away keys that nobody has
touched for twice the horizon: no value depends on it unless a stream runs at less than half the speed of the
wall.

One Redis (or Sentinel's master, or a compatible server with Lua) is supported. Redis Cluster is not: one
event touches keys that would lie on different nodes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b, sha1
from struct import Struct
from typing import Any, get_args

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.exceptions import NoScriptError, RedisError
from redis.retry import Retry

from redqueen.errors import InvalidInput, ServiceUnavailable
from redqueen.features.declared import (
    AGGREGATES,
    CLOGC_SCALE,
    FEATURES_VERSION,
    HORIZON,
    KEYS,
    SECOND,
    TILE,
    WATERMARK,
    WINDOWS,
    Aggregate,
    Flag,
    Key,
    Window,
)
from redqueen.features.online import alone
from redqueen.features.prepared import Prepared

TIMEOUT_S = 0.25
"""Redis answers in a tenth of a millisecond; a message does not wait longer than this for its features."""

QUIET_S = 1.0
"""After a failure Redis is not asked again for so long: a dead one must not cost every message a timeout."""

MIN_VERSION = 6

CHUNK = 64
"""Events of one round trip; Redis serves nobody else meanwhile (a few milliseconds)."""

FILLING_S = 600
"""A replica that dies while it fills the state keeps others from it no longer than this."""

TTL_S = 2 * HORIZON // SECOND
COPY_TTL_S = 2 * WATERMARK // SECOND

FEW = 16
"""So many distinct values are kept in the key's own string; more move out to a sorted set."""

BASE = 1 << 25
"""Scores of the n-th map of a sorted set begin at n * BASE: there are fewer tiles than this until 2288."""

_LETTERS: dict[Key, str] = {key: chr(ord("a") + place) for place, key in enumerate(KEYS)}
_EVENT = "="
_SINCE, _FILLING = b"since", b"filling"

if any(w.length % w.hop or w.hop % TILE for w in WINDOWS):
    raise AssertionError("a window's length must be whole hops, and its hop whole tiles")


def connect(url: str) -> Callable[[], redis.Redis]:
    """What opens a client of `RQ_REDIS_URL`, when it is first needed: one that gives up soon.

    Raises:
        InvalidInput: it is no address.
    """
    try:
        parse_url(url)
    except ValueError:
        # Its own words would repeat the address, and with it a password.
        raise InvalidInput(
            "RQ_REDIS_URL is no address of a Redis: write redis://[user:password@]host:port/database, or "
            "rediss:// for TLS"
        ) from None
    return lambda: redis.Redis.from_url(
        url,
        single_connection_client=True,  # a third faster than a pool, and connected at once
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        # Sending an event twice is safe: it is remembered by its id.
        retry=Retry(NoBackoff(), 1),
        protocol=2,
    )


def look_at(url: str) -> tuple[bool | None, str]:
    """Whether the Redis at `url` will do (None: with a warning), and why, for people.

    Raises:
        InvalidInput: `url` is no address.
    """
    opened = connect(url)
    try:
        client = opened()
        client.ping()
        about: dict[str, Any] = client.info()
        if about.get("redis_mode") == "cluster":
            return (
                False,
                "it is a Redis Cluster, where one event's keys lie on many nodes; use a single Redis",
            )
        if client.script_load(SCRIPT) not in (SCRIPT_SHA, SCRIPT_SHA.encode()):
            return False, "it does not take Lua scripts as Redis does"
    except (RedisError, OSError) as error:
        return False, (
            f"it does not answer ({type(error).__name__}): behaviour features are not to be had, and "
            "messages are scored by text alone. Check RQ_REDIS_URL"
        )
    version, policy = about.get("redis_version", "?"), about.get("maxmemory_policy", "noeviction")
    if int(str(version).split(".")[0]) < MIN_VERSION:
        return False, f"it is version {version}; {MIN_VERSION}.0 or later is needed"
    if policy != "noeviction":
        return None, (
            f"version {version}; its maxmemory-policy is {policy}, which throws away windows when memory is "
            "short, and features read too low without a word: set noeviction"
        )
    if not about.get("aof_enabled"):
        return None, (
            f"version {version}; without appendonly a restart of Redis empties the windows, which then "
            "fill by time"
        )
    return True, f"version {version}, {about.get('used_memory_human', '?')} used"


class RedisEngine:
    """The engine whose state lies in Redis. Not thread-safe; other processes may share the same state.

    Args:
        client: a client that does not decode, or what opens one (`connect`).
        prefix: parts one stream from another in the same database.
        salt: keys the hashes of ids. Replicas must have the same one.
    """

    def __init__(
        self, client: redis.Redis | Callable[[], redis.Redis], prefix: str = "rq", *, salt: str = "red-queen"
    ) -> None:
        self._open: Callable[[], redis.Redis] = client if callable(client) else lambda: client
        self._opened: redis.Redis | None = None
        self._prefix = f"{prefix}:{FEATURES_VERSION[-6:]}:".encode()
        self._silent_until = 0.0
        key = blake2b(salt.encode(), digest_size=32).digest()
        self._hash = lru_cache(maxsize=65_536)(lambda value: _hash(value, key))

    def observe(self, events: Sequence[Prepared]) -> NDArray[np.int64]:
        """The aggregates [n, len(AGGREGATES)] of events in the order in which they become known.

        Raises:
            ServiceUnavailable: Redis did not answer. Some of the events may have been taken in; to observe
                the same events again is safe.
        """
        raw = np.zeros((len(events), len(AGGREGATES)), dtype=np.int64)
        wanted = [place for place, event in enumerate(events) if event.actor is not None]
        for start in range(0, len(wanted), CHUNK):
            places = wanted[start : start + CHUNK]
            rows = self._run([self._packed(events[place]) for place in places])
            for place, row in zip(places, rows, strict=True):
                raw[place] = np.frombuffer(row, "<f8") if row else alone(events[place])
        return raw

    def _packed(self, event: Prepared) -> bytes:
        ids = [NOBODY if (v := getattr(event, c)) is None else self._hash(v) for c in _COLUMNS]
        hosts = b"".join(map(self._hash, event.hosts))
        return (
            _HEAD.pack(
                event.at,
                event.received,
                event.late,
                *(getattr(event, flag) for flag in _FLAGS),
                *(getattr(event, column) for column in _NUMBERS),
                self._hash(event.event_id),
                *ids,
                len(hosts),
            )
            + hosts
        )

    def _run(self, packed: list[bytes]) -> list[bytes]:
        with self._answering():
            try:
                found = self._client.execute_command("EVALSHA", SCRIPT_SHA, 0, self._prefix, *packed)
            except NoScriptError:  # Redis was restarted, or its scripts were flushed
                found = self._client.execute_command("EVAL", SCRIPT, 0, self._prefix, *packed)
        rows: list[bytes] = found  # b"" for a late event
        return rows

    @property
    def _client(self) -> redis.Redis:
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    @contextmanager
    def _answering(self) -> Iterator[None]:
        if time.monotonic() < self._silent_until:
            raise ServiceUnavailable(f"Redis did not answer; it is asked again after {QUIET_S:.0f} s")
        try:
            yield
        except (RedisError, OSError) as error:
            self._silent_until = time.monotonic() + QUIET_S
            raise ServiceUnavailable(
                f"Redis did not take the events ({type(error).__name__}): see `redqueen doctor`"
            ) from error

    # -- what it holds ---------------------------------------------------------------------------------------

    def since(self) -> int | None:
        """From when on (microseconds) the state holds every event; None where it has not been begun.

        Raises:
            ServiceUnavailable: Redis did not answer; so do the following.
        """
        with self._answering():
            found = self._client.get(self._prefix + _SINCE)
        return None if found in (None, _FILLING) else int(found)

    def claim(self) -> bool:
        """Take it upon oneself to begin the state; False where it is begun, or another replica is at it."""
        with self._answering():
            return bool(self._client.set(self._prefix + _SINCE, _FILLING, nx=True, ex=FILLING_S))

    def unclaim(self) -> None:
        """Leave the state as it was found: not begun."""
        with self._answering():
            self._client.delete(self._prefix + _SINCE)

    def begun(self, since: int) -> None:
        """Declare the state complete from `since` on."""
        with self._answering():
            self._client.set(self._prefix + _SINCE, since)

    def forget(self, actor_id: str) -> int:
        """Delete what is kept under this id, as a sender and as a recipient, and its name in what others
        did; returns how many keys and names that were. Looks at every key: seconds per million.

        Raises:
            ServiceUnavailable: Redis did not answer; forget again.
        """
        name = self._hash(actor_id)
        gone = 0
        with self._answering():
            for keys in _chunked(self._client.scan_iter(match=_literal(self._prefix) + b"*", count=CHUNK)):
                own = [key for key in keys if name in self._names(key)]
                gone += int(self._client.delete(*own)) if own else 0
                others = [key for key in keys if self._kind(key).lower() in _LETTERS.values()]
                for start in range(0, len(others), CHUNK):
                    part = others[start : start + CHUNK]
                    gone += int(self._client.eval(_FORGET, len(part), *part, name, len(self._prefix) + 1))
        return gone

    def clear(self) -> None:
        """Delete everything below the prefix."""
        with self._answering():
            for keys in _chunked(self._client.scan_iter(match=_literal(self._prefix) + b"*", count=CHUNK)):
                self._client.delete(*keys)

    def _kind(self, key: bytes) -> str:
        return chr(key[len(self._prefix)])

    def _names(self, key: bytes) -> list[bytes]:
        """The hashes of the people that a key is made of."""
        kind = self._kind(key).lower()
        columns = next((KEYS[k] for k, letter in _LETTERS.items() if letter == kind), ())
        at = len(self._prefix) + 1
        return [
            key[at + 8 * place : at + 8 * place + 8]
            for place, column in enumerate(columns)
            if column in ("actor", "recipient")
        ]


def _hash(value: str, key: bytes) -> bytes:
    return blake2b(value.encode("utf-8", "surrogatepass"), key=key, digest_size=8).digest()


def _literal(pattern: bytes) -> bytes:
    """The bytes as a glob that matches only them."""
    return b"".join(b"\\" + bytes([c]) if c in b"*?[]\\^-" else bytes([c]) for c in pattern)


def _chunked(keys: Iterator[Any]) -> Iterator[list[bytes]]:
    chunk: list[bytes] = []
    for key in keys:
        chunk.append(key)
        if len(chunk) >= 1000:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


# -- the script ----------------------------------------------------------------------------------------------

_FLAGS: tuple[str, ...] = get_args(Flag)
_NUMBERS = tuple(sorted({a.value for a in AGGREGATES if a.op == "sum" and a.value}))
_COLUMNS = tuple(
    dict.fromkeys(
        c
        for c in (
            *(column for columns in KEYS.values() for column in columns),
            *(a.value for a in AGGREGATES if a.op == "distinct" and a.value),
        )
        if c != "hosts"
    )
)
NOBODY = bytes(8)
"""In place of the hash of what is not known."""

_HEAD = Struct(f"<ddB{len(_FLAGS)}B{len(_NUMBERS)}I8s{'8s' * len(_COLUMNS)}H")
_LUA_HEAD = f"<ddB{'B' * len(_FLAGS)}{'I4' * len(_NUMBERS)}c8{'c8' * len(_COLUMNS)}Hc0"

_COUNTING = ("count", "sum", "clogc")

Column = tuple[str | None, Flag | None]
"""What is counted: the events (None) or a number of them, and under which flag."""


@dataclass(frozen=True)
class _Rows:
    """The counts of a key that share rows: `columns` in slots of `slot`, as far back as `window`."""

    window: Window
    slot: int
    columns: tuple[Column, ...]

    @property
    def width(self) -> int:
        return 1 + len(self.columns)


def _column(aggregate: Aggregate) -> Column:
    return (aggregate.value if aggregate.op == "sum" else None), aggregate.where


def _slot(aggregate: Aggregate) -> int:
    # c ln c is a sum over tiles; everything else adds up over whole hops.
    return TILE if aggregate.op == "clogc" else aggregate.window.hop


def _rows(key: Key) -> tuple[_Rows, ...]:
    found: dict[tuple[Window, int], dict[Column, None]] = {}
    for aggregate in _of(key):
        if aggregate.op in _COUNTING:
            found.setdefault((aggregate.window, _slot(aggregate)), {})[_column(aggregate)] = None
    return tuple(_Rows(window, slot, tuple(columns)) for (window, slot), columns in found.items())


def _of(key: Key) -> list[Aggregate]:
    return [aggregate for aggregate in AGGREGATES if aggregate.key == key]


def _maps(key: Key) -> dict[tuple[str, Flag | None], list[Aggregate]]:
    """The distinct values of a key: what is told apart, under which flag, and who reads it."""
    found: dict[tuple[str, Flag | None], list[Aggregate]] = {}
    for aggregate in _of(key):
        if aggregate.op == "distinct":
            assert aggregate.value is not None
            found.setdefault((aggregate.value, aggregate.where), []).append(aggregate)
    return found


_BASES = range(1, 1 + max(len(_maps(key)) for key in KEYS))

_OPENING = f"""\
local call, pack, unpack_all, floor, log = redis.call, cmsgpack.pack, cmsgpack.unpack, math.floor, math.log
local prefix, replies = ARGV[1], {{}}
local nobody = string.rep("\\0", 8)

-- Rows (age, count, ...) as they look `shift` slots later: what is older than `oldest` is gone, and the last
-- row is the present one.
local function turned(rows, width, shift, oldest)
  if shift > 0 then
    local kept, n = {{}}, 0
    for j = 1, #rows, width do
      local age = rows[j] + shift
      if age <= oldest then
        kept[n + 1] = age
        for i = 1, width - 1 do kept[n + 1 + i] = rows[j + i] end
        n = n + width
      end
    end
    rows = kept
  end
  local n = #rows
  if n == 0 or rows[n - width + 1] > 0 then
    for i = 1, width do rows[n + i] = 0 end
  end
  return rows
end

-- A list (value, tile of its last sight, ...) once `value` is seen in `tile` and what was not seen since tile
-- `first` is gone; the latest sight comes last.
local function sighted(list, value, tile, first)
  local kept, n = {{}}, 0
  for j = 1, #list, 2 do
    local name, t = list[j], list[j + 1]
    if t >= first and name ~= value then
      kept[n + 1], kept[n + 2] = name, t
      n = n + 2
    end
  end
  if value then kept[n + 1], kept[n + 2] = value, tile end
  return kept
end

-- How many of a list were seen since tile `first`.
local function since(list, first)
  local n = #list
  local j = n
  while j > 0 and list[j] >= first do j = j - 2 end
  return (n - j) / 2
end

-- The list as a map of the sorted set.
local function moved_out(z, base, list)
  local scored = {{}}
  for j = 1, #list, 2 do
    scored[j], scored[j + 1] = base * {BASE} + list[j + 1], string.char(base) .. list[j]
  end
  call("ZADD", z, unpack(scored))
end
"""


_FORGET = f"""\
local name, kind, gone = ARGV[1], tonumber(ARGV[2]), 0
for _, key in ipairs(KEYS) do
  local letter = key:sub(kind, kind)
  if letter ~= letter:lower() then
    for base = 1, {len(_BASES)} do gone = gone + redis.call("ZREM", key, string.char(base) .. name) end
  else
    local s = redis.call("GET", key)
    if s and s:find(name, 1, true) then
      local parts = {{cmsgpack.unpack(s)}}
      for i, list in ipairs(parts) do
        if type(list) == "table" and type(list[1]) == "string" then
          local kept = {{}}
          for j = 1, #list, 2 do
            if list[j] ~= name then kept[#kept + 1], kept[#kept + 2] = list[j], list[j + 1] end
          end
          gone = gone + (#list - #kept) / 2
          parts[i] = kept
        end
      end
      redis.call("SET", key, cmsgpack.pack(unpack(parts)), "KEEPTTL")
    end
  end
end
return gone
"""


def _script() -> str:
    lines = [_OPENING]
    fields = ", ".join(
        ("at", "received", "late", *(f"is_{f}" for f in _FLAGS), *_NUMBERS, "event", *_COLUMNS, "hosts")
    )
    row = ", ".join(_result(place) for place in range(len(AGGREGATES)))
    zeros = ", ".join("0" for _ in AGGREGATES)
    doubles = f'"<{"d" * len(AGGREGATES)}"'
    lines += [
        "for i = 2, #ARGV do",
        f'local {fields} = struct.unpack("{_LUA_HEAD}", ARGV[i])',
        f'local id = prefix .. "{_EVENT}" .. event',
        'local copy = call("GET", id)',
        'if copy and received <= struct.unpack("<d", copy) then',
        f"replies[#replies + 1] = struct.pack({doubles}, unpack_all(copy:sub(9)))",
        "elseif late == 1 then",
        'replies[#replies + 1] = ""',
        "else",
        f"local {row} = {zeros}",
    ]
    for key, columns in KEYS.items():
        lines += _several(key) if columns == ("hosts",) else _single(key, columns)
    lines += [
        f'call("SET", id, struct.pack("<d", at + {WATERMARK}) .. pack({row}), "EX", "{COPY_TTL_S}")',
        f"replies[#replies + 1] = struct.pack({doubles}, {row})",
        "end",
        "end",
        "return replies",
    ]
    return "\n".join(lines)


def _result(place: int) -> str:
    return f"r{place}"


def _single(key: Key, columns: tuple[str, ...]) -> list[str]:
    there = " and ".join(f"{column} ~= nobody" for column in columns)
    return [f"if {there} then -- {key}", f"local name = {' .. '.join(columns)}", *_block(key), "end"]


def _several(key: Key) -> list[str]:
    results = [_result(place) for place, aggregate in enumerate(AGGREGATES) if aggregate.key == key]
    return [
        *(f"local most_{r} = 0" for r in results),
        f"for h = 1, #hosts, 8 do -- {key}",
        "local name = hosts:sub(h, h + 7)",
        *(f"local {r} = 0" for r in results),
        *_block(key),
        *(f"if {r} > most_{r} then most_{r} = {r} end" for r in results),
        "end",
        *(f"{r} = most_{r}" for r in results),
    ]


def _block(key: Key) -> list[str]:
    """Take the event in under `name`, and read the key's aggregates into their results."""
    groups, maps = _rows(key), _maps(key)
    kept = [f"g{i}" for i in range(len(groups))] + [f"m{i}" for i in range(1, 1 + len(maps))]
    lines = [
        f'local k = prefix .. "{_LETTERS[key]}" .. name',
        'local c, last, s = at, nil, call("GET", k)',
        *(f"local {name} = {{}}" for name in kept),
        f"if s then {', '.join(['last', *kept])} = unpack_all(s) end",
        "if last and last > c then c = last end",
    ]
    for place, aggregate in enumerate(AGGREGATES):
        if aggregate.key == key and aggregate.op == "gap":
            limit = aggregate.window.length
            lines += [
                f"{_result(place)} = last and c - last or {limit}",
                f"if {_result(place)} > {limit} then {_result(place)} = {limit} end",
            ]
    for i, group in enumerate(groups):
        lines += _counting(key, f"g{i}", group)
    if maps:
        lines += [
            f'local z = prefix .. "{_LETTERS[key].upper()}" .. name',
            f"local tile = floor(c / {TILE})",
            f"local moved = last and tile > floor(last / {TILE})",
        ]
    for base, ((value, where), readers) in enumerate(maps.items(), 1):
        lines += _telling_apart(base, value, where, readers)
    if maps:
        out = " or ".join(f"m{base} == true" for base in range(1, 1 + len(maps)))
        lines.append(f'if moved and ({out}) then call("EXPIRE", z, "{TTL_S}") end')
    return [*lines, f'call("SET", k, pack({", ".join(["c", *kept])}), "EX", "{TTL_S}")']


def _counting(key: Key, g: str, group: _Rows) -> list[str]:
    window, slot, width = group.window, group.slot, group.width
    lines = [
        f"do -- counts, {window.name}",
        f"local slot = floor(c / {slot})",
        f"local oldest = slot - {_first(window, slot)}",
        f"{g} = turned({g}, {width}, last and slot - floor(last / {slot}) or 0, oldest)",
        f"local n = #{g} - {width}",
    ]
    for i, (value, where) in enumerate(group.columns, 2):
        more = " * ".join([*([value] if value else []), *([f"is_{where}"] if where else [])]) or "1"
        lines.append(f"{g}[n + {i}] = {g}[n + {i}] + {more}")
    lines.append(f"for j = 1, #{g}, {width} do")
    for place, aggregate in enumerate(AGGREGATES):
        if aggregate.key != key or aggregate.window != window or aggregate.op not in _COUNTING:
            continue
        if _slot(aggregate) != slot:
            continue
        cell, result = f"{g}[j + {1 + group.columns.index(_column(aggregate))}]", _result(place)
        if aggregate.op == "clogc":
            nats = f"floor(n * log(n) * {CLOGC_SCALE} + 0.5)"
            lines += [f"local n = {cell}", f"if n > 1 then {result} = {result} + {nats} end"]
        else:
            lines.append(f"{result} = {result} + {cell}")
    return [*lines, "end", "end"]


def _telling_apart(base: int, value: str, where: Flag | None, readers: list[Aggregate]) -> list[str]:
    windows = sorted({a.window for a in readers}, key=lambda window: window.length)
    longest = windows[-1]
    m, zero = f"m{base}", base * BASE
    flag = "" if where is None else f" and is_{where} == 1"
    lines = [
        f"do -- distinct {value}",
        f"local value = {value} ~= nobody{flag} and {value}",
        *(f"local f_{w.name} = {_first(w, TILE)}" for w in windows),
        f"if {m} ~= true then",
        f"{m} = sighted({m}, value, tile, f_{longest.name})",
        *(f"{_result(AGGREGATES.index(a))} = since({m}, f_{a.window.name})" for a in readers),
        f"if #{m} > {2 * FEW} then moved_out(z, {base}, {m}); {m} = true; moved = true end",
        "else",
        f'if value then call("ZADD", z, {zero} + tile, "\\{base}" .. value) end',
        f"if moved and floor(c / {longest.hop}) > floor(last / {longest.hop}) then "
        f'call("ZREMRANGEBYSCORE", z, {zero}, {zero} + f_{longest.name} - 1) end',
        *(
            f"{_result(AGGREGATES.index(a))} = "
            f'call("ZCOUNT", z, {zero} + f_{a.window.name}, "({zero + BASE}")'
            for a in readers
        ),
        "end",
        "end",
    ]
    return lines


def _first(window: Window, slot: int) -> str:
    """The first slot that the window still holds at clock c."""
    return f"floor((c - {window.length}) / {window.hop}) * {window.hop // slot}"


SCRIPT = _script()
SCRIPT_SHA = sha1(SCRIPT.encode()).hexdigest()
"""What Redis calls the script."""
