"""Refused rows: kept with their reason, counted, never dropped silently.

What is refused, and why, is decided elsewhere (`redqueen.ingest`, `redqueen.importing`). Rows here are raw:
they never go into logs or metadata, only their counts and reasons do.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import polars as pl

from redqueen.errors import Conflict
from redqueen.store import ObjectStore
from redqueen.tables import hour_key

PREFIX = "quarantine"


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


def read(store: ObjectStore, table: str, hour: datetime | None = None) -> list[dict[str, Any]]:
    """The refused rows of `table`, of one hour or of all, each once, in order of hour.

    An hour that is ingested again after more files landed refuses some rows twice, in two objects: rows
    that are equal to the last byte (file and line included) are one.
    """
    prefix = f"{PREFIX}/{hour_key(table, hour)}" if hour else f"{PREFIX}/{table}/"
    seen: dict[tuple[str, bytes], None] = {}
    for key in store.list(prefix):
        folder = key.rpartition("/")[0]
        seen.update(((folder, line), None) for line in store.get(key).data.splitlines())
    return [{**json.loads(line), "_hour": folder.split("/", 2)[2]} for folder, line in seen]


def counts(store: ObjectStore, table: str, hour: datetime | None = None) -> dict[str, int]:
    """How many rows were refused for each reason, the commonest first."""
    return dict(
        Counter(row.get("reason", "no reason given") for row in read(store, table, hour)).most_common()
    )


def listing(store: ObjectStore, table: str) -> pl.DataFrame:
    """Hour (`dt=../hr=..`), reason and rows, for a person: counts only, nothing of the rows."""
    tally = Counter((row["_hour"], row.get("reason", "no reason given")) for row in read(store, table))
    rows = [(hour, reason, n) for (hour, reason), n in sorted(tally.items())]
    return pl.DataFrame(rows, schema={"hour": pl.String, "reason": pl.String, "rows": pl.Int64}, orient="row")
