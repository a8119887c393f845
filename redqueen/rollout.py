"""The candidate's way to live traffic: none -> shadow -> 1% -> 5% -> 25% -> 100%, or back.

Belongs here: sticky assignment, the evidence of a ramp counted from predictions, the tests on it, and a pure
state machine (`next_step`, `apply`). Does not belong here: storing the state (`redqueen.state`), routing
(`serving`).

The tests, and why these:
- harm: a stratified mixture e-process per guardrail. Of the m harmed units of a stratum (look x segment), the
  number x that had met the challenger is hypergeometric when it does no harm, with q the challenger's share
  of the units at risk. So prod theta^x / (q theta + 1 - q)^m, averaged over theta, has expectation at most 1
  (Hoeffding 1963). It may be looked at any time, and a base rate that moves during the ramp cancels;
  pooled tests are fooled by that every time.
- sample ratio: the same e-value, two-sided, on the arm that newly seen actors fell into.
- before 100%: information, and an upper confidence bound of the risk difference below the margin.

Actors are counted once per guardrail over the rollout, never per message: requests of one sender are no
independent evidence, and one who floods the canary must not have it rolled back. Missed abuse is counted on
labels alone that came to be whatever the model's score was: people look longer where a score is
near its threshold, so a model that misses abuse with confidence would hide it, and one that hesitates would
be blamed. Nothing advances for lack of evidence.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timedelta
from math import exp, log, sqrt
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from redqueen.adaptation import DELIVERED
from redqueen.drift import require
from redqueen.errors import Refused
from redqueen.policy import Hold

FloatArray = npt.NDArray[np.float64]
Stage = Literal["none", "shadow", "1%", "5%", "25%", "100%"]
StepAction = Literal["start_shadow", "advance", "hold", "rollback", "promote", "none"]

NONE: Stage = "none"
SHADOW: Stage = "shadow"
LIVE: Stage = "100%"
SHARES: dict[Stage, float] = {"1%": 0.01, "5%": 0.05, "25%": 0.25}  # the ramp, in order
ORDER: tuple[Stage, ...] = (NONE, SHADOW, *SHARES, LIVE)

MISSED, WRONG, SLOW, ERRORS = "missed_abuse", "wrongly_actioned", "slow", "errors"
GUARDRAILS = (MISSED, WRONG, SLOW, ERRORS)
JUDGED = (MISSED, WRONG)  # those that rest on labels, with a non-inferiority margin
NOUNS = {
    MISSED: "actors whose abuse was let through",
    WRONG: "actors acted on although benign",
    SLOW: "actors with a request over the latency objective",
    ERRORS: "actors with a degraded request",
}

HARM_RATIOS = (1.25, 1.5, 2.0, 3.0, 5.0, 10.0)
MISMATCH_RATIOS = (0.2, 1 / 3, 0.5, 2 / 3, 0.8, 0.9, 1.1, 1.25, 1.5, 2.0, 3.0, 5.0)


# ---- state ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RolloutState:
    """What is in `rollout/live.json`. champion, challenger, previous are model ids; *_candidate and
    `candidate` the decisions they came from. `share` is the challenger's share of actors: 0 unless the stage
    is 1%, 5% or 25%.
    """

    champion: str | None = None
    champion_candidate: str | None = None
    challenger: str | None = None
    candidate: str | None = None
    previous: str | None = None
    previous_candidate: str | None = None
    stage: Stage = NONE
    share: float = 0.0
    stage_since: datetime | None = None
    ramp_since: datetime | None = None
    salt: str = "red-queen"
    version: int = 0
    blocked: dict[str, str] = field(default_factory=dict)
    promotion_paused_until: datetime | None = None
    reason: str = "initial"
    message: str = "Nothing has been deployed yet."
    updated_at: datetime | None = None

    @classmethod
    def initial(cls, salt: str = "red-queen") -> RolloutState:
        return cls(salt=salt)

    def paused(self, now: datetime) -> bool:
        return self.promotion_paused_until is not None and now < self.promotion_paused_until

    def to_dict(self) -> dict[str, Any]:
        data = asdict(self)
        return data | {name: data[name].isoformat() for name in _TIMES if data[name] is not None}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RolloutState:
        known = {name: data[name] for name in cls.__dataclass_fields__ if name in data}
        times = {name: datetime.fromisoformat(known[name]) for name in _TIMES if known.get(name)}
        return cls(**known | times | {"blocked": dict(known.get("blocked", {}))})


_TIMES = ("stage_since", "ramp_since", "promotion_paused_until", "updated_at")


def assign(actor_id: str, salt: str, share: float) -> Literal["champion", "challenger"]:
    """The arm of an actor: the same for ever under one salt, and once challenger, challenger at every larger
    share."""
    digest = hashlib.sha256(f"{salt}:{actor_id}".encode()).digest()
    return "challenger" if int.from_bytes(digest[:8], "big") < share * 2**64 else "champion"


# ---- limits --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """The numbers of a rollout; every one may become a setting. Hours are of the loop's clock.

    Defaults let a good challenger through in about 8 hours at 2,400 events an hour, and in about 10 windows
    at 250. bake: least hours in a stage. exposed: least distinct challenger actors, over the ramp so far.
    alpha: chance of ever rolling back a harmless challenger for harm, split evenly over the guardrails.
    margin + relative_margin * champion's risk: how much worse than the champion still counts as no worse, as
    a share of judged actors. suspicion: an E-value of harm from which nothing goes to 100%, though it does
    not suffice for a rollback. min_harmed: challenger units below which no harm is called. label_error: share
    of abusive messages that people judge benign (moderators err in about one of fifty).

    Simulated on the platform (risks near 1%, labels 2 h late, 24 h): a challenger that does four times the
    harm never got through, three times 3 of 24, twice 17 of 24: finding so little takes more actors than a
    day has.
    """

    guardrails: tuple[str, ...] = GUARDRAILS
    alpha: float = 0.01
    mismatch_alpha: float = 0.001
    suspicion: float = 3.0
    label_error: float = 0.02
    bake: dict[str, float] = field(default_factory=lambda: {SHADOW: 1.0, "1%": 1.0, "5%": 1.0, "25%": 2.0})
    exposed: dict[str, int] = field(default_factory=lambda: {"1%": 8, "5%": 30, "25%": 100})
    min_harmed: dict[str, int] = field(default_factory=lambda: {MISSED: 3, WRONG: 3, SLOW: 20, ERRORS: 20})
    margin: dict[str, float] = field(default_factory=lambda: {MISSED: 0.03, WRONG: 0.03})
    relative_margin: float = 0.5
    confidence_z: float = 1.96
    min_judged: int = 60
    min_judged_abuse: int = 5
    shadow_min_rows: int = 200
    max_action_ratio: float = 3.0
    action_slack: float = 0.15
    max_bootstrap_action_rate: float = 0.5
    stale_after_hours: float = 3.0
    pause_hours: float = 3.0
    stall_hours: float = 24.0

    def for_window(self, hours: float) -> Limits:
        """The same limits for windows of `hours` (1 or more): bakes and ages are at least a window long."""
        return replace(
            self,
            bake={stage: least * hours for stage, least in self.bake.items()},
            stale_after_hours=max(self.stale_after_hours, 2 * hours),
            pause_hours=self.pause_hours * hours,
            stall_hours=self.stall_hours * hours,
        )


# ---- evidence ------------------------------------------------------------------------------------


class Arms(NamedTuple):
    """A count for either arm."""

    champion: int = 0
    challenger: int = 0


NOBODY = Arms()


class Tally(NamedTuple):
    """Units at risk and units harmed, by arm."""

    units: Arms = NOBODY
    harmed: Arms = NOBODY


@dataclass(frozen=True)
class Stratum:
    """One look x stage x segment of the ramp.

    entered: actors seen for the first time in the rollout (for the sample ratio); joined: first time in that
    arm; harm: guardrail -> actors active here and not harmed before, and harmed
    here; cohort: guardrail -> actors first judged here, and those of them harmed at any time (for
    non-inferiority); abusive: actors first judged here whose judgement was abuse; caught: messages acted on
    and judged abusive.
    """

    look: str
    stage: Stage
    segment: str = "all"
    entered: Arms = NOBODY
    joined: Arms = NOBODY
    harm: dict[str, Tally] = field(default_factory=dict)
    cohort: dict[str, Tally] = field(default_factory=dict)
    abusive: Arms = NOBODY
    caught: Arms = NOBODY


@dataclass(frozen=True)
class ShadowComparison:
    """Both models on the same events. agreement: share on which both act or both do not; rates are shares
    acted on."""

    n: int
    agreement: float | None
    champion_action_rate: float | None
    challenger_action_rate: float
    errors: int


@dataclass(frozen=True)
class Candidate:
    """A finished candidate that waits for its rollout, and the verdict of its offline gate."""

    candidate: str
    model_id: str
    gate_passed: bool
    gate_reason: str = ""


@dataclass(frozen=True)
class Evidence:
    """Everything a step is decided on. telemetry_age_hours: age of the newest prediction, None when there is
    none.
    approval: who approved that a first model goes live without a control."""

    strata: tuple[Stratum, ...] = ()
    shadow: ShadowComparison | None = None
    telemetry_age_hours: float | None = None
    waiting: Candidate | None = None
    approval: str | None = None
    holds: tuple[Hold, ...] = ()


def collect(
    predictions: pl.DataFrame,
    *,
    look: timedelta = timedelta(hours=1),
    latency_objective_ms: float = 50.0,
    segment: str | None = None,
) -> tuple[Stratum, ...]:
    """Count the evidence of one ramp.

    predictions: rows since the ramp began with abuse (bool or null) from `adaptation.join_labels`; rows of
    other stages and arms are ignored. abuse_unaimed (optional): the same by labels alone that do not hang on
    a score, for missed abuse; default abuse. segment: a string column to stratify by. Raises InvalidInput for
    missing columns.
    """
    needed = ["actor_id", "ts", "arm", "stage", "action", "latency_us", "degraded", "abuse"]
    require(predictions, needed + ([segment] if segment else []), "the rollout's predictions")
    acted_on = ~pl.col("action").is_in(DELIVERED)
    unaimed = pl.col("abuse_unaimed" if "abuse_unaimed" in predictions.columns else "abuse")
    rows = predictions.filter(
        pl.col("stage").is_in(list(SHARES)) & pl.col("arm").is_in(["champion", "challenger"])
    ).select(
        "actor_id",
        pl.col("ts").dt.truncate(look).alias("look"),
        pl.col("stage").replace_strict({stage: i for i, stage in enumerate(SHARES)}).alias("stage"),
        (pl.col(segment).fill_null("unknown") if segment else pl.lit("all")).alias("segment"),
        (pl.col("arm") == "challenger").alias("challenger"),
        (unaimed.fill_null(False) & ~acted_on).alias(MISSED),
        ((~pl.col("abuse")).fill_null(False) & acted_on).alias(WRONG),
        (pl.col("abuse").fill_null(False) & acted_on).alias("caught"),
        (pl.col("latency_us") > latency_objective_ms * 1000).alias(SLOW),
        pl.col("degraded").alias(ERRORS),
        unaimed.fill_null(False).alias("abusive"),
        unaimed.is_not_null().alias(f"judged_{MISSED}"),
        pl.col("abuse").is_not_null().alias(f"judged_{WRONG}"),
    )
    if rows.is_empty():
        return ()
    return _strata(rows, _actor_looks(rows))


def _actor_looks(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per actor x look x stage with what happened to him there and earlier, in the order of time."""
    keys = ["actor_id", "look", "stage"]
    looks = (
        rows.group_by(keys)
        .agg(
            pl.col("segment").first(),
            pl.col("challenger").any(),
            *(pl.col(name).any() for name in GUARDRAILS),
            *(pl.col(f"judged_{name}").any() for name in JUDGED),
            pl.col("abusive").any(),
        )
        .sort(keys)
    )
    arm = ["actor_id", "challenger"]
    return looks.with_columns(
        (pl.int_range(pl.len()).over("actor_id") == 0).alias("entered"),
        (pl.int_range(pl.len()).over(arm) == 0).alias("joined"),
        *((pl.col(f"judged_{name}") & ~_earlier(f"judged_{name}")).alias(f"first_{name}") for name in JUDGED),
        pl.col("abusive").any().over(arm),
        *(pl.col(name).any().over(arm).alias(f"ever_{name}") for name in JUDGED),
        *(_earlier(name).alias(f"was_{name}") for name in GUARDRAILS),
    )


