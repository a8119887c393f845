"""Campaigns: messages that say nearly the same, found among those of a day and kept track of from hour to
hour.

Belongs here: what makes two messages near-duplicates, and which group gets which name. Does not belong here:
whether a campaign is abuse (nobody knows yet), reading or writing tables (`assets.campaigns`).

A message is reduced to its **skeleton**: the canonical form with each link as one mark, without digits and
punctuation. Equal skeletons are one; of each distinct one, a MinHash signature over its character 4-grams
(rensa) estimates the Jaccard similarity to others. Candidates come from bands of the signature, are verified
on the whole of it, and connected ones form a group. In a bucket every member is compared with the first and
with the one before it, not with all, so that a flood of variants costs its length and not its square.

What is carried from hour to hour (`Grouped.fingerprints`) holds no text: signatures, counts, and salted
hashes of actors. A group that reaches something carried keeps its campaign's id and age, however it
mutates, as long as each day brings something near enough to what the day before said.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl
from numpy.typing import NDArray

from redqueen import text as reading
from redqueen.schema import polars_schema
from redqueen.text.links import spans

__all__ = [
    "FINGERPRINTS", "MESSAGES", "ROWS", "WINDOW_HOURS", "Grouped", "group", "near_duplicates", "skeleton",
]  # fmt: skip

WINDOW_HOURS = 24
"""How far back a campaign is remembered."""

SIMILAR = 0.55
"""Estimated Jaccard similarity of skeletons from which on two messages are near-duplicates: two fillings
of one template mostly are, two different remarks on one subject are not."""

MIN_MESSAGES = 4
"""Near-duplicates in a day before anybody speaks of a campaign."""

MIN_SHINGLES = 32
MIN_SHINGLES_WITH_LINK = 16
"""Shorter texts ("ok", "good morning") are everybody's: they form no campaign. A link says more than words
do."""

PERMUTATIONS, BAND = 64, 3

LONGEST, _AT_ONCE = 2_000, 2_000
"""Characters of a message that near-duplicates of all history are found by, and messages read at once."""

_SEED = 20260101
_VERSION = 1

_Schema = dict[str, pl.DataType | type[pl.DataType]]
MESSAGES: _Schema = {
    "event_id": pl.String,
    "actor_id": pl.String,
    "ts": pl.Datetime("us", "UTC"),
    "text": pl.String,
}
ROWS = polars_schema("campaigns")
FINGERPRINTS: _Schema = {
    "signature": pl.Array(pl.UInt32, PERMUTATIONS),
    "campaign_id": pl.String,
    "former_ids": pl.List(pl.String),
    "first_seen": pl.Datetime("us", "UTC"),
    "messages": pl.Int32,
    "actors": pl.List(pl.UInt32),
    "version": pl.Int32,
}


class Grouped(NamedTuple):
    """What an hour's messages belong to, and what the next hours need to know of them."""

    rows: pl.DataFrame
    """One row a message that belongs to a campaign, as `ROWS`: `size` and `actors` are the campaign's
    messages and distinct actors of the day up to now, `novel` says that no earlier hour knew the campaign."""
    fingerprints: pl.DataFrame
    """One row a distinct skeleton, as `FINGERPRINTS`."""


