"""Clusterings of a matrix of features, without a run's folder: one name, one function, one
interface.

    cluster("spectral", features, 10).labels

Rows are compared by direction: all methods see them with length one. They run one after another on
at most two
threads: sums of two partial results do not depend on which thread comes first, so the same seed
gives the same clusters. `eval.baselines` measures heads against some of these; `eval.choice`
chooses among all without labels.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deepclust.errors import UserError
from deepclust.heads.base import Bank, Batch, Head, Progress
from deepclust.ops import kmeans as fit_kmeans
from deepclust.ops import knn
from deepclust.ops.diffusion import Diffusion
from deepclust.ops.eigen import principal_scores
from deepclust.ops.precision import as_rows
from deepclust.ops.spectral import spectral_clusters

NEIGHBORS = 15
"""Neighbours in the graph of a large `ward`, and those that vote on a confidence."""
MAX_DENSE = 12_000
"""Rows up to which Ward's method sees all pairs (8 bytes each); beyond, neighbours alone."""


@dataclass(frozen=True)
class Clustering:
    """labels: (N,) int64 in [0, K), -1 for noise where it was asked for. confidence: (N,) float32
    from 0 to 1.

    A mixture's confidence is its posterior, that of `prototypes` too, HDBSCAN's its membership,
    that of `diffusion` the share of its votes; elsewhere it is the share of a row and its 15
    nearest neighbours that are in its cluster.
    """

    labels: np.ndarray
    confidence: np.ndarray


def cluster(
    method: str, features: Any, num_clusters: int | None, *, seed: int = 0, normalize: bool = True
) -> Clustering:
    """Clusters rows (N, D), tensor or array, by a method out of `METHODS`.

    num_clusters: K < N; None for `umap_hdbscan` alone, which then finds its own number and leaves
    noise at -1.
    normalize: whether rows get length one first. Raises UserError for an unknown method or a
    package that is missing, ValueError for rows that cannot be clustered.
    """
    if method not in METHODS:
        raise UserError(f"clusterer {method}: choose one of {', '.join(METHODS)}")
    if num_clusters is None and method != "umap_hdbscan":
        raise UserError(
            f"clusterer {method} needs a number of clusters; umap_hdbscan finds its own"
        )
    values = (
        features.detach().cpu().numpy()
        if isinstance(features, torch.Tensor)
        else np.asarray(features)
    )
    rows = prepared(as_rows(values), num_clusters or 1, normalize=normalize)
    with calm():
        labels, confidence = METHODS[method](rows, num_clusters, seed % 2**32)
        if confidence is None:
            confidence = neighbor_confidence(rows, labels)
    return Clustering(labels.astype(np.int64), confidence.astype(np.float32))


def prepared(x: np.ndarray, num_clusters: int, *, normalize: bool = True) -> np.ndarray:
    """Rows (N, D) fit for clustering, divided by their length if asked for. Raises ValueError where
    they are not.
    """
    if num_clusters >= len(x):
        raise ValueError(f"{num_clusters} clusters need more than {len(x)} images")
    if not np.isfinite(x).all():
        raise ValueError(f"{int((~np.isfinite(x).all(1)).sum())} of {len(x)} rows are not finite")
    lengths = np.linalg.norm(x, axis=1, keepdims=True) if normalize else np.ones((1, 1), x.dtype)
    rows = x / np.maximum(lengths, np.finfo(np.float32).tiny)
    if (
        rows == rows[0]
    ).all():  # scikit-learn's t-SNE divides by their spread and then ends the whole process
        raise ValueError("all images have the same features")
    return rows


@contextmanager
def calm() -> Iterator[None]:
    """At most two threads, and no more than torch has; no warnings that a comparison may live with.

    Figures show what they say.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(min(2, torch.get_num_threads())), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Number of distinct clusters")
        warnings.filterwarnings("ignore", message=".*did not converge")  # a mixture still moving
        warnings.filterwarnings(
            "ignore", message="Graph is not fully connected"
        )  # clusters may well be islands
        warnings.filterwarnings(
            "ignore", message="n_jobs value"
        )  # UMAP with a seed runs on one thread
        yield


def neighbors_of(x: np.ndarray, k: int = NEIGHBORS) -> np.ndarray:
    """(N, k) int64 indices of each row's nearest others by cosine; k is cut to N - 1."""
    rows = torch.from_numpy(x)
    return knn(rows, rows, k=min(k, len(x) - 1), exclude_self=True)[1].numpy()


