"""Estimate of the number of clusters where nobody has labels: five criteria vote.

The criteria look at different things, and err in different directions; each has a curve over the
number of clusters k:

peaks: how far the k-th highest peak of the density of rows stands out, in standard errors; votes
for those above 2.5.
modularity: edges of the neighbour graph within spectral clusters beyond chance (Newman and Girvan
2004); the largest.
eigengap: how far the k-th eigenvalue of the neighbour graph is from the next (von Luxburg 2007);
the largest.
agreement: adjusted Rand index of the spectral and of Ward's clusters; the last k that is within
0.05 of the best.
prediction: how often pairs of one cluster of one half stay together when the other half assigns
them, after Tibshirani and Walther (2005); the last within 0.05. They take the worst cluster, we the
mean over images: the smallest of many clusters would decide.

The number is the median of the votes on a logarithmic scale, peaks counted twice. How near it comes
on sets that have labels, and how often `low` to `high` holds the truth, is measured by
`scripts/compare_numbers.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.clusterers import principal
from deepclust.eval.label_free import as_array, sample_rows
from deepclust.ops import kmeans, knn
from deepclust.ops.kmeans.fit import KMeansResult
from deepclust.ops.spectral import spectral_components

CRITERIA = ("peaks", "modularity", "eigengap", "agreement", "prediction")
CLUSTERED = ("modularity", "agreement", "prediction")
"""Criteria that need clusters; the others give their whole curve at once."""
MAX_ROWS = 5000
"""Rows that are looked at; of more, as many are drawn."""
MAX_CLUSTERS = 60
"""The largest number that is tried if none is given."""
FEWEST = 10
"""Images with different features below which there is nothing to estimate from."""
PEAK = 2.5
"""Standard errors by which a peak must stand out to count."""
PEAK_RANGE = (2.0, 3.0)
"""Standard errors by which a peak must stand out to count for `high` and for `low`."""
NEAR_BEST = 0.05
"""Loss of agreement or prediction, against the best number, that still counts as equal."""
NEIGHBORS = 15
"""Neighbours of a row in the graph of modularity and eigengap."""
DENSITY_NEIGHBORS = 20
"""Most neighbours by whose distance the density is measured."""

Curve = tuple[list[int], list[float]]
"""Numbers of clusters, and a criterion's value at each."""
Sureness = Literal["clear", "likely", "unclear"]


@dataclass(frozen=True)
class ClusterCount:
    """Estimate of the number of clusters, and what it rests on."""

    k: int
    """The estimate, at least 1."""
    low: int
    """The smallest number that is plausible."""
    high: int
    """The largest number that is plausible."""
    sure: Sureness
    """`clear` if all five criteria vote for k (or 25 %, or 1, beside it), `likely` if three or four
    do, else `unclear`; that also where the density has no second peak."""
    statement: str
    """A few plain sentences."""
    curves: dict[str, Curve]
    """Criterion to its curve; empty where there was nothing to estimate from."""
    votes: dict[str, int]
    """Criterion to the number it votes for; empty where there was nothing to estimate from."""


