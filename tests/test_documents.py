"""The documents are held to the code where a machine can do it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from dagster_project.definitions import defs
from redqueen.schema import TABLES
from serving.events import parse

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]


@pytest.mark.parametrize("table", TABLES)
def test_every_column_is_explained(table: str) -> None:
    text = (DOCS / "data-contracts.md").read_text()
    section = re.split(rf"^### {table}$", text, flags=re.M)[1].split("\n### ")[0]
    assert [f"`{name}`" for name in TABLES[table].names] == re.findall(r"^\| (`\w+`)", section, flags=re.M)


def test_every_direct_dependency_says_what_it_is_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = project["dependencies"] + [
        d for extra in project["optional-dependencies"].values() for d in extra
    ]
    names = {re.split(r"[<>=\[]", dependency)[0] for dependency in wanted}
    told = set(re.findall(r"^\| `([\w-]+)`", (DOCS / "dependencies.md").read_text(), flags=re.M))
    assert told == names


def test_the_runbook_knows_every_sensor_and_the_architecture_every_asset() -> None:
    repository = defs.get_repository_def()
    runbook, architecture = ((DOCS / f"{name}.md").read_text() for name in ("runbook", "architecture"))
    assert [s.name for s in repository.sensor_defs if f"`{s.name}`" not in runbook] == []
    keys = [key.to_user_string() for key in repository.asset_graph.get_all_asset_keys()]
    assert [key for key in keys if f"`{key}`" not in architecture] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_the_scoring_example_is_one_that_the_service_takes() -> None:
    body = re.split(r"-d '", (ROOT / "README.md").read_text())[1].split("'")[0]
    (event,) = parse(body.encode()).events
    assert event["event_id"] == "e1"


def test_every_command_is_in_the_readme() -> None:
    from typer.main import get_command

    from cli.main import app

    rows = "".join(re.findall(r"^\| `.*?\|", (ROOT / "README.md").read_text(), flags=re.M))
    assert [name for name in get_command(app).commands if f"`{name}`" not in rows] == []  # type: ignore[attr-defined]
