"""Are attackers moving? Figures of one window, counted per distinct actor, and the alarms they raise.

Belongs here: the figures, what each looked like in the champion's reference period (`Baseline`), and the
sequential detector over both. Does not belong here: whether to retrain (`redqueen.policy`), reading tables
(`assets.monitoring`).

Why actors: one spammer who sends a thousand messages is one piece of evidence. Why two label-based counts:
labels come hours late, so the share that a person reads is taken over a trailing stretch of events with the
labels known by now, while the detector is fed each actor exactly once, in the window in which his first
abuse label became known (`fresh`): overlapping windows would count the same evidence several times and void
the stated false-alarm rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from math import sqrt
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl

from redqueen.drift import require

EVASION = "evasion_rate"
AUDITED_EVASION = "audited_evasion_rate"
OBFUSCATION = "obfuscation_rate"
MASS = "threshold_mass"
CAUGHT = "caught"
OBFUSCATED_ABUSE = "obfuscated_abuse"
BAND_ABUSE = "band_abuse"
NEW_DOMAINS = "new_domain_rate"

DELIVERED = ("allow", "review")  # a message under review has been delivered meanwhile
Z95 = 1.959964
# Alternatives of the detector: the odds of the null rate times these, equally weighted.
ODDS = (1.5, 2.0, 3.0, 5.0, 10.0)


# ---- figures of a window -------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A share of distinct actors with its 95% Wilson interval, or `unknown` with the reason.

    hits of n actors; fresh_hits of fresh_n are those who enter the evidence in this window for the first time
    (equal to hits and n for figures that need no labels). An unknown figure keeps its counts, its value is
    None.
    """

    value: float | None
    n: int
    low: float | None
    high: float | None
    hits: float
    fresh_hits: int
    fresh_n: int
    status: Literal["ok", "unknown"] = "ok"
    reason: str = ""

    @property
    def known(self) -> bool:
        return self.status == "ok"


@dataclass(frozen=True)
class Measure:
    """How figures are measured.

    obfuscation: share of characters changed by canonicalising above which a message counts as obfuscated.
    band: [low, high) of score/threshold that is "just under". min_n: actors below which a figure is unknown.
    """

    obfuscation: float = 0.05
    band: tuple[float, float] = (0.3, 1.0)
    min_actors: int = 50
    min_labelled: int = 20
    min_confirming: int = 5


