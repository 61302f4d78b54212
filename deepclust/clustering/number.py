"""How many clusters there are, where nobody has labels: five criteria, one number, and how far to
trust it.

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
`benchmarks/quality/num_clusters.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.clustering.methods import principal
from deepclust.eval.label_free import as_array, sample_rows
from deepclust.ops import kmeans, knn
from deepclust.ops.precision import as_rows
from deepclust.ops.spectral import spectral_components
from deepclust.runtime.estimates import Estimates

CRITERIA = ("peaks", "modularity", "eigengap", "agreement", "prediction")
MAX_ROWS = 5000
"""Rows that are looked at; of more, as many are drawn."""
MAX_CLUSTERS = 60
"""The largest number that is tried if none is given."""
FEWEST = 10
"""Images with different features below which there is nothing to estimate from."""
PEAK, PEAK_RANGE = 2.5, (2.0, 3.0)
"""Standard errors by which a peak must stand out to count, and by which it may or should for `high`
and `low`.
"""
NEAR_BEST = 0.05
NEIGHBORS = 15
DENSITY_NEIGHBORS = 20


@dataclass(frozen=True)
class ClusterCount:
    """k: the estimate, low to high: what is plausible, all of them at least 1. statement: a few
    plain sentences.

    sure: `clear` if all five criteria vote for k (or 25 %, or 1, beside it), `likely` if three or
    four do, else `unclear`; that also where the density has no second peak. curves: criterion to
    numbers of clusters and values.
    votes: criterion to the number it is for. Both are empty where there was nothing to estimate
    from. missing: why a criterion has no vote that failed; the others decide.
    """

    k: int
    low: int
    high: int
    sure: Literal["clear", "likely", "unclear"]
    statement: str
    curves: dict[str, tuple[list[int], list[float]]]
    votes: dict[str, int]
    missing: dict[str, str] = field(default_factory=dict)


def estimate_num_clusters(
    features: Any, *, smallest: int = 2, largest: int | None = None, seed: int = 0
) -> ClusterCount:
    """The number of clusters in features (n, D), tensor or array, that are compared by direction.

    smallest, largest: the range looked at; largest is 60 if not given, and at most a fifth of the
    images. With fewer
    than ten different rows nothing can be told: the smallest number that makes sense, and
    `unclear`. A criterion that fails has no vote. Raises ValueError where smallest is below 2 or
    above largest, or rows are not finite; RuntimeError where all criteria fail.
    """
    if smallest < 2 or (largest is not None and largest < smallest):
        raise ValueError(f"smallest={smallest}, largest={largest}: need 2 <= smallest <= largest")
    rows = as_rows(as_array(features))
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ValueError(
            f"features must be finite numbers in rows and columns, they are {rows.shape}"
        )
    rows = rows[sample_rows(len(rows), MAX_ROWS, seed)]
    rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    distinct = len(np.unique(rows, axis=0))
    most = min(MAX_CLUSTERS if largest is None else largest, distinct // 5)
    if distinct < FEWEST or most < smallest:
        return _too_few(len(rows), distinct, max(1, min(smallest, distinct - 1)))
    return _decide(_Curves(torch.from_numpy(rows), smallest, most, seed))


# --- the curves -------------------------------------------------------------------------------


class _Curves:
    """Each criterion's curve, from one neighbour graph, one decomposition of it and one tree of
    Ward's.
    """

    def __init__(self, x: Tensor, smallest: int, largest: int, seed: int) -> None:
        """x: (n, D) unit rows."""
        from scipy.cluster.hierarchy import linkage

        self.smallest, self.largest, self.seed = smallest, largest, seed
        similarity, near = knn(x, x, k=min(DENSITY_NEIGHBORS, len(x) - 1), exclude_self=True)
        self.near = near[:, :NEIGHBORS].numpy()
        self.estimates = estimates = Estimates()
        distances = (2 - 2 * similarity.double()).numpy()
        self.peaks = estimates("peaks", lambda: density_peaks(distances, near.numpy()))
        self.components = estimates(
            "eigengap", lambda: spectral_components(x, largest + 1, num_neighbors=NEIGHBORS)
        )
        reduced = estimates("prediction", lambda: torch.from_numpy(principal(x.numpy())).float())
        self.x = x if reduced is None else reduced
        self.tree = estimates("agreement", lambda: linkage(self.x.numpy(), "ward"))
        halves = np.random.default_rng([seed, 5]).permutation(len(x))
        self.halves = [self.x[np.sort(part)] for part in np.array_split(halves, 2)]
        self.known: dict[int, dict[str, float]] = {}

    def at(self, num_clusters: int) -> None:
        """Gets to know the criteria that need clusters, at one number of them; those that failed
        are left out.
        """
        from scipy.cluster.hierarchy import fcluster
        from sklearn.metrics import adjusted_rand_score

        if num_clusters in self.known:
            return
        labels: dict[str, np.ndarray] = {}

        def spectral() -> np.ndarray:
            if "spectral" not in labels:
                if self.components is None:
                    raise RuntimeError(
                        f"there is no spectral embedding: {self.estimates.missing['eigengap']}"
                    )
                embedding = F.normalize(self.components[1][:, :num_clusters], dim=1).float()
                labels["spectral"] = self.cluster(embedding, num_clusters).labels.numpy()
            return labels["spectral"]

        def ward() -> np.ndarray:
            return fcluster(self.tree, num_clusters, "maxclust")

        criteria: dict[str, Callable[[], float]] = {
            "modularity": lambda: modularity(spectral(), self.near),
            "agreement": lambda: float(adjusted_rand_score(spectral(), ward())),
            "prediction": lambda: self.prediction(num_clusters),
        }
        self.known[num_clusters] = found = {}
        for name, value in criteria.items():
            if name not in self.estimates.missing:
                found[name] = self.estimates(name, value)

    def cluster(self, x: Tensor, num_clusters: int) -> Any:
        """The best of three runs of k-means."""
        return kmeans(x, num_clusters, num_restarts=3, num_iters=30, seed=self.seed)

    def prediction(self, num_clusters: int) -> float:
        """Prediction strength, the mean of both directions."""
        found = [self.cluster(half, num_clusters) for half in self.halves]
        strengths = []
        for mine, other, half in ((0, 1, self.halves[0]), (1, 0, self.halves[1])):
            assigned = kmeans(
                half, num_clusters, init=found[other].centroids, num_iters=0
            ).labels.numpy()
            strengths.append(prediction_strength(found[mine].labels.numpy(), assigned))
        return float(np.mean(strengths))

    def all(self) -> dict[str, tuple[list[int], list[float]]]:
        """Every criterion's numbers of clusters and values, as far as they are known; without those
        that failed.
        """
        ks = list(range(self.smallest, self.largest + 1))
        curves: dict[str, tuple[list[int], list[float]]] = {}
        if self.peaks is not None:
            heights = np.zeros(self.largest)
            heights[: len(self.peaks)] = self.peaks[: self.largest]
            curves["peaks"] = (ks, heights[ks[0] - 1 :].tolist())
        if self.components is not None:
            values = self.components[0]
            gaps = (values[:-1] - values[1:]).tolist()
            curves["eigengap"] = (ks, gaps[ks[0] - 1 : ks[-1]])
        tried = sorted(self.known)
        for name in ("modularity", "agreement", "prediction"):
            if name not in self.estimates.missing:
                curves[name] = (tried, [self.known[k][name] for k in tried])
        return {name: curves[name] for name in CRITERIA if name in curves}

    def votes(self) -> dict[str, int]:
        """What each criterion is for. Raises RuntimeError where all failed."""
        found: dict[str, int] = {}
        for name, (ks, values) in self.all().items():
            best = np.argmax(values)
            if name in ("agreement", "prediction"):
                best = np.flatnonzero(np.asarray(values) >= max(values) - NEAR_BEST)[-1]
            found[name] = self.peaks_above(PEAK) if name == "peaks" else ks[int(best)]
        if not found:
            reasons = "; ".join(
                f"{name}: {reason}" for name, reason in self.estimates.missing.items()
            )
            raise RuntimeError(f"no criterion could be computed: {reasons}")
        return found

    def peaks_above(self, height: float) -> int:
        """How many peaks stand out by so many standard errors, within the range; the peaks are
        known.
        """
        assert self.peaks is not None
        return int(np.clip((self.peaks >= height).sum(), self.smallest, self.largest))


def density_peaks(distances: np.ndarray, near: np.ndarray) -> np.ndarray:
    """How far each peak of the density stands out above the pass to a higher one, in standard
    errors; descending.

    distances: (n, k) squared, ascending, to the neighbours `near` (n, k). The topological mode
    analysis ToMATo (Chazal et al. 2013): rows are added to the neighbour graph (half of the k) from
    dense to sparse; where two islands meet, the lower has its height. log density is -d/2 times the
    log of the mean distance to as many neighbours as make a twenty-fifth of the rows, 5 to k; its
    intrinsic dimension d is that of Levina and Bickel (2004), and its standard error, of a
    difference, sqrt(2 / neighbours). An island that meets no other stands out by all of its height,
    and by as much as the highest of them at least.
    """
    num, most = near.shape
    used = min(most, max(5, min(DENSITY_NEIGHBORS, num // 25)))
    squared = distances[:, :used].clip(1e-9)
    logs = np.log(squared[:, -1:] / squared[:, :-1]).mean(1) / 2
    dim = (used - 2) / (used - 1) / max(float(logs.mean()), 1e-3)
    density = -np.log(squared.mean(1)) * dim / 2
    order = np.argsort(-density, kind="stable")
    heights, islands = _rise(density, order, _both_ways(near[:, : max(3, used // 2)]))
    error = np.sqrt(2 / used)
    highest = float(density.max() - density.min())
    return np.sort(np.concatenate([np.full(islands, highest), heights]))[::-1] / error


def _both_ways(near: np.ndarray) -> list[set[int]]:
    """Each row's neighbours and those that it is a neighbour of."""
    linked: list[set[int]] = [set(row) for row in near.tolist()]
    for row, others in enumerate(near.tolist()):
        for other in others:
            linked[other].add(row)
    return linked


