"""Both compilers: the offline one against the same windows in DuckDB, the online one event by event; parity.

- `time_over_duckdb`: from prepared events in Parquet to features in Parquet, CPU seconds, one thread each.
  Ours computes every feature; DuckDB every windowed one but `actor_burst_entropy_1h` (`of_windows`: how many
  of how many), in frames that end at the row itself, each key into a file of its own, which spares it the
  joins. All of its values are compared with ours.
- `memory_growth_10x`: peak memory of a fresh process that computes all events over one that computes a tenth,
  in blocks of `BLOCK` rows with the lookback before them. `sharded_equal`: the tenth in four shards by key.
- `events_per_s`: CPU seconds of one core, every window of every key and the finishing step, in micro-batches,
  the last quarter of 40 hours, so that every window is full (quick: of 5 hours).
  `redis_events_per_s`: the same through a Redis server of its own, one event and one round trip at a time,
  finished in micro-batches, wall clock.
- `parity_max_abs`: a stream with late, repeated and disordered events, online against offline by the hour,
  all features, in process (dumped and loaded again on the way) and through Redis.
- `bytes_per_actor`: memory of all keys over the actors in the windows, in process and in Redis.

The stream is made up: a platform of 300,000 events a day where nothing else is said (quick, offline: 12,000),
five events an actor and day, actors, communities and domains heavy-tailed, a third of the texts campaigns, 2%
of the events up to 70 minutes late. DuckDB is a development extra.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
from common import QUICK, finish, peak_rss_mb, show

from redqueen import features
from redqueen.features import declared
from redqueen.features.declared import FEATURES, HOUR, KEYS, SECOND, TILE, WATERMARK, WINDOWS
from redqueen.features.prepared import SCHEMA

EVENTS = 300_000 if QUICK else 10_000_000
PER_HOUR = 12_500
OFFLINE_PER_HOUR = 500 if QUICK else PER_HOUR
BLOCK = 15_000 if QUICK else 500_000
ONLINE = 60_000 if QUICK else 500_000
OVER_REDIS = 3_000 if QUICK else 30_000
PARITY = 4_000 if QUICK else 30_000
BATCH = 32
PARTS = 1_000_000
START = 1_767_398_400 * SECOND
ONE_THREAD = {"POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
WINDOWED = [feature for feature in FEATURES if feature.cost == "window"]
BY_DUCKDB = [feature for feature in WINDOWED if not isinstance(feature.value, declared.Entropy)]


def main() -> None:
    if len(sys.argv) > 1:
        work, *arguments = json.loads(sys.argv[1])
        print(json.dumps(globals()[work](*arguments), default=float))
        return
    with tempfile.TemporaryDirectory(prefix="rq-features-") as folder:
        figures = {**offline(Path(folder)), **online(Path(folder))}
    show("features", ["figure", "value"], [(name, _short(value)) for name, value in figures.items()])
    finish(figures)


def _short(value: object) -> object:
    return json.dumps(value, default=float) if isinstance(value, dict) else value


def apart(work: str, *arguments: object) -> Any:
    """One piece of work in a process of its own, with one thread."""
    done = subprocess.run(
        [sys.executable, __file__, json.dumps([work, *map(str, arguments)])],
        stdout=subprocess.PIPE, check=True, text=True, env={**os.environ, **ONE_THREAD},
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


# --- the stream ---------------------------------------------------------------------------------------------


def stream(first: int, n: int, per_hour: int = PER_HOUR) -> pl.DataFrame:
    """Prepared events number `first` and on; the same numbers are always the same events."""
    rng = np.random.default_rng([11, first])
    number = np.arange(first, first + n)
    received = START + number * (HOUR // per_hour) + rng.integers(0, SECOND // 10, n)
    slow = np.where(
        rng.random(n) < 0.02, rng.integers(0, 70 * 60 * SECOND, n), rng.integers(0, 5 * SECOND, n)
    )
    people = 5 * per_hour
    actor, community = _heavy(rng, n, people, 2), _heavy(rng, n, people // 20, 3)
    addressed, linked, written = rng.random(n) < 0.4, rng.random(n) < 0.15, rng.random(n) < 0.8
    text = np.where(rng.random(n) < 0.35, _heavy(rng, n, people // 3, 3), people + number)
    hosts = pl.select(pl.concat_list(_names(_heavy(rng, n, people // 12, 2), "", ".example"))).to_series()
    nobody = rng.random(n) < 0.01
    table = pl.DataFrame(
        {
            "event_id": _names(number, "e").str.zfill(10),
            "received": received,
            "at": received - slow,
            "late": slow > WATERMARK,
            "actor": _where(~nobody, _names(actor, "a")),
            "recipient": _where(addressed, _names(_heavy(rng, n, people, 1), "a")),
            "channel": _names(community * 4 + rng.integers(0, 4, n), "h"),
            "community": _names(community, "c"),
            "campaign": _where(written, _names(text, "").str.zfill(16)),
            "hosts": _where(linked, hosts).fill_null([]),
            "ip": _where(rng.random(n) < 0.9, _names(actor // 2, "i")),
            "device": _where(rng.random(n) < 0.9, _names(actor, "d")),
            "addressed": addressed,
            "dm": addressed,
            "friend_request": addressed & (rng.random(n) < 0.05),
            "join": rng.random(n) < 0.02,
            "linked": linked,
            "obfuscated": rng.random(n) < 0.03,
            "new_account": actor % 17 == 0,
            "written": written,
            "chars": rng.integers(1, 200, n),
            "direct": pl.Series(rng.random((n, SCHEMA["direct"].size)), dtype=SCHEMA["direct"]),
        }
    )
    return table.select(list(SCHEMA)).cast(SCHEMA)


def _heavy(rng: np.random.Generator, n: int, kinds: int, tail: int) -> np.ndarray:
    """Numbers below `kinds`, small ones much more often: the first has a share of kinds ** (-1 / tail)."""
    return (kinds * rng.random(n) ** tail).astype(np.int64)


def _names(numbers: np.ndarray, before: str, after: str = "") -> pl.Series:
    return before + pl.Series(numbers).cast(pl.String) + after


def _where(chosen: np.ndarray, names: pl.Series) -> pl.Series:
    return pl.select(pl.when(pl.Series(chosen)).then(names)).to_series()


def write_stream(path: str, events: str) -> None:
    with pq.ParquetWriter(path, stream(0, 1).to_arrow().schema, compression="zstd") as out:
        for first in range(0, int(events), PARTS):
            table = stream(first, min(PARTS, int(events) - first), OFFLINE_PER_HOUR).to_arrow()
            out.write_table(table, row_group_size=BLOCK // 3)


# --- offline ------------------------------------------------------------------------------------------------


def offline(folder: Path) -> dict[str, object]:
    events, tenth = folder / "events.parquet", folder / "tenth.parquet"
    apart("write_stream", events, EVENTS)
    apart("write_stream", tenth, EVENTS // 10)
    ours = apart("ours", events, folder / "ours.parquet", 1)
    small = apart("ours", tenth, folder / "small.parquet", 1)
    apart("ours", tenth, folder / "sharded.parquet", 4)
    theirs = apart("duckdb_windows", events, folder / "duckdb")
    apart("demand_equal", folder / "ours.parquet", folder / "duckdb")
    show(
        f"offline, {EVENTS:,} events",
        ["", "features", "CPU s", "wall s", "peak MiB"],
        [
            ("ours, all", len(FEATURES), ours["cpu"], ours["wall"], ours["peak_mb"]),
            ("ours, a tenth of the events", len(FEATURES), small["cpu"], small["wall"], small["peak_mb"]),
            ("DuckDB, windows alone", len(BY_DUCKDB), theirs["cpu"], theirs["wall"], theirs["peak_mb"]),
        ],
    )
    same = (folder / "small.parquet").read_bytes() == (folder / "sharded.parquet").read_bytes()
    return {
        "events": EVENTS,
        "time_over_duckdb": ours["cpu"] / theirs["cpu"],
        "of_windows": [len(BY_DUCKDB), len(WINDOWED)],
        "offline_cpu_s": ours["cpu"],
        "offline_events_per_s": EVENTS / ours["cpu"],
        "memory_growth_10x": ours["peak_mb"] / small["peak_mb"],
        "sharded_equal": same,
    }


def ours(source: str, target: str, shards: str) -> dict[str, float]:
    """All features of a file of prepared events into another, block by block."""
    cpu, wall = time.process_time(), time.perf_counter()
    writer = None
    for table in features.in_blocks(_blocks(source), shards=int(shards)):
        arrow = table.to_arrow()
        writer = writer or pq.ParquetWriter(target, arrow.schema, compression="zstd")
        writer.write_table(arrow)
    assert writer is not None
    writer.close()
    return _spent(cpu, wall)


def _blocks(source: str) -> Iterator[pl.DataFrame]:
    # Read ahead, it holds on to all that it has read.
    for batch in pq.ParquetFile(source, pre_buffer=False).iter_batches(BLOCK):
        table = pl.from_arrow(batch)
        assert isinstance(table, pl.DataFrame)
        yield table


def _spent(cpu: float, wall: float) -> dict[str, float]:
    return {
        "cpu": time.process_time() - cpu,
        "wall": time.perf_counter() - wall,
        "peak_mb": peak_rss_mb(),
    }


def duckdb_windows(source: str, folder: str) -> dict[str, float]:
    """The same windows in plain SQL: frames from the sawtooth's beginning to the row itself."""
    import duckdb

    Path(folder).mkdir()
    cpu, wall = time.process_time(), time.perf_counter()
    connection = duckdb.connect()
    connection.execute(f"SET threads = 1; SET temp_directory = '{folder}'; SET memory_limit = '8GB'")
    connection.execute(
        f"CREATE VIEW live AS SELECT * FROM read_parquet('{source}') WHERE actor IS NOT NULL AND NOT late"
    )
    connection.execute("CREATE VIEW linked AS SELECT *, unnest(hosts) AS host FROM live")
    for key in KEYS:
        chosen = [feature for feature in BY_DUCKDB if feature.aggregates[0].key == key]
        connection.execute(f"COPY ({_sql(key, chosen)}) TO '{folder}/{key}.parquet' (COMPRESSION zstd)")
    return _spent(cpu, wall)


