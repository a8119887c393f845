"""Which suites there are, and what each expects: data alone, nothing here runs.

To add one for a new table: a line in `SUITES`, most often `of_schema(...)`. A rule names the expectation of
Great Expectations, what it means to a person, and its severity: `error` blocks what comes next, `warn` is
worth a look. One rule costs some 5 ms an hour, so rules on many columns are one rule on a derived column that
counts, per row, how many of them are broken; its parts give the columns their names in the verdict.

No rule may report a value: no minimum, maximum, mean or mode (their observed values are data).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import polars as pl

from redqueen import trainingset
from redqueen.features import FEATURES, FEATURES_VERSION, NAMES
from redqueen.graph import NUMBERS
from redqueen.ingest import CLOCK_SKEW, MAX_EVENT_AGE
from redqueen.review import REASONS
from redqueen.schema import ACTIONS, ARMS, KINDS, LABEL_SOURCES, LABEL_VALUES, RESPONSES, TABLES

MAX_TEXT = 4_000
MAX_LATENCY_US = 1_000_000
ROUNDING = 1e-6
"""By so much a float32 may miss the end of its range."""

MISSING, OUTSIDE, COPIES = "missing_values", "values_outside", "copies"
_SKEW = CLOCK_SKEW.total_seconds()


@dataclass(frozen=True)
class Facts:
    """What a suite must be told besides the rows. `rows`: how many there must be, where that is known."""

    policies: tuple[str, ...] = ()
    behaviour: bool = True
    rows: int | None = None


@dataclass(frozen=True)
class Rule:
    """One expectation: its class in Great Expectations without the `Expect`, and its arguments."""

    kind: str
    meaning: str
    severity: Literal["error", "warn"]
    column: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Derived:
    """A column that is judged and that the table does not have; left out where it lacks a column of `needs`.

    parts: conditions that make a row bad, by the name to blame; the column counts them. Or one `value`.
    """

    name: str
    needs: tuple[str, ...]
    parts: Mapping[str, pl.Expr] = field(default_factory=dict)
    value: pl.Expr | None = None

    @property
    def expression(self) -> pl.Expr:
        if self.value is not None:
            return self.value.alias(self.name)
        conditions = [part.fill_null(False).cast(pl.Int32) for part in self.parts.values()]
        return pl.sum_horizontal(conditions).alias(self.name)


@dataclass(frozen=True)
class Suite:
    """What is expected of one table.

    place: its prefix in the store. cut: what the prefix is cut by. columns: those that rules read as they
    are; the others are judged by name alone, so that no text is handed over. optional: columns that may be
    there or not. needs_rows: whether `Facts.rows` must be given.
    """

    place: str
    cut: Literal["hour", "day", "candidate"]
    columns: tuple[str, ...]
    rules: Callable[[Facts], Sequence[Rule]]
    derived: Callable[[Facts], Sequence[Derived]] = lambda facts: ()
    optional: tuple[str, ...] = ()
    needs_rows: bool = False


def error(kind: str, meaning: str, column: str | None = None, **options: Any) -> Rule:
    """A rule that blocks."""
    return Rule(kind, meaning, "error", column, options)


def warn(kind: str, meaning: str, column: str | None = None, **options: Any) -> Rule:
    """A rule that is worth a look."""
    return Rule(kind, meaning, "warn", column, options)


def none_of(name: str, meaning: str) -> Rule:
    """No row has anything counted in the derived column `name`."""
    return error("ColumnValuesToBeInSet", meaning, name, value_set=[0])


# -- pieces that most suites share ---------------------------------------------------------------------------


def _all_columns(table: str) -> Rule:
    return error(
        "TableColumnsToMatchSet",
        f"every column of the table {table} is there",
        column_set=list(TABLES[table].names),
        exact_match=False,
    )


def _required(table: str) -> tuple[str, ...]:
    return tuple(column.name for column in TABLES[table] if not column.nullable)


def _missing(columns: Sequence[str]) -> Derived:
    return Derived(MISSING, tuple(columns), {name: pl.col(name).is_null() for name in columns})


def _copies(keys: Sequence[str]) -> Derived:
    """0 where a row is the only one of its key."""
    return Derived(COPIES, tuple(keys), value=(pl.len().over(list(keys)) - 1).cast(pl.Int64))


def _out(column: str, low: float | None, high: float | None = None) -> pl.Expr:
    value = pl.col(column)
    bad = value.cast(pl.Float64).is_nan()
    if low is not None:
        bad = bad | (value < low)
    return bad if high is None else bad | (value > high)


def of_schema(
    table: str,
    *,
    keys: Sequence[str],
    place: str | None = None,
    cut: Literal["hour", "candidate"] = "hour",
    sets: Mapping[str, Sequence[Any]] | None = None,
    ranges: Mapping[str, tuple[float | None, float | None]] | None = None,
    more: Sequence[Rule] = (),
    columns: Sequence[str] = (),
    derived: Sequence[Derived] = (),
) -> Suite:
    """The suite that follows from a schema of `redqueen.schema`: all columns, no null where none may be, no
    key twice, known values, figures within their ranges.

    Args:
        keys: the columns that name a row.
        sets: column to its known values.
        ranges: column to (least, greatest), None for an open end.
        more, columns, derived: rules beyond these, the plain columns they read, and the derived ones.
    """
    known, bounds = dict(sets or {}), dict(ranges or {})
    required = _required(table)
    rules = [
        _all_columns(table),
        none_of(MISSING, f"every row has {', '.join(required)}"),
        none_of(COPIES, f"a row is named once by {', '.join(keys)}"),
        *(
            error("ColumnValuesToBeInSet", f"{name} is one of those known", name, value_set=list(values))
            for name, values in known.items()
        ),
    ]
    columns_made = [_missing(required), _copies(keys)]
    if bounds:
        rules.append(none_of(OUTSIDE, f"within their ranges: {', '.join(bounds)}"))
        columns_made.append(
            Derived(OUTSIDE, tuple(bounds), {name: _out(name, *ends) for name, ends in bounds.items()})
        )
    everything = (*rules, *more)
    made = (*columns_made, *derived)
    return Suite(place or table, cut, (*known, *columns), lambda facts: everything, lambda facts: made)


# -- what arrives --------------------------------------------------------------------------------------------

_EVENT_COLUMNS = ("event_id", "kind", "response", "community_size", "language")
_LABEL_COLUMNS = ("label_id", "value", "source", "confidence")


def _seconds(later: str, earlier: str) -> pl.Expr:
    return (pl.col(later) - pl.col(earlier)).dt.total_seconds()


def _text_length() -> Derived:
    spoken = pl.col("kind").is_in(["message", "dm"])
    length = pl.when(spoken).then(pl.col("text").str.len_chars().fill_null(0))
    return Derived("text_length", ("text", "kind"), value=length)


def _events_rules(facts: Facts) -> Sequence[Rule]:
    between = "ColumnValuesToBeBetween"
    return [
        warn("TableRowCountToBeBetween", "something arrived", min_value=1),
        _all_columns("events"),
        none_of(MISSING, f"every event has {', '.join(_required('events'))}"),
        error("ColumnValuesToBeUnique", "an event appears once", "event_id"),
        error("ColumnValuesToBeInSet", "kinds are known", "kind", value_set=list(KINDS)),
        error("ColumnValuesToBeInSet", "responses are known", "response", value_set=list(RESPONSES)),
        error(
            between, "events arrive after they happened", "delay_s",
            min_value=-_SKEW, max_value=MAX_EVENT_AGE.total_seconds(),
        ),
        warn(between, "95% of events arrive within six hours", "delay_s", max_value=6 * 3600, mostly=0.95),
        error(between, "accounts are older than what they send", "account_age_s", min_value=-_SKEW),
        error(between, "communities have a size", "community_size", min_value=0),
        error(between, "messages have a text", "text_length", min_value=1),
        warn(
            between, f"99% of texts are below {MAX_TEXT} characters", "text_length",
            max_value=MAX_TEXT, mostly=0.99,
        ),
        warn(
            "ColumnValuesToNotBeNull", "a fifth of the events at least has a language", "language", mostly=0.2
        ),
    ]  # fmt: skip


def _events_derived(facts: Facts) -> Sequence[Derived]:
    return [
        _missing(_required("events")),
        Derived("delay_s", ("received_at", "ts"), value=_seconds("received_at", "ts")),
        Derived("account_age_s", ("ts", "account_created_at"), value=_seconds("ts", "account_created_at")),
        _text_length(),
    ]


def _labels_rules(facts: Facts) -> Sequence[Rule]:
    return [
        warn("TableRowCountToBeBetween", "some label arrived", min_value=1),
        _all_columns("labels"),
        none_of(MISSING, f"every label has {', '.join(_required('labels'))}"),
        error("ColumnValuesToBeUnique", "a label appears once", "label_id"),
        error("ColumnValuesToBeInSet", "values are known", "value", value_set=list(LABEL_VALUES)),
        error("ColumnValuesToBeInSet", "sources are known", "source", value_set=list(LABEL_SOURCES)),
        error(
            "ColumnValuesToBeBetween", "confidence is a share", "confidence", min_value=0, max_value=1
        ),
        error(
            "ColumnValuesToBeBetween", "labels are received after they were given", "delay_s",
            min_value=-_SKEW,
        ),
        warn(
            "ColumnValuesToNotBeInSet", "half of the labels at least decide", "value",
            value_set=["unsure"], mostly=0.5,
        ),
    ]  # fmt: skip


def _labels_derived(facts: Facts) -> Sequence[Derived]:
    return [
        _missing(_required("labels")),
        Derived("delay_s", ("received_at", "labeled_at"), value=_seconds("received_at", "labeled_at")),
    ]


# -- features ------------------------------------------------------------------------------------------------


def bounds(name: str) -> tuple[float, float | None]:
    """The range of a feature: none is negative, and what is called a share is one."""
    return (0.0, 1.0) if "_share" in name or name.startswith("is_") else (0.0, None)


def _features_derived(prefix: str, *, behaviour: bool) -> list[Derived]:
    always = [f"{prefix}{feature.name}" for feature in FEATURES if not feature.needs_actor]
    of_actor = [f"{prefix}{feature.name}" for feature in FEATURES if feature.needs_actor]
    outside = {}
    for name in NAMES:
        low, high = bounds(name)
        value = pl.col(f"{prefix}{name}")
        # Polars orders NaN above every number; what is missing is judged by itself.
        wrong = (value < low - ROUNDING) | (value > (1e30 if high is None else high + ROUNDING))
        outside[f"{prefix}{name}"] = wrong & value.is_not_nan()
    absent = {name: pl.col(name).is_null() | pl.col(name).is_nan() for name in always}
    absent["event_id"] = pl.col("event_id").is_null()
    unknown = pl.all_horizontal(pl.col(of_actor).is_null() | pl.col(of_actor).is_nan()).cast(pl.Int32)
    return [
        Derived(OUTSIDE, tuple(outside), outside),
        Derived("features_absent", tuple(absent), absent),
        Derived("sender_unknown", tuple(of_actor), value=unknown if behaviour else pl.lit(0, pl.Int32)),
    ]


_FEATURE_RULES = (
    none_of(OUTSIDE, "features are finite, not negative, and shares at most 1"),
    none_of("features_absent", "the event and the features that need no sender have a value"),
    warn(
        "ColumnValuesToBeInSet", "half of the events at least know their sender", "sender_unknown",
        value_set=[0], mostly=0.5,
    ),
)  # fmt: skip


def _features_rules(facts: Facts) -> Sequence[Rule]:
    made = [derived.name for derived in _features_derived("", behaviour=facts.behaviour)]
    return [
        error(
            "TableColumnsToMatchSet", "exactly the declared features are there",
            column_set=["event_id", *NAMES, *made], exact_match=True,
        ),
        error("TableRowCountToEqual", "every event has one row", value={"$PARAMETER": "rows"}),
        error("ColumnValuesToBeUnique", "an event has one row of features", "event_id"),
        *_FEATURE_RULES,
    ]  # fmt: skip


# -- what a lap is made of -----------------------------------------------------------------------------------


def _gold_rules(facts: Facts) -> Sequence[Rule]:
    return [
        *_GOLD.rules(facts),
        error("ColumnValuesToBeInSet", "policies are those detected here", "policy",
              value_set=list(facts.policies)),
        error("TableRowCountToBeBetween", "something was judged", min_value=1),
    ]  # fmt: skip


_GOLD = of_schema(
    "gold",
    keys=("event_id", "policy"),
    ranges={"p_abuse": (0, 1), "n_votes": (0, None)},
    columns=("policy",),
)


def _training_columns(facts: Facts) -> list[str]:
    return trainingset.columns(facts.policies, NAMES)


def _training_derived(facts: Facts) -> Sequence[Derived]:
    targets = [f"p_{policy}" for policy in facts.policies]
    wrong = {name: _out(name, 0, 1) for name in targets}
    wrong |= {name: _out(name, ROUNDING, 1) for name in ("weight", "inclusion")}
    made = _features_derived("f_", behaviour=facts.behaviour)
    return [
        _missing(("event_id", "ts", "text", "weight", "inclusion", "group", *targets)),
        # A message may be there once as it was sent, and once for each rewriting that worked.
        _copies(("event_id", "text")),
        Derived("targets_outside", tuple(wrong), wrong),
        *made,
    ]


def _training_rules(facts: Facts) -> Sequence[Rule]:
    made = [derived.name for derived in _training_derived(facts)]
    return [
        error(
            "TableColumnsToMatchSet", "exactly the declared features and policies are there",
            column_set=[*_training_columns(facts), *made], exact_match=True,
        ),
        none_of(MISSING, "every row has a message, a time, a weight, a group and its targets"),
        none_of(COPIES, "a message is learnt from once"),
        none_of("targets_outside", "targets and weights are shares"),
        error("TableRowCountToBeBetween", "there is something to learn from", min_value=1),
        *_FEATURE_RULES,
    ]  # fmt: skip


# -- what was answered, and what people are asked ------------------------------------------------------------


def _served_derived() -> Sequence[Derived]:
    # A map column reads back as a map or as a list of key and value, depending on the reader.
    pairs = pl.List(pl.Struct({"key": pl.String, "value": pl.Float32}))
    scores = pl.col("scores").cast(pairs).list.eval(pl.element().struct.field("value"))
    wrong_score = (scores.list.min() < 0) | (scores.list.max() > 1 + ROUNDING) | scores.list.max().is_nan()
    # Rows of an older version of the features are as wide as they were then.
    ours = pl.col("features_version") == FEATURES_VERSION
    width = pl.col("features").list.len()
    parts = {
        "propensity": (pl.col("propensity") <= 0) | _out("propensity", 0, 1),
        "threshold_ratio": _out("threshold_ratio", 0),
        "latency_us": pl.col("latency_us") < 0,
        "obfuscation": _out("obfuscation", 0, 1 + ROUNDING),
        "scores": wrong_score,
        "features": ours & (width != 0) & (width != len(NAMES)),
    }
    return [Derived("answer_outside", (*parts, "features_version"), parts)]


_SERVED = of_schema(
    "predictions",
    keys=("event_id", "model_id", "arm"),
    place="served",
    sets={"arm": ARMS, "action": ACTIONS},
    more=(
        none_of(
            "answer_outside",
            "scores and propensity are shares, and a row of features is whole or empty",
        ),
        warn(
            "ColumnValuesToBeBetween", "99% of the answers take less than a second", "latency_us",
            max_value=MAX_LATENCY_US, mostly=0.99,
        ),
    ),
    columns=("latency_us",),
    derived=_served_derived(),
)  # fmt: skip

# -- what an hour, and a day, look like together ------------------------------------------------------------

_CAMPAIGN_PARTS = {
    "size": pl.col("size") < 1,
    "actors": (pl.col("actors") < 0) | (pl.col("actors") > pl.col("size")),
}
_campaigns = of_schema(
    "campaigns",
    keys=("event_id",),
    more=(none_of("crowd_impossible", "a campaign has a message, and no more senders than messages"),),
    derived=(Derived("crowd_impossible", ("size", "actors"), _CAMPAIGN_PARTS),),
)


def _graph_derived() -> Sequence[Derived]:
    kinds = {column: of for of, columns in NUMBERS.items() for column in columns}
    absent: dict[str, pl.Expr] = {name: pl.col(name).is_null() for name in ("day", "of", "name")}
    outside = {}
    for column, kind in kinds.items():
        value = pl.col(column)
        absent[column] = (pl.col("of") == kind) & (value.is_null() | value.is_nan())
        # What is no logarithm of a count is a share.
        high = 1e30 if column.endswith("_log") else 1 + ROUNDING
        outside[column] = value.is_not_nan() & ((value < -ROUNDING) | (value > high))
    needs = ("day", "of", "name", *kinds)
    return [Derived(MISSING, needs, absent), _copies(("day", "of", "name")), Derived(OUTSIDE, needs, outside)]


_GRAPH_RULES = (
    error(
        "TableColumnsToMatchSet", "every number of an account, a recipient and a domain is there",
        column_set=["day", "of", "name", *(c for columns in NUMBERS.values() for c in columns)],
        exact_match=False,
    ),
    none_of(MISSING, "every row has a name and all numbers of its kind"),
    none_of(COPIES, "an account, recipient or domain has one row a day"),
    none_of(OUTSIDE, "numbers are finite, not negative, and shares at most 1"),
    error("ColumnValuesToBeInSet", "kinds are known", "of", value_set=list(NUMBERS)),
    warn("TableRowCountToBeBetween", "somebody is known", min_value=1),
)  # fmt: skip

SUITES: dict[str, Suite] = {
    "events": Suite("ingested/events", "hour", _EVENT_COLUMNS, _events_rules, _events_derived),
    "labels": Suite("ingested/labels", "hour", _LABEL_COLUMNS, _labels_rules, _labels_derived),
    "features": Suite(
        "features", "hour", ("event_id",), _features_rules,
        lambda facts: _features_derived("", behaviour=facts.behaviour),
        optional=("features_version",), needs_rows=True,
    ),
    "served": _SERVED,
    "review": of_schema(
        "review", keys=("event_id",), sets={"reason": REASONS},
        ranges={"propensity": (ROUNDING, 1), "inclusion": (ROUNDING, 1)},
    ),
    "guard": of_schema(
        "guard", keys=("label_id",),
        ranges={"weight": (0, 1 + ROUNDING), "released_weight": (0, 1 + ROUNDING)},
    ),
    "campaigns": _campaigns,
    "graph": Suite("graph", "day", ("of",), lambda facts: _GRAPH_RULES, lambda facts: _graph_derived()),
    "gold": Suite("gold", "candidate", _GOLD.columns, _gold_rules, _GOLD.derived),
    "training_set": Suite("training_sets", "candidate", (), _training_rules, _training_derived),
}  # fmt: skip
