"""The label poisoning guard: how much of a vote each report is, before votes become truth.

Anyone may report, so anyone may lie, and many may lie together. Here reports are weighed: rings and bursts
are held, newcomers weigh little, nobody and no hour weighs without end. Nothing is thrown away: a held label
stays in its table, is shown with the reason, and counts again once a person releases it. `guard` is pure;
below it is the table of its verdicts, one an hour, and what `redqueen.labels.gold` is given from it. Who
colludes is found by `redqueen.rings` and `redqueen.bursts`; what people decided is kept by
`redqueen.releases`.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import polars as pl

from redqueen import releases
from redqueen.bursts import SECOND, BurstLimits, bursts
from redqueen.errors import InvalidInput
from redqueen.labels import TRUSTED
from redqueen.rings import Codes, Flags, Floats, RingLimits, both, rings, shared
from redqueen.schema import polars_schema
from redqueen.store import ObjectStore
from redqueen.tables import HOUR, hour_key, landed_hours, read_keys, write_part

TABLE = "guard"
HISTORY = timedelta(days=30)
"""How far back a verdict looks. Not a limit that a caller sets: the table's readers count on it."""

BURST_SPAN = timedelta(hours=24)
"""Bursts are sought in what came in so lately; older ones were found in their hour and are carried on."""

COMMUNITY_HOURS = 6
"""A report names an event of the last hours; its community is looked up among those."""

RING, BURST, NEW_RATER, UNRELIABLE = "ring", "burst", "new_rater", "unreliable"
RATER_CAP, RING_CAP, HOUR_CAP = "rater_cap", "ring_cap", "hour_cap"

VERDICT = polars_schema("guard")
WEIGHTS: dict[str, pl.DataType] = {"label_id": pl.String(), "weight": pl.Float64()}
GROUPS: dict[str, pl.DataType] = {
    "group": pl.String(),
    "reason": pl.String(),
    "held": pl.Boolean(),
    "members": pl.Int32(),
    "labels": pl.UInt32(),
    "first": pl.Datetime("us", "UTC"),
    "last": pl.Datetime("us", "UTC"),
}
_COLUMNS = ("label_id", "event_id", "value", "source", "rater_id", "received_at")
_MICROS = 3_600 * SECOND


@dataclass(frozen=True)
class Limits:
    """How far reports are trusted. A ring may know all of it.

    sources: whose votes are weighed; all others pass. trusted: whose votes judge them.
    ring, burst: what makes a ring, and a burst.
    upheld_items, upheld_share: a ring is not held, only counted as one voter, where trusted sources judged so
        many of the items it shares and found it right in such a share: neighbours who report the same spam.
    new_rater_weight: of a rater without any record. It grows to 1 over reports in `proven_hours` other hours
        (a thousand reports in one hour are one hour), or `proven_upheld` reports upheld by trusted votes.
    doubts: so many refuted reports without an upheld one halve a rater's weight.
    rater_a_day: weight of one rater's reports in a day; ring_a_day: of a ring that is not held.
    hour_times, hour_least: an hour's reports weigh no more together than so many times the median hour's,
        or so many full votes, whichever is more.
    """

    sources: tuple[str, ...] = ("report",)
    trusted: tuple[str, ...] = TRUSTED
    ring: RingLimits = field(default_factory=RingLimits)
    burst: BurstLimits = field(default_factory=BurstLimits)
    upheld_items: int = 5
    upheld_share: float = 0.8
    new_rater_weight: float = 0.25
    proven_hours: int = 20
    proven_upheld: int = 5
    doubts: float = 4.0
    rater_a_day: float = 40.0
    ring_a_day: float = 40.0
    hour_times: float = 5.0
    hour_least: float = 200.0


@dataclass(frozen=True)
class Guarded:
    """What the guard found.

    verdicts: a row for each label that weighs less than a vote (`VERDICT`), by label.
    groups: a row for each ring and burst (`GROUPS`), those with most labels first; nothing names a person.
    judged: how many reports were weighed.
    """

    verdicts: pl.DataFrame
    groups: pl.DataFrame
    judged: int


