"""The features, each declared once: what is counted, by what key, over which window, and what it means.

Nothing here computes. Two compilers read these declarations: `redqueen.features.offline` over Parquet, and
`redqueen.features.online` event by event, in process or in Redis. Both obey the same semantics, written down
here, and share the last step (`redqueen.features.finish`), so that they agree exactly: whatever is
accumulated is an integer, and floating point begins only where both have the same integers in hand.

To add a feature: one entry in `FEATURES`.

Semantics
---------
*Moment.* `received` is `received_at`, or `ts` where that is not known; `at` is the earlier of `ts` and
`received`. Events are ordered by (`received`, `event_id`): the order in which they became known.

*Clock of a key.* Every key (an actor, a domain, ...) has a clock of its own: the latest `at` of its events so
far in that order, never moving backwards. An event is counted at the key's clock, so a straggler counts at
the time at which its key already was. Keys do not depend on one another: any shard of keys computes alone.

*Windows are sawtooth.* Time is cut into tiles of `TILE`. A window of length L and hop H, read at clock c,
holds the tiles from floor((c - L) / H) * H on: its head is exact (the event itself included), its tail moves
in hops, so it is between L and L + H long and costs a handful of tiles instead of every event.

*Late.* An event received more than `WATERMARK` after `at` gets the features of an event that is alone in the
world, and leaves no trace: a backfill of old events must not look like a burst.

*Copies.* An `event_id` seen before changes nothing and gets the row of the first, if it is received at most
`WATERMARK` after the first's `at`. Later it would be late and leave no trace anyway (unless the first was dated
in the future), so ids are remembered no longer than that. An event that left no trace is not remembered.

*Absent.* An event without a value for a key reads 0 there; without a value to count it still reads. Without
an actor it leaves no trace at all, and every feature with `needs_actor` is NaN.

*A key with several values* (the domains of a message) reads the largest.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

SECOND = 1_000_000
"""All times in this package are integers: microseconds since the epoch."""
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE

TILE = 5 * MINUTE
WATERMARK = HOUR
NEW_ACCOUNT = 24 * HOUR
"""An account younger than this is new."""
OBFUSCATED = 0.05
"""From this share of changed characters on a message counts as obfuscated."""
SNAPSHOT_LAG = 2 * HOUR
"""A graph snapshot as of midnight is read by events received from two hours later on: by then it exists."""
CLOGC_SCALE = 1 << 20
"""Tiles' c ln c are kept as integers in units of 1 / CLOGC_SCALE."""


@dataclass(frozen=True)
class Window:
    """A sawtooth window: a name for people, its length and the hop of its tail in microseconds."""

    name: str
    length: int
    hop: int


ONE_HOUR = Window("1h", HOUR, 5 * MINUTE)
SIX_HOURS = Window("6h", 6 * HOUR, 30 * MINUTE)
ONE_DAY = Window("24h", 24 * HOUR, 2 * HOUR)
WINDOWS = (ONE_HOUR, SIX_HOURS, ONE_DAY)
HORIZON = max(window.length + window.hop for window in WINDOWS)
"""What happened earlier on a key's clock changes no value."""

Key = Literal["actor", "recipient", "pair", "campaign", "repeat", "domain", "ip", "device", "community"]
KEYS: dict[Key, tuple[str, ...]] = {
    "actor": ("actor",),
    "recipient": ("recipient",),
    "pair": ("actor", "recipient"),
    "campaign": ("campaign",),
    "repeat": ("actor", "campaign"),
    "domain": ("hosts",),
    "ip": ("ip",),
    "device": ("device",),
    "community": ("community",),
}
"""The columns of a prepared event that make up each key; the key is absent where one of them is."""

Op = Literal["count", "distinct", "sum", "clogc", "gap"]
"""count: events. distinct: different values. sum: of an integer. clogc: sum over tiles of round(c ln c *
CLOGC_SCALE), c the events of a tile. gap: microseconds since the key's event before (by its clock), at most
the window's length, and the length where there was none within HORIZON."""