def _sql(key: declared.Key, chosen: list[declared.Feature]) -> str:
    columns = ("host",) if key == "domain" else KEYS[key]
    names = ", ".join(columns)
    known = f"(PARTITION BY {names} ORDER BY received, event_id)"
    frames = [f"known AS {known}"]
    for window in WINDOWS:
        length, hop = window.length // TILE, window.hop // TILE
        start = f"(tile - {length}) // {hop} * {hop}"
        # A place holds the tile and the order within the key, so that the frame ends at the row itself.
        frame = f"RANGE BETWEEN place - ({start}) * 4294967296 PRECEDING AND CURRENT ROW"
        frames.append(f"w{window.name} AS (PARTITION BY {names} ORDER BY place {frame})")
    counted = f"""
        SELECT event_id, {", ".join(f"{_expression(f)} AS {f.name}" for f in chosen)}
        FROM (SELECT *, clock // {TILE} AS tile,
                     clock // {TILE} * 4294967296 + row_number() OVER {known} AS place
              FROM (SELECT *, max("at") OVER {known} AS clock FROM {"linked" if key == "domain" else "live"}
                    WHERE {" AND ".join(f"{name} IS NOT NULL" for name in columns)}))
        WINDOW {", ".join(frames)}"""
    if key != "domain":
        return counted
    most = ", ".join(f"max({feature.name}) AS {feature.name}" for feature in chosen)
    return f"SELECT event_id, {most} FROM ({counted}) GROUP BY event_id"


