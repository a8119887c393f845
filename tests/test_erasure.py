"""After an erasure nothing of the erased is left anywhere, however it was kept and whenever it was killed."""

from __future__ import annotations

import csv
import html
import io
import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pyarrow.parquet as pq
import pytest

from assets import features, labels, monitoring, review, training
from assets import ingest as taking_in
from assets.environment import Environment
from assets.ingest import _take_in
from assets.partitions import candidates, partition_of
from redqueen import erasure, ingest, ledger, quarantine, state, tombstones
from redqueen.clock import StoreClock
from redqueen.errors import InvalidInput
from redqueen.features import NAMES
from redqueen.features.onredis import RedisEngine, connect
from redqueen.features.prepared import prepare
from redqueen.settings import write_env
from redqueen.store import DirectoryStore, to_parquet
from redqueen.tables import hour_key, read_hours
from serving.predictions import PredictionLog
from tests.services import RedisServer
from tests.test_ingest import as_json, event, frame, label
from tests.test_vendors import delivery, result

HOUR = datetime(2026, 1, 3, 14, tzinfo=UTC)
NOW = HOUR + timedelta(hours=3)
ACTOR = "actor-7f3a"
SECRET = "xyzzysecret"
CANDIDATE = "2026-01-03T16-by-hand"


def messages(hour: datetime, start: int) -> list[dict[str, Any]]:
    """An hour of traffic; every tenth message is the actor's, some are sent to them."""
    rows = []
    for n in range(start, start + 60):
        ts = hour + timedelta(seconds=n * 7 % 3500)
        mine = n % 10 == 3
        text = (
            f"{SECRET} number {n}" if mine else f"free gifts here, visit shop {n}" if n % 4 else f"lunch {n}?"
        )
        rows.append(
            event(
                n,
                event_id=f"ev-{n}-{'own' if mine else 'other'}",
                ts=ts,
                received_at=ts + timedelta(seconds=1),
                account_created_at=HOUR - timedelta(days=30),
                actor_id=ACTOR if mine else f"someone-{n % 9}",
                kind="dm",
                recipient_id=ACTOR if n % 10 == 5 else f"someone-{n % 7}",
                text=text,
            )
        )
    return rows


def judgements(rows: list[dict[str, Any]], hour: datetime) -> list[dict[str, Any]]:
    return [
        label(
            0,
            label_id=f"lb-{row['event_id']}",
            event_id=row["event_id"],
            value="abuse" if "gifts" in row["text"] or SECRET in row["text"] else "benign",
            policy="spam" if "gifts" in row["text"] or SECRET in row["text"] else "any",
            rater_id=ACTOR if n % 11 == 0 else f"rater-{n % 3}",
            labeled_at=hour + timedelta(minutes=30),
            received_at=hour + timedelta(minutes=31),
        )
        for n, row in enumerate(rows)
        if row["ts"] < hour + timedelta(minutes=29)
    ]


def prediction(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "event_id": row["event_id"], "actor_id": row["actor_id"], "ts": row["ts"], "model_id": "m1",
        "arm": "champion", "stage": "100%", "scores": {"spam": 0.4}, "action": "allow",
        "features": [0.0] * len(NAMES), "features_version": "v", "latency_us": 900, "propensity": 0.1,
        "degraded": False, "obfuscation": 0.0, "fingerprint": 7, "threshold_ratio": 0.6,
    }  # fmt: skip


