"""K-means as a head: cosine prototypes at the centroids of fixed features; how a pretext's clusters are read."""

from __future__ import annotations

from torch import Tensor

from deepclust.heads.base import Bank, Head, Output
from deepclust.heads.layers import ClusterLayer
from deepclust.schema import Count, Positive


class KMeansHead(Head):
    """Spherical k-means centroids; probabilities are a softmax over cosine / temperature."""

    needs_prototypes = True

    def __init__(
        self, dim: Count, num_clusters: Count, *, temperature: Positive = 0.1, num_restarts: Count = 10
    ) -> None:
        super().__init__()
        self.num_restarts = num_restarts
        self.layer = ClusterLayer(dim, num_clusters, kind="cosine", temperature=temperature)

    def init_prototypes(self, bank: Bank) -> None:
        """Fits the centroids."""
        self.layer.init_clusters(bank.features, ["kmeans"], num_restarts=self.num_restarts, group=bank.group)

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) to logits (B, K)."""
        return Output(z, logits=self.layer(z))

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities."""
        return self.layer(z)[0].softmax(dim=1)