def _rise(
    density: np.ndarray, order: np.ndarray, linked: list[set[int]]
) -> tuple[list[float], int]:
    """Heights of the peaks above the pass at which a higher one takes them in, and how many are
    never taken in.
    """
    place = np.empty(len(order), dtype=np.int64)
    place[order] = np.arange(len(order))
    top = [-1] * len(order)
    heights: list[float] = []

    def peak_of(row: int) -> int:
        while top[row] != row:
            top[row] = row = top[top[row]]
        return row

    for row in order.tolist():
        met = {peak_of(other) for other in linked[row] if place[other] < place[row]}
        highest = min(met, key=lambda peak: place[peak], default=row)
        top[row] = highest
        for peak in met - {highest}:
            heights.append(float(density[peak] - density[row]))
            top[peak] = highest
    return heights, sum(above == row for row, above in enumerate(top))


def modularity(labels: np.ndarray, near: np.ndarray) -> float:
    """Share of the edges within clusters (n,) minus that of a graph with the same degrees; near:
    (n, k) neighbours.
    """
    degrees = near.shape[1] + np.bincount(near.ravel(), minlength=len(near))
    shares = np.bincount(labels, weights=degrees) / degrees.sum()
    return float((labels[near] == labels[:, None]).mean() - (shares**2).sum())


