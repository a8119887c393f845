"""Those who judge: users who report, moderators who answer, people who appeal, and honeypots.

Belongs here: who labels what, when, and how wrongly. Judges see the simulator's truth and blur it; nothing
else of the truth gets out. Every label follows from (seed, event, source) alone, so the order of calls
changes nothing and asking twice gives the same label. Labels know their future: the driver lands each in the
hour of its `received_at`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from hashlib import blake2b
from random import Random
from typing import Any

Label = dict[str, Any]
Truth = Mapping[str, str | None]

BENIGN_POLICY = "any"  # a benign label clears a message of every policy
REPORT_SHARE, FALSE_REPORT_SHARE, CONFUSED_SHARE = 0.25, 0.0015, 0.10
MODERATOR_ERROR, UNSURE_SHARE = 0.02, 0.01
APPEAL_SHARE, HONEYPOT_SHARE = 0.15, 0.03


class Labellers:
    """The judges of one platform. `policies` are those a mistaken judge may name instead."""

    def __init__(self, seed: int, policies: Sequence[str] = ("spam", "scam", "harassment")) -> None:
        self._seed = seed
        self._policies = tuple(policies)

    def report(self, events: Iterable[Mapping[str, Any]], truth: Truth) -> list[Label]:
        """Users' reports of these events: a quarter of the abuse, a few benign; 0.2 to 5 hours late."""
        found = []
        for event in events:
            if event["kind"] not in ("message", "dm"):
                continue
            event_id, policy = event["event_id"], truth[event["event_id"]]
            rng = self._rng("report", event_id)
            if rng.random() >= (REPORT_SHARE if policy else FALSE_REPORT_SHARE):
                continue
            named = policy or rng.choice(self._policies)
            if policy and rng.random() < CONFUSED_SHARE:
                named = self._other(rng, policy)
            at = event["ts"] + timedelta(hours=min(5.0, 0.2 + rng.expovariate(1 / 1.2)))
            rater = event["recipient_id"] or f"u{rng.getrandbits(48):012x}"
            found.append(self._label(rng, event_id, named, "abuse", "report", rater, at, None))
        return found

    def moderate(self, requests: Iterable[tuple[str, str]], truth: Truth, asked_at: datetime) -> list[Label]:
        """Moderators' answers to requests `(event_id, reason)` made at `asked_at`, 0.5 to 3 hours later.

        A request whose reason is "audit" is answered with source "audit", any other with "moderator". One in
        fifty answers is wrong, one in a hundred "unsure". An event unknown to `truth` gets no answer.
        """
        found = []
        for event_id, reason in requests:
            if event_id not in truth:
                continue
            source, policy = "audit" if reason == "audit" else "moderator", truth[event_id]
            rng = self._rng("moderate", event_id)
            at = asked_at + timedelta(hours=0.5 + 2.5 * rng.random() ** 1.5)
            rater = f"mod{rng.randrange(14):02d}"
            named, value = policy or BENIGN_POLICY, "abuse" if policy else "benign"
            dice = rng.random()
            if dice < MODERATOR_ERROR:
                wrong = (BENIGN_POLICY, "benign") if policy else (rng.choice(self._policies), "abuse")
                named, value = wrong
            elif dice < MODERATOR_ERROR + UNSURE_SHARE:
                named, value = BENIGN_POLICY, "unsure"
            confidence = 0.5 if value == "unsure" else round(rng.uniform(0.75, 1.0), 3)
            found.append(self._label(rng, event_id, named, value, source, rater, at, confidence))
        return found

    def appeal(self, acted: Iterable[tuple[str, datetime]], truth: Truth) -> list[Label]:
        """Appeals against action `(event_id, acted_at)` on benign messages, 2 to 12 hours later."""
        found = []
        for event_id, acted_at in acted:
            rng = self._rng("appeal", event_id)
            if truth[event_id] is not None or rng.random() >= APPEAL_SHARE:
                continue
            at = acted_at + timedelta(hours=rng.uniform(2, 12))
            rater = f"appeals{rng.randrange(4)}"
            found.append(self._label(rng, event_id, BENIGN_POLICY, "benign", "appeal", rater, at, 0.9))
        return found

    def honeypot(self, events: Iterable[Mapping[str, Any]], truth: Truth) -> list[Label]:
        """Abusive direct messages that reached an account kept as bait: labelled, rightly, within minutes."""
        found = []
        for event in events:
            event_id, policy = event["event_id"], truth[event["event_id"]]
            rng = self._rng("honeypot", event_id)
            if policy is None or event["kind"] != "dm" or rng.random() >= HONEYPOT_SHARE:
                continue
            at = event["ts"] + timedelta(minutes=rng.uniform(1, 8))
            found.append(self._label(rng, event_id, policy, "abuse", "honeypot", "honeypot", at, 0.99))
        return found

    def _label(
        self,
        rng: Random,
        event_id: str,
        policy: str,
        value: str,
        source: str,
        rater: str,
        at: datetime,
        confidence: float | None,
    ) -> Label:
        digest = blake2b(f"{self._seed}:{source}:{event_id}:{at.isoformat()}".encode(), digest_size=10)
        return {
            "label_id": "l" + digest.hexdigest(),
            "event_id": event_id,
            "policy": policy,
            "value": value,
            "source": source,
            "rater_id": rater,
            "labeled_at": at,
            "received_at": at + timedelta(seconds=rng.uniform(2, 180)),
            "confidence": confidence,
        }

    def _other(self, rng: Random, policy: str) -> str:
        others = [other for other in self._policies if other != policy]
        return rng.choice(others) if others else policy

    def _rng(self, source: str, event_id: str) -> Random:
        return Random(f"{self._seed}:{source}:{event_id}")
