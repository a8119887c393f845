"""From messages to token ids, the same in training and in serving. No torch here.

A message is read in its canonical form, and its first token says how much canonicalising changed (the *view*
token), so that one short sequence carries both what was meant and that it was disguised. The raw characters
are not read: homoglyphs and invisible characters would cost several byte tokens each and teach nothing that
lasts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from redqueen import text

VIEW_TOKENS = ("[V0]", "[V1]", "[V2]", "[V3]")
VIEW_EDGES = (0.0, 0.04, 0.15)
"""Share of characters changed: none, a few, many, most."""

MAX_CHARACTERS = 2_000
"""A message is read up to here; beyond it a longer text only costs time."""

Ids = list[int]


@dataclass(frozen=True)
class View:
    """A message as models read it."""

    canonical: str
    level: int


def view(message: str) -> View:
    """The canonical text and how much was changed to get it (0 to 3)."""
    reading = text.read(message[:MAX_CHARACTERS])
    return View(reading.canonical, int(np.searchsorted(VIEW_EDGES, reading.obfuscation, side="left")))


@dataclass(frozen=True)
class Tokens:
    """A tokenizer and the shape of its sequences.

    `view_ids` is empty for a pretrained encoder, whose own special tokens frame the text instead.
    """

    tokenizer: Any
    max_tokens: int
    pad_id: int
    view_ids: tuple[int, ...]

    def ids(self, views: Sequence[View]) -> list[Ids]:
        """Token ids of each message, at most `max_tokens` each, never empty."""
        encodings = self.tokenizer.encode_batch_fast(
            [v.canonical for v in views], add_special_tokens=not self.view_ids
        )
        if not self.view_ids:
            return [_framed(e.ids, self.max_tokens) or [self.pad_id] for e in encodings]
        room = self.max_tokens - 1
        return [[self.view_ids[v.level], *_ends(e.ids, room)] for v, e in zip(views, encodings, strict=True)]

    def padded(self, batch: Sequence[Ids]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Ids and mask [n, longest], int64."""
        lengths = np.fromiter((len(ids) for ids in batch), np.int64, len(batch))
        mask = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        ids = np.full(mask.shape, self.pad_id, np.int64)
        ids[mask.astype(bool)] = np.concatenate([np.asarray(b, np.int64) for b in batch])
        return ids, mask


def _ends(ids: Ids, room: int) -> Ids:
    """The beginning and the end of a long message: benign words put before the abuse do not push it out."""
    if len(ids) <= room:
        return ids
    head = room * 2 // 3
    return ids[:head] + ids[head - room :]


def _framed(ids: Ids, room: int) -> Ids:
    return ids if len(ids) <= room else [*ids[: room - 1], ids[-1]]


def length_buckets(lengths: npt.NDArray[np.int64], size: int) -> Iterator[npt.NDArray[np.int64]]:
    """Rows in batches of at most `size` of similar length, so that little is padded."""
    order = np.argsort(lengths, kind="stable")
    for start in range(0, len(order), size):
        yield order[start : start + size]
