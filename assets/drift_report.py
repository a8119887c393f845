"""Evidently over frozen bins: the figures that decide every hour, and the page with plots when one is wanted.

Import this module inside an asset body only: it loads Evidently.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import polars as pl

os.environ["DO_NOT_TRACK"] = "1"

from evidently import DataDefinition, Dataset, Report
from evidently.core.metric_types import ColumnMetric, SingleValueCalculation, SingleValueMetric
from evidently.legacy.calculations.stattests import psi_stat_test
from evidently.legacy.core import ColumnType
from evidently.metrics import ValueDrift

from redqueen.drift import Reference


class FrozenPsi(ColumnMetric, SingleValueMetric):
    """Evidently's PSI of one column of codes, without the plot.

    `ValueDrift` draws a plot for each column in every run, which is nine tenths of its cost, whether anybody
    looks or not. This asks the same test and gives the same figure.
    """


class _FrozenPsi(SingleValueCalculation[FrozenPsi]):
    def calculate(self, context: Any, current_data: Dataset, reference_data: Dataset | None) -> Any:
        name = self.metric.column
        if reference_data is None:
            raise ValueError("drift needs a reference")
        known, current = reference_data.column(name).data, current_data.column(name).data
        return self.result(psi_stat_test(known, current, ColumnType.Categorical, 0.1).drift_score)

    def display_name(self) -> str:
        return f"PSI of {self.metric.column}"


def run(
    reference: Reference, frame: pl.DataFrame, columns: Sequence[str] | None = None, *, plots: bool = False
) -> Any:
    """Evidently's snapshot of a window against the reference: one PSI a column, in the order of `columns`
    (default: all of the reference).

    Evidently sees codes of the reference's bins as categories, so one outlier cannot stretch its bins.
    """
    names = list(reference.names if columns is None else columns)
    definition = DataDefinition(categorical_columns=names)
    current, known = (
        Dataset.from_pandas(codes.select(names).to_pandas(), data_definition=definition)
        for codes in (reference.codes(frame), reference.expand())
    )
    metrics = [ValueDrift(column=n, method="psi") if plots else FrozenPsi(column=n) for n in names]
    return Report(metrics).run(current, known)
