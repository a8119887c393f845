"""What has been learnt about raters, and about every judged event, kept so that a day's labels do not
recompute a year.

A `TruthState` is a refit, and what changed since: *parts*, newest last. A part holds every label of the
events that it touched, their verdicts, and how each of their votes was counted; of an event that several
parts hold, the newest is right. An update reads the labels of the events that got new votes, judges those
events with what has been learnt, and moves the raters' records by the difference. Other events keep their
verdict until the next refit.

In the store, `truth/asof=<hour>/<kind>-*`, kind `refit` or `increment`, written once, `-state.json` last: a
writer that is killed half-way leaves nothing that counts. A state as of an hour holds only labels received
before it, and a gold set as of T starts from a state no later than T: so nothing here ever knew the future.
All of it follows from `ingested/labels` and may be deleted at any time (`forget`): whoever rewrites an hour
there, or erases somebody's labels, must do so.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import polars as pl

from redqueen import labels as votes
from redqueen.aggregation import Fusion
from redqueen.clock import hour_of
from redqueen.errors import NotFound
from redqueen.labels import Judged, Learnt
from redqueen.store import ObjectStore, to_json, to_parquet
from redqueen.tables import HOUR, landed_hours, read_hours

logger = logging.getLogger(__name__)

VERSION = 1
"""Raise it when what is kept changes its meaning: older states are then left aside, not misread."""

ROOT = "truth/"
LABELS = "ingested/labels"
GROWTH = 0.1
"""News beyond this share of what a state holds are no increment: they are fitted anew."""
GENERATIONS = 2
"""Refits that are kept, with the increments on them."""

Kind = Literal["increment", "refit"]
KINDS: tuple[Kind, ...] = ("increment", "refit")


@dataclass(frozen=True)
class Part:
    """Some events, whole.

    rows: every label of them (`labels.ROW_SCHEMA`), with `cast`, the weight of the vote it became, null where
        it became none, and `labels.COUNTED`, how the vote was counted.
    items: what became of them (`labels.ITEM_SCHEMA`); an event whose labels are all held has none.
    """

    rows: pl.DataFrame
    items: pl.DataFrame

    @classmethod
    def of(cls, rows: pl.DataFrame, judged: Judged) -> Part:
        """`rows` as `labels.elect` got them, with their `row` numbers, and what became of them."""
        place = judged.votes["row"].to_numpy()
        found = {}
        for name, kept_as in (("weight", "cast"), *((name, name) for name in votes.COUNTED)):
            column = np.full(rows.height, np.nan)
            column[place] = judged.votes[name].to_numpy()
            found[kept_as] = pl.Series(column).fill_nan(None)
        return cls(rows.drop("row").with_columns(**found), judged.items)

    def without(self, events: pl.Series) -> Part:
        """The part less some events."""
        rest = ~pl.col("event_id").is_in(events.implode())
        return Part(self.rows.filter(rest), self.items.filter(rest))

    def judged(self) -> Judged:
        """The votes as they were counted."""
        cast = self.rows.filter(pl.col("cast").is_not_null()).with_columns(weight=pl.col("cast"))
        return Judged(self.items, cast)


@dataclass(frozen=True)
class TruthState:
    """All that is known of truth as of `as_of`; see the module's text. Make one by `fit` or `known_at`."""

    as_of: datetime
    policies: tuple[str, ...]
    how: Fusion
    learnt: Learnt
    parts: tuple[Part, ...]
    prefix: str | None = None
    """Where it is kept, if it is."""

    @classmethod
    def fit(
        cls,
        labels: pl.DataFrame,
        as_of: datetime,
        policies: Sequence[str],
        how: Fusion | None = None,
        weights: pl.DataFrame | None = None,
    ) -> TruthState:
        """The exact state: from all labels received by `as_of`."""
        fusion = how or Fusion()
        heard = votes.known(labels, as_of) if labels.height else labels
        rows = (
            votes.spread(heard, policies, fusion) if heard.height else pl.DataFrame(schema=votes.ROW_SCHEMA)
        )
        rows = votes.guarded(rows, weights).with_row_index("row")
        judged = votes.judge(votes.elect(rows), fusion)
        return cls(as_of, tuple(policies), fusion, Learnt.of(judged), (Part.of(rows, judged),))

    def update(
        self, labels: pl.DataFrame, as_of: datetime, weights: pl.DataFrame | None = None
    ) -> TruthState:
        """With the labels received since; only events with new labels, or labels newly held, are judged.

        Args:
            labels: whole hours of arrival; what the state knows already is left aside.
            as_of: labels received later do not exist.
            weights: all that the poisoning guard holds or discounts as of then, not the news alone.
        """
        fresh = self._fresh(labels, as_of)
        touched = pl.concat([fresh["event_id"], self._reweighed(weights)]).unique()
        if touched.is_empty():
            return replace(self, as_of=as_of, prefix=None)
        old = self._held(touched)
        rows = pl.concat([old.rows.select(list(votes.ROW_SCHEMA)), fresh])
        rows = votes.guarded(rows, weights).with_row_index("row")
        judged = votes.judge(votes.elect(rows), self.how, self.learnt)
        learnt = self.learnt.moved(old.judged(), judged)
        parts = (*self.parts, Part.of(rows, judged))
        return replace(self, as_of=as_of, learnt=learnt, parts=parts, prefix=None)

    def items(self) -> pl.DataFrame:
        """Every judged (event, policy), sorted."""
        return pl.concat([part.items for part in self._newest()]).sort("event_id", "policy")

    def rows(self) -> pl.DataFrame:
        """Every label known, a row a policy that it speaks of (`labels.ROW_SCHEMA`)."""
        return pl.concat([part.rows.select(list(votes.ROW_SCHEMA)) for part in self._newest()])

    def size(self) -> int:
        """How many rows are held, superseded ones included."""
        return sum(part.rows.height for part in self.parts)

    def _newest(self) -> Iterator[Part]:
        """The parts, newest first, each without the events that a newer one holds."""
        newer = pl.Series("event_id", [], pl.String)
        for part in reversed(self.parts):
            yield part.without(newer) if len(newer) else part
            if part is not self.parts[0]:
                newer = pl.concat([newer, part.rows["event_id"].unique()])

    def _fresh(self, labels: pl.DataFrame, as_of: datetime) -> pl.DataFrame:
        """The rows of labels that this state does not know."""
        heard = votes.known(labels, as_of) if labels.height else labels
        if heard.is_empty():
            return pl.DataFrame(schema=votes.ROW_SCHEMA)
        ids = heard["label_id"].implode()
        again = [part.rows["label_id"].filter(part.rows["label_id"].is_in(ids)) for part in self.parts]
        rows = votes.spread(heard, self.policies, self.how)
        return rows.filter(~pl.col("label_id").is_in(pl.concat(again).implode()))

    def _reweighed(self, weights: pl.DataFrame | None) -> pl.Series:
        """The events of labels whose weight by the guard is not what it was."""
        ids = pl.Series("label_id", [], pl.String) if weights is None else weights["label_id"]
        found = [pl.Series("event_id", [], pl.String)]
        for part in self._newest():
            marked = part.rows.filter((pl.col("guard") != 1.0) | pl.col("label_id").is_in(ids.implode()))
            now = votes.guarded(marked, weights)["guard"]
            found.append(marked.filter(marked["guard"] != now)["event_id"])
        return pl.concat(found)

    def _held(self, events: pl.Series) -> Part:
        """All that is held of some events."""
        rows, items, left = [], [], events
        for part in reversed(self.parts):
            mine = part.rows.filter(pl.col("event_id").is_in(left.implode()))
            rows.append(mine)
            items.append(part.items.filter(pl.col("event_id").is_in(left.implode())))
            left = left.filter(~left.is_in(mine["event_id"].unique().implode()))
        return Part(pl.concat(rows), pl.concat(items))


