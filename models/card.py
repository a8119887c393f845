"""The model card: what a person should know before trusting a bundle. Prose from figures; deterministic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.train import TrainingSpec


def text(spec: TrainingSpec, metrics: dict[str, Any]) -> str:
    """Markdown for `model_card.md`."""
    newest, n = metrics["newest"], metrics["n"]
    names = {
        "fusion": "fusion (encoder, linear, trees)" if metrics["behaviour"] else "fusion (encoder, linear)",
        "text_only": "without behaviour",
        "no_encoder": "without the encoder",
        "linear": "linear baseline",
    }
    table = [
        f"| {label} | {_f(newest[k]['recall'])} | {_f(newest[k]['recall_misspelt'])} | {_f(newest[k]['pr_auc'])} | "
        f"{_f(newest[k]['ece'])} |"
        for k, label in names.items()
    ]
    held = metrics["held"][metrics["selected"]]
    policies = [
        f"| {name} | {metrics['thresholds'][name]:.4f} | {_f(v['recall'])} | {_f(v['pr_auc'])} | {_f(v['ece'])} | {v['n']} |"
        for name, v in held["by_policy"].items()
    ]
    behaviour = (
        f"{len(spec.feature_names)} features of behaviour, version {spec.features_version}"
        if metrics["behaviour"]
        else "text alone: there was no sender, so behaviour is off"
    )
    return "\n".join(
        [
            "# Abuse detector",
            "",
            f"Scores messages for {', '.join(spec.policies)}. Serves the **{metrics['selected']}** model; reads {behaviour}.",
            f"Encoder: {'a pretrained one' if spec.encoder else 'compact, trained from scratch'}. "
            f"Trained on {n['messages']} messages ({n['abusive']} abusive), snapshot `{spec.snapshot or 'unnamed'}`, "
            f"seed {spec.seed}.",
            "",
            f"## The newest messages, predicted from the older ones ({n['judged']}, the later half judged)",
            f"Recall where {spec.fpr_budget:.1%} of benign messages are acted on; misspelt: with 8% of characters changed.",
            "",
            "| model | recall | misspelt | PR-AUC | ECE |",
            "|---|---|---|---|---|",
            *table,
            "",
            f"## At its thresholds, on {n['held']} held messages",
            f"Recall {_f(held['recall'])}, false-positive share {_f(held['fpr'])} (budget {spec.fpr_budget}).",
            "",
            "| policy | threshold | recall | PR-AUC | ECE | messages |",
            "|---|---|---|---|---|---|",
            *policies,
            "",
            "## Limits",
            "Labels are people's votes, late and sometimes wrong. Abuse of a kind not in the snapshot is found by chance. "
            "Languages other than those in the snapshot were not measured. Meant to be retrained, not to be kept.",
            "",
        ]
    )


def _f(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
