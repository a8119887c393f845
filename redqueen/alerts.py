"""Waking somebody up: once per cause, to the log, the store and a webhook. Deciding what is worth it is not
here.
"""

from __future__ import annotations

import logging
import re
from datetime import datetime

from redqueen.errors import Conflict
from redqueen.settings import Settings
from redqueen.store import ObjectStore, to_json

logger = logging.getLogger("redqueen.alerts")


def send(store: ObjectStore, settings: Settings, cause: str, message: str, now: datetime) -> bool:
    """Alert about `cause`, unless it was alerted about before; whether this call did.

    The alert is written to the store before the webhook is called, so that a webhook that is down loses
    nothing: `redqueen status` shows it, and the entry says that it was not delivered.
    """
    key = f"state/alerts/{re.sub(r'[^A-Za-z0-9._-]+', '-', cause)}.json"
    entry = {"cause": cause, "message": message, "at": now.isoformat(), "delivered": None}
    try:
        store.put_if_absent(key, to_json(entry))
    except Conflict:
        return False
    logger.error("ALERT %s: %s", cause, message)
    if settings.alert_webhook is not None:
        store.put_json(key, {**entry, "delivered": _post(settings.alert_webhook, cause, message)})
    return True


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
