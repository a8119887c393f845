"""Data Docs on request: a suite over the rows of one hour or candidate, as pages for a browser.

They cost more than the checks, so that nothing writes them unasked. No page holds a value of a row: Great
Expectations is handed lengths and counts instead of texts, and told to list nothing (`RESULT_FORMAT`). The
pages load their style from public addresses; without a network they are plain.
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import polars as pl

from assets.environment import Environment
from assets.expectations.running import LOCK, RESULT_FORMAT, build, judged, new_context, suite_named
from assets.expectations.suites import SUITES, Facts
from assets.monitoring import report_url
from redqueen import graph, state
from redqueen.errors import InvalidInput
from redqueen.tables import HOUR, landed_hours, read_hours, read_keys

SITE = "redqueen"


@dataclass(frozen=True)
class Subject:
    """The rows of a table that pages are to be about, and what they are called."""

    table: str
    rows: pl.DataFrame
    facts: Facts
    label: str
    at: datetime


def write(subject: Subject, folder: Path) -> Path:
    """Write the pages into `folder`; returns the index.

    Raises: InvalidInput where there is no such suite.
    """
    suite_named(subject.table, subject.facts)
    with LOCK:
        context, gx = new_context()
        for name in list(context.get_site_names()):
            context.delete_data_docs_site(name)
        backend = {
            "class_name": "TupleFilesystemStoreBackend",
            "base_directory": str(folder.absolute()),
        }
        site = {
            "class_name": "SiteBuilder",
            "show_how_to_buttons": False,
            "store_backend": backend,
            "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
        }
        context.add_data_docs_site(site_name=SITE, site_config=site)
        source = context.data_sources.add_pandas(subject.table)
        batches = source.add_dataframe_asset(subject.table).add_batch_definition_whole_dataframe("rows")
        suite = context.suites.add(build(subject.table, subject.facts, gx))
        check = gx.ValidationDefinition(name=f"{subject.table} {subject.label}", data=batches, suite=suite)
        frame = judged(subject.rows, subject.table, subject.facts).to_pandas()
        context.validation_definitions.add(check).run(
            batch_parameters={"dataframe": frame},
            expectation_parameters={"rows": subject.facts.rows},
            result_format=RESULT_FORMAT,
            run_id=gx.RunIdentifier(run_name=subject.label, run_time=subject.at),
        )
        context.build_data_docs(site_names=[SITE])
    # Three megabytes of moving pictures that explain the product.
    for picture in folder.rglob("*.gif"):
        picture.unlink()
    return folder / "index.html"


def publish(env: Environment, subject: Subject) -> str:
    """Write the pages below `reports/data_docs/` of the store; returns where a browser finds the index."""
    # Named as other hours are, so that retention knows their age.
    prefix = f"reports/data_docs/{subject.table}/{SUITES[subject.table].cut}={subject.label}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write(subject, folder)
        for page in sorted(path for path in folder.rglob("*") if path.is_file()):
            env.store.put(f"{prefix}/{page.relative_to(folder).as_posix()}", page.read_bytes())
    return report_url(env, f"{prefix}/index.html")


def find(
    env: Environment, table: str, *, hour: datetime | None = None, candidate: str | None = None
) -> Subject:
    """The rows that lie in the store for an hour, or a candidate; by default the latest.

    Raises: InvalidInput where there is no such table, or nothing of it there.
    """
    suite = SUITES.get(table)
    if suite is None:
        raise InvalidInput(f"there is no expectation suite '{table}': use one of {', '.join(SUITES)}")
    facts = Facts(env.settings.policies, env.settings.behaviour)
    if suite.cut == "candidate":
        return _of_candidate(env, table, facts, candidate)
    if suite.cut == "day":
        return _of_day(env, table, facts, hour)
    hours = landed_hours(env.store, suite.place) if hour is None else [hour]
    rows = read_hours(env.store, suite.place, hours[-1], hours[-1] + HOUR) if hours else pl.DataFrame()
    if rows.is_empty():
        where = f"{hours[-1]:%Y-%m-%dT%H}" if hours else "any hour"
        raise InvalidInput(f"there are no rows of {table} in {where}: materialize it, or choose an --hour")
    if suite.needs_rows:
        n_events = read_hours(env.store, "ingested/events", hours[-1], hours[-1] + HOUR).height
        facts = Facts(facts.policies, facts.behaviour, n_events)
    return Subject(table, rows, facts, f"{hours[-1]:%Y-%m-%dT%H}", hours[-1])


def _of_day(env: Environment, table: str, facts: Facts, hour: datetime | None) -> Subject:
    """The graph snapshot of the day that an hour lies in; by default the latest."""
    days = [hour.date()] if hour is not None else list(reversed(graph.recent_days(env.clock.now())))
    for day in days:
        marker = graph.complete(env.store, day)
        if marker is not None:
            at = graph.midnight(day)
            return Subject(table, graph.rows_of(env.store, marker), facts, f"{at:%Y-%m-%d}", at)
    told = f"of {days[0]}" if hour is not None else f"of the last {len(days)} days"
    raise InvalidInput(f"there is no graph snapshot {told}: materialize graph_snapshot, or choose an --hour")


def _of_candidate(env: Environment, table: str, facts: Facts, candidate: str | None) -> Subject:
    place = SUITES[table].place
    known = [str(record["candidate"]) for record in state.all_candidates(env.store)]
    names = [name for name in known if env.store.list(f"{place}/candidate={name}/")]
    chosen = candidate or (names[-1] if names else None)
    if chosen is None or chosen not in names:
        told = ", ".join(names[-5:]) or "none"
        raise InvalidInput(f"there is no {table} of candidate '{chosen}'; there is one of: {told}")
    rows = read_keys(env.store, env.store.list(f"{place}/candidate={chosen}/"))
    return Subject(table, rows, facts, chosen, env.clock.now())
