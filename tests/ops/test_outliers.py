"""Local outlier factors against scikit-learn, with copies and with rows far from the origin."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.neighbors import LocalOutlierFactor

from deepclust.ops.outliers import fit_density, outlier_factors


@pytest.mark.parametrize("k", [3, 10])
@pytest.mark.parametrize("kind", ["plain", "copies", "shifted", "float64"])
def test_factors_are_those_of_scikit_learn(kind: str, k: int) -> None:
    random = np.random.default_rng(0)
    rows = random.normal(size=(80, 5)) * np.r_[np.ones(70), np.full(10, 4.0)][:, None]
    queries = random.normal(size=(30, 5)) * 2
    if kind == "copies":
        rows[:20] = rows[0]
        queries[:5] = rows[0]
    if kind == "shifted":
        rows, queries = rows + 50, queries + 50
    dtype = np.float64 if kind == "float64" else np.float32
    rows, queries = rows.astype(dtype), queries.astype(dtype)
    theirs = LocalOutlierFactor(k, novelty=True).fit(rows.astype(np.float64))
    known, own = fit_density(torch.from_numpy(rows), k)
    found, distance, nearest = outlier_factors(
        torch.from_numpy(queries), torch.from_numpy(rows), known, k
    )
    np.testing.assert_allclose(own, -theirs.negative_outlier_factor_, rtol=2e-4)
    np.testing.assert_allclose(found, -theirs.score_samples(queries.astype(np.float64)), rtol=2e-4)
    exact = np.linalg.norm(queries[:, None].astype(np.float64) - rows[None], axis=2)
    np.testing.assert_allclose(distance, exact.min(1), atol=1e-5)
    np.testing.assert_allclose(exact[np.arange(30), nearest], exact.min(1), atol=1e-5)


def test_rows_that_are_all_alike_have_finite_factors() -> None:
    rows = torch.ones(10, 3)
    known, own = fit_density(rows, 3)
    found, _, _ = outlier_factors(torch.tensor([[1.0, 1, 1], [5, 5, 5]]), rows, known, 3)
    assert bool(own.isfinite().all()) and bool(found.isfinite().all()) and float(found[1]) > 1e6