def prediction_strength(labels: np.ndarray, assigned: np.ndarray) -> float:
    """Share of a row's fellows in its cluster (n,) that are `assigned` (n,) together with it, mean
    over rows.

    A row that is alone in its cluster counts as 0.
    """
    counts = np.zeros((labels.max() + 1, assigned.max() + 1))
    np.add.at(counts, (labels, assigned), 1)
    sizes = counts.sum(1)
    return float(((counts * (counts - 1)).sum(1) / np.maximum(sizes - 1, 1)).sum() / len(labels))


# --- the decision -----------------------------------------------------------------------------


def _decide(curves: _Curves) -> ClusterCount:
    """Tries numbers on a grid, then all those about the estimate, and puts the votes together."""
    grid = _grid(curves.smallest, curves.largest)
    for k in grid:
        curves.at(k)
    votes = curves.votes()
    for center in {_median(votes), votes.get("modularity", _median(votes))}:
        place = int(np.searchsorted(grid, center))
        for k in range(grid[max(place - 1, 0)], grid[min(place + 1, len(grid) - 1)] + 1):
            curves.at(k)
    votes, missing = curves.votes(), curves.estimates.missing
    k, ordered = _median(votes), sorted(votes.values())
    lows, highs, apart = [k, *ordered[1:2]], [k, *ordered[-2:-1]], True
    if curves.peaks is not None:
        lows.append(curves.peaks_above(PEAK_RANGE[1]))
        highs.append(curves.peaks_above(PEAK_RANGE[0]))
        apart = bool((curves.peaks >= PEAK).sum() > 1)
    low, high = min(lows), max(highs)
    text = statement(k, low, high, votes, apart=apart)
    if missing:
        text += (
            " Without a vote, since they failed:"
            f" {'; '.join(f'{name} ({why})' for name, why in missing.items())}."
        )
    return ClusterCount(
        k, low, high, how_sure(k, votes, apart=apart), text, curves.all(), votes, missing
    )