def group(messages: pl.DataFrame, known: pl.DataFrame | None = None, *, salt: str = "") -> Grouped:
    """The campaigns among `messages` (event_id, actor_id, ts, text), with what earlier hours left behind.

    Args:
        messages: those of one hour, or of a day at once. Without text they form nothing.
        known: `fingerprints` of the hours before, as far back as the window reaches.
        salt: what actors are hashed with.

    The same messages and the same past give the same campaigns, in whatever order they stand.
    """
    messages = messages.filter(pl.col("text").is_not_null()).unique("event_id").sort("ts", "event_id")
    skeletons, linked = _skeletons(messages["text"].to_list())
    _flat, lengths = _shingles(skeletons)
    enough = lengths >= np.where(linked, MIN_SHINGLES_WITH_LINK, MIN_SHINGLES)
    messages = messages.with_columns(skeleton=pl.Series(skeletons, dtype=pl.String)).filter(
        pl.Series(enough, dtype=pl.Boolean)
    )
    if messages.is_empty():
        return Grouped(pl.DataFrame(schema=ROWS), pl.DataFrame(schema=FINGERPRINTS))
    said = (
        messages.with_columns(actor=_hashed(messages["actor_id"], salt))
        .group_by("skeleton", maintain_order=True)
        .agg(
            pl.col("event_id"), first_seen=pl.col("ts").min(), messages=pl.len().cast(pl.Int32),
            actors=pl.col("actor").drop_nulls().unique().sort(),
        )
    )  # fmt: skip
    signatures = _signatures(said["skeleton"].to_list())
    past = _past(known)
    everything = np.concatenate((signatures, past["signature"].to_numpy().reshape(-1, PERMUTATIONS)))
    component = _components(everything, said.height, past)
    return _named(said, signatures, past, component)


def near_duplicates(canonical: Sequence[str]) -> NDArray[np.int64]:
    """Which of any number of messages say nearly the same: a number for each, equal where they do.

    By the measure of `group`, whatever the time between them, and through others: two messages are together
    if a chain of near-duplicates leads from one to the other. Messages too short to form a campaign are
    together only if their canonical forms are equal, and empty ones are not.

    Args:
        canonical: canonical forms.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    said: dict[str, int] = {}
    long: list[int] = []
    codes = np.empty(len(canonical), dtype=np.int64)
    for i, text in enumerate(canonical):
        words = skeleton(text[:LONGEST])
        shingles = len(words.encode("utf-8", "surrogatepass")) - 3
        enough = shingles >= (MIN_SHINGLES_WITH_LINK if _LINK in words else MIN_SHINGLES)
        # A short message, and an empty one, by a name that no skeleton has.
        key = words if enough else f"\n{text}" if text else f"\n\n{i}"
        if enough and key not in said:
            long.append(len(said))
        codes[i] = said.setdefault(key, len(said))
    names = list(said)
    signatures = [
        _signatures([names[j] for j in long[start : start + _AT_ONCE]])
        for start in range(0, len(long), _AT_ONCE)
    ]
    if not signatures:
        return codes
    a, b = _near_pairs(np.concatenate(signatures), len(long))
    place = np.array(long, dtype=np.int64)
    edges = (np.ones(a.size, dtype=np.int8), (place[a], place[b]))
    graph = coo_array(edges, shape=(len(names), len(names)))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)[codes]


# --- from text to signatures --------------------------------------------------------------------------------

_NOT_WORDS = re.compile(r"[\W\d_]+")
_LINK = "\x01"


def skeleton(canonical: str) -> str:
    """What a message says apart from where it leads and from numbers; links are one mark."""
    if "." not in canonical and "://" not in canonical:
        return _NOT_WORDS.sub(" ", canonical).strip()
    pieces: list[str] = []
    done = 0
    for start, end in spans(canonical):
        pieces += (_NOT_WORDS.sub(" ", canonical[done:start]).strip(), _LINK)
        done = end
    pieces.append(_NOT_WORDS.sub(" ", canonical[done:]).strip())
    return " ".join(filter(None, pieces))


def _skeletons(texts: Sequence[str]) -> tuple[list[str], NDArray[np.bool_]]:
    found = [skeleton(r.canonical) for r in reading.read_many(texts)]
    return found, np.array([_LINK in s for s in found], dtype=bool)


def _shingles(skeletons: Sequence[str]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Every four bytes of each skeleton, one after another, and how many each has."""
    encoded = [s.encode("utf-8", "surrogatepass") for s in skeletons]
    sizes = np.array([len(e) for e in encoded], dtype=np.int64)
    raw = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.uint64)
    lengths = np.maximum(sizes - 3, 0)
    if not lengths.sum():
        return np.empty(0, dtype=np.uint64), lengths
    four = raw[:-3] | raw[1:-2] << np.uint64(8) | raw[2:-1] << np.uint64(16) | raw[3:] << np.uint64(24)
    starts = np.repeat(np.cumsum(sizes) - sizes, lengths)
    within = np.arange(starts.size) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    # Multiplied apart: rensa expects hashes, not neighbours.
    return four[starts + within] * np.uint64(0x9E3779B97F4A7C15), lengths


