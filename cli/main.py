"""The `redqueen` command: what an engineer or on call does by hand. No logic beyond options and printing."""

from __future__ import annotations

import getpass
import json
import os
import sys
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cli import docs as docs_commands
from cli import erase as erase_commands
from cli import features as feature_commands
from cli import labels as label_commands
from cli import models as model_commands
from cli import quarantine as quarantine_commands
from redqueen import alerts, state
from redqueen.clock import open_clock
from redqueen.errors import InvalidInput, RedQueenError
from redqueen.policy import Hold
from redqueen.settings import Settings, load_settings
from redqueen.store import ObjectStore, open_store

app = typer.Typer(
    help="Red Queen keeps abuse detectors ahead of the people who attack them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


class Scenario(StrEnum):
    """What happens to the simulated platform."""

    attack = "attack"
    quiet = "quiet"
    organic = "organic"


class Window(StrEnum):
    """How much of a slow stream is played in one hour."""

    day = "day"
    week = "week"
    month = "month"


class Undated(StrEnum):
    """What becomes of rows without a date."""

    quarantine = "quarantine"
    spread = "spread"


class Scope(StrEnum):
    """What a freeze stops."""

    training = "training"
    promotion = "promotion"
    all = "all"


@app.callback()
def _home(
    home: Annotated[
        Path | None,
        typer.Option(help="The home directory; default RQ_HOME, then .redqueen.", show_default=False),
    ] = None,
) -> None:
    if home is not None:
        os.environ["RQ_HOME"] = str(home.resolve())


def _open(*, create: bool = False) -> tuple[Settings, ObjectStore]:
    """The settings and the store of this home; `create` one where there is none."""
    settings = load_settings()
    if not create and settings.store_url is None and not settings.home.exists():
        raise InvalidInput(
            f"there is no home at {settings.home}: `make demo` or `make ui` makes one, --home or RQ_HOME "
            "names another"
        )
    try:
        return settings, open_store(settings)
    except OSError as error:
        raise InvalidInput(
            f"{settings.home} cannot be a home ({error.strerror}): choose another with --home or RQ_HOME"
        ) from None


# -- running -------------------------------------------------------------------------------------------------

DataOption = Annotated[
    list[Path] | None, typer.Option("--data", help="Your own dated, labelled messages: files or directories.")
]
TextOption = Annotated[
    str | None, typer.Option(help="Text column(s), comma separated. Default: found by name.")
]
TimeOption = Annotated[str | None, typer.Option(help="Time column. Default: found by name.")]
LabelOption = Annotated[
    str | None, typer.Option(help="Label column (0/1, ham/spam, ...). Default: found by name.")
]
ActorOption = Annotated[
    str | None, typer.Option(help="Sender column. Without one behaviour features are off.")
]
PolicyOption = Annotated[str, typer.Option(help="The abuse class of the positive label.")]
WhereOption = Annotated[
    str | None, typer.Option(help="Keep only rows with these values: 'bulk=false,bulk_day=false'.")
]
WindowOption = Annotated[Window, typer.Option(help="Period of the stream that is played in one hour.")]
UndatedOption = Annotated[Undated, typer.Option(help="Rows without a date: to quarantine, or spread evenly.")]
SeedOption = Annotated[int, typer.Option(help="Any number; the same seed gives the same run.")]


@app.command()
def demo(
    scenario: Annotated[
        Scenario, typer.Option(help="What happens to the simulated platform.")
    ] = Scenario.attack,
    seed: SeedOption = 1,
    data: DataOption = None,
    text: TextOption = None,
    time: TimeOption = None,
    label: LabelOption = None,
    actor: ActorOption = None,
    policy: PolicyOption = "spam",
    where: WhereOption = None,
    window: WindowOption = Window.week,
    undated: UndatedOption = Undated.quarantine,
    feed: Annotated[
        bool, typer.Option("--feed", help="Only send traffic and labels to a running UI and service.")
    ] = False,
    hours: Annotated[int | None, typer.Option(help="With --feed: hours of traffic to send.")] = None,
    seconds_per_hour: Annotated[
        float, typer.Option(help="With --feed: how long a simulated hour lasts.")
    ] = 20.0,
    scale: Annotated[float, typer.Option(hidden=True, min=0.05, max=20)] = 1.0,
) -> None:
    """Run the whole lifecycle on a simulated platform, or on your own data."""
    from arena import demo as arena_demo

    settings = load_settings()
    if feed:
        from arena.feed import run_feed

        run_feed(settings, scenario.value, seed, hours, seconds_per_hour, out, scale=scale)
        return
    if data:
        from redqueen.importing import Columns

        columns = Columns(text=tuple(text.split(",")) if text else None, time=time, label=label, actor=actor)
        told = arena_demo.replay(
            settings.home, data, columns, policy=policy, where=where, window=window.value,
            undated=undated.value, seed=seed, console=out,
        )  # fmt: skip
    else:
        told = arena_demo.simulate(settings.home, scenario.value, seed, out)
    if not told:
        raise typer.Exit(1)


@app.command("import")
def import_(
    data: Annotated[list[Path], typer.Argument(help="Files or directories: Parquet, CSV, JSONL.")],
    text: TextOption = None,
    time: TimeOption = None,
    label: LabelOption = None,
    actor: ActorOption = None,
    policy: PolicyOption = "spam",
    where: WhereOption = None,
    window: WindowOption = Window.week,
    undated: UndatedOption = Undated.quarantine,
    seed: SeedOption = 1,
) -> None:
    """Turn dated, labelled messages into the tables `events` and `labels` of this home."""
    from arena import demo as arena_demo
    from redqueen.importing import Columns

    settings, _ = _open(create=True)
    columns = Columns(text=tuple(text.split(",")) if text else None, time=time, label=label, actor=actor)
    arena_demo.import_only(
        settings, data, columns, policy=policy, where=where, window=window.value, undated=undated.value,
        seed=seed, console=out,
    )  # fmt: skip


@app.command()
def ui(
    port: Annotated[int, typer.Option(help="Port of the web server.", min=0, max=65535)] = 3000,
    read_only: Annotated[
        bool, typer.Option("--read-only", help="No launches, no switches: for on call.")
    ] = False,
) -> None:
    """Open Dagster on this home: web server and daemon."""
    from dagster_project.instance import initialise
    from dagster_project.ui import serve_ui

    home = load_settings().home
    for line in initialise(home):
        out.print(line, soft_wrap=True)
    raise typer.Exit(serve_ui(home, port, read_only=read_only))


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.", min=0, max=65535)] = 8087,
) -> None:
    """Run the scoring service on this home."""
    from serving.app import serve as run

    settings = load_settings()
    if settings.store_url is None and not settings.home.exists():
        err.print(
            f"[yellow]there is no home at {escape(str(settings.home))}[/]: it begins empty, and every "
            "message is allowed until a model is live"
        )
    run(settings, host, port)


