"""Waking somebody up: once per cause, to the log, the store and a webhook. Deciding what is worth it is not
here.
"""

from __future__ import annotations

import logging
import re
from datetime import datetime, timedelta
from typing import Any

from redqueen import state
from redqueen.errors import Conflict, NotFound
from redqueen.settings import Settings
from redqueen.store import ObjectStore, to_json

logger = logging.getLogger("redqueen.alerts")

WAITING_KEY = "state/alerts_waiting.json"
RESENT_FOR = timedelta(hours=24)
"""What no webhook took for so long is no news any more; `redqueen status` still shows it."""


def send(store: ObjectStore, settings: Settings, cause: str, message: str, now: datetime) -> bool:
    """Alert about `cause`, unless it was alerted about before; whether this call did.

    The alert is written to the store before the webhook is called, so that a webhook that is down loses
    nothing: `redqueen status` shows it, the entry says that it was not delivered, and `redeliver` sends it.
    """
    key = f"state/alerts/{re.sub(r'[^A-Za-z0-9._-]+', '-', cause)}.json"
    if store.exists(key):
        return False
    entry = {"cause": cause, "message": message, "at": now.isoformat(), "delivered": None}
    if settings.alert_webhook is not None:
        # Noted first: who is killed after the entry and before the webhook leaves it to the next one.
        state.update(store, WAITING_KEY, lambda waiting: {**waiting, key: now.isoformat()})
    try:
        store.put_if_absent(key, to_json(entry))
    except Conflict:
        return False
    logger.error("ALERT %s: %s", cause, message)
    if settings.alert_webhook is not None:
        _deliver(store, settings.alert_webhook, key, entry)
    return True


def redeliver(store: ObjectStore, settings: Settings, now: datetime) -> int:
    """Send the alerts of late that no webhook took, until one is not taken again; how many were."""
    if settings.alert_webhook is None:
        return 0
    taken = 0
    for key, at in sorted(state.read(store, WAITING_KEY).items(), key=lambda pair: str(pair[1])):
        try:
            entry = store.get_json(key)
        except NotFound:
            entry = {"delivered": None, "at": at}
        if "cause" not in entry or entry["delivered"] or now - datetime.fromisoformat(at) > RESENT_FOR:
            _no_longer_waits(store, key)
        elif _deliver(store, settings.alert_webhook, key, entry):
            taken += 1
        else:
            break
    return taken


def _deliver(store: ObjectStore, url: str, key: str, entry: dict[str, Any]) -> bool:
    delivered = _post(url, entry["cause"], entry["message"])
    store.put_json(key, {**entry, "delivered": delivered})
    if delivered:
        _no_longer_waits(store, key)
    return delivered


def _no_longer_waits(store: ObjectStore, key: str) -> None:
    state.update(store, WAITING_KEY, lambda waiting: {k: at for k, at in waiting.items() if k != key})


def _post(url: str, cause: str, message: str) -> bool:
    import httpx

    try:
        httpx.post(
            url, json={"text": f"Red Queen: {message}", "cause": cause}, timeout=5.0
        ).raise_for_status()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        logger.error("the alert webhook did not take '%s': %s", cause, type(error).__name__)
        return False
    return True


def latest(store: ObjectStore, count: int = 10) -> list[dict[str, object]]:
    """The newest alerts, newest first."""
    found = [store.get_json(key) for key in store.list("state/alerts/")]
    return sorted(found, key=lambda alert: str(alert["at"]), reverse=True)[:count]
