"""Gradient-boosted trees over the features of behaviour. XGBoost's own JSON (UBJ), no pickle.

Without a sender there is no behaviour, and then there are no trees: callers hold `None` and say so. Where a
feature is missing that hardly ever was, the trees have nothing to say either. A split learns which way the
messages go that lack its feature (Chen & Guestrin, XGBoost, KDD 2016, 3.4); where none lacked it that way is
arbitrary, and a feed that breaks off may turn one benign message in three into abuse.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LEAST_MISSING = 30
"""In so many benign messages a feature must have been missing for the trees to know what that means. What is
missing in abuse alone would make abuse of whoever loses it.
"""

_DEMANDED = "redqueen_demanded"
"""The booster's attribute that lists the columns of which that is not known."""

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Trees:
    """One booster with an output per policy.

    Attributes:
        demanded: columns without which the trees do not speak; in any other a missing feature, NaN, takes the
            branch learnt for it.
    """

    booster: Any
    policies: int
    demanded: tuple[int, ...] = ()

    def logits(self, features: Floats) -> npt.NDArray[np.float32]:
        """Log odds [n, policies] of float32 features [n, features]; NaN where a demanded one is missing."""
        if len(features) == 0:
            return np.zeros((0, self.policies), np.float32)
        margin = self.booster.inplace_predict(
            np.ascontiguousarray(features, np.float32), predict_type="margin", validate_features=False
        )
        said = np.array(margin, np.float32).reshape(len(features), self.policies)
        said[np.isnan(features[:, self.demanded]).any(1)] = np.nan
        return said

    def to_bytes(self) -> bytes:
        """UBJ."""
        return bytes(self.booster.save_raw("ubj"))

    @staticmethod
    def from_bytes(data: bytes, policies: int) -> Trees:
        """The inverse of `to_bytes`; the booster then keeps to one thread."""
        import xgboost

        booster = xgboost.Booster({"nthread": 1})
        booster.load_model(bytearray(data))
        booster.set_param({"nthread": 1, "device": "cpu"})
        # A bundle older than the attribute demands none.
        return Trees(booster, policies, tuple(json.loads(booster.attr(_DEMANDED) or "[]")))


def fit(
    features: Floats,
    targets: Floats,
    weight: Floats,
    *,
    counted: int | None = None,
    rounds: int = 80,
    depth: int = 5,
    seed: int = 0,
) -> Trees:
    """Fit on float32 features [n, features] and soft targets [n, policies], rows weighted.

    Args:
        counted: the first so many rows are messages, the others copies of them; default all.
    """
    import xgboost

    params = {
        "objective": "binary:logistic",
        "base_score": 0.5,
        "tree_method": "hist",
        "max_bin": 64,
        "max_depth": depth,
        "eta": 0.15,
        "min_child_weight": 3.0,
        "lambda": 2.0,
        "nthread": 1,
        "seed": seed,
        "verbosity": 0,
    }
    data = xgboost.QuantileDMatrix(
        features.astype(np.float32), targets.astype(np.float32), weight=weight.astype(np.float32), max_bin=64
    )
    booster = xgboost.train(params, data, num_boost_round=rounds)
    missing = np.isnan(features[:counted][targets[:counted].max(1) < 0.5]).sum(0)
    demanded = np.flatnonzero(missing < LEAST_MISSING).tolist()
    booster.set_attr(**{_DEMANDED: json.dumps(demanded)})
    return Trees(booster, targets.shape[1], tuple(demanded))