def estimate_num_clusters(
    features: Any,
    *,
    smallest: int = 2,
    largest: int | None = None,
    seed: int = 0,
) -> ClusterCount:
    """Estimate of the number of clusters in features.

    With fewer than ten different rows nothing can be told: the smallest number that makes sense,
    and `unclear`.

    Args:
        features: (N, D), tensor or array, compared by direction.
        smallest: the smallest number looked at.
        largest: the largest number looked at, 60 if None; at most a fifth of the different
            images, so that clusters have five on average.
        seed: of the rows that are drawn and of k-means.

    Raises:
        ValueError: `smallest` is below 2 or above `largest`, or rows are not finite.
    """
    if smallest < 2 or (largest is not None and largest < smallest):
        raise ValueError(f"smallest={smallest}, largest={largest}: need 2 <= smallest <= largest")
    rows = as_array(features).astype(np.float32)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(
            f"features must be finite numbers in rows and columns, they are {rows.shape}"
        )
    rows = rows[sample_rows(len(rows), MAX_ROWS, seed)]
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    rows = rows / np.maximum(lengths, np.finfo(np.float32).tiny)
    distinct = len(np.unique(rows, axis=0))
    most = min(MAX_CLUSTERS if largest is None else largest, distinct // 5)
    if distinct < FEWEST or most < smallest:
        return _too_few(len(rows), distinct, max(1, min(smallest, distinct - 1)))
    return _decide(_Curves(torch.from_numpy(rows), smallest, most, seed))


# --- the curves ---------------------------------------------------------------------------------


class _Curves:
    """Every criterion's curve, from one neighbour graph, its eigenvectors and one Ward tree."""

    def __init__(self, x: Tensor, smallest: int, largest: int, seed: int) -> None:
        """x: (n, D) rows of length one."""
        from scipy.cluster.hierarchy import linkage

        self.smallest = smallest
        self.largest = largest
        self.seed = seed
        k = min(DENSITY_NEIGHBORS, len(x) - 1)
        similarity, near = knn(x, x, k=k, exclude_self=True)
        self.near = near[:, :NEIGHBORS].numpy()
        # Of rows of length one the squared distance is 2 − 2 cos.
        self.peaks = density_peaks((2 - 2 * similarity.double()).numpy(), near.numpy())
        # One component more than clusters: the last gap has two ends.
        components = spectral_components(x, largest + 1, num_neighbors=NEIGHBORS)
        self.values, self.vectors = components
        self.x = torch.from_numpy(principal(x.numpy(), seed)).float()
        self.tree = linkage(self.x.numpy(), "ward")
        # The second entry keeps this stream apart from other draws by the same seed.
        halves = np.random.default_rng([seed, 5]).permutation(len(x))
        self.halves = [self.x[np.sort(part)] for part in np.array_split(halves, 2)]
        self.known: dict[int, dict[str, float]] = {}

    def at(self, num_clusters: int) -> dict[str, float]:
        """Values of the criteria that need clusters, at one number of them; computed once."""
        from scipy.cluster.hierarchy import fcluster
        from sklearn.metrics import adjusted_rand_score

        if num_clusters not in self.known:
            embedding = F.normalize(self.vectors[:, :num_clusters], dim=1).float()
            spectral = self.cluster(embedding, num_clusters).labels.numpy()
            ward = fcluster(self.tree, num_clusters, "maxclust")
            self.known[num_clusters] = {
                "modularity": modularity(spectral, self.near),
                "agreement": float(adjusted_rand_score(spectral, ward)),
                "prediction": self.prediction(num_clusters),
            }
        return self.known[num_clusters]

    def cluster(self, x: Tensor, num_clusters: int) -> KMeansResult:
        """The best of three runs of k-means."""
        return kmeans(x, num_clusters, num_restarts=3, num_iters=30, seed=self.seed)

    def prediction(self, num_clusters: int) -> float:
        """Prediction strength of the two halves, the mean of both directions."""
        results = [self.cluster(half, num_clusters) for half in self.halves]
        strengths = []
        for half, result, other in zip(self.halves, results, reversed(results)):
            # No iteration: the rows of one half are assigned to the centroids of the other.
            assigned = kmeans(half, num_clusters, init=other.centroids, num_iters=0).labels.numpy()
            strengths.append(prediction_strength(result.labels.numpy(), assigned))
        return float(np.mean(strengths))

    def all(self) -> dict[str, Curve]:
        """Every criterion's curve, as far as it is known."""
        ks = list(range(self.smallest, self.largest + 1))
        heights = np.zeros(self.largest)
        heights[: len(self.peaks)] = self.peaks[: self.largest]
        gaps = (self.values[:-1] - self.values[1:]).tolist()
        curves = {
            "peaks": (ks, heights[ks[0] - 1 :].tolist()),
            "eigengap": (ks, gaps[ks[0] - 1 : ks[-1]]),
        }
        tried = sorted(self.known)
        for name in CLUSTERED:
            curves[name] = (tried, [self.known[k][name] for k in tried])
        return {name: curves[name] for name in CRITERIA}

    def votes(self) -> dict[str, int]:
        """Number of clusters that each criterion is for."""
        votes: dict[str, int] = {}
        for name, (ks, values) in self.all().items():
            if name == "peaks":
                votes[name] = self.peaks_above(PEAK)
            elif name in ("agreement", "prediction"):
                # Both fall once k passes the truth, and are also high for few clusters.
                near_best = np.flatnonzero(np.asarray(values) >= max(values) - NEAR_BEST)
                votes[name] = ks[int(near_best[-1])]
            else:
                votes[name] = ks[int(np.argmax(values))]
        return votes

    def peaks_above(self, height: float) -> int:
        """How many peaks stand out by so many standard errors, within the range looked at."""
        return int(np.clip((self.peaks >= height).sum(), self.smallest, self.largest))


def density_peaks(distances: np.ndarray, near: np.ndarray) -> np.ndarray:
    """Heights of the density's peaks above the pass to a higher one, in standard errors, falling.

    The topological mode analysis ToMATo (Chazal et al. 2013): rows are added to the neighbour graph
    (half of the k) from dense to sparse; where two islands meet, the lower one's peak has its
    height above that pass.

    The log density is −d/2 times the log of the mean squared distance to as many neighbours as make
    a twenty-fifth of the rows, 5 to k. The intrinsic dimension d is that of Levina and Bickel
    (2004), and the standard error of a difference of log densities is sqrt(2 / neighbours).

    distances: (n, k) squared, ascending. near: (n, k) indices of these neighbours.
    """
    num, most = near.shape
    used = min(most, max(5, min(DENSITY_NEIGHBORS, num // 25)))
    # Copies of a row are at distance 0, whose log is none.
    squared = distances[:, :used].clip(1e-9)
    logs = np.log(squared[:, -1:] / squared[:, :-1]).mean(1) / 2
    # (m − 2) / (m − 1): the maximum-likelihood estimate without its bias.
    dim = (used - 2) / (used - 1) / max(float(logs.mean()), 1e-3)
    density = -np.log(squared.mean(1)) * dim / 2
    order = np.argsort(-density, kind="stable")
    heights, islands = _rise(density, order, _both_ways(near[:, : max(3, used // 2)]))
    error = np.sqrt(2 / used)
    # An island that meets no other stands out by all of its height, and by no less than the highest
    # of them.
    highest = float(density.max() - density.min())
    return np.sort(np.concatenate([np.full(islands, highest), heights]))[::-1] / error


def _both_ways(near: np.ndarray) -> list[set[int]]:
    """Each row's neighbours and the rows that it is a neighbour of."""
    linked: list[set[int]] = [set(row) for row in near.tolist()]
    for row, others in enumerate(near.tolist()):
        for other in others:
            linked[other].add(row)
    return linked


def _rise(
    density: np.ndarray,
    order: np.ndarray,
    linked: list[set[int]],
) -> tuple[list[float], int]:
    """Heights of the peaks above the pass to a higher one, and the number that have no such pass.

    density: (n,). order: (n,) rows from dense to sparse. linked: neighbours of each row.
    """
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    # A forest: each row leads to a denser one of its island, and the peak to itself.
    top = [-1] * len(order)
    heights: list[float] = []

    def peak_of(row: int) -> int:
        # Paths are halved on the way, so that they stay short.
        while top[row] != row:
            top[row] = top[top[row]]
            row = top[row]
        return row

    for row in order.tolist():
        met = {peak_of(other) for other in linked[row] if rank[other] < rank[row]}
        highest = min(met, key=lambda peak: rank[peak], default=row)
        top[row] = highest
        # The row is the pass between the islands it touches: all but the highest end here.
        for peak in met - {highest}:
            heights.append(float(density[peak] - density[row]))
            top[peak] = highest
    return heights, sum(above == row for row, above in enumerate(top))


def modularity(labels: np.ndarray, near: np.ndarray) -> float:
    """Modularity (Newman and Girvan 2004): share of edges within clusters beyond that by chance.

    Chance is a graph with the same degrees. labels: (n,). near: (n, k) neighbours, one edge each.
    """
    degrees = near.shape[1] + np.bincount(near.ravel(), minlength=len(near))
    shares = np.bincount(labels, weights=degrees) / degrees.sum()
    return float((labels[near] == labels[:, None]).mean() - (shares**2).sum())


def prediction_strength(labels: np.ndarray, assigned: np.ndarray) -> float:
    """Share of the other rows of its cluster that are assigned together with a row, mean over rows.

    A row that is alone in its cluster counts as 0. labels: (n,) clusters. assigned: (n,) clusters
    by other centroids.
    """
    counts = np.zeros((labels.max() + 1, assigned.max() + 1))
    np.add.at(counts, (labels, assigned), 1)
    sizes = counts.sum(1)
    # Of a cluster's n (n − 1) ordered pairs, those that stay together, over n − 1 for each row.
    together = (counts * (counts - 1)).sum(1) / np.maximum(sizes - 1, 1)
    return float(together.sum() / len(labels))


# --- the decision -------------------------------------------------------------------------------


def _decide(curves: _Curves) -> ClusterCount:
    """Tries numbers on a grid, then all those about the estimate, and puts the votes together."""
    grid = _grid(curves.smallest, curves.largest)
    for k in grid:
        curves.at(k)
    votes = curves.votes()
    for center in {_median(votes), votes["modularity"]}:
        index = int(np.searchsorted(grid, center))
        first = grid[max(index - 1, 0)]
        last = grid[min(index + 1, len(grid) - 1)]
        for k in range(first, last + 1):
            curves.at(k)
    votes = curves.votes()
    k = _median(votes)
    ordered = sorted(votes.values())
    # The range leaves out one vote at either end: one criterion may be far off.
    low = min(k, ordered[1], curves.peaks_above(PEAK_RANGE[1]))
    high = max(k, ordered[-2], curves.peaks_above(PEAK_RANGE[0]))
    apart = bool((curves.peaks >= PEAK).sum() > 1)
    text = statement(k, low, high, votes, apart=apart)
    return ClusterCount(k, low, high, how_sure(k, votes, apart=apart), text, curves.all(), votes)


def _grid(smallest: int, largest: int) -> list[int]:
    """Numbers that grow by an eighth, at least by one."""
    grid = [smallest]
    while grid[-1] < largest:
        grid.append(min(largest, max(grid[-1] + 1, round(grid[-1] * 1.125))))
    return grid


def _median(votes: Mapping[str, int]) -> int:
    """Median of the votes on a logarithmic scale, peaks counted twice."""
    # Six logarithms: the median is the mean of the middle two, a geometric mean of votes.
    return round(float(np.exp(np.median(np.log([votes["peaks"], *votes.values()])))))


def agrees(vote: int, k: int) -> bool:
    """Whether a vote is for k, or within 25 % or 1 of it."""
    return abs(vote - k) <= 1 or 0.8 <= vote / k <= 1.25


def how_sure(k: int, votes: Mapping[str, int], *, apart: bool = True) -> Sureness:
    """How sure the number k is, by how many votes agree with it.

    apart: whether a second peak of the density stands out; if none does, no votes make k sure.
    """
    near = sum(agrees(vote, k) for vote in votes.values())
    if not apart or near < 3:
        return "unclear"
    return "clear" if near == len(votes) else "likely"


def statement(
    k: int,
    low: int,
    high: int,
    votes: Mapping[str, int],
    *,
    apart: bool = True,
) -> str:
    """The estimate in a few plain sentences, with what to do about it; see `ClusterCount`."""
    near = sum(agrees(vote, k) for vote in votes.values())
    each = ", ".join(f"{name} {vote}" for name, vote in votes.items())
    count = f"{near} of {len(votes)} criteria are for {k} or about as many ({each})"
    sure = how_sure(k, votes, apart=apart)
    if sure == "clear":
        return f"{k} clusters: {count}."
    # low and high may be equal, and are then named once.
    others = " and ".join(f"-k {other}" for other in dict.fromkeys((low, high)) if other != k)
    advice = f"Look at {others} too" if others else "Look at what it gives"
    if high > k:
        advice += ": too many clusters are easier to merge than too few to split."
    else:
        advice += "."
    if sure == "likely":
        return f"Probably {k} clusters, between {low} and {high}: {count}. {advice}"
    if not apart:
        count = f"no two groups of images stand apart; {count}"
    return (
        f"How many clusters there are is unclear, {k} is a guess between {low} and {high}: "
        f"{count}. {advice}"
    )


def _too_few(num: int, distinct: int, k: int) -> ClusterCount:
    """The estimate where the rows tell nothing."""
    images = f"{num} images"
    if distinct != num:
        images += f" with {distinct} different features"
    text = (
        f"{images} are too few to tell how many clusters there are; {k} is taken. "
        "Give a number with -k."
    )
    return ClusterCount(k, k, k, "unclear", text, {}, {})
