"""The store's contract: the same claims about a directory and about a real S3 server."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pytest

from redqueen.errors import Conflict, InvalidInput, NotFound, StoreUnusable
from redqueen.store import Blob, DirectoryStore, ObjectStore, S3Store, probe, to_parquet
from tests.services import S3Server


@pytest.fixture(params=["directory", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ObjectStore]:
    if request.param == "directory":
        yield DirectoryStore(tmp_path / "store")
    else:
        server: S3Server = request.getfixturevalue("s3_server")
        yield S3Store(server.new_bucket(), "some/prefix", server.url)


def test_what_is_put_is_what_is_got(store: ObjectStore) -> None:
    etag = store.put("a/b.bin", b"\x00\xff")
    assert store.get("a/b.bin") == Blob(b"\x00\xff", etag)
    assert store.exists("a/b.bin")
    assert not store.exists("a/c.bin")


def test_a_missing_key_is_not_found(store: ObjectStore) -> None:
    with pytest.raises(NotFound, match="a/b"):
        store.get("a/b")


def test_a_listing_is_sorted_and_by_prefix(store: ObjectStore) -> None:
    for key in ("b/2", "b/1", "bc/1", "a/1", "b/x/y"):
        store.put(key, b"1")
    assert store.list("b/") == ["b/1", "b/2", "b/x/y"]
    assert store.list("b") == ["b/1", "b/2", "b/x/y", "bc/1"]
    assert store.list("nothing/") == []


def test_a_long_listing_is_complete(store: ObjectStore) -> None:
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: store.put(f"many/{i:05d}", b""), range(1100)))
    assert len(store.list("many/")) == 1100


def test_delete_twice_is_fine(store: ObjectStore) -> None:
    store.put("a", b"1")
    store.delete("a")
    store.delete("a")
    assert not store.exists("a")


def test_put_if_absent_wins_once(store: ObjectStore) -> None:
    store.put_if_absent("claim", b"first")
    with pytest.raises(Conflict):
        store.put_if_absent("claim", b"second")
    assert store.get("claim").data == b"first"


def test_put_if_match_needs_the_version_that_was_read(store: ObjectStore) -> None:
    first = store.put("state", b"1")
    second = store.put_if_match("state", b"2", first)
    with pytest.raises(Conflict):
        store.put_if_match("state", b"3", first)
    store.put_if_match("state", b"4", second)
    assert store.get("state").data == b"4"


def test_put_if_match_on_an_absent_key_is_a_conflict(store: ObjectStore) -> None:
    with pytest.raises(Conflict):
        store.put_if_match("absent", b"1", '"0123456789abcdef0123456789abcdef"')


def test_of_racing_writers_one_wins(store: ObjectStore) -> None:
    def claim(i: int) -> bool:
        try:
            store.put_if_absent("race", str(i).encode())
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(claim, range(16)))
    assert sum(won) == 1
    assert store.get("race").data == str(won.index(True)).encode()


def test_json_and_tables_survive(store: ObjectStore) -> None:
    store.put_json("x.json", {"b": [1, None], "a": "ü"})
    assert store.get_json("x.json") == {"b": [1, None], "a": "ü"}
    table = pa.table({"n": [1, 2, 3]})
    store.put("t.parquet", to_parquet(table))
    assert store.read_table("t.parquet").equals(table)


@pytest.mark.parametrize("key", ["", "/etc/passwd", "a/../../b", "a\\b", "a\0b"])
def test_a_key_cannot_leave_the_store(store: ObjectStore, key: str) -> None:
    with pytest.raises(InvalidInput):
        store.put(key, b"1")


def test_the_probe_accepts_a_real_store_and_leaves_nothing(store: ObjectStore) -> None:
    probe(store)
    assert store.list("state/") == []


def test_the_probe_refuses_a_store_that_ignores_conditions(tmp_path: Path) -> None:
    class Careless(DirectoryStore):
        def put_if_absent(self, key: str, data: bytes) -> str:
            return self.put(key, data)

        def put_if_match(self, key: str, data: bytes, etag: str) -> str:
            return self.put(key, data)

    with pytest.raises(StoreUnusable, match="ignores conditional writes"):
        probe(Careless(tmp_path))


def _write_for_ever(root: Path) -> None:
    store = DirectoryStore(root)
    while True:
        for letter in (b"a", b"b"):
            store.put("big", letter * 2_000_000)


def test_a_killed_writer_leaves_the_old_object_or_the_new_one(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    store.put("big", b"a" * 2_000_000)
    for _ in range(5):
        writer = multiprocessing.get_context("spawn").Process(target=_write_for_ever, args=(tmp_path,))
        writer.start()
        assert writer.pid is not None
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            data = store.get("big").data
            assert len(data) == 2_000_000
            assert len(set(data)) == 1
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    store.put_if_match("big", b"free", store.get("big").etag)
    assert store.list("") == ["big"], "no scratch file shows among the keys"
