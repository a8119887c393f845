"""Alerts: once per cause, to the store first, and to a webhook that may be down."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from redqueen import alerts
from redqueen.settings import Settings
from redqueen.store import DirectoryStore
from tests.services import free_port

NOW = datetime(2026, 1, 3, 3, tzinfo=UTC)


@dataclass
class Webhook:
    """A server that takes alerts, or answers with an error."""

    url: str
    status: int = 200
    got: list[dict[str, Any]] = field(default_factory=list)


@pytest.fixture
def webhook() -> Iterator[Webhook]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            hook.got.append(json.loads(self.rfile.read(int(self.headers["content-length"]))))
            self.send_response(hook.status)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hook = Webhook(f"http://127.0.0.1:{server.server_port}/hook")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield hook
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path / "store")


def test_a_cause_is_alerted_about_once(store: DirectoryStore, webhook: Webhook) -> None:
    settings = Settings(alert_webhook=webhook.url)
    assert alerts.send(store, settings, "run-1", "run 1 failed", NOW)
    assert not alerts.send(store, settings, "run-1", "run 1 failed", NOW)
    assert alerts.send(store, settings, "run-2", "run 2 failed", NOW + timedelta(hours=1))
    assert [sent["cause"] for sent in webhook.got] == ["run-1", "run-2"]
    assert "run 1 failed" in webhook.got[0]["text"]
    assert [(a["cause"], a["delivered"]) for a in alerts.latest(store)] == [("run-2", True), ("run-1", True)]


@pytest.mark.parametrize("url", ["down", "not a url", "http://[half"])
def test_a_webhook_that_is_down_loses_nothing(store: DirectoryStore, url: str) -> None:
    settings = Settings(alert_webhook=f"http://127.0.0.1:{free_port()}/x" if url == "down" else url)
    assert alerts.send(store, settings, "stale", "monitoring is stale", NOW)
    assert alerts.latest(store)[0]["delivered"] is False


def test_what_a_webhook_did_not_take_is_sent_again_while_it_is_news(
    store: DirectoryStore, webhook: Webhook
) -> None:
    settings, hour = Settings(alert_webhook=webhook.url), timedelta(hours=1)
    webhook.status = 503
    for n in range(3):
        assert alerts.send(store, settings, f"run-{n}", f"run {n} failed", NOW + 20 * n * hour)
    webhook.got.clear()
    assert alerts.redeliver(store, settings, NOW + 41 * hour) == 0
    assert [sent["cause"] for sent in webhook.got] == ["run-1"], "the first is old, the third waits its turn"
    webhook.status = 200
    assert alerts.redeliver(store, settings, NOW + 41 * hour) == 2
    assert [sent["cause"] for sent in webhook.got] == ["run-1", "run-1", "run-2"]
    assert alerts.redeliver(store, settings, NOW + 41 * hour) == 0
    assert {a["cause"]: a["delivered"] for a in alerts.latest(store)} == {
        "run-0": False, "run-1": True, "run-2": True,
    }  # fmt: skip


def test_an_alert_whose_process_died_before_the_webhook_is_sent_by_the_next(
    store: DirectoryStore, webhook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def die(*_: object) -> bool:
        raise Killed

    settings = Settings(alert_webhook=webhook.url)
    with monkeypatch.context() as patch:
        patch.setattr(alerts, "_post", die)
        with pytest.raises(Killed):
            alerts.send(store, settings, "stale", "monitoring is stale", NOW)
    assert not alerts.send(store, settings, "stale", "monitoring is stale", NOW)
    assert alerts.redeliver(store, settings, NOW) == 1
    assert [sent["cause"] for sent in webhook.got] == ["stale"]


def test_a_webhook_that_refuses_is_not_called_delivered(store: DirectoryStore, webhook: Webhook) -> None:
    webhook.status = 503
    assert alerts.send(store, Settings(alert_webhook=webhook.url), "stale", "monitoring is stale", NOW)
    assert alerts.latest(store)[0]["delivered"] is False


def test_without_a_webhook_the_log_and_the_store_have_it(
    store: DirectoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert alerts.send(store, Settings(), "a/b c?", "look here", NOW)
    assert "look here" in caplog.text
    assert alerts.latest(store)[0]["message"] == "look here"
    assert alerts.latest(store)[0]["delivered"] is None
