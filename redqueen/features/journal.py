"""What an in-process engine was told, on local disk, so that a killed service finds its windows again.

Belongs here: appending prepared events and reading them back in the order in which they were observed. Does
not belong here: windows (`redqueen.features.online`), and whose turn it is to write (`serving.online`).

One file an hour of the service's clock, one JSON object a line, under the names that erasing looks for. A
write reaches the operating system before the events are answered, so a killed process loses nothing; a
machine that loses its power may lose seconds.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from redqueen.clock import hour_of
from redqueen.features.declared import FEATURES_VERSION, HORIZON, WATERMARK
from redqueen.features.prepared import Prepared

KEPT = timedelta(microseconds=HORIZON + WATERMARK) + timedelta(hours=3)
"""What lies further back changes no window; the clock, and those of the platform's machines, may differ."""

_NAME = "%Y-%m-%dT%H"
_KEPT_FIELDS = Prepared._fields[:-1]
_NAMES = tuple({"actor": "actor_id", "recipient": "recipient_id"}.get(f, f) for f in _KEPT_FIELDS)
"""`direct` is not kept: engines do not read it."""


@dataclass(frozen=True)
class Replay:
    """Events as they were observed; `broken`: lines that could not be read."""

    events: list[Prepared]
    broken: int


class Journal:
    """The journal in one directory. One service writes it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._path: Path | None = None

    def append(self, events: Sequence[Prepared], now: datetime) -> None:
        """Keep events that are about to be observed. Raises OSError where the disk does not take them."""
        if not events:
            return
        lines = [
            json.dumps(dict(zip(_NAMES, event, strict=False)), separators=(",", ":")) for event in events
        ]
        path = self._folder / f"{now.astimezone(UTC):{_NAME}}.jsonl"
        if path != self._path:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._trim(now)
            # A process that was here before may have died, or found the disk full, in the middle of a line.
            lines[:0] = ["", json.dumps({"features_version": FEATURES_VERSION})]
        data = "\n".join([*lines, ""]).encode("utf-8", "surrogatepass")
        self._path = None
        # Opened every time: erasing somebody replaces the file.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            written = os.write(descriptor, data)
        finally:
            os.close(descriptor)
        if written != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._path = path

    def read(self, now: datetime) -> Replay:
        """What still matters at `now`, of this version of the features; raises OSError."""
        events: list[Prepared] = []
        broken = 0
        for hour, path in self._files():
            if not hour_of(now) - KEPT <= hour:
                continue
            ours = False
            for line in path.read_bytes().splitlines():
                if not line:
                    continue
                try:
                    row = json.loads(line)
                    if "features_version" in row:
                        ours = row["features_version"] == FEATURES_VERSION
                    elif ours:
                        events.append(_event(row))
                except (ValueError, KeyError, TypeError):
                    broken += 1
        return Replay(events, broken)

    def _trim(self, now: datetime) -> None:
        for hour, path in self._files():
            if hour < hour_of(now) - KEPT:
                path.unlink(missing_ok=True)

    def _files(self) -> Iterator[tuple[datetime, Path]]:
        for path in sorted(self._folder.glob("*.jsonl")):
            try:
                yield datetime.strptime(path.stem, _NAME).replace(tzinfo=UTC), path
            except ValueError:
                continue


def _event(row: dict[str, object]) -> Prepared:
    values = [row[name] for name in _NAMES]
    values[_HOSTS] = tuple(row["hosts"])  # type: ignore[arg-type]
    return Prepared._make([*values, ()])


_HOSTS = _KEPT_FIELDS.index("hosts")
