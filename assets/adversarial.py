"""The candidate is attacked before anybody is exposed to it. Families, search and gate are in
`redqueen.attacks`.
"""

from typing import Any

import polars as pl
from dagster import (
    AssetCheckResult,
    AssetCheckSpec,
    AssetExecutionContext,
    MaterializeResult,
    MetadataValue,
    TableRecord,
    asset,
)

from assets.common import OWNERS, RETRY, picture
from assets.environment import Environment
from assets.partitions import candidates
from assets.training import contenders, evaluation, features_for, held_ids, training_set_key
from redqueen import attacks, state
from redqueen.errors import InvalidInput
from redqueen.store import to_parquet

SEED = 20_26


@asset(
    partitions_def=candidates,
    deps=[evaluation],
    group_name="adversarial",
    owners=OWNERS,
    kinds={"python"},
    tags={"stage": "adversarial"},
    code_version="1",
    retry_policy=RETRY,
    check_specs=[
        AssetCheckSpec(
            "adversarial_gate",
            asset="attack_report",
            blocking=True,
            description="Under attacks optimised against it, the candidate keeps enough recall, and no less "
            "than the champion. Deployment verifies this again by itself.",
        )
    ],
)
def attack_report(context: AssetExecutionContext, env: Environment) -> MaterializeResult:
    """Attacks optimised against this very candidate, at its fixed operating point, beside the champion's.

    Every rewriting that got through joins the hard examples and the next training set. If the gate fails, the
    candidate is rejected and the champion stays.
    """
    candidate = context.partition_key
    record = state.candidate(env.store, candidate)
    messages, unseen = _messages(env, candidate)
    reports = {}
    detectors, against = contenders(context, env, record["model_id"])
    for role, detector in detectors.items():
        reports[role] = attacks.attack(
            detector,
            messages["text"].to_list(),
            ids=messages["event_id"].to_list(),
            features=features_for(detector, messages),
            families=_families(env.settings.attack_families),
            seed=SEED,
            budget_queries=env.settings.attack_query_budget,
        )
        context.log.info(f"attacked the {role} with {reports[role].queries} queries")
    verdict = attacks.gate(reports["candidate"], reports.get("champion"))
    _keep(env, candidate, record["model_id"], reports, verdict)
    status = "attacked" if verdict.passed else "rejected"
    why = "held under attack" if verdict.passed else "; ".join(verdict.reasons)
    state.advance_candidate(env.store, candidate, status, env.clock.now(), why)
    return MaterializeResult(
        metadata={**_metadata(reports, unseen), "judged": against},
        check_results=[
            AssetCheckResult(
                check_name="adversarial_gate",
                passed=verdict.passed,
                metadata={
                    "verdict": "; ".join(verdict.reasons),
                    "mean_recall_under_attack": round(reports["candidate"].mean_recall, 4),
                    "worst_recall": round(reports["candidate"].worst.recall_after, 4),
                },
            )
        ],
    )


def _families(names: tuple[str, ...]) -> tuple[attacks.Family, ...]:
    """The attack families of the threat model; raises `InvalidInput` for a name that is none."""
    known = {family.name: family for family in attacks.FAMILIES}
    if unknown := sorted(set(names) - known.keys()):
        raise InvalidInput(f"RQ_ATTACK_FAMILIES names '{unknown[0]}': known are {', '.join(known)}")
    return tuple(known[name] for name in names)


def _messages(env: Environment, candidate: str) -> tuple[pl.DataFrame, int]:
    """Abusive messages to attack, one a near-duplicate group: unseen ones first, then the newest."""
    rows = pl.read_parquet(env.store.get(training_set_key(candidate)).data)
    abusive = (
        rows.filter(
            (pl.max_horizontal(f"p_{p}" for p in env.settings.policies) >= 0.5)
            & ~pl.col("event_id").str.starts_with("hard:")
            # A friend request has no words to rewrite.
            & (pl.col("text") != "")
        )
        .with_columns(unseen=pl.col("event_id").is_in(held_ids(env, candidate)))
        .sort(["unseen", "ts", "event_id"], descending=[True, True, False])
        .unique("group", keep="first", maintain_order=True)
        .head(env.settings.attack_messages)
    )
    return abusive, int(abusive["unseen"].sum())


def _keep(
    env: Environment,
    candidate: str,
    model_id: str,
    reports: dict[str, attacks.AttackReport],
    verdict: attacks.Verdict,
) -> None:
    """Write the report, and the rewritings that worked against either detector."""
    report = {
        "candidate": candidate,
        "model_id": model_id,
        "passed": verdict.passed,
        "reasons": verdict.reasons,
        "digest": reports["candidate"].digest(),
        "reports": {role: r.to_dict() for role, r in reports.items()},
    }
    env.store.put_json(f"evaluations/{model_id}/attack.json", report)
    survivors = {(s.id, s.text): s for r in reports.values() for s in r.survivors}
    rows = pl.DataFrame(
        [{"event_id": s.id, "family": s.family, "text": s.text} for s in survivors.values()],
        schema={"event_id": pl.String, "family": pl.String, "text": pl.String},
    )
    env.store.put(f"hard_examples/v={candidate}/part.parquet", to_parquet(rows.to_arrow()))


def _metadata(reports: dict[str, attacks.AttackReport], unseen: int) -> dict[str, Any]:
    ours = reports["candidate"]
    metadata: dict[str, Any] = {
        "messages": len(ours.ids),
        "messages_unseen": unseen,
        "recall_before": round(ours.recall_before, 4),
        "mean_recall_under_attack": round(ours.mean_recall, 4),
        "worst_family": ours.worst.name,
        "worst_recall": round(ours.worst.recall_after, 4),
        "hard_examples": len(ours.survivors),
        "families": MetadataValue.table([TableRecord(row) for row in ours.summary()["families"]]),
        "recall_by_family": picture(lambda axes: _draw(axes, reports)),
    }
    if "champion" in reports:
        rows = attacks.compare(reports["champion"], ours).summary()
        metadata["against_champion"] = MetadataValue.table([TableRecord(row) for row in rows])
    return metadata


def _draw(axes: Any, reports: dict[str, attacks.AttackReport]) -> None:
    colours = {"candidate": "#0b6e4f", "champion": "#b0b4bb"}
    names = [family.name for family in reports["candidate"].families]
    for shift, (role, report) in enumerate(sorted(reports.items())):
        places = [i + 0.38 * shift for i in range(len(names))]
        axes.barh(
            places, [f.recall_after for f in report.families], height=0.36, color=colours[role], label=role
        )
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlim(0, 1)
    axes.set_xlabel("recall under attack")
    axes.legend(frameon=False, fontsize=7)
