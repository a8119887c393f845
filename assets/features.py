"""Features of every event of an hour, by the same code that serving runs. Declarations are in
`redqueen.features`; what a table of them must be as a whole in `assets.expectations`.
"""

import io
from collections.abc import Callable, Iterator
from datetime import date, datetime
from functools import cache, partial

import polars as pl
import pyarrow.parquet as pq
from dagster import AssetExecutionContext, MaterializeResult, MetadataValue, TableRecord

from assets import expectations, parity
from assets.common import hourly_asset
from assets.environment import Environment
from assets.ingest import events
from assets.partitions import hours_of
from redqueen import features as declared
from redqueen import graph
from redqueen.errors import InvalidInput
from redqueen.store import ObjectStore
from redqueen.tables import hour_key, hours_between, landed_hours, write_part


def read_features(store: ObjectStore, start: datetime, end: datetime) -> pl.DataFrame:
    """The features of the events that arrived in [start, end): what everybody who learns from them reads.

    A file with a column too many, too few or twice, or an event with two rows, is refused here, whatever the
    checks said and whoever wrote it: joined to labels, each extra row would be learnt from once more.

    Raises:
        InvalidInput: naming the first such file, and how many there are.
    """
    frames, refused = [], []
    keys = [key for hour in hours_between(start, end) for key in store.list(hour_key("features", hour))]
    for key in keys:
        data = store.get(key).data
        # The file's own names: a reader of frames fails on a name that comes twice, or renames it.
        names = pq.read_schema(io.BytesIO(data)).names
        try:
            declared.check_columns(names)
            frame = pl.read_parquet(io.BytesIO(data))
            declared.check_table(frame)
        except InvalidInput as problem:
            refused.append(f"{key}: {problem}")
            continue
        frames.append(frame)
    if refused:
        raise InvalidInput(
            f"{len(refused)} of {len(keys)} files of features are refused; the first is {refused[0]}: "
            "materialize the asset `features` for those hours"
        )
    rows = pl.concat(frames, how="diagonal_relaxed") if frames else pl.DataFrame()
    copies = rows.height - rows["event_id"].n_unique() if rows.height else 0
    if copies:
        raise InvalidInput(
            f"{copies} of {rows.height} rows of features from {start:%Y-%m-%d %H}h on repeat an event: "
            "materialize the asset `features` for those hours"
        )
    return rows


BLOCK_HOURS = 24
"""A catch-up holds the events of so many hours at once, and the lookback before them."""


def _snapshots(env: Environment, hours: list[datetime]) -> Callable[[date], graph.GraphSnapshot | None]:
    """What looks up a day's graph snapshot; None where there is none.

    A catch-up takes in days at once that `daily_graph` could not come to in between, so it makes their
    snapshots by itself. Without them the hours of a backlog would be the ones that know no graph, and a model
    would learn that instead.
    """
    if len(hours) == 1 or not env.settings.behaviour:
        return cache(partial(graph.open_snapshot, env.store))
    first = min(landed_hours(env.store, "ingested/events")).date()

    def made(day: date) -> graph.GraphSnapshot | None:
        if first < day <= hours[-1].date():
            graph.build(env.store, day)
        return graph.open_snapshot(env.store, day)

    return cache(made)


def _compute(env: Environment, hours: list[datetime]) -> tuple[pl.DataFrame, int]:
    """Prepare and write each hour's events and features; all the features, and the number of events."""
    blocks = [hours[i : i + BLOCK_HOURS] for i in range(0, len(hours), BLOCK_HOURS)]
    heights: list[int] = []
    behaviour = env.settings.behaviour

    def prepared() -> Iterator[pl.DataFrame]:
        for block in blocks:
            parts = [declared.prepare_hour(env.store, hour) for hour in block]
            heights.extend(part.height for part in parts)
            yield pl.concat(parts)

    made = declared.in_blocks(
        prepared(),
        declared.read_prepared(env.store, hours[0] - declared.LOOKBACK, hours[0]) if behaviour else None,
        behaviour=behaviour,
        snapshots=_snapshots(env, hours),
    )
    tables, written = [], 0
    for block, table in zip(blocks, made, strict=True):
        for hour in block:
            part = table.head(heights[written])
            write_part(env.store, "features", hour, declared.stamped(part))
            table = table.slice(part.height)
            tables.append(part)
            written += 1
        if table.height:
            raise ValueError(f"features have {table.height} rows too many from {block[0]:%Y-%m-%d %H}h on")
    return pl.concat(tables), sum(heights)


def _means(means: dict[str, float | None]) -> MetadataValue:
    """The mean of each feature, for the UI."""
    if not means:
        return MetadataValue.text("nobody wrote in this hour")
    rows = [TableRecord({"feature": n, "mean": round(float(mean or 0.0), 4)}) for n, mean in means.items()]
    return MetadataValue.table(rows)


@hourly_asset(
    "features",
    deps=[events],
    kinds={"polars", "greatexpectations"},
    code_version=declared.FEATURES_VERSION,
    check_specs=[*expectations.check_specs("features", "features"), parity.SPEC],
)
def features(
    context: AssetExecutionContext, env: Environment, config: expectations.Showing
) -> MaterializeResult:
    """Text, behaviour and graph features of each event, as they were at the moment we knew of it.

    Computed from the hour and the lookback before it, so no value depends on anything later. A mean that
    leaves its usual range shows here first, before it shows in the scores.
    """
    hours = hours_of(context)
    table, expected = _compute(env, hours)
    shown, checks = expectations.judge(
        env, context, "features", table, config, asset="features", expected=expected
    )
    names = [feature.name for feature in declared.FEATURES]
    means = table.select(names).mean().row(0) if table.height else ()
    return MaterializeResult(
        metadata={
            "dagster/partition_row_count": table.height,
            "features_version": declared.FEATURES_VERSION,
            "means": _means(dict(zip(names, means, strict=False))),
            **shown,
        },
        check_results=[*checks, parity.check_parity(env, hours, table)],
    )