def _earlier(name: str) -> pl.Expr:
    """Whether `name` held for the actor in an earlier row."""
    return (pl.col(name).cast(pl.Int32).cum_sum().over("actor_id") - pl.col(name).cast(pl.Int32)) > 0


def _strata(rows: pl.DataFrame, looks: pl.DataFrame) -> tuple[Stratum, ...]:
    by = ["look", "stage", "segment", "challenger"]
    actors = looks.group_by(by).agg(
        pl.col("entered", "joined").sum(),
        (pl.col(f"first_{MISSED}") & pl.col("abusive")).sum().alias("abusive"),
        *((~pl.col(f"was_{name}")).sum().alias(f"units_{name}") for name in GUARDRAILS),
        *((pl.col(name) & ~pl.col(f"was_{name}")).sum().alias(f"harmed_{name}") for name in GUARDRAILS),
        *(pl.col(f"first_{name}").sum().alias(f"judged_{name}") for name in JUDGED),
        *(
            (pl.col(f"first_{name}") & pl.col(f"ever_{name}")).sum().alias(f"cohort_{name}")
            for name in JUDGED
        ),
    )
    caught = rows.group_by(by).agg(pl.col("caught").sum())
    counts: dict[tuple[Any, ...], dict[bool, dict[str, Any]]] = {}
    for frame in (actors, caught):
        for row in frame.iter_rows(named=True):
            key = (row["look"], row["stage"], row["segment"])
            counts.setdefault(key, {}).setdefault(row["challenger"], {}).update(row)
    return tuple(_stratum(key, counts[key]) for key in sorted(counts))


