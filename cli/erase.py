"""`redqueen erase` and `redqueen retention`: what must go at once, and what goes with time."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from redqueen.clock import open_clock
from redqueen.errors import InvalidInput
from redqueen.settings import Settings
from redqueen.store import ObjectStore

out = Console(highlight=False)

OpenHome = Callable[[], tuple[Settings, ObjectStore]]


def mount(parent: typer.Typer, open_home: OpenHome) -> None:
    """Hang the commands on `parent`; they work on the home that `open_home` gives."""

    @parent.command()
    def erase(
        actor: Annotated[
            str | None, typer.Option(help="Everything this actor sent, and their name elsewhere.")
        ] = None,
        event: Annotated[str | None, typer.Option(help="One event, its labels and its traces.")] = None,
        yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    ) -> None:
        """Erase an actor or an event from every table, landed file, report and local folder. For good."""
        from redqueen.erasure import erase as run

        if (actor is None) == (event is None):
            raise InvalidInput("name what to erase: either --actor ID or --event ID")
        settings, store = open_home()
        kind, one = ("actor", actor) if actor is not None else ("event", event)
        if not yes:
            typer.confirm(f"Erase this {kind} from {settings.home} for good?", abort=True)
        now = open_clock(settings, store).now()
        report = run(
            store,
            settings,
            kind,
            str(one),
            now,
            getpass.getuser(),
            on_step=lambda step: out.print(f"… {step}"),
        )
        shown = Table("table", "rows gone", "under a pseudonym", "objects rewritten")
        touched = +report.objects + +report.removed
        for table in sorted(touched):
            counts = (report.removed[table], report.veiled[table], report.objects[table])
            shown.add_row(table, *(f"{n:,}" for n in counts))
        out.print(shown if touched else "Nothing of it is kept any more.")
        for key in report.unreadable:
            out.print(f"[yellow]cannot be read, look yourself:[/] {escape(key)}", soft_wrap=True)
        for candidate, model in report.models:
            out.print(f"[yellow]trained on it:[/] candidate {escape(candidate)}, model {escape(model)}")
        if report.models:
            out.print("Models are not retrained by themselves: launch a lap, or leave them; you decide.")
        out.print(
            f"{report.events:,} event(s) will be refused if they come again. A scoring service that is "
            "running still knows the last day by heart: restart it."
        )

    @parent.command()
    def retention(
        apply: Annotated[
            bool, typer.Option("--apply", help="Delete it; otherwise it is only shown.")
        ] = False,
    ) -> None:
        """How long each table is kept and why, and what is past its time."""
        from redqueen import retention as keeping

        settings, store = open_home()
        now = open_clock(settings, store).now()
        plan = keeping.plan(store, settings, now)
        counts = plan.counts() | _runs(settings, store, apply=apply)
        shown = Table("table", "days", "past it", "kept for use", "why")
        for rule in plan.rules:
            n, kept = counts.get(rule.table, 0), plan.kept_for_use.get(rule.table, 0)
            shown.add_row(rule.table, str(rule.days or "always"), f"{n:,}", f"{kept:,}", escape(rule.why))
        out.print(shown)
        for name in plan.undeclared:
            out.print(f"[yellow]no rule is about[/] {escape(name)}/: it stays")
        if apply:
            deleted = keeping.apply(store, settings, plan)
            out.print(f"Deleted {sum(deleted.values()):,} objects.")
        elif sum(counts.values()):
            out.print("Nothing was deleted: --apply does it, and the job `housekeeping` does it every day.")


def _runs(settings: Settings, store: ObjectStore, *, apply: bool) -> dict[str, int]:
    """How many of Dagster's runs are past their time (deleted if asked); nothing without a Dagster."""
    from dagster_project.instance import CONFIG_FILE
    from redqueen.retention import RUNS

    if not (settings.dagster_home / CONFIG_FILE).exists():
        return {}
    from dagster import DagsterInstance

    from assets.environment import Environment
    from assets.retention import plan_runs, purge_runs

    with DagsterInstance.from_config(str(settings.dagster_home)) as instance:
        env = Environment(home=str(settings.home))
        runs = plan_runs(instance, env, instance.all_asset_keys(), datetime.now(UTC))
        if apply:
            purge_runs(instance, runs)
    return {RUNS: len(runs)}
