"""Claims about the windows in Redis: the same numbers as anywhere else, whoever asks, whatever breaks."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import timedelta
from random import Random
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redqueen.errors import InvalidInput, ServiceUnavailable
from redqueen.features import InProcess, Prepared, compute, prepare, prepare_frame
from redqueen.features import onredis as on_redis
from redqueen.features.finish import clogc_table
from redqueen.features.offline import aggregate
from redqueen.features.onredis import FEW, SCRIPT_SHA, RedisEngine, connect
from tests.feature_oracle import Oracle
from tests.services import RedisServer, absent
from tests.test_features_laws import STREAMS, T0, demand_equal, finished, first_of_each, frame

URL = "redis://127.0.0.1:6379/0"


@pytest.fixture(scope="module")
def client() -> redis.Redis:
    try:
        opened = connect(URL)()
        opened.ping()
    except redis.exceptions.RedisError:
        absent(f"no Redis at {URL}")
    return opened


@pytest.fixture
def prefix(client: redis.Redis) -> Iterator[str]:
    made = f"test-{uuid.uuid4().hex[:10]}"
    yield made
    _sweep(client, made)


def _sweep(client: redis.Redis, prefix: str) -> None:
    keys = list(client.scan_iter(match=f"{prefix}*", count=1000))
    for start in range(0, len(keys), 1000):
        client.delete(*keys[start : start + 1000])


def happening(number: int, seconds: float = 0, **columns: Any) -> Prepared:
    return prepare(
        {
            "event_id": f"e{number}", "ts": T0 + timedelta(seconds=seconds), "actor_id": "ann",
            "community_id": "c", "channel_id": "h", "kind": "message", **columns,
        }
    )  # fmt: skip


# -- the same numbers ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(STREAMS, st.data())
def test_redis_says_what_brute_force_says_whatever_the_batches_replicas_and_restarts(
    client: redis.Redis, events: list[dict[str, Any]], data: st.DataObject
) -> None:
    rows = [prepare(event) for event in events]
    oracle = Oracle()
    expected = np.array([oracle.observe(row) for row in rows], dtype=np.int64)
    prefix = f"test-{uuid.uuid4().hex[:10]}"
    replicas = [RedisEngine(client, prefix), RedisEngine(connect(URL), prefix)]
    found, start = [], 0
    try:
        while start < len(rows):
            size = data.draw(st.sampled_from([1, 1, 3, 100]))
            what = data.draw(st.sampled_from(["nothing", "restart", "flush", "cut"]))
            if what == "restart":
                replicas[0] = RedisEngine(client, prefix)
            elif what == "flush":
                client.script_flush()
            elif what == "cut":
                client.client_kill_filter(_id=client.client_id(), skipme=False)
            found.append(data.draw(st.sampled_from(replicas)).observe(rows[start : start + size]))
            start += size
    finally:
        _sweep(client, prefix)
    demand_equal(np.concatenate(found), expected)


def a_busy_day(events: int, seed: int) -> list[dict[str, Any]]:
    """Few senders, many of whom they write to: maps outgrow the strings."""
    rng = Random(seed)
    text = "claim free nitro at {}.com/1 now and tell all of your friends about it, version {}"
    moments = sorted(rng.uniform(0, 60 * 3600) for _ in range(events))
    return [
        {
            "event_id": f"e{n}", "ts": T0 + timedelta(seconds=at),
            "received_at": T0 + timedelta(seconds=at + rng.choice([0, 0, 1, 600])),
            "actor_id": f"a{rng.randrange(6)}", "recipient_id": f"r{rng.randrange(300)}",
            "channel_id": f"h{rng.randrange(60)}", "community_id": f"c{rng.randrange(40)}",
            "kind": "dm", "ip_hash": f"i{rng.randrange(2)}", "device_hash": "d",
            "account_created_at": T0 - timedelta(hours=rng.choice([-30, 30])),
            "text": text.format(f"evil{rng.randrange(3)}", rng.choice("abcdefgh") * rng.randrange(1, 9)),
        }
        for n, at in enumerate(moments)
    ]  # fmt: skip


def test_three_compilers_agree_on_every_feature_also_where_much_is_told_apart(
    client: redis.Redis, prefix: str
) -> None:
    events = sorted(a_busy_day(1500, 1), key=lambda event: (event["received_at"], event["event_id"]))
    rows = [prepare(event) for event in events]
    engine = RedisEngine(client, prefix)
    counted = np.concatenate([engine.observe(rows[i : i + 37]) for i in range(0, len(rows), 37)])
    assert max(counted.max(axis=0)[[a.op == "distinct" for a in on_redis.AGGREGATES]]) > 2 * FEW
    demand_equal(counted, InProcess().observe(rows))
    table = prepare_frame(frame(first_of_each(events)))
    demand_equal(counted, aggregate(table))
    np.testing.assert_allclose(finished(rows, counted), compute(table), rtol=0, atol=1e-9)


def test_c_ln_c_is_rounded_alike_in_lua_and_python(client: redis.Redis) -> None:
    script = (
        "local t = {} for n = 2, 20001 do "
        f"local units = math.floor(n * math.log(n) * {on_redis.CLOGC_SCALE} + 0.5) "
        "t[n - 1] = string.format('%.0f', units) end return t"
    )
    theirs = [int(n) for n in client.eval(script, 0)]
    table = clogc_table(20_001)
    assert theirs == list(table[2:20_002])


# -- what lies in Redis --------------------------------------------------------------------------------------


def test_an_event_costs_one_round_trip(client: redis.Redis, prefix: str) -> None:
    engine = RedisEngine(client, prefix)
    engine.observe([happening(0)])
    before = client.info("stats")["total_commands_processed"]
    calls = client.info("commandstats")["cmdstat_evalsha"]["calls"]
    engine.observe([happening(1)])
    assert client.info("commandstats")["cmdstat_evalsha"]["calls"] == calls + 1
    assert client.info("stats")["total_commands_processed"] > before


def test_no_raw_id_lies_there_and_everything_expires(client: redis.Redis, prefix: str) -> None:
    engine = RedisEngine(client, prefix, salt="a")
    names = {
        "actor_id": "jane-doe",
        "recipient_id": "john-doe",
        "ip_hash": "10.1.2.3",
        "device_hash": "dev-77",
    }
    for n in range(2 * FEW):
        engine.observe([happening(n, n, **{**names, "recipient_id": f"john-doe-{n}"})])
    said = b""
    for key in client.scan_iter(match=f"{prefix}*"):
        assert client.ttl(key) > 0
        kind = client.type(key)
        said += key + (b"".join(client.zrange(key, 0, -1)) if kind == b"zset" else client.get(key))
    assert said
    for name in (b"jane-doe", b"john-doe", b"10.1.2.3", b"dev-77", b"e0"):
        assert name not in said
    assert not np.array_equal(
        RedisEngine(client, prefix, salt="b").observe([happening(99, 99, **names)]),
        engine.observe([happening(99, 99, **names)]),
    ), "another salt is another person"


@pytest.mark.parametrize("recipients", [3, 3 * FEW])
def test_an_actor_can_be_forgotten(client: redis.Redis, prefix: str, recipients: int) -> None:
    engine = RedisEngine(client, prefix)
    texts = {"text": "the same words from all of us, again and again"}

    def both(number: int, who: str) -> list[Prepared]:
        return [
            happening(number * 1000 + i, i, actor_id=who, recipient_id=f"r{i}", ip_hash="i", **texts)
            for i in range(recipients)
        ]

    engine.observe(both(1, "ann"))
    engine.observe(both(2, "bob"))
    engine.observe([happening(5, 5, actor_id="cy", recipient_id="ann", **texts)])
    mine = engine._hash("ann")
    assert engine.forget("ann") > recipients
    for key in client.scan_iter(match=f"{prefix}*"):
        assert mine not in key
        if client.type(key) == b"zset":
            assert not any(mine in member for member in client.zrange(key, 0, -1))
        elif key[len(engine._prefix) :][:1] != b"=":
            assert mine not in client.get(key)
    fresh = engine.observe([happening(6, 60, actor_id="ann", community_id="other", channel_id="x")])
    assert (
        fresh[0].max() == InProcess().observe([happening(6, 60, actor_id="ann", community_id="other")]).max()
    )
    bob = engine.observe([happening(7, 61, actor_id="bob", recipient_id="r1")])
    other = InProcess()
    other.observe(both(2, "bob"))
    assert (
        bob[0][:10].tolist()
        == other.observe([happening(7, 61, actor_id="bob", recipient_id="r1")])[0][:10].tolist()
    )


# -- what may break ------------------------------------------------------------------------------------------


def test_a_redis_that_is_not_there_is_a_sentence_and_asked_only_once_a_second() -> None:
    server = RedisServer.start()
    engine = RedisEngine(connect(server.url))
    one = engine.observe([happening(1)])
    server.stop()
    with pytest.raises(ServiceUnavailable, match="did not take the events"):
        engine.observe([happening(2)])
    again = RedisServer.start(server.port)
    try:
        with pytest.raises(ServiceUnavailable, match="asked again"):
            engine.observe([happening(2)])
        engine._silent_until = 0.0
        assert np.array_equal(engine.observe([happening(1)]), one), "it came back empty: the first once more"
        assert engine.since() is None
    finally:
        again.stop()


def test_a_redis_that_hangs_costs_no_more_than_the_timeout_and_an_event_sent_twice_counts_once() -> None:
    server = RedisServer.start()
    try:
        engine = RedisEngine(connect(server.url))
        engine.observe([happening(1)])
        connect(server.url)().execute_command("CLIENT", "PAUSE", 1500, "ALL")
        with pytest.raises(ServiceUnavailable, match="TimeoutError"):
            engine.observe([happening(2, 1)])
        connect(server.url)  # the pause ends by itself; what was sent is taken in then
        engine._silent_until = 0.0
        patient = redis.Redis.from_url(server.url, socket_timeout=10, protocol=2)
        counted = RedisEngine(patient).observe([happening(2, 1)])
        assert counted[0][0] == 2
    finally:
        server.stop()


def test_one_replica_begins_the_state_and_the_others_see_it(client: redis.Redis, prefix: str) -> None:
    one, other = RedisEngine(client, prefix), RedisEngine(client, prefix)
    assert one.since() is None
    assert one.claim()
    assert not other.claim()
    assert other.since() is None
    one.begun(77)
    assert other.since() == 77
    assert not other.claim()
    one.unclaim()
    assert other.claim()


def test_the_script_is_named_by_its_digest_and_an_address_that_is_none_is_refused(
    client: redis.Redis,
) -> None:
    assert client.script_load(on_redis.SCRIPT) == SCRIPT_SHA
    with pytest.raises(InvalidInput, match="RQ_REDIS_URL") as refused:
        connect("http://me:swordfish@somewhere")
    assert "swordfish" not in str(refused.value)
