"""How long each table is kept, and what goes when its time is over.

One declaration, `RULES`, by the beginning of a key. Age is read from the key (`dt=/hr=`, `window=`), or from
the record of the candidate that a key belongs to; a key of which neither tells the age stays. What is live,
what it was judged against and what it can go back to is never touched, nor is anything younger than two days
or than a canary that is under way. Deleting is done here too; asking for it is the asset's and the command's.

Dagster's own runs and logs are purged in `assets.retention`: this module knows no orchestrator.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from redqueen import ledger, state
from redqueen.errors import InvalidInput
from redqueen.settings import Settings
from redqueen.store import DirectoryStore, ObjectStore
from redqueen.tables import HOUR

STATE_KEY = "state/retention.json"
LEAST_DAYS = 2
"""Whatever is set: laps, figures and the canary read the last two days."""

RUNS = "dagster-runs"
LANDING = ("events", "labels")


@dataclass(frozen=True)
class Rule:
    """What happens to the keys under `<table>/` after `days` (None: they stay), and why."""

    table: str
    days: int | None
    why: str


RULES = (
    Rule("events", 90, "as landed; what passed is in ingested/, so they only serve to take an hour in again"),
    Rule("labels", 90, "as landed, for the same reason"),
    Rule("ingested/events", 400, "a training set holds all history: old campaigns come back after seasons"),
    Rule("ingested/labels", 400, "the same; a judgement is worth nothing without its event"),
    Rule("quarantine", 90, "rows that nobody mended for so long will not be"),
    Rule("features", 400, "joined to events when training, so kept as long"),
    Rule("prepared", 7, "what the next day's windows are made of; made again from ingested/ when missing"),
    Rule("predictions", 90, "the raw log; each answer once is in served/"),
    Rule("served", 180, "references, evasion and the canary look back hours, people look back months"),
    Rule("review", 400, "propensities: estimates of recall need them as long as the labels"),
    Rule("gold", 180, "truth as of one candidate's instant; made again from labels"),
    Rule("training_sets", 180, "what one candidate learnt from; kept for the models in use"),
    Rule("hard_examples", 730, "every rewriting that ever worked is a lesson, and also somebody's text"),
    Rule("evaluations", 730, "how a model was judged outlives the model"),
    Rule("references", 730, "frozen bins, nothing of a person"),
    Rule("models", 365, "bundles that are neither live, on their way, former, nor a parent of these"),
    Rule("signals", 730, "figures only; comparisons from year to year"),
    Rule("estimates", 730, "recall and precision by inverse propensity; figures only"),
    Rule("reports", 90, "Evidently's pages of a window; the figures are in signals/"),
    Rule("graph", 90, "daily snapshots; made again from events"),
    Rule("campaigns/fingerprints", 2, "signatures of a day's texts: an hour compares itself with 24 hours"),
    Rule("campaigns", 180, "daily groups of near-duplicates; made again from events"),
    Rule("guard", 400, "which labels were held, and why: as long as the labels"),
    Rule("truth", 400, "what aggregation keeps between days: as long as the labels"),
    Rule("index", None, "forgets by itself what ingested/ no longer holds"),
    Rule("decisions", None, "why the loop did what it did; small, and asked for years later"),
    Rule("rollout", None, "what is live, and every move that led there"),
    Rule("candidates", None, "a candidate's life; small, and other ages are read from it"),
    Rule("state", None, "budgets, holds, alerts, tombstones: the loop's memory"),
    Rule(RUNS, 30, "Dagster's runs and event logs; the latest materialization of every asset stays"),
    Rule("work", 7, "scratch of candidates that are finished; made again when lost"),
    Rule("cache", 30, "verified copies of bundles; fetched again when missing"),
)
HOME = ("work", "cache")
_BY_CANDIDATE = {"gold": "candidate=", "training_sets": "candidate=", "hard_examples": "v="}
_BY_MODEL = ("models", "evaluations", "references")
_OF_THE_RAMP = ("events", "labels", "ingested/events", "ingested/labels", "features", "predictions", "served")
_DATED = re.compile(r"(?:dt|day|date|window|hour|asof)=(\d{4}-\d\d-\d\d)(?:T(\d\d)|/hr=(\d\d))?")


# -- what is declared ----------------------------------------------------------------------------------------


def rules(settings: Settings) -> tuple[Rule, ...]:
    """The rules with what `RQ_RETENTION_DAYS` changes (`events=30,served=never`).

    Raises:
        InvalidInput: it names no table, one that is always kept, or fewer days than the loop reads.
    """
    by_name = {rule.table: rule for rule in RULES}
    for entry in settings.retention_days:
        table, _, days = (part.strip() for part in entry.partition("="))
        rule = by_name.get(table)
        if rule is None:
            raise InvalidInput(f"RQ_RETENTION_DAYS names '{table}': known are {', '.join(by_name)}")
        if rule.days is None:
            raise InvalidInput(f"RQ_RETENTION_DAYS: '{table}' is always kept ({rule.why})")
        if days != "never" and (not days.isdigit() or int(days) < LEAST_DAYS):
            raise InvalidInput(
                f"RQ_RETENTION_DAYS: '{entry}' should be {table}=<days, at least {LEAST_DAYS}>, or =never"
            )
        by_name[table] = replace(rule, days=None if days == "never" else int(days))
    return tuple(by_name.values())


def days_of(settings: Settings, table: str) -> int | None:
    """How many days `table` is kept; None for ever."""
    return next(rule.days for rule in rules(settings) if rule.table == table)


def purged_until(store: ObjectStore, table: str) -> datetime | None:
    """Hours before this have lost their files: what `ingested/` holds of them must not be made again."""
    found = state.read(store, STATE_KEY).get("purged", {}).get(table)
    return datetime.fromisoformat(found) if found else None


# -- what is needed ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needed:
    """What no retention touches: models, candidates, and hours from `since` on."""

    models: frozenset[str]
    candidates: frozenset[str]
    since: datetime


def needed(store: ObjectStore, now: datetime) -> Needed:
    """What is live, on its way, or what these can go back to and were judged against."""
    live = state.rollout_state(store)
    candidates = {live.champion_candidate, live.candidate, live.previous_candidate}
    models = {live.champion, live.challenger, live.previous}
    for record in state.all_candidates(store):
        if record["status"] not in state.FINISHED:
            candidates.add(record["candidate"])
            models.add(record.get("model_id"))
    for model in [m for m in models if m]:
        models.add(state.read(store, f"models/{model}/manifest.json").get("parent"))
    since = now - timedelta(days=LEAST_DAYS)
    for instant in (live.ramp_since, live.stage_since if live.challenger else None):
        since = min(since, instant - 2 * HOUR) if instant else since
    return Needed(frozenset(m for m in models if m), frozenset(c for c in candidates if c), since)


# -- what goes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a purge would delete. `keys` by table; `folders` of the home; `kept_for_use`: old enough, but
    needed; `undated`: of unknown age; `undeclared`: beginnings of keys that no rule is about.
    """

    now: datetime
    rules: tuple[Rule, ...]
    keys: dict[str, list[str]] = field(default_factory=dict)
    folders: dict[str, list[Path]] = field(default_factory=dict)
    kept_for_use: dict[str, int] = field(default_factory=dict)
    undated: dict[str, int] = field(default_factory=dict)
    undeclared: tuple[str, ...] = ()

    def counts(self) -> dict[str, int]:
        """How many objects go, by table; tables of which nothing goes are left out."""
        both = {t: len(k) for t, k in self.keys.items()} | {t: len(f) for t, f in self.folders.items()}
        return {table: n for table, n in both.items() if n}


