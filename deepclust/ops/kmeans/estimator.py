"""`KMeans`: this package's k-means with scikit-learn's habits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from sklearn.base import (
    BaseEstimator,
    ClassNamePrefixFeaturesOutMixin,
    ClusterMixin,
    TransformerMixin,
)
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from deepclust.ops.kmeans.fit import KMeansResult, kmeans


class KMeans(ClassNamePrefixFeaturesOutMixin, TransformerMixin, ClusterMixin, BaseEstimator):
    """Exact k-means of arrays: `deepclust.ops.kmeans` as a scikit-learn estimator.

    Args:
        n_clusters: K.
        init: "k-means++", "k-means||", "random" or centroids (K, D).
        n_init: restarts; the one of lowest inertia is kept.
        max_iter: most updates of the centroids; scikit-learn's default.
        tol: stop when the centroids' summed squared movement is at most this times the mean
            variance of a feature; scikit-learn's default.
        spherical: cosine similarity; rows are then compared by direction alone.
        empty: what becomes of an empty cluster's centroid, "split", "keep" or "random".
        random_state: a number or generator that makes the result repeatable, or None.

    Attributes:
        cluster_centers_: (K, D), in the dtype of the rows.
        labels_: (N,) int32.
        inertia_: float, sum of (weighted) squared distances.
        n_iter_: int, at least 1.
        n_features_in_: int, D.
    """

    def __init__(
        self,
        n_clusters: int = 8,
        *,
        init: Any = "k-means++",
        n_init: int = 1,
        max_iter: int = 300,
        tol: float = 1e-4,
        spherical: bool = False,
        empty: str = "split",
        random_state: Any = 0,
    ) -> None:
        self.n_clusters = n_clusters
        self.init = init
        self.n_init = n_init
        self.max_iter = max_iter
        self.tol = tol
        self.spherical = spherical
        self.empty = empty
        self.random_state = random_state

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> KMeans:
        """Finds the centroids of X (N, D); sample_weight (N,) or None where all are one."""
        X = validate_data(self, X, dtype=[np.float64, np.float32])
        weights = None
        if sample_weight is not None:
            weights = _check_sample_weight(sample_weight, X, dtype=X.dtype)
        # scikit-learn draws from the generator, so that fitting twice with one gives two results.
        seed = int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))
        result = kmeans(
            X,
            self.n_clusters,
            init=self.init,
            num_iters=self.max_iter,
            tol=self.tol,
            num_restarts=self.n_init,
            spherical=self.spherical,
            empty=self.empty,
            sample_weights=weights,
            seed=seed,
        )
        self.cluster_centers_ = result.centroids.numpy()
        # int32, as scikit-learn's own k-means has it.
        self.labels_ = result.labels.numpy().astype(np.int32)
        self.inertia_ = result.inertia
        # scikit-learn's checks want at least one iteration, even where max_iter is 0.
        self.n_iter_ = max(result.num_iters, 1)
        self._n_features_out = self.n_clusters
        return self

    def fit_predict(self, X: Any, y: None = None, sample_weight: Any = None) -> np.ndarray:
        """Labels (N,) int32 of X (N, D), after `fit`."""
        return self.fit(X, sample_weight=sample_weight).labels_

    def predict(self, X: Any) -> np.ndarray:
        """Index (N,) int32 of every row's nearest centroid."""
        return self._assigned(X).labels.numpy().astype(np.int32)

    def transform(self, X: Any) -> np.ndarray:
        """Euclidean distances (N, K) to the centroids; of rows of length one where `spherical`."""
        X = torch.as_tensor(self._checked(X))
        if self.spherical:
            X = torch.nn.functional.normalize(X, dim=1)
        return torch.cdist(X, torch.as_tensor(self.cluster_centers_).to(X)).numpy()

    def score(self, X: Any, y: None = None) -> float:
        """Minus the sum of squared distances to the nearest centroids."""
        return -self._assigned(X).inertia

    def _assigned(self, X: Any) -> KMeansResult:
        # No iteration: the rows are only assigned.
        return kmeans(
            self._checked(X),
            len(self.cluster_centers_),
            init=self.cluster_centers_,
            num_iters=0,
            spherical=self.spherical,
        )

    def _checked(self, X: Any) -> np.ndarray:
        check_is_fitted(self)
        return np.asarray(validate_data(self, X, dtype=[np.float64, np.float32], reset=False))
