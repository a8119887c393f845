"""Which events a person should look at, and what the looking says about the detector.

A random slice is audited whatever the score, because labels that exist only where the detector looked
measure the detector with its own eyes. The rest of the reviewers' time goes where it teaches most. Asking
for reviews and estimating from the answers is here; what the reviewers answer comes back as labels of source
`audit` or `moderator`.

Selection
---------
Each reason draws by a salted hash of the event id, independently of the others, so the chance that an event
is asked for at all is that of the union: `inclusion` = 1 - (1 - a)(1 - c)(1 - s), with `a` the rate of the
audit, `c` the share drawn from its campaign and `s` the share drawn from its stratum (severe and acted on,
acted on, nearly acted on; 0 for any other). It holds for an audited event as well, which would have had the
other chances too; `propensity` is the chance for the reason that is written beside it.

Estimation
----------
Answered requests are weighed by 1 / `inclusion` (Horvitz and Thompson, JASA 1952; shares are ratios of two
such totals: Hájek 1971), so that what was aimed at abuse counts little and precision may use all of it. Each
share is part / (part + rest) of two totals over different events. A total's interval is Fay and Feuer's for a
weighted sum of Poisson counts (Statistics in Medicine 16, 1997): it holds where few or none were seen,
because one more event of the greatest weight may always have been missed. The two intervals make one of their
ratio by MOVER-R (Donner and Zou, Statistical Methods in Medical Research 21, 2012; Newcombe, same journal 25,
2016). They speak of what happened in the span, not of what might have: where all was reviewed nothing is left
open but the reviewers' own errors: a known share of them is corrected for (Rogan and Gladen, Am. J.
Epidemiology 107, 1978), and luck in their number widens the intervals by what a Poisson count would.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from redqueen.schema import ACTED_ON, polars_schema

AUDIT, UNCERTAIN, ACTED, NOVEL = "audit", "uncertain", "acted_on", "novel_campaign"
REASONS = (AUDIT, UNCERTAIN, ACTED, NOVEL)
AUDITED_KINDS = ("message", "dm")
PER_CAMPAIGN = 2
"""Requests that a campaign nobody has seen before is worth; its copies say the same."""
REVIEW_SCHEMA = polars_schema("review")
TAIL = 0.025
"""What a 95% interval leaves out on either side."""


# -- asking --------------------------------------------------------------------------------------------------


def _share(purpose: str, event_id: str, salt: str) -> float:
    """A number in [0, 1) that anyone with the salt computes alike, in any process and version, for ever."""
    digest = hashlib.blake2b(
        f"{purpose}\0{salt}\0{event_id}".encode("utf-8", "replace"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_audited(event_id: str, salt: str, rate: float) -> bool:
    """Whether an event belongs to the audit slice: decided by its id and the salt alone."""
    return _share(AUDIT, event_id, salt) < rate


def allotment(hour: int, asked: Mapping[int, int], *, per_day: int, per_hour: int) -> int:
    """How many requests an hour may make: a 24th of the day's budget, and what earlier hours left of theirs.

    Args:
        hour: of the day, 0 to 23.
        asked: requests made by the hours of the same day. Running an hour again does not count its former
            requests; those of later hours are respected, so that no order of runs exceeds the day's budget.
        per_day, per_hour: what reviewers can judge in a day, and in an hour whatever was left over.
    """
    earlier = sum(n for other, n in asked.items() if other < hour)
    others = sum(n for other, n in asked.items() if other != hour)
    return max(0, min(per_day * (hour + 1) // 24 - earlier, per_day - others, per_hour))


def review_requests(
    events: pl.DataFrame,
    predictions: pl.DataFrame | None,
    *,
    salt: str,
    audit_rate: float,
    budget: int,
    severe: Collection[str],
    campaigns: pl.DataFrame | None = None,
) -> pl.DataFrame:
    """What people should review of one window's events, sorted by event; the same call gives the same answer.

    Args:
        events: `event_id, kind`; only messages and direct messages are reviewed.
        predictions: what was served for them (`event_id, action, threshold_ratio, scores`), or None.
        salt: of all draws; secret, or an abuser could choose ids that are never audited.
        audit_rate: share of all events that is audited whatever the score.
        budget: how many requests this window may make. The audit slice comes first; where it alone is more
            than that, it is thinned, and its propensity says so.
        severe: policies that come first where they were acted on: they are never delivered to be measured,
            so review is the only look at them.
        campaigns: `event_id, campaign_id, novel`: `PER_CAMPAIGN` of each novel campaign are asked for, the
            largest campaigns first. None: nobody looks for campaigns.

    Returns:
        `event_id, reason, propensity, inclusion` (see the module): reason is audit, novel_campaign, acted_on
        or uncertain (a threshold ratio in [0.5, 1)).
    """
    if not events.height:
        return pl.DataFrame(schema=REVIEW_SCHEMA)
    eligible = events.filter(pl.col("kind").is_in(list(AUDITED_KINDS)))["event_id"].unique().to_list()
    audited, rate = _audited(eligible, salt, audit_rate, budget)
    drawn = _Drawn(salt, budget - len(audited), dict.fromkeys(audited, (AUDIT, rate)))
    for members in _novel(campaigns, set(eligible)):
        drawn.take(members, NOVEL, PER_CAMPAIGN)
    if predictions is not None and predictions.height:
        _aim(drawn, predictions.filter(pl.col("event_id").is_in(eligible)), severe)
    rows = [
        (event, reason, chance, rate + (1 - rate) * (1 - drawn.left_out.get(event, 1.0)))
        for event, (reason, chance) in drawn.requests.items()
    ]
    return pl.DataFrame(rows, schema=REVIEW_SCHEMA, orient="row").sort("event_id")


def _audited(eligible: Sequence[str], salt: str, rate: float, budget: int) -> tuple[list[str], float]:
    """The audit slice and the rate at which it was drawn."""
    shares = [(_share(AUDIT, event, salt), event) for event in eligible]
    chosen = [pair for pair in shares if pair[0] < rate]
    if len(chosen) > budget:
        # Flooding the platform must not cost the reviewers their day, nor the estimate its truth.
        chosen, rate = sorted(chosen)[:budget], budget / len(eligible)
    return [event for _, event in chosen], rate


@dataclass
class _Drawn:
    """What was asked for so far, and what may still be. `left_out`: the chance with which an event was
    passed over by every draw but the audit.
    """

    salt: str
    left: int
    requests: dict[str, tuple[str, float]]

    def __post_init__(self) -> None:
        self.left_out: dict[str, float] = {}

    def take(self, pool: Sequence[str], reason: str, count: int) -> None:
        """Draw up to `count` of the pool's events that nobody asked for yet, evenly among them."""
        free = [event for event in pool if event not in self.requests]
        count = min(count, len(free), self.left)
        chance = count / len(free) if free else float(self.left > 0)
        for event in sorted(free, key=lambda event: (_share(reason, event, self.salt), event))[:count]:
            self.requests[event] = (reason, chance)
        self.left -= count
        for event in pool:
            self.left_out[event] = self.left_out.get(event, 1.0) * (1 - chance)


