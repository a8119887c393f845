"""Attacks on a detector before it is deployed: families of rewriting, search against scores, report and gate.

Torch-free: models reach this package through the `Detector` protocol. `families` knows text, `search` asks
the detector, `report` counts and judges; nothing else is public.
"""

from redqueen.attacks.families import (
    FAMILIES,
    BenignPadding,
    Family,
    Homoglyph,
    Invisible,
    Leet,
    MessageFamily,
    Spacing,
    Typo,
    UrlCloaking,
    WordFamily,
)
from redqueen.attacks.report import (
    AttackReport,
    Comparison,
    FamilyDifference,
    FamilyResult,
    GateLimits,
    HardExample,
    Verdict,
    clopper_pearson,
    compare,
    gate,
)
from redqueen.attacks.search import Detector, attack

__all__ = [
    "FAMILIES",
    "AttackReport",
    "BenignPadding",
    "Comparison",
    "Detector",
    "Family",
    "FamilyDifference",
    "FamilyResult",
    "GateLimits",
    "HardExample",
    "Homoglyph",
    "Invisible",
    "Leet",
    "MessageFamily",
    "Spacing",
    "Typo",
    "UrlCloaking",
    "Verdict",
    "WordFamily",
    "attack",
    "clopper_pearson",
    "compare",
    "gate",
]
