"""K-means as a head: cosine prototypes at the centroids of fixed features; how a pretext's clusters
are read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.heads.base import Bank, Head, Output
from deepclust.heads.common.layers import ClusterLayer
from deepclust.ops import knn
from deepclust.ops.outliers import Density, outlier_factors
from deepclust.types import Count, Natural, Positive


class KMeansHead(Head):
    """Spherical k-means centroids; probabilities are a softmax over cosine / temperature."""

    needs_prototypes = True

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        *,
        temperature: Positive = 0.1,
        num_restarts: Count = 10,
    ) -> None:
        super().__init__()
        self.num_restarts = num_restarts
        self.layer = ClusterLayer(dim, num_clusters, kind="cosine", temperature=temperature)

    def init_prototypes(self, bank: Bank) -> None:
        """Fits the centroids."""
        self.layer.init_clusters(
            bank.features, ["kmeans"], num_restarts=self.num_restarts, group=bank.group
        )

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to logits (B, K)."""
        return Output(z, logits=self.layer(z))

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities."""
        return self.layer(z)[0].softmax(dim=1)


SAME = 1e-4
"""An image whose cosine with an anchor is nearer to 1 than this has the anchor's cluster."""


class Votes(Head):
    """Anchors vote on the clusters of features.

    num_anchors: M. num_neighbors: that vote. num_components: P, directions of features that count,
    D for all.
    Buffers: `basis` (D, P), `anchors` (M, P) float16 of length one, `owners` (M,) int64 in [0, K),
    `trust` (M,) from 0 to 1, how far each anchor's cluster can be relied on: it makes the votes'
    shares confidences.

    With num_landmarks L > 0 it also tells what lies apart, by local outlier factors among
    outlier_neighbors of the
    landmarks: `landmarks` (L, P) of length one, their `reach` and `density` (L,) (see
    `ops.outliers.Density`), `apart` (L,) bool, which of them do, and `limit`, the factor above
    which others do.
    """

    basis: Tensor
    anchors: Tensor
    owners: Tensor
    trust: Tensor
    landmarks: Tensor
    reach: Tensor
    density: Tensor
    apart: Tensor
    limit: Tensor

    def __init__(
        self,
        dim: Count,
        num_clusters: Count,
        *,
        num_anchors: Count = 1,
        num_components: Count | None = None,
        num_neighbors: Count = 15,
        num_landmarks: Natural = 0,
        outlier_neighbors: Count = 20,
    ) -> None:
        super().__init__()
        self.num_clusters, self.num_neighbors = num_clusters, min(num_neighbors, num_anchors)
        size = num_components or dim
        self.register_buffer("basis", torch.eye(dim, size))
        self.register_buffer("anchors", torch.zeros(num_anchors, size, dtype=torch.float16))
        self.register_buffer("owners", torch.zeros(num_anchors, dtype=torch.int64))
        self.register_buffer("trust", torch.ones(num_anchors))
        self.outlier_neighbors = min(outlier_neighbors, num_landmarks)
        if num_landmarks:
            self.register_buffer("landmarks", torch.zeros(num_landmarks, size))
            self.register_buffer("reach", torch.zeros(num_landmarks))
            self.register_buffer("density", torch.ones(num_landmarks))
            self.register_buffer("apart", torch.zeros(num_landmarks, dtype=torch.bool))
            self.register_buffer("limit", torch.full((), torch.inf))

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to logits (B, K)."""
        return Output(z, logits=[self.predict(z).clamp_min(1e-12).log()])

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities."""
        values, places = knn(self._directions(z), self.anchors.float(), k=self.num_neighbors)
        return vote(values, self.owners[places], self.trust[places], self.num_clusters)

    @property
    def tells_noise(self) -> bool:
        """Whether there are landmarks that tell which rows lie apart."""
        return bool(self.outlier_neighbors)

    def outlying(self, z: Tensor) -> Tensor | None:
        """(B, D) to (B,) bool: which lie apart; None where no landmarks tell."""
        if not self.outlier_neighbors:
            return None
        known = Density(self.reach, self.density)
        return apart(
            self._directions(z),
            self.landmarks,
            known,
            self.limit,
            self.apart,
            self.outlier_neighbors,
        )

    def _directions(self, z: Tensor) -> Tensor:
        """(B, P) of length one."""
        return F.normalize(F.normalize(z.float(), dim=1) @ self.basis, dim=1)


def apart(
    x: Tensor, landmarks: Tensor, known: Density, limit: Tensor, outlying: Tensor, k: int
) -> Tensor:
    """(B,) bool: which unit rows (B, P) lie apart from unit landmarks (L, P), of which `outlying`
    (L,) do.

    By their local outlier factor among k landmarks, if it is above the limit; what lies on a
    landmark does as that one.
    """
    factors, distance, nearest = outlier_factors(x, landmarks, known, k)
    same = distance.square() < 2 * SAME  # of rows of length one: a cosine above 1 - SAME
    return torch.where(same, outlying[nearest], factors > limit)


def vote(similarities: Tensor, clusters: Tensor, trust: Tensor, num_clusters: int) -> Tensor:
    """Probabilities (B, K) from k neighbours: their similarities (B, k), descending, clusters and
    trust (B, k).

    The cluster with most weight wins; its probability is the weight of its voters times their
    trust. The others share the rest as they were voted for, and evenly where nobody was.
    """
    spread = similarities[:, :1] - similarities[:, -1:]
    weights = torch.where(
        spread > 1e-6, (similarities - similarities[:, -1:]) / spread.clamp_min(1e-6), 1.0
    )
    weights = weights / weights.sum(dim=1, keepdim=True)
    empty = similarities.new_zeros(len(similarities), num_clusters)
    shares = empty.scatter_add(1, clusters, weights)
    same = similarities[:, 0] > 1 - SAME
    own = F.one_hot(clusters[:, 0], num_clusters).to(shares)
    winner = torch.where(same, clusters[:, 0], shares.argmax(dim=1))[:, None]
    shares = torch.where(same[:, None], (shares + own) / 2, shares)
    trusted = empty.scatter_add(1, clusters, weights * trust)
    confidence = torch.where(
        same[:, None], (trusted.gather(1, winner) + trust[:, :1]) / 2, trusted.gather(1, winner)
    )
    rest = shares.scatter(1, winner, 0.0) + 1e-6
    rest = rest.scatter(1, winner, 0.0)
    rest = rest / rest.sum(dim=1, keepdim=True).clamp_min(1e-12)
    most = rest.amax(dim=1, keepdim=True)
    confidence = torch.maximum(confidence, most / (1 + most) + 1e-4).clamp_max(1.0)
    return (rest * (1 - confidence)).scatter(1, winner, confidence)
