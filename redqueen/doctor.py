"""Is this home fit to run? Every check says what is wrong and what to do; none changes data."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from redqueen import retention, state
from redqueen.clock import CLOCK_KEY, open_clock
from redqueen.errors import InvalidInput, RedQueenError
from redqueen.rollout import RolloutState
from redqueen.settings import Settings
from redqueen.store import ObjectStore, open_store, probe

LOW_DISK_BYTES = 2 * 1024**3


@dataclass(frozen=True)
class Finding:
    """One check: `ok` is True (fine), None (worth knowing) or False (broken)."""

    name: str
    ok: bool | None
    message: str


Problem = Callable[[ObjectStore, str], str]
"""Why the store's copy of a model cannot be loaded; empty if it can."""


Check = Callable[[Settings, ObjectStore], Finding]

Keys = Callable[[], tuple[bool | None, str]]
"""Whether the keys that sign and verify models are fine, and what is to be said of them."""


def examine(settings: Settings, problem: Problem, keys: Keys) -> Iterator[Finding]:
    """Run every check, in the order in which one depends on the other. What cannot be read does not keep the
    others from being run.
    """
    yield Finding("settings", True, f"home {settings.home}, policies {', '.join(settings.policies)}")
    yield _home(settings)
    if settings.store_url is None and not settings.home.exists():
        yield Finding("store", None, f"there is no home at {settings.home} yet: `make ui` makes one")
    else:
        yield from _of_store(settings, problem)
    yield _redis(settings)
    yield _encoder(settings)
    yield _guarded("keys", lambda: Finding("keys", *keys()))
    yield _alerts(settings)


def _of_store(settings: Settings, problem: Problem) -> Iterator[Finding]:
    try:
        store = open_store(settings)
        probe(store)
        yield Finding("store", True, f"{store!r}; conditional writes hold")
    except OSError as error:  # of a directory: it may still be read
        yield Finding(
            "store",
            False,
            f"it cannot be written to: {error}. Make room, or set RQ_HOME or RQ_STORE_URL to another place",
        )
        if not (settings.home / "store").is_dir():
            return
        store = open_store(settings)
    except (RedQueenError, ValueError) as error:
        yield Finding("store", False, f"{error}. Check RQ_STORE_URL and RQ_S3_ENDPOINT_URL.")
        return
    except Exception as error:  # boto3 raises errors of its own for each way a network can fail
        yield Finding(
            "store", False, f"{type(error).__name__}: {error}. Check RQ_STORE_URL and the credentials."
        )
        return
    checks: tuple[Check, ...] = (
        *(_clock, _rollout, _records, _holds, _monitoring),
        *(_models(problem), _retention),
    )
    for check in checks:
        yield _guarded(check.__name__.lstrip("_"), partial(check, settings, store))


def _retention(settings: Settings, store: ObjectStore) -> Finding:
    try:
        retention.rules(settings)
    except InvalidInput as error:
        return Finding("retention", False, str(error))
    last = retention.record(store).get("last", {}).get("at")
    told = f"the last purge was as of {last[:16]} UTC" if last else "nothing has been purged yet"
    return Finding("retention", True, f"{told}; `redqueen retention` shows what is past its time")


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    try:
        return check()
    except RedQueenError as error:
        return Finding(name, False, str(error))
    except Exception as error:
        return Finding(name, False, f"could not be read: {type(error).__name__}: {error}")


def _home(settings: Settings) -> Finding:
    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    if not os.access(folder, os.W_OK):
        return Finding("home", False, f"{folder} cannot be written to; set RQ_HOME to a directory that can")
    free = shutil.disk_usage(folder).free
    if free < LOW_DISK_BYTES:
        return Finding("home", False, f"only {free // 1024**2} MB free at {folder}; a lap needs up to 2 GB")
    return Finding("home", True, f"{free / 1024**3:.0f} GB free")


def _clock(settings: Settings, store: ObjectStore) -> Finding:
    now = open_clock(settings, store).now()
    if settings.clock == "auto" and store.exists(CLOCK_KEY):
        return Finding(
            "clock", None, f"a simulation holds it at {now:%Y-%m-%d %H:%M} UTC; production sets RQ_CLOCK=wall"
        )
    return Finding("clock", True, f"{now:%Y-%m-%d %H:%M} UTC")