Flag = Literal["addressed", "dm", "friend_request", "join", "linked", "obfuscated", "new_account", "written"]


@dataclass(frozen=True)
class Aggregate:
    """One integer per event: `op` over the events of its `key` in `window` that have the flag `where`."""

    op: Op
    key: Key
    window: Window
    value: str | None = None
    where: Flag | None = None


@dataclass(frozen=True)
class Direct:
    """A number that a prepared event carries by itself."""

    column: str


@dataclass(frozen=True)
class Of:
    """An aggregate as it is, as ln(1 + x), or (a gap) as ln(1 + seconds)."""

    aggregate: Aggregate
    shape: Literal["plain", "log", "log_seconds"] = "plain"


@dataclass(frozen=True)
class Share:
    """One aggregate over another; 0 where the other is 0."""

    part: Aggregate
    whole: Aggregate


@dataclass(frozen=True)
class Entropy:
    """ln N - (sum of c ln c) / N over the tiles of a window: 0 for one burst, large for an even spread."""

    clogc: Aggregate
    count: Aggregate


@dataclass(frozen=True)
class Snapshot:
    """A number of the day's graph snapshot: of the sender, the recipient, or (the least) of the domains."""

    of: Literal["actor", "recipient", "domain"]
    column: str


Value = Direct | Of | Share | Entropy | Snapshot
Family = Literal["text", "behaviour", "graph"]
Cost = Literal["free", "window", "snapshot"]


@dataclass(frozen=True)
class Feature:
    """One declared feature.

    sentence: what it says, to a person. fake: what an attacker would have to give up to change it.
    cost: free (the event alone), window (state per key), snapshot (a look-up in the day's graph).
    needs_actor: NaN where the sender is not known.
    """

    name: str
    value: Value
    sentence: str
    fake: str
    family: Family
    needs_actor: bool = False

    @property
    def cost(self) -> Cost:
        if isinstance(self.value, Direct):
            return "free"
        return "snapshot" if isinstance(self.value, Snapshot) else "window"

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """The aggregates that its value is made of."""
        match self.value:
            case Of(aggregate):
                return (aggregate,)
            case Share(part, whole):
                return (part, whole)
            case Entropy(clogc, count):
                return (clogc, count)
        return ()


def _text(name: str, sentence: str, fake: str) -> Feature:
    return Feature(name, Direct(name), sentence, fake, "text")


def _behaviour(name: str, value: Value, sentence: str, fake: str) -> Feature:
    return Feature(name, value, sentence, fake, "behaviour", needs_actor=True)


def _graph(name: str, of: Literal["actor", "recipient", "domain"], sentence: str, fake: str) -> Feature:
    return Feature(name, Snapshot(of, name.removeprefix("graph_")), sentence, fake, "graph", needs_actor=True)


def _count(key: Key, window: Window, where: Flag | None = None) -> Aggregate:
    return Aggregate("count", key, window, where=where)


def _distinct(key: Key, value: str, window: Window, where: Flag | None = None) -> Aggregate:
    return Aggregate("distinct", key, window, value, where)


_PLAIN = "Readable, ordinary wording: what makes bait work."
_SLOW = "Speed: the same reach takes more time or more accounts."
_ACCOUNTS = "Accounts: each must be made, aged and kept alive."
_VARIETY = "One template for all: every copy must be written anew."
_REACH = "Strangers: only people who know the account can be reached."
_HOSTING = "Cheap domains: each must be bought, and burns after a few senders."
_MACHINES = "Shared machines and proxies: clean addresses and devices cost money."
_REPUTATION = "Months of ordinary, answered conversation before the first abuse."