@dataclass(frozen=True)
class _Reports:
    """The reports as arrays in order of arrival.

    upheld: 1 where trusted votes agree, -1 where they disagree, 0 where there are none.
    newcomer: the rater had hardly reported before.
    """

    frame: pl.DataFrame
    rater: Codes
    item: Codes
    at: Codes
    upheld: npt.NDArray[np.int8]
    newcomer: Flags
    hours_known: Codes
    once: Codes
    """The first report of each rater on each item."""

    @property
    def hour(self) -> Codes:
        return np.asarray(self.at // _MICROS, dtype=np.int64)

    @property
    def day(self) -> Codes:
        return np.asarray(self.at // (24 * _MICROS), dtype=np.int64)


@dataclass(frozen=True)
class _Group:
    """Reports that belong together: their rows, and whether they are held or count as one voter."""

    id: str
    reason: str
    members: int
    rows: Codes
    held: bool


def guard(
    votes: pl.DataFrame,
    limits: Limits,
    now: datetime,
    *,
    before: pl.DataFrame | None = None,
    communities: pl.DataFrame | None = None,
) -> Guarded:
    """Weigh the reports among `votes` as known at `now`. Rows may come in any order.

    Args:
        votes: rows of the labels table; those received after `now`, or more than `HISTORY` before, do not
            exist. A label sent again counts as it came first.
        before: the verdicts of an earlier instant. Groups that go on keep their ids. A burst once held stays
            so until people judge its event, and a ring's report once it is half the history old: neither
            looks innocent again because the evidence has left the history.
        communities: `event_id, community_id` where at hand; without them bursts are found on items alone.
    """
    reports = _reports(votes, limits, now)
    if not reports.frame.height:
        return Guarded(pl.DataFrame(schema=VERDICT), pl.DataFrame(schema=GROUPS), 0)
    found = [*_ring_groups(reports, limits), *_bursts(reports, limits, now, communities)]
    found = _named(reports, found, before)
    groups = _apart([*found, *_carried(reports, before, now)], len(reports.at))
    verdicts = _verdicts(reports, groups, limits)
    return Guarded(verdicts, summary(verdicts), reports.frame.height)


def summary(verdicts: pl.DataFrame) -> pl.DataFrame:
    """The groups among verdicts, those with most labels first."""
    grouped = verdicts.filter(pl.col("group").is_not_null()).group_by("group").agg(
        pl.col("reason", "held").first(),
        members=pl.col("members").max(),
        labels=pl.len(),
        first=pl.col("received_at").min(),
        last=pl.col("received_at").max(),
    )  # fmt: skip
    return grouped.select(pl.col(n).cast(t) for n, t in GROUPS.items()).sort(
        "labels", "group", descending=[True, False]
    )


# -- what was reported ---------------------------------------------------------------------------------------


def _reports(votes: pl.DataFrame, limits: Limits, now: datetime) -> _Reports:
    known = _known(votes, now)
    reported = known.filter(pl.col("source").is_in(list(limits.sources)))
    judged = known.filter(pl.col("source").is_in(list(limits.trusted)))
    truth = judged.group_by("event_id").agg(abusive=(pl.col("value") == "abuse").mean())
    agrees = (pl.col("value") == "abuse") == (pl.col("abusive") > 0.5)
    frame = (
        reported.join(truth, on="event_id", how="left")
        .select(
            "label_id",
            "event_id",
            "value",
            "received_at",
            rater=pl.concat_str("source", "rater_id", separator="\0").rank("dense") - 1,
            item=pl.concat_str("event_id", "value", separator="\0").rank("dense") - 1,
            upheld=pl.when(pl.col("abusive").is_null() | (pl.col("abusive") == 0.5))
            .then(0)
            .when(agrees)
            .then(1)
            .otherwise(-1)
            .cast(pl.Int8),
        )
        .sort("received_at", "label_id")
    )
    rater = frame["rater"].to_numpy().astype(np.int64)
    at = frame["received_at"].to_physical().to_numpy().astype(np.int64)
    upheld = frame["upheld"].to_numpy()
    earlier, known_hours = _hours_of_raters(rater, at // _MICROS)
    proven = np.bincount(rater, upheld > 0, minlength=int(rater.max(initial=-1)) + 1) > 0
    newcomer = (earlier < limits.burst.newcomer_hours) & ~proven[rater]
    item = frame["item"].to_numpy().astype(np.int64)
    once = np.unique(both(rater, item), return_index=True)[1]
    return _Reports(frame, rater, item, at, upheld, newcomer, known_hours, once)


def _known(votes: pl.DataFrame, now: datetime) -> pl.DataFrame:
    if not votes.height:
        return pl.DataFrame(
            schema={**dict.fromkeys(_COLUMNS, pl.String), "received_at": VERDICT["received_at"]}
        )
    within = (pl.col("received_at") <= now) & (pl.col("received_at") > now - HISTORY)
    heard = votes.select(_COLUMNS).filter(within)
    if heard["label_id"].is_duplicated().any():
        order = ["label_id", "received_at", "value", "source", "rater_id", "event_id"]
        heard = heard.sort(order).unique("label_id", keep="first", maintain_order=True)
    return heard.filter(pl.col("value").is_in(["abuse", "benign"]))


def _hours_of_raters(rater: Codes, hour: Codes) -> tuple[Codes, Codes]:
    """For each report: in how many earlier hours, and in how many other hours, its rater reported."""
    if not len(rater):
        return rater, rater
    first = int(hour.min())
    span = int(hour.max()) - first + 1
    seen, back = np.unique(rater * span + hour - first, return_inverse=True)
    whose = seen // span
    start = np.searchsorted(whose, np.arange(int(rater.max()) + 1))
    count = np.bincount(whose)
    return back - start[rater], count[rater] - 1


# -- who reports together ------------------------------------------------------------------------------------


def _ring_groups(reports: _Reports, limits: Limits) -> list[_Group]:
    abuse = (reports.frame["value"] == "abuse").to_numpy()
    known = np.bincount(reports.item[reports.once])[reports.item] <= limits.ring.popular
    found = []
    # Who calls abuse what is abuse meets others who do: each value has a null of its own.
    for said in (abuse, ~abuse):
        once = reports.once[said[reports.once]]
        members = rings(reports.rater[once], reports.item[once], limits.ring)
        if members:
            found += _rings_of(reports, members, once[known[once]], limits)
    return found


def _rings_of(
    reports: _Reports, rings_found: Sequence[Codes], little_known: Codes, limits: Limits
) -> list[_Group]:
    """The rings with all reports of their members, held unless trusted votes clear them.

    Args:
        little_known: the rows, one a rater and item, on items that are not popular: a ring that hides among
            the crowd on what everybody rightly reports is not cleared by it.
    """
    whose = np.full(int(reports.rater.max()) + 1, -1, dtype=np.int64)
    for index, members in enumerate(rings_found):
        whose[members] = index
    place, _, ring = shared(whose, reports.rater[little_known], reports.item[little_known])
    verdict = reports.upheld[little_known][place]
    right = np.bincount(ring, verdict > 0, minlength=len(rings_found))
    wrong = np.bincount(ring, verdict < 0, minlength=len(rings_found))
    cleared = (right >= limits.upheld_items) & (right >= limits.upheld_share * (right + wrong))
    theirs = whose[reports.rater]
    order = np.argsort(theirs, kind="stable")
    rows = np.split(order, np.searchsorted(theirs[order], np.arange(len(rings_found))))[1:]
    # Two who always agree may be one person with two accounts, or a couple: one voter, but no conspiracy.
    return [
        _Group("", RING, len(members), rows[index], held=len(members) > 2 and not cleared[index])
        for index, members in enumerate(rings_found)
    ]


def _bursts(
    reports: _Reports, limits: Limits, now: datetime, communities: pl.DataFrame | None
) -> list[_Group]:
    """Newcomers in numbers within minutes on one item, then on one community's events."""
    recent = np.flatnonzero(reports.at > _micros(now - BURST_SPAN))
    keys = [reports.item[recent]]
    if communities is not None and communities.height:
        keys.append(_places(reports.frame[recent], reports.item[recent], communities))
    new = reports.newcomer & (reports.upheld <= 0)
    found = []
    for key in keys:
        for burst in bursts(reports.rater[recent], key, reports.at[recent], new[recent], limits.burst):
            found.append(_Group("", BURST, len(burst), recent[burst], held=True))
    return found


def _places(reported: pl.DataFrame, item: Codes, communities: pl.DataFrame) -> Codes:
    """A code for the community of each report; an item whose community is not known stands for itself."""
    place = communities.sort("event_id", "community_id").unique("event_id", keep="first", maintain_order=True)
    named = reported.join(place, on="event_id", how="left", maintain_order="left")
    code = pl.concat_str("community_id", "value", separator="\0").rank("dense").cast(pl.Int64)
    found = named.select(code.fill_null(0).alias("code"))["code"].to_numpy()
    return np.where(found > 0, found - 1, int(found.max(initial=0)) + item)


def _micros(instant: datetime) -> int:
    return int(instant.timestamp()) * SECOND + instant.microsecond


# -- groups and their names ----------------------------------------------------------------------------------


def _named(reports: _Reports, groups: Sequence[_Group], before: pl.DataFrame | None) -> list[_Group]:
    """The groups with ids. One that shares labels with a group of `before` takes over its id, so that a
    release goes on holding while the group grows or its oldest labels leave the history.
    """
    old: dict[str, str] = {}
    if before is not None and before.height:
        grouped = before.filter(pl.col("group").is_not_null())
        old = dict(grouped.select("label_id", "group").iter_rows())
    ids = reports.frame["label_id"]
    shared: list[tuple[int, str, int]] = []
    for index, group in enumerate(groups):
        names = [old[label] for label in ids.gather(group.rows) if label in old] if old else []
        kin = [name for name in set(names) if name.startswith(group.reason)]
        shared += [(-names.count(name), name, index) for name in kin]
    given: dict[int, str] = {}
    for _, name, index in sorted(shared):
        if index not in given and name not in given.values():
            given[index] = name
    return [
        _Group(given.get(i) or _id(g.reason, ids.gather(g.rows)), g.reason, g.members, g.rows, g.held)
        for i, g in enumerate(groups)
    ]


def _id(reason: str, labels: Iterable[str]) -> str:
    digest = blake2b("\0".join(sorted(labels)).encode("utf-8", "replace"), digest_size=6)
    return f"{reason}-{digest.hexdigest()}"


def _carried(reports: _Reports, before: pl.DataFrame | None, now: datetime) -> list[_Group]:
    """What `before` held and holds on, but for reports that people have upheld since: bursts, and old reports
    of rings, which would look innocent once most of what gave their ring away has left the history.
    """
    if before is None or not before.height:
        return []
    lasting = (pl.col("reason") == BURST) | (pl.col("received_at") < now - HISTORY / 2)
    kept = (
        reports.frame.with_row_index("row")
        .filter(pl.col("upheld") <= 0)
        .join(before.filter(pl.col("held") & lasting).drop("received_at"), on="label_id", how="inner")
        .sort("row")
    )
    return [
        _Group(
            str(name), rows["reason"][0], rows["members"][0], rows["row"].to_numpy().astype(np.int64), True
        )
        for (name,), rows in kept.group_by("group", maintain_order=True)
    ]


def _apart(groups: Sequence[_Group], rows: int) -> list[_Group]:
    """The groups without the reports that an earlier one has: rings come before bursts, new before carried.
    What is left of a burst under the same id is one group with it.
    """
    free = np.ones(rows, dtype=np.bool_)
    parted: dict[str, _Group] = {}
    for group in groups:
        mine = group.rows[free[group.rows]]
        free[mine] = False
        if len(mine):
            held = parted.get(group.id)
            members = max(group.members, held.members if held else 0)
            all_rows = np.union1d(held.rows, mine) if held else mine
            parted[group.id] = _Group(group.id, group.reason, members, all_rows, group.held)
    return list(parted.values())


# -- weights -------------------------------------------------------------------------------------------------


def _verdicts(reports: _Reports, groups: Sequence[_Group], limits: Limits) -> pl.DataFrame:
    """What every report weighs, where that is less than a vote, and which rule took most of it."""
    size = len(reports.at)
    member = np.full(size, -1, dtype=np.int64)
    for index, group in enumerate(groups):
        member[group.rows] = index
    held = np.array([*(g.held for g in groups), False])[member]
    standing, agreement = _record(reports, limits)
    together = _one_voter(reports, member, held)
    weight = standing * agreement
    rater = _cap(weight, both(reports.rater, reports.day), limits.rater_a_day)
    weight = weight * rater
    alone = weight.copy()
    ring = np.ones(size)
    weight = weight * together
    in_ring = (member >= 0) & ~held
    ring[in_ring] = _cap(weight[in_ring], both(member, reports.day)[in_ring], limits.ring_a_day)
    weight = np.where(held, 0.0, weight * ring)
    hour = _hour_cap(weight, reports.hour, limits)
    weight = weight * hour

    rules = {RING: together, RATER_CAP: rater, RING_CAP: ring, HOUR_CAP: hour, UNRELIABLE: agreement}
    factors = np.stack([*rules.values(), standing])
    reason = np.array([*rules, NEW_RATER])[np.argmin(factors, axis=0)]
    named = np.array([*(g.reason for g in groups), ""])[member]
    ids = [*(g.id for g in groups), None]
    sizes = [*(g.members for g in groups), None]
    grouped = member >= 0
    frame = reports.frame.select("label_id", "received_at").with_columns(
        weight=pl.Series(weight),
        released_weight=pl.Series(np.where(grouped, alone * hour, 1.0)),
        held=pl.Series(held),
        reason=pl.Series(np.where(grouped, named, reason)),
        group=pl.Series([ids[m] for m in member] if groups else [None] * size, dtype=pl.String),
        members=pl.Series([sizes[m] for m in member] if groups else [None] * size, dtype=pl.Int32),
    )
    less = frame.filter(pl.col("weight") < 1.0 - 1e-9)
    return less.select(pl.col(name).cast(kind) for name, kind in VERDICT.items()).sort("label_id")


def _record(reports: _Reports, limits: Limits) -> tuple[Floats, Floats]:
    """What each report's rater has earned by reporting before, and has lost by being wrong."""
    raters = int(reports.rater.max()) + 1
    judged, whose = reports.upheld[reports.once], reports.rater[reports.once]
    right = np.bincount(whose, judged > 0, minlength=raters)[reports.rater]
    wrong = np.bincount(whose, judged < 0, minlength=raters)[reports.rater]
    proven = np.minimum(1.0, reports.hours_known / limits.proven_hours + right / limits.proven_upheld)
    standing = limits.new_rater_weight + (1.0 - limits.new_rater_weight) * proven
    return standing, (right + limits.doubts) / (right + wrong + limits.doubts)


def _one_voter(reports: _Reports, member: Codes, held: Flags) -> Floats:
    """The share of one vote that each report has in those of its ring on the same item."""
    share = np.ones(len(member))
    rows = np.flatnonzero((member >= 0) & ~held)
    if len(rows):
        _, item = np.unique(both(member[rows], reports.item[rows]), return_inverse=True)
        share[rows] = 1.0 / np.bincount(item)[item]
    return share


def _cap(weight: Floats, key: Codes, most: float) -> Floats:
    """The factor that keeps the weights under one key together at `most`."""
    _, key = np.unique(key, return_inverse=True)
    total = np.bincount(key, weight)
    return np.asarray(np.minimum(1.0, most / np.maximum(total, 1e-12))[key], dtype=np.float64)


def _hour_cap(weight: Floats, hour: Codes, limits: Limits) -> Floats:
    hours, key = np.unique(hour, return_inverse=True)
    total = np.bincount(key, weight, minlength=len(hours))
    most = max(limits.hour_least, limits.hour_times * float(np.median(total)))
    return np.asarray(np.minimum(1.0, most / np.maximum(total, 1e-12))[key], dtype=np.float64)


# -- the table -----------------------------------------------------------------------------------------------


def judge_hour(store: ObjectStore, hour: datetime, limits: Limits | None = None) -> Guarded:
    """Judge the reports as known at the end of `hour` and write the verdicts to the hour's part of the
    table.
    """
    earlier = [h for h in landed_hours(store, TABLE) if h < hour]
    before = read_verdicts(store, earlier[-1]) if earlier else None
    votes = read_history(store, hour + HOUR)
    found = guard(
        votes, limits or Limits(), hour + HOUR, before=before, communities=_communities(store, hour)
    )
    write_part(store, TABLE, hour, found.verdicts)
    return found


def read_history(store: ObjectStore, now: datetime) -> pl.DataFrame:
    """The labels taken in over the history before `now`, with the columns that the guard reads."""
    start = now - HISTORY
    days = [start + timedelta(days=n) for n in range(HISTORY.days + 1)]
    first, last = hour_key("ingested/labels", start), hour_key("ingested/labels", now)
    keys = [
        key
        for day in days
        for key in store.list(f"ingested/labels/dt={day:%Y-%m-%d}/")
        if first <= key < last + "~" and key.endswith(".parquet")
    ]
    return _read(store, keys, _COLUMNS)


def _communities(store: ObjectStore, hour: datetime) -> pl.DataFrame:
    hours = [hour - n * HOUR for n in range(COMMUNITY_HOURS)]
    keys = [
        key for h in hours for key in store.list(hour_key("ingested/events", h)) if key.endswith(".parquet")
    ]
    return _read(store, keys, ("event_id", "community_id"))


def _read(store: ObjectStore, keys: Sequence[str], columns: Sequence[str]) -> pl.DataFrame:
    """These columns of many small objects, fetched side by side: a month has 720 of them."""

    def fetch(key: str) -> pl.DataFrame:
        return pl.read_parquet(io.BytesIO(store.get(key).data), columns=list(columns))

    if not keys:
        return pl.DataFrame()
    with ThreadPoolExecutor(min(16, len(keys))) as pool:
        return pl.concat(pool.map(fetch, keys), how="vertical_relaxed")


def read_verdicts(store: ObjectStore, hour: datetime) -> pl.DataFrame:
    """The verdicts of one hour."""
    rows = read_keys(store, store.list(hour_key(TABLE, hour)))
    return rows if rows.width else pl.DataFrame(schema=VERDICT)


def effective_weights(store: ObjectStore, as_of: datetime, limits: Limits | None = None) -> pl.DataFrame:
    """What each label weighs at `as_of`: `label_id, weight`, a row for each label that is not a full vote.

    Verdicts count once their hour is over, releases from their own time on. Labels that came in after the
    last verdict, because its run failed or the instant lies within an hour, are judged here: none slips in
    unguarded. A label that has left the history keeps a verdict of when it was fifteen days old or more.
    """
    hours = [hour for hour in landed_hours(store, TABLE) if hour + HOUR <= as_of]
    arrived = [hour for hour in landed_hours(store, "ingested/labels") if hour < as_of]
    if not arrived:
        return pl.DataFrame(schema=WEIGHTS)
    until, verdicts = _latest(store, hours, arrived[-1], as_of, limits or Limits())
    parts = [verdicts]
    while arrived[0] < until - HISTORY:
        older = [hour for hour in hours if hour + HOUR <= until - HISTORY / 2]
        if not older:
            break
        edge, until = until - HISTORY, older[-1] + HOUR
        parts.append(read_verdicts(store, older[-1]).filter(pl.col("received_at") <= edge))
    return _with_releases(pl.concat(parts), releases.released(store, as_of))


def _latest(
    store: ObjectStore, hours: list[datetime], arrived: datetime, as_of: datetime, limits: Limits
) -> tuple[datetime, pl.DataFrame]:
    """The newest verdicts by `as_of`, and of which instant they are."""
    before = read_verdicts(store, hours[-1]) if hours else None
    if before is not None and arrived <= hours[-1]:
        return hours[-1] + HOUR, before
    return as_of, guard(read_history(store, as_of), limits, as_of, before=before).verdicts


def _with_releases(verdicts: pl.DataFrame, targets: list[str]) -> pl.DataFrame:
    free = pl.col("group").is_in(targets).fill_null(False) | pl.col("label_id").is_in(targets)
    weight = pl.when(free).then("released_weight").otherwise("weight")
    return verdicts.select("label_id", weight=weight).unique("label_id", keep="first", maintain_order=True)


# -- what is held, for people --------------------------------------------------------------------------------


def current(store: ObjectStore, now: datetime) -> pl.DataFrame:
    """The verdicts of the last hour that was over by `now`, with `released`."""
    hours = [hour for hour in landed_hours(store, TABLE) if hour + HOUR <= now]
    verdicts = read_verdicts(store, hours[-1]) if hours else pl.DataFrame(schema=VERDICT)
    return mark_released(verdicts, releases.released(store, now))


def mark_released(verdicts: pl.DataFrame, targets: list[str]) -> pl.DataFrame:
    """The verdicts with a column `released`: a person let the label, or its group, count again."""
    free = pl.col("group").is_in(targets).fill_null(False) | pl.col("label_id").is_in(targets)
    return verdicts.with_columns(released=free)


def standing(group: str, held: bool, last_words: Mapping[str, releases.Word]) -> str:
    """What counts of a group's votes, in words."""
    word = last_words.get(group)
    if word is not None:
        return word.sentence()
    return "held" if held else "counts as one voter"


def headline(held: pl.DataFrame, fresh: int) -> str:
    """How many labels are held, `fresh` of them since the last hour, and why."""
    if not held.height:
        return "no label is held"
    whys = [
        f"{rows['group'].n_unique()} {reason}{'s' if rows['group'].n_unique() > 1 else ''} ({rows.height})"
        for (reason,), rows in sorted(held.group_by("reason"), key=lambda part: str(part[0]))
    ]
    return (
        f"{held.height} labels are held ({fresh} new this hour): {', '.join(whys)}. "
        "`redqueen labels held` lists them."
    )


def held_since(store: ObjectStore, since: datetime, now: datetime) -> int:
    """How many labels received after `since` are held at `now`: suspects, to whoever counts new labels."""
    held = current(store, now).filter(pl.col("held") & ~pl.col("released") & (pl.col("received_at") > since))
    return held.height


def release(store: ObjectStore, target: str, *, by: str, reason: str, now: datetime) -> releases.Word:
    """Release a group or a label by its id.

    Raises:
        InvalidInput: no such group or label weighs less than a vote now.
        Refused: it stands released.
    """
    verdicts = current(store, now)
    known = verdicts.filter((pl.col("group") == target) | (pl.col("label_id") == target))
    if not known.height:
        raise InvalidInput(
            f"no group or label '{target}' is held by the last verdict; `redqueen labels held` lists groups"
        )
    return releases.release(store, target, by=by, reason=reason, now=now)
