"""The command line: friendly and true on an empty home, one line for every mistake, no traceback."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from arena.demo import prepare
from cli import main as cli
from redqueen import alerts, state
from redqueen.adaptation import Alarm
from redqueen.errors import Refused
from redqueen.features import FEATURES, FEATURES_VERSION
from redqueen.policy import LabelCounts, Limits, LoopState, Signals, decide
from redqueen.rollout import RolloutState
from redqueen.settings import load_settings
from redqueen.signals import Watched
from redqueen.store import ObjectStore, open_store

NOW = datetime(2026, 1, 3, 14, tzinfo=UTC)


class Said(str):
    """What a command printed, on both streams, and how it ended."""

    code: int


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> object:
    """Runs `redqueen ...` through its entry point."""
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Said:
        monkeypatch.setattr("sys.argv", ["redqueen", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        said = Said(captured.out + captured.err)
        said.code = int(ended.value.code or 0)
        return said

    return call


@pytest.fixture
def store() -> ObjectStore:
    return open_store(load_settings())


COMMANDS = (
    "demo", "import", "ui", "serve", "score", "status", "why", "doctor", "freeze", "unfreeze", "rollback",
    "features",
    "quarantine", "retention", "erase",
)  # fmt: skip


def test_help_lists_every_command(run) -> None:
    said = run("--help")
    assert said.code == 0
    assert [name for name in COMMANDS if name not in said] == []


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(run, command: str) -> None:
    said = run(command, "-h")
    assert said.code == 0
    assert "Usage" in said


def test_a_home_that_is_not_there_is_a_typing_error_and_not_made(run) -> None:
    said = run("status")
    assert said.code == 1
    assert "there is no home at" in said
    assert not load_settings().home.exists()


def test_what_the_disk_refuses_is_one_line_with_the_path(
    run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(store: ObjectStore) -> RolloutState:
        raise PermissionError(13, "Permission denied", "/home/store/live.json")

    monkeypatch.setattr(state, "rollout_state", refused)
    said = run("status")
    assert said.code == 1
    assert said.strip() == "PermissionError: /home/store/live.json: Permission denied"


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "home" / "store").mkdir(parents=True)
    command = f"ulimit -f 0; {sys.executable} -m cli.main --home {tmp_path}/home freeze all --reason incident"
    said = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert said.returncode == 1
    assert said.stderr.startswith("OSError: ")
    assert "state/holds.json: File too large" in said.stderr.replace("\n", "")
    assert "Traceback" not in said.stderr


@pytest.mark.parametrize("command", [("labels", "held"), ("docs", "events"), ("doctor",)])
def test_no_command_that_looks_makes_a_home(run, command: tuple[str, ...]) -> None:
    assert "there is no home at" in run(*command)
    assert not load_settings().home.exists()


def test_a_second_rollback_at_once_has_to_be_meant(run, store: ObjectStore) -> None:
    live = RolloutState(
        champion="m2", previous="m1", challenger="m3", candidate="three", stage="5%", version=2
    )
    store.put_json(state.LIVE_KEY, live.to_dict())
    assert run("rollback", "--reason", "complaints").code == 0
    again = run("rollback", "--reason", "complaints", "--force")
    assert again.code == 1
    assert "--again does" in again
    assert state.rollout_state(store).champion == "m2"
    assert run("rollback", "--reason", "complaints", "--force", "--again").code == 0
    assert state.rollout_state(store).champion == "m1"


def test_an_empty_home_has_nothing_live_and_says_so(run) -> None:
    load_settings().home.mkdir()
    assert "Nothing has been deployed yet" in run("status")
    facts = json.loads(run("status", "--json"))
    assert facts["champion"] is None
    assert facts["monitoring"] == "unknown"
    assert "No lap has been asked for yet" in run("why")
    assert run("doctor").code == 0


def test_what_cannot_be_done_is_refused_in_one_line(run) -> None:
    load_settings().home.mkdir()
    for arguments, said in (
        (("rollback", "--reason", "nerves"), "no previous champion"),
        (("why", "nobody"), "no candidate is called 'nobody'"),
        (("score", "hello"), "no model is live"),
    ):
        found = run(*arguments)
        assert found.code == 1
        assert said in found
        assert "Traceback" not in found


def test_a_freeze_is_seen_and_lifted(run, store: ObjectStore) -> None:
    assert (
        run("freeze", "training", "--reason", "labels [/b] look odd", "--hours", "2", "--owner", "ana").code
        == 0
    )
    seen = run("status")
    assert "training by ana" in seen
    assert "labels [/b] look odd" in seen
    assert "labels [/b] look odd" in run("doctor")
    assert len(state.read(store, state.HOLDS_KEY)["holds"]) == 1
    assert run("unfreeze", "training").code == 0
    again = run("unfreeze", "training")
    assert (again.code, "was not frozen" in again) == (1, True)
    assert run("freeze", "weather", "--reason", "rain").code == 2


def test_a_home_that_cannot_be_one_is_named(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = run("--home", str(tmp_path / "file"), "status")
    assert said.code == 1
    assert "cannot be a home" in said


@pytest.mark.parametrize("command", ["status", "doctor", "why"])
def test_a_bad_setting_is_named(run, monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("RQ_FPR_BUDGET", "7")
    said = run(command)
    assert said.code == 1
    assert "RQ_FPR_BUDGET" in said
    assert "Traceback" not in said


def test_why_tells_the_reasons_and_what_became_of_the_candidate(run, store: ObjectStore) -> None:
    counts = LabelCounts(5000, 5000)
    decision = decide([], LoopState(), Limits(), "bootstrap", now=NOW, labels=counts)
    state.record_decision(store, "first_lap", decision)
    idle = decide([], LoopState(), Limits(), "drift", now=NOW)
    state.record_decision(store, "drift", idle)
    state.advance_candidate(store, decision.id, "launched", NOW, "first labels", run_id="0123456789")
    state.advance_candidate(store, decision.id, "rejected", NOW, "recall 40.0% [low]")
    said = run("why")
    for words in (decision.id, "run 01234567", "trusted labels are there", "recall 40.0% [low]"):
        assert words in said
    assert idle.reasons[0] not in said
    assert idle.reasons[0] in run("why", "--all")
    assert "rejected" in run("why", decision.id)


def test_status_shows_alerts_that_nobody_got(
    run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQ_ALERT_WEBHOOK", "http://127.0.0.1:9/none")
    alerts.send(store, load_settings(), "stale", "no window was measured", NOW)
    said = run("status")
    assert "no window was measured" in said
    assert "not delivered" in said


def test_status_shows_what_the_last_window_measured(run, store: ObjectStore) -> None:
    alarm = Alarm(
        "evasion_rate", 0.4, 88, 0.1, 0.3, 3, 3, 1e6, 2000.0, "evading actors 40% against 10% before"
    )
    measured = Signals(
        window=NOW, champion="m1", health="broken", health_reason="no answers", alarms=(alarm,)
    )
    store.put_json(f"signals/window={NOW:%Y-%m-%dT%H}.json", Watched(measured).to_dict())
    said = run("status")
    assert said.code == 0
    assert "broken" in said
    assert alarm.sentence in said


def test_a_rollback_says_what_is_live_now(run, store: ObjectStore) -> None:
    live = RolloutState(champion="m2", champion_candidate="two", previous="m1", previous_candidate="one",
                        stage="100%", version=2)  # fmt: skip
    store.put_json(state.LIVE_KEY, live.to_dict())
    refused = run("rollback", "--reason", "complaints")
    assert refused.code == 1
    assert "there is no model m1 in the store" in refused
    assert state.rollout_state(store).champion == "m2"
    said = run("rollback", "--reason", "complaints", "--force")
    assert said.code == 0
    assert "complaints" in said
    assert state.rollout_state(store).champion == "m1"


def test_looking_at_a_home_does_not_keep_the_demo_out_of_it(run) -> None:
    home = load_settings().home
    run("status")
    run("doctor")
    assert not prepare(home, {"seed": 1}, NOW)["finished"]


def test_the_demo_touches_no_home_with_data_of_another(store: ObjectStore) -> None:
    store.put("events/dt=2026-01-03/hr=14/x.jsonl", b"{}")
    with pytest.raises(Refused, match="stays untouched"):
        prepare(Path(load_settings().home), {"seed": 1}, NOW)


def test_quarantine_counts_and_retries_without_showing_rows(run, store: ObjectStore) -> None:
    assert "Nothing waits" in run("quarantine", "list")
    rows = [{"label_id": "l1", "event_id": "e-secret", "value": "bad", "reason": "value: not one of [abuse]"}]
    store.put(
        "quarantine/labels/dt=2026-01-03/hr=14/a.jsonl", "\n".join(json.dumps(row) for row in rows).encode()
    )
    said = run("quarantine", "list", "--reason", "value")
    assert said.code == 0
    assert "value: not one of [abuse]" in said
    assert "e-secret" not in said
    said = run("quarantine", "retry", "--table", "labels", "--hour", "2026-01-03T14")
    assert "1 rows tried, 0 pass now" in said
    assert run("quarantine", "retry", "--table", "labels", "--hour", "noon").code == 1
    assert "mend their source" in run("quarantine", "retry", "--table", "import")


def test_retention_shows_before_it_deletes(run, store: ObjectStore) -> None:
    old = "served/dt=2001-01-03/hr=14/part.parquet"
    store.put(old, b"x")
    said = run("retention")
    assert said.code == 0
    assert "Nothing was deleted" in said
    assert store.exists(old)
    assert "Deleted 1 objects" in run("retention", "--apply")
    assert not store.exists(old)


def test_retention_names_a_mistake_in_the_setting(run, monkeypatch: pytest.MonkeyPatch) -> None:
    load_settings().home.mkdir()
    monkeypatch.setenv("RQ_RETENTION_DAYS", "decisions=9")
    for command in ("retention", "doctor"):
        said = run(command)
        assert said.code == 1
        assert "'decisions' is always kept" in said


def test_erase_asks_first_and_tells_what_it_rewrote(
    run, store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "events/dt=2026-01-03/hr=14/a.jsonl"
    store.put(key, b'{"event_id": "e1", "actor_id": "u-secret", "text": "hi"}\n')
    assert run("erase").code == 1
    assert run("erase", "--actor", "u-secret", "--event", "e1").code == 1
    monkeypatch.setattr("sys.stdin", io.StringIO("n\n"))
    assert run("erase", "--actor", "u-secret").code == 1
    assert b"u-secret" in store.get(key).data
    said = run("erase", "--actor", "u-secret", "--yes")
    assert said.code == 0
    assert "events" in said
    assert "u-secret" not in said
    assert store.get(key).data == b"\n"
    assert "Nothing of it is kept" in run("erase", "--actor", "u-secret", "--yes")


def test_every_feature_is_listed_with_what_it_says_and_what_faking_it_costs(run) -> None:
    said = run("features")
    assert [feature.name for feature in FEATURES if feature.name not in said] == []
    assert f"{len(FEATURES)} features of version {FEATURES_VERSION}" in said
    rows = json.loads(run("features", "--json"))["features"]
    assert [row["name"] for row in rows] == [feature.name for feature in FEATURES]
    assert all(row["sentence"] and row["fake"] and row["reads"] for row in rows)
    graph = json.loads(run("features", "--json", "--family", "graph"))["features"]
    assert {row["family"] for row in graph} == {"graph"}
    assert run("features", "--family", "weather").code == 2