@app.command()
def score(
    message: Annotated[list[str], typer.Argument(help="Messages; '-' reads one a line from standard input.")],
) -> None:
    """Score messages with the live detector, by text alone, and show what would be done."""
    from models.detector import Detector
    from redqueen.actions import ActionRules, choose

    settings, store = _open()
    live = state.rollout_state(store).champion
    if live is None:
        raise RedQueenError(
            "no model is live in this home yet: run `make demo`, or `make ui` with its sensors on"
        )
    texts = [line.rstrip("\n") for line in sys.stdin] if message == ["-"] else message
    detector = Detector.of_home(settings, store, live)
    scores = detector.score(texts)
    actions = choose(scores, detector.thresholds, detector.policies, ActionRules.of(settings))
    table = Table("message", *detector.policies, "action")
    for words, row, action in zip(texts, scores, actions, strict=True):
        table.add_row(escape(words[:60]), *(f"{p:.3f}" for p in row), action)
    out.print(table)
    out.print(f"model {live}; a score at its threshold ({_thresholds(detector)}) is acted on")


def _thresholds(detector: Any) -> str:
    pairs = zip(detector.policies, detector.thresholds, strict=True)
    return ", ".join(f"{policy} {threshold:.3f}" for policy, threshold in pairs)


# -- reading -------------------------------------------------------------------------------------------------


