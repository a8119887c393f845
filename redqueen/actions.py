"""What is done about a message, given its probabilities: the one rule, for serving and for replays alike.

Thresholds come with the model (costs and a false-positive budget decide them); nothing here estimates
anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from redqueen.settings import Settings

ALLOW, REVIEW, LIMIT, BLOCK = "allow", "review", "limit", "block"


@dataclass(frozen=True)
class ActionRules:
    """When a message is limited, blocked or shown to a person.

    severe: policies whose messages are blocked from the threshold on; others are limited first.
    block_probability: from here on a message of a mild policy is blocked too (never below its threshold).
    review_ratio: share of the threshold from which a message is delivered and queued for a person.
    """

    severe: frozenset[str] = frozenset()
    block_probability: float = 0.97
    review_ratio: float = 0.5

    @classmethod
    def of(cls, settings: Settings) -> ActionRules:
        """The rules that `settings` states."""
        return cls(
            severe=frozenset(settings.severe_policies),
            block_probability=settings.block_probability,
            review_ratio=settings.review_ratio,
        )


def choose(
    probabilities: ArrayLike, thresholds: ArrayLike, policies: Sequence[str], rules: ActionRules
) -> list[str]:
    """The action for each message.

    Args:
        probabilities: [n, P], each in [0, 1], columns in the order of `policies`.
        thresholds: [P]; a policy acts where its probability reaches its threshold.

    Returns:
        n actions, the strongest any policy asks for: block, limit, review, allow.
    """
    p = np.asarray(probabilities, dtype=np.float64).reshape(-1, len(policies))
    t = np.asarray(thresholds, dtype=np.float64).reshape(len(policies))
    over = p >= t
    severe = np.array([policy in rules.severe for policy in policies], dtype=bool)
    block = (over & (severe | (p >= rules.block_probability))).any(axis=1)
    review = (p >= rules.review_ratio * t).any(axis=1)
    strength = np.select([block, over.any(axis=1), review], [3, 2, 1], default=0)
    names = (ALLOW, REVIEW, LIMIT, BLOCK)
    return [names[level] for level in strength]