def known_at(
    store: ObjectStore,
    as_of: datetime,
    policies: Sequence[str],
    how: Fusion | None = None,
    weights: pl.DataFrame | None = None,
    *,
    refit: bool = False,
) -> tuple[TruthState, TruthState | None]:
    """The state as of any instant, and the saved one that it was grown from.

    That is None where it was fitted from all labels: asked to, nothing is saved, or so little that the news
    are no increment. On the full hour, the hour that begins is not read: nothing in it had landed.

    Args:
        weights: what the poisoning guard leaves of labels at `as_of`.
    """
    fusion = how or Fusion()
    end = as_of if as_of == hour_of(as_of) else hour_of(as_of) + HOUR
    base = None if refit else saved(store, as_of, policies, fusion)
    if base is not None:
        news = read_hours(store, LABELS, base.as_of, end)
        if news.width:
            news = news.filter(pl.col("received_at") <= as_of)
        if news.height <= GROWTH * base.size():
            return base.update(news, as_of, weights), base
    hours = landed_hours(store, LABELS)
    everything = read_hours(store, LABELS, hours[0], end) if hours else pl.DataFrame()
    return TruthState.fit(everything, as_of, policies, fusion, weights), None


# -- in the store --------------------------------------------------------------------------------------------


def save(store: ObjectStore, state: TruthState, base: TruthState | None = None) -> TruthState:
    """Keep a refit, or, over the saved `base` that it was updated from, an increment. Returns it as kept.

    The same state again writes the same objects.

    Raises:
        ValueError: `base` is not kept itself, or more than one update lies between the two.
    """
    if base is not None and (base.prefix is None or len(state.parts) > len(base.parts) + 1):
        raise ValueError(
            "an increment is kept over a state that is kept, one update after it: save that first"
        )
    prefix = _prefix(state.as_of, "refit" if base is None else "increment")
    part = state.parts[-1]
    if base is not None and len(state.parts) == len(base.parts):
        part = Part(part.rows.clear(), part.items.clear())
    for name, frame in (("rows", part.rows), ("items", part.items), ("records", state.learnt.records)):
        store.put(f"{prefix}{name}.parquet", to_parquet(frame.to_arrow()))
    header = {
        **_terms(state.policies, state.how),
        "as_of": state.as_of.isoformat(),
        "base": None if base is None else base.prefix,
        "shared": dict(state.learnt.shared),
        "source_errors": votes.source_errors(state.learnt, state.how).to_dicts(),
    }
    store.put_json(f"{prefix}state.json", header)
    return replace(state, prefix=prefix)


