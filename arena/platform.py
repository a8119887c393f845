"""The simulated platform: communities, people, and what all of them do in an hour, abuse included.

Belongs here: who acts when, towards whom, from which account. How people talk is `arena.language`, what
abusers say and how they adapt is `arena.attackers`, who judges it is `arena.labellers`. The truth that an
`Hour` carries is for the simulator and its judges only: it never enters an event, the store, or anything the
loop reads.

An hour follows from (seed, hour) alone, so hours may be generated in any order, twice, or after a restart.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import blake2b
from itertools import accumulate
from random import Random
from typing import Any, Literal

from arena.attackers import PROBE_SPAN, SHIFT, Actor, Attackers, Campaign, Event, plain, write
from arena.language import NAMES, TOPICS, Style, foreign, topic_grammar, typed, warning
from redqueen.errors import InvalidInput

Scenario = Literal["attack", "quiet", "organic"]
HOUR = timedelta(hours=1)
PEOPLE = 4200
NEW_STYLE_SHARE = 0.675
NEWCOMERS_PER_HOUR = 7
STATE_VERSION = 1

# What a line in a channel and in a direct message is about, in shares of one.
_CHANNEL_MIX = {
    "short": 0.20, "chat": 0.14, "frame": 0.30, "own": 0.195, "foreign": 0.04, "banter": 0.032,
    "stylised": 0.032, "honest": 0.026, "selling": 0.016, "warning": 0.016, "warning_plain": 0.017,
}  # fmt: skip
_DM_MIX = {
    "dm": 0.58, "short": 0.16, "frame": 0.10, "foreign": 0.04, "banter": 0.03, "stylised": 0.016,
    "honest": 0.025, "selling": 0.025, "warning": 0.015, "warning_plain": 0.015,
}  # fmt: skip
_HOLIDAY_SHARE, _MEME_SHARE, _NEW_COMMUNITY_SHARE = 0.10, 0.06, 0.20


@dataclass(frozen=True)
class Hour:
    """One hour of the platform.

    `events`: rows of the events table, sorted by `ts`; `ts` and `received_at` lie inside the hour.
    `truth`: for each event_id the policy it violates, or None. Never to leave the simulator.
    `rubbish`: rows that arrive among the others and must be refused (about one in a thousand).
    """

    start: datetime
    events: list[Event]
    truth: dict[str, str | None] = field(repr=False)
    rubbish: list[Event]


@dataclass(frozen=True)
class Community:
    """A place where people talk about one topic. `weight` is its share of the talk."""

    community_id: str
    topic: str
    size: int
    weight: float
    channels: tuple[str, ...]


@dataclass(frozen=True)
class Person:
    """Somebody honest: an account, a name, and how much they talk."""

    account: Actor
    name: str
    weight: float


@dataclass
class _Draft:
    """An event before it has an id."""

    at: float
    actor: Actor
    community: Community
    kind: str
    text: str
    channel: str
    recipient: str | None = None
    language: str | None = "en"
    policy: str | None = None


class _Crowd:
    """People of one community, to be drawn by how much they talk."""

    def __init__(self, people: Sequence[Person]) -> None:
        self.people = people
        self._bounds = list(accumulate(person.weight for person in people))

    def draw(self, rng: Random) -> Person:
        return self.people[bisect(self._bounds, rng.random() * self._bounds[-1], hi=len(self.people) - 1)]


class Platform:
    """The platform of one seed and scenario; `start` is the hour all ages and campaigns are counted from.

    `start` and `shock_at` are UTC, on the hour. `shock_at` is when the attack, or the harmless novelty of
    `organic`, begins; it is ignored in `quiet`. Raises `InvalidInput` for times off the hour and for unknown
    policies.
    """

    def __init__(
        self,
        seed: int,
        start: datetime,
        scenario: Scenario,
        shock_at: datetime | None,
        benign_per_hour: int = 2200,
        abusive_per_hour: int = 260,
        policies: Sequence[str] = ("spam", "scam", "harassment"),
    ) -> None:
        for name, moment in (("start", start), ("shock_at", shock_at)):
            if moment is not None:
                _require_hour(name, moment)
        self.seed, self.start, self.scenario = seed, start, scenario
        self.shock_at = None if scenario == "quiet" else shock_at
        self.policies = tuple(policies)
        self._benign, self._abusive = benign_per_hour, abusive_per_hour
        self.attackers = Attackers(seed, start, self.shock_at, self.policies)
        self._settle()

    # --- the public face

    def hour(self, start_of_hour: datetime) -> Hour:
        """Everything that happens in the hour that starts then (UTC, on the hour)."""
        _require_hour("start_of_hour", start_of_hour)
        index = (start_of_hour - self.start) // HOUR
        drafts = self._benign_hour(start_of_hour, index) + self._abusive_hour(start_of_hour, index)
        if self.attacked(start_of_hour) and start_of_hour == self.shock_at:
            quiet = PROBE_SPAN.total_seconds()
            for draft in drafts:  # the attackers' probes come first, so that events stay in the order of time
                draft.at = quiet + draft.at * (1 - quiet / 3600)
        drafts.sort(key=lambda draft: draft.at)
        rng = self._rng(index, "rows")
        events: list[Event] = []
        truth: dict[str, str | None] = {}
        for number, draft in enumerate(drafts):
            event_id = self._event_id(index, number)
            events.append(_row(rng, draft, event_id, start_of_hour))
            truth[event_id] = draft.policy
        return Hour(start_of_hour, events, truth, self._rubbish(index, events))

    def state(self) -> dict[str, Any]:
        """What a killed demo needs beside the constructor's arguments, JSON-able: the attackers' choices."""
        return {"version": STATE_VERSION, "identity": self._identity(), "attackers": self.attackers.state()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over what `state` returned. Raises `InvalidInput` if it is of another platform."""
        if state.get("version") != STATE_VERSION or state.get("identity") != self._identity():
            raise InvalidInput(
                f"this state is of the platform {state.get('identity')}, version {state.get('version')}, "
                f"not to {self._identity()}, version {STATE_VERSION}: build the platform with the "
                "same arguments, or start anew"
            )
        self.attackers.restore(state["attackers"])

    def attacked(self, hour: datetime) -> bool:
        """Whether the new style of abuse is abroad in the hour that starts then."""
        return self.scenario == "attack" and self.shock_at is not None and hour >= self.shock_at

    # --- settling the platform: who is there

    def _settle(self) -> None:
        rng = Random(f"{self.seed}:settle")
        topics = list(TOPICS) + rng.sample(list(TOPICS), 9)
        rng.shuffle(topics)
        self.communities = [self._community(rng, f"c{i:02d}", topic) for i, topic in enumerate(topics)]
        self.people = [self._person(rng) for _ in range(PEOPLE)]
        members: list[list[Person]] = [[] for _ in self.communities]
        weights = [community.size for community in self.communities]
        for person in self.people:
            for at in set(rng.choices(range(len(weights)), weights, k=rng.choice((1, 1, 2, 2, 3, 5)))):
                members[at].append(person)
        self._crowds = {
            community.community_id: _Crowd(crowd or self.people[:20])
            for community, crowd in zip(self.communities, members, strict=True)
        }
        self._everyone = _Crowd(self.people)
        self._community_bounds = list(accumulate(community.weight for community in self.communities))
        self._greeters = rng.sample(self.people, 6)
        self._arriving = self._community(rng, "c90", "new")
        self._crowds["c90"] = _Crowd([self._person(rng) for _ in range(600)])

    def _community(self, rng: Random, community_id: str, topic: str) -> Community:
        size = int(min(9000, 120 + rng.lognormvariate(6.3, 1.0)))
        names = ["general", "off-topic", "help", "media", "events", "lounge"][: rng.randint(2, 6)]
        channels = tuple(f"{community_id}-{name}" for name in names)
        return Community(community_id, topic, size, math.sqrt(size) * rng.uniform(0.6, 1.4), channels)

    def _person(self, rng: Random) -> Person:
        young = rng.random() < 0.15
        days = rng.expovariate(1 / 12) if young else min(2600.0, 20 + rng.lognormvariate(5.6, 1.1))
        account = self._account(rng, self.start - timedelta(days=0.2 + days))
        return Person(account, rng.choice(NAMES), min(40.0, rng.paretovariate(1.1)))

    def _account(self, rng: Random, created: datetime) -> Actor:
        actor, ip, device = (f"{rng.getrandbits(48):012x}" for _ in range(3))
        return Actor(f"u{actor}", created, f"ip{ip}", f"dv{device}", Style(rng))

    def _newcomers(self, index: int) -> list[tuple[Person, Community]]:
        """Those who joined the platform in that hour, and where."""
        rng = self._rng(index, "newcomers")
        found = []
        for _ in range(NEWCOMERS_PER_HOUR):
            created = self.start + index * HOUR - timedelta(hours=rng.expovariate(1 / 20))
            person = Person(self._account(rng, created), rng.choice(NAMES), 1.0)
            found.append((person, self._place(rng)))
        return found

    # --- the honest hour

    def _benign_hour(self, hour: datetime, index: int) -> list[_Draft]:
        rng = self._rng(index, "benign")
        novel = self.scenario == "organic" and self.shock_at is not None and hour >= self.shock_at
        swing = 1 + 0.2 * math.sin(2 * math.pi * (hour.hour - 13) / 24) + rng.uniform(-0.02, 0.02)
        total = self._benign * swing * (1.12 if novel else 1.0)
        baits = [c for many in self.attackers.alive(hour, retooled=False).values() for c in many]
        if self.attacked(hour):
            baits += [c for many in self.attackers.alive(hour, retooled=True).values() for c in many]
        talk = _Talk(self, rng, [c for c in baits if c.policy != "harassment"], novel)
        drafts = self._arrivals(rng, index, talk)
        drafts += self._greetings(rng, index) + self._announcements(rng)
        while len(drafts) < total * 0.82:
            drafts += self._conversation(rng, talk)
        while len(drafts) < total * 0.985:
            drafts += self._dialogue(rng, talk)
        while len(drafts) < total:
            drafts.append(self._friend_request(rng))
        return drafts[: round(total)]

    def _conversation(self, rng: Random, talk: _Talk) -> list[_Draft]:
        """A few people in a channel for a few minutes."""
        arriving = talk.novel and rng.random() < _NEW_COMMUNITY_SHARE / 0.8
        community = self._arriving if arriving else self._place(rng)
        crowd = self._crowds[community.community_id]
        present = [crowd.draw(rng) for _ in range(rng.choice((1, 2, 2, 3, 4, 6)))]
        channel = rng.choice(community.channels)
        at, pace = rng.random() * 3500, rng.choice((12, 30, 60, 150))
        drafts = []
        for _ in range(1 + int(rng.expovariate(1 / 5))):
            if at >= 3590:
                break
            speaker = rng.choice(present)
            text, language = talk.line(community.topic, _CHANNEL_BOUNDS, speaker.account.style)
            listener = rng.choice(present) if rng.random() < 0.25 else None
            recipient = listener.account.actor_id if listener and listener is not speaker else None
            drafts.append(
                _Draft(at, speaker.account, community, "message", text, channel, recipient, language)
            )
            at += rng.expovariate(1 / pace)
        return drafts

    def _dialogue(self, rng: Random, talk: _Talk) -> list[_Draft]:
        """Two people in private."""
        community = self._place(rng)
        crowd = self._crowds[community.community_id]
        pair = [crowd.draw(rng), crowd.draw(rng)]
        if pair[0] is pair[1]:
            return []
        channel = _dm_channel(pair[0].account.actor_id, pair[1].account.actor_id)
        at, drafts = rng.random() * 3500, []
        for _ in range(1 + int(rng.expovariate(1 / 3))):
            if at >= 3590:
                break
            text, language = talk.line(community.topic, _DM_BOUNDS, pair[0].account.style)
            to = pair[1].account.actor_id
            drafts.append(_Draft(at, pair[0].account, community, "dm", text, channel, to, language))
            at += rng.expovariate(1 / 45)
            if rng.random() < 0.7:
                pair.reverse()
        return drafts

    def _arrivals(self, rng: Random, index: int, talk: _Talk) -> list[_Draft]:
        """Joins of this hour, and the first words of those who joined in the last day and a half."""
        drafts = []
        joins = [(person, community, 1200) for person, community in self._newcomers(index)]
        joins += [(self._everyone.draw(rng), self._place(rng), 3580) for _ in range(9)]
        for person, community, until in joins:
            at, hall = rng.random() * until, community.channels[0]
            drafts.append(_Draft(at, person.account, community, "join", "", hall, language=None))
        for age in range(36):
            for person, community in self._newcomers(index - age):
                if rng.random() < 0.22:
                    drafts += self._first_words(rng, person, community, talk)
        return drafts

    def _first_words(self, rng: Random, person: Person, community: Community, talk: _Talk) -> list[_Draft]:
        at, drafts = 1200 + rng.random() * 1500, []
        for _ in range(rng.randint(1, 5)):
            text, language = talk.line(community.topic, _CHANNEL_BOUNDS, person.account.style)
            channel = rng.choice(community.channels)
            drafts.append(_Draft(at, person.account, community, "message", text, channel, None, language))
            at += rng.random() * 150
        return drafts

    def _greetings(self, rng: Random, index: int) -> list[_Draft]:
        """Moderators who write to newcomers: an honest fan-out of near-duplicates to strangers."""
        grammar = topic_grammar("gaming")
        drafts = []
        for greeter in self._greeters:
            at = rng.random() * 3000
            for person, community in self._newcomers(index - rng.randint(1, 3)):
                if rng.random() < 0.55:
                    text = typed(rng, grammar.say(rng, "welcome"), greeter.account.style)
                    to = person.account.actor_id
                    channel = _dm_channel(greeter.account.actor_id, to)
                    drafts.append(_Draft(at, greeter.account, community, "dm", text, channel, to))
                    at += rng.random() * 60
        return drafts

    def _announcements(self, rng: Random) -> list[_Draft]:
        """Organisers who post the same lines in several channels, within minutes."""
        drafts = []
        for _ in range(rng.randint(1, 3)):
            person = self._everyone.draw(rng)
            community = self._place(rng)
            text = topic_grammar(community.topic).say(rng, "announce")
            at = rng.random() * 3300
            for channel in community.channels:
                drafts.append(_Draft(at, person.account, community, "message", text, channel))
                at += rng.random() * 40
        return drafts

    def _friend_request(self, rng: Random) -> _Draft:
        community = self._place(rng)
        crowd = self._crowds[community.community_id]
        sender, to = crowd.draw(rng), crowd.draw(rng).account.actor_id
        at = rng.random() * 3580
        channel = _dm_channel(sender.account.actor_id, to)
        return _Draft(at, sender.account, community, "friend_request", "", channel, to, None)

    # --- the abusive hour

    def _abusive_hour(self, hour: datetime, index: int) -> list[_Draft]:
        rng = self._rng(index, "abusive")
        total = round(self._abusive * rng.uniform(0.9, 1.1))
        share = NEW_STYLE_SHARE + rng.uniform(-0.02, 0.02) if self.attacked(hour) else 0.0
        drafts: list[_Draft] = []
        for retooled, amount in ((True, round(total * share)), (False, total - round(total * share))):
            if amount:
                campaigns = self._campaigns(hour, retooled)
                for campaign, volume in zip(campaigns, _deal(rng, amount, campaigns), strict=True):
                    drafts += self._work(rng, campaign, hour, volume)
        return drafts

    def _campaigns(self, hour: datetime, retooled: bool) -> list[Campaign]:
        return [c for many in self.attackers.alive(hour, retooled).values() for c in many]

    def _work(self, rng: Random, campaign: Campaign, hour: datetime, volume: int) -> list[_Draft]:
        """An hour of a campaign: its accounts each send a few messages, throttled once they have retooled."""
        shift = max(0, (hour - campaign.born) // SHIFT)
        victims = self._victims(campaign)
        most, pause = (3, 700) if campaign.retooled else (6, 180)
        drafts: list[_Draft] = []
        numbers = list(range(40))
        rng.shuffle(numbers)
        while len(drafts) < volume:
            account = self._worker(campaign, shift, numbers.pop())
            at = rng.random() * 3400
            for _ in range(min(volume - len(drafts), rng.randint(1, most))):
                drafts.append(self._abuse(rng, campaign, account, victims, at % 3590))
                at += rng.expovariate(1 / pause)
        return drafts

    def _worker(self, campaign: Campaign, shift: int, number: int) -> Actor:
        """An account of the campaign: mostly made for it, sometimes taken over from somebody honest."""
        lots = Random(f"{campaign.key}:worker:{shift}:{number}")
        if lots.random() < (0.2 if campaign.retooled else 0.08):
            return self._everyone.draw(lots).account
        return self.attackers.actor(campaign, shift, number)

    def _victims(self, campaign: Campaign) -> list[Person]:
        """A harasser's few; everybody, for those who want money."""
        if campaign.policy != "harassment":
            return self.people
        return Random(f"{campaign.key}:victims").sample(self.people, 6)

    def _abuse(
        self, rng: Random, campaign: Campaign, account: Actor, victims: Sequence[Person], at: float
    ) -> _Draft:
        private = rng.random() < {"scam": 0.85, "spam": 0.12}.get(campaign.policy, 0.55)
        victim = rng.choice(victims)
        community = self._place(rng)
        text = write(rng, campaign, account.style, victim.name)
        to = victim.account.actor_id if private or campaign.policy == "harassment" else None
        channel = _dm_channel(account.actor_id, str(to)) if private else rng.choice(community.channels)
        kind = "dm" if private else "message"
        return _Draft(at, account, community, kind, text, channel, to, policy=campaign.policy)

    # --- small things

    def _place(self, rng: Random) -> Community:
        bounds = self._community_bounds
        return self.communities[bisect(bounds, rng.random() * bounds[-1], hi=len(bounds) - 1)]

    def _rng(self, index: int, purpose: str) -> Random:
        return Random(f"{self.seed}:{index}:{purpose}")

    def _event_id(self, index: int, number: int) -> str:
        return "e" + blake2b(f"{self.seed}:{index}:{number}".encode(), digest_size=10).hexdigest()

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self.seed,
            "start": self.start.isoformat(),
            "scenario": self.scenario,
            "shock_at": self.shock_at.isoformat() if self.shock_at else None,
            "benign_per_hour": self._benign,
            "abusive_per_hour": self._abusive,
            "policies": list(self.policies),
        }

    def _rubbish(self, index: int, events: Sequence[Event]) -> list[Event]:
        rng = self._rng(index, "rubbish")
        expected = len(events) * 0.001
        found = []
        for number in range(int(expected) + (rng.random() < expected % 1)):
            row = dict(rng.choice(events))
            row["event_id"] = self._event_id(index, -1 - number)
            row |= rng.choice(
                (
                    {"event_id": None},
                    {"ts": row["ts"] + timedelta(days=400)},
                    {"kind": "message", "text": None},
                    {"kind": "pigeon"},
                )
            )
            found.append(row)
        return found


