"""`redqueen models`: what there is, what one is, how two differ, mending and clearing up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from redqueen.clock import open_clock
from redqueen.errors import InvalidInput
from redqueen.settings import Settings
from redqueen.store import ObjectStore

app = typer.Typer(no_args_is_help=True, help="The models of this home: list, show, diff, repair, gc.")
out = Console(highlight=False)

OpenHome = Callable[[], tuple[Settings, ObjectStore]]


def mount(parent: typer.Typer, open_home: OpenHome) -> None:
    """Hang the commands on `parent`; they work on the home that `open_home` gives."""

    @app.command("list")
    def list_(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
        """Every model, newest first, with its role and the candidate that it came from."""
        from models import registry

        found = registry.entries(open_home()[1])
        if not found and not as_json:
            out.print("No model has been trained in this home yet.")
            return
        if as_json:
            typer.echo(json.dumps([vars(entry) for entry in found], indent=1))
            return
        candidate, made = (Column(title, overflow="fold") for title in ("candidate", "made"))
        table = Table(_whole("model"), _whole("role"), candidate, made, "serves", _whole("parent"))
        for e in found:
            when = e.created_at[:16] or f"[red]{escape(e.problem)}[/]"
            table.add_row(e.model_id, e.role, e.candidate or "-", when, e.selected, e.parent or "-")
        out.print(table)

    @app.command()
    def show(model: Annotated[str, typer.Argument(help="A model id, or how just one begins.")]) -> None:
        """One model: where it comes from, its thresholds, and its model card."""
        from models import registry
        from models.signing import trust_of

        settings, store = open_home()
        model = registry.resolve(store, model)
        found = registry.describe(store, model, settings.home / "cache", trust_of(settings))
        told = found.manifest
        for name in ("model_id", "selected", "created_at", "parent", "snapshot", "code_version"):
            out.print(f"[bold]{name:16}[/] {escape(str(getattr(told, name) or '-'))}")
        out.print(f"[bold]{'features':16}[/] {len(told.feature_names)}, version {told.features_version}")
        cuts = ", ".join(f"{policy} {cut:.3f}" for policy, cut in found.thresholds.items())
        out.print(f"[bold]{'thresholds':16}[/] {cuts}\n")
        out.print(found.card, markup=False)

    @app.command()
    def diff(
        before: Annotated[str, typer.Argument(help="A model id, or how just one begins.")],
        after: Annotated[str, typer.Argument(help="Another.")],
    ) -> None:
        """What changed from one model to another."""
        from models import registry
        from models.signing import trust_of

        settings, store = open_home()
        before, after = registry.resolve(store, before), registry.resolve(store, after)
        table = Table(Column("what", overflow="fold"), before, after)
        changes = registry.diff(store, before, after, settings.home / "cache", trust_of(settings))
        for change in changes:
            table.add_row(change.what, _short(change.before), _short(change.after))
        out.print(table)

    @app.command()
    def repair(
        model: Annotated[str, typer.Argument(help="The whole id of a model that the store holds damaged.")],
        source: Annotated[
            Path | None,
            typer.Option("--from", help="A whole copy of its folder. Default: the one in this home's cache."),
        ] = None,
    ) -> None:
        """Publish a model again from a whole copy: what `doctor` says is refused or missing is right then."""
        from models import bundle
        from models.signing import trust_of

        settings, store = open_home()
        folder = source or settings.home / "cache" / model
        trust = trust_of(settings)
        if source is None and not folder.is_dir():
            raise InvalidInput(f"this home's cache holds no copy of {model}: name one with --from")
        if (found := bundle.verify(folder, trust).model_id) != model:
            raise InvalidInput(f"{folder} holds {found}, not {model}")
        bundle.publish(store, folder, trust)
        out.print(f"{model} is whole in the store")

    @app.command()
    def gc(
        apply: Annotated[
            bool, typer.Option("--apply", help="Remove; without it only say what would go.")
        ] = False,
        keep_days: Annotated[
            float, typer.Option(min=0, max=36_500, help="Keep whatever was made within so many days.")
        ] = 30,
    ) -> None:
        """Remove models that nothing needs; never what is live, on its way, to go back to, or a parent."""
        from models import registry

        settings, store = open_home()
        now = open_clock(settings, store).now()
        found = (registry.collect if apply else registry.garbage)(store, now, keep_days)
        for model_id, why in sorted(found.kept.items()):
            out.print(f"keep    {model_id}  {escape(why)}")
        for model_id in (*found.models, *found.orphans):
            out.print(f"{'removed' if apply else 'would go'}  {model_id}")
        if not (found.models or found.orphans):
            out.print("nothing to remove")
        elif not apply:
            out.print("nothing was removed; --apply removes")

    parent.add_typer(app, name="models")


def _whole(title: str) -> Column:
    """A column of ids: half of one helps nobody."""
    return Column(title, no_wrap=True, overflow="fold", min_width=14)


def _short(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else escape(str(value)[:60])