def _stratum(key: tuple[Any, ...], sides: Mapping[bool, Mapping[str, Any]]) -> Stratum:
    def arms(name: str) -> Arms:
        return Arms(*(int(sides.get(challenger, {}).get(name, 0)) for challenger in (False, True)))

    look, stage, segment = key
    return Stratum(
        look=look.isoformat(),
        stage=list(SHARES)[stage],
        segment=segment,
        entered=arms("entered"),
        joined=arms("joined"),
        harm={name: Tally(arms(f"units_{name}"), arms(f"harmed_{name}")) for name in GUARDRAILS},
        cohort={name: Tally(arms(f"judged_{name}"), arms(f"cohort_{name}")) for name in JUDGED},
        abusive=arms("abusive"),
        caught=arms("caught"),
    )


def compare_shadow(predictions: pl.DataFrame) -> ShadowComparison:
    """Compare the shadow's verdicts with those served for the same events, from prediction rows of both
    arms."""
    require(predictions, ["event_id", "arm", "action", "degraded"], "the shadow's predictions")
    acted_on = (~pl.col("action").is_in(DELIVERED)).alias("acted_on")
    shadow = predictions.filter(pl.col("arm") == "shadow").select("event_id", "degraded", acted_on)
    served = predictions.filter(pl.col("arm") == "champion").select("event_id", acted_on)
    pairs = shadow.unique("event_id").join(served.unique("event_id"), on="event_id", suffix="_served")
    same = (pairs["acted_on"] == pairs["acted_on_served"]).mean() if pairs.height else None
    champion = pairs["acted_on_served"].mean() if pairs.height else None
    return ShadowComparison(
        n=shadow["event_id"].n_unique(),
        agreement=None if same is None else float(same),  # type: ignore[arg-type]
        champion_action_rate=None if champion is None else float(champion),  # type: ignore[arg-type]
        challenger_action_rate=float(shadow["acted_on"].mean() or 0.0),  # type: ignore[arg-type]
        errors=int(shadow["degraded"].sum()),
    )