class _Talk:
    """Draws benign lines for one hour."""

    def __init__(self, platform: Platform, rng: Random, baits: Sequence[Campaign], novel: bool) -> None:
        self._rng = rng
        self._baits = baits
        self.novel = novel

    def line(self, topic: str, mix: tuple[list[str], list[float]], style: Style) -> tuple[str, str | None]:
        """A line about `topic` and its language, typed in `style`; the language is not always known."""
        rng = self._rng
        rules, bounds = mix
        rule = rules[min(bisect(bounds, rng.random()), len(rules) - 1)]
        language: str | None = "en"
        dice = rng.random() if self.novel else 1.0
        if dice < _HOLIDAY_SHARE:
            rule = "holiday"
        elif dice < _HOLIDAY_SHARE + _MEME_SHARE:
            rule = "meme"
        if rule == "foreign":
            text, language = foreign(rng)
        elif rule == "warning" and self._baits:
            text = warning(rng, plain(rng, rng.choice(self._baits), rng.choice(NAMES)))
        else:
            text = topic_grammar(topic).say(rng, "warning_plain" if rule == "warning" else rule)
        return typed(rng, text, style), language if rng.random() > 0.04 else None


def _bounds(mix: Mapping[str, float]) -> tuple[list[str], list[float]]:
    total = sum(mix.values())
    return list(mix), [bound / total for bound in accumulate(mix.values())]


