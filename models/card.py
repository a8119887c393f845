"""The model card: what a person should know before trusting a bundle. Prose from figures; deterministic."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from models.train import TrainingSpec


def text(spec: TrainingSpec, metrics: dict[str, Any]) -> str:
    """Markdown for `model_card.md`."""
    newest, n = metrics["newest"], metrics["n"]
    held = metrics["held"][metrics["selected"]]
    return "\n".join(
        [
            "# Abuse detector",
            "",
            f"Scores messages for {', '.join(spec.policies)}. Serves the **{metrics['selected']}** model; "
            f"reads {_reads(spec, metrics)}.",
            f"Encoder: {'a pretrained one' if spec.encoder else 'compact, trained from scratch'}. "
            f"Trained on {n['messages']} messages ({n['abusive']} abusive), "
            f"snapshot `{spec.snapshot or 'unnamed'}`, seed {spec.seed}.",
            "",
            f"## The newest messages, predicted from the older ones ({n['judged']}, the later half judged)",
            f"Recall where {spec.fpr_budget:.1%} of benign messages are acted on; "
            "misspelt: with 8% of characters changed.",
            "",
            "| model | recall | misspelt | PR-AUC | ECE |",
            "|---|---|---|---|---|",
            *_models(newest, metrics["behaviour"]),
            "",
            f"## At its thresholds, on {n['held']} held messages",
            f"Recall {_f(held['recall'])}, false-positive share {_f(held['fpr'])} "
            f"(budget {spec.fpr_budget}).",
            "",
            "| policy | threshold | recall | PR-AUC | ECE | messages |",
            "|---|---|---|---|---|---|",
            *_policies(held["by_policy"], metrics["thresholds"]),
            "",
            "## Limits",
            "Labels are people's votes, late and sometimes wrong. Abuse of a kind not in the snapshot is "
            "found by chance. Languages other than those in the snapshot were not measured. Meant to be "
            "retrained, not kept.",
            "",
        ]
    )


def _reads(spec: TrainingSpec, metrics: dict[str, Any]) -> str:
    if not metrics["behaviour"]:
        return "text alone: there was no sender, so behaviour is off"
    return f"{len(spec.feature_names)} features of behaviour, version {spec.features_version}"


def _models(newest: dict[str, Any], behaviour: bool) -> list[str]:
    labels = {
        "fusion": "fusion (encoder, linear, trees)" if behaviour else "fusion (encoder, linear)",
        "text_only": "without behaviour",
        "no_encoder": "without the encoder",
        "linear": "linear baseline",
    }
    columns = ("recall", "recall_misspelt", "pr_auc", "ece")
    return [_row(label, *(newest[name][c] for c in columns)) for name, label in labels.items()]


def _policies(by_policy: dict[str, Any], thresholds: dict[str, float]) -> list[str]:
    columns = ("recall", "pr_auc", "ece")
    return [
        _row(name, thresholds[name], *(figures[c] for c in columns)) + f" {figures['n']} |"
        for name, figures in by_policy.items()
    ]


def _row(label: str, *values: float | None) -> str:
    return f"| {label} | " + " | ".join(_f(v) for v in values) + " |"


def _f(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
