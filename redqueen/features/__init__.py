"""The features: declared once (`declared`), compiled twice (`offline`, `online`), finished by one step.

This module only says what the rest of the project uses; each part's own module says what belongs there.
"""

from redqueen.features.declared import AGGREGATES, FEATURES, FEATURES_VERSION, NAMES, TEXT_FEATURES, Feature
from redqueen.features.finish import ACTORLESS, finish
from redqueen.features.offline import (
    LOOKBACK,
    compute,
    featurise,
    featurise_prepared,
    in_blocks,
)
from redqueen.features.online import Engine, InProcess
from redqueen.features.prepared import Prepared, prepare, prepare_frame, rows_of, with_text
from redqueen.features.table import check_columns, check_table, prepare_hour, read_prepared, stamped

__all__ = [
    "ACTORLESS",
    "AGGREGATES",
    "FEATURES",
    "FEATURES_VERSION",
    "LOOKBACK",
    "NAMES",
    "TEXT_FEATURES",
    "Engine",
    "Feature",
    "InProcess",
    "Prepared",
    "check_columns",
    "check_table",
    "compute",
    "featurise",
    "featurise_prepared",
    "finish",
    "in_blocks",
    "prepare",
    "prepare_frame",
    "prepare_hour",
    "read_prepared",
    "rows_of",
    "stamped",
    "with_text",
]