_CHANNEL_BOUNDS, _DM_BOUNDS = _bounds(_CHANNEL_MIX), _bounds(_DM_MIX)
_POLICY_SHARE = {"spam": 0.38, "scam": 0.36, "harassment": 0.26}


def _deal(rng: Random, amount: int, campaigns: Sequence[Campaign]) -> list[int]:
    """Share `amount` messages among campaigns: by policy first, then by how busy each is this hour."""
    rivals = Counter(campaign.policy for campaign in campaigns)
    weights = [_POLICY_SHARE[c.policy] / rivals[c.policy] * rng.uniform(0.6, 1.4) for c in campaigns]
    scale = amount / sum(weights)
    edges = [round(edge * scale) for edge in accumulate(weights)]
    return [after - before for before, after in zip([0, *edges], edges, strict=False)]


def _dm_channel(one: str, other: str) -> str:
    low, high = sorted((one, other))
    return f"dm-{low[1:7]}{high[1:7]}"


_ANSWERS = {
    ("dm", False): (("reply", 0.16), ("block", 0.003)),
    ("dm", True): (("reply", 0.05), ("block", 0.03)),
    ("friend_request", False): (("accept", 0.4), ("decline", 0.1)),
}


def _answer(rng: Random, draft: _Draft) -> str | None:
    """How the recipient reacted within seconds; later reactions are not known when the row arrives."""
    dice = rng.random()
    for answer, share in _ANSWERS.get((draft.kind, draft.policy is not None), ()):
        if dice < share:
            return answer
        dice -= share
    return None


