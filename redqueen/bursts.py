"""Many newcomers on one thing within minutes: bursts, from who reported what and when.

Only the statistics belong here: integers in, groups of rows out. That a thing is reported by many is no
burst, popular things are; that hardly anyone of the many ever reported before is, where elsewhere most have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import bdtrc

from redqueen.rings import Codes, Flags, both

SECOND = 1_000_000


@dataclass(frozen=True)
class BurstLimits:
    """What makes a burst.

    raters, minutes: so many newcomers, or more, within so many minutes, ...
    alpha: ... where the share of newcomers among everybody else makes it less likely than this.
    newcomer_hours: a rater is a newcomer with reports in fewer earlier hours, and no report upheld yet.
    prior: so many imagined reports by newcomers join everybody else: where little is known, or on a young
        platform, newcomers are nothing odd.
    """

    raters: int = 12
    minutes: float = 15.0
    alpha: float = 1e-4
    newcomer_hours: int = 3
    prior: float = 5.0


def bursts(rater: Codes, key: Codes, at: Codes, new: Flags, limits: BurstLimits | None = None) -> list[Codes]:
    """The rows of each burst, sorted, by what they are about.

    Args:
        rater, key, at: a report a row: who, about what, when in microseconds; codes from 0.
        new: the rater is a newcomer at this moment. Only newcomers' reports are a burst's.
    """
    how = limits or BurstLimits()
    if new.sum() < how.raters:
        return []
    # One report a rater and thing: ten by one person are no crowd.
    rows = np.unique(both(key, rater), return_index=True)[1]
    window = int(how.minutes * 60 * SECOND)
    clock = at - int(at.min())
    place = (key * (int(clock.max()) + window + 1) + clock)[rows]
    order = np.lexsort((rows, place))
    rows, place = rows[order], place[order]
    key, new = key[rows], new[rows]
    here, start = np.arange(len(rows)), np.searchsorted(place, place - window, side="left")
    so_far = np.concatenate([[0], np.cumsum(new)])
    crowd, newcomers = here - start + 1, so_far[1:] - so_far[start]
    enough = newcomers >= how.raters
    chance = bdtrc(newcomers - 1.0, crowd, _usual(key, new, how)) * max(1, len(np.unique(key[enough])))
    hit = enough & (chance < how.alpha)
    begins = np.bincount(start[hit], minlength=len(rows) + 1)
    ends = np.bincount(here[hit] + 1, minlength=len(rows) + 1)
    inside = (np.cumsum(begins - ends)[:-1] > 0) & new
    return [np.sort(rows[inside & (key == one)]) for one in np.unique(key[inside])]


def _usual(key: Codes, new: Flags, how: BurstLimits) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """For each report the share of newcomers among those about anything else."""
    newcomers, everybody = np.bincount(key, new)[key], np.bincount(key)[key]
    return (new.sum() - newcomers + how.prior) / (len(new) - everybody + how.prior)