FEATURES: tuple[Feature, ...] = (
    # --- text: follows from the message alone ---------------------------------------------------------------
    _text("text_length_log", "ln(1 + characters of the raw text).", "A fitting length; cheap to fake."),
    _text("text_obfuscation", "Share of characters that canonicalising had to change.", "Obfuscation itself."),
    _text("text_domains", "Distinct domains linked or named, cloaked ones included.", "The link."),
    _text("text_cloaked_domains", "Domains only visible after canonicalising.", "Cloaking the link."),
    _text("text_caps_share", "Share of letters that are capitals.", "Shouting; cheap to fake."),
    _text("text_digit_share", "Share of characters that are digits.", "Prices, numbers and leet."),
    _text("text_non_ascii_share", "Share of characters outside ASCII.", "Look-alikes, or the language."),
    _text("text_punctuation_share", "Share of characters that are ASCII punctuation.", "Separators in words."),
    _text("text_words_log", "ln(1 + words of the canonical text).", _PLAIN),
    _text("text_word_length", "Mean characters of a word of the canonical text.", _PLAIN),
    _text("text_word_variety", "Distinct over all words of the canonical text; 1 where none.", _PLAIN),
    _text("text_mentions", "Words of the raw text that begin with @.", "Addressing many people at once."),
    # --- behaviour: the event alone -------------------------------------------------------------------------
    Feature(
        "is_dm", Direct("is_dm"), "1 for a direct message or friend request, else 0.",
        "Private contact.", "behaviour",
    ),
    Feature(
        "community_size_log", Direct("community_size_log"), "ln(1 + members of the community).",
        "Large audiences.", "behaviour",
    ),
    _behaviour(
        "account_age_hours_log", Direct("account_age_hours_log"),
        "ln(1 + hours since the account was made).", "Throw-away accounts: each must be kept for weeks.",
    ),
    # --- behaviour: the sender ------------------------------------------------------------------------------
    _behaviour("actor_events_1h", Of(_count("actor", ONE_HOUR)), "Events of this actor, last hour.", _SLOW),
    _behaviour("actor_events_6h", Of(_count("actor", SIX_HOURS)), "Events of this actor, last 6 h.", _SLOW),
    _behaviour("actor_events_24h", Of(_count("actor", ONE_DAY)), "Events of this actor, last day.", _SLOW),
    _behaviour(
        "actor_recipients_1h", Of(_distinct("actor", "recipient", ONE_HOUR)),
        "Distinct recipients this actor wrote to in the last hour.", _SLOW,
    ),
    _behaviour(
        "actor_recipients_24h", Of(_distinct("actor", "recipient", ONE_DAY)),
        "Distinct recipients this actor wrote to in the last day.", _SLOW,
    ),
    _behaviour(
        "actor_channels_1h", Of(_distinct("actor", "channel", ONE_HOUR)),
        "Distinct channels this actor wrote in during the last hour.", _SLOW,
    ),
    _behaviour(
        "actor_communities_24h", Of(_distinct("actor", "community", ONE_DAY)),
        "Distinct communities this actor was active in, last day.", _SLOW,
    ),
    _behaviour(
        "new_recipient_share_24h",
        Share(_distinct("actor", "recipient", ONE_DAY), _count("actor", ONE_DAY, "addressed")),
        "Distinct recipients over addressed events of the actor, last day; 0 if none.",
        "Fan-out: conversations must be held with the same people.",
    ),
    _behaviour(
        "actor_dm_share_6h", Share(_count("actor", SIX_HOURS, "dm"), _count("actor", SIX_HOURS)),
        "Share of the actor's events that are direct messages, last 6 h.", "Private contact.",
    ),
    _behaviour(
        "actor_friend_requests_24h", Of(_count("actor", ONE_DAY, "friend_request")),
        "Friend requests of this actor, last day.", _REACH,
    ),
    _behaviour(
        "actor_link_share_6h", Share(_count("actor", SIX_HOURS, "linked"), _count("actor", SIX_HOURS)),
        "Share of the actor's events that name a domain, last 6 h.", "The link in every message.",
    ),
    _behaviour(
        "actor_obfuscated_share_24h",
        Share(_count("actor", ONE_DAY, "obfuscated"), _count("actor", ONE_DAY)),
        "Share of the actor's events that are obfuscated, last day.", "Obfuscation itself.",
    ),
    _behaviour(
        "actor_text_variety_24h",
        Share(_distinct("actor", "campaign", ONE_DAY), _count("actor", ONE_DAY, "written")),
        "Different texts over texts of the actor, last day; links and digits aside.", _VARIETY,
    ),
    _behaviour(
        "actor_mean_length_6h",
        Share(Aggregate("sum", "actor", SIX_HOURS, "chars"), _count("actor", SIX_HOURS)),
        "Mean characters of the actor's messages, last 6 h.", "A change of style; cheap to fake.",
    ),
    _behaviour(
        "actor_repeats_24h", Of(_count("repeat", ONE_DAY)),
        "How often this actor sent this very text (links and digits aside), last day.", _VARIETY,
    ),
    _behaviour(
        "actor_gap_log", Of(Aggregate("gap", "actor", SIX_HOURS), "log_seconds"),
        "ln(1 + seconds since this actor's previous event), at most 6 h.", _SLOW,
    ),
    _behaviour(
        "actor_burst_entropy_1h",
        Entropy(Aggregate("clogc", "actor", ONE_HOUR), _count("actor", ONE_HOUR)),
        "How evenly the actor's last hour is spread over five-minute tiles (nats); 0 for one burst.",
        "Bursts: scripts must imitate a person's rhythm.",
    ),
    # --- behaviour: whom it reaches -------------------------------------------------------------------------
    _behaviour(
        "pair_events_24h", Of(_count("pair", ONE_DAY)),
        "Events from this actor to this recipient, last day; 0 without a recipient.",
        "One message each: a conversation must be held.",
    ),
    _behaviour(
        "recipient_events_1h", Of(_count("recipient", ONE_HOUR)),
        "Events addressed to this recipient by anybody, last hour.", _SLOW,
    ),
    _behaviour(
        "recipient_actors_24h", Of(_distinct("recipient", "actor", ONE_DAY)),
        "Distinct actors who wrote to this recipient, last day.", "Attractive victims must be shared out.",
    ),
    _behaviour(
        "recipient_new_share_24h",
        Share(_count("recipient", ONE_DAY, "new_account"), _count("recipient", ONE_DAY)),
        "Share of what the recipient got that new accounts sent, last day.", _ACCOUNTS,
    ),
    # --- behaviour: the campaign ----------------------------------------------------------------------------
    _behaviour(
        "campaign_actors_1h", Of(_distinct("campaign", "actor", ONE_HOUR)),
        "Distinct actors who sent the same text (links and digits aside), last hour.", _VARIETY,
    ),
    _behaviour(
        "campaign_actors_24h", Of(_distinct("campaign", "actor", ONE_DAY)),
        "Distinct actors who sent the same text, last day.", _VARIETY,
    ),
    _behaviour(
        "campaign_recipients_6h", Of(_distinct("campaign", "recipient", SIX_HOURS)),
        "Distinct recipients of the same text, last 6 h: lockstep co-targeting.", _VARIETY,
    ),
    _behaviour(
        "campaign_communities_24h", Of(_distinct("campaign", "community", ONE_DAY)),
        "Distinct communities that saw the same text, last day.", _VARIETY,
    ),
    _behaviour(
        "campaign_new_share_24h",
        Share(_count("campaign", ONE_DAY, "new_account"), _count("campaign", ONE_DAY)),
        "Share of the copies of this text that new accounts sent, last day.", _ACCOUNTS,
    ),
    # --- behaviour: the domain ------------------------------------------------------------------------------
    _behaviour(
        "domain_actors_6h", Of(_distinct("domain", "actor", SIX_HOURS)),
        "Distinct actors who sent one of the domains (the most), last 6 h.", _HOSTING,
    ),
    _behaviour(
        "domain_events_1h", Of(_count("domain", ONE_HOUR)),
        "Events that name one of the domains (the most), last hour.", _HOSTING,
    ),
    _behaviour(
        "domain_communities_24h", Of(_distinct("domain", "community", ONE_DAY)),
        "Distinct communities where one of the domains was sent (the most), last day.", _HOSTING,
    ),
    _behaviour(
        "domain_texts_24h", Of(_distinct("domain", "campaign", ONE_DAY)),
        "Different texts around one of the domains (the most), last day.", _HOSTING,
    ),
    # --- behaviour: machines and places ---------------------------------------------------------------------
    _behaviour(
        "ip_actors_6h", Of(_distinct("ip", "actor", SIX_HOURS)),
        "Distinct actors behind this IP hash, last 6 h; 0 if not known.", _MACHINES,
    ),
    _behaviour(
        "ip_new_actors_24h", Of(_distinct("ip", "actor", ONE_DAY, "new_account")),
        "Distinct new accounts behind this IP hash, last day.", _MACHINES,
    ),
    _behaviour(
        "device_actors_24h", Of(_distinct("device", "actor", ONE_DAY)),
        "Distinct actors on this device hash, last day; 0 if not known.", _MACHINES,
    ),
    _behaviour(
        "community_joins_1h", Of(_count("community", ONE_HOUR, "join"), "log"),
        "ln(1 + joins of this community in the last hour).", "Raids: members must trickle in.",
    ),
    _behaviour(
        "community_new_share_6h",
        Share(_count("community", SIX_HOURS, "new_account"), _count("community", SIX_HOURS)),
        "Share of the community's events that new accounts made, last 6 h.", _ACCOUNTS,
    ),
    # --- graph: the day's snapshot --------------------------------------------------------------------------
    _graph("graph_reach_log", "actor", "ln(1 + distinct recipients of the sender, 30 days).", _REACH),
    _graph("graph_reciprocity", "actor", "Share of the sender's recipients who ever wrote back, smoothed.", _REPUTATION),
    _graph("graph_acceptance", "actor", "Share of the sender's answered requests that were accepted, smoothed.", _REPUTATION),
    _graph("graph_blocked", "actor", "Share of the sender's recipients who blocked it, smoothed.", _REACH),
    _graph("graph_device_accounts_log", "actor", "ln(accounts on the sender's busiest device).", _MACHINES),
    _graph("graph_ip_accounts_log", "actor", "ln(accounts behind the sender's busiest IP hash).", _MACHINES),
    _graph("graph_neighbour_reciprocity", "actor", "Mean reciprocity of those the sender writes to.", _REPUTATION),
    _graph("graph_lockstep", "actor", "Largest overlap of the sender's recipients with another sender's.", _VARIETY),
    _graph("graph_trust", "actor", "Trust that flows to the sender from long-standing, answered accounts.", _REPUTATION),
    _graph("graph_popularity_log", "recipient", "ln(1 + distinct senders to the recipient, 30 days).", _REACH),
    _graph("graph_domain_age_days_log", "domain", "ln(1 + days since the youngest domain was first seen).", _HOSTING),
    _graph("graph_domain_actors_log", "domain", "ln(1 + actors who ever sent the least known domain).", _HOSTING),
)  # fmt: skip
# ruff: noqa: E501 (a declaration a line reads best)

NAMES = tuple(feature.name for feature in FEATURES)
TEXT_FEATURES = sum(feature.family == "text" for feature in FEATURES)
"""The first so many features follow from the text alone."""

AGGREGATES = tuple(dict.fromkeys(a for feature in FEATURES for a in feature.aggregates))
"""Every aggregate that is kept, each once; the columns of a raw matrix [n, A] in this order."""

_REVISION = 3
"""Raise it when a value changes its meaning under the same declaration."""

FEATURES_VERSION = (
    f"{_REVISION}-"
    + hashlib.sha256(
        "\n".join(f"{feature.name}={feature.value}" for feature in FEATURES).encode()
    ).hexdigest()[:10]
)
"""Order, names and declarations of the columns, in one word."""
