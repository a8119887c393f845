"""`redqueen features`: what the detectors know of a message besides its words. Declared in
`redqueen.features.declared`; nothing is computed here.
"""

from __future__ import annotations

import json
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from redqueen.features.declared import Feature

out = Console(highlight=False)


class Family(StrEnum):
    """What a feature is about."""

    text = "text"
    behaviour = "behaviour"
    graph = "graph"


FamilyOption = Annotated[Family | None, typer.Option("--family", help="Only this family.")]
JsonOption = Annotated[bool, typer.Option("--json", help="For programs.")]


def mount(parent: typer.Typer) -> None:
    """Hang the command on `parent`."""

    @parent.command()
    def features(family: FamilyOption = None, as_json: JsonOption = False) -> None:
        """List the features: what each says, what it costs, and what an abuser would give up to fake it."""
        from redqueen.features.declared import FEATURES, FEATURES_VERSION

        rows = [
            {
                "name": feature.name,
                "family": feature.family,
                "cost": feature.cost,
                "reads": _reads(feature),
                "sentence": feature.sentence,
                "fake": feature.fake,
                "needs_actor": feature.needs_actor,
            }
            for feature in FEATURES
            if family is None or feature.family == family.value
        ]
        if as_json:
            typer.echo(json.dumps({"version": FEATURES_VERSION, "features": rows}, indent=1))
            return
        _show(rows)
        out.print(f"{len(rows)} features of version {FEATURES_VERSION}; how to add one: docs/features.md")


def _reads(feature: Feature) -> str:
    """Key and window in two words each."""
    if feature.cost == "free":
        return "the event"
    if feature.cost == "snapshot":
        return f"{feature.value.of}, day's graph"  # type: ignore[union-attr]
    return ", ".join(dict.fromkeys(f"{one.key} {one.window.name}" for one in feature.aggregates))


def _show(rows: list[dict[str, Any]]) -> None:
    shown = Table("feature", "family", "cost", "reads", "what it says", "what faking it costs")
    for row in rows:
        cells = (row[key] for key in ("name", "family", "cost", "reads", "sentence", "fake"))
        shown.add_row(*(escape(cell) for cell in cells))
    out.print(shown)
