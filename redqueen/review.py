"""Which events a person should look at, and what the looking says about the detector.

A random slice is audited whatever the score, because labels that exist only where the detector looked
measure the detector with its own eyes. The rest of the reviewers' time goes where it teaches most. Asking
for reviews is here; what the reviewers answer comes back as labels of source `audit` or `moderator`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import polars as pl

from redqueen.schema import ACTED_ON

AUDIT, UNCERTAIN, ACTED = "audit", "uncertain", "acted_on"
AUDITED_KINDS = ("message", "dm")
REVIEW_SCHEMA: dict[str, pl.DataType] = {
    "event_id": pl.String(),
    "reason": pl.String(),
    "propensity": pl.Float64(),
}


def _share(purpose: str, event_id: str, salt: str) -> float:
    """A number in [0, 1) that anyone with the salt computes alike, in any process and version, for ever."""
    digest = hashlib.blake2b(
        f"{purpose}\0{salt}\0{event_id}".encode("utf-8", "replace"), digest_size=8
    ).digest()
    return int.from_bytes(digest, "big") / 2**64


def is_audited(event_id: str, salt: str, rate: float) -> bool:
    """Whether an event belongs to the audit slice: decided by its id and the salt alone."""
    return _share(AUDIT, event_id, salt) < rate


def review_requests(
    events: pl.DataFrame,
    predictions: pl.DataFrame | None,
    *,
    salt: str,
    audit_rate: float,
    budget: int,
    severe: Collection[str],
) -> pl.DataFrame:
    """What people should review of one window's events, sorted by event; the same call gives the same answer.

    Args:
        events: `event_id, kind`; only messages and direct messages are reviewed.
        predictions: what was served for them (`event_id, action, threshold_ratio, scores`), or None.
        salt: of the audit slice; secret, or an abuser could choose ids that are never audited.
        audit_rate: share of all events that is audited whatever the score. Never cut by the budget.
        budget: how many requests this window may make; the audit slice comes first, and what it leaves is
            aimed.
        severe: policies that come first where they were acted on: they are never delivered to be measured,
            so review is the only look at them.

    Returns:
        `event_id, reason, propensity`: reason is audit, acted_on or uncertain (a threshold ratio in [0.5,
        1)); propensity is the chance that the event had of being asked for, for its reason.
    """
    if not events.height:
        return pl.DataFrame(schema=REVIEW_SCHEMA)
    eligible = events.filter(pl.col("kind").is_in(list(AUDITED_KINDS)))["event_id"].unique()
    audited = [event for event in eligible if is_audited(event, salt, audit_rate)]
    parts = [_requests(audited, AUDIT, audit_rate)]
    if predictions is not None and predictions.height and budget > len(audited):
        rest = set(eligible) - set(audited)
        parts += _targeted(
            predictions.filter(pl.col("event_id").is_in(list(rest))), salt, budget - len(audited), severe
        )
    return pl.concat(parts).sort("event_id")


def _requests(chosen: Sequence[str], reason: str, propensity: float) -> pl.DataFrame:
    rows = [(event, reason, propensity) for event in chosen]
    return pl.DataFrame(rows, schema=REVIEW_SCHEMA, orient="row")


def _targeted(rest: pl.DataFrame, salt: str, budget: int, severe: Collection[str]) -> list[pl.DataFrame]:
    """Severe first, then the remaining budget halved between what was acted on and what nearly was."""
    scored = rest.unique("event_id", keep="first", maintain_order=True)
    acted = scored.filter(pl.col("action").is_in(list(ACTED_ON)))
    near = scored.filter(
        ~pl.col("action").is_in(list(ACTED_ON))
        & pl.col("threshold_ratio").is_between(0.5, 1.0, closed="left")
    )
    top = [_top_policy(scores) for scores in acted["scores"].to_list()] if severe else []
    grave = pl.Series([policy in severe for policy in top], dtype=pl.Boolean) if severe else pl.lit(False)
    first, others = acted.filter(grave), acted.filter(~grave)
    taken = min(budget, first.height)
    left = budget - taken
    half = max(left - near.height, (left + 1) // 2)
    n_others = min(others.height, half)
    n_near = min(near.height, left - n_others)
    pools = [(first, ACTED, taken), (others, ACTED, n_others), (near, UNCERTAIN, n_near)]
    return [_sample(pool["event_id"].to_list(), reason, count, salt) for pool, reason, count in pools]


def _top_policy(scores: object) -> str | None:
    # A map column reads back as a dict or as a list of key and value, depending on who wrote the file.
    pairs: list[tuple[str, float]] = []
    if isinstance(scores, dict):
        pairs = [(name, value) for name, value in scores.items() if value is not None]
    elif isinstance(scores, (list, tuple)):
        for entry in scores:
            name, value = (entry["key"], entry["value"]) if isinstance(entry, dict) else entry
            pairs.append((name, value))
    return max(pairs, key=lambda pair: pair[1])[0] if pairs else None


def _sample(pool: list[str], reason: str, count: int, salt: str) -> pl.DataFrame:
    chosen = sorted(pool, key=lambda event: (_share(reason, event, salt), event))[:count]
    return _requests(chosen, reason, count / len(pool) if pool else 1.0)


@dataclass(frozen=True)
class AuditedRates:
    """What the audit slice says of the detector at its operating point; None where it holds nothing to say
    it with.

    recall: share of abuse that was acted on; fpr: share of benign messages that was. Low and high are 95%
    Wilson bounds at the effective sample size. n_abuse and n_benign count audited events.
    """

    recall: float | None
    recall_low: float | None
    recall_high: float | None
    fpr: float | None
    fpr_low: float | None
    fpr_high: float | None
    n_abuse: int
    n_benign: int


def audited_rates(
    predictions: pl.DataFrame, labels: pl.DataFrame, requests: pl.DataFrame | None = None
) -> AuditedRates:
    """Recall and false-positive rate by inverse propensity, from labels of source `audit` alone.

    Args:
        predictions: `event_id, action, threshold_ratio`. What counts is whether the score reached the
            threshold: an audited event may have been let through for the sake of measuring.
        labels: the labels known; other sources than `audit` are left out, "unsure" too. An event is abusive
            if its audit named any policy.
        requests: `event_id, reason, propensity` where the audit rate changed over the span; None takes one
            rate.
    """
    if not predictions.height or not labels.height:
        return AuditedRates(None, None, None, None, None, None, 0, 0)
    audit = labels.filter((pl.col("source") == AUDIT) & pl.col("value").is_in(["abuse", "benign"]))
    truth = audit.group_by("event_id").agg(abusive=(pl.col("value") == "abuse").any())
    caught = pl.coalesce(pl.col("threshold_ratio") >= 1.0, pl.col("action").is_in(list(ACTED_ON)))
    served = predictions.select("event_id", caught=caught).unique(
        "event_id", keep="first", maintain_order=True
    )
    seen = served.join(truth, on="event_id", how="inner")
    if requests is None:
        seen = seen.with_columns(weight=pl.lit(1.0))
    else:
        rates = requests.filter(pl.col("reason") == AUDIT).select("event_id", weight=1 / pl.col("propensity"))
        seen = seen.join(rates.unique("event_id"), on="event_id", how="inner")
    abuse, benign = seen.filter("abusive"), seen.filter(~pl.col("abusive"))
    return AuditedRates(*_rate(abuse), *_rate(benign), n_abuse=abuse.height, n_benign=benign.height)


def _rate(rows: pl.DataFrame) -> tuple[float | None, float | None, float | None]:
    if not rows.height:
        return None, None, None
    weights = rows["weight"].to_numpy()
    share = float((weights * rows["caught"].to_numpy()).sum() / weights.sum())
    effective = float(weights.sum() ** 2 / (weights**2).sum())
    z = 1.96
    middle = (share + z * z / (2 * effective)) / (1 + z * z / effective)
    reach = (
        z / (1 + z * z / effective) * math.sqrt(share * (1 - share) / effective + z * z / (4 * effective**2))
    )
    return share, max(0.0, middle - reach), min(1.0, middle + reach)