def _novel(campaigns: pl.DataFrame | None, eligible: set[str]) -> list[list[str]]:
    """The eligible events of each novel campaign, large campaigns first; an event counts once."""
    if campaigns is None or campaigns.is_empty():
        return []
    members = (
        campaigns.filter(pl.col("novel") & pl.col("event_id").is_in(list(eligible)))
        .sort("event_id", "campaign_id")
        .unique("event_id", keep="first", maintain_order=True)
        .group_by("campaign_id", maintain_order=True)
        .agg("event_id")
        .sort(pl.col("event_id").list.len(), "campaign_id", descending=[True, False])
    )
    return [list(events) for events in members["event_id"].to_list()]


def _aim(drawn: _Drawn, predictions: pl.DataFrame, severe: Collection[str]) -> None:
    """Severe first, then the remaining budget halved between what was acted on and what nearly was."""
    scored = predictions.unique("event_id", keep="first", maintain_order=True)
    is_acted = pl.col("action").is_in(list(ACTED_ON))
    acted = scored.filter(is_acted)
    near = scored.filter(~is_acted & pl.col("threshold_ratio").is_between(0.5, 1.0, closed="left"))
    grave: list[str] = []
    others: list[str] = []
    for event, scores in acted.select("event_id", "scores").iter_rows():
        (grave if severe and top_policy(scores) in severe else others).append(event)
    drawn.take(grave, ACTED, len(grave))
    doubtful = near["event_id"].to_list()
    n_near = sum(event not in drawn.requests for event in doubtful)
    drawn.take(others, ACTED, max(drawn.left - n_near, (drawn.left + 1) // 2))
    drawn.take(doubtful, UNCERTAIN, drawn.left)


def top_policy(scores: object) -> str | None:
    """The policy with the greatest score, of a `scores` value as any reader gives it back."""
    # A map column reads back as a dict or as a list of key and value, depending on who wrote the file.
    pairs: list[tuple[str, float]] = []
    if isinstance(scores, dict):
        pairs = [(name, value) for name, value in scores.items() if value is not None]
    elif isinstance(scores, (list, tuple)):
        for entry in scores:
            name, value = (entry["key"], entry["value"]) if isinstance(entry, dict) else entry
            pairs.append((name, value))
    return max(pairs, key=lambda pair: pair[1])[0] if pairs else None


# -- estimating ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def width(self) -> float:
        return self.high - self.low


@dataclass(frozen=True)
class Rates:
    """The detector at its operating point; None where nothing was judged to say it with.

    recall: share of abuse that was acted on. precision: share of what was acted on that is abuse. prevalence:
    share of all messages that is abuse. fpr: share of benign messages that was acted on. Of one policy:
    abuse is what was judged to be of that policy, recall counts any action, and precision counts what was
    acted on with this policy's score the greatest.

    n_abuse, n_caught: judged events that are abuse, and that were acted on.
    """

    recall: Interval | None
    precision: Interval | None
    prevalence: Interval | None
    fpr: Interval | None
    n_abuse: int
    n_caught: int

    def figures(self, digits: int = 4) -> dict[str, float]:
        """`recall, recall_low, recall_high, precision, ...`, without those that could not be estimated."""
        found = {}
        for name in ("recall", "precision", "prevalence", "fpr"):
            interval: Interval | None = getattr(self, name)
            if interval is not None:
                found[name] = round(interval.value, digits)
                found[f"{name}_low"] = round(interval.low, digits)
                found[f"{name}_high"] = round(interval.high, digits)
        return found


@dataclass(frozen=True)
class Estimates:
    """What the judged requests of a span say: over all policies, and of each.

    requested: requests whose message a model answered; judged: those of them that were answered with abuse or
    benign.
    """

    requested: int
    judged: int
    overall: Rates
    policies: dict[str, Rates]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Cell:
    """Judged events of one kind: how many, the sums of their weights and of the squares, the greatest."""

    n: int = 0
    w: float = 0.0
    w2: float = 0.0
    most: float = 0.0

    def __add__(self, other: Cell) -> Cell:
        return Cell(self.n + other.n, self.w + other.w, self.w2 + other.w2, max(self.most, other.most))

    def without(self, part: Cell) -> Cell:
        """What is left when the events of `part` are taken out."""
        return Cell(self.n - part.n, max(0.0, self.w - part.w), max(0.0, self.w2 - part.w2), self.most)


CAUGHT, OPEN = "caught", "open"


@dataclass(frozen=True)
class Tally:
    """All that the estimates need of an hour; tallies of several hours add up.

    asked: the weights of the requests, by `CAUGHT` and `OPEN` (not acted on). cells: the judged events by
    name: `caught`, `open`; `caught abuse`, `open abuse`; and for each policy `caught abuse of <policy>`,
    `open abuse of <policy>`, `caught as <policy>`, `caught as <policy> rightly`.
    """

    requested: int = 0
    asked: dict[str, float] = field(default_factory=dict)
    cells: dict[str, Cell] = field(default_factory=dict)

    def __add__(self, other: Tally) -> Tally:
        asked = {k: self.asked.get(k, 0.0) + other.asked.get(k, 0.0) for k in self.asked | other.asked}
        cells = {k: self.cell(k) + other.cell(k) for k in self.cells | other.cells}
        return Tally(self.requested + other.requested, asked, cells)

    def cell(self, name: str) -> Cell:
        return self.cells.get(name, _EMPTY)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tally:
        cells = {name: Cell(**cell) for name, cell in data["cells"].items()}
        return cls(int(data["requested"]), dict(data["asked"]), cells)


_EMPTY = Cell()


def tally(
    requests: pl.DataFrame, predictions: pl.DataFrame, labels: pl.DataFrame, policies: Sequence[str]
) -> Tally:
    """Count what was asked and answered.

    Args:
        requests: table `review` of a span. Parts without `inclusion` count by their audits alone.
        predictions: `event_id, action, threshold_ratio` and, for precision by policy, `scores`; one row an
            event. What counts is whether the score reached the threshold: an audited event may have been let
            through for the sake of measuring.
        labels: the labels known. A request is answered by a label of source `audit`, or by `moderator` where
            it was made for another reason than the audit; "unsure" is no answer. An event is abuse if any
            answer says so.
        policies: those to count one by one.
    """
    seen = _asked_and_served(requests, predictions)
    if seen.is_empty():
        return Tally()
    weights = seen.group_by("caught").agg(pl.col("weight").sum())
    asked = {CAUGHT if caught else OPEN: float(weight) for caught, weight in weights.iter_rows()}
    if labels.is_empty():
        return Tally(seen.height, asked)
    judged = _judged(seen, labels)
    weight, caught = judged["weight"].to_numpy(), judged["caught"].to_numpy().astype(bool)
    named, top = judged["named"].to_list(), judged["top"].to_list()
    abuse = np.array([bool(policies_named) for policies_named in named], dtype=bool)
    chosen = {CAUGHT: caught, OPEN: ~caught, "caught abuse": caught & abuse, "open abuse": ~caught & abuse}
    for policy in policies:
        of_it = np.array([policy in policies_named for policies_named in named], dtype=bool)
        as_it = caught & np.array([name == policy for name in top], dtype=bool)
        chosen |= {
            f"caught abuse of {policy}": caught & of_it,
            f"open abuse of {policy}": ~caught & of_it,
            f"caught as {policy}": as_it,
            f"caught as {policy} rightly": as_it & of_it,
        }
    return Tally(
        seen.height, asked, {name: _cell(weight[mask]) for name, mask in chosen.items() if mask.any()}
    )


def estimate(counted: Tally, policies: Sequence[str], *, label_error: float = 0.0) -> Estimates:
    """Recall, precision, prevalence and false-positive rate, without the detector's own bias.

    Unanswered requests are taken to be like the answered ones of their kind (acted on or not).

    label_error: share of answers that are wrong, either way; a wrong "abuse" names any policy. Where abuse is
        rare most of what seems missed is benign messages misjudged, so the counts are corrected for it.
    """
    everything = counted.cell(CAUGHT) + counted.cell(OPEN)
    overall = _rates(counted, " abuse", CAUGHT, "caught abuse", _Errors(label_error, label_error))
    by_name = _Errors(label_error, label_error / max(1, len(policies)))
    by_policy = {
        policy: _rates(
            counted, f" abuse of {policy}", f"caught as {policy}", f"caught as {policy} rightly", by_name
        )
        for policy in policies
    }
    return Estimates(counted.requested, everything.n, overall, by_policy)


def _cell(weights: NDArray[np.float64]) -> Cell:
    return Cell(len(weights), float(weights.sum()), float((weights**2).sum()), float(weights.max()))


def _asked_and_served(requests: pl.DataFrame, predictions: pl.DataFrame) -> pl.DataFrame:
    """`event_id, reason, weight, caught, top` of the requests whose event was answered by a model."""
    schema = {
        "event_id": pl.String,
        "reason": pl.String,
        "weight": pl.Float64,
        "caught": pl.Boolean,
        "top": pl.String,
    }
    if requests.is_empty() or predictions.is_empty():
        return pl.DataFrame(schema=schema)
    chance, known = pl.col("propensity"), pl.col("reason") == AUDIT
    if "inclusion" in requests.columns:
        # Of a part written before there was an inclusion only the audit's chance is known.
        known = known | pl.col("inclusion").is_not_null()
        chance = pl.coalesce("inclusion", "propensity")
    asked = requests.filter(known).select("event_id", "reason", weight=1 / chance)
    caught = pl.coalesce(pl.col("threshold_ratio") >= 1.0, pl.col("action").is_in(list(ACTED_ON)))
    given = ["scores"] if "scores" in predictions.columns else []
    served = predictions.unique("event_id", keep="first", maintain_order=True)
    seen = asked.unique("event_id", keep="first", maintain_order=True).join(
        served.select("event_id", *given, caught=caught), on="event_id", how="inner"
    )
    scores = seen["scores"].to_list() if given else [None] * seen.height
    top = pl.Series("top", [top_policy(s) for s in scores], dtype=pl.String)
    return seen.with_columns(top).select(*schema)


def _judged(seen: pl.DataFrame, labels: pl.DataFrame) -> pl.DataFrame:
    """The answered ones, with `named`: the policies that an answer found broken."""
    by_audit = pl.col("source") == "audit"
    fitting = by_audit | ((pl.col("source") == "moderator") & (pl.col("reason") != AUDIT))
    truth = (
        labels.filter(pl.col("value").is_in(["abuse", "benign"]))
        .join(seen.select("event_id", "reason"), on="event_id", how="inner")
        .filter(fitting)
        .group_by("event_id")
        .agg(named=pl.col("policy").filter(pl.col("value") == "abuse").unique())
    )
    return seen.join(truth, on="event_id", how="inner").sort("event_id")


@dataclass(frozen=True)
class _Errors:
    """Chances of a wrong answer: abuse called benign, and benign called abuse."""

    missed: float
    invented: float

    def corrected(self, seen: Interval, whole: float, wrongly: float, chance: Interval) -> Interval:
        """How much of `whole` truly is of a kind, of which `seen` was called so.

        wrongly: the chance that what is of the other kind was called so. chance: by how much more the answers
        may have added to `seen` than is to be expected of them, with its interval.
        """
        if not (self.missed or self.invented):
            return seen
        below = math.hypot(seen.value - seen.low, chance.high)
        above = math.hypot(seen.high - seen.value, chance.low)
        low, value, high = (
            min(whole, max(0.0, (x - wrongly * whole) / (1 - self.missed - self.invented)))
            for x in (seen.value - below, seen.value, seen.value + above)
        )
        return Interval(value, low, high)

    def chance(self, abuse: list[tuple[float, Cell]], rest: list[tuple[float, Cell]]) -> Interval:
        """What luck may add to the weights called abuse, of cells that each count by a factor."""
        out, into = _crossing(self.missed, abuse), _crossing(self.invented, rest)
        return Interval(0.0, -math.hypot(into.low, out.high), math.hypot(into.high, out.low))


def _crossing(chance: float, cells: list[tuple[float, Cell]]) -> Interval:
    """The weights that are misjudged, against what is to be expected: those of a Poisson number."""
    from scipy.special import gammaincinv

    mean = chance * sum(f * cell.w for f, cell in cells)
    if mean <= NOTHING:
        return Interval(0.0, 0.0, 0.0)
    variance = chance * sum(f * f * cell.w2 for f, cell in cells)
    scale, count = variance / mean, mean**2 / variance
    low, high = float(gammaincinv(count, TAIL)), float(gammaincinv(count + 1, 1 - TAIL))
    return Interval(0.0, scale * low - mean, scale * high - mean)


def _rates(counted: Tally, abuse: str, caught_as: str, rightly: str, errors: _Errors) -> Rates:
    """The rates of abuse as the cells `caught<abuse>` and `open<abuse>` hold it, and precision of
    `caught_as`.
    """
    kinds = {kind: counted.cell(kind) for kind in (CAUGHT, OPEN)}
    # By how much each answer counts more because others of its kind were not given.
    factor = {kind: counted.asked[kind] / cell.w for kind, cell in kinds.items() if cell.w}
    bad = {kind: counted.cell(f"{kind}{abuse}") for kind in kinds}
    judged_as, right = counted.cell(caught_as), counted.cell(rightly)
    # One event that was not seen may weigh as much as any that could be.
    most = {kind: factor.get(kind, 1.0) * cell.most for kind, cell in kinds.items()}
    most = {kind: own or max(most.values()) for kind, own in most.items()}

    def split(parts: Mapping[str, tuple[Cell, Cell]]) -> tuple[Interval, Interval, Interval | None]:
        """Totals of abuse and of the rest, and the share of abuse, by kind from the cells called abuse and
        the cells they lie in.
        """
        called = [(factor.get(kind, 1.0), part) for kind, (part, _) in parts.items()]
        left = [(factor.get(kind, 1.0), whole.without(part)) for kind, (part, whole) in parts.items()]
        limit = max(most[kind] for kind in parts)
        abuse, rest = (
            _total(sum(f * cell.w for f, cell in cells), sum(f * f * cell.w2 for f, cell in cells), limit)
            for cells in (called, left)
        )
        luck, whole, share = errors.chance(called, left), abuse.value + rest.value, _share_of(abuse, rest)
        if share is not None:
            of_one = Interval(0.0, luck.low / whole, luck.high / whole)
            share = errors.corrected(share, 1.0, errors.invented, of_one)
        return (
            errors.corrected(abuse, whole, errors.invented, luck),
            errors.corrected(rest, whole, errors.missed, Interval(0.0, -luck.high, -luck.low)),
            share,
        )

    both = {kind: (bad[kind], kinds[kind]) for kind in kinds}
    caught, missed = split({CAUGHT: both[CAUGHT]}), split({OPEN: both[OPEN]})
    return Rates(
        recall=_share_of(caught[0], missed[0]),
        precision=split({CAUGHT: (right, judged_as)})[2],
        prevalence=split(both)[2],
        fpr=_share_of(caught[1], missed[1]),
        n_abuse=bad[CAUGHT].n + bad[OPEN].n,
        n_caught=judged_as.n,
    )


NOTHING = 1e-9
"""Sums of weights below this are rounding."""


def _total(w: float, w2: float, most: float) -> Interval:
    """A total of weights with its interval, from their sum, the sum of squares, and the greatest possible."""
    from scipy.special import gammaincinv

    # w (w - 1) is (1 - p) / p**2, what an event drawn with chance p adds to the variance: 0 where all are.
    y, v = (w, w2 - w) if w > NOTHING else (0.0, 0.0)
    low = v / y * float(gammaincinv(y**2 / v, TAIL)) if v > NOTHING else y
    y1, v1 = y + most - 1, v + most * (most - 1)
    high = v1 / y1 * float(gammaincinv(y1**2 / v1, 1 - TAIL)) if v1 > NOTHING else y
    return Interval(y, min(low, y), max(high, y))


def _share_of(part: Interval, rest: Interval) -> Interval | None:
    """part / (part + rest) of totals over different events; None where both are empty."""
    if not part.value + rest.value:
        return None
    value = part.value / (part.value + rest.value)
    # The ratio whose denominator was seen; the other one would divide by nothing.
    if part.value >= rest.value:
        low, high = _ratio(rest, part)
        return Interval(value, 1 / (1 + high), 1 / (1 + low))
    low, high = _ratio(part, rest)
    return Interval(value, low / (1 + low), 1 - 1 / (1 + high))


def _ratio(over: Interval, under: Interval) -> tuple[float, float]:
    """The interval of a ratio of two independent estimates by MOVER-R; `under.value` is above 0."""
    a, b = over.value, under.value
    below = over.low * (2 * a - over.low), under.high * (2 * b - under.high)
    above = over.high * (2 * a - over.high), under.low * (2 * b - under.low)
    # Written so that neither end divides by a difference near 0: (ab - sqrt) / c = x / (ab + sqrt).
    low = below[0] / (a * b + math.sqrt(max(0.0, (a * b) ** 2 - below[0] * below[1]))) if a else 0.0
    high = (
        (a * b + math.sqrt(max(0.0, (a * b) ** 2 - above[0] * above[1]))) / above[1]
        if above[1] > 0
        else math.inf
    )
    return low, high