# ---- tests ---------------------------------------------------------------------------------------


def log_e_path(
    hits: npt.ArrayLike, events: npt.ArrayLike, share: npt.ArrayLike, ratios: Sequence[float]
) -> FloatArray:
    """Log e-value after each stratum, along the last axis, of "challengers have their fair share of events".

    hits: the challenger's among `events`; share: of the units at risk that are challengers. All broadcast
    together.
    The mixture over `ratios` (equal weights) is over the whole path, so the evidence of many small strata
    adds up.
    """
    x, m, q = np.broadcast_arrays(*(np.asarray(a, dtype=np.float64) for a in (hits, events, share)))
    steps = [x * log(ratio) - m * np.log1p(q * (ratio - 1)) for ratio in ratios]
    paths = np.cumsum(np.stack(steps), axis=-1)
    return np.logaddexp.reduce(paths, axis=0) - log(len(ratios))


def harm_evidence(strata: Sequence[Stratum], guardrail: str, label_error: float = 0.0) -> float:
    """E-value against "the challenger does no harm on this guardrail"; 1 where there is nothing to see.

    label_error: share of abusive messages that people judge benign (see `expected_share`).
    """
    seen = [stratum for stratum in strata if sum(stratum.harm.get(guardrail, Tally()).units)]
    if not seen:
        return 1.0
    tallies = [stratum.harm[guardrail] for stratum in seen]
    hits = [tally.harmed.challenger for tally in tallies]
    events = [sum(tally.harmed) for tally in tallies]
    error = label_error if guardrail == WRONG else 0.0
    share = [expected_share(stratum, guardrail, error) for stratum in seen]
    return exp(min(float(log_e_path(hits, events, share, HARM_RATIOS)[-1]), 700))


