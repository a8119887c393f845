"""The scorer: which model answers for whom, what is done about the message, and what is logged.

It answers always: what breaks makes an answer `degraded` and leaves a reason in `state()`, and a candidate
that cannot be loaded or cannot score never takes the champion down. No HTTP here (`serving.app`), no
statistics of the rollout (`redqueen.rollout`), no loading (`serving.live`). Reasons hold neither text nor
actors.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from traceback import format_tb
from typing import Any

import numpy as np
from numpy.typing import NDArray

from redqueen import state as loop
from redqueen.actions import ALLOW, ActionRules, choose
from redqueen.clock import Clock, hour_of
from redqueen.errors import BundleError, NotFound, RedQueenError, ServiceUnavailable
from redqueen.rollout import SHADOW, RolloutState, assign
from redqueen.settings import Settings
from redqueen.store import ObjectStore
from serving.fallback import Outcome, Scored, score_with
from serving.live import (
    LackingWatch,
    Live,
    Loader,
    ServedModel,
    SettlingWatch,
    bundle_loader,
    decode_state,
    serve_model,
)
from serving.online import FILL_WAIT_SECONDS, Event, TextSignals, open_features, text_signals
from serving.predictions import PredictionLog, Row

logger = logging.getLogger(__name__)

NO_MODEL = "none"
REMEMBERED = 20_000
RETRY_SECONDS = (2.0, 60.0)

Key = tuple[str, int]
Plan = tuple[str, str]
"""The model that the rollout state means for a sender, and the arm."""


@dataclass(frozen=True)
class Answer:
    """What a client learns: what to do, and whether a better answer would have been given in better days."""

    event_id: str
    action: str
    degraded: bool


@dataclass
class _Known:
    """What is remembered of an event: never its text, which can be long.

    ahead: dated in the future, so without behaviour features, and degraded for it.
    answers: the action by plan; a message sent twice gets the same answer and is logged once.
    """

    signals: TextSignals
    features: NDArray[np.float32] | None = None
    ahead: bool = False
    answers: dict[Plan, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Case:
    """One event on its way through the scorer, and what the rollout state means for its sender."""

    event: Event
    plan: Plan
    known: _Known

    @property
    def text(self) -> str:
        return self.event.get("text") or ""


class Scorer:
    """Scores events with the models of `rollout/live.json`; safe to use from several threads, one at a time.

    Args:
        load: turns a model id into a detector; default: the bundles in the store.
    """

    def __init__(
        self,
        settings: Settings,
        store: ObjectStore,
        clock: Clock,
        *,
        load: Loader | None = None,
    ) -> None:
        self.settings = settings
        self.log = PredictionLog(
            store,
            settings.home / "spool",
            max_rows=settings.serving_flush_rows,
            max_age_s=settings.serving_flush_seconds,
        )
        self._store, self._clock = store, clock
        self._load = load or bundle_loader(settings, store)
        self._rules = ActionRules.of(settings)
        self._online = open_features(settings)
        self._live = Live(RolloutState.initial(), None)
        self._recent: OrderedDict[Key, _Known] = OrderedDict()
        self._turn, self._refreshing = threading.Lock(), threading.Lock()
        self._problems: dict[str, str] = {}
        self._counts: Counter[str] = Counter()
        self._retry_at, self._retry_after = 0.0, RETRY_SECONDS[0]
        self._last_now: datetime | None = None
        self._warmed: datetime | None = None
        self.ready = False

    # -- life ------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Fill the behaviour windows from what is known of the past, load what is live. Never raises."""
        with self._turn:
            self._warm_start(self._now(), wait_s=FILL_WAIT_SECONDS)
        self.refresh()

    def _warm_start(self, now: datetime, *, wait_s: float = 0.0) -> None:
        try:
            self._online.warm_start(self._store, now, wait_s=wait_s)
            self._clear("warm start")
        except Exception as error:
            if isinstance(error, ServiceUnavailable):
                self._warmed = None  # Redis answers soon or fails soon: the next message may ask again
            self._note("warm start", f"recent events could not be replayed ({_kind(error)})")

    def close(self) -> None:
        """Write what the log still holds."""
        self.log.flush()

    def refresh(self, *, force: bool = True) -> bool:
        """Look up the rollout state and swap models if it changed; returns whether it did. Never raises.

        The models in place keep answering until the new ones are loaded and proven. What could not be loaded
        is tried again, at growing intervals unless `force`. The day's graph is looked up as well.
        """
        with self._refreshing:
            self._refresh_features(force=force)
            try:
                state, etag = self._rollout_state()
            except Exception as error:
                why = str(error) if isinstance(error, RedQueenError) else _kind(error)
                self._note("rollout state", f"it could not be read ({why}); the last one stays")
                return False
            self._clear("rollout state")
            seen = self._live
            retry = bool(seen.problems) and (force or time.monotonic() >= self._retry_at)
            self.ready = True
            if etag == seen.etag and not retry:
                return False
            self._live = self._build(state, etag, seen)
            self._schedule_retry(changed=etag != seen.etag)
            return etag != seen.etag

    def _refresh_features(self, *, force: bool) -> None:
        now = self._now()
        try:
            self._online.refresh(self._store, now, force=force)
            self._clear("features refresh")
        except Exception as error:
            self._note("features refresh", f"graph or windows could not be looked up ({_kind(error)})")
        cold = self._online.cold_until(now)
        if cold is None:
            self._clear("windows")
        else:
            self._note(
                "windows", f"they began without their past, and are whole from {cold:%Y-%m-%d %H:%M} on"
            )

    def _schedule_retry(self, *, changed: bool) -> None:
        self._retry_after = RETRY_SECONDS[0] if changed else min(self._retry_after * 2, RETRY_SECONDS[1])
        self._retry_at = time.monotonic() + self._retry_after

    def _rollout_state(self) -> tuple[RolloutState, str | None]:
        try:
            blob = self._store.get(loop.LIVE_KEY)
        except NotFound:
            if self._live.etag is not None:
                raise  # there was a state and it is gone: an accident, not a service without a model
            return loop.rollout_state(self._store), None
        return decode_state(blob.data), blob.etag

    def _build(self, state: RolloutState, etag: str | None, seen: Live) -> Live:
        problems: list[tuple[str, str]] = []
        champion, _ = self._obtain("champion", state.champion, seen, problems)
        challenger, refused = self._obtain("challenger", state.challenger, seen, problems)
        if state.champion is not None and champion is None:
            champion = seen.champion
        gone = {part for part in list(self._problems) if part.startswith("scoring by ")}
        for part in gone - {f"scoring by {m.model_id}" for m in (champion, challenger) if m is not None}:
            self._clear(part)
        for part, why in problems:
            logger.warning("%s: %s", part, why)
        return Live(state, etag, champion, challenger, refused, tuple(problems))

    def _obtain(
        self, part: str, model_id: str | None, seen: Live, problems: list[tuple[str, str]]
    ) -> tuple[ServedModel | None, bool]:
        """The model; and whether it was refused for good: a broken bundle, not a store that is away."""
        if model_id is None:
            return None, False
        try:
            model = seen.model(model_id) or self._served(model_id)
        except Exception as error:
            why = str(error) if isinstance(error, RedQueenError) else _kind(error)
            problems.append((part, f"model {model_id} could not be loaded: {why}"))
            return None, isinstance(error, BundleError | NotFound)
        if not model.unfit:
            return model, False
        # A champion without its features is still better than none; a candidate has to be whole.
        kept = part == "champion"
        what = "is served on text alone" if kept else "is not served"
        problems.append((part, f"model {model_id} {what}: {model.unfit}"))
        return (model if kept else None), not kept

    def _served(self, model_id: str) -> ServedModel:
        return serve_model(model_id, self._load, self._online.names, self._online.version)

    # -- scoring ---------------------------------------------------------------------------------------------

    def score(self, events: Sequence[Event]) -> list[Answer]:
        """An answer for each event, in order, whatever is broken; the predictions go to the log.

        Args:
            events: validated mappings with the fields of `serving.events.ScoreEvent`.
        """
        with self._turn:
            try:
                answers = self._score(events)
                self._clear("scorer")
            except Exception as error:
                # Nothing should get here; if it does, messages flow and the failure is seen. The traceback is
                # logged without the error's own words, which may repeat what was scored.
                logger.error("scoring failed (%s)\n%s", _kind(error), "".join(format_tb(error.__traceback__)))
                self._note("scorer", f"scoring failed ({_kind(error)}); messages are allowed unscored")
                self._counts["unlogged"] += len(events)
                answers = [Answer(event["event_id"], ALLOW, True) for event in events]
            self._counts["events"] += len(events)
            self._counts["degraded"] += sum(answer.degraded for answer in answers)
            self._counts.update(f"action_{answer.action}" for answer in answers)
        if self.log.crowded():
            self.log.spill()
        return answers

    def _score(self, events: Sequence[Event]) -> list[Answer]:
        started = time.perf_counter()
        live, now = self._live, self._now()
        keys = [_key(event) for event in events]
        plans = [self._plan(live, event["actor_id"]) for event in events]
        answers: dict[Key, tuple[str, bool]] = {}
        fresh: dict[Key, _Case] = {}
        for key, event, plan in zip(keys, events, plans, strict=True):
            if key in fresh or key in answers:
                continue
            known = self._recent.get(key) or _Known(self._signals(event))
            if plan in known.answers:
                answers[key] = (known.answers[plan], False)
            else:
                fresh[key] = _Case(event, plan, known)
        self._counts["repeated"] += len(events) - len(fresh)
        if fresh:
            self._observe(list(fresh.values()), now)
            preparing = (time.perf_counter() - started) / len(fresh)
            answers |= self._answer(live, fresh, now, preparing)
        return [Answer(event["event_id"], *answers[key]) for key, event in zip(keys, events, strict=True)]

    def _plan(self, live: Live, actor_id: str) -> Plan:
        """What the rollout state means for this sender, whether the model can be had or not."""
        state = live.state
        arm = arm_of(state, actor_id)
        meant = state.challenger if arm == "challenger" else state.champion
        return (meant, arm) if meant is not None else (NO_MODEL, "none")

    def _signals(self, event: Event) -> TextSignals:
        try:
            return text_signals(event.get("text") or "")
        except Exception as error:
            self._note("text signals", f"they could not be computed ({_kind(error)})")
            return TextSignals(0.0, 0)

    def _observe(self, cases: list[_Case], now: datetime) -> None:
        """Give each case its features, once; without them a case is scored on its text."""
        new = [case for case in cases if case.known.features is None]
        if not new:
            return
        if not len(self._online) and self._warmed != hour_of(now):
            # Started before anything was ingested: what came in since is the past that training will see.
            self._warmed = hour_of(now)
            self._warm_start(now)
        try:
            observed = self._online.observe([case.event for case in new], now)
        except Exception as error:
            why = str(error) if isinstance(error, ServiceUnavailable) else _kind(error)
            self._note("features", f"behaviour features failed ({why}); text alone is scored")
            return
        self._clear("features")
        if self._online.journal_trouble:
            self._note("journal", self._online.journal_trouble)
        else:
            self._clear("journal")
        for case, row, ahead in zip(new, observed.rows, observed.ahead.tolist(), strict=True):
            case.known.features, case.known.ahead = row, ahead
        self._counts["ahead_of_clock"] += int(observed.ahead.sum())

    def _answer(
        self, live: Live, fresh: dict[Key, _Case], now: datetime, preparing: float
    ) -> dict[Key, tuple[str, bool]]:
        """Score by arm, log, remember; returns (action, degraded) by key."""
        rows: list[Row] = []
        answers: dict[Key, tuple[str, bool]] = {}
        for arm, models in _chains(live).items():
            keys = [key for key, case in fresh.items() if case.plan[1] == arm]
            if not keys:
                continue
            verdicts = self._verdicts(live, arm, models, [fresh[key] for key in keys], preparing)
            for key, row in zip(keys, verdicts, strict=True):
                rows.append(row)
                answers[key] = (row["action"], row["degraded"])
                self._remember(key, fresh[key], row)
        if live.state.stage == SHADOW and (live.challenger is not None or live.challenger_refused):
            rows += self._shadow(live, list(fresh.values()), preparing)
        # In the order in which they were observed: by it one sees why features were others than expected.
        order = {event_id: place for place, (_, event_id) in enumerate(sorted(map(_arrival, fresh.values())))}
        rows.sort(key=lambda row: order[row["event_id"]])
        self.log.append(rows, now)
        self._counts.update(f"arm_{row['arm']}" for row in rows)
        return answers

    def _shadow(self, live: Live, cases: list[_Case], preparing: float) -> list[Row]:
        """What the challenger would have done. Its failures are logged as degraded; ours are not held against
        it: what this service has no features for, it is not asked."""
        asked = [case for case in cases if case.known.features is not None and not case.known.ahead]
        models = () if live.challenger is None else (live.challenger,)
        rows = self._verdicts(live, "shadow", models, asked, preparing) if asked else []
        return [row | {"model_id": live.state.challenger} for row in rows]

    def _verdicts(
        self, live: Live, arm: str, models: Sequence[ServedModel], cases: list[_Case], preparing: float
    ) -> list[dict[str, Any]]:
        """A log row for each case, scored by the first of `models` that can; allowed where none can.

        The arm is the one assigned, whoever answered in the end: so a challenger that breaks is counted
        against itself and not against the champion that stands in for it. `model_id` says who answered.
        """
        started = time.perf_counter()
        outcome = score_with(models, [case.text for case in cases], _stacked(cases))
        self._note_failures(models, outcome)
        latency = preparing + (time.perf_counter() - started) / len(cases)
        base = {"arm": arm, "stage": live.state.stage, "latency_us": min(round(latency * 1e6), 2**31 - 1)}
        meant = _meant(live, arm)
        rows = [self._row(case, base, degraded=meant is not None or not self.ready) for case in cases]
        for scored in outcome.scored:
            second = scored.degraded or scored.model.model_id != meant
            for i, verdict in zip(scored.positions.tolist(), self._judged(scored), strict=True):
                rows[i] |= verdict | {"degraded": second or cases[i].known.ahead}
        return rows

    def _note_failures(self, models: Sequence[ServedModel], outcome: Outcome) -> None:
        failures = dict(outcome.failures)
        for model in models:
            if model.model_id not in failures:
                self._clear(f"scoring by {model.model_id}")
        for model_id, why in failures.items():
            self._note(f"scoring by {model_id}", f"model {model_id} failed on some messages: {why}")

    def _judged(self, scored: Scored) -> list[dict[str, Any]]:
        model, p = scored.model, scored.probabilities
        actions = choose(p, model.thresholds, model.policies, self._rules)
        ratios = model.threshold_ratios(p).tolist()
        scores = [list(zip(model.policies, row, strict=True)) for row in p.tolist()]
        return [
            {"model_id": model.model_id, "action": action, "threshold_ratio": ratio, "scores": pairs}
            for action, ratio, pairs in zip(actions, ratios, scores, strict=True)
        ]

    def _row(self, case: _Case, base: dict[str, Any], *, degraded: bool) -> dict[str, Any]:
        known = case.known
        return {
            **base,
            "event_id": case.event["event_id"],
            "actor_id": case.event["actor_id"],
            "ts": case.event["ts"],
            "model_id": NO_MODEL,
            "scores": [],
            "action": ALLOW,
            "features": [] if known.features is None else known.features.tolist(),
            "features_version": self._online.version,
            "propensity": self.settings.audit_rate,
            "degraded": degraded,
            "obfuscation": known.signals.obfuscation,
            "fingerprint": known.signals.fingerprint,
            "threshold_ratio": 0.0,
        }

    def _remember(self, key: Key, case: _Case, row: Row) -> None:
        # A degraded answer is not kept: sent again, the message deserves a better one.
        if not row["degraded"]:
            case.known.answers[case.plan] = row["action"]
        self._recent[key] = case.known
        self._recent.move_to_end(key)
        if len(self._recent) > REMEMBERED:
            self._recent.popitem(last=False)

    # -- what a person sees ----------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """How the service stands, for people on call: models, share, counts, backlog, reasons to worry."""
        live, log = self._live, self.log.state()
        # Copies first: the scoring thread goes on meanwhile.
        problems, counts = dict(self._problems), Counter(self._counts)
        reasons = [f"{part}: {why}" for part, why in (*live.problems, *sorted(problems.items()))]
        settling = _settling(live)
        for model_id, watch in settling.items():
            counts.update({f"first_stage_{name}": n for name, n in watch.counts().items()})
            if watch.tripped:
                reasons.append(f"first stage of {model_id}: {watch.tripped}")
        for model_id, lacking in _lacking(live).items():
            counts.update({f"behaviour_{name}": n for name, n in lacking.counts().items()})
            if told := lacking.told():
                reasons.append(f"behaviour, {model_id}: {told}")
        if log.spooled:
            reasons.append(f"prediction log: {log.spooled} predictions wait on local disk for the store")
        if log.lost:
            reasons.append(f"prediction log: {log.lost} predictions were lost")
        return {
            "stage": live.state.stage,
            "champion": live.state.champion,
            "challenger": live.state.challenger,
            "share": live.state.share,
            "generation": live.state.version,
            "serving": {
                "champion": live.champion.model_id if live.champion else None,
                "challenger": live.challenger.model_id if live.challenger else None,
            },
            "note": _note(live, ready=self.ready),
            "counts": dict(sorted(counts.items())),
            "first_stage": {model_id: _missed(watch) for model_id, watch in settling.items()},
            "events_observed": len(self._online),
            "graph_days": self._online.snapshot_days,
            "prediction_log": asdict(log),
            "degraded": bool(reasons),
            "degraded_reasons": reasons,
        }

    def _now(self) -> datetime:
        try:
            self._last_now = self._clock.now()
            self._clear("clock")
        except Exception as error:
            self._note("clock", f"it could not be read ({_kind(error)}); the last known time is used")
        return self._last_now or datetime.now(UTC)

    def _note(self, part: str, why: str) -> None:
        if self._problems.get(part) != why:
            logger.warning("%s: %s", part, why)
        self._problems[part] = why

    def _clear(self, part: str) -> None:
        self._problems.pop(part, None)


