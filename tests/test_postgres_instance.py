"""The Dagster instance on Postgres, as production has it: a run, its event and its check are found there."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.environment import Environment
from assets.partitions import partition_of
from dagster_project.build import build_defs
from redqueen.store import DirectoryStore
from redqueen.tables import hour_key
from tests.services import absent

HOUR = datetime(2026, 1, 3, 14, tzinfo=UTC)


@pytest.fixture
def postgres() -> Iterator[dict[str, Any]]:
    """The address of an empty database of this test's own; PG* variables name the server."""
    psycopg2 = pytest.importorskip("psycopg2")
    pytest.importorskip("dagster_postgres")
    server = {
        "host": os.environ.get("PGHOST", "127.0.0.1"),
        "port": int(os.environ.get("PGPORT", "5432")),
        "password": os.environ.get("PGPASSWORD", ""),
    }
    asked = os.environ.get("PGUSER")
    for user in (asked,) if asked else ("postgres", "root"):
        try:
            admin = psycopg2.connect(
                **server, user=user, dbname=os.environ.get("PGDATABASE", "test"), connect_timeout=3
            )
            break
        except psycopg2.OperationalError as error:
            reason = str(error).strip().splitlines()[0]
    else:
        absent(f"no Postgres ({reason})")
    admin.autocommit = True
    name = f"redqueen_{uuid.uuid4().hex[:10]}"
    with admin.cursor() as cursor:
        cursor.execute(f"CREATE DATABASE {name}")
    yield {"hostname": server["host"], "port": server["port"], "username": user,
           "password": server["password"], "db_name": name}  # fmt: skip
    with admin.cursor() as cursor:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")
    admin.close()


def land(home: Path) -> None:
    """A producer's file: two good rows and one that breaks the contract."""
    rows = [
        {
            "event_id": f"e{i}", "ts": "2026-01-03T14:10:00Z", "received_at": "2026-01-03T14:10:01Z",
            "actor_id": "a", "community_id": "c", "community_size": 10, "channel_id": "ch",
            "kind": "message" if i else "shout", "text": f"hello {i}",
            "account_created_at": "2025-01-01T00:00:00Z",
        }
        for i in range(3)
    ]  # fmt: skip
    lines = "\n".join(json.dumps(row) for row in rows)
    DirectoryStore(home / "store").put(f"{hour_key('events', HOUR)}batch.jsonl", lines.encode())


@pytest.mark.slow
def test_an_hour_is_taken_in_on_postgres(postgres: dict[str, Any], tmp_path: Path) -> None:
    home = tmp_path / "home"
    land(home)
    (home / "dagster").mkdir()
    # SQLAlchemy 2.1 takes a plain "postgresql" to mean psycopg 3, which dagster-postgres does not bring.
    address = postgres | {"scheme": "postgresql+psycopg2"}
    (home / "dagster" / "dagster.yaml").write_text(
        json.dumps({"storage": {"postgres": {"postgres_db": address}}, "telemetry": {"enabled": False}})
    )
    partition = partition_of(HOUR)
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        job = build_defs(environment=Environment(home=str(home))).resolve_job_def("hour")
        result = job.execute_in_process(
            instance=instance, partition_key=partition, asset_selection=[dg.AssetKey("events")]
        )
        assert result.success
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        assert "Postgres" in type(instance.event_log_storage).__name__
        assert instance.get_run_by_id(result.run_id).is_success  # type: ignore[union-attr]
        event = instance.get_latest_materialization_event(dg.AssetKey("events"))
        assert event is not None
        materialization = event.asset_materialization
        assert materialization is not None
        assert materialization.partition == partition
        assert materialization.metadata["rows"].value == 2
        assert materialization.metadata["refused"].value == 1
        check = dg.AssetCheckKey(dg.AssetKey("events"), "events_expectations")
        history = instance.event_log_storage.get_asset_check_execution_history(check, limit=10)
        assert history[0].status.value == "SUCCEEDED"
