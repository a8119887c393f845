"""The three jobs. Their descriptions are sentences for a person who meets them in the UI at night."""

from __future__ import annotations

import dagster as dg

hour = dg.define_asset_job(
    "hour",
    selection=dg.AssetSelection.groups("ingest", "features", "monitoring")
    | dg.AssetSelection.assets("review_requests"),
    description="One hour of traffic: take in what arrived, check it, compute features, ask people to judge "
    "a sample, and write the hour's monitoring signals. Safe to run again at any time.",
)

lap = dg.define_asset_job(
    "lap",
    selection=dg.AssetSelection.groups("training", "adversarial")
    | dg.AssetSelection.assets("gold_labels", "candidate_bundle"),
    description="One lap of the race: labels as of now, a training set, a new detector, its evaluation, "
    "attacks against it, and a verdict. Nothing goes live here. Safe to run again: a killed training "
    "resumes.",
)

rollout = dg.define_asset_job(
    "rollout",
    selection=dg.AssetSelection.assets("rollout_step"),
    description="One step of a candidate towards live, or back: shadow, canary shares, live, rollback. "
    "Verifies gate, verdict and digest by itself, also when launched by hand.",
)

JOBS = [hour, lap, rollout]