def arm_of(state: RolloutState, actor_id: str) -> str:
    """The arm of a sender: sticky, by salted hash, and the champion's unless a canary is under way."""
    if state.challenger is None or state.stage == SHADOW:
        return "champion"
    return assign(actor_id, state.salt, state.share)


def _chains(live: Live) -> dict[str, tuple[ServedModel, ...]]:
    """For each arm the models to ask, in turn: who is assigned to a broken challenger gets the champion."""
    champion = (live.champion,) if live.champion is not None else ()
    challenger = (live.challenger,) if live.challenger is not None else ()
    return {"champion": champion, "challenger": challenger + champion, "none": ()}


def _meant(live: Live, arm: str) -> str | None:
    champion, challenger = live.state.champion, live.state.challenger
    return {"champion": champion, "challenger": challenger, "shadow": challenger}.get(arm)


def _settling(live: Live) -> dict[str, SettlingWatch]:
    """The watch over each first stage in use, by model."""
    models = [model for model in (live.champion, live.challenger) if model is not None]
    return {model.model_id: watch for model in models if (watch := model.settling) is not None}


def _lacking(live: Live) -> dict[str, LackingWatch]:
    """The count of messages that each model could judge by their text alone, by model."""
    models = [model for model in (live.champion, live.challenger) if model is not None]
    return {model.model_id: watch for model in models if (watch := model.lacking) is not None}


