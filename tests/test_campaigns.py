"""Claims about campaigns: near-duplicates are found however they are hidden, nothing else is, and names
last."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arena.language import SHARED, Grammar
from assets import campaigns as asset
from assets.environment import Environment
from assets.partitions import partition_of
from redqueen.attacks.families import FAMILIES
from redqueen.campaigns import FINGERPRINTS, MESSAGES, MIN_MESSAGES, ROWS, WINDOW_HOURS, group, skeleton
from redqueen.schema import CAMPAIGNS
from redqueen.tables import HOUR, read_hours, write_part

START = datetime(2026, 1, 3, 12, tzinfo=UTC)

# ruff: noqa: E501  (templates stand one a line)
# One line a campaign; what stands in brackets is chosen anew for each message.
TEMPLATES = (
    "[hey|hi|yo] claim your free [nitro|gift] before the drop ends, log in with your account at {site} [now|today|]",
    "i made {n3} in one week with this trading platform and so can you, [ask|write] my mentor {name} [today|]",
    "your account was reported for fraud and will be disabled in {n2} hours, appeal with the agent at {site} [now|]",
    "[join|enter] our new server with daily giveaways and active staff, every member gets a skin {site}",
    "we are hiring data entry assistants who work from home, {n2} per hour without experience, apply {site} [asap|]",
    "best quality replica watches and sneakers, worldwide shipping in {n2} days, order on {site} [while it lasts|]",
    "[send|deposit] any amount of coins and receive double back instantly, verified by thousands of users {site}",
    "vote for my team in the cup finals please, you only need to log in with steam here {site} [thanks|thx|]",
)
UNRELATED = (
    "does anyone still have the notes from the chemistry lecture last tuesday",
    "the dog chewed through my headphone cable again so i will be late for the raid",
    "my grandmother's recipe says two hours in the oven but mine was burnt after one",
    "we could not find parking anywhere near the stadium and missed the first half",
    "please remember to water the plants on the balcony while we are in lisbon",
    "patch notes say the shield got nerfed but honestly it feels stronger than before",
    "landlord finally fixed the heating after three weeks of wearing coats indoors",
    "if you rotate the camera while jumping you can skip the second puzzle entirely",
    "her new album sounds like someone recorded an orchestra inside a submarine",
    "i think the proof breaks down when the matrix is singular, see the last lemma",
    "train was cancelled so four strangers and i shared a taxi and became friends",
    "nobody told me the museum is closed on mondays, walked there for nothing",
)


def frame(
    texts: Sequence[str], start: datetime = START, actors: Sequence[str] | None = None, name: str = "e"
) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "event_id": [f"{name}{i}" for i in range(len(texts))],
            "actor_id": list(actors) if actors else [f"a{i}" for i in range(len(texts))],
            "ts": [start + timedelta(seconds=i) for i in range(len(texts))],
            "text": list(texts),
        },
        schema=MESSAGES,
    )


def fill(rng: random.Random, number: int) -> str:
    """One message of a campaign, on a domain of its own."""
    rules = {
        "one": [TEMPLATES[number]],
        "site": [f"{w}-{number}.xyz/{rng.randint(1, 999)}" for w in ("nova", "lumen", "brisk")],
    }
    return Grammar(rules, SHARED).say(rng, "one")


def world(seed: int, copies: int) -> tuple[pl.DataFrame, dict[str, int]]:
    """Campaigns of mutated templates among unrelated talk; which message belongs to which (-1: none)."""
    rng = random.Random(seed)
    said = [(fill(rng, n), n) for n in range(len(TEMPLATES)) for _ in range(copies)]
    said = [(rng.choice(FAMILIES).mutate(t, 0.3, rng) if rng.random() < 0.5 else t, n) for t, n in said]
    said += [(text, -1) for text in UNRELATED] + [(short, -1) for short in ("ok", "good morning", "lol") * 30]
    rng.shuffle(said)
    messages = frame([text for text, _n in said])
    return messages, dict(zip(messages["event_id"], (n for _t, n in said), strict=True))


def pairs(groups: dict[str, object]) -> set[tuple[str, str]]:
    members: dict[object, list[str]] = {}
    for event, name in groups.items():
        members.setdefault(name, []).append(event)
    return {pair for events in members.values() for pair in itertools.combinations(sorted(events), 2)}


@pytest.mark.parametrize("seed", range(3))
def test_mutated_templates_are_found_and_nothing_else_is_merged(seed: int) -> None:
    messages, truth = world(seed, 40)
    rows = group(messages).rows
    found = pairs(dict(zip(rows["event_id"], rows["campaign_id"], strict=True)))
    real = pairs({event: n for event, n in truth.items() if n >= 0})
    assert len(found & real) / len(found) == 1.0
    assert len(found & real) / len(real) > 0.9


def test_unrelated_and_everyday_messages_form_no_campaign() -> None:
    everyday = [
        "ok",
        "good morning",
        "happy birthday!!",
        "lol same",
        "see you tomorrow",
        "thank you so much",
    ] * 50
    assert group(frame([*UNRELATED, *everyday, "", " ", "?" * 400])).rows.is_empty()
    assert group(frame([])).rows.is_empty()
    silent = frame(["x"]).with_columns(text=pl.lit(None, pl.String))
    assert group(silent).rows.is_empty()


def test_a_campaign_counts_its_messages_and_its_distinct_actors() -> None:
    text = "claim your free nitro before the drop ends, log in at nova-one.xyz"
    rows = group(frame([text] * 6, actors=["a", "a", "b", "b", "b", "c"])).rows
    assert rows["campaign_id"].n_unique() == 1
    assert rows.select("size", "actors", "novel").unique().rows() == [(6, 3, True)]
    assert rows["first_seen"].unique().to_list() == [START]
    assert group(frame([text] * (MIN_MESSAGES - 1))).rows.is_empty()


def test_links_numbers_case_and_disguises_do_not_part_a_campaign() -> None:
    plain = "Claim your free nitro before the drop ends, log in at nova-one.xyz/a7 within 12 hours"
    texts = [
        plain,
        plain.upper().replace("NOVA-ONE.XYZ/A7", "lumen.gift/claim"),
        plain.replace("free", "fr\u200bee").replace("12", "3"),
        plain.replace("nitro", "n1tr0").replace("drop", "d r o p"),
        plain.replace("o", "о"),
    ]
    assert group(frame(texts)).rows["campaign_id"].n_unique() == 1
    assert skeleton("log in at nova.xyz/a7 in 12 h") == "log in at \x01 in h"


def test_a_campaign_keeps_its_name_while_it_grows_and_mutates_and_is_novel_once() -> None:
    first = "alpha bravo charlie delta echo foxtrot golf hotel india juliet kilo lima mike november"
    last = "oscar papa quebec romeo sierra tango uniform victor whiskey xray yankee zulu zero one"
    words, others = first.split(), last.split()
    carried: list[pl.DataFrame] = []
    names, novel = [], []
    for hour in range(len(words)):
        # Each hour one more word of the text is another: in the end nothing is left of the first one.
        text = " ".join(others[: hour + 1] + words[hour + 1 :])
        known = pl.concat(carried[-WINDOW_HOURS + 1 :]) if carried else None
        out = group(frame([text] * 5, START + hour * HOUR, name=f"h{hour}-"), known)
        carried.append(out.fingerprints)
        names += out.rows["campaign_id"].unique().to_list()
        novel += out.rows["novel"].unique().to_list()
        assert out.rows["first_seen"].unique().to_list() == [START]
    assert len(names) == len(words)
    assert len(set(names)) == 1
    assert novel == [True] + [False] * (len(words) - 1)


def test_a_campaign_that_drips_is_found_when_it_has_dripped_enough() -> None:
    carried: list[pl.DataFrame] = []
    sizes = []
    for hour in range(6):
        text = f"we are hiring data entry assistants who work from home, apply at site{hour}.xyz"
        known = pl.concat(carried) if carried else None
        out = group(frame([text], START + hour * HOUR, actors=[f"b{hour}"], name=f"h{hour}-"), known)
        carried.append(out.fingerprints)
        sizes.append(out.rows.select("size", "actors", "novel").rows())
    assert sizes == [[], [], [], [(4, 4, True)], [(5, 5, False)], [(6, 6, False)]]


def test_two_campaigns_that_grow_together_keep_the_older_name_from_then_on() -> None:
    one = "claim your free nitro before the drop ends and log in with your account"
    two = "vote for my team in the cup finals please you only need to sign in here"
    first = group(frame([one] * 5, name="x"))
    second = group(frame([two] * 5, START + HOUR, name="y"), first.fingerprints)
    before, after = one.split(), two.split()
    bridge = [" ".join(after[:n] + before[n:]) for n in range(len(before) + 1)]
    third = group(
        frame(bridge, START + 2 * HOUR, name="z"), pl.concat((first.fingerprints, second.fingerprints))
    )
    past = pl.concat((first.fingerprints, second.fingerprints, third.fingerprints))
    fourth = group(frame([two] * 2, START + 3 * HOUR, name="v"), past)
    assert first.rows["campaign_id"][0] != second.rows["campaign_id"][0]
    assert third.rows["campaign_id"].unique().to_list() == [first.rows["campaign_id"][0]]
    assert fourth.rows["campaign_id"].unique().to_list() == [first.rows["campaign_id"][0]]
    assert not fourth.rows["novel"].any()


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_the_order_of_the_messages_does_not_matter(seed: int, shuffler: random.Random) -> None:
    messages, _truth = world(seed, 6)
    order = list(range(messages.height))
    shuffler.shuffle(order)
    one, other = group(messages), group(messages[order])
    assert one.rows.equals(other.rows)
    assert one.fingerprints.sort("first_seen").equals(other.fingerprints.sort("first_seen"))


def test_what_is_carried_holds_no_text_and_no_actor() -> None:
    messages, _truth = world(1, 10)
    carried = group(messages, salt="s").fingerprints
    assert dict(carried.schema) == FINGERPRINTS
    kept = carried.write_json()
    assert not any(word in kept for word in ("nitro", "giveaways", "a12"))
    other = group(messages, salt="t").fingerprints
    assert carried["actors"].to_list() != other["actors"].to_list()


def test_fingerprints_are_the_same_on_every_machine() -> None:
    text = "claim your free nitro before the drop ends, log in at nova-one.xyz"
    assert group(frame([text] * 4)).rows["campaign_id"][0] == "d4f541005bf593b6"


def test_the_asset_writes_each_hour_from_what_the_day_before_left(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path))
    text = "your account was reported for fraud and will be disabled, appeal at nova-one.xyz/{}"
    for hour in (START, START + HOUR):
        texts = [text.format(i) for i in range(3)] + ["good morning"] * 3
        write_part(env.store, "ingested/events", hour, frame(texts, hour, name=f"{hour:%H}-"))
    with dg.DagsterInstance.ephemeral() as instance:
        runs = [
            dg.materialize(
                [asset.campaigns], resources={"env": env}, instance=instance,
                partition_key=partition_of(hour), selection=[asset.campaigns],
            )
            for hour in (START, START + HOUR, START + HOUR, START + 2 * HOUR)
        ]  # fmt: skip
    assert all(run.success for run in runs)
    first, second = (read_hours(env.store, "campaigns", h, h + HOUR) for h in (START, START + HOUR))
    assert first.is_empty()
    assert second["size"].to_list() == [6, 6, 6]
    assert second.to_arrow().schema.names == CAMPAIGNS.names == list(ROWS)
    metadata = runs[1].asset_materializations_for_node("campaigns")[0].metadata
    assert metadata["novel_campaigns"].value == 1
    assert "fraud" not in str(metadata)
