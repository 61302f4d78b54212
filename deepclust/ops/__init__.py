"""Mathematics that the methods share: k-means, optimal transport, neighbours, whitening.

Names load when first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepclust.ops.kmeans.estimator import KMeans
    from deepclust.ops.kmeans.fit import kmeans
    from deepclust.ops.kmeans.tree import balanced_sample, hierarchical_kmeans
    from deepclust.ops.neighbors import knn
    from deepclust.ops.transport import (
        mass_schedule,
        partial_transport,
        self_label,
        semantic_partial_transport,
        sinkhorn,
    )
    from deepclust.ops.whiten import pca_whiten

_HOMES = {
    "KMeans": "kmeans.estimator",
    "balanced_sample": "kmeans.tree",
    "hierarchical_kmeans": "kmeans.tree",
    "kmeans": "kmeans.fit",
    "knn": "neighbors",
    "mass_schedule": "transport",
    "partial_transport": "transport",
    "pca_whiten": "whiten",
    "self_label": "transport",
    "semantic_partial_transport": "transport",
    "sinkhorn": "transport",
}
__all__ = [
    "KMeans",
    "balanced_sample",
    "hierarchical_kmeans",
    "kmeans",
    "knn",
    "mass_schedule",
    "partial_transport",
    "pca_whiten",
    "self_label",
    "semantic_partial_transport",
    "sinkhorn",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Ops(ModuleType):
    """Keeps `ops.kmeans` the function, of which there is a folder of the same name as well."""

    def __setattr__(self, name: str, value: Any) -> None:
        # Importing `deepclust.ops.kmeans.…` makes Python set the folder's module as attribute.
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Ops