def land(
    store: DirectoryStore, hour: datetime, rows: list[dict[str, Any]], judged: list[dict[str, Any]]
) -> None:
    """As producers do: Parquet, JSON lines and CSV, with rows that must be refused and a broken line."""
    prefix = hour_key("events", hour)
    store.put(f"{prefix}a.parquet", to_parquet(frame(*rows[:20]).to_arrow()))
    bad = {**rows[3], "event_id": "ev-bad-own", "kind": "shout"}
    broken = f'{{"event_id": "ev-torn", "actor_id": "{ACTOR}", "text": "{SECRET} torn'
    lines = [*(as_json(row) for row in rows[20:40]), as_json(bad), broken]
    store.put(f"{prefix}b.jsonl", "\n".join(lines).encode())
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]))
    writer.writeheader()
    writer.writerows(
        {k: v.isoformat() if isinstance(v, datetime) else v for k, v in row.items()} for row in rows[40:]
    )
    store.put(f"{prefix}c.csv", out.getvalue().encode())
    lines = [as_json(row) for row in judged]
    store.put(f"{hour_key('labels', hour)}a.jsonl", "\n".join(lines).encode())
    own = next(row["event_id"] for row in rows if row["actor_id"] == ACTOR)
    vendors = [
        {**result("v1", "violating", ("PHISHING", 0.9)), "content_ref": own},
        {**result("v2"), "content_ref": rows[0]["event_id"]},
    ]
    name = f"{hour_key('labels', hour)}vendor=acme-moderation__{hour:%H}.json"
    store.put(name, delivery(*({**r, "uid": f"{r['uid']}-{hour:%H}"} for r in vendors)))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home in which two hours were really taken in, measured, and learnt from."""
    home = tmp_path_factory.mktemp("lived") / "home"
    write_env(home, partitions_start="2026-01-01T00:00:00+00:00")
    env = Environment(home=str(home))
    store = env.store
    assert isinstance(store, DirectoryStore)
    log = PredictionLog(store, home / "spool")
    for i in range(2):
        hour = HOUR + timedelta(hours=i)
        rows = messages(hour, 100 * i)
        land(store, hour, rows, judgements(rows, hour))
        StoreClock(store).set(hour + timedelta(hours=1))
        log.append([prediction(row) for row in rows], hour)
        log.flush()
        (home / "dagster").mkdir(exist_ok=True)
        with dg.DagsterInstance.local_temp(str(home / "dagster")) as instance:
            made = [taking_in.events, taking_in.labels, features.features, review.review_requests,
                    monitoring.served]  # fmt: skip
            assert _run(instance, env, made, partition_of(hour))
    StoreClock(store).set(NOW)
    with dg.DagsterInstance.local_temp(str(home / "dagster")) as instance:
        instance.add_dynamic_partitions(candidates.name or "", [CANDIDATE])
        assert _run(instance, env, [labels.gold_labels, training.training_set], CANDIDATE)
    _leave_more(env, messages(HOUR, 0))
    return home


def _run(instance: dg.DagsterInstance, env: Environment, assets: list[Any], partition: str) -> bool:
    return dg.materialize(
        assets, instance=instance, partition_key=partition,
        resources={"env": env, "pipes": dg.PipesSubprocessClient()},
    ).success  # fmt: skip


def _leave_more(env: Environment, rows: list[dict[str, Any]]) -> None:
    """What training, attacks, the service and snapshots leave besides."""
    store, home = env.store, env.settings.home
    own = [row for row in rows if row["actor_id"] == ACTOR]
    state.advance_candidate(store, CANDIDATE, "live", NOW, "told", model_id="m1")
    store.put_json("models/m1/manifest.json", {"parent": None})
    hard = [
        {"event_id": row["event_id"], "family": "leet", "text": row["text"].replace("e", "3")} for row in rows
    ]
    store.put(f"hard_examples/v={CANDIDATE}/part.parquet", to_parquet(pl.DataFrame(hard).to_arrow()))
    report = {
        "passed": True,
        "digest": "d",
        "reports": {
            "candidate": {
                "ids": [row["event_id"] for row in rows],
                "caught_before": [1] * len(rows),
                "survivors": [{"id": row["event_id"], "text": row["text"]} for row in own],
            }
        },
    }
    store.put_json("evaluations/m1/attack.json", report)
    members = [[ACTOR, "someone-1"], ["someone-2"]]
    groups = pl.DataFrame({"campaign_id": ["c1", "c2"], "actor_ids": members, "size": [2, 1]})
    store.put(f"campaigns/day={HOUR:%Y-%m-%d}/groups.parquet", to_parquet(groups.to_arrow()))
    nodes = pl.DataFrame({"actor_id": [ACTOR, "someone-1"], "reciprocity": [0.5, 0.6]})
    store.put(f"graph/day={HOUR:%Y-%m-%d}/actors.parquet", to_parquet(nodes.to_arrow()))
    held = pl.DataFrame({"label_id": [f"lb-{rows[3]['event_id']}", "lb-x"], "weight": [0.0, 1.0]})
    store.put(f"{hour_key('guard', HOUR)}part.parquet", to_parquet(held.to_arrow()))
    spooled = home / "spool" / hour_key("predictions", HOUR) / "late.parquet"
    spooled.parent.mkdir(parents=True, exist_ok=True)
    spooled.write_bytes(to_parquet(pl.DataFrame([prediction(row) for row in rows]).to_arrow()))
    journal = home / "journal" / "2026-01-03T14.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text("\n".join(as_json(row) for row in rows))
    work = home / "work" / CANDIDATE
    work.mkdir(parents=True)
    (work / "dataset.parquet").write_bytes(
        store.get(f"training_sets/candidate={CANDIDATE}/part.parquet").data
    )
    (work / "result.json").write_text(json.dumps({"held_event_ids": [row["event_id"] for row in rows]}))


@pytest.fixture
def lived(home: Path, tmp_path: Path) -> Environment:
    """A copy of that home."""
    copy = tmp_path / "home"
    os.system(f"cp -r '{home}' '{copy}'")
    return Environment(home=str(copy))


def found_in(home: Path, *needles: str) -> dict[str, list[str]]:
    """The files below `home` in whose bytes, Parquet unpacked, a needle lies."""
    hits: dict[str, list[str]] = {}
    for path in sorted(p for p in home.rglob("*") if p.is_file()):
        data = path.read_bytes()
        if path.suffix == ".parquet":
            table = pq.read_table(io.BytesIO(data))
            data += repr(table.to_pylist()).encode() + repr(table.schema.metadata).encode()
        for needle in needles:
            if needle.encode() in data:
                hits.setdefault(needle, []).append(str(path.relative_to(home)))
    return hits


def erase(env: Environment, kind: str = "actor", one: str = ACTOR) -> erasure.Report:
    return erasure.erase(env.store, env.settings, kind, one, NOW, "ana")


def own_events() -> list[str]:
    rows = [row for i in range(2) for row in messages(HOUR + timedelta(hours=i), 100 * i)]
    return [row["event_id"] for row in rows if row["actor_id"] == ACTOR]


NEEDLES = (ACTOR, SECRET, "-own")


def test_the_home_that_was_lived_in_is_full_of_the_actor(lived: Environment) -> None:
    hits = found_in(lived.settings.home, *NEEDLES).values()
    tables = {path.removeprefix("store/").split("/")[0] for paths in hits for path in paths}
    assert tables >= {
        "events", "labels", "ingested", "features", "predictions", "served", "quarantine", "gold",
        "training_sets", "hard_examples", "evaluations", "campaigns", "graph", "guard", "spool", "journal",
        "work",
    }  # fmt: skip
    assert "dagster" not in tables


def test_after_an_erasure_nothing_of_the_actor_is_left_anywhere(lived: Environment) -> None:
    everybody = read_hours(lived.store, "ingested/events", HOUR, NOW)
    report = erase(lived)
    assert found_in(lived.settings.home, *NEEDLES) == {}
    assert report.clean
    assert report.events == len(own_events()) + 1, "the refused one too"
    assert report.models == [(CANDIDATE, "m1")]
    assert report.unreadable == []
    left = read_hours(lived.store, "ingested/events", HOUR, NOW)
    assert left.height == everybody.height - len(own_events())
    assert left.filter(pl.col("recipient_id").str.starts_with("erased-"))["recipient_id"].n_unique() == 1
    judged = read_hours(lived.store, "ingested/labels", HOUR, NOW)
    assert judged.filter(pl.col("rater_id").str.starts_with("erased-")).height
    attack = lived.store.get_json("evaluations/m1/attack.json")["reports"]["candidate"]
    assert len(attack["ids"]) == len(attack["caught_before"])
    assert attack["survivors"] == []


def test_erasing_again_finds_nothing_and_keeps_the_record(lived: Environment) -> None:
    first = erase(lived)
    again = erase(lived)
    assert sum(first.objects.values()) > 15
    assert sum(again.objects.values()) == 0
    (record,) = tombstones.records(lived.store)
    assert (record["status"], record["models"]) == ("done", [[CANDIDATE, "m1"]])
    assert ACTOR not in json.dumps(record)


def test_hours_that_are_taken_in_again_stay_as_they_are(lived: Environment) -> None:
    erase(lived)
    hours = [HOUR, HOUR + timedelta(hours=1)]
    keys = [key for key in lived.store.list("ingested/") if key.endswith(".parquet")]
    before = {key: pl.read_parquet(lived.store.get(key).data) for key in keys}
    refused = {table: quarantine.counts(lived.store, table) for table in ("events", "labels")}
    for table in ("events", "labels"):
        _take_in(lived, table, hours)
    for key in keys:
        assert pl.read_parquet(lived.store.get(key).data).equals(before[key]), key
    assert {table: quarantine.counts(lived.store, table) for table in refused} == refused


def test_what_comes_again_is_refused_and_does_not_stay(lived: Environment) -> None:
    erase(lived)
    hour = HOUR + timedelta(hours=2)
    rows = messages(HOUR, 0)
    sent = [row for row in rows if row["actor_id"] == ACTOR]
    named = next(row for row in rows if row["recipient_id"] == ACTOR)
    lines = "\n".join(as_json(row) for row in [*sent, named])
    lived.store.put(f"{hour_key('events', hour)}backfill.jsonl", lines.encode())
    judged = [
        row for row in judgements(rows, HOUR) if row["event_id"].endswith("-own") or row["rater_id"] == ACTOR
    ]
    lived.store.put(
        f"{hour_key('labels', hour)}backfill.jsonl", "\n".join(as_json(row) for row in judged).encode()
    )
    _, counts = _take_in(lived, "events", [hour])
    # Another's message to the actor is known under the pseudonym: a copy, no contradiction.
    assert (counts["rows"], counts["refused"], counts["known_from_other_hours"]) == (0, len(sent), 1)
    _, counts = _take_in(lived, "labels", [hour])
    about = [row for row in judged if row["event_id"].endswith("-own")]
    assert (counts["rows"], counts["refused"]) == (0, len(about))
    assert counts["known_from_other_hours"] == len(judged) - len(about)
    assert quarantine.counts(lived.store, "events", hour) == {tombstones.REASON: len(sent)}
    assert found_in(lived.settings.home, *NEEDLES) == {}


def test_one_event_goes_and_its_actor_stays(lived: Environment) -> None:
    own, *others = own_events()
    report = erase(lived, "event", own)
    hits = found_in(lived.settings.home, own, others[0], ACTOR)
    assert own not in hits
    assert {others[0], ACTOR} <= hits.keys()
    assert report.events == 1
    assert report.removed["ingested/events"] == 1


class Killed(BaseException):
    """As abrupt as a kill: nothing in the code catches it."""


@pytest.mark.parametrize("after", [1, 4, 9, 14])
def test_killed_anywhere_and_run_again_it_is_as_if_it_never_was(
    lived: Environment, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    done: list[str] = []
    rewrite: Callable[..., int] = erasure._rewrite

    def dying(store: Any, key: str, stones: Any, report: Any) -> int:
        changed = rewrite(store, key, stones, report)
        done.extend([key] * changed)
        if len(done) >= after:
            raise Killed
        return changed

    with monkeypatch.context() as patch:
        patch.setattr(erasure, "_rewrite", dying)
        with pytest.raises(Killed):
            erase(lived)
    assert found_in(lived.settings.home, *NEEDLES) != {}
    report = erase(lived)
    assert found_in(lived.settings.home, *NEEDLES) == {}
    assert report.models == [(CANDIDATE, "m1")]


def test_the_index_forgets_the_ids(lived: Environment) -> None:
    ids = set(ledger.hash_ids(own_events()).tolist())
    assert ids <= set(ledger.entries(lived.store, "events")["id"].to_list())
    erase(lived)
    assert ids.isdisjoint(ledger.entries(lived.store, "events")["id"].to_list())
    kept = read_hours(lived.store, "ingested/labels", HOUR, NOW)
    known = ledger.entries(lived.store, "labels").sort("id")
    now = ledger.fingerprints(kept, "label_id").sort("id")
    assert known["content"].equals(now["content"])


def test_a_row_that_is_written_meanwhile_is_found_by_the_next_pass(
    lived: Environment, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    once: Callable[..., int] = erasure._pass

    def with_a_writer(store: Any, *rest: Any) -> int:
        changed = once(store, *rest)
        if not passes:
            row = prediction(messages(HOUR, 0)[3])
            store.put(f"{hour_key('predictions', HOUR)}z.parquet", to_parquet(pl.DataFrame([row]).to_arrow()))
        passes.append(changed)
        return changed

    monkeypatch.setattr(erasure, "_pass", with_a_writer)
    assert erase(lived).clean
    assert len(passes) == 3
    assert found_in(lived.settings.home, *NEEDLES) == {}


def test_ids_are_numbers_in_some_files_and_words_elsewhere(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path / "home"))
    env.store.put(f"{hour_key('events', HOUR)}a.jsonl", b'{"event_id": 1, "actor_id": 77}\n{"event_id": 2}\n')
    env.store.put_json("evaluations/m/evaluation.json", {"policies": ["77", "spam"], "by": {"77": 3}})
    erase(env, "actor", "77")
    assert env.store.get(f"{hour_key('events', HOUR)}a.jsonl").data == b'\n{"event_id": 2}\n'
    assert env.store.get_json("evaluations/m/evaluation.json")["by"] == {"77": 3}


@pytest.mark.parametrize("actor", ["@mallory:matrix.org", "user 17", "zoë", "a<b>&c"])
def test_ids_with_punctuation_are_found_in_what_follows_no_format(tmp_path: Path, actor: str) -> None:
    env = Environment(home=str(tmp_path))
    torn = json.dumps({"actor_id": actor, "text": SECRET})[:-4]
    other = json.dumps({"actor_id": f"{actor}8", "text": "somebody else's"})[:-4]
    env.store.put(f"{hour_key('events', HOUR)}a.jsonl", f"{torn}\n{other}\n".encode())
    env.store.put("reports/window=1.html", f"<td>{html.escape(actor)}</td>".encode())
    assert erase(env, one=actor).clean
    left = env.store.get(f"{hour_key('events', HOUR)}a.jsonl").data.decode()
    assert SECRET not in left
    assert "somebody else's"[:-4] in left
    assert env.store.list("reports/") == []


def test_an_actor_who_is_called_like_a_word_of_the_loop_takes_nothing_of_it_away(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path))
    kept = {"purged": {"events": "2026-01-01"}, "last": {"at": "2026-01-02", "deleted": {}}}
    env.store.put_json("state/retention.json", kept)
    erase(env, one="purged")
    erase(env, one="last")
    assert env.store.get_json("state/retention.json") == kept


def test_what_was_held_in_memory_and_written_after_the_erasure_goes_the_next_day(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path))
    row = messages(HOUR, 0)[3]
    env.store.put(f"{hour_key('events', HOUR)}a.parquet", to_parquet(frame(row).to_arrow()))
    assert erase(env).clean
    late = pl.DataFrame({"event_id": [row["event_id"]], "family": ["leet"], "text": [row["text"]]})
    env.store.put("hard_examples/v=lap/part.parquet", to_parquet(late.to_arrow()))
    log = PredictionLog(env.store, Path(env.settings.home) / "spool")
    log.append([prediction(row)], HOUR)
    log.flush()
    assert found_in(tmp_path, ACTOR, SECRET)
    swept = erasure.sweep(env.store, env.settings, NOW + timedelta(days=1))
    assert sum(swept.objects.values()) == 2
    assert not found_in(tmp_path, ACTOR, SECRET)
    assert not erasure.sweep(env.store, env.settings, NOW + timedelta(days=1)).objects
    env.store.put("hard_examples/v=lap/part.parquet", to_parquet(late.to_arrow()))
    assert not erasure.sweep(env.store, env.settings, NOW + timedelta(days=30)).objects, "long ago"


def test_nothing_is_erased_by_an_empty_id(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path / "home"))
    with pytest.raises(InvalidInput, match="empty id"):
        erase(env, "actor", " ")


def test_windows_that_services_share_in_redis_forget_the_actor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = RedisServer.start()
    try:
        monkeypatch.setenv("RQ_REDIS_URL", server.url)
        env = Environment(home=str(tmp_path / "home"))
        engine = RedisEngine(connect(server.url), salt=env.settings.salt)
        rows = sorted(messages(HOUR, 0), key=lambda row: row["received_at"])
        engine.observe([prepare(row) for row in rows])
        assert erase(env).objects["redis"] > 0
        assert engine.forget(ACTOR) == 0
        counted = engine.observe([prepare(rows[-1] | {"event_id": "later", "actor_id": "someone-0"})])
        assert counted.any()
    finally:
        server.stop()


def test_a_landed_file_that_nobody_can_read_is_named(tmp_path: Path) -> None:
    env = Environment(home=str(tmp_path / "home"))
    env.store.put(f"{hour_key('events', HOUR)}a.parquet", b"PAR1\xff\xfe and then the power went")
    assert erase(env).unreadable == [f"{hour_key('events', HOUR)}a.parquet"]


def test_rows_keep_their_line_numbers(lived: Environment) -> None:
    name = f"{hour_key('events', HOUR)}b.jsonl"
    before = ingest.read_file(lived.store.get(name).data, name).select("event_id", "_row")
    erase(lived)
    after = ingest.read_file(lived.store.get(name).data, name).select("event_id", "_row")
    assert after.join(before, on=["event_id", "_row"], how="anti").is_empty()
    assert 0 < after.height < before.height
