"""The tables: one Arrow schema each, and nothing about how they are filled.

Times are UTC microseconds. An event's label, prediction and features are joined on `event_id`.
"""

from __future__ import annotations

import polars as pl
import pyarrow as pa

TIME = pa.timestamp("us", tz="UTC")

KINDS = ("message", "dm", "friend_request", "join")
RESPONSES = ("accept", "decline", "reply", "block")
LABEL_VALUES = ("abuse", "benign", "unsure")
LABEL_SOURCES = ("moderator", "report", "appeal", "honeypot", "rule", "vendor", "audit")
ACTIONS = ("allow", "review", "limit", "block")
ACTED_ON = ("limit", "block")
ARMS = ("champion", "challenger", "shadow", "none")
ANY_POLICY = "any"
"""The policy of a label that says an event is benign under every policy."""


def _schema(*fields: tuple[str, pa.DataType, bool]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable) for name, kind, nullable in fields])


EVENTS = _schema(
    ("event_id", pa.string(), False),
    ("ts", TIME, False),
    ("received_at", TIME, False),
    ("actor_id", pa.string(), False),
    ("community_id", pa.string(), False),
    ("community_size", pa.int32(), False),
    ("channel_id", pa.string(), False),
    ("recipient_id", pa.string(), True),
    ("kind", pa.string(), False),
    ("response", pa.string(), True),
    ("response_ts", TIME, True),
    ("text", pa.string(), True),
    ("language", pa.string(), True),
    ("account_created_at", TIME, False),
    ("ip_hash", pa.string(), True),
    ("device_hash", pa.string(), True),
)

LABELS = _schema(
    ("label_id", pa.string(), False),
    ("event_id", pa.string(), False),
    ("policy", pa.string(), False),
    ("value", pa.string(), False),
    ("source", pa.string(), False),
    ("rater_id", pa.string(), False),
    ("labeled_at", TIME, False),
    ("received_at", TIME, False),
    ("confidence", pa.float64(), True),
)

GOLD = _schema(
    ("event_id", pa.string(), False),
    ("policy", pa.string(), False),
    ("p_abuse", pa.float64(), False),
    ("n_votes", pa.int32(), False),
    ("disagreement", pa.float64(), False),
    ("mature", pa.bool_(), False),
    ("first_labeled_at", TIME, False),
    ("sources", pa.list_(pa.string()), False),
)

PREDICTIONS = _schema(
    ("event_id", pa.string(), False),
    ("actor_id", pa.string(), False),
    ("ts", TIME, False),
    ("model_id", pa.string(), False),
    ("arm", pa.string(), False),
    ("stage", pa.string(), False),
    ("scores", pa.map_(pa.string(), pa.float32()), False),
    ("action", pa.string(), False),
    ("features", pa.list_(pa.float32()), False),
    ("features_version", pa.string(), False),
    ("latency_us", pa.int32(), False),
    ("propensity", pa.float64(), False),
    ("degraded", pa.bool_(), False),
    ("obfuscation", pa.float32(), False),
    ("fingerprint", pa.int64(), False),
    ("threshold_ratio", pa.float32(), False),
)

REVIEW = _schema(
    ("event_id", pa.string(), False),
    ("reason", pa.string(), False),
    ("propensity", pa.float64(), False),
    ("inclusion", pa.float64(), False),
)

GUARD = _schema(
    ("label_id", pa.string(), False),
    ("received_at", TIME, False),
    ("weight", pa.float64(), False),
    ("released_weight", pa.float64(), False),
    ("held", pa.bool_(), False),
    ("reason", pa.string(), False),
    ("group", pa.string(), True),
    ("members", pa.int32(), True),
)

CAMPAIGNS = _schema(
    ("event_id", pa.string(), False),
    ("campaign_id", pa.string(), False),
    ("size", pa.int32(), False),
    ("actors", pa.int32(), False),
    ("first_seen", TIME, False),
    ("novel", pa.bool_(), False),
)

TABLES: dict[str, pa.Schema] = {
    "events": EVENTS,
    "labels": LABELS,
    "gold": GOLD,
    "predictions": PREDICTIONS,
    "review": REVIEW,
    "guard": GUARD,
    "campaigns": CAMPAIGNS,
}


def polars_schema(table: str) -> dict[str, pl.DataType]:
    """The columns of `table` and their polars types, in order."""
    return dict(pl.DataFrame(TABLES[table].empty_table()).schema)
