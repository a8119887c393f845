"""The tables `features` and `prepared` as they are stored: what they must look like, writing, reading.

A feature file with rows or columns twice has taken fleets down. It is refused where it is read, by name, and
not where some model finds a number too many. `prepared` keeps what windows are made of, without texts, so
that an hour's features need not read the texts of the day before again.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime

import polars as pl

from redqueen.errors import InvalidInput
from redqueen.features.declared import FEATURES_VERSION, NAMES
from redqueen.features.prepared import SCHEMA, prepare_frame
from redqueen.store import ObjectStore
from redqueen.tables import HOUR, hour_key, hours_between, read_hours, read_keys, write_part

__all__ = ["check_columns", "check_table", "prepare_hour", "read_prepared", "stamped"]

PREPARED = "prepared"
_STORED = {"actor": "actor_id", "recipient": "recipient_id"}
"""Under the names that erasing looks for."""
_KEPT = tuple(name for name in SCHEMA if name != "direct")
"""The direct values are features: they are in that table already."""


def stamped(table: pl.DataFrame) -> pl.DataFrame:
    """A table of features or prepared events with the version that it is of."""
    return table.with_columns(features_version=pl.lit(FEATURES_VERSION))


def check_columns(columns: Iterable[str]) -> None:
    """Raise InvalidInput unless a feature table has exactly the declared columns, each once, in order.

    An event_id before them and a features_version after them may be there or not.
    """
    given = list(columns)
    bare = given[given[:1] == ["event_id"] :]
    bare = bare[: len(bare) - (bare[-1:] == ["features_version"])]
    if bare == list(NAMES):
        return
    missing = sorted(set(NAMES) - set(given))
    extra = sorted(set(given) - {*NAMES, "event_id", "features_version"})
    repeated = sorted({column for column in given if given.count(column) > 1})
    if missing or extra or repeated:
        why = f"missing {missing}, extra {extra}, repeated {repeated}"
    else:
        why = "they are in another order"
    raise InvalidInput(
        f"the feature table does not have the columns of version {FEATURES_VERSION}: {why}. "
        "Compute the features again with this version"
    )


def check_table(features: pl.DataFrame, where: str = "the feature table") -> None:
    """Raise InvalidInput unless columns and version are the declared ones and no event comes twice."""
    foreign = foreign_version(features)
    if foreign is not None:
        raise InvalidInput(
            f"{where} is of version {foreign}, not {FEATURES_VERSION}. Compute the features again with this "
            "version"
        )
    check_columns(features.columns)
    if "event_id" not in features.columns or features["event_id"].null_count():
        raise InvalidInput(f"{where} does not say of every row which event it belongs to (event_id)")
    twice = features.height - features["event_id"].n_unique()
    if twice:
        raise InvalidInput(
            f"{where}: {twice} of {features.height} rows repeat an event_id; each event has one row. "
            "Compute the features again"
        )


def foreign_version(table: pl.DataFrame) -> str | None:
    """Another version than this that rows say they are of; None where none does."""
    if "features_version" not in table.columns:
        return None
    others = table["features_version"].unique().fill_null("unknown").to_list()
    return next((version for version in others if version != FEATURES_VERSION), None)


def prepare_hour(store: ObjectStore, hour: datetime, events: pl.DataFrame | None = None) -> pl.DataFrame:
    """Prepare the events of one hour of arrival and keep them; an hour that never had any keeps no file.

    Args:
        events: the hour's rows of `ingested/events`; read from the store where they are not given.
    """
    if events is None:
        events = read_hours(store, "ingested/events", hour, hour + HOUR)
    prepared = prepare_frame(events) if events.height else pl.DataFrame(schema=SCHEMA)
    if prepared.height or store.list(hour_key(PREPARED, hour)):
        write_part(store, PREPARED, hour, stamped(prepared.select(_KEPT).rename(_STORED)))
    return prepared


def read_prepared(store: ObjectStore, start: datetime, end: datetime) -> pl.DataFrame:
    """The prepared events that arrived in [start, end), without their direct values.

    An hour that has none, or of another version, is prepared from its events first.
    """
    frames = [_read_hour(store, hour) for hour in hours_between(start, end)]
    return pl.concat(frames) if frames else pl.DataFrame(schema=SCHEMA).select(_KEPT)


def _read_hour(store: ObjectStore, hour: datetime) -> pl.DataFrame:
    keys = store.list(hour_key(PREPARED, hour))
    if keys:
        table = read_keys(store, keys)
        if foreign_version(table) is None:
            return table.rename({stored: name for name, stored in _STORED.items()}).select(_KEPT)
    return prepare_hour(store, hour).select(_KEPT)
