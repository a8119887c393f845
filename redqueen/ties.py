"""Who reached whom, from which machine, with which domain: what the graph snapshot is computed from.

Belongs here: from the events of a stretch of time to four small tables, merging them, and cutting them off at
an instant. What the numbers are is `redqueen.graphmath`; where the tables are kept is `redqueen.graph`.

Every row says from when on it was known. Merging takes the earliest, so it may be done in any order, twice,
or day by day, and gives the tables of all events at once. An answer is known once its event was received and
the answer was given, whichever came later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import polars as pl

from redqueen import text as reading

TIME = pl.Datetime("us", "UTC")
ANSWERS = {"reply": "replied_at", "accept": "accepted_at", "decline": "declined_at", "block": "blocked_at"}

EDGES: dict[str, pl.DataType] = {
    "actor_id": pl.String(), "recipient_id": pl.String(), "known_at": TIME,
    **dict.fromkeys(ANSWERS.values(), TIME),
}  # fmt: skip
MACHINES: dict[str, pl.DataType] = {
    "kind": pl.String(), "machine": pl.String(), "actor_id": pl.String(), "known_at": TIME,
}  # fmt: skip
DOMAINS: dict[str, pl.DataType] = {"host": pl.String(), "actor_id": pl.String(), "known_at": TIME}
ACCOUNTS: dict[str, pl.DataType] = {"actor_id": pl.String(), "known_at": TIME, "created_at": TIME}
KEYS = {
    "edges": ("actor_id", "recipient_id"),
    "machines": ("kind", "machine", "actor_id"),
    "domains": ("host", "actor_id"),
    "accounts": ("actor_id",),
}
"""What tells the rows of each table apart."""

READS = (
    "event_id", "received_at", "actor_id", "recipient_id", "response", "response_ts", "account_created_at",
    "ip_hash", "device_hash",
)  # fmt: skip
"""The columns of events that are read, besides the text where the domains are not known yet."""


@dataclass(frozen=True)
class Ties:
    """What a stretch of events says, each row once, with the instant from which on it was known.

    edges: sender and recipient, and when each kind of answer was known (null: never).
    machines: kind (device, ip), its hash, and an account that used it.
    domains: host and an account that sent it.
    accounts: senders, and when the account was made.
    """

    edges: pl.DataFrame
    machines: pl.DataFrame
    domains: pl.DataFrame
    accounts: pl.DataFrame


def hosts_of(events: pl.DataFrame, prepared: pl.DataFrame | None = None) -> pl.Series:
    """The domains of each event's text (lists of strings), in the order of `events`.

    prepared: `event_id` and `hosts` of events that were read before; the others' texts are read here.
    """
    kind = pl.List(pl.String)
    hosts = pl.Series("hosts", [None] * events.height, kind)
    if prepared is not None and prepared.height:
        before = prepared.select("event_id", pl.col("hosts").cast(kind)).unique("event_id", keep="first")
        hosts = events.select("event_id").join(before, on="event_id", how="left", maintain_order="left")[
            "hosts"
        ]
    unread = hosts.is_null()
    if "text" not in events.columns or not unread.any():
        return hosts
    texts = events["text"].filter(unread & events["text"].is_not_null()).unique()
    read = {raw: reading.hosts(reading.read(raw).canonical) for raw in texts}
    found = pl.Series("hosts", [read.get(raw) for raw in events["text"]], kind)
    return hosts.zip_with(~unread, found)


def ties(events: pl.DataFrame, hosts: pl.Series) -> Ties:
    """The ties that `events` (the columns `READS`) show; `hosts` as `hosts_of` gives them."""
    rows = events.select(READS).with_columns(known_at=pl.col("received_at"), hosts=hosts)
    rows = rows.filter(pl.col("actor_id").is_not_null() & pl.col("known_at").is_not_null())
    answered = pl.max_horizontal("known_at", "response_ts")
    to_others = pl.col("recipient_id").is_not_null() & (pl.col("recipient_id") != pl.col("actor_id"))
    edges = rows.filter(to_others).select(
        "actor_id",
        "recipient_id",
        "known_at",
        *(pl.when(pl.col("response") == answer).then(answered).alias(at) for answer, at in ANSWERS.items()),
    )
    machines = pl.concat(
        rows.filter(pl.col(f"{kind}_hash").is_not_null()).select(
            pl.lit(kind).alias("kind"), pl.col(f"{kind}_hash").alias("machine"), "actor_id", "known_at"
        )
        for kind in ("device", "ip")
    )
    domains = (
        rows.filter(pl.col("hosts").list.len() > 0)
        .select(pl.col("hosts").alias("host"), "actor_id", "known_at")
        .explode("host")
    )
    accounts = rows.select("actor_id", "known_at", created_at="account_created_at")
    return merge([Ties(edges, machines, domains, accounts)])


def merge(parts: Sequence[Ties]) -> Ties:
    """The ties of several stretches as those of one: each row once, its earliest instants; in any order."""
    accounts = _stack([part.accounts for part in parts], ACCOUNTS).group_by("actor_id")
    first = pl.col("created_at").filter(pl.col("known_at") == pl.col("known_at").min())
    return Ties(
        _earliest([part.edges for part in parts], EDGES, KEYS["edges"]),
        _earliest([part.machines for part in parts], MACHINES, KEYS["machines"]),
        _earliest([part.domains for part in parts], DOMAINS, KEYS["domains"]),
        # When an account was made is as its first row says, and known no later than that row.
        accounts.agg(pl.col("known_at").min(), first.min()).select(*ACCOUNTS),
    )


def _stack(frames: Sequence[pl.DataFrame], schema: dict[str, pl.DataType]) -> pl.DataFrame:
    typed = [frame.select(pl.col(name).cast(kind) for name, kind in schema.items()) for frame in frames]
    return pl.concat([pl.DataFrame(schema=schema), *typed])


def _earliest(
    frames: Sequence[pl.DataFrame], schema: dict[str, pl.DataType], key: tuple[str, ...]
) -> pl.DataFrame:
    return _stack(frames, schema).group_by(key).agg(pl.exclude(key).min()).select(*schema)


def known_before(found: Ties, as_of: datetime) -> Ties:
    """What of the ties was known before `as_of`: later rows are left out, later answers are null."""
    instant = pl.lit(as_of).cast(TIME)
    early = pl.col("known_at") < instant
    return Ties(
        found.edges.filter(early).with_columns(
            pl.when(pl.col(at) < instant).then(at).alias(at) for at in ANSWERS.values()
        ),
        found.machines.filter(early),
        found.domains.filter(early),
        found.accounts.filter(early),
    )


def latest(found: Ties) -> tuple[datetime | None, datetime | None]:
    """The latest instants in the ties: at which a row was known, and at which an answer was."""
    frames = (found.edges, found.machines, found.domains, found.accounts)
    known = [_latest(frame["known_at"]) for frame in frames]
    answers = [_latest(found.edges[at]) for at in ANSWERS.values()]
    return _last(known), _last(answers)


def _latest(column: pl.Series) -> datetime | None:
    value = column.max()
    return value if isinstance(value, datetime) else None


def _last(instants: Sequence[datetime | None]) -> datetime | None:
    return max((instant for instant in instants if instant is not None), default=None)
