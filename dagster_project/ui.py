"""`make ui`: Dagster's web server and daemon on one home, and a file server for drift reports, as one thing
that starts and stops together.

Only processes are looked after here; what they show is the definitions' business.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from dagster_project.instance import claim_home, dagster_home, write_dagster_yaml
from redqueen.errors import InvalidInput, Refused, ServiceUnavailable

WORKSPACE = Path(__file__).resolve().parent.parent / "workspace.yaml"
START_SECONDS = 120
STOP_SECONDS = 15
POLL_SECONDS = 0.25
TAIL_LINES = 25
PR_SET_PDEATHSIG = 1

_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


@dataclass(frozen=True)
class Child:
    """A process of the UI and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


def serve_ui(
    home: Path,
    port: int = 3000,
    read_only: bool = False,
    *,
    host: str = "127.0.0.1",
    workspace: Path = WORKSPACE,
    announce: Callable[[str], None] = print,
) -> int:
    """Serve Dagster's UI of a home, and run its sensors, until Ctrl-C or SIGTERM.

    Parameters:
        read_only: no launches and no switches in the UI. A simulation may then be running on the same home:
            its sensors are left to it, and no daemon is started.
        announce: told the address, once it answers, and what else the person should know.

    Returns: 0, the exit status of having been asked to stop.
    Raises: InvalidInput when the port is taken or the workspace file is missing; Refused when another
        process drives the home (not with `read_only`); ServiceUnavailable, with the end of its log, when the
        web server or the daemon dies or does not answer.
    """
    home = Path(home).absolute()
    _check(host, port, workspace)
    _check(host, port + 1, workspace)
    write_dagster_yaml(dagster_home(home))
    with ExitStack() as stack:
        daemon = _claim(stack, home, read_only, announce)
        stop = stack.enter_context(_stop_requests())
        _make_storage(dagster_home(home))
        children: list[Child] = []
        stack.callback(_stop, children)
        environment = _environment(home, host, port)
        for name, command in _commands(home, host, port, workspace, read_only, daemon):
            children.append(_start(name, command, home, environment))
        address = f"http://{host}:{port}"
        if _watch(children, stop, until=lambda: _answers(address), seconds=START_SECONDS):
            announce(f"Dagster is at {address} (logs in {home / 'logs'}; Ctrl-C ends it)")
            _watch(children, stop)
    return 0


def _check(host: str, port: int, workspace: Path) -> None:
    if not workspace.exists():
        raise InvalidInput(f"{workspace} is missing: run from a checkout of the repository (make ui)")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InvalidInput(
                f"port {port} on {host} cannot be used ({error.strerror}): stop what listens there, "
                f"or choose another port (make ui PORT={port + 1})"
            ) from None


def _claim(stack: ExitStack, home: Path, read_only: bool, announce: Callable[[str], None]) -> bool:
    """Whether this UI may run the daemon. Raises: Refused, unless only looking is asked for."""
    try:
        stack.enter_context(claim_home(dagster_home(home), "the UI's daemon"))
    except Refused:
        if not read_only:
            raise
        announce("Another process drives this home: looking only, without a daemon of our own.")
        return False
    return True


def _make_storage(dagster_home: Path) -> None:
    """Make the tables of a new Dagster home before two processes would do so at once, and break them."""
    if (dagster_home / "history").exists():
        return
    from dagster import DagsterInstance

    with DagsterInstance.from_config(str(dagster_home)) as instance:
        instance.get_runs_count()


def _commands(
    home: Path, host: str, port: int, workspace: Path, read_only: bool, daemon: bool
) -> Iterator[tuple[str, list[str]]]:
    python = [sys.executable, "-m"]
    web = [*python, "dagster_webserver", "-h", host, "-p", str(port), "-w", str(workspace)]
    yield "webserver", [*web, "--read-only"] if read_only else web
    if daemon:
        yield "daemon", [*python, "dagster._daemon", "run", "-w", str(workspace)]
    # Drift reports are pages of 4 MB: Dagster links to them, and browsers follow no link to a file.
    reports = home / "store" / "reports"
    reports.mkdir(parents=True, exist_ok=True)
    yield "reports", [*python, "http.server", str(port + 1), "--bind", host, "--directory", str(reports)]


def _environment(home: Path, host: str, port: int) -> Mapping[str, str]:
    own = {
        "RQ_HOME": str(home),
        "DAGSTER_HOME": str(dagster_home(home)),
        "DO_NOT_TRACK": "1",
        "GX_ANALYTICS_ENABLED": "false",
    }
    return {"RQ_REPORTS_URL": f"http://{host}:{port + 1}", **os.environ, **own}


def _start(name: str, command: Sequence[str], home: Path, environment: Mapping[str, str]) -> Child:
    log = home / "logs" / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    parent = os.getpid()

    def end_with_parent() -> None:
        # Between fork and exec: the kernel sends SIGTERM when this parent dies, however it dies.
        if _LIBC is not None:
            _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            # A session of its own: Ctrl-C reaches us only, and what it leaves can be ended as a group.
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    return Child(name, process, log)


@contextmanager
def _stop_requests() -> Iterator[list[int]]:
    """The list that SIGINT and SIGTERM are noted in while the block runs."""
    received: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _watch(
    children: Sequence[Child],
    stop: Sequence[int],
    until: Callable[[], bool] = lambda: False,
    seconds: float = float("inf"),
) -> bool:
    """Wait `until` holds; False when a stop was requested first. Raises: ServiceUnavailable."""
    deadline = time.monotonic() + seconds
    while not stop:
        for child in children:
            if (status := child.process.poll()) is not None:
                raise ServiceUnavailable(f"the {child.name} ended (status {status}). {_tail(child.log)}")
        if until():
            return True
        if time.monotonic() > deadline:
            raise ServiceUnavailable(f"no answer within {seconds:.0f} s. {_tail(children[0].log)}")
        time.sleep(POLL_SECONDS)
    return False


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/server_info", timeout=2) as response:
            return bool(response.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"The end of {log}:", *lines])


def _stop(children: Sequence[Child]) -> None:
    """End every child and what it started: asked first, then made to."""
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + STOP_SECONDS
    for child in children:
        with suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0.1, deadline - time.monotonic()))
    for child in children:
        with suppress(ProcessLookupError):
            os.killpg(child.process.pid, signal.SIGKILL)
        child.process.wait()
