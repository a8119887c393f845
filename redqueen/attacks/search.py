"""Aiming the families at one detector: which words to rewrite, and how, found by asking the detector.

Belongs here: the `Detector` protocol, the query budget, the search. Does not belong here: what counts as a
rewriting (`families`), what is made of the outcome (`report`).

The threat is a black box that answers with scores: stronger than what an abuser has (clients get an action,
not a score), so what holds here holds outside. One message is attacked for itself; its sender's behaviour
stays as it was, only the features of its text follow the rewriting.

Search is greedy, in rounds: every message still in play proposes rewritings of its next most telling word
(found by leaving each word out, once, for all families), all proposals of a round are scored in one batch,
each message keeps its best one if it helped. A message leaves the game when it evades, when its share of
words is spent, or when its progress so far makes success within reach unlikely. Same seed, same detector:
same outcome.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from redqueen.attacks.families import FAMILIES, Family, MessageFamily, WordFamily
from redqueen.attacks.report import AttackReport, FamilyResult, HardExample
from redqueen.errors import InvalidInput
from redqueen.features import NAMES, with_text

__all__ = ["Detector", "attack"]

WORD_TRIES = 4
"""Rewritings of one word that are scored against each other."""

MESSAGE_TRIES = 8
"""Rewritings of a whole message that are scored against each other."""

MAX_SPANS = 20
"""Parts into which a message is cut to find out which of them the detector looks at."""

MAX_ROUNDS = 12
"""Rounds after which a message that is still caught counts as caught."""

IMPORTANCE_SHARE = 0.25
"""Share of the budget that may be spent on finding the telling words."""

_SPLIT = re.compile(r"(\s+)")
_TINY = 1e-6


class Detector(Protocol):
    """What is attacked: scores in [0, 1] by policy, and the operating point at which it acts."""

    @property
    def policies(self) -> Sequence[str]:
        """Names of the P policies, in the order of the columns."""

    @property
    def thresholds(self) -> NDArray[np.floating]:
        """Score [P] from which a message is acted on, fixed beforehand by the false-positive budget."""

    def score(self, texts: list[str], features: NDArray[np.float32] | None = None) -> NDArray[np.floating]:
        """Probabilities [n, P] of n messages, with their feature rows [n, F] where they are known."""


def attack(
    detector: Detector,
    texts: Sequence[str],
    *,
    ids: Sequence[str] | None = None,
    features: NDArray[np.float32] | None = None,
    feature_names: Sequence[str] | None = None,
    policy: Sequence[int] | None = None,
    thresholds: NDArray[np.floating] | None = None,
    families: Sequence[Family] = FAMILIES,
    seed: int = 0,
    budget_queries: int = 25_000,
) -> AttackReport:
    """Attack a detector with every family; `texts` are abusive messages, n of them.

    A message is caught where any policy's score reaches its threshold, or, with `policy` (a column index a
    message), where that one does. Only messages that are caught as they are get attacked; the others count as
    missed before and after. `features` [n, F] are the rows as served; their columns are `feature_names`, by
    default the detector's own `feature_names`, else all declared features. `ids` (event ids; positions by
    default) tie reports of two detectors together.
    At most `budget_queries` messages are scored altogether; a family that could not finish says `exhausted`.

    Raises InvalidInput for no messages, sizes that disagree, or scores that are not finite.
    """
    names = tuple(ids) if ids is not None else tuple(map(str, range(len(texts))))
    _check(texts, names, features, policy, budget_queries)
    names_of = feature_names or getattr(detector, "feature_names", None) or NAMES
    oracle = _Oracle(detector, features, names_of, policy, thresholds, budget_queries)
    base = oracle.margins([(i, text) for i, text in enumerate(texts)], len(texts))
    margins = np.array([np.nan if m is None else m for m in base])
    caught = margins >= 0
    targets = [_Target.of(i, names[i], texts[i], float(margins[i])) for i in np.flatnonzero(caught).tolist()]
    if any(isinstance(family, WordFamily) for family in families):
        _rank_words(oracle, targets)
    results, survivors = [], []
    for position, family in enumerate(families):
        before = oracle.spent
        allowance = (oracle.budget - oracle.spent) // (len(families) - position)
        games, exhausted = _play(oracle, family, targets, seed, allowance)
        won = {game.target.row: game for game in games if game.margin < 0}
        survivors += [HardExample(names[i], family.name, game.text(), game.margin) for i, game in won.items()]
        after = tuple(bool(c) and i not in won for i, c in enumerate(caught))
        applicable = sum(game.applicable for game in games)
        results.append(
            FamilyResult(family.name, family.atlas, after, applicable, oracle.spent - before, exhausted)
        )
    return AttackReport(
        seed, names, tuple(map(bool, caught)), tuple(results), tuple(survivors), oracle.spent, budget_queries
    )


def _check(
    texts: Sequence[str],
    ids: tuple[str, ...],
    features: NDArray[np.float32] | None,
    policy: Sequence[int] | None,
    budget: int,
) -> None:
    if not texts:
        raise InvalidInput("there is no message to attack; give abusive messages of the held-out period")
    for what, size in (("ids", len(ids)), ("features", texts if features is None else features),
                       ("policy", texts if policy is None else policy)):  # fmt: skip
        count = size if isinstance(size, int) else len(size)
        if count != len(texts):
            raise InvalidInput(f"{count} {what} were given for {len(texts)} messages; give one for each")
    if len(set(ids)) != len(ids):
        raise InvalidInput("ids repeat; each attacked message needs its own, or reports cannot be compared")
    if budget < len(texts):
        raise InvalidInput(
            f"a budget of {budget} queries does not suffice to score {len(texts)} messages even once; "
            "raise it or attack fewer"
        )


class _Oracle:
    """The detector behind a budget and a cache: signed distance from the operating point, in log-odds."""

    def __init__(
        self,
        detector: Detector,
        features: NDArray[np.float32] | None,
        feature_names: Sequence[str],
        policy: Sequence[int] | None,
        thresholds: NDArray[np.floating] | None,
        budget: int,
    ) -> None:
        self._detector, self._features, self._names = detector, features, feature_names
        self._policy = None if policy is None else np.asarray(policy, dtype=np.intp)
        self._cut = _logit(np.asarray(detector.thresholds if thresholds is None else thresholds, dtype=float))
        self._known: dict[tuple[int, str], float] = {}
        self.budget = budget
        self.spent = 0

    def margins(self, asked: Sequence[tuple[int, str]], allowance: int) -> list[float | None]:
        """Distance above (caught, >= 0) or below (evaded) for each (message, text); None where it was not
        affordable."""
        new = list(dict.fromkeys(key for key in asked if key not in self._known))
        new = new[: max(0, min(allowance, self.budget - self.spent))]
        if new:
            rows = np.array([row for row, _text in new])
            self._known.update(zip(new, self._score(rows, [text for _row, text in new]), strict=True))
            self.spent += len(new)
        return [self._known.get(key) for key in asked]

    def _score(self, rows: NDArray[np.intp], texts: list[str]) -> list[float]:
        features = None if self._features is None else with_text(self._features[rows], texts, self._names)
        scores = np.asarray(self._detector.score(texts, features), dtype=float)
        if scores.shape != (len(texts), self._cut.size) or not np.isfinite(scores).all():
            raise InvalidInput(
                f"the detector answered {len(texts)} messages with an array of shape {scores.shape} for "
                f"{self._cut.size} policies, or with values that are not finite; it cannot be evaluated"
            )
        above = _logit(scores) - self._cut
        chosen = (
            above.max(axis=1) if self._policy is None else above[np.arange(len(texts)), self._policy[rows]]
        )
        return [float(value) for value in chosen]


def _logit(p: NDArray[np.floating]) -> NDArray[np.floating]:
    clipped = np.clip(p, _TINY, 1 - _TINY)
    return np.asarray(np.log(clipped / (1 - clipped)))


@dataclass
class _Target:
    """A message that is caught as it is; `words` are the positions of its words in `pieces`, most telling
    first."""

    row: int
    id: str
    original: str
    margin: float
    pieces: list[str]
    words: list[int]

    @classmethod
    def of(cls, row: int, name: str, text: str, margin: float) -> _Target:
        pieces = _SPLIT.split(text)
        return cls(row, name, text, margin, pieces, [i for i in range(0, len(pieces), 2) if pieces[i]])

    def spans(self, most: int) -> list[list[int]]:
        """The words in at most so many contiguous groups of about equal size."""
        count = min(most, len(self.words))
        return [part.tolist() for part in np.array_split(np.array(self.words), count)] if count else []

    def without(self, places: Iterable[int]) -> str:
        """The message with some of its words left out."""
        gone = set(places)
        return "".join(piece for i, piece in enumerate(self.pieces) if i not in gone)


def _rank_words(oracle: _Oracle, targets: list[_Target]) -> None:
    """Order each target's words by how much the score falls when they are left out."""
    allowance = int(IMPORTANCE_SHARE * oracle.budget)
    most = min(MAX_SPANS, allowance // max(1, len(targets)))
    if most < 2:
        return
    asked = [(target, span) for target in targets for span in target.spans(most)]
    found = oracle.margins([(target.row, target.without(span)) for target, span in asked], allowance)
    ranked: dict[int, list[tuple[float, list[int]]]] = {}
    for (target, span), margin in zip(asked, found, strict=True):
        ranked.setdefault(target.row, []).append((margin if margin is not None else np.inf, span))
    for target in targets:
        by_effect = sorted(ranked.get(target.row, []), key=lambda item: (item[0], item[1]))
        target.words = [place for _margin, span in by_effect for place in span]


@dataclass
class _Game:
    """One target under one family: its best rewriting so far."""

    target: _Target
    family: Family
    rng: random.Random
    margin: float
    edits: dict[int, str] = field(default_factory=dict)
    whole: str | None = None
    places: list[int] = field(default_factory=list)
    limit: int = 0
    rounds: int = 0
    active: bool = True
    applicable: bool = False

    def text(self) -> str:
        """The rewriting that was kept."""
        if self.whole is not None:
            return self.whole
        return self.with_edit({})

    def with_edit(self, edit: dict[int, str]) -> str:
        """The kept rewriting with some words rewritten further."""
        changed = {**self.edits, **edit}
        return "".join(changed.get(i, piece) for i, piece in enumerate(self.target.pieces))


def _start(family: Family, target: _Target, seed: int) -> _Game:
    game = _Game(target, family, random.Random(f"{seed}:{family.name}:{target.id}"), target.margin)
    if isinstance(family, WordFamily):
        game.limit = family.max_words(len(target.words))
        places = [i for i in target.words if family.applies(target.pieces[i])]
        # The most telling words first, then once more the same: another rewriting of a word costs no
        # further word.
        game.places = (places[: 2 * game.limit] + places[: game.limit])[:MAX_ROUNDS]
        game.active = bool(places)
    return game


def _play(
    oracle: _Oracle, family: Family, targets: list[_Target], seed: int, allowance: int
) -> tuple[list[_Game], bool]:
    """Play every target under one family; the games, and whether the allowance ran out before they were
    over."""
    games = [_start(family, target, seed) for target in targets]
    stop = oracle.spent + allowance
    while active := [game for game in games if game.active]:
        proposed = [(game, proposal) for game in active for proposal in _propose(game)]
        asked = [(game.target.row, text) for game, (text, _edit) in proposed]
        answers = oracle.margins(asked, stop - oracle.spent)
        best: dict[int, tuple[float, str, dict[int, str]]] = {}
        for (game, (text, edit)), margin in zip(proposed, answers, strict=True):
            if margin is not None and margin < best.get(game.target.row, (np.inf,))[0]:
                best[game.target.row] = (margin, text, edit)
        for game in active:
            _advance(game, best.get(game.target.row))
        if any(margin is None for margin in answers):
            return games, True
    return games, False


def _propose(game: _Game) -> list[tuple[str, dict[int, str]]]:
    """Rewritings to score in this round, each with the words that it rewrites; readable ones only."""
    family, original = game.family, game.target.original
    if isinstance(family, WordFamily):
        place = game.places[game.rounds]
        if place not in game.edits and len(game.edits) >= game.limit:
            return []
        words = family.options(game.target.pieces[place], game.rng, WORD_TRIES)
        made = [(game.with_edit({place: word}), {place: word}) for word in words]
    elif isinstance(family, MessageFamily):
        made = [(text, {}) for text in family.extensions(game.text(), game.rng, MESSAGE_TRIES)]
    else:
        text = family.mutate(original, 1.0, game.rng)
        made = [(text, {})] if text != original else []
    made = [(text, edit) for text, edit in made if family.readable(original, text)]
    game.applicable |= bool(made)
    return made


def _advance(game: _Game, best: tuple[float, str, dict[int, str]] | None) -> None:
    """Keep the best rewriting if it helped; decide whether the message stays in play."""
    game.rounds += 1
    helped = best is not None and best[0] < game.margin
    if best is not None and helped:
        game.margin, text, edit = best
        game.edits.update(edit)
        if not edit:
            game.whole = text
    if isinstance(game.family, WordFamily):
        over = game.rounds >= len(game.places)
    else:
        steps = game.family.steps if isinstance(game.family, MessageFamily) else MAX_ROUNDS
        over = game.rounds >= steps or best is None
    game.active = game.margin >= 0 and not over and not _futile(game)


def _futile(game: _Game) -> bool:
    """Whether even three times the pace so far would not do in the rounds that are left."""
    if game.rounds < 3 or not isinstance(game.family, WordFamily):
        return False
    pace = (game.target.margin - game.margin) / game.rounds
    return 3 * pace * (len(game.places) - game.rounds) < game.margin
