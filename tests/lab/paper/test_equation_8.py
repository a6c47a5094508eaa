"""Eqs. (9) to (14): a general optimiser, which knows nothing of the derivation, finds the ranks of Eq. (8)."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import minimize


@pytest.mark.parametrize("seed", range(3))
def test_the_minimum_of_eq9_under_eq10_is_proportional_to_g_to_the_two_thirds(seed):
    random = np.random.default_rng(seed)
    G = 10 ** random.uniform(-1, 1, size=6)
    R = 48.0

    def loss(r: np.ndarray) -> float:
        return float(np.sum(G / np.sqrt(r)))

    found = minimize(
        loss,
        np.full(6, R / 6),
        method="SLSQP",
        bounds=[(1e-3, R)] * 6,
        constraints={"type": "eq", "fun": lambda r: r.sum() - R},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    eq8 = R * G ** (2 / 3) / np.sum(G ** (2 / 3))
    assert found.x == pytest.approx(eq8, rel=1e-3)
    assert loss(eq8) < loss(np.full(6, R / 6))
