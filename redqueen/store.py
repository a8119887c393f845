"""The object store: one protocol, a directory and S3.

Whole objects only, written atomically. Safety rests on the two conditional writes: `put_if_absent`
(append-only logs, claims) and `put_if_match` (state by compare-and-swap). `probe` proves at start that they
really work.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from redqueen.errors import Conflict, InvalidInput, NotFound, StoreUnusable

if TYPE_CHECKING:
    from redqueen.settings import Settings


T = TypeVar("T")


@dataclass(frozen=True)
class Blob:
    """An object's bytes and the tag that names this version of it."""

    data: bytes
    etag: str


class ObjectStore(Protocol):
    """Keys are relative POSIX paths. Every method may raise the backend's I/O errors."""

    def get(self, key: str) -> Blob:
        """The object; raises `NotFound`."""
        ...

    def put(self, key: str, data: bytes) -> str:
        """Write the object, whatever was there; returns its etag."""
        ...

    def put_if_absent(self, key: str, data: bytes) -> str:
        """Write the object only if there is none; raises `Conflict`."""
        ...

    def put_if_match(self, key: str, data: bytes, etag: str) -> str:
        """Write the object only if its etag is still `etag`; raises `Conflict`."""
        ...

    def list(self, prefix: str) -> list[str]:
        """The keys that start with `prefix`, sorted."""
        ...

    def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        ...

    def delete(self, key: str) -> None:
        """Remove the object; nothing happens where there is none."""
        ...

    def url(self, key: str) -> str:
        """Where a person finds the object."""
        ...

    def get_json(self, key: str) -> dict[str, Any]:
        """The object as JSON; raises `NotFound`, and `InvalidInput` if it is none."""
        ...

    def put_json(self, key: str, value: Any) -> str:
        """Write `value` as JSON."""
        ...

    def read_table(self, key: str) -> pa.Table:
        """The Parquet object as an Arrow table; raises `NotFound`."""
        ...


class _Encodings:
    """JSON and Parquet on top of bytes, the same for every backend."""

    def get(self, key: str) -> Blob:
        raise NotImplementedError

    def put(self, key: str, data: bytes) -> str:
        raise NotImplementedError

    def get_json(self, key: str) -> dict[str, Any]:
        return from_json(key, self.get(key).data)

    def put_json(self, key: str, value: Any) -> str:
        return self.put(key, to_json(value))

    def read_table(self, key: str) -> pa.Table:
        return pq.read_table(io.BytesIO(self.get(key).data))


def to_json(value: Any) -> bytes:
    """JSON as the store keeps it: sorted keys, so equal values are equal bytes."""
    return json.dumps(value, sort_keys=True, indent=1, default=str).encode()


