"""How much each report counts, judged anew every hour; what is held is shown here.

The statistics and the table are `redqueen.poisoning`; letting held labels count again is a person's word,
`redqueen labels release`.
"""

from datetime import datetime, timedelta

import polars as pl
from dagster import (
    AssetCheckResult,
    AssetCheckSeverity,
    AssetCheckSpec,
    AssetExecutionContext,
    MaterializeResult,
    MetadataValue,
    TableRecord,
)

from assets import expectations
from assets.common import hourly_asset
from assets.environment import Environment
from assets.ingest import events, labels
from assets.partitions import hours_of
from redqueen import poisoning, releases
from redqueen.tables import HOUR

GROUPS_SHOWN = 50


@hourly_asset(
    "labels",
    deps=[labels, events],
    kinds={"polars"},
    code_version="1",
    check_specs=[
        AssetCheckSpec(
            "labels_not_poisoned",
            asset="label_guard",
            description="No ring or burst of reports is held. Held labels train nothing; look at them.",
        ),
        *expectations.check_specs("label_guard", "what reports weigh", quality=False),
    ],
)
def label_guard(
    context: AssetExecutionContext, env: Environment, config: expectations.Showing
) -> MaterializeResult:
    """What users' reports weigh: rings and bursts of coordinated reports are held, newcomers weigh little.

    Held labels are kept and shown, and no model learns from them. If they are honest after all, release their
    group: `redqueen labels held`, then `redqueen labels release <group> --reason ...`.
    """
    hours = hours_of(context)
    judged = 0
    for hour in hours:
        found = poisoning.judge_hour(env.store, hour)
        judged = found.judged
    now = hours[-1] + HOUR
    last_words = releases.last_words(env.store, max(now, env.clock.now()))
    let_go = [target for target, word in last_words.items() if word.action == releases.RELEASE]
    verdicts = poisoning.mark_released(found.verdicts, let_go)
    held = verdicts.filter(pl.col("held") & ~pl.col("released"))
    counts = dict(verdicts.filter(~pl.col("held"))["reason"].value_counts().sort("reason").iter_rows())
    context.log.info(f"label_guard: {judged} reports judged, {held.height} held")
    groups = _groups(found.groups, last_words)
    shown, checks = expectations.judge(env, context, "guard", found.verdicts, config, asset="label_guard")
    return MaterializeResult(
        metadata={
            "dagster/partition_row_count": verdicts.height,
            "judged": judged,
            "held": held.height,
            "held_released": int((verdicts["held"] & verdicts["released"]).sum()),
            **{f"held_{reason}": int((held["reason"] == reason).sum()) for reason in ("ring", "burst")},
            **{f"less_{reason}": count for reason, count in counts.items()},
            # A table without rows would want a schema.
            **({"groups": MetadataValue.table(groups)} if groups else {}),
            **shown,
        },
        check_results=[_check(held, now), *checks],
    )


def _groups(groups: pl.DataFrame, last_words: dict[str, releases.Word]) -> list[TableRecord]:
    """A row a group; who they are is in no column."""
    return [
        TableRecord(
            {
                "group": row["group"],
                "reason": row["reason"],
                "members": row["members"],
                "labels": row["labels"],
                "first": f"{row['first']:%Y-%m-%d %H}h",
                "last": f"{row['last']:%Y-%m-%d %H}h",
                "state": poisoning.standing(row["group"], row["held"], last_words),
            }
        )
        for row in groups.head(GROUPS_SHOWN).iter_rows(named=True)
    ]


def _check(held: pl.DataFrame, now: datetime) -> AssetCheckResult:
    fresh = held.filter(pl.col("received_at") >= now - timedelta(hours=1)).height
    verdict = poisoning.headline(held, fresh)
    return AssetCheckResult(
        check_name="labels_not_poisoned",
        passed=not held.height,
        severity=AssetCheckSeverity.WARN,
        description=verdict,
        metadata={"verdict": verdict, "held": held.height, "new this hour": fresh},
    )
