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
            f"Encoder: {_encoder(spec)}. "
            f"Trained on {n['messages']} messages ({n['abusive']} abusive), "
            f"snapshot `{spec.snapshot or 'unnamed'}`, seed {spec.seed}.",
            "",
            f"## The newest messages, predicted from the older ones ({n['judged']}, the later half judged)",
            f"Recall where {spec.fpr_budget:.1%} of benign messages are acted on; "
            "misspelt: with 8% of characters changed; padded: between as many benign words.",
            "",
            "| model | recall | misspelt | padded | PR-AUC | ECE |",
            "|---|---|---|---|---|---|",
            *_models(newest, metrics["behaviour"]),
            "",
            f"## At its thresholds, on {n['held']} held messages",
            f"Recall {_with(held, 'recall')}, false-positive share {_with(held, 'fpr', 4)} "
            f"(budget {spec.fpr_budget}), ECE {_f(held['ece'])}.",
            "",
            "| policy | a miss costs | threshold | recall | false-positive share | PR-AUC | ECE | messages |",
            "|---|---|---|---|---|---|---|---|",
            *_policies(held["by_policy"], metrics),
            "",
            "A miss is priced in false actions. In brackets 95% intervals: of a threshold by bootstrap over "
            "near-duplicate groups, of a share by Clopper and Pearson on the effective number of messages.",
            "",
            "## What serving may use to answer sooner",
            *_shortcuts(metrics),
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


def _encoder(spec: TrainingSpec) -> str:
    if not spec.encodes:
        return "none"
    return "a pretrained one" if spec.encoder else "compact, trained from scratch"


def _models(newest: dict[str, Any], behaviour: bool) -> list[str]:
    used = [
        *(["encoder"] if "encoder" in newest else []),
        "linear",
        "markov",
        *(["trees"] if behaviour else []),
    ]
    labels = {
        "fusion": f"fusion ({', '.join(used)})",
        "text_only": "without behaviour",
        "no_encoder": "without the encoder",
        "linear": "linear baseline",
    }
    columns = ("recall", "recall_misspelt", "recall_padded", "pr_auc", "ece")
    return [_row(label, *(newest[name][c] for c in columns)) for name, label in labels.items()]


def _policies(by_policy: dict[str, Any], metrics: dict[str, Any]) -> list[str]:
    lines = []
    for name, figures in by_policy.items():
        threshold = {
            "threshold": metrics["thresholds"][name],
            "threshold_interval": metrics["threshold_intervals"][name],
        }
        told = [
            f"{metrics['miss_costs'][name]:g}",
            _with(threshold, "threshold"),
            _with(figures, "recall"),
            _with(figures, "fpr", 4),
            _f(figures["pr_auc"]),
            _f(figures["ece"]),
            str(figures["n"]),
        ]
        lines.append(f"| {name} | {' | '.join(told)} |")
    return lines


def _with(figures: dict[str, Any], name: str, digits: int = 3) -> str:
    """A figure with its interval: `0.912 (0.880 to 0.941)`."""
    if figures[name] is None:
        return "-"
    low, high = figures[f"{name}_interval"]
    return f"{figures[name]:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def _shortcuts(metrics: dict[str, Any]) -> list[str]:
    said = {"int8": "The encoder in int8", "cascade": "A first stage"}
    verdicts = metrics["shortcuts"]
    return [
        f"- {label}: {'yes' if verdicts[name]['passed'] else 'no'}, {verdicts[name]['why']}."
        for name, label in said.items()
    ]


def _row(label: str, *values: float | None) -> str:
    return f"| {label} | " + " | ".join(_f(v) for v in values) + " |"


def _f(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