def expected_share(stratum: Stratum, guardrail: str, label_error: float) -> float:
    """The challenger's share of a stratum's harmed units when it does no harm: its share of units at risk.

    People who judge err: of n abusive messages acted on, about label_error * n come back as "benign". A
    challenger that catches more abuse is shown more of those, and would be rolled back for being better. They
    are expected where the abuse was caught, the rest where the units are; the larger share of the two counts,
    so that the correction only ever makes the test more careful.
    """
    tally = stratum.harm[guardrail]
    share = tally.units.challenger / sum(tally.units)
    noise = misjudged(stratum, label_error)
    if not sum(noise):
        return share
    rest = max(sum(tally.harmed) - sum(noise), 0.0)
    return max(share, (share * rest + noise[1]) / (rest + sum(noise)))


def misjudged(stratum: Stratum, label_error: float) -> tuple[float, float]:
    """Abusive messages acted on in the stratum that are expected to have been judged benign, by arm."""
    odds = label_error / (1 - label_error)
    return odds * stratum.caught.champion, odds * stratum.caught.challenger


def mismatch_evidence(strata: Sequence[Stratum]) -> float:
    """E-value against "newly seen actors were split as the stage says"."""
    if not strata:
        return 1.0
    hits = [stratum.entered.challenger for stratum in strata]
    events = [sum(stratum.entered) for stratum in strata]
    share = [SHARES[stratum.stage] for stratum in strata]
    return exp(min(float(log_e_path(hits, events, share, MISMATCH_RATIOS)[-1]), 700))


@dataclass(frozen=True)
class RiskDifference:
    """Challenger's risk less the champion's among judged actors, stratified (Mantel-Haenszel weights).

    upper: upper confidence bound; margin: what it must stay at or below; judged: actors by arm.
    """

    difference: float | None
    upper: float | None
    margin: float
    judged: Arms

    @property
    def shown(self) -> bool:
        """Whether the challenger has been shown to be no worse; lack of evidence shows nothing."""
        return self.upper is not None and self.upper <= self.margin


def risk_difference(strata: Sequence[Stratum], guardrail: str, limits: Limits) -> RiskDifference:
    """Estimate the risk difference of a per-actor guardrail, less what judges' errors are expected to add.

    The variance uses each arm's pooled risk with one event and two actors added, so that "no event in few
    actors" is not mistaken for certainty. The bound is for one look; the harm e-process guards all looks.
    """
    error = limits.label_error if guardrail == WRONG else 0.0
    tallies = [stratum.cohort.get(guardrail, Tally()) for stratum in strata]
    judged, harmed = _total([tally.units for tally in tallies]), _total([tally.harmed for tally in tallies])
    base = harmed.champion / judged.champion if judged.champion else 0.0
    margin = limits.margin.get(guardrail, 0.0) + limits.relative_margin * base
    both = [tally for tally in tallies if min(tally.units) > 0]
    if not both:
        return RiskDifference(None, None, margin, judged)
    noise = [misjudged(s, error) for s, tally in zip(strata, tallies, strict=True) if min(tally.units) > 0]
    n0, n1 = (np.array([tally.units[arm] for tally in both], dtype=np.float64) for arm in (0, 1))
    x0, x1 = (np.array([tally.harmed[arm] for tally in both], dtype=np.float64) for arm in (0, 1))
    weight = n0 * n1 / (n0 + n1)
    weight /= weight.sum()
    p0, p1 = ((harmed[arm] + 1) / (judged[arm] + 2) for arm in (0, 1))
    variance = p0 * (1 - p0) * (weight**2 / n0).sum() + p1 * (1 - p1) * (weight**2 / n1).sum()
    e0, e1 = (np.minimum([pair[arm] for pair in noise], x) for arm, x in ((0, x0), (1, x1)))
    difference = float((weight * ((x1 - e1) / n1 - (x0 - e0) / n0)).sum())
    return RiskDifference(difference, difference + limits.confidence_z * sqrt(variance), margin, judged)


def _total(counts: Sequence[Arms]) -> Arms:
    return Arms(sum(count.champion for count in counts), sum(count.challenger for count in counts))