def _signatures(skeletons: Sequence[str]) -> NDArray[np.uint32]:
    from rensa import RMinHash  # type: ignore[import-untyped]

    flat, lengths = _shingles(skeletons)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.uint64)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(flat, offsets, PERMUTATIONS, _SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(len(skeletons), PERMUTATIONS)


def _hashed(actors: pl.Series, salt: str) -> pl.Series:
    """Actors as short salted hashes: enough to count them by, too short to tell who they are."""
    codes = {
        actor: int.from_bytes(hashlib.blake2b(actor.encode(), key=salt.encode()[:64], digest_size=4).digest())
        for actor in actors.unique().drop_nulls().to_list()
    }
    return actors.replace_strict(codes, default=None, return_dtype=pl.UInt32)


def _past(known: pl.DataFrame | None) -> pl.DataFrame:
    if known is None or known.is_empty():
        return pl.DataFrame(schema=FINGERPRINTS)
    # Signatures of another version cannot be compared: their campaigns begin anew.
    return known.select(*FINGERPRINTS).filter(pl.col("version") == _VERSION)


# --- from signatures to groups ------------------------------------------------------------------------------


def _components(signatures: NDArray[np.uint32], new: int, past: pl.DataFrame) -> NDArray[np.int32]:
    """The group of each signature: near ones, and past ones that carry one campaign's name."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = _near_pairs(signatures, new)
    ids = past.select(row=pl.int_range(new, new + past.height), id="campaign_id").drop_nulls()
    former = (
        past.select(row=pl.int_range(new, new + past.height), id="former_ids")
        .explode("id", empty_as_null=True, keep_nulls=True)
        .drop_nulls()
    )
    names = pl.concat((ids, former)).with_columns(name=pl.col("id").rank("dense").cast(pl.Int64) - 1)
    total = len(signatures) + names["name"].n_unique()
    a = np.concatenate((a, names["row"].to_numpy()))
    b = np.concatenate((b, names["name"].to_numpy() + len(signatures)))
    graph = coo_array((np.ones(a.size, dtype=np.int8), (a, b)), shape=(total, total))
    return np.asarray(connected_components(graph, directed=False)[1][: len(signatures)])


def _near_pairs(signatures: NDArray[np.uint32], new: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Pairs that share a band and are similar on the whole, at least one of the first `new` in each."""
    pairs = []
    for start in range(0, PERMUTATIONS - BAND + 1, BAND):
        key = np.zeros(len(signatures), dtype=np.uint64)
        for column in range(start, start + BAND):
            key = (key ^ signatures[:, column]) * np.uint64(0x9E3779B97F4A7C15)
            key ^= key >> np.uint64(29)
        order = np.argsort(key, kind="stable")
        same = key[order[1:]] == key[order[:-1]]
        if not same.any():
            continue
        opens = np.concatenate(([True], ~same))
        first = order[np.maximum.accumulate(np.where(opens, np.arange(order.size), 0))]
        # New ones come first in the order, so the first of a bucket is new if any of it is.
        here = np.flatnonzero(same) + 1
        here = here[first[here] < new]
        pairs += [
            first[here] * len(signatures) + order[here],
            order[here - 1] * len(signatures) + order[here],
        ]
    if not pairs:
        return np.empty(0, dtype=np.intp), np.empty(0, dtype=np.intp)
    # Sorting is several times faster here than the hash table of `np.unique`.
    codes = np.sort(np.concatenate(pairs))
    codes = codes[np.concatenate(([True], codes[1:] != codes[:-1]))]
    a, b = np.divmod(codes, len(signatures))
    alike = np.concatenate(
        [
            (signatures[a[i : i + 65_536]] == signatures[b[i : i + 65_536]]).mean(axis=1)
            for i in range(0, a.size, 65_536)
        ]
    )
    near = alike >= SIMILAR
    return a[near], b[near]


# --- from groups to campaigns -------------------------------------------------------------------------------


def _named(
    said: pl.DataFrame, signatures: NDArray[np.uint32], past: pl.DataFrame, component: NDArray[np.int32]
) -> Grouped:
    """Groups that are campaigns get the id of the oldest in them, or one that follows from their first
    text."""
    carried = {"campaign_id": pl.lit(None, pl.String), "former_ids": pl.lit([], pl.List(pl.String))}
    new = said.with_columns(
        signature=pl.Series(signatures, dtype=FINGERPRINTS["signature"]),
        version=pl.lit(_VERSION, pl.Int32),
        **carried,
    )
    everything = pl.concat((new.select(*FINGERPRINTS), past)).with_columns(group=pl.Series(component))
    groups = everything.group_by("group").agg(
        size=pl.col("messages").sum(), known=pl.col("campaign_id").is_not_null().any()
    )
    here = pl.Series(component[: said.height])
    chosen = groups.filter(
        pl.col("group").is_in(here.unique().implode()) & ((pl.col("size") >= MIN_MESSAGES) | pl.col("known"))
    )
    table = _campaigns(everything.join(chosen.select("group"), on="group"))
    named = new.with_columns(group=here).drop("campaign_id", "former_ids")
    named = named.join(table, on="group", how="left", suffix="_of_campaign", maintain_order="left")
    rows = (
        named.filter(pl.col("campaign_id").is_not_null())
        .select("event_id", "campaign_id", "size", pl.col("actors_of_campaign").alias("actors"),
                pl.col("first_seen_of_campaign").alias("first_seen"), "novel")
        .explode("event_id")
        .select(pl.col(name).cast(kind) for name, kind in ROWS.items())
        .sort("event_id")
    )  # fmt: skip
    fingerprints = named.with_columns(
        pl.col("former_ids").fill_null([]), first_seen=pl.coalesce("first_seen_of_campaign", "first_seen")
    ).select(pl.col(name).cast(kind) for name, kind in FINGERPRINTS.items())
    return Grouped(rows, fingerprints)


def _campaigns(members: pl.DataFrame) -> pl.DataFrame:
    """Groups as campaigns: group, campaign_id, former_ids, size, actors, first_seen, novel."""
    found = members.group_by("group").agg(
        pl.col("campaign_id").sort_by("first_seen", "campaign_id").drop_nulls().first(),
        # Names it had, or that it swallowed: whoever is near to them belongs here too.
        pl.col("former_ids").explode(empty_as_null=True, keep_nulls=True)
        .append(pl.col("campaign_id")).drop_nulls().unique().sort(),
        size=pl.col("messages").sum(),
        actors=pl.col("actors").explode(empty_as_null=True, keep_nulls=True).drop_nulls().n_unique(),
        first_seen=pl.col("first_seen").min(),
    )  # fmt: skip
    nameless = found.filter(pl.col("campaign_id").is_null()).select("group")
    first = members.join(nameless, on="group").filter(
        pl.col("first_seen") == pl.col("first_seen").min().over("group")
    )
    own: dict[int, str] = {}
    for number, signature in zip(first["group"].to_list(), first["signature"].to_numpy(), strict=True):
        name = hashlib.blake2b(signature.tobytes(), digest_size=8).hexdigest()
        own[number] = min(name, own.get(number, name))
    names = pl.DataFrame({"group": own.keys(), "own": own.values()}, {"group": pl.Int32, "own": pl.String})
    return found.join(names, on="group", how="left").select(
        "group",
        pl.coalesce("campaign_id", "own").alias("campaign_id"),
        pl.col("former_ids").list.set_difference(pl.concat_list("campaign_id")).list.sort(),
        "size",
        "actors",
        "first_seen",
        novel=pl.col("campaign_id").is_null(),
    )