def saved(
    store: ObjectStore, as_of: datetime, policies: Sequence[str], how: Fusion | None = None
) -> TruthState | None:
    """The newest state saved as of `as_of` or earlier, under these policies and this way of weighing."""
    terms = _terms(policies, how or Fusion())
    for found, kind in reversed(_states(store)):
        if found > as_of:
            continue
        try:
            header = store.get_json(f"{_prefix(found, kind)}state.json")
            if {name: header.get(name) for name in terms} == terms:
                return _load(store, header, found, kind, policies, how or Fusion())
        except NotFound:
            # Forgotten or pruned while we read: an older one, or none, will do.
            logger.info("the truth state as of %s is not whole and was left aside", found.isoformat())
    return None


def forget(store: ObjectStore, since: datetime | None = None) -> int:
    """Delete the states that may have read the hour `since` or a later one (default: all); how many there
    were.

    Call it after writing an hour of `ingested/labels` again: what was learnt from the former rows is void.
    """
    gone = [(at, kind) for at, kind in _states(store) if since is None or at > since]
    for at, kind in gone:
        _delete(store, at, kind)
    return len(gone)


def prune(store: ObjectStore) -> int:
    """Delete what no state of the last refits rests on; how many states went."""
    states = _states(store)
    refits = [at for at, kind in states if kind == "refit"]
    if len(refits) <= GENERATIONS:
        return 0
    gone = [(at, kind) for at, kind in states if at < refits[-GENERATIONS]]
    for at, kind in gone:
        _delete(store, at, kind)
    return len(gone)


def _load(
    store: ObjectStore, header: dict[str, Any], at: datetime, kind: Kind, policies: Sequence[str], how: Fusion
) -> TruthState:
    records = _read(store, f"{_prefix(at, kind)}records.parquet")
    shared = {str(name): int(n) for name, n in header["shared"].items()}
    parts = [_part(store, _prefix(at, kind))]
    while header["base"] is not None:
        prefix = header["base"]
        header = store.get_json(f"{prefix}state.json")
        parts.append(_part(store, prefix))
    return TruthState(
        at, tuple(policies), how, Learnt(records, shared), tuple(reversed(parts)), _prefix(at, kind)
    )


def _part(store: ObjectStore, prefix: str) -> Part:
    return Part(_read(store, f"{prefix}rows.parquet"), _read(store, f"{prefix}items.parquet"))


def _read(store: ObjectStore, key: str) -> pl.DataFrame:
    return pl.read_parquet(io.BytesIO(store.get(key).data))


def _terms(policies: Sequence[str], how: Fusion) -> dict[str, Any]:
    """Under what a state was made: another set of policies, or of constants, is another state."""
    terms = {"version": VERSION, "policies": list(policies), "fusion": asdict(how)}
    same: dict[str, Any] = json.loads(to_json(terms))
    return same


def _prefix(at: datetime, kind: Kind) -> str:
    return f"{ROOT}asof={at.astimezone(UTC):%Y-%m-%dT%H}/{kind}-"


def _states(store: ObjectStore) -> list[tuple[datetime, Kind]]:
    """What is saved whole, oldest first; of one hour the increment before the refit."""
    found: list[tuple[datetime, Kind]] = []
    for key in store.list(ROOT):
        hour, _, name = key.removeprefix(ROOT).partition("/")
        for kind in KINDS:
            if name == f"{kind}-state.json":
                at = datetime.strptime(hour, "asof=%Y-%m-%dT%H").replace(tzinfo=UTC)
                found.append((at, kind))
    return sorted(found)


def _delete(store: ObjectStore, at: datetime, kind: Kind) -> None:
    # The header first: what is half deleted must not count.
    for name in ("state.json", "rows.parquet", "items.parquet", "records.parquet"):
        store.delete(f"{_prefix(at, kind)}{name}")