def neighbor_confidence(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """(N,) float32: the share of a row and its 15 nearest neighbours that are in the row's
    cluster."""
    same = labels[neighbors_of(x)] == labels[:, None]
    return ((1 + same.sum(1)) / (1 + same.shape[1])).astype(np.float32)


def _graph(x: np.ndarray) -> Any:
    """Sparse (N, N): mean of the 15-nearest-neighbour graph, itself the first, and its
    transpose."""
    from scipy.sparse import csr_matrix

    near = neighbors_of(x, NEIGHBORS - 1)
    columns = np.concatenate([np.arange(len(x))[:, None], near], axis=1)
    starts = np.arange(0, columns.size + 1, columns.shape[1])
    graph = csr_matrix((np.ones(columns.size), columns.ravel(), starts), shape=(len(x), len(x)))
    return 0.5 * (graph + graph.T)


def principal(x: np.ndarray) -> np.ndarray:
    """At most 50 principal components (float64), scaled to a mean variance of 1: mixtures add a
    floor to variances.
    """
    parts = principal_scores(x, min(50, x.shape[1], len(x) - 1))
    return parts / max(parts.std(), 1e-12)


# --- methods: rows (N, D), K and a seed to labels (N,) and a confidence (N,), or None for that of
# the neighbours

Found = tuple[np.ndarray, np.ndarray | None]


def _kmeans(x: np.ndarray, num_clusters: int, seed: int) -> Found:
    """Best of ten Lloyd runs from k-means++."""
    return (
        fit_kmeans(x, num_clusters, num_restarts=10, num_iters=300, seed=seed).labels.numpy(),
        None,
    )


def _spherical_kmeans(x: np.ndarray, num_clusters: int, seed: int) -> Found:
    """The same with centroids of length one (Dhillon and Modha 2001)."""
    found = fit_kmeans(x, num_clusters, num_restarts=10, num_iters=300, spherical=True, seed=seed)
    return found.labels.numpy(), None


def _gmm(x: np.ndarray, num_clusters: int, seed: int) -> Found:
    """Full-covariance mixture on principal components, best likelihood of three."""
    from sklearn.mixture import GaussianMixture

    return _mixture(
        GaussianMixture(num_clusters, n_init=3, reg_covar=1e-4, random_state=seed), principal(x)
    )


def _mixture(mixture: Any, x: np.ndarray) -> Found:
    labels = mixture.fit_predict(x)
    return labels, mixture.predict_proba(x).max(1)


def _spectral(x: np.ndarray, num_clusters: int, seed: int) -> Found:
    """Spectral clustering (Ng, Jordan and Weiss 2002), edges of 20 neighbours weighted by what they
    share.

    scikit-learn's takes eigenvectors by row without making their lengths one, and equal weights. On
    clothing photos, digits and their subsets it is behind this in accuracy, by 0 to 6 points.
    """
    found = spectral_clusters(
        torch.from_numpy(x), num_clusters, extra_components=0, shared=True, seed=seed
    )
    return found.numpy(), None


def _diffusion(x: np.ndarray, num_clusters: int, seed: int) -> Found:
    """What four graphs' spectral embeddings agree on: `ops.diffusion`."""
    votes = Diffusion(torch.from_numpy(x), num_clusters).votes(num_clusters, seed=seed)
    return votes.argmax(dim=1).numpy(), votes.amax(dim=1).numpy()


def _prototypes(x: np.ndarray, num_clusters: int, seed: int) -> Found:
    """Prototypes that begin at diffusion clusters and learn their neighbours' codes:
    `heads.neighbor_prototypes`.

    A linear map, so that clusters are cones of features; codes are softer than the head's own
    (epsilon 0.05).
    """
    from deepclust.heads.neighbor_prototypes import NeighborPrototypes

    settings = {"num_heads": 1, "epsilon": 0.05, "init": "diffusion", "view": "clean"}
    rows = torch.from_numpy(x).float()
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        head = NeighborPrototypes(x.shape[1], num_clusters, len(x), **settings)
        learn(head, rows)
    with torch.no_grad():
        best = head.predict(rows).max(dim=1)
    return best.indices.numpy(), best.values.numpy()


def learn(
    head: Head, rows: torch.Tensor, *, passes: int = 15, batch_size: int = 512, lr: float = 1e-3
) -> None:
    """Trains a head whose second view is a partner's on rows (N, D) as they are: no folder, no
    views, no resuming.

    AdamW on a cosine from lr to 0. Random numbers come from the global state.
    """
    bank = Bank(rows, torch.arange(len(rows)), len(rows))
    head.init_prototypes(bank)
    partners, batch_size = head.refresh(bank).partners, min(batch_size, len(rows))
    assert partners is not None
    steps, order = len(rows) // batch_size, torch.arange(len(rows))
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, passes * steps)
    with torch.enable_grad():
        for step in range(passes * steps):
            if step % steps == 0:
                order = torch.randperm(len(rows))
            index = order[step % steps * batch_size :][:batch_size]
            partner = partners[index, torch.randint(partners.shape[1], (batch_size,))]
            seen = step * batch_size
            batch = Batch(
                index,
                Progress(step, passes * steps, step // steps, passes, seen, passes * len(rows)),
            )
            outputs = {0: head(rows[index], 0), 1: head(rows[partner], 1)}
            with torch.no_grad():
                targets = head.targets(
                    {view: output.detach() for view, output in outputs.items()}, batch
                )
            optimizer.zero_grad()
            head.loss(outputs, targets, batch)["loss"].backward()
            optimizer.step()
            schedule.step()


def _ward(x: np.ndarray, num_clusters: int, seed: int) -> Found:
    """Ward's agglomeration (1963); of more than 12,000 rows, merging along the neighbour graph
    alone.
    """
    from sklearn.cluster import AgglomerativeClustering

    graph = _graph(x) if len(x) > MAX_DENSE else None
    return (
        AgglomerativeClustering(num_clusters, linkage="ward", connectivity=graph).fit_predict(x),
        None,
    )


def _tsne_gmm(x: np.ndarray, num_clusters: int, seed: int) -> Found:
    """Mixture on a 2-d t-SNE map, the recipe of N2D (McConville et al. 2020).

    500 iterations instead of 1,000: half the time; on raw digits the accuracy is the same (92.6
    against 91.9 %).
    """
    from sklearn.manifold import TSNE
    from sklearn.mixture import GaussianMixture

    perplexity = min(30.0, (len(x) - 1) / 3)
    embed = TSNE(2, init="pca", perplexity=perplexity, max_iter=500, random_state=seed)
    embedding = embed.fit_transform(principal(x)).astype(np.float64)
    return _mixture(GaussianMixture(num_clusters, n_init=5, random_state=seed), embedding)


def _umap_hdbscan(x: np.ndarray, num_clusters: int | None, seed: int) -> Found:
    """HDBSCAN on a 2-d UMAP map (McInnes et al. 2018) with the settings its authors advise for
    clustering.
    """
    try:
        from umap import UMAP  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(
            "umap_hdbscan needs the package umap-learn: pip install 'deepclust[umap]', or choose"
            " another clusterer"
        ) from error
    near = min(30, len(x) - 1)
    embed = UMAP(n_neighbors=near, min_dist=0.0, n_components=2, metric="cosine", random_state=seed)
    return hdbscan(np.asarray(embed.fit_transform(x), dtype=np.float64), num_clusters)


def hdbscan(points: np.ndarray, num_clusters: int | None) -> Found:
    """HDBSCAN (Campello et al. 2013) of points (N, d): labels (N,) and memberships (N,).

    num_clusters: the smallest cluster is of that of nine sizes between 5 and N / K whose number of
    clusters is nearest to K, the larger size of two; noise then joins the cluster of the nearest
    point that has one, at confidence 0.
    None: smallest clusters are of N / 100, at least 5, and noise stays -1.
    """
    from sklearn.cluster import HDBSCAN
    from sklearn.neighbors import KNeighborsClassifier

    kept: dict[str, Any] = {"copy": True}  # of the points, which some versions else overwrite
    if num_clusters is None:
        found = HDBSCAN(min_cluster_size=max(5, len(points) // 100), **kept).fit(points)
        return found.labels_, found.probabilities_
    sizes = sorted(
        {int(size) for size in np.geomspace(5, max(5, len(points) / num_clusters), 9)}, reverse=True
    )
    tried = [HDBSCAN(min_cluster_size=size, **kept).fit(points) for size in sizes]
    found = min(tried, key=lambda each: abs(int(each.labels_.max()) + 1 - num_clusters))
    labels, known = found.labels_.copy(), found.labels_ >= 0
    if known.any() and not known.all():
        labels[~known] = (
            KNeighborsClassifier(1).fit(points[known], labels[known]).predict(points[~known])
        )
    return labels.clip(0), np.where(known, found.probabilities_, 0.0)


METHODS: dict[str, Callable[[np.ndarray, Any, int], Found]] = {
    "kmeans": _kmeans,
    "spherical_kmeans": _spherical_kmeans,
    "gmm": _gmm,
    "spectral": _spectral,
    "diffusion": _diffusion,
    "prototypes": _prototypes,
    "ward": _ward,
    "tsne_gmm": _tsne_gmm,
    "umap_hdbscan": _umap_hdbscan,
}