def from_json(key: str, data: bytes) -> dict[str, Any]:
    """The inverse; raises `InvalidInput`, which names the key, for what is no JSON object."""
    try:
        value = json.loads(data)
    except ValueError as error:
        raise InvalidInput(f"'{key}' in the store was damaged, it is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise InvalidInput(f"'{key}' in the store was damaged: it is no JSON object")
    return value


def decoded(key: str, data: dict[str, Any], decode: Callable[[dict[str, Any]], T]) -> T:
    """What `decode` makes of the JSON under `key`; raises `InvalidInput`, which names the key, for JSON of
    another shape.
    """
    try:
        return decode(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"'{key}' in the store was damaged ({type(error).__name__}: {error}): put it back from a backup"
        ) from None


def to_parquet(table: pa.Table) -> bytes:
    """Parquet as the store keeps it: zstd, UTC microseconds."""
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd", coerce_timestamps="us")
    return out.getvalue()


def _checked(key: str) -> str:
    path = PurePosixPath(key)
    if not key or path.is_absolute() or ".." in path.parts or "\\" in key or "\0" in key:
        raise InvalidInput(f"'{key}' is not a key: keys are relative paths without '..'")
    return key


class DirectoryStore(_Encodings):
    """Objects as files below one directory.

    A write goes to a temporary file, is flushed to disk and renamed, so a reader sees the old object or the
    new one. Conditional writes hold an advisory lock on the key for the moment of the comparison.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root).resolve()
        self._scratch = self.root / ".scratch"
        self._scratch.mkdir(parents=True, exist_ok=True)

    def __repr__(self) -> str:
        return f"DirectoryStore({self.root})"

    def _path(self, key: str) -> Path:
        return self.root / _checked(key)

    @contextlib.contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        # 256 lock files for all keys: two keys may share one, which only makes them take turns.
        slot = hashlib.blake2b(key.encode(), digest_size=1).hexdigest()
        with open(self._scratch / f"lock-{slot}", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, path: Path, data: bytes) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=self._scratch)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(name, path)
        except BaseException as error:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            if isinstance(error, OSError) and error.filename is None:
                error.filename = str(path)  # a full disk names no file
            raise

    @staticmethod
    def _etag(data: bytes) -> str:
        return hashlib.sha256(data).hexdigest()[:32]

    def get(self, key: str) -> Blob:
        try:
            data = self._path(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise NotFound(key) from None
        return Blob(data, self._etag(data))

    def put(self, key: str, data: bytes) -> str:
        with self._locked(key):
            self._write(self._path(key), data)
        return self._etag(data)

    def put_if_absent(self, key: str, data: bytes) -> str:
        path = self._path(key)
        with self._locked(key):
            if path.exists():
                raise Conflict(key, "it exists already")
            self._write(path, data)
        return self._etag(data)

    def put_if_match(self, key: str, data: bytes, etag: str) -> str:
        path = self._path(key)
        with self._locked(key):
            try:
                current = self._etag(path.read_bytes())
            except FileNotFoundError:
                raise Conflict(key, "it does not exist") from None
            if current != etag:
                raise Conflict(key, "it changed since it was read")
            self._write(path, data)
        return self._etag(data)

    def list(self, prefix: str) -> list[str]:
        # Only the deepest directory the prefix names is walked: a listing costs what it lists.
        base = self.root / prefix.rpartition("/")[0]
        found = []
        for folder, folders, files in os.walk(base):
            folders[:] = [name for name in folders if not name.startswith(".scratch")]
            relative = Path(folder).relative_to(self.root).as_posix()
            stem = "" if relative == "." else f"{relative}/"
            found += [stem + name for name in files if (stem + name).startswith(prefix)]
        return sorted(found)

    def exists(self, key: str) -> bool:
        return self._path(key).is_file()

    def delete(self, key: str) -> None:
        with self._locked(key), contextlib.suppress(FileNotFoundError):
            self._path(key).unlink()

    def url(self, key: str) -> str:
        return self._path(key).as_uri()


class S3Store(_Encodings):
    """Objects in a bucket below a prefix, through boto3 and any endpoint that honours conditional writes."""

    def __init__(self, bucket: str, prefix: str = "", endpoint_url: str | None = None) -> None:
        import boto3
        from botocore.config import Config

        self.bucket = bucket
        self.prefix = prefix.strip("/") + "/" if prefix.strip("/") else ""
        self._client: Any = boto3.client(
            "s3",
            endpoint_url=endpoint_url,
            config=Config(
                retries={"max_attempts": 5, "mode": "standard"}, connect_timeout=5, read_timeout=30
            ),
        )

    def __repr__(self) -> str:
        return f"S3Store(s3://{self.bucket}/{self.prefix})"

    def _key(self, key: str) -> str:
        return self.prefix + _checked(key)

    @staticmethod
    def _code(error: Exception) -> tuple[str, int]:
        response = getattr(error, "response", {})
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return str(response.get("Error", {}).get("Code", "")), int(status)

    def get(self, key: str) -> Blob:
        from botocore.exceptions import ClientError

        try:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._key(key))
        except ClientError as error:
            if self._code(error)[1] == 404:
                raise NotFound(key) from None
            raise
        return Blob(answer["Body"].read(), answer["ETag"])

    def put(self, key: str, data: bytes) -> str:
        return str(self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data)["ETag"])

    def _conditional(self, key: str, data: bytes, why: str, **condition: str) -> str:
        from botocore.exceptions import ClientError

        try:
            answer = self._client.put_object(Bucket=self.bucket, Key=self._key(key), Body=data, **condition)
        except ClientError as error:
            # 412: the condition failed; 409: two conditional writes raced; 404: If-Match on an absent key.
            if self._code(error)[1] in (404, 409, 412) and self._code(error)[0] != "NoSuchBucket":
                raise Conflict(key, why) from None
            raise
        return str(answer["ETag"])

    def put_if_absent(self, key: str, data: bytes) -> str:
        return self._conditional(key, data, "it exists already", IfNoneMatch="*")

    def put_if_match(self, key: str, data: bytes, etag: str) -> str:
        return self._conditional(key, data, "it changed since it was read, or does not exist", IfMatch=etag)

    def list(self, prefix: str) -> list[str]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=self.bucket, Prefix=self.prefix + prefix
        )
        return sorted(item["Key"][len(self.prefix) :] for page in pages for item in page.get("Contents", ()))

    def exists(self, key: str) -> bool:
        from botocore.exceptions import ClientError

        try:
            self._client.head_object(Bucket=self.bucket, Key=self._key(key))
        except ClientError as error:
            if self._code(error)[1] == 404:
                return False
            raise
        return True

    def delete(self, key: str) -> None:
        self._client.delete_object(Bucket=self.bucket, Key=self._key(key))

    def url(self, key: str) -> str:
        return f"s3://{self.bucket}/{self._key(key)}"


def open_store(settings: Settings) -> ObjectStore:
    """The store that `settings` names: `s3://bucket/prefix`, or a directory below the home."""
    url = settings.store_url
    if url is None:
        return DirectoryStore(settings.home / "store")
    if url.startswith("s3://"):
        bucket, _, prefix = url.removeprefix("s3://").partition("/")
        if not bucket:
            raise InvalidInput(f"RQ_STORE_URL '{url}' names no bucket: write s3://bucket/prefix")
        return S3Store(bucket, prefix, settings.s3_endpoint_url)
    if "://" in url:
        raise InvalidInput(f"RQ_STORE_URL '{url}' is neither a directory nor s3://bucket/prefix")
    return DirectoryStore(url)


def probe(store: ObjectStore) -> None:
    """Prove that conditional writes work, by one write that must win and two that must lose.

    Raises:
        StoreUnusable: the store took a write whose condition was false, as some S3 look-alikes do.
    """
    key = f"state/probe/{uuid.uuid4().hex}"
    try:
        first = store.put_if_absent(key, b"1")
        ignored = 0
        with contextlib.suppress(Conflict):
            store.put_if_absent(key, b"2")
            ignored += 1
        store.put_if_match(key, b"3", first)
        with contextlib.suppress(Conflict):
            store.put_if_match(key, b"4", first)
            ignored += 1
        if ignored or store.get(key).data != b"3":
            raise StoreUnusable(
                f"{store!r} ignores conditional writes (If-None-Match, If-Match). Rollout state would not be "
                "safe on it: use a store that honours them, such as AWS S3 or SeaweedFS."
            )
    finally:
        store.delete(key)