def _rollout(settings: Settings, store: ObjectStore) -> Finding:
    live = state.rollout_state(store)
    if live.champion is None:
        return Finding(
            "rollout", None, "no model is live yet: every message is allowed until the first lap is done"
        )
    return Finding("rollout", True, f"{live.champion} is live, stage {live.stage}: {live.message}")


def _records(settings: Settings, store: ObjectStore) -> Finding:
    """Every small record that the loop rests on can be read."""
    now = open_clock(settings, store).now()
    keys = store.list("candidates/")
    damaged = [why for key in keys if key.endswith(".json") and (why := _damaged(store, key))]
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        return Finding("records", False, f"{damaged[0]}{more}; no lap starts while it cannot be read")
    state.loop_state(store, now)
    for key in store.list("signals/")[-1:]:
        store.get_json(key)
    return Finding(
        "records", True, f"{len(keys)} candidates, the retrains and the latest signals can be read"
    )


def _damaged(store: ObjectStore, key: str) -> str:
    try:
        state.record(store, key)
    except InvalidInput as error:
        return str(error)
    return ""


def _models(problem: Problem) -> Callable[[Settings, ObjectStore], Finding]:
    """The check whether what is live, on its way and to be gone back to can be loaded from the store."""

    def models(settings: Settings, store: ObjectStore) -> Finding:
        live = state.rollout_state(store)
        roles = {"champion": live.champion, "challenger": live.challenger, "previous": live.previous}
        there = {role: model_id for role, model_id in roles.items() if model_id is not None}
        broken = {role: why for role, model_id in there.items() if (why := problem(store, model_id))}
        if not there:
            return Finding("models", True, "none are live or on their way")
        if not broken:
            return Finding("models", True, f"{', '.join(there)}: signed, and whole in the store")
        told = "; ".join(f"the {role}: {why}" for role, why in broken.items())
        return Finding("models", False, told + (_way_back(live, broken) if "champion" in broken else ""))

    return models


def _way_back(live: RolloutState, broken: Mapping[str, str]) -> str:
    if live.previous is None or "previous" in broken:
        return ". There is none to go back to: launch the job `lap`"
    back = (
        "`redqueen rollback` drops the challenger, a second one with --again"
        if live.challenger
        else "`redqueen rollback`"
    )
    return f". {back} goes back to {live.previous}"


def _holds(settings: Settings, store: ObjectStore) -> Finding:
    held = state.holds(store, open_clock(settings, store).now())
    if not held:
        return Finding("holds", True, "nothing is frozen")
    text = "; ".join(f"{h.scope} by {h.owner} until {h.until:%Y-%m-%d %H:%M}: {h.reason}" for h in held)
    return Finding("holds", None, text)


def _monitoring(settings: Settings, store: ObjectStore) -> Finding:
    keys = store.list("signals/")
    if not keys:
        return Finding("monitoring", None, "no window has been measured yet")
    window = keys[-1].removeprefix("signals/window=").removesuffix(".json")
    return Finding("monitoring", True, f"{len(keys)} windows measured, the latest {window}")


def _redis(settings: Settings) -> Finding:
    if settings.redis_url is None:
        return Finding("redis", True, "is not used: behaviour windows are in the memory of the one service")
    from redqueen.features.onredis import look_at

    try:
        return Finding("redis", *look_at(settings.redis_url.get_secret_value()))
    except InvalidInput as error:
        return Finding("redis", False, str(error))


def _encoder(settings: Settings) -> Finding:
    if settings.encoder is None:
        return Finding("encoder", True, "a compact one, trained here; nothing is downloaded")
    if settings.encoder == "none":
        return Finding("encoder", True, "none: the linear and Markov models and the trees answer alone")
    if Path(settings.encoder).exists():
        return Finding("encoder", True, f"pretrained, from {settings.encoder}")
    return Finding("encoder", None, f"'{settings.encoder}' is not a path: it will be looked up by name")


def _alerts(settings: Settings) -> Finding:
    if settings.alert_webhook is None:
        return Finding(
            "alerts", None, "go to the log and the store only; set RQ_ALERT_WEBHOOK to be woken up"
        )
    return Finding("alerts", True, "are posted to the webhook")
