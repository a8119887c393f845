"""`redqueen labels`: which reports are held, and a person's word on them. No logic beyond printing."""

from __future__ import annotations

import getpass
from collections.abc import Callable
from typing import Annotated

import polars as pl
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from redqueen import poisoning, releases
from redqueen.clock import open_clock
from redqueen.settings import Settings
from redqueen.store import ObjectStore

app = typer.Typer(help="Held labels: list them, release them, hold them again.", no_args_is_help=True)
out = Console(highlight=False)

Owner = Annotated[str | None, typer.Option(help="Who answers for it; default: you.")]


OpenHome = Callable[[], tuple[Settings, ObjectStore]]


def mount(parent: typer.Typer, open_home: OpenHome) -> None:
    """Hang the commands on `parent`; they work on the home that `open_home` gives."""

    @app.command()
    def held() -> None:
        """The rings and bursts that the label guard found, and what stands about each."""
        settings, store = open_home()
        now = open_clock(settings, store).now()
        verdicts = poisoning.current(store, now)
        last_words = releases.last_words(store, now)
        groups = poisoning.summary(verdicts)
        if groups.height:
            table = Table("group", "reason", "members", "labels", "first", "last", "age", "state")
            for row in groups.iter_rows(named=True):
                age = (now - row["first"]).total_seconds() / 3600
                state = poisoning.standing(row["group"], row["held"], last_words)
                table.add_row(
                    row["group"], row["reason"], str(row["members"]), str(row["labels"]),
                    f"{row['first']:%Y-%m-%d %H:%M}", f"{row['last']:%Y-%m-%d %H:%M}", f"{age:.0f} h",
                    escape(state),
                )  # fmt: skip
            out.print(table)
        else:
            out.print("No ring or burst is known: nothing is held.")
        for target in releases.released(store, now):
            if target not in groups["group"]:
                out.print(f"{escape(target)}: {escape(last_words[target].sentence())}")
        alone = verdicts.filter(pl.col("group").is_null())
        for reason, count in alone["reason"].value_counts().sort("reason").iter_rows():
            out.print(f"{count} reports weigh less than a vote: {reason}")

    def say(word: Callable[..., releases.Word], target: str, reason: str, owner: str | None) -> None:
        settings, store = open_home()
        now = open_clock(settings, store).now()
        said = word(store, target, by=owner or getpass.getuser(), reason=reason, now=now)
        out.print(f"{escape(target)} {escape(said.sentence())}")

    @app.command()
    def release(
        target: Annotated[str, typer.Argument(help="A group, as `held` lists it, or a label's id.")],
        reason: Annotated[str, typer.Option(help="Why; everybody sees it.")],
        owner: Owner = None,
    ) -> None:
        """Let a group's votes, or one label, count again from now on."""
        say(poisoning.release, target, reason, owner)
        out.print(f"`redqueen labels hold-again {escape(target)}` takes it back.")

    @app.command("hold-again")
    def hold_again(
        target: Annotated[str, typer.Argument(help="What was released: a group or a label's id.")],
        reason: Annotated[str, typer.Option(help="Why; everybody sees it.")] = "the release was a mistake",
        owner: Owner = None,
    ) -> None:
        """Take a release back from now on."""
        say(releases.hold_again, target, reason, owner)

    parent.add_typer(app, name="labels")