def plan(store: ObjectStore, settings: Settings, now: datetime) -> Plan:
    """What is older than its rule allows and not needed. Reads keys and records, changes nothing."""
    in_use = needed(store, now)
    ages = _Ages.of(store)
    made = Plan(now, rules(settings))
    for rule in made.rules:
        if rule.days is None or rule.table in (RUNS, *HOME):
            continue
        limit = now - timedelta(days=rule.days)
        going, kept, undated = [], 0, 0
        for key in store.list(f"{rule.table}/"):
            age = ages.of_key(rule.table, key)
            if age is None:
                undated += 1
            elif age < limit:
                if _is_needed(rule.table, key, age, in_use):
                    kept += 1
                else:
                    going.append(key)
        made.keys[rule.table] = going
        made.kept_for_use[rule.table] = kept
        made.undated[rule.table] = undated
    made.folders.update(_home_folders(settings, store, in_use, now))
    return replace(made, undeclared=_undeclared(store))


def _undeclared(store: ObjectStore) -> tuple[str, ...]:
    """Top-level folders that no rule is about; on S3 this would list everything, and is left out."""
    if not isinstance(store, DirectoryStore):
        return ()
    declared = {rule.table.partition("/")[0] for rule in RULES}
    there = {path.name for path in store.root.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return tuple(sorted(there - declared - {"ingested"}))


@dataclass(frozen=True)
class _Ages:
    """When candidates and models were last heard of."""

    candidates: Mapping[str, datetime]
    models: Mapping[str, datetime]

    @classmethod
    def of(cls, store: ObjectStore) -> _Ages:
        records = state.all_candidates(store)
        candidates = {r["candidate"]: datetime.fromisoformat(r["updated_at"]) for r in records}
        models: dict[str, datetime] = {}
        for record in records:
            model = record.get("model_id")
            if model:
                # Two candidates may come to the same model: the younger one counts.
                at = candidates[record["candidate"]]
                models[model] = max(models.get(model, at), at)
        return cls(candidates, models)

    def of_key(self, table: str, key: str) -> datetime | None:
        """The end of the hour or day that a key names, or when its candidate or model was last heard of."""
        name = key.removeprefix(f"{table}/").partition("/")[0]
        if table in _BY_CANDIDATE:
            return self.candidates.get(name.removeprefix(_BY_CANDIDATE[table]))
        if table in _BY_MODEL:
            return self.models.get(name)
        found = _DATED.search(key)
        if found is None:
            return None
        day, *hours = found.groups()
        hour = next((h for h in hours if h), None)
        try:
            start = datetime.fromisoformat(day).replace(tzinfo=UTC)
            return start.replace(hour=int(hour)) + HOUR if hour else start + timedelta(days=1)
        except ValueError:
            return None


def _is_needed(table: str, key: str, age: datetime, in_use: Needed) -> bool:
    name = key.removeprefix(f"{table}/").partition("/")[0]
    if table in _BY_CANDIDATE:
        return name.removeprefix(_BY_CANDIDATE[table]) in in_use.candidates
    if table in _BY_MODEL:
        return name in in_use.models
    return table in _OF_THE_RAMP and age > in_use.since


def _home_folders(
    settings: Settings, store: ObjectStore, in_use: Needed, now: datetime
) -> Iterator[tuple[str, list[Path]]]:
    """Folders of the home that may go: scratch of finished candidates, cached bundles nobody needs.

    The spool and the service's journal hold what is nowhere else, and stay.
    """
    by_name = {rule.table: rule.days for rule in rules(settings)}
    finished = {
        r["candidate"]: datetime.fromisoformat(r["updated_at"])
        for r in state.all_candidates(store)
        if r["status"] in state.FINISHED
    }
    work, days = settings.home / "work", by_name["work"]
    if days is not None and work.is_dir():
        old = [f for f in sorted(work.iterdir()) if finished.get(f.name, now) < now - timedelta(days=days)]
        yield "work", [f for f in old if f.name not in in_use.candidates]
    cache, days = settings.home / "cache", by_name["cache"]
    if days is not None and cache.is_dir():
        # The wall's time: it is the file system that says when a copy was made.
        limit = time.time() - days * 86_400
        folders = [f for f in sorted(cache.iterdir()) if f.is_dir() and f.stat().st_mtime < limit]
        yield "cache", [f for f in folders if f.name not in in_use.models]


def apply(store: ObjectStore, settings: Settings, made: Plan) -> dict[str, int]:
    """Delete what the plan names; returns the counts by table. Killed and run again it goes on.

    That hours are being purged is written first: an hour that has lost some of its files must not be taken
    in again from the rest.
    """
    limits = {
        rule.table: made.now - timedelta(days=rule.days)
        for rule in made.rules
        if rule.table in LANDING and rule.days is not None and made.keys.get(rule.table)
    }

    def change(found: dict[str, Any]) -> dict[str, Any] | None:
        purged = dict(found.get("purged", {}))
        for table, limit in limits.items():
            purged[table] = max(purged.get(table, ""), limit.astimezone(UTC).isoformat())
        return {**found, "purged": purged}

    if limits:
        state.update(store, STATE_KEY, change)
    for keys in made.keys.values():
        for key in keys:
            store.delete(key)
    for rule in made.rules:
        table = rule.table.removeprefix("ingested/")
        if rule.table.startswith("ingested/") and rule.days is not None:
            ledger.forget(store, table, before=made.now - timedelta(days=rule.days))
    for folders in made.folders.values():
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
    counts = made.counts()
    state.update(store, STATE_KEY, lambda f: {**f, "last": {"at": made.now.isoformat(), "deleted": counts}})
    return counts


def record(store: ObjectStore) -> dict[str, Any]:
    """When a purge last ran, and what it deleted."""
    return state.read(store, STATE_KEY)