def _grid(smallest: int, largest: int) -> list[int]:
    """Numbers that grow by an eighth, at least by one."""
    grid = [smallest]
    while grid[-1] < largest:
        grid.append(min(largest, max(grid[-1] + 1, round(grid[-1] * 1.125))))
    return grid


def _median(votes: Mapping[str, int]) -> int:
    """The median of the votes' logarithms, peaks counted twice."""
    twice = [votes["peaks"]] if "peaks" in votes else []
    return round(float(np.exp(np.median(np.log([*twice, *votes.values()])))))


def agrees(vote: int, k: int) -> bool:
    """Whether a vote is for k, or within 25 % or 1 of it."""
    return abs(vote - k) <= 1 or 0.8 <= vote / k <= 1.25


def how_sure(
    k: int, votes: Mapping[str, int], *, apart: bool = True
) -> Literal["clear", "likely", "unclear"]:
    """How many votes agree with k. apart: whether a second peak stands out; if not, no votes make a
    number sure.
    """
    near = sum(agrees(vote, k) for vote in votes.values())
    if not apart or near < 3:
        return "unclear"
    return "clear" if near == len(CRITERIA) else "likely"


def statement(k: int, low: int, high: int, votes: Mapping[str, int], *, apart: bool = True) -> str:
    """What the votes say, and what to do about it."""
    near = sum(agrees(vote, k) for vote in votes.values())
    each = ", ".join(f"{name} {vote}" for name, vote in votes.items())
    count = f"{near} of {len(votes)} criteria are for {k} or about as many ({each})"
    sure = how_sure(k, votes, apart=apart)
    if sure == "clear":
        return f"{k} clusters: {count}."
    others = " and ".join(f"-k {other}" for other in dict.fromkeys((low, high)) if other != k)
    advice = f"Look at {others} too" if others else "Look at what it gives"
    advice += ": too many clusters are easier to merge than too few to split." if high > k else "."
    if sure == "likely":
        return f"Probably {k} clusters, between {low} and {high}: {count}. {advice}"
    if not apart:
        count = f"no two groups of images stand apart; {count}"
    return (
        f"How many clusters there are is unclear, {k} is a guess between {low} and {high}: {count}."
        f" {advice}"
    )


def _too_few(num: int, distinct: int, k: int) -> ClusterCount:
    """What can be said where the rows tell nothing."""
    what = (
        f"{num} images" if distinct == num else f"{num} images with {distinct} different features"
    )
    text = (
        f"{what} are too few to tell how many clusters there are; {k} is taken. Give a number"
        " with -k."
    )
    return ClusterCount(k, k, k, "unclear", text, {}, {})
