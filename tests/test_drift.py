"""Drift figures: frozen bins, agreement with Evidently, robustness against outliers."""

from __future__ import annotations

import json

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen.drift import DriftFigures, Reference, drift_figures, fit_reference, js, psi, sampling_noise
from redqueen.errors import InvalidInput


def traffic(n: int, seed: int, shift: float = 0.0) -> pl.DataFrame:
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "score": rng.beta(1 + shift, 8, n).astype(np.float32),
            "rate": np.where(rng.random(n) < 0.9, 0.0, rng.exponential(3, n)),
            "age": rng.lognormal(3, 1 + shift, n),
            "flat": np.ones(n),
            "kind": rng.choice(["message", "dm", "join"], n, p=[0.7, 0.25, 0.05]),
        }
    )


COLUMNS = ["score", "rate", "age", "flat", "kind"]


@pytest.fixture(scope="module")
def reference() -> Reference:
    return fit_reference(traffic(3000, 0), COLUMNS)


def test_quantile_bins_hold_the_reference_evenly_with_small_overflow_bins(reference: Reference) -> None:
    share = reference.expected["age"]
    assert share.sum() == pytest.approx(1)
    assert max(share[0], share[-2]) <= 0.002  # overflow; the last code is null
    assert np.allclose(share[2:-3], 0.1, atol=0.002)


@pytest.mark.parametrize("rows", [3_000, 20_000])
def test_a_few_rows_without_values_do_not_move_every_column(rows: int) -> None:
    before = fit_reference(traffic(rows, 0), ["score", "age"])
    codes = before.codes(traffic(4_000, 5))
    for name in ("score", "age"):
        counts = np.bincount(codes[name].to_numpy(), minlength=len(before.expected[name])).astype(float)
        counts[-1] = 0.011 * counts.sum()  # the last code is null
        assert psi(counts, before.expected[name]) < 0.2
        assert min(count for count in before.expected[name][1:-2]) > 10 / rows, "no bin of a single row"


def test_codes_keep_rows_and_give_null_nan_and_infinity_their_own_place(reference: Reference) -> None:
    frame = pl.DataFrame(
        {
            "score": [None, float("nan"), float("inf"), -float("inf")],
            "rate": [0.0, 1.0, 2.0, 3.0],
            "age": [1.0, None, None, None],
            "flat": [1.0, 0.999, 1.001, None],
            "kind": ["dm", None, "never seen", "join"],
        }
    )
    codes = reference.codes(frame)
    score = {c.name: c for c in reference.columns}["score"]
    assert codes["score"].to_list() == [score.null_code, score.null_code, len(score.edges), 0]
    assert codes["flat"].n_unique() == 4  # a constant column notices anything below, above or missing
    assert codes["kind"].n_unique() == 4
    assert codes.height == 4
    assert set(codes.dtypes) == {pl.Int32}


def test_reference_survives_json(reference: Reference) -> None:
    again = Reference.from_dict(json.loads(json.dumps(reference.to_dict())))
    assert again == reference
    frame = traffic(100, 3)
    assert again.codes(frame).equals(reference.codes(frame))


def test_expanded_reference_has_exactly_the_reference_counts(reference: Reference) -> None:
    rows = reference.expand()
    assert rows.height == reference.n
    for column in reference.columns:
        counted = np.bincount(rows[column.name].to_numpy(), minlength=len(column.counts))
        assert tuple(counted) == column.counts


def test_same_distribution_stays_within_noise_and_a_shift_is_seen(reference: Reference) -> None:
    quiet = drift_figures(reference, traffic(2400, 1), score_columns=["score"])
    moved = drift_figures(reference, traffic(2400, 2, shift=1.0), score_columns=["score"])
    assert quiet.drifted == ()
    assert quiet.share == 0
    assert quiet.score_psi < 0.02
    assert set(moved.drifted) == {"score", "age"}
    assert moved.score_psi > 0.25
    assert moved.share == pytest.approx(1 / 4)


def test_one_outlier_row_cannot_move_psi(reference: Reference) -> None:
    shifted = traffic(2400, 2, shift=1.0)
    outlier = shifted.with_columns(
        pl.when(pl.int_range(pl.len()) == 0).then(1e12).otherwise(pl.col("age")).alias("age")
    )
    before, after = (drift_figures(reference, frame).psi["age"] for frame in (shifted, outlier))
    assert after == pytest.approx(before, abs=0.005)
    assert before > 0.2


@pytest.mark.parametrize("shift", [0.0, 0.4, 3.0])
def test_evidently_gives_the_same_figures_on_the_same_codes(
    reference: Reference, shift: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DO_NOT_TRACK", "1")
    from evidently import DataDefinition, Dataset, Report
    from evidently.metrics import ValueDrift

    window = traffic(1500, 5, shift)
    definition = DataDefinition(categorical_columns=COLUMNS)
    current, known = (
        Dataset.from_pandas(codes.to_pandas(), data_definition=definition)
        for codes in (reference.codes(window), reference.expand())
    )
    counts = reference.counts(window)
    for method, ours in (("psi", psi), ("jensenshannon", js)):
        report = Report([ValueDrift(column=name, method=method) for name in COLUMNS])
        found = [float(metric["value"]) for metric in report.run(current, known).dict()["metrics"]]
        expected = [ours(counts[name], reference.expected[name]) for name in COLUMNS]
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_the_hourly_run_without_plots_gives_the_figures_of_the_page_with_plots(
    reference: Reference, shift: float
) -> None:
    from assets import drift_report

    window = traffic(1500, 5, shift)
    with_plots, without = (
        [float(m["value"]) for m in drift_report.run(reference, window, plots=plots).dict()["metrics"]]
        for plots in (True, False)
    )
    assert without == with_plots
    assert len(without) == len(COLUMNS)


def test_sampling_noise_is_what_psi_averages_without_drift() -> None:
    rng, share = np.random.default_rng(0), np.full(10, 0.1)
    known = rng.multinomial(2000, share, 300) / 2000
    found = [psi(rng.multinomial(800, share), k) for k in known]
    assert np.mean(found) == pytest.approx(sampling_noise(share, 800, 2000), rel=0.15)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 500)), min_size=1, max_size=12))
def test_distances_are_never_negative_and_vanish_on_equality(pairs: list[tuple[int, int]]) -> None:
    current, known = np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float)
    known[0] += 1
    expected = known / known.sum()
    assert psi(current, expected) >= 0
    assert 0 <= js(current, expected) <= np.sqrt(np.log(2)) + 1e-9
    assert psi(known, expected) == pytest.approx(0)
    assert js(known, expected) == pytest.approx(0, abs=1e-6)


def test_an_unmeasured_column_is_an_error_never_no_drift(reference: Reference) -> None:
    with pytest.raises(InvalidInput, match="age"):
        drift_figures(reference, traffic(100, 1).drop("age"))
    with pytest.raises(InvalidInput, match="did not evaluate"):
        drift_figures(reference, traffic(100, 1), measured={"score": 0.1})
    with pytest.raises(InvalidInput, match="no rows"):
        fit_reference(traffic(10, 1).clear(), COLUMNS)


def test_figures_survive_json_and_take_the_measured_psi(reference: Reference) -> None:
    measured = dict.fromkeys(COLUMNS, 0.0) | {"age": 0.5}
    figures = drift_figures(reference, traffic(500, 1), measured=measured, score_columns=["score"])
    assert figures.drifted == ("age",)
    assert DriftFigures.from_dict(json.loads(json.dumps(figures.to_dict()))) == figures
