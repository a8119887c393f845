"""Settings: where values come from, which are refused, and that the written table of them is true."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from pydantic import ValidationError

from redqueen.settings import Settings, load_settings, table, write_env

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "settings.md"


def test_the_environment_wins_over_the_home_and_the_home_over_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_env(tmp_path, fpr_budget=0.02, audit_rate=0.3, encoder=None)
    monkeypatch.setenv("RQ_AUDIT_RATE", "0.4")
    found = load_settings(tmp_path)
    assert (found.fpr_budget, found.audit_rate, found.encoder) == (0.02, 0.4, None)
    assert found.home == tmp_path
    assert found.dagster_home == tmp_path / "dagster"


def test_the_home_comes_from_the_environment_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQ_HOME", str(tmp_path / "there"))
    assert load_settings().home == tmp_path / "there"


def test_lists_are_comma_separated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQ_POLICIES", "spam, hate ,")
    found = load_settings(tmp_path)
    assert found.policies == ("spam", "hate")
    assert found.severe == frozenset()


def test_maturity_is_the_policys_own_or_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RQ_MATURITY_BY_POLICY", "scam=24, harassment=8.5,")
    found = load_settings(tmp_path)
    assert found.maturity == {"spam": found.maturity_hours, "scam": 24.0, "harassment": 8.5}


def test_what_a_miss_costs_is_the_policys_own_or_the_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RQ_MISS_COST_BY_POLICY", "scam=10")
    found = load_settings(tmp_path)
    assert found.miss_costs == (found.miss_cost, 10.0, found.miss_cost)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("RQ_FPR_BUDGET", "2", "fpr_budget"),
        ("RQ_POLICIES", " ,", "RQ_POLICIES is empty"),
        ("RQ_SEVERE_POLICIES", "hate", "not among RQ_POLICIES"),
        ("RQ_CLOCK", "sundial", "clock"),
        ("RQ_MATURITY_BY_POLICY", "hate=8", "not among RQ_POLICIES"),
        ("RQ_MATURITY_BY_POLICY", "spam=0", "above 0"),
        ("RQ_MATURITY_BY_POLICY", "spam", "maturity_by_policy"),
        ("RQ_MISS_COST_BY_POLICY", "hate=8", "not among RQ_POLICIES"),
        ("RQ_MISS_COST_BY_POLICY", "spam=0", "above 0"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    name: str, value: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ValidationError, match=said):
        load_settings(tmp_path)


@budget(max_examples=25)
@given(st.text(st.characters(blacklist_categories=["Cs", "Cc"]), min_size=1).filter(lambda v: "${" not in v))
def test_what_is_kept_with_the_home_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, value: str
) -> None:
    home = tmp_path_factory.mktemp("home")
    write_env(home, bootstrap_approval=value)
    assert load_settings(home).bootstrap_approval == value


def test_secrets_do_not_print() -> None:
    assert "hush" not in repr(Settings(serving_operator_token="hush"))  # type: ignore[arg-type]


def test_every_setting_says_what_it_is_for() -> None:
    silent = [name for name, field in Settings.model_fields.items() if not field.description]
    assert silent == []


def test_the_written_table_is_up_to_date() -> None:
    assert table() in DOCUMENT.read_text(), "run: python -m redqueen.settings > docs/settings.md"