@app.command()
def status(as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False) -> None:
    """What is live, what is on its way, what is frozen, what was last measured."""
    settings, store = _open()
    now = open_clock(settings, store).now()
    live, loop = state.rollout_state(store), state.loop_state(store, now)
    signals = store.list("signals/")
    last = store.get_json(signals[-1]) if signals else {}
    facts = {
        "now": now.isoformat(),
        "champion": live.champion,
        "challenger": live.challenger,
        "stage": live.stage,
        "message": live.message,
        "in_flight": loop.in_flight,
        "retrains_last_24h": loop.retrains_today,
        "holds": [hold.to_dict() for hold in loop.holds],
        "last_window": last.get("window"),
        "monitoring": last.get("health", "unknown"),
        "alarms": [alarm["sentence"] for alarm in last.get("alarms", ())],
        "alerts": alerts.latest(store, 5),
        "candidates": [
            {k: c.get(k) for k in ("candidate", "status", "reason")} for c in state.all_candidates(store)[-5:]
        ],
    }
    if as_json:
        typer.echo(json.dumps(facts, indent=1, default=str))
        return
    for name in (
        "now",
        "champion",
        "challenger",
        "stage",
        "message",
        "in_flight",
        "last_window",
        "monitoring",
    ):
        out.print(f"[bold]{name:12}[/] {escape(str(facts[name] or '-'))}")
    for hold in loop.holds:
        out.print(f"[yellow]frozen[/]       {escape(_hold(hold))}")
    for sentence in facts["alarms"]:
        out.print(f"[red]alarm[/]        {escape(sentence)}")
    for alert in facts["alerts"]:
        lost = ", [red]not delivered[/]" if alert["delivered"] is False else ""
        out.print(f"[red]alert[/]        {str(alert['at'])[:16]}{lost}  {escape(str(alert['message']))}")
    for c in facts["candidates"]:
        out.print(f"candidate    {c['candidate']}: {c['status']} ({escape(str(c['reason']))})")


def _hold(hold: Hold) -> str:
    return f"{hold.scope} by {hold.owner} until {hold.until:%Y-%m-%d %H:%M} UTC: {hold.reason}"


@app.command()
def why(
    candidate: Annotated[
        str | None, typer.Argument(help="A candidate; default: the latest decisions.")
    ] = None,
    limit: Annotated[int, typer.Option(help="How many decisions.")] = 10,
    everything: Annotated[bool, typer.Option("--all", help="Also decisions to do nothing.")] = False,
) -> None:
    """Why each lap was run, held back or refused, and what became of each candidate."""
    _, store = _open()
    if candidate is not None:
        _why_candidate(store, candidate)
        return
    shown = 0
    for decision in state.decisions(store):
        if decision["action"] == "none" and not everything:
            continue
        head = f"[bold]{decision['window'][:16]}[/]  {decision['scope']:12} [bold]{decision['action']}[/]"
        out.print(f"{head}  {escape(decision['message'])}")
        for reason in decision.get("reasons", ()):
            out.print(f"{'':19}because {escape(reason)}")
        for held in decision.get("held_by", ()):
            out.print(f"{'':19}held by {escape(held)}")
        if decision["action"] == "retrain":
            _why_candidate(store, decision["id"], indent=19)
        shown += 1
        if shown >= limit:
            break
    if not shown:
        out.print("No lap has been asked for yet. `redqueen why --all` also shows decisions to do nothing.")


def _why_candidate(store: ObjectStore, name: str, indent: int = 0) -> None:
    record = state.read(store, state.candidate_key(name)) if indent else state.candidate(store, name)
    pad = " " * indent
    if record:
        run = f", run {record['run_id'][:8]}" if record.get("run_id") else ""
        out.print(f"{pad}candidate [bold]{name}[/]{run}, model {record.get('model_id', 'not trained yet')}")
    for step in record.get("history", ()):
        out.print(f"{pad}  {step['at'][:16]}  {step['status']:12} {escape(step['reason'])}")