def _row(rng: Random, draft: _Draft, event_id: str, hour: datetime) -> Event:
    answer = _answer(rng, draft) if draft.at < 3500 else None
    ts = hour + timedelta(microseconds=int(draft.at * 1_000_000))
    answered = ts + timedelta(seconds=3 + rng.random() * 50) if answer else None
    arrived = (answered or ts) + timedelta(seconds=0.4 + rng.random() * 6)
    return {
        "event_id": event_id,
        "ts": ts,
        "received_at": arrived,
        "actor_id": draft.actor.actor_id,
        "community_id": draft.community.community_id,
        "community_size": draft.community.size,
        "channel_id": draft.channel,
        "recipient_id": draft.recipient,
        "kind": draft.kind,
        "response": answer,
        "response_ts": answered,
        "text": draft.text,
        "language": draft.language,
        "account_created_at": draft.actor.created,
        "ip_hash": draft.actor.ip_hash,
        "device_hash": draft.actor.device_hash,
    }


def _require_hour(name: str, moment: datetime) -> None:
    if moment.utcoffset() != timedelta(0):
        raise InvalidInput(f"{name} is {moment!r}: give an instant in UTC, with its zone")
    if moment.minute or moment.second or moment.microsecond:
        raise InvalidInput(f"{name} is {moment.isoformat()}: give the start of an hour")