def _missed(watch: SettlingWatch) -> dict[str, Any]:
    estimate, low, high = watch.missed_share()
    return {**watch.counts(), "missed_share": round(estimate, 5), "interval": [round(low, 5), round(high, 5)]}


def _stacked(cases: Sequence[_Case]) -> NDArray[np.float32] | None:
    rows = [case.known.features for case in cases if case.known.features is not None]
    return np.stack(rows) if len(rows) == len(cases) else None


def _key(event: Event) -> Key:
    # An id used again for another message is another message, or a harmless one could vouch for the next.
    return event["event_id"], hash((event["actor_id"], event.get("text"), event["ts"], event["kind"]))


def _arrival(case: _Case) -> tuple[datetime, str]:
    return case.event.get("received_at") or case.event["ts"], case.event["event_id"]


def _note(live: Live, *, ready: bool) -> str | None:
    """Why every message is allowed; None where a model answers."""
    if live.champion is not None:
        return None
    if not ready:
        return "what is live is not known: every message is allowed"
    named = live.state.champion
    why = "no model is live" if named is None else f"{named} is live and could not be loaded"
    return f"{why}: every message is allowed"


def _kind(error: BaseException) -> str:
    """The error's kind, and the system's word for it, which names nothing of ours."""
    said = error.strerror if isinstance(error, OSError) else None
    return f"{type(error).__name__}, {said}" if said else type(error).__name__