@app.command()
def doctor() -> None:
    """Check settings, store, clock, models and alerts, and say what is wrong."""
    from models.bundle import problem
    from models.signing import keys_told, trust_of
    from redqueen.doctor import examine

    try:
        settings = load_settings()
    except ValidationError as error:
        for said in _problems(error):
            err.print(f"[red]broken[/]  settings    {escape(said)}")
        raise typer.Exit(1) from None
    broken = False
    trust = trust_of(settings)
    told = examine(settings, lambda store, model: problem(store, model, trust), lambda: keys_told(settings))
    for finding in told:
        mark = {True: "[green]fine[/]  ", None: "[yellow]note[/]  ", False: "[red]broken[/]"}[finding.ok]
        out.print(f"{mark}  {finding.name:11} {escape(finding.message)}")
        broken |= finding.ok is False
    raise typer.Exit(int(broken))


def _problems(error: ValidationError) -> list[str]:
    """What is wrong with the settings, each by the name of its variable."""
    named = [(".".join(str(part) for part in problem["loc"]), problem["msg"]) for problem in error.errors()]
    return [f"{f'RQ_{name.upper()}: ' if name else ''}{message}" for name, message in named]


# -- stopping and going back ---------------------------------------------------------------------------------


@app.command()
def freeze(
    scope: Annotated[Scope, typer.Argument(help="training, promotion or all. Scoring always goes on.")],
    reason: Annotated[str, typer.Option(help="Why; everybody sees it.")],
    hours: Annotated[float, typer.Option(help="Until it lifts by itself.", min=0.1, max=8760)] = 12.0,
    owner: Annotated[str | None, typer.Option(help="Who answers for it; default: you.")] = None,
) -> None:
    """Stop retrains, promotions or both. Scoring, monitoring and work by hand go on."""
    settings, store = _open()
    until = open_clock(settings, store).now() + timedelta(hours=hours)
    state.freeze(store, Hold(scope=scope.value, owner=owner or getpass.getuser(), reason=reason, until=until))
    out.print(
        f"{scope.value} is frozen until {until:%Y-%m-%d %H:%M} UTC. "
        f"`redqueen unfreeze {scope.value}` lifts it."
    )


@app.command()
def unfreeze(scope: Annotated[Scope, typer.Argument(help="The scope that was frozen.")]) -> None:
    """Lift a freeze."""
    _, store = _open()
    if not state.unfreeze(store, scope.value):
        err.print(f"{scope.value} was not frozen.")
        raise typer.Exit(1)
    out.print(f"{scope.value} is no longer frozen.")


@app.command()
def rollback(
    reason: Annotated[str, typer.Option(help="Why; everybody sees it.")],
    pause_hours: Annotated[
        float, typer.Option(help="Nothing is promoted for this long.", min=0, max=8760)
    ] = 12.0,
    force: Annotated[bool, typer.Option("--force", help="Also to a model that does not verify.")] = False,
    again: Annotated[bool, typer.Option("--again", help="Also right after another rollback.")] = False,
) -> None:
    """Take back the candidate on its way; with none on its way, go back to the model that was live before."""
    from models.bundle import problem
    from models.signing import trust_of
    from redqueen.operate import roll_back

    settings, store = _open()
    now = open_clock(settings, store).now()

    def damaged(model_id: str) -> str:
        found = "" if force else problem(store, model_id, trust_of(settings))
        return f"{found}. --force goes back to it all the same" if found else ""

    after = roll_back(store, now, getpass.getuser(), reason, pause_hours, damaged, again=again)
    out.print(escape(after.message))


model_commands.mount(app, _open)
quarantine_commands.mount(app, _open)
erase_commands.mount(app, _open)
feature_commands.mount(app)
docs_commands.mount(app, _open)
label_commands.mount(app, _open)


def main() -> None:
    """Entry point: errors made for people are printed as one line, without a traceback."""
    try:
        app()
    except RedQueenError as error:
        err.print(f"[red]{type(error).__name__}[/]: {escape(str(error))}")
        raise SystemExit(1) from None
    except ValidationError as error:
        if error.title != "Settings":
            raise
        for problem in _problems(error):
            err.print(f"[red]Settings[/]: {escape(problem)}")
        raise SystemExit(1) from None
    except OSError as error:
        if error.strerror is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        err.print(f"[red]{type(error).__name__}[/]: {escape(where + error.strerror)}")
        raise SystemExit(1) from None


if __name__ == "__main__":
    main()
