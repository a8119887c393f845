"""Claims about the simulated platform, its attackers and its judges: lawful, secret, hard but learnable."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arena.attackers import OBFUSCATIONS, PROBE_BUDGET, RETOOLED, Strategy, obfuscate
from arena.labellers import Labellers
from arena.platform import HOUR, Hour, Platform
from redqueen.errors import InvalidInput

START = datetime(2026, 1, 1, tzinfo=UTC)
SHOCK = START + 36 * HOUR
COLUMNS = {
    *("event_id", "ts", "received_at", "actor_id", "community_id", "community_size", "channel_id"),
    *("recipient_id", "kind", "response", "response_ts", "text", "language", "account_created_at"),
    *("ip_hash", "device_hash"),
}


def platform(scenario: str = "attack", seed: int = 7, **sizes: int) -> Platform:
    return Platform(seed, START, scenario, SHOCK, **sizes)  # type: ignore[arg-type]


def abuse(hour: Hour) -> list[dict[str, Any]]:
    return [event for event in hour.events if hour.truth[event["event_id"]]]


def at(index: int) -> datetime:
    return START + index * HOUR


# --- the platform


def test_same_seed_gives_the_same_hours_in_any_order() -> None:
    forwards, backwards = platform(), platform()
    hours = [at(i) for i in (0, 1, 35, 36, 50)]
    ahead = {hour: forwards.hour(hour) for hour in hours}
    behind = {hour: backwards.hour(hour) for hour in reversed(hours)}
    assert ahead == behind
    assert forwards.hour(hours[0]) == ahead[hours[0]]
    assert platform(seed=8).hour(hours[0]) != ahead[hours[0]]


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.integers(0, 90), st.sampled_from(["attack", "quiet", "organic"]))
def test_an_hour_is_well_formed(seed: int, index: int, scenario: str) -> None:
    hour = platform(scenario, seed).hour(at(index))
    times = [event["ts"] for event in hour.events]
    assert times == sorted(times)
    assert len({event["event_id"] for event in hour.events}) == len(hour.events) == len(hour.truth)
    for event in hour.events:
        assert event.keys() == COLUMNS
        assert hour.start <= event["ts"] < event["received_at"] < hour.start + HOUR
        assert event["account_created_at"] < event["ts"]
        assert (event["response"] is None) == (event["response_ts"] is None)
        assert event["response"] is None or event["ts"] < event["response_ts"] < event["received_at"]
        assert event["kind"] in ("message", "dm", "friend_request", "join")
        assert (event["text"] != "") == (event["kind"] in ("message", "dm"))
        assert event["kind"] not in ("dm", "friend_request") or event["recipient_id"]
    assert 215 <= len(abuse(hour)) <= 300
    assert 1600 <= len(hour.events) <= 3300


def test_truth_is_nowhere_in_the_events() -> None:
    hour = platform().hour(SHOCK)
    for event in [*hour.events, *hour.rubbish]:
        assert event.keys() == COLUMNS
        for column in COLUMNS - {"text"}:
            assert not any(policy in str(event[column]) for policy in ("spam", "scam", "harass"))
    assert "truth" not in repr(hour)


def test_about_two_thirds_of_the_abuse_retools_and_nothing_before_the_shock() -> None:
    attacked, quiet = platform("attack"), platform("quiet")
    assert attacked.hour(at(35)) == quiet.hour(at(35))
    attacked.attackers.adopt(
        {
            policy: [Strategy(next(iter(pitches)), "spacing", 1.0, cloak=False, padded=False)]
            for policy, pitches in RETOOLED.items()
        }
    )
    texts = [event["text"] for index in range(36, 42) for event in abuse(attacked.hour(at(index)))]
    retooled = sum(re.search(r"(\w ){4}", text) is not None for text in texts)
    assert 0.62 <= retooled / len(texts) <= 0.71
    assert attacked.hour(at(35)) == quiet.hour(at(35))


def test_organic_novelty_leaves_the_abuse_as_it_was() -> None:
    organic, quiet = platform("organic").hour(at(40)), platform("quiet").hour(at(40))
    texts = [[(e["actor_id"], e["text"]) for e in abuse(hour)] for hour in (organic, quiet)]
    assert texts[0] == texts[1]
    honest = [event for event in organic.events if not organic.truth[event["event_id"]]]
    arrived = sum(event["community_id"] == "c90" for event in honest) / len(honest)
    assert 0.12 <= arrived <= 0.28
    assert sum("duck" in event["text"].lower() for event in honest) > 50
    assert not any(event["community_id"] == "c90" for event in quiet.events)


def test_rubbish_is_rare_and_of_every_sort() -> None:
    hours = [platform().hour(at(i)) for i in range(12)]
    rubbish = [row for hour in hours for row in hour.rubbish]
    assert 0.0004 < len(rubbish) / sum(len(hour.events) for hour in hours) < 0.002
    assert any(row["event_id"] is None for row in rubbish)
    assert any(row["text"] is None for row in rubbish)
    assert any(row["kind"] == "pigeon" for row in rubbish)
    assert any(row["ts"] > row["received_at"] + timedelta(days=1) for row in rubbish)


def test_honest_people_obfuscate_a_little_and_behave_like_abusers_sometimes() -> None:
    hour = platform().hour(at(10))
    honest = [e for e in hour.events if not hour.truth[e["event_id"]] and e["text"]]
    odd = sum(any(ord(c) > 0xFF and c.isalpha() for c in e["text"]) for e in honest)
    assert 0.001 < odd / len(honest) < 0.06
    young = [e for e in honest if e["ts"] - e["account_created_at"] < timedelta(days=7)]
    assert len(young) / len(honest) > 0.05
    aged = [e for e in abuse(hour) if e["ts"] - e["account_created_at"] > timedelta(days=60)]
    assert 0.15 < len(aged) / len(abuse(hour)) < 0.6


@pytest.mark.parametrize("wrong", [START.replace(minute=5), START.replace(tzinfo=None)])
def test_times_off_the_hour_or_without_a_zone_are_refused(wrong: datetime) -> None:
    with pytest.raises(InvalidInput, match="start_of_hour"):
        platform().hour(wrong)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(InvalidInput, match="arson"):
        Platform(1, START, "quiet", None, policies=("arson",))


# --- the attackers


def picky(events: list[dict[str, Any]]) -> list[str]:
    """A detector that knows every obfuscation but dots, and two of the pitches."""

    def action(text: str) -> str:
        known = ("consignment", "depot", "tavix", "lamp") if "." in text else text
        return "block" if any(word in text.lower() for word in known) or not text.isascii() else "allow"

    return [action(event["text"]) for event in events]


def test_attackers_choose_what_the_detector_lets_through_within_their_budget() -> None:
    sent: list[dict[str, Any]] = []

    def probe(events: list[dict[str, Any]]) -> list[str]:
        sent.extend(events)
        return picky(events)

    mine = platform()
    settled = mine.attackers.retool(probe)
    assert len(sent) <= PROBE_BUDGET
    assert all(event.keys() == COLUMNS and event["kind"] == "dm" and event["text"] for event in sent)
    assert len({event["event_id"] for event in sent}) == len(sent)
    assert mine.attackers.probe_truth.keys() == {event["event_id"] for event in sent}
    times = [event["ts"] for event in sent]
    assert times == sorted(times)
    assert times[-1] < mine.hour(SHOCK).events[0]["ts"]
    rates = [rate for many in settled.values() for rate in many]
    assert np.mean(rates) >= 0.7
    hidden = [strategy.obfuscation for many in mine.attackers.strategies.values() for strategy in many]
    assert "homoglyph" not in hidden


def test_a_restored_platform_goes_on_with_the_same_attack() -> None:
    mine, other = platform(), platform()
    mine.attackers.retool(picky)
    assert mine.hour(at(40)) != other.hour(at(40))
    other.restore(json.loads(json.dumps(mine.state())))
    assert other.state() == mine.state()
    assert other.hour(at(40)) == mine.hour(at(40))
    assert other.hour(at(35)) == mine.hour(at(35))


def test_another_platforms_state_is_refused() -> None:
    with pytest.raises(InvalidInput, match="is of the platform"):
        platform(seed=1).restore(platform(seed=2).state())


def test_a_probe_that_answers_short_is_refused() -> None:
    with pytest.raises(InvalidInput, match="one a row"):
        platform().attackers.retool(lambda events: ["allow"])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(OBFUSCATIONS), st.floats(0, 1))
def test_obfuscation_spares_links_and_changes_something(seed: int, how: str, rate: float) -> None:
    text = "scan the square code at relay-atlas.io/x7 before saturday evening"
    # Some ways draw letter by letter and may draw none, but not every time.
    times = 1 if how in ("spacing", "dots") else 40
    hidden = [obfuscate(Random(seed + i), text, how, rate) for i in range(times)]
    assert all("relay-atlas.io/x7" in one for one in hidden)
    assert any(one != text for one in hidden)


def test_every_policy_has_pitches_kept_for_the_attack() -> None:
    assert all(len(pitches) >= 3 for pitches in RETOOLED.values())


# --- the judges


@pytest.fixture(scope="module")
def day() -> tuple[list[dict[str, Any]], dict[str, str | None]]:
    hours = [platform().hour(at(i)) for i in range(12)]
    return [e for hour in hours for e in hour.events], {k: v for hour in hours for k, v in hour.truth.items()}


def test_users_report_a_quarter_of_the_abuse_and_few_others(day: Any) -> None:
    events, truth = day
    labels = Labellers(1).report(events, truth)
    right = [label for label in labels if truth[label["event_id"]]]
    assert 0.2 < len(right) / sum(policy is not None for policy in truth.values()) < 0.3
    assert 0.0005 < (len(labels) - len(right)) / len(truth) < 0.003
    confused = sum(label["policy"] != truth[label["event_id"]] for label in right) / len(right)
    assert 0.05 < confused < 0.16
    stamps = {event["event_id"]: event["ts"] for event in events}
    delays = [(label["labeled_at"] - stamps[label["event_id"]]) / HOUR for label in labels]
    assert min(delays) >= 0.2
    assert max(delays) <= 5.0


def test_labels_do_not_depend_on_the_order_of_calls(day: Any) -> None:
    events, truth = day
    judges = Labellers(1)
    whole = {label["label_id"]: label for label in judges.report(events, truth)}
    parts = [label for event in reversed(events) for label in Labellers(1).report([event], truth)]
    assert whole == {label["label_id"]: label for label in parts}
    assert all(label["received_at"] > label["labeled_at"] for label in parts)


def test_moderators_answer_every_request_and_err_seldom(day: Any) -> None:
    events, truth = day
    asked = [(event["event_id"], "audit" if i % 2 else "uncertain") for i, event in enumerate(events[:8000])]
    labels = Labellers(1).moderate(asked, truth, SHOCK)
    assert [label["event_id"] for label in labels] == [event_id for event_id, _ in asked]
    assert {label["source"] for label in labels} == {"audit", "moderator"}
    assert all(0.5 * HOUR <= label["labeled_at"] - SHOCK <= 3 * HOUR for label in labels)
    sure = [label for label in labels if label["value"] != "unsure"]
    wrong = sum((label["value"] == "abuse") != (truth[label["event_id"]] is not None) for label in sure)
    assert 0.012 < wrong / len(sure) < 0.03
    assert all((label["policy"] == "any") == (label["value"] != "abuse") for label in labels)


def test_only_the_innocent_appeal_and_only_abuse_reaches_honeypots(day: Any) -> None:
    events, truth = day
    judges = Labellers(1)
    appeals = judges.appeal([(event["event_id"], event["ts"]) for event in events], truth)
    innocent = sum(policy is None for policy in truth.values())
    assert 0.13 < len(appeals) / innocent < 0.17
    assert all(truth[label["event_id"]] is None and label["value"] == "benign" for label in appeals)
    baited = judges.honeypot(events, truth)
    assert baited
    assert all(label["policy"] == truth[label["event_id"]] for label in baited)


# --- hard enough, learnable


class Reader:
    """A linear detector over character n-grams: what any honest baseline would reach."""

    def __init__(self, texts: list[str], labels: list[bool]) -> None:
        from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
        from sklearn.linear_model import LogisticRegression

        self._count = HashingVectorizer(
            analyzer="char_wb", ngram_range=(2, 4), n_features=2**17, alternate_sign=False, binary=True
        )
        self._weigh = TfidfTransformer(sublinear_tf=True)
        known = self._weigh.fit_transform(self._count.transform(texts))
        self._model = LogisticRegression(C=20, solver="liblinear").fit(known, labels)

    def scores(self, texts: list[str]) -> np.ndarray:
        return self._model.decision_function(self._weigh.transform(self._count.transform(texts)))

    def recall(self, texts: list[str], labels: list[bool]) -> float:
        """Recall where one benign message in a hundred is flagged."""
        scores, wicked = self.scores(texts), np.array(labels)
        return float((scores[wicked] > np.quantile(scores[~wicked], 0.99)).mean())


def sample(
    mine: Platform, hours: range, of_abuse: float, of_benign: float, rng: Random
) -> tuple[list[str], list[bool]]:
    texts, labels = [], []
    for index in hours:
        hour = mine.hour(at(index))
        for event in hour.events:
            wicked = hour.truth[event["event_id"]] is not None
            if event["text"] and rng.random() < (of_abuse if wicked else of_benign):
                texts.append(event["text"])
                labels.append(wicked)
    return texts, labels


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_a_reader_learns_the_abuse_loses_it_to_the_attack_and_learns_again(seed: int) -> None:
    mine, rng = platform("attack", seed), Random(seed)
    texts, labels = sample(mine, range(30), 0.55, 0.2, rng)
    assert 4000 <= sum(labels) <= 5000
    reader = Reader(texts, labels)
    before = reader.recall(*sample(mine, range(30, 36), 1, 1, rng))
    later = sample(mine, range(39, 45), 1, 1, rng)
    hit = reader.recall(*later)
    more_texts, more_labels = sample(mine, range(36, 39), 0.35, 0.35, rng)
    again = Reader(texts + more_texts, labels + more_labels).recall(*later)
    print(f"seed {seed}: before {before:.3f}, attacked {hit:.3f}, relearnt {again:.3f}")
    assert 0.80 <= before <= 0.985
    assert hit <= before - 0.15
    assert again >= before - 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_organic_novelty_looks_like_nothing_bad_to_a_reader_who_never_saw_it(seed: int) -> None:
    quiet, organic, rng = platform("quiet", seed), platform("organic", seed), Random(seed)
    reader = Reader(*sample(quiet, range(30), 0.55, 0.2, rng))
    calm, _ = sample(quiet, range(30, 36), 0, 1, rng)
    novel, _ = sample(organic, range(36, 42), 0, 1, rng)
    threshold = np.quantile(reader.scores(calm), 0.99)
    flagged = float((reader.scores(novel) > threshold).mean())
    print(f"seed {seed}: flagged {flagged:.4f} of the novelty")
    assert flagged <= 0.016
