"""Local outlier factors (Breunig, Kriegel, Ng and Sander 2000): how much sparser a row lies than
its neighbours do.

About 1 for a row in the midst of others; larger the farther it is from neighbours that are close to
each other.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from deepclust.ops.neighbors import knn

TINY = 1e-10
"""Added to a mean distance: rows that are all alike have none. That of scikit-learn."""


class Density(NamedTuple):
    """What tells how densely rows (m, D) lie. reach: (m,) distance to the k-th nearest other row.
    density: (m,), one over the mean distance to the k nearest, each counted as that neighbour's
    reach at least."""

    reach: Tensor
    density: Tensor


def fit_density(rows: Tensor, k: int) -> tuple[Density, Tensor]:
    """The density of rows (m, D), by Euclidean distance to k < m neighbours, and their own factors
    (m,).
    """
    distances, places = knn(rows, rows, k=k, metric="euclidean", exclude_self=True)
    reach = distances[:, -1]
    density = _density(distances, reach[places])
    return Density(reach, density), density[places].mean(1) / density


def outlier_factors(
    queries: Tensor, rows: Tensor, known: Density, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Factors (n,) of other rows (n, D) among rows (m, D) whose density is known, by the same k.

    Also the distance to the nearest of the rows (n,) and its place (n,), which the search brings.
    """
    distances, places = knn(queries, rows, k=k, metric="euclidean")
    factors = known.density[places].mean(1) / _density(distances, known.reach[places])
    return factors, distances[:, 0], places[:, 0]


def _density(distances: Tensor, reaches: Tensor) -> Tensor:
    """One over the mean of distances (n, k), each raised to the reach (n, k) of the row it leads
    to.
    """
    return 1 / (distances.maximum(reaches).mean(1) + TINY)