def _expression(feature: declared.Feature) -> str:
    def sql(one: declared.Aggregate) -> str:
        if one.op == "gap":
            gap = f"least(clock - lag(clock) OVER known, {one.window.length})"
            return f"coalesce({gap}, {one.window.length})"
        what = {"count": "count(*)", "distinct": f"count(DISTINCT {one.value})", "sum": f"sum({one.value})"}[
            one.op
        ]
        where = f' FILTER (WHERE "{one.where}")' if one.where else ""
        return f"{what}{where} OVER w{one.window.name}"

    parts = [sql(one) for one in feature.aggregates]
    shape = getattr(feature.value, "shape", "plain")
    if len(parts) == 2:
        return f"coalesce({parts[0]} / nullif({parts[1]}, 0), 0)"
    return {"plain": parts[0], "log": f"ln(1 + {parts[0]})", "log_seconds": f"ln(1 + {parts[0]} / 1e6)"}[
        shape
    ]


def demand_equal(target: str, folder: str) -> int:
    """Every value that DuckDB computed is ours, narrowed to float32; how many were compared."""
    compared = 0
    for file in Path(folder).glob("*.parquet"):
        theirs = pl.read_parquet(file).sort("event_id")
        names = theirs.columns[1:]
        table = pl.read_parquet(target, columns=["event_id", *names])
        mine = table.join(theirs.select("event_id"), on="event_id", how="semi").sort("event_id")
        assert mine.height == theirs.height > 0, (file, mine.height, theirs.height)
        for name in names:
            # ln(1 + x) is another function there: equal to the last bit of a float32 or the one before.
            far = 1e-6 if name.endswith("_log") or name == "community_joins_1h" else 0.0
            off = (mine[name] - theirs[name].cast(pl.Float32)).abs().max()
            assert isinstance(off, float), name
            assert off <= far, f"{name} differs from DuckDB's by {off}"
            compared += mine.height
    return compared