@dataclass(frozen=True)
class AdaptationFigures:
    """Every figure of one window: `window` is its start, `hours` its length."""

    window: datetime
    hours: float
    n_events: int
    n_actors: int
    figures: dict[str, Figure] = field(default_factory=dict)

    def __getitem__(self, name: str) -> Figure:
        return self.figures.get(name) or unknown(0, 0, "not measured on this stream")

    def to_dict(self) -> dict[str, Any]:
        return {
            "window": self.window.isoformat(),
            "hours": self.hours,
            "n_events": self.n_events,
            "n_actors": self.n_actors,
            "figures": {name: asdict(figure) for name, figure in self.figures.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AdaptationFigures:
        return cls(
            window=datetime.fromisoformat(data["window"]),
            hours=float(data["hours"]),
            n_events=int(data["n_events"]),
            n_actors=int(data["n_actors"]),
            figures={name: Figure(**figure) for name, figure in data["figures"].items()},
        )


def join_labels(
    predictions: pl.DataFrame, gold: pl.DataFrame, known_at: pl.DataFrame | None = None
) -> pl.DataFrame:
    """`predictions` plus abuse (bool, null where nobody has judged), audited (bool) and known_at (when we
    knew).

    gold: GOLD rows as of now; an event is abuse when any policy has p_abuse >= .5. Rows without votes are no
    labels. known_at: event_id, known_at (first `received_at` of its labels); default gold's
    `first_labeled_at`.
    Keeps every row of `predictions` exactly once.
    """
    require(gold, ["event_id", "p_abuse", "n_votes", "first_labeled_at", "sources"], "the gold labels")
    judged = (
        gold.filter(pl.col("n_votes") > 0)
        .group_by("event_id")
        .agg(
            (pl.col("p_abuse").max() >= 0.5).alias("abuse"),
            pl.col("sources").list.contains("audit").any().alias("audited"),
            pl.col("first_labeled_at").min().alias("known_at"),
        )
    )
    if known_at is not None:
        received = known_at.group_by("event_id").agg(pl.col("known_at").min())
        judged = judged.drop("known_at").join(received, on="event_id", how="left")
    joined = predictions.drop("abuse", "audited", "known_at", strict=False).join(
        judged, on="event_id", how="left", maintain_order="left"
    )
    return joined.with_columns(pl.col("audited").fill_null(False))


def window_figures(
    served: pl.DataFrame,
    labelled: pl.DataFrame | None = None,
    *,
    window: datetime,
    hours: float = 1.0,
    measure: Measure | None = None,
) -> AdaptationFigures:
    """Measure one window.

    served: the window's predictions, with abuse as from `join_labels` where known (else all null).
    labelled: the trailing predictions (say 4 windows, this one included) with the labels known by now, for
    the figures that need labels; default `served`. Shadow rows are ignored: they decided nothing.
    A bool column `new_domain` gives `new_domain_rate`. Raises InvalidInput when a column is missing.
    """
    how = measure or Measure()
    served, judged = _prepared(served), _prepared(served if labelled is None else labelled)
    end = window + timedelta(hours=hours)
    abusive = judged.filter(pl.col("abuse"))
    delivered = pl.col("action").is_in(DELIVERED)
    obfuscated = pl.col("obfuscation") > how.obfuscation
    actors = _per_actor(served, obfuscated, delivered, how)
    figures = {
        EVASION: _labelled_share(abusive, delivered, window, end, how.min_labelled),
        AUDITED_EVASION: _audited_evasion(abusive, delivered, how.min_labelled),
        OBFUSCATION: share(int(actors["obfuscated"].sum()), actors.height, how.min_actors),
        MASS: share(int(actors["just_under"].sum()), actors.height, how.min_actors),
        CAUGHT: share(int(actors["acted_on"].sum()), actors.height, how.min_actors),
        OBFUSCATED_ABUSE: _abuse_among(judged.filter(obfuscated), how.min_confirming),
        BAND_ABUSE: _abuse_among(
            judged.filter(pl.col("threshold_ratio").is_between(*how.band, closed="left")), how.min_confirming
        ),
    }
    if "new_domain" in served.columns:
        fresh = served.group_by("actor_id").agg(pl.col("new_domain").any())
        figures[NEW_DOMAINS] = share(int(fresh["new_domain"].sum()), fresh.height, how.min_actors)
    return AdaptationFigures(window, hours, served.height, actors.height, figures)


def share(hits: int, n: int, min_n: int, fresh: tuple[int, int] | None = None) -> Figure:
    """`hits` of `n` actors as a Figure; unknown when n < min_n. fresh: (hits, n) for the detector, default
    the same."""
    fresh_hits, fresh_n = (hits, n) if fresh is None else fresh
    if n < min_n:
        reason = f"{n} actors, needs {min_n}"
        return Figure(None, n, None, None, hits, fresh_hits, fresh_n, "unknown", reason)
    low, high = wilson(hits, n)
    return Figure(hits / n, n, low, high, hits, fresh_hits, fresh_n)


def unknown(hits: int, n: int, reason: str) -> Figure:
    """A figure that could not be measured; its counts are kept out of the detector."""
    return Figure(None, n, None, None, hits, 0, 0, "unknown", reason)


def wilson(hits: float, n: float, z: float = Z95) -> tuple[float, float]:
    """Wilson score interval of hits/n; (0, 1) for n = 0. n may be an effective sample size."""
    if n <= 0:
        return 0.0, 1.0
    p, spread = hits / n, z * z / n
    middle, half = p + spread / 2, z * sqrt(p * (1 - p) / n + spread / (4 * n))
    return max((middle - half) / (1 + spread), 0.0), min((middle + half) / (1 + spread), 1.0)


def _prepared(frame: pl.DataFrame) -> pl.DataFrame:
    needed = ["actor_id", "ts", "action", "obfuscation", "threshold_ratio", "propensity"]
    require(frame, needed, "the window's predictions")
    if "arm" in frame.columns:
        frame = frame.filter(pl.col("arm") != "shadow")
    defaults = {"abuse": pl.lit(None, pl.Boolean), "audited": pl.lit(False), "known_at": pl.col("ts")}
    return frame.with_columns(
        value.alias(name) for name, value in defaults.items() if name not in frame.columns
    )


def _per_actor(served: pl.DataFrame, obfuscated: pl.Expr, delivered: pl.Expr, how: Measure) -> pl.DataFrame:
    return served.group_by("actor_id").agg(
        obfuscated.any().alias("obfuscated"),
        pl.col("threshold_ratio").max().is_between(*how.band, closed="left").alias("just_under"),
        (~delivered).any().alias("acted_on"),
    )


def _labelled_share(
    abusive: pl.DataFrame, delivered: pl.Expr, start: datetime, end: datetime, min_n: int
) -> Figure:
    """Actors any of whose labelled abuse was delivered; fresh are those first known in [start, end)."""
    actors = abusive.group_by("actor_id").agg(
        delivered.any().alias("evaded"), pl.col("known_at").fill_null(pl.col("ts")).min().alias("first_known")
    )
    fresh = actors.filter(pl.col("first_known").is_between(start, end, closed="left"))
    return share(
        int(actors["evaded"].sum()), actors.height, min_n, (int(fresh["evaded"].sum()), fresh.height)
    )


def _audited_evasion(abusive: pl.DataFrame, delivered: pl.Expr, min_n: int) -> Figure:
    """Evasion in the audit slice, actors weighted by inverse propensity (Hájek), interval at Kish's
    effective n.

    Free of the detector's own bias: the slice was drawn whatever the score.
    """
    actors = (
        abusive.filter(pl.col("audited") & (pl.col("propensity") > 0))
        .group_by("actor_id")
        .agg(delivered.any().alias("evaded"), (1 / pl.col("propensity")).mean().alias("weight"))
    )
    plain = share(int(actors["evaded"].sum()), actors.height, min_n)
    if not plain.known:
        return plain
    weight, evaded = actors["weight"].to_numpy(), actors["evaded"].to_numpy()
    value = float((weight * evaded).sum() / weight.sum())
    effective = float(weight.sum() ** 2 / (weight**2).sum())
    low, high = wilson(value * effective, effective)
    return Figure(value, plain.n, low, high, plain.hits, plain.fresh_hits, plain.fresh_n)


def _abuse_among(rows: pl.DataFrame, min_n: int) -> Figure:
    """Of the distinct actors in `rows` that anyone has judged, the share judged abusive."""
    actors = (
        rows.filter(pl.col("abuse").is_not_null())
        .group_by("actor_id")
        .agg(pl.col("abuse").any().alias("bad"))
    )
    return share(int(actors["bad"].sum()), actors.height, min_n)


# ---- baselines -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlarmRule:
    """When a figure alarms: effect size, sample, persistence and sequential evidence must all agree.

    min_effect: rise over the baseline; min_n: actors in a window; k of the last m windows must show both.
    alpha: the detector's false-alarm rate, on average at most one alarm in 1/alpha windows (2,000 hours is
    83 days).
    tolerance, relative: how much worse than the baseline is still called "as before" (the larger counts).
    """

    figure: str
    noun: str
    min_effect: float
    tolerance: float
    relative: float = 0.25
    min_n: int = 20
    k: int = 2
    m: int = 3
    alpha: float = 1 / 2000


RULES: tuple[AlarmRule, ...] = (
    AlarmRule(EVASION, "evading actors", min_effect=0.10, tolerance=0.03, min_n=20),
    AlarmRule(OBFUSCATION, "actors obfuscating", min_effect=0.04, tolerance=0.02, min_n=50),
    AlarmRule(MASS, "actors just under a threshold", min_effect=0.04, tolerance=0.02, min_n=50),
)


@dataclass(frozen=True)
class Baseline:
    """A figure in the champion's reference period.

    mean: average of the windows' values; hits of n: fresh actors pooled; high: the 90th percentile of the
    windows' values (None under 12 windows), since an honest platform breathes by the hour.
    """

    figure: str
    mean: float
    hits: int
    n: int
    windows: int
    high: float | None = None

    def null_rate(self, rule: AlarmRule) -> float:
        """The largest rate still called "as before": upper bound of the baseline plus the rule's
        tolerance."""
        upper = wilson(self.hits, self.n, z=1.645)[1]
        if self.high is not None:
            upper = max(upper, self.high) if self._same_population else upper
        return min(upper + max(rule.tolerance, rule.relative * self.mean), 0.99)

    @property
    def _same_population(self) -> bool:
        # Trailing label-based shares lie above the fresh ones (an actor has more time to get one message
        # through).
        return self.figure not in (EVASION, AUDITED_EVASION)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Baseline:
        return cls(**data)


def baselines(
    history: Sequence[AdaptationFigures],
    rules: Sequence[AlarmRule] = RULES,
    *,
    min_windows: int = 3,
    floor: Mapping[str, float] | None = None,
    fallback: Mapping[str, Baseline] | None = None,
) -> dict[str, Baseline]:
    """What each figure looked like over `history`, the reference period of the present champion.

    floor: figure -> least mean, e.g. the benign obfuscation rate of the training data. fallback: the former
    champion's baselines, used for a figure known in fewer than `min_windows` windows; without one it is left
    out.
    """
    found = dict(fallback or {})
    for rule in rules:
        known = [window[rule.figure] for window in history if window[rule.figure].known]
        n = sum(figure.fresh_n for figure in known)
        if len(known) < min_windows or n < rule.min_n:
            continue
        values = [figure.value for figure in known if figure.value is not None]
        mean = max(float(np.mean(values)), (floor or {}).get(rule.figure, 0.0))
        found[rule.figure] = Baseline(
            figure=rule.figure,
            mean=mean,
            hits=max(
                sum(figure.fresh_hits for figure in known), round((floor or {}).get(rule.figure, 0.0) * n)
            ),
            n=n,
            windows=len(known),
            high=float(np.quantile(values, 0.9)) if len(values) >= 12 else None,
        )
    return found


# ---- alarms --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Alarm:
    """A figure that rose and stayed up. effect: value - baseline; persistence of `windows` showed it;
    evidence: the e-detector's value, an alarm from `needed` on; sentence: for a person."""

    figure: str
    value: float
    n: int
    baseline: float
    effect: float
    persistence: int
    windows: int
    evidence: float
    needed: float
    sentence: str

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Alarm:
        return cls(**data)


def alarms(
    history: Sequence[AdaptationFigures],
    baseline: Mapping[str, Baseline],
    rules: Sequence[AlarmRule] = RULES,
) -> tuple[Alarm, ...]:
    """The alarms standing at the end of `history` (this champion's windows after its reference, oldest
    first).

    Figures without a baseline raise nothing; `unmeasured` names them, so that silence is never read as calm.
    """
    found = (_alarm(history, baseline[rule.figure], rule) for rule in rules if rule.figure in baseline)
    return tuple(alarm for alarm in found if alarm is not None)


def unmeasured(
    history: Sequence[AdaptationFigures],
    baseline: Mapping[str, Baseline],
    rules: Sequence[AlarmRule] = RULES,
) -> dict[str, str]:
    """Figure -> why nobody can say whether it rose: no baseline yet, or unknown in the latest window."""
    reasons = {}
    for rule in rules:
        if rule.figure not in baseline:
            reasons[rule.figure] = "no baseline for this champion yet"
        elif not history or not history[-1][rule.figure].known:
            reasons[rule.figure] = history[-1][rule.figure].reason if history else "no window yet"
    return reasons


def _alarm(history: Sequence[AdaptationFigures], base: Baseline, rule: AlarmRule) -> Alarm | None:
    recent = [window[rule.figure] for window in history[-rule.m :]]
    raised = [figure for figure in recent if _raised(figure, base, rule)]
    if len(raised) < rule.k:
        return None
    evidence = float(evidence_path(history, base, rule)[-1])
    if evidence < 1 / rule.alpha:
        return None
    last = raised[-1]
    value = float(last.value or 0.0)
    sentence = (
        f"{rule.noun} {value:.0%} (n={last.n}) against {base.mean:.0%} before, "
        f"in {len(raised)} of {len(recent)} windows"
    )
    return Alarm(
        figure=rule.figure,
        value=value,
        n=last.n,
        baseline=base.mean,
        effect=value - base.mean,
        persistence=len(raised),
        windows=len(recent),
        evidence=min(evidence, 1e12),
        needed=1 / rule.alpha,
        sentence=sentence,
    )


def _raised(figure: Figure, base: Baseline, rule: AlarmRule) -> bool:
    return figure.value is not None and figure.n >= rule.min_n and figure.value - base.mean >= rule.min_effect


def evidence_path(
    history: Sequence[AdaptationFigures], base: Baseline, rule: AlarmRule
) -> npt.NDArray[np.float64]:
    """The Shiryaev-Roberts e-detector (Shin, Ramdas, Rinaldo 2023) after each window, shape [len(history)].

    M_t = mean over alternatives q of S_t(q), S_t(q) = (1 + S_{t-1}(q)) * L_t(q), where L_t is the binomial
    likelihood ratio of the window's fresh counts at q against the null rate p0. While the true rate is at
    most p0, E[L_t] <= 1, hence E[M_t] <= t: alarming at M >= 1/alpha has an average run length of at least
    1/alpha windows, and raises a false alarm within T windows with probability at most alpha * T.
    """
    counts = np.array(
        [(w[rule.figure].fresh_hits, w[rule.figure].fresh_n) for w in history], dtype=np.float64
    )
    if not len(counts):
        return np.zeros(0)
    p0 = base.null_rate(rule)
    odds = np.asarray(ODDS) * p0 / (1 - p0)
    q = odds / (1 + odds)
    hits, misses = counts[:, :1], counts[:, 1:] - counts[:, :1]
    log_ratio = hits * np.log(q / p0) + misses * np.log((1 - q) / (1 - p0))
    log_s, path = np.full(len(q), -np.inf), []
    for step in log_ratio:
        log_s = np.logaddexp(0.0, log_s) + step
        path.append(np.exp(np.minimum(log_s, 700)).mean())
    return np.asarray(path)
