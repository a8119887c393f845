"""Should we retrain now? One pure function, asked by every sensor; none decides for itself.

Belongs here: `decide`, what it looks at (`Signals`, `LoopState`, `Limits`) and what it answers (`Decision`).
Does not belong here: measuring (`redqueen.drift`, `redqueen.adaptation`), storing decisions
(`redqueen.state`), launching.

A decision carries all its inputs, so `replay` gives the same answer years later. The order of thought is
always:
is monitoring to be trusted, did something fire, who is behind it, and what holds us back.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Literal, get_args

from redqueen.adaptation import (
    BAND_ABUSE,
    EVASION,
    MASS,
    OBFUSCATED_ABUSE,
    OBFUSCATION,
    AdaptationFigures,
    Alarm,
    Figure,
)
from redqueen.drift import DriftFigures
from redqueen.errors import InvalidInput

if TYPE_CHECKING:
    from redqueen.settings import Settings

Action = Literal["retrain", "hold", "none"]
Ask = Literal["bootstrap", "drift", "adaptation", "evasion", "obfuscation", "threshold_mass", "manual"]
Attribution = Literal["attack", "organic", "unclear", "n/a"]
Scope = Literal["training", "promotion", "all"]

# The figure behind each trigger, in the order in which one is named when several alarm at once.
FIGURE_OF: dict[str, str] = {"evasion": EVASION, "obfuscation": OBFUSCATION, "threshold_mass": MASS}
UNKNOWN = "monitoring unknown"


# ---- what is looked at ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Hold:
    """A freeze that a person put in force: what it stops, who did it, why, and when it ends by itself."""

    scope: Scope
    owner: str
    reason: str
    until: datetime

    def __post_init__(self) -> None:
        if self.scope not in get_args(Scope):
            raise InvalidInput(f"a hold cannot have scope {self.scope!r}: use one of {get_args(Scope)}")

    def stops(self, scope: Scope, now: datetime) -> bool:
        return now < self.until and self.scope in (scope, "all")

    def sentence(self) -> str:
        return f"frozen ({self.scope}) by {self.owner} until {self.until:%Y-%m-%d %H:%M}: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"until": self.until.isoformat()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Hold:
        return cls(**{**data, "until": datetime.fromisoformat(data["until"])})


@dataclass(frozen=True)
class LabelCounts:
    """trusted: mature trusted labels in all; new: those received since the last training set was cut;
    suspect: those held back as coordinated or implausible in the same time; missed: messages of the trailing
    windows that were judged abusive and got through, None where nobody counted."""

    trusted: int
    new: int
    suspect: int = 0
    missed: int | None = None


@dataclass(frozen=True)
class Signals:
    """The record of one window: every figure, its health, and the model that was live."""

    window: datetime
    hours: float = 1.0
    champion: str | None = None
    health: Literal["ok", "stale", "broken"] = "ok"
    health_reason: str = ""
    drift: DriftFigures | None = None
    figures: AdaptationFigures | None = None
    alarms: tuple[Alarm, ...] = ()
    unmeasured: dict[str, str] = field(default_factory=dict)
    labels: LabelCounts | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "window": self.window.isoformat(),
            "hours": self.hours,
            "champion": self.champion,
            "health": self.health,
            "health_reason": self.health_reason,
            "drift": self.drift.to_dict() if self.drift else None,
            "figures": self.figures.to_dict() if self.figures else None,
            "alarms": [alarm.to_dict() for alarm in self.alarms],
            "unmeasured": dict(self.unmeasured),
            "labels": asdict(self.labels) if self.labels else None,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Signals:
        return cls(
            window=datetime.fromisoformat(data["window"]),
            hours=float(data["hours"]),
            champion=data["champion"],
            health=data["health"],
            health_reason=data["health_reason"],
            drift=DriftFigures.from_dict(data["drift"]) if data["drift"] else None,
            figures=AdaptationFigures.from_dict(data["figures"]) if data["figures"] else None,
            alarms=tuple(Alarm.from_dict(alarm) for alarm in data["alarms"]),
            unmeasured=dict(data["unmeasured"]),
            labels=LabelCounts(**data["labels"]) if data["labels"] else None,
        )


@dataclass(frozen=True)
class LoopState:
    """The loop as the store knows it. in_flight: the candidate in training or rollout; retrains_today:
    launched within 24 hours; mitigations: overlays in force, which a retrain should make needless."""

    champion: str | None = None
    last_retrain: datetime | None = None
    retrains_today: int = 0
    in_flight: str | None = None
    holds: tuple[Hold, ...] = ()
    mitigations: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "champion": self.champion,
            "last_retrain": self.last_retrain.isoformat() if self.last_retrain else None,
            "retrains_today": self.retrains_today,
            "in_flight": self.in_flight,
            "holds": [hold.to_dict() for hold in self.holds],
            "mitigations": list(self.mitigations),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LoopState:
        last = data["last_retrain"]
        return cls(
            champion=data["champion"],
            last_retrain=datetime.fromisoformat(last) if last else None,
            retrains_today=int(data["retrains_today"]),
            in_flight=data["in_flight"],
            holds=tuple(Hold.from_dict(hold) for hold in data["holds"]),
            mitigations=tuple(data["mitigations"]),
        )


@dataclass(frozen=True)
class Limits:
    """The numbers that decide; all of them are Settings or stated here.

    Drift fires when, in k of the last m windows of at least `drift_min_rows` rows, a share `drift_share` of
    the feature columns drifted (PSI less sampling noise >= .2, see DriftFigures) or a model score's PSI
    reached `score_psi`. Labels are suspect when at least `suspect_min` and a share `suspect_share` of the new
    ones are held back. monitoring older than `stale_after_hours` is unknown. Adaptation must have left
    `min_missed_labels` judged examples of what gets through: a retrain on thirty of them spends the budget
    and learns little.
    """

    cooldown_hours: float = 6.0
    daily_budget: int = 4
    min_trusted_labels: int = 1000
    min_new_labels: int = 150
    min_missed_labels: int = 150
    drift_share: float = 0.3
    score_psi: float = 0.25
    drift_min_rows: int = 200
    drift_k: int = 2
    drift_m: int = 3
    suspect_share: float = 0.2
    suspect_min: int = 20
    stale_after_hours: float = 3.0

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """The limits that `settings` states, defaults for the rest."""
        return cls(
            cooldown_hours=settings.cooldown_hours,
            daily_budget=settings.daily_retrain_budget,
            min_trusted_labels=settings.min_trusted_labels,
            min_new_labels=settings.min_new_labels,
            min_missed_labels=settings.min_missed_labels,
            stale_after_hours=settings.stale_after_hours,
        )


# ---- what is answered ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Decision:
    """The answer to one question, kept for ever, also when it is "none".

    action: retrain; hold (something fired or nobody can tell, and `held_by` says what stands in the way);
    none.
    trigger: what fired (what was asked, when nothing did). page: someone must look now.
    evidence: figures that decided, and under "inputs" everything `replay` needs.
    """

    id: str
    window: datetime
    at: datetime
    action: Action
    trigger: Ask
    attribution: Attribution
    reasons: tuple[str, ...]
    held_by: tuple[str, ...]
    message: str
    expected_benefit: str
    page: bool
    evidence: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        times = {"window": self.window.isoformat(), "at": self.at.isoformat()}
        return asdict(self) | times | {"reasons": list(self.reasons), "held_by": list(self.held_by)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Decision:
        known = {name: data[name] for name in cls.__dataclass_fields__}
        return cls(
            **known
            | {
                "window": datetime.fromisoformat(data["window"]),
                "at": datetime.fromisoformat(data["at"]),
                "reasons": tuple(data["reasons"]),
                "held_by": tuple(data["held_by"]),
            }
        )


@dataclass(frozen=True)
class Finding:
    """What the signals say before anyone asks whether we may act on it."""

    fired: bool
    trigger: Ask
    attribution: Attribution
    reasons: tuple[str, ...]
    benefit: str = ""
    figures: dict[str, Any] = field(default_factory=dict)


def decide(
    history: Sequence[Signals],
    state: LoopState,
    limits: Limits,
    trigger: Ask,
    *,
    now: datetime,
    labels: LabelCounts | None = None,
    window: datetime | None = None,
) -> Decision:
    """Decide whether to retrain.

    history: signals records, oldest first; those of former champions are ignored. trigger: who asks;
    "adaptation" names the strongest alarm itself. labels: default, the latest record's. now: the loop's
    clock, not the wall's.
    Same input, same output. Raises InvalidInput for a trigger that does not exist.
    """
    if trigger not in get_args(Ask):
        raise InvalidInput(f"nothing called {trigger!r} can ask for a retrain: use one of {get_args(Ask)}")
    last = history[-1] if history else None
    counts = labels or (last.labels if last else None) or LabelCounts(0, 0)
    mine = [signals for signals in history if signals.champion in (None, state.champion)][-limits.drift_m :]
    unknown = _monitoring_unknown(mine, state, limits, trigger, now)
    finding = _find(mine, state, limits, trigger, counts)
    obstacles = _obstacles(finding, state, limits, counts, now)
    # Silence of a broken monitor is not calm: unknown holds (and pages) even when nothing fired.
    held_by = (*((unknown,) if unknown else ()), *(obstacles if finding.fired else ()))
    action: Action = "hold" if held_by else "retrain" if finding.fired else "none"
    window = window or (last.window if last else now.replace(minute=0, second=0, microsecond=0))
    return Decision(
        id=_decision_id(window, finding, state),
        window=window,
        at=now,
        action=action,
        trigger=finding.trigger,
        attribution=finding.attribution,
        reasons=finding.reasons,
        held_by=held_by,
        message=_message(action, finding, held_by),
        expected_benefit=finding.benefit,
        page=bool(unknown) or any(held.startswith("suspect labels") for held in held_by),
        evidence={
            "figures": finding.figures,
            "inputs": {
                "history": [signals.to_dict() for signals in mine],
                "window": window.isoformat(),
                "state": state.to_dict(),
                "limits": asdict(limits),
                "asked": trigger,
                "now": now.isoformat(),
                "labels": asdict(counts),
            },
        },
    )


def replay(decision: Decision) -> Decision:
    """Decide again from the inputs that `decision` kept; equal to `decision` unless the rules have
    changed."""
    inputs = decision.evidence["inputs"]
    return decide(
        [Signals.from_dict(signals) for signals in inputs["history"]],
        LoopState.from_dict(inputs["state"]),
        Limits(**inputs["limits"]),
        inputs["asked"],
        now=datetime.fromisoformat(inputs["now"]),
        labels=LabelCounts(**inputs["labels"]),
        window=datetime.fromisoformat(inputs["window"]),
    )


# ---- is monitoring to be trusted? ----------------------------------------------------------------


def _monitoring_unknown(
    mine: Sequence[Signals], state: LoopState, limits: Limits, trigger: Ask, now: datetime
) -> str | None:
    """Why the watchers cannot be believed, or None. Bootstrap and people do not depend on them."""
    if state.champion is None or trigger in ("bootstrap", "manual"):
        return None
    if not mine:
        return f"{UNKNOWN}: no window has been measured for {state.champion}"
    last = mine[-1]
    if last.health != "ok":
        return f"{UNKNOWN}: {last.health_reason or last.health}"
    age = (now - last.window - timedelta(hours=last.hours)).total_seconds() / 3600
    if age > max(limits.stale_after_hours, last.hours):
        return (
            f"{UNKNOWN}: the latest window ended {age:.1f} h ago, {limits.stale_after_hours:g} h are allowed"
        )
    if trigger == "drift" and last.drift is None:
        return f"{UNKNOWN}: the latest window has no drift figures"
    if trigger != "drift" and last.figures is None:
        return f"{UNKNOWN}: the latest window has no adaptation figures"
    return None


# ---- did something fire, and who is behind it? ---------------------------------------------------


def _find(
    mine: Sequence[Signals], state: LoopState, limits: Limits, trigger: Ask, counts: LabelCounts
) -> Finding:
    if trigger == "manual":
        benefit = "what the person who asked expects of it"
        return Finding(True, "manual", "n/a", ("asked for by a person",), benefit)
    if trigger == "bootstrap":
        return _find_bootstrap(state, limits, counts)
    if state.champion is None:
        return Finding(False, trigger, "n/a", ("nothing is live yet, so there is nothing to drift from",))
    if trigger == "drift":
        return _find_drift(mine, limits)
    return _find_adaptation(mine, trigger)


def _find_bootstrap(state: LoopState, limits: Limits, counts: LabelCounts) -> Finding:
    figures = {"trusted_labels": counts.trusted, "needed": limits.min_trusted_labels}
    if state.champion is not None:
        return Finding(False, "bootstrap", "n/a", (f"{state.champion} is live already",), figures=figures)
    if counts.trusted < limits.min_trusted_labels:
        reason = f"no model is live; {counts.trusted} of {limits.min_trusted_labels} trusted labels are there"
        return Finding(False, "bootstrap", "n/a", (reason,), figures=figures)
    reason = (
        f"no model is live and {counts.trusted} trusted labels are there ({limits.min_trusted_labels} needed)"
    )
    return Finding(True, "bootstrap", "n/a", (reason,), "a first detector where there is none", figures)


def _find_drift(mine: Sequence[Signals], limits: Limits) -> Finding:
    recent = [signals.drift for signals in mine[-limits.drift_m :] if signals.drift]
    over = [drift for drift in recent if drifted(drift, limits)]
    latest = recent[-1] if recent else DriftFigures(0)
    figures = {
        "share": latest.share,
        "score_psi": latest.score_psi,
        "drifted": list(latest.drifted[:10]),
        "rows": latest.n,
        "windows_over": len(over),
        "windows": len(recent),
    }
    state_of_things = (
        f"{latest.share:.0%} of columns drifted, score PSI {latest.score_psi:.2f} (n={latest.n}), "
        f"over the limit in {len(over)} of {len(recent)} windows"
    )
    if len(over) < limits.drift_k:
        attribution: Attribution = _attribution(mine)[0] if over else "n/a"
        return Finding(False, "drift", attribution, (state_of_things,), figures=figures)
    attribution, reasons = _attribution(mine)
    if attribution != "attack":
        attribution, reasons = "organic", ("no figure of attackers' adaptation stands in alarm with it",)
    benefit = "scores calibrated to the traffic there is now"
    return Finding(True, "drift", attribution, (state_of_things, *reasons), benefit, figures)


def drifted(drift: DriftFigures, limits: Limits) -> bool:
    """Whether a window by itself is as far from the reference as a retrain on drift would ask for."""
    enough = drift.n >= limits.drift_min_rows
    return enough and (drift.share >= limits.drift_share or drift.score_psi >= limits.score_psi)


def _find_adaptation(mine: Sequence[Signals], trigger: Ask) -> Finding:
    latest = mine[-1] if mine else None
    standing = {alarm.figure: alarm for alarm in latest.alarms} if latest else {}
    wanted = FIGURE_OF if trigger == "adaptation" else {trigger: FIGURE_OF[trigger]}
    fired = {name: standing[figure] for name, figure in wanted.items() if figure in standing}
    attribution, reasons = _attribution(mine)
    silent = tuple(
        f"{figure} unknown: {why}" for figure, why in (latest.unmeasured if latest else {}).items()
    )
    if not fired or attribution == "organic":
        calm = reasons if fired else ("no figure of attackers' adaptation is in alarm",)
        return Finding(False, trigger, attribution if fired else "n/a", calm + silent)
    name, alarm = next(iter(fired.items()))
    sentences = tuple(alarm.sentence for alarm in fired.values())
    figures = {alarm.figure: alarm.to_dict() for alarm in fired.values()}
    resolved: Ask = name  # type: ignore[assignment]
    return Finding(True, resolved, attribution, sentences + reasons + silent, _benefit(alarm), figures)


def _benefit(alarm: Alarm) -> str:
    return f"{alarm.figure} from {alarm.value:.0%} back towards {alarm.baseline:.0%}"


def _attribution(mine: Sequence[Signals]) -> tuple[Attribution, tuple[str, ...]]:
    """Who is behind the alarms that stand in the latest window, and why we think so.

    More abuse getting through is an attack. Obfuscation or mass under the threshold is one only if the
    labels of the actors concerned say abuse; if they say benign it is organic (a meme in fancy letters);
    else unclear.
    """
    latest = mine[-1] if mine else None
    standing = {alarm.figure for alarm in latest.alarms} if latest else set()
    if latest is None or not standing:
        return "organic", ()
    if EVASION in standing:
        return "attack", ()
    votes = [
        _confirmed(latest.figures[figure] if latest.figures else None, noun)
        for alarm, figure, noun in (
            (OBFUSCATION, OBFUSCATED_ABUSE, "obfuscating actors"),
            (MASS, BAND_ABUSE, "actors just under a threshold"),
        )
        if alarm in standing
    ]
    reasons = tuple(reason for _, reason in votes)
    for verdict in ("attack", "unclear", "organic"):
        if any(found == verdict for found, _ in votes):
            return verdict, reasons
    return "unclear", reasons


def _confirmed(figure: Figure | None, noun: str) -> tuple[Attribution, str]:
    if figure is None or figure.value is None:
        n = figure.n if figure else 0
        return "unclear", f"only {n} of the {noun} have been judged yet"
    judged = f"{figure.value:.0%} of the {noun} that were judged are abusive (n={figure.n})"
    if figure.value >= 0.5:
        return "attack", judged
    return ("organic" if (figure.high or 1.0) < 0.5 else "unclear"), judged


# ---- what holds us back? -------------------------------------------------------------------------


def _obstacles(
    finding: Finding, state: LoopState, limits: Limits, counts: LabelCounts, now: datetime
) -> tuple[str, ...]:
    """Everything that stands in the way, each starting with its name. A person is held by a run in flight
    only."""
    found = []
    if state.in_flight:
        found.append(f"run in flight: {state.in_flight} is being trained or rolled out")
    if finding.trigger == "manual":
        return tuple(found)
    found += [hold.sentence() for hold in state.holds if hold.stops("training", now)]
    if state.last_retrain is not None:
        passed = (now - state.last_retrain).total_seconds() / 3600
        if passed < limits.cooldown_hours:
            found.append(f"cooldown: {passed:.1f} of {limits.cooldown_hours:g} h since the last retrain")
    if state.retrains_today >= limits.daily_budget:
        found.append(f"daily budget: {state.retrains_today} of {limits.daily_budget} retrains in 24 h")
    if finding.trigger != "bootstrap" and counts.new < limits.min_new_labels:
        found.append(f"too few trusted labels: {counts.new} new ones, {limits.min_new_labels} needed")
    missed = counts.missed
    if finding.trigger in FIGURE_OF and missed is not None and missed < limits.min_missed_labels:
        found.append(
            f"too few judged examples: {missed} of what got through, {limits.min_missed_labels} needed"
        )
    share = counts.suspect / max(counts.new + counts.suspect, 1)
    if counts.suspect >= limits.suspect_min and share >= limits.suspect_share:
        found.append(
            f"suspect labels: {counts.suspect} ({share:.0%} of the new ones) are held back for review"
        )
    return tuple(found)


# ---- how it is said ------------------------------------------------------------------------------


def _message(action: Action, finding: Finding, held_by: Sequence[str]) -> str:
    why = finding.reasons[0] if finding.reasons else ""
    if action == "retrain":
        kind = f"{finding.trigger}" + ("" if finding.attribution == "n/a" else f", {finding.attribution}")
        return f"Retrain ({kind}): {why}."
    if action == "hold":
        fired = f"{finding.trigger} fired ({why}), but " if finding.fired else ""
        return f"Held: {fired}{'; '.join(held_by)}."
    return f"No retrain: {why}."


def _decision_id(window: datetime, finding: Finding, state: LoopState) -> str:
    """`2026-01-03T14-attack-7f3a`: window, kind, and a hash of what makes it unlike an earlier decision.

    The clock is left out of the hash: a tick that is evaluated twice must mint the same candidate.
    """
    kind = "attack" if finding.attribution == "attack" and finding.fired else finding.trigger
    last = state.last_retrain.isoformat() if state.last_retrain else None
    identity = json.dumps([window.isoformat(), finding.trigger, state.champion, last, state.retrains_today])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:4]
    return f"{window:%Y-%m-%dT%H}-{kind.replace('_', '-')}-{digest}"
