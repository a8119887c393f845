"""Aggregation: the textbook is the textbook, and hostile or one-sided sources cannot certify themselves."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from redqueen.aggregation import (
    TEXTBOOK,
    Ballot,
    Fusion,
    Panel,
    Priors,
    Tally,
    dawid_skene,
    fit,
    interval,
    logit,
    settle,
    sigmoid,
)
from redqueen.schema import LABEL_SOURCES

NAMED = ("moderator", "report", "vendor", "audit", "appeal")
MODERATOR, REPORT, VENDOR, AUDIT, APPEAL = (LABEL_SOURCES.index(name) for name in NAMED)


def by_hand(panel: Panel, steps: int) -> np.ndarray:
    """Dawid and Skene's EM, written as the paper has it, one vote at a time."""
    votes = list(zip(panel.item, panel.rater, panel.said, strict=True))
    p = np.zeros((panel.n_items, panel.n_classes))
    for i, _, s in votes:
        p[i, s] += 1
    p /= p.sum(axis=1, keepdims=True)
    for _ in range(steps + 1):
        share = p.mean(axis=0)
        errors = np.zeros((panel.n_raters, panel.n_classes, panel.n_classes))
        for i, r, s in votes:
            errors[r, s] += p[i]
        said = {(r, s) for _, r, s in votes}
        for r in range(panel.n_raters):
            for s in range(panel.n_classes):
                errors[r, s] = np.maximum(errors[r, s], 1e-10) if (r, s) in said else 0.0
            errors[r] /= np.maximum(errors[r].sum(axis=0), 1e-300)
        before, p = p, np.tile(np.log(np.maximum(share, 1e-10)), (panel.n_items, 1))
        for i, r, s in votes:
            p[i] += np.log(errors[r, s])
        p = np.exp(p - p.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
    return before


@st.composite
def panels(draw: st.DrawFn) -> Panel:
    items, raters, classes = draw(st.integers(1, 6)), draw(st.integers(1, 4)), draw(st.integers(2, 4))
    more = draw(st.lists(st.integers(0, items - 1), max_size=20))
    item = np.array([*range(items), *more])
    n = len(item)
    rater = draw(st.lists(st.integers(0, raters - 1), min_size=n, max_size=n))
    said = draw(st.lists(st.integers(0, classes - 1), min_size=n, max_size=n))
    return Panel(item, np.array(rater), np.array(said), items, raters, classes)


@settings(max_examples=80, deadline=None)
@given(panels(), st.integers(1, 5))
def test_without_priors_it_is_the_textbook(panel: Panel, steps: int) -> None:
    found = dawid_skene(panel, iterations=steps, tolerance=-1e9)
    assert np.allclose(found.p, by_hand(panel, steps), atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(panels(), st.floats(0, 50), st.floats(0, 50))
def test_with_any_priors_rows_are_probabilities(panel: Panel, rater_votes: float, items: float) -> None:
    share = np.full(panel.n_classes, 1 / panel.n_classes)
    priors = Priors(rater_votes, np.array([0.9]), np.array([10.0]), share, items)
    p = dawid_skene(panel, priors).p
    assert np.allclose(p.sum(axis=1), 1)
    assert ((p >= 0) & (p <= 1)).all()


def test_weights_are_votes() -> None:
    rng = np.random.default_rng(3)
    item, rater, said = (rng.integers(0, n, 300) for n in (40, 5, 3))
    item[:40] = np.arange(40)
    twice = Panel(*(np.concatenate([x, x]) for x in (item, rater, said)), 40, 5, 3)
    heavy = Panel(item, rater, said, 40, 5, 3, weight=np.full(300, 2.0))
    one, other = (dawid_skene(p, iterations=10, tolerance=-1e9).p for p in (twice, heavy))
    assert np.allclose(one, other)


def test_a_rater_of_few_votes_is_its_source_and_a_stated_source_is_believed() -> None:
    rng = np.random.default_rng(4)
    truth = rng.integers(0, 2, 300)
    good = np.where(rng.random(300) < 0.95, truth, 1 - truth)
    bad = np.where(rng.random(300) < 0.55, truth, 1 - truth)
    # Two good raters of source 0 and one of source 1 on all items; on one more item two newcomers disagree.
    item = np.concatenate([np.tile(np.arange(300), 3), [300, 300]])
    rater = np.concatenate([np.repeat([0, 1, 2], 300), [3, 4]])
    also = np.where(rng.random(300) < 0.95, truth, 1 - truth)
    said = np.concatenate([good, also, bad, [1, 0]])
    source = np.array([0, 0, 1, 0, 1])
    panel = Panel(item, rater, said, 301, 5, 2, source)
    assert dawid_skene(panel, Priors(rater_votes=10)).p[300, 1] > 0.8
    stated = Priors(10, np.array([0.5, 0.99]), np.array([1e6, 1e6]))
    assert dawid_skene(panel, stated).p[300, 0] > 0.8
    assert abs(dawid_skene(panel, TEXTBOOK).p[300, 1] - 0.5) < 0.49


# -- what a vote is worth ------------------------------------------------------------------------------------


def ballot(votes: list[tuple[int, int, int, bool]], items: int) -> tuple[Ballot, Tally]:
    """Votes (item, source, rater, abuse) on one policy."""
    rows = sorted(votes)
    raters = sorted({(s, r) for _, s, r, _ in rows})
    item, source, rater, abuse = (np.array(column) for column in zip(*rows, strict=True))
    record = np.array([raters.index((s, r)) for s, r in zip(source, rater, strict=True)])
    cast = Ballot(item, source, record, abuse.astype(bool), np.ones(len(rows)), np.zeros(items))
    n, groups = len(raters), len(LABEL_SOURCES)
    shared = np.array([float(cast.shared().sum())])
    empty = Tally(
        np.zeros(n, np.intp),
        np.array([s for s, _ in raters]),
        *(np.zeros((2, n)) for _ in range(2)),
        *(np.zeros((2, groups)) for _ in range(2)),
        shared,
    )
    return cast, empty


def learnt(votes: list[tuple[int, int, int, bool]], items: int, how: Fusion) -> Tally:
    cast, empty = ballot(votes, items)
    return empty.counted(cast, fit(cast, empty, how))


def test_reports_do_not_confirm_reports() -> None:
    votes = [(i, REPORT, r, True) for i in range(200) for r in range(8)]
    votes += [(i, MODERATOR, 0, False) for i in range(100)]
    tally = learnt(votes, 200, Fusion())
    assert tally.worth_of_sources(Fusion())[1, REPORT] == pytest.approx(0.5, abs=0.02)
    # A hundred events that only reporters spoke of are no evidence for them.
    assert 700 < tally.source_seen[1, REPORT] <= 800


def test_no_number_of_reports_talks_a_moderator_down() -> None:
    votes = [(i, REPORT, r, True) for i in range(300) for r in range(20)]
    votes += [(i, MODERATOR, 0, False) for i in range(300)]
    cast, empty = ballot(votes, 300)
    found = fit(cast, empty, Fusion())
    worth = empty.counted(cast, found).worth(Fusion())
    assert worth[0, 0] == pytest.approx(0.98)
    assert (found.p < 0.5).all()


def test_a_trusted_rater_who_errs_is_found_out_by_trusted_ones() -> None:
    rng = np.random.default_rng(7)
    votes = []
    for i in range(1_500):
        truth = bool(rng.random() < 0.5)
        votes += [(i, AUDIT, 0, truth), (i, MODERATOR, 0, truth if rng.random() < 0.97 else not truth)]
        votes += [(i, MODERATOR, 1, truth if rng.random() < 0.7 else not truth)]
    cast, empty = ballot(votes, 1_500)
    worth = empty.counted(cast, fit(cast, empty, Fusion())).worth(Fusion())
    names = [tuple(x) for x in sorted({(s, r) for _, s, r, _ in votes})]
    sloppy, sound = (worth[:, names.index((MODERATOR, r))].mean() for r in (1, 0))
    assert sound > 0.93
    assert sloppy < 0.85


def test_agreeing_raters_do_not_drift_towards_a_coin() -> None:
    """Two sources that agree as often as good ones do stay good, however many rounds are run."""
    rng = np.random.default_rng(8)
    votes = []
    for i in range(4_000):
        truth = bool(rng.random() < 0.5)
        votes += [(i, s, 0, truth if rng.random() < 0.9 else not truth) for s in (VENDOR, APPEAL)]
    how = Fusion(iterations=60)
    assert learnt(votes, 4_000, how).worth_of_sources(how)[:, VENDOR] == pytest.approx([0.9, 0.9], abs=0.04)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 4), st.integers(0, len(LABEL_SOURCES) - 1), st.integers(0, 2), st.booleans()
        ),
        min_size=1,
        max_size=30,
        unique_by=lambda v: v[:3],
    )
)
def test_worth_is_never_below_a_coin_and_reports_never_above_their_limit(
    votes: list[tuple[int, int, int, bool]],
) -> None:
    how = Fusion(min_overlap=1)
    cast, empty = ballot(votes, 5)
    found = fit(cast, empty, how)
    tally = empty.counted(cast, found)
    worth = tally.worth(how)
    assert ((worth >= 0.5) & (worth <= 0.995)).all()
    odds = cast.evidence(worth, how)
    of_reports = np.bincount(cast.item, np.where(cast.source == REPORT, odds, 0.0), 5)
    assert (np.abs(of_reports) <= logit(how.report_limit) + 1e-9).all()
    again = settle(cast, tally, how)
    assert np.isnan(again.agreed).tolist() == np.isnan(found.agreed).tolist()


def test_an_interval_holds_its_share_and_narrows() -> None:
    low, high = interval(np.array([0.0, 10.0, 1000.0]), np.array([0.0, 100.0, 10_000.0]))
    assert (low < [0.5, 0.1, 0.1]).all()
    assert (high > [0.5, 0.1, 0.1]).all()
    assert high[0] - low[0] > 0.9
    assert high[2] - low[2] < 0.02


def test_log_odds_never_overflow() -> None:
    assert np.isfinite(logit(np.array([0.0, 1.0]))).all()
    assert ((sigmoid(np.array([-1e9, 1e9])) > 0) & (sigmoid(np.array([-1e9, 1e9])) < 1)).all()