# ---- the step ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """What to do next, and why. reason: a code for machines; message: a sentence for a person. `version` is
    that of the state it was decided on; `figures` is plain JSON."""

    action: StepAction
    to_stage: Stage
    reason: str
    message: str
    version: int
    candidate: str | None = None
    model_id: str | None = None
    page: bool = False
    pause_hours: float = 0.0
    figures: dict[str, Any] = field(default_factory=dict)


def next_step(state: RolloutState, evidence: Evidence, limits: Limits, now: datetime) -> Step:
    """Decide the next step. Pure: the same input gives the same step.

    Order matters: harm and mismatch roll back even while frozen, paused or half blind; only then is asked
    whether anything may move forward.
    """
    if state.challenger is None:
        return _start(state, evidence, now)
    figures = _figures(state, evidence, limits)
    broken = _broken(state, evidence, limits, figures)
    if broken:
        return _rollback(state, limits, *broken, figures)
    waiting = _frozen(evidence, now) or _stale(evidence, limits) or _baking(state, limits, now)
    if not waiting and state.stage == SHADOW:
        waiting = _shadow_open(state, evidence, limits)
    elif not waiting:
        waiting = _too_little(state, evidence, limits, figures)
    if not waiting and state.paused(now):
        waiting = "paused", f"promotion is paused until {state.promotion_paused_until:%Y-%m-%d %H:%M}", False
    if waiting:
        return _hold(state, limits, now, *waiting, figures)
    return _forward(state, evidence, figures)


def rollback(state: RolloutState, owner: str, why: str, limits: Limits | None = None) -> Step:
    """A person's rollback: drops the challenger, or with none under way puts the previous champion back.

    Raises Refused when there is nothing to go back to.
    """
    if state.challenger is None and state.previous is None:
        raise Refused("there is no challenger and no previous champion to go back to")
    return _rollback(state, limits or Limits(), "by_hand", f"{owner} asked for it: {why}", {})


def _start(state: RolloutState, evidence: Evidence, now: datetime) -> Step:
    waiting = evidence.waiting
    stay: dict[str, Any] = {"to_stage": state.stage, "version": state.version}
    if waiting is None:
        return Step("none", reason="no_candidate", message="No candidate waits for a rollout.", **stay)
    name = waiting.candidate
    stay |= {"candidate": name, "model_id": waiting.model_id}
    if name in state.blocked:
        message = f"{name} is blocked: {state.blocked[name]}."
        return Step("none", reason="blocked", message=message, **stay)
    if not waiting.gate_passed:
        message = f"{name} did not pass its gate: {waiting.gate_reason or 'no verdict'}."
        return Step("none", reason="gate_failed", message=message, **stay)
    if frozen := _frozen(evidence, now):
        return Step("hold", reason=frozen[0], message=f"{name} waits: {frozen[1]}.", **stay)
    message = f"{name} scores in shadow beside {state.champion or 'nothing (first model)'}."
    return Step("start_shadow", reason="gate_passed", message=message, **stay | {"to_stage": SHADOW})


def _figures(state: RolloutState, evidence: Evidence, limits: Limits) -> dict[str, Any]:
    """Every figure a step rests on, as JSON: what the log keeps and a person reads."""
    if state.stage == SHADOW:
        return {"shadow": asdict(evidence.shadow) if evidence.shadow else None}
    strata = evidence.strata
    needed = len(limits.guardrails) / limits.alpha
    found: dict[str, Any] = {
        "exposed": sum(stratum.joined.challenger for stratum in strata),
        "mismatch": {"e": mismatch_evidence(strata), "needed": 1 / limits.mismatch_alpha},
        "judged_abusive": sum(stratum.abusive.challenger for stratum in strata),
        "guardrails": {name: _guardrail(strata, name, needed, limits) for name in limits.guardrails},
    }
    return found


def _guardrail(strata: Sequence[Stratum], name: str, needed: float, limits: Limits) -> dict[str, Any]:
    tallies = [stratum.harm.get(name, Tally()) for stratum in strata]
    harmed = _total([tally.harmed for tally in tallies])
    # Actors come back look after look: their total is of distinct ones.
    total = _total([stratum.joined for stratum in strata])
    figures: dict[str, Any] = {
        "e": harm_evidence(strata, name, limits.label_error),
        "needed": needed,
        "champion": [harmed.champion, total.champion],
        "challenger": [harmed.challenger, total.challenger],
    }
    if name in JUDGED:
        found = risk_difference(strata, name, limits)
        figures |= {"difference": found.difference, "upper": found.upper, "margin": found.margin}
        figures |= {"judged": list(found.judged), "shown": found.shown}
    return figures


def _broken(
    state: RolloutState, evidence: Evidence, limits: Limits, figures: Mapping[str, Any]
) -> tuple[str, str] | None:
    if state.stage == SHADOW:
        return _shadow_broken(state, evidence.shadow, limits)
    mismatch = figures["mismatch"]
    if mismatch["e"] >= mismatch["needed"]:
        entered = _total([stratum.entered for stratum in evidence.strata])
        return "sample_ratio_mismatch", (
            f"{entered.challenger} of {sum(entered)} new actors met the challenger, not the share meant "
            f"(E={mismatch['e']:.3g})"
        )
    for name, found in figures["guardrails"].items():
        harmed, units = found["challenger"]
        if found["e"] >= found["needed"] and harmed >= limits.min_harmed.get(name, 1):
            before, control = found["champion"]
            return f"harm:{name}", (
                f"{harmed} of {units} {NOUNS.get(name, name)} under the challenger, {before} of {control} "
                f"under the champion (E={found['e']:.3g}, {found['needed']:g} is enough)"
            )
    return None


def _shadow_broken(
    state: RolloutState, shadow: ShadowComparison | None, limits: Limits
) -> tuple[str, str] | None:
    if shadow is None:
        return None
    if shadow.errors:
        return "shadow_errors", f"{shadow.errors} of {shadow.n} shadow scores were degraded"
    if shadow.n < limits.shadow_min_rows:
        return None
    rate, control = shadow.challenger_action_rate, shadow.champion_action_rate
    most = limits.max_bootstrap_action_rate
    if state.champion is not None and control is not None:
        most = max(control * limits.max_action_ratio, control + limits.action_slack)
    if rate > most:
        against = f" against {control:.1%}" if control is not None else ""
        sentence = f"it would act on {rate:.1%} of messages{against}, {most:.1%} is the most"
        return "shadow_action_rate", sentence
    return None


Waiting = tuple[str, str, bool]  # reason, sentence, whether it pages


def _frozen(evidence: Evidence, now: datetime) -> Waiting | None:
    stopped = [hold for hold in evidence.holds if hold.stops("promotion", now)]
    return ("frozen", stopped[0].sentence(), False) if stopped else None


def _stale(evidence: Evidence, limits: Limits) -> Waiting | None:
    age = evidence.telemetry_age_hours
    if age is None:
        return "stale_telemetry", "no predictions have arrived, nobody can tell how the challenger does", True
    if age > limits.stale_after_hours:
        return "stale_telemetry", f"the newest prediction is {age:.1f} h old", True
    return None


def _baking(state: RolloutState, limits: Limits, now: datetime) -> Waiting | None:
    least = limits.bake.get(state.stage, 0.0)
    spent = (now - state.stage_since).total_seconds() / 3600 if state.stage_since else 0.0
    if spent + 1e-9 < least:
        return "baking", f"{spent:.1f} of {least:g} h in {state.stage}", False
    return None


def _shadow_open(state: RolloutState, evidence: Evidence, limits: Limits) -> Waiting | None:
    scored = evidence.shadow.n if evidence.shadow else 0
    if scored < limits.shadow_min_rows:
        return "too_little_data", f"{scored} of {limits.shadow_min_rows} messages scored in shadow", False
    if state.champion is None and not evidence.approval:
        return "awaiting_approval", "a first model has no control: it waits for a bootstrap approval", False
    return None


def _too_little(
    state: RolloutState, evidence: Evidence, limits: Limits, figures: Mapping[str, Any]
) -> Waiting | None:
    """What evidence the stage still lacks; before 100% that includes being shown to be no worse."""
    least = limits.exposed.get(state.stage, 0)
    if figures["exposed"] < least:
        return "too_little_data", f"{figures['exposed']} of {least} actors exposed to the challenger", False
    if state.stage != list(SHARES)[-1]:
        return None
    found = {name: risk_difference(evidence.strata, name, limits) for name in JUDGED}
    for difference in found.values():
        if min(difference.judged) < limits.min_judged:
            judged = f"{difference.judged.challenger} and {difference.judged.champion}"
            return "too_little_data", f"{judged} judged actors in the arms, {limits.min_judged} needed", False
    if figures["judged_abusive"] < limits.min_judged_abuse:
        abusive = f"{figures['judged_abusive']} of {limits.min_judged_abuse}"
        return "too_little_data", f"{abusive} judged abusive actors met the challenger", False
    for name, guardrail in figures["guardrails"].items():
        if guardrail["e"] >= limits.suspicion:
            return "harm_suspected", f"harm is suspected in {name} (E={guardrail['e']:.3g})", False
    for name, difference in found.items():
        if not difference.shown:
            upper = f"{difference.upper:.1%}" if difference.upper is not None else "unknown"
            bound = f"{NOUNS[name]}: up to {upper} more than before, {difference.margin:.1%} allowed"
            return "not_shown_no_worse", bound, False
    return None


def _hold(
    state: RolloutState,
    limits: Limits,
    now: datetime,
    reason: str,
    sentence: str,
    page: bool,
    figures: dict[str, Any],
) -> Step:
    stalled = state.stage_since and (now - state.stage_since).total_seconds() / 3600 > limits.stall_hours
    if stalled:
        sentence += f"; it has been in {state.stage} since {state.stage_since:%Y-%m-%d %H:%M}"
    message = f"{state.candidate} stays in {state.stage}: {sentence}."
    return _step(state, "hold", state.stage, reason, message, figures, page=page or bool(stalled))


def _rollback(
    state: RolloutState, limits: Limits, reason: str, sentence: str, figures: dict[str, Any]
) -> Step:
    name = state.candidate if state.challenger else state.champion_candidate
    back_to = state.champion if state.challenger else state.previous
    message = f"{name} is rolled back to {back_to or 'no model'}: {sentence}."
    step = _step(state, "rollback", LIVE if back_to else NONE, reason, message, figures, page=True)
    return replace(step, candidate=name, pause_hours=limits.pause_hours)


def _forward(state: RolloutState, evidence: Evidence, figures: dict[str, Any]) -> Step:
    if state.stage == SHADOW and state.champion is None:
        message = f"{state.candidate} goes live as the first model, approved by {evidence.approval}."
        return _step(state, "promote", LIVE, "bootstrap_approved", message, figures)
    to_stage = ORDER[ORDER.index(state.stage) + 1]
    if to_stage == LIVE:
        message = f"{state.candidate} is live: shown to be no worse than {state.champion_candidate}."
        return _step(state, "promote", LIVE, "shown_no_worse", message, figures)
    message = f"{state.candidate} goes from {state.stage} to {to_stage}: no harm seen."
    return _step(state, "advance", to_stage, "no_harm_seen", message, figures)


def _step(
    state: RolloutState,
    action: StepAction,
    to_stage: Stage,
    reason: str,
    message: str,
    figures: dict[str, Any],
    page: bool = False,
) -> Step:
    ids: dict[str, Any] = {"candidate": state.candidate, "model_id": state.challenger}
    return Step(action, to_stage, reason, message, state.version, page=page, figures=figures, **ids)


# ---- the new state -------------------------------------------------------------------------------


def apply(state: RolloutState, step: Step, now: datetime) -> RolloutState:
    """The state after `step`; version + 1 for every step that moves something, the same state for hold and
    none.

    Raises Refused when the step was decided on another version, or would start a blocked candidate.
    """
    if step.version != state.version:
        raise Refused(
            f"the step is for version {step.version}, the rollout is at {state.version}: decide again"
        )
    if step.action in ("hold", "none"):
        return state
    moved = replace(
        state,
        stage=step.to_stage,
        share=SHARES.get(step.to_stage, 0.0),
        stage_since=now,
        ramp_since=now if step.to_stage == next(iter(SHARES)) else state.ramp_since,
        version=state.version + 1,
        reason=step.reason,
        message=step.message,
        updated_at=now,
    )
    change = {"start_shadow": _started, "promote": _promoted, "rollback": _rolled_back}.get(step.action)
    return change(moved, step, now) if change else moved


def _started(moved: RolloutState, step: Step, now: datetime) -> RolloutState:
    if step.candidate is None or step.candidate in moved.blocked or moved.challenger is not None:
        raise Refused(f"{step.candidate} cannot start: it is blocked, or another rollout is under way")
    # Every rollout draws its own actors, else the same few would be the canaries of every candidate.
    salt = hashlib.sha256(f"{moved.salt}:{step.candidate}".encode()).hexdigest()[:16]
    return replace(moved, challenger=step.model_id, candidate=step.candidate, salt=salt, ramp_since=None)


def _promoted(moved: RolloutState, step: Step, now: datetime) -> RolloutState:
    return replace(
        moved,
        previous=moved.champion,
        previous_candidate=moved.champion_candidate,
        champion=moved.challenger,
        champion_candidate=moved.candidate,
        challenger=None,
        candidate=None,
        ramp_since=None,
    )


def _rolled_back(moved: RolloutState, step: Step, now: datetime) -> RolloutState:
    kept: dict[str, Any] = {
        "blocked": moved.blocked | ({step.candidate: step.message} if step.candidate else {}),
        # What a person stopped for longer stays stopped.
        "promotion_paused_until": max(
            now + timedelta(hours=step.pause_hours), moved.promotion_paused_until or now
        ),
        "ramp_since": None,
    }
    if moved.challenger is not None:
        return replace(moved, challenger=None, candidate=None, **kept)
    return replace(
        moved,
        champion=moved.previous,
        champion_candidate=moved.previous_candidate,
        previous=None,
        previous_candidate=None,
        **kept,
    )
