"""`redqueen quarantine`: what was refused and why, and trying it again once the rules have changed."""

from __future__ import annotations

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

app = typer.Typer(no_args_is_help=True, help="Refused rows: list, retry.")
out = Console(highlight=False)

OpenHome = Callable[[], tuple[Settings, ObjectStore]]
TableOption = Annotated[str | None, typer.Option("--table", help="One table; default: all.")]
ReasonOption = Annotated[str | None, typer.Option("--reason", help="Only reasons that contain this.")]


def mount(parent: typer.Typer, open_home: OpenHome) -> None:
    """Hang the commands on `parent`; they work on the home that `open_home` gives."""

    @app.command("list")
    def list_(table: TableOption = None, reason: ReasonOption = None) -> None:
        """How many rows were refused, by table, hour and reason. Nothing of the rows is shown."""
        from redqueen import quarantine

        _, store = open_home()
        shown = Table("table", "hour", "reason", "rows")
        total = 0
        for name in [table] if table else quarantine.tables(store):
            for hour, why, rows in quarantine.listing(store, name, reason).iter_rows():
                shown.add_row(escape(name), hour, escape(why), f"{rows:,}")
                total += rows
        if not total:
            out.print("Nothing waits in quarantine.")
            return
        out.print(shown)
        out.print(
            f"{total:,} rows. Mend the rules or the mapping, then: redqueen quarantine retry --table ..."
        )

    @app.command()
    def retry(
        table: Annotated[str, typer.Option("--table", help="events or labels.")],
        hour: Annotated[
            str | None, typer.Option("--hour", help="Only this hour: 2026-01-03T14.", show_default=False)
        ] = None,
        reason: ReasonOption = None,
    ) -> None:
        """Land refused rows again that pass today's rules; the others stay, counted."""
        from redqueen import quarantine

        settings, store = open_home()
        now = open_clock(settings, store).now()
        found = quarantine.retry(
            store, table, now, policies=settings.policies, hour=_hour(hour), reason=reason
        )
        out.print(f"{found.tried:,} rows tried, {found.passed:,} pass now")
        for why, n in found.still.items():
            out.print(f"  {n:,} stay: {escape(why)}")
        if found.landed:
            out.print(f"landed as {found.landed}; they are taken in when this hour is over", soft_wrap=True)

    parent.add_typer(app, name="quarantine")


def _hour(told: str | None) -> datetime | None:
    if told is None:
        return None
    try:
        return datetime.strptime(told[:13], "%Y-%m-%dT%H").replace(tzinfo=UTC)
    except ValueError:
        raise InvalidInput(f"'{told}' is not an hour: write it like 2026-01-03T14") from None
