"""What a run of the arena comes to: the figures in `demo.json`, a table, a picture and a verdict in words.
Reads the progress of a loop; decides nothing."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from arena.loop import Progress
from redqueen import state
from redqueen.store import ObjectStore

FINAL_HOURS = 12
MIN_BENIGN = 200
"""Benign messages that an hour's false-positive rate must rest on to be called the highest."""

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Story:
    """The figures of one run.

    `before`, `final` and `final_never` are mean shares over hours: from the first live hour to the change (or
    to the middle, without one), and over the last `FINAL_HOURS`.
    """

    scenario: str
    seed: int
    budget: float
    shock_at: str | None
    points: list[dict[str, Any]]
    triggers: list[dict[str, Any]]
    moves: list[dict[str, Any]]
    seconds: float

    @property
    def live(self) -> list[dict[str, Any]]:
        return [p for p in self.points if p["recall"] is not None]

    def mean(self, key: str, points: list[dict[str, Any]]) -> float | None:
        """Mean over hours of `key`, weighed by the hour's abusive (or, for fpr, benign) messages."""
        weight = "n_benign" if key == "fpr" else "n_abuse"
        kept = [p for p in points if p[key] is not None]
        total = sum(p[weight] for p in kept)
        return sum(p[key] * p[weight] for p in kept) / total if total else None

    @property
    def before(self) -> list[dict[str, Any]]:
        if self.shock_at is None:
            return self.live[: max(1, len(self.live) // 2)]
        return [p for p in self.live if p["at"] < self.shock_at]

    @property
    def final(self) -> list[dict[str, Any]]:
        return self.live[-FINAL_HOURS:]

    @property
    def retrains(self) -> list[dict[str, Any]]:
        """Laps that a sensor asked for after the first one."""
        return [t for t in self.triggers if t["sensor"] != "first_lap"]

    @property
    def promotions(self) -> list[dict[str, Any]]:
        return [m for m in self.moves if m["action"] == "promote"]

    def to_json(self) -> dict[str, Any]:
        """What `demo.json` holds."""
        after = [t["at"] for t in self.retrains if self.shock_at is None or t["at"] >= self.shock_at]
        promoted = [m["at"] for m in self.promotions[1:]]
        return {
            "scenario": self.scenario,
            "seed": self.seed,
            "fpr_budget": self.budget,
            "intervals": [p["at"] for p in self.points],
            "names": [p["name"] for p in self.points],
            "n_abuse": [p["n_abuse"] for p in self.points],
            "n_benign": [p["n_benign"] for p in self.points],
            "recall": [p["recall"] for p in self.points],
            "fpr": [p["fpr"] for p in self.points],
            "recall_never_retrained": [p["recall_never_retrained"] for p in self.points],
            "stage": [p["stage"] for p in self.points],
            "triggers": self.triggers,
            "rollout": self.moves,
            "attack_at": self.shock_at if self.scenario in ("attack",) else None,
            "change_at": self.shock_at,
            "first_trigger_at": after[0] if after else None,
            "promotion_at": promoted[0] if promoted else None,
            "recall_before": self.mean("recall", self.before),
            "recall_final": self.mean("recall", self.final),
            "recall_final_never_retrained": self.mean("recall_never_retrained", self.final),
            "fpr_highest": max((p["fpr"] for p in self.live if p["n_benign"] >= MIN_BENIGN), default=None),
            "seconds": round(self.seconds, 1),
        }


def collect(
    progress: Progress, store: ObjectStore, *, scenario: str, seed: int, budget: float,
    shock_at: datetime | None, seconds: float,
) -> Story:  # fmt: skip
    """The story of a loop that has ended (or stands still)."""
    moves = [
        {**entry["step"], "at": entry["state"]["updated_at"], "version": entry["state"]["version"]}
        for entry in state.rollout_log(store)
    ]
    at = shock_at.isoformat() if shock_at else None
    return Story(scenario, seed, budget, at, progress.points, progress.triggers, moves, seconds)


def write(story: Story, folder: Path) -> None:
    """Leave `demo.json` and `demo.png` in `folder`."""
    partial = folder / "demo.json.partial"
    partial.write_text(json.dumps(story.to_json(), indent=1))
    partial.replace(folder / "demo.json")
    draw(story, folder / "demo.png")


def draw(story: Story, path: Path) -> None:
    """Recall and false-positive rate by hour, what happened marked, beside the detector never retrained."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    x = range(len(story.points))
    top.plot(x, _line(story, "recall"), color="#0b6e4f", linewidth=2.2, label="Red Queen")
    top.plot(
        x, _line(story, "recall_never_retrained"), color="#b23a48", linewidth=1.6, linestyle="--",
        label="the first model, never retrained",
    )  # fmt: skip
    top.set_ylabel("recall at the operating point")
    top.set_ylim(0, 1.02)
    bottom.plot(
        x, [None if v is None else 100 * v for v in _line(story, "fpr")], color="#30343f", linewidth=1.4
    )
    bottom.axhline(100 * story.budget, color="#30343f", linestyle=":", linewidth=1)
    bottom.text(0, 100 * story.budget, " budget", va="bottom", fontsize=8)
    bottom.set_ylabel("false positives, %")
    bottom.set_ylim(
        0, max(2.2 * 100 * story.budget, 100 * max((p["fpr"] or 0 for p in story.points), default=0))
    )
    _mark(story, top)
    step = max(1, len(story.points) // 12)
    bottom.set_xticks(
        list(x)[::step], [p["name"] for p in story.points][::step], rotation=30, ha="right", fontsize=8
    )
    top.legend(loc="lower right", framealpha=0.9, edgecolor="none")
    top.set_title(f"{story.scenario}, seed {story.seed}: abuse caught, by hour", loc="left")
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(path)


def _line(story: Story, key: str) -> list[float | None]:
    return [p[key] for p in story.points]


def _mark(story: Story, axes: Any) -> None:
    """Vertical marks: the change, the trigger, the canary's steps, the promotion."""
    marks: list[tuple[str, str, str]] = []
    if story.shock_at:
        marks.append((story.shock_at, "attack" if story.scenario == "attack" else "change", "#b23a48"))
    marks += [(t["at"], f"{t['sensor']} trigger", "#e09f3e") for t in story.retrains]
    marks += [(m["at"], _move_name(m), "#0b6e4f") for m in story.moves if m["action"] not in ("hold", "none")]
    ats = [p["at"] for p in story.points]
    height: dict[int, int] = {}
    for at, name, colour in sorted(marks):
        where = sum(a < at for a in ats)
        if not ats or where > len(ats):
            continue
        level = height[where] = height.get(where, -1) + 1
        axes.axvline(where - 0.5, color=colour, linewidth=0.9, alpha=0.8)
        # Names run upwards along their line, one above the other where several things happen at once.
        axes.text(
            where - 0.45, 0.12 + 0.22 * level, name, fontsize=7.5, color=colour, rotation=90, va="bottom"
        )


def _move_name(move: dict[str, Any]) -> str:
    return {"promote": "live", "start_shadow": "shadow"}.get(
        move["action"], move.get("to_stage") or move["action"]
    )


def tell(story: Story, console: Console, home: Path) -> bool:
    """Print the table and the verdict; whether what the scenario promises held."""
    _print_table(story, console)
    _print_lines(story, console)
    promises = verdict(story)
    for held, sentence in promises:
        console.print(f"  [{'green' if held else 'red'}]{'yes' if held else 'NO '}[/]  {sentence}")
    console.print(
        f"\nPicture: {home / 'demo.png'}   Figures: {home / 'demo.json'}\n"
        "Why each lap was run: [bold]redqueen why[/].  "
        " Everything that just ran, in Dagster: [bold]make ui[/]"
    )
    return all(held for held, _ in promises)


def _print_table(story: Story, console: Console) -> None:
    table = Table(title=f"Scenario {story.scenario}, seed {story.seed}", title_justify="left")
    for column in ("hour", "abuse", "recall", "never retrained", "false pos.", "stage", "what happened"):
        table.add_column(column, justify="left" if column in ("hour", "stage", "what happened") else "right")
    for index, point in enumerate(story.points):
        notes = _notes(story, index)
        if notes or index % 4 == 0 or index == len(story.points) - 1:
            table.add_row(
                point["name"], str(point["n_abuse"]), _percent(point["recall"]),
                _percent(point["recall_never_retrained"]), _percent(point["fpr"]), point["stage"], notes,
            )  # fmt: skip
    console.print(table)


def _notes(story: Story, index: int) -> str:
    start = story.points[index]["at"]
    end = story.points[index + 1]["at"] if index + 1 < len(story.points) else "9999"
    notes = []
    if story.shock_at and start <= story.shock_at < end:
        notes.append("the attack begins" if story.scenario == "attack" else "the world changes")
    notes += [f"{t['sensor']} triggers a lap" for t in story.retrains if start < t["at"] <= end]
    notes += [
        _move_name(m) for m in story.moves if m["action"] not in ("hold", "none") and start < m["at"] <= end
    ]
    return ", ".join(notes)


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"


def _print_lines(story: Story, console: Console) -> None:
    for key, name in (("recall", "Red Queen      "), ("recall_never_retrained", "never retrained")):
        line = "".join(" " if v is None else BLOCKS[round(v * 8)] for v in _line(story, key))
        console.print(f"  {name} {line}")
    console.print()


def verdict(story: Story) -> list[tuple[bool, str]]:
    """What the scenario promises, and whether it held, with the figures."""
    facts = story.to_json()
    highest, budget = facts["fpr_highest"] or 0.0, story.budget
    promises = [
        (
            highest <= 2 * budget,
            f"highest false-positive rate of any hour {_percent(highest)}, "
            f"twice the budget is {_percent(2 * budget)}",
        ),
    ]
    before, final, never = (
        facts[k] for k in ("recall_before", "recall_final", "recall_final_never_retrained")
    )
    if story.scenario == "attack" and None not in (before, final, never):
        promises += [
            (bool(story.retrains), "a sensor started the second lap by itself"),
            (
                before - never >= 0.10,
                f"never retrained, recall falls from {_percent(before)} to {_percent(never)}",
            ),
            (
                final >= before - 0.05,
                f"retrained, recall is back at {_percent(final)} over the final {FINAL_HOURS} hours",
            ),
        ]
    if story.scenario == "quiet":
        promises.append((not story.retrains, f"retrains in quiet days: {len(story.retrains)}"))
    if story.scenario == "organic":
        blamed = [t for t in story.triggers if t["attribution"] == "attack"]
        promises.append(
            (not blamed, f"laps blamed on an attack: {len(blamed)}, laps in all: {len(story.triggers)}")
        )
    if story.scenario == "replay" and None not in (final, never):
        promises.append((final >= never, f"recall in the last periods {_percent(final)}, never retrained "
                         f"{_percent(never)}"))  # fmt: skip
    return promises
