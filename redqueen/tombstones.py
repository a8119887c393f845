"""What was erased on request, remembered without remembering it: salted hashes of the ids of actors, events
and the labels on them.

Taking in asks it (`redqueen.ingest`), erasing writes it (`redqueen.erasure`). The salt is this store's own,
so the hashes say nothing elsewhere; whoever holds the store and a guess can still test the guess.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import polars as pl

from redqueen.errors import Conflict, NotFound
from redqueen.store import ObjectStore, to_json, to_parquet

PREFIX = "state/erasures"
SALT_KEY = f"{PREFIX}/salt.json"
STONES_KEY = f"{PREFIX}/tombstones.parquet"
REASON = "erased on request"
ERASED = "erased"
"""What a pseudonym, and a place in a list, begins with."""

HARD = "hard:"
"""A hard example is called by the event it was made from."""

KINDS = ("actor", "event", "label")
_SCHEMA = {"kind": pl.String(), "hash": pl.UInt64(), "request": pl.String()}


@dataclass(frozen=True)
class Tombstones:
    """The hashes in force. Empty ones cost nothing to ask."""

    salt: bytes
    actors: np.ndarray[Any, np.dtype[np.uint64]]
    events: np.ndarray[Any, np.dtype[np.uint64]]
    labels: np.ndarray[Any, np.dtype[np.uint64]]
    spelt: tuple[re.Pattern[str], ...] = ()
    """What to look for in texts that follow no format, where the id itself is known."""

    def __bool__(self) -> bool:
        return bool(self.actors.size or self.events.size)

    def is_actor(self, ids: pl.Series) -> pl.Series:
        """Which of these ids are erased actors."""
        return self._among(ids, self.actors)

    def is_event(self, ids: pl.Series) -> pl.Series:
        """Which of these ids are erased events."""
        return self._among(ids, self.events)

    def is_label(self, ids: pl.Series) -> pl.Series:
        """Which of these ids are labels on erased events."""
        return self._among(ids, self.labels)

    def _among(self, ids: pl.Series, hashes: np.ndarray[Any, np.dtype[np.uint64]]) -> pl.Series:
        if not hashes.size or not len(ids):
            return pl.Series(ids.name, [False] * len(ids), pl.Boolean)
        distinct = ids.cast(pl.String).unique().drop_nulls()
        hit = distinct.filter(pl.Series(np.isin(self.hashes(distinct.to_list()), hashes), dtype=pl.Boolean))
        return ids.cast(pl.String).is_in(hit.to_list()).fill_null(False)

    @cached_property
    def all(self) -> frozenset[int]:
        """Every hash, whatever it is of."""
        return frozenset([*self.actors.tolist(), *self.events.tolist(), *self.labels.tolist()])

    def hashes(self, ids: Iterable[str]) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """The salted hash of each id."""
        return np.array([self.hash_of(one) for one in ids], dtype=np.uint64)

    def hash_of(self, one: str) -> int:
        """The salted hash of one id; a hard example is hashed as the event it was made from."""
        name = one.removeprefix(HARD).encode("utf-8", "replace")
        return int.from_bytes(hashlib.blake2b(name, key=self.salt, digest_size=8).digest(), "little")

    def pseudonym(self, actor_id: str) -> str:
        """What an erased actor is called where other people's rows name it: the same every time."""
        name = actor_id.encode("utf-8", "replace")
        return f"{ERASED}-{hashlib.blake2b(name, key=self.salt, digest_size=8, person=b'name').hexdigest()}"

    def veil(self, column: pl.Series) -> pl.Series:
        """The column with erased actors under their pseudonyms."""
        hit = self.is_actor(column)
        if not hit.any():
            return column
        told = [self.pseudonym(v) if h else v for v, h in zip(column.to_list(), hit.to_list(), strict=True)]
        return pl.Series(column.name, told, pl.String)


def _salt(store: ObjectStore, *, make: bool) -> bytes:
    try:
        return bytes.fromhex(store.get_json(SALT_KEY)["salt"])
    except NotFound:
        if not make:
            return b""
    with contextlib.suppress(Conflict):
        store.put_if_absent(SALT_KEY, to_json({"salt": secrets.token_hex(32)}))
    return bytes.fromhex(store.get_json(SALT_KEY)["salt"])


def _stones(store: ObjectStore) -> tuple[pl.DataFrame, str | None]:
    try:
        blob = store.get(STONES_KEY)
    except NotFound:
        return pl.DataFrame(schema=_SCHEMA), None
    return pl.read_parquet(io.BytesIO(blob.data)), blob.etag


def load(store: ObjectStore, request: str | None = None, *, make: bool = False) -> Tombstones:
    """What is erased, or what one request erased; `make` gives a store its salt."""
    frame, etag = _stones(store)
    if etag is None and not make:
        none = np.array([], dtype=np.uint64)
        return Tombstones(b"", none, none, none)
    if request is not None:
        frame = frame.filter(pl.col("request") == request)
    actors, events, labels = (frame.filter(pl.col("kind") == kind)["hash"].to_numpy() for kind in KINDS)
    return Tombstones(_salt(store, make=make), actors, events, labels)


def add(store: ObjectStore, request: str, kind: str, ids: Collection[str]) -> None:
    """Remember these ids (`kind`: one of `KINDS`) under a request; the same ids again change nothing."""
    hashes = load(store, request, make=True).hashes(ids)
    new = pl.DataFrame(
        {"kind": [kind] * len(hashes), "hash": hashes, "request": [request] * len(hashes)}, schema=_SCHEMA
    )
    for _ in range(20):
        frame, etag = _stones(store)
        wanted = pl.concat([frame, new]).unique().sort("kind", "request", "hash")
        if wanted.height == frame.height:
            return
        data = to_parquet(wanted.to_arrow())
        with contextlib.suppress(Conflict):
            if etag is None:
                store.put_if_absent(STONES_KEY, data)
            else:
                store.put_if_match(STONES_KEY, data, etag)
            return
    raise Conflict(STONES_KEY, "20 other writers came first; try again")


def request_name(store: ObjectStore, kind: str, one: str) -> str:
    """The name of the request to erase this id: the same id, the same request."""
    salt = _salt(store, make=True)
    return f"{kind}-{hashlib.blake2b(one.encode(), key=salt, digest_size=8).hexdigest()}"


def record_key(request: str) -> str:
    """Where a request's record is kept: what it rewrote, and when."""
    return f"{PREFIX}/{request}.json"


def records(store: ObjectStore) -> list[dict[str, Any]]:
    """Every request to erase, as kept."""
    keys = [k for k in store.list(f"{PREFIX}/") if k.endswith(".json") and k != SALT_KEY]
    return [json.loads(store.get(k).data) for k in keys]