# --- online -------------------------------------------------------------------------------------------------


def online(folder: Path) -> dict[str, object]:
    engine = apart("in_process")
    over_redis = through_redis(folder)
    parity = {"in_process": apart("parity", ""), "redis": over_redis.pop("parity")}
    found = [value for value in parity.values() if value is not None]
    return {
        "events_per_s": engine["events_per_s"],
        "redis_events_per_s": over_redis["events_per_s"],
        "parity_max_abs": max(found),
        "parity": parity,
        "bytes_per_actor": {"in_process": engine["bytes_per_actor"], "redis": over_redis["bytes_per_actor"]},
    }


def in_process() -> dict[str, float]:
    engine = features.InProcess()
    before, spent, measured = _resident(), 0.0, ONLINE // 4
    for first in range(0, ONLINE, 5_000):
        rows = features.rows_of(stream(first, 5_000))
        # What comes before the last quarter fills the windows.
        start = time.process_time()
        for at in range(0, len(rows), BATCH):
            _finished(engine, rows[at : at + BATCH])
        spent += (time.process_time() - start) * (first >= ONLINE - measured)
    del rows
    return {
        "events_per_s": measured / spent,
        "bytes_per_actor": (_resident() - before) / engine.actors,
    }


def _resident() -> int:
    """Bytes of this process in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _finished(engine: features.Engine, rows: list[features.Prepared]) -> np.ndarray:
    return _finish(engine.observe(rows), rows)


def _finish(counted: np.ndarray, rows: list[features.Prepared]) -> np.ndarray:
    direct = np.array([row.direct for row in rows])
    unknown = np.full((len(rows), SNAPSHOTS), np.nan)
    has_actor = np.array([row.actor is not None for row in rows])
    return features.finish(counted, direct, unknown, has_actor)


SNAPSHOTS = sum(feature.cost == "snapshot" for feature in FEATURES)


def through_redis(folder: Path) -> dict[str, Any]:
    """A Redis server of our own, so that nobody else's keys are counted; nulls where there is none."""
    nothing = {"events_per_s": None, "bytes_per_actor": None, "parity": None}
    socket = folder / "redis.sock"
    try:
        server = subprocess.Popen(
            ["redis-server", "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)],
            stdout=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        print("no redis-server: its figures are null")
        return nothing
    try:
        while not socket.exists():
            if server.poll() is not None:
                return nothing
            time.sleep(0.05)
        return {**apart("by_round_trip", socket), "parity": apart("parity", socket)}
    finally:
        server.terminate()
        server.wait()


def _redis(socket: str, prefix: str) -> Any:
    import redis

    from redqueen.features.onredis import RedisEngine

    client = redis.Redis(unix_socket_path=socket)
    return client, RedisEngine(client, prefix)


def by_round_trip(socket: str) -> dict[str, float]:
    client, engine = _redis(socket, "bench")
    before = client.info("memory")["used_memory"]
    rows = features.rows_of(stream(0, OVER_REDIS))
    half = len(rows) // 2
    for row in rows[:half]:
        engine.observe([row])
    start = time.perf_counter()
    for at in range(half, len(rows), BATCH):
        batch = rows[at : at + BATCH]
        _finish(np.concatenate([engine.observe([row]) for row in batch]), batch)
    taken = time.perf_counter() - start
    used = client.info("memory")["used_memory"] - before
    actors = len({row.actor for row in rows})
    return {"events_per_s": (len(rows) - half) / taken, "bytes_per_actor": used / actors}


def parity(socket: str) -> float:
    """The largest difference of any feature between what was served and what is computed by the hour."""
    rng = np.random.default_rng(3)
    table = _spread(stream(0, PARITY), rng)
    again = table.sample(PARITY // 20, seed=1)
    later = rng.integers(0, 90 * 60 * SECOND, again.height)
    again = again.with_columns(received=pl.col("received") + later)
    again = again.with_columns(late=pl.col("received") - pl.col("at") > WATERMARK)
    known = pl.concat([table, again]).sort("received", "event_id")
    engine = _redis(socket, "parity")[1] if socket else features.InProcess()
    rows, served, start = features.rows_of(known), [], 0
    while start < len(rows):
        size = int(rng.integers(1, 60))
        served.append(_finished(engine, rows[start : start + size]))
        start += size
        if isinstance(engine, features.InProcess) and rng.random() < 0.01:
            engine = features.InProcess.load(engine.dump())
    online = np.concatenate(served)
    worst, lookback = 0.0, None
    for _, hour in known.with_row_index("row").group_by(pl.col("received") // HOUR, maintain_order=True):
        hour = hour.unique("event_id", keep="first", maintain_order=True)
        found = features.compute(hour.drop("row"), lookback)
        mine = online[hour["row"].to_numpy()]
        assert (np.isnan(found) == np.isnan(mine)).all()
        worst = max(worst, float(np.nanmax(np.abs(found - mine))))
        lookback = hour.drop("row") if lookback is None else pl.concat([lookback, hour.drop("row")])
    return worst


def _spread(table: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """The same events over two days, so that every window moves; a tenth of them up to 70 minutes late."""
    received = START + np.sort(rng.integers(0, 48 * HOUR, table.height))
    slow = np.where(
        rng.random(table.height) < 0.1,
        rng.integers(0, 70 * 60 * SECOND, table.height),
        rng.integers(0, 60 * SECOND, table.height),
    )
    return table.with_columns(
        received=pl.Series(received), at=pl.Series(received - slow), late=pl.Series(slow > WATERMARK)
    )


if __name__ == "__main__":
    main()
