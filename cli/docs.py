"""`redqueen docs`: Great Expectations' Data Docs of one table, on request. What they hold is
`assets.expectations.docs`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from redqueen.clock import hour_of
from redqueen.errors import InvalidInput
from redqueen.settings import Settings
from redqueen.store import ObjectStore

OpenHome = Callable[[], tuple[Settings, ObjectStore]]


def mount(app: typer.Typer, open_home: OpenHome) -> None:
    """Add the command; the home that `open_home` gives has to be there."""

    @app.command("docs", help=docs.__doc__)
    @functools.wraps(docs)
    def of_home(*given: Any, **named: Any) -> None:
        open_home()
        docs(*given, **named)


def docs(
    table: Annotated[
        str, typer.Argument(help="events, labels, features, served, review, graph, gold, training_set, ...")
    ],
    hour: Annotated[
        str | None,
        typer.Option(help="The hour (UTC), as 2026-01-03T14; of the graph its day. Default: the latest."),
    ] = None,
    candidate: Annotated[
        str | None, typer.Option(help="For tables that are cut by candidate. Default: the latest.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="A directory to write to. Default: with the reports, which `ui` serves."),
    ] = None,
) -> None:
    """Write Great Expectations' Data Docs of a table, and say where they are. They hold no values of rows."""
    from assets.environment import Environment
    from assets.expectations import docs as data_docs

    env = Environment()
    subject = data_docs.find(env, table, hour=_hour(hour), candidate=candidate)
    if out is None:
        typer.echo(data_docs.publish(env, subject))
        return
    out.mkdir(parents=True, exist_ok=True)
    typer.echo(data_docs.write(subject, out).absolute())


def _hour(told: str | None) -> datetime | None:
    if told is None:
        return None
    try:
        return hour_of(datetime.fromisoformat(f"{told}:00:00+00:00" if len(told) == 13 else told))
    except ValueError:
        raise InvalidInput(f"'{told}' is no hour: write it as 2026-01-03T14") from None
