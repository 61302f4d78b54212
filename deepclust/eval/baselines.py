"""Classical clusterings of the features a head was trained on: what deep clustering has to beat.

All of them see the same rows, L2-normalised, and no labels; the methods are those of
`deepclust.clusterers`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepclust.clusterers import cluster
from deepclust.errors import UserError
from deepclust.eval.label_free import as_array, sample_rows

NAMES = ("kmeans", "gmm", "spectral", "tsne_gmm", "pixels")
"""Baselines; `pixels` is k-means of the images themselves."""


@dataclass
class Baselines:
    """Clusterings by the baselines, by name."""

    index: np.ndarray
    """(n,) int64, the rows that were clustered, ascending."""
    labels: dict[str, np.ndarray | None] = field(default_factory=dict)
    """(n,) int64 clusters, None where a baseline failed."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a baseline failed, one line."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time."""


def baselines(
    features: Any,
    num_clusters: int,
    *,
    which: str | Sequence[str] = "all",
    pixels: Any = None,
    seed: int = 0,
    max_samples: int = 5000,
) -> Baselines:
    """Clusterings of the features by each baseline asked for.

    A baseline that fails gives None and a reason; it never ends the run.

    Args:
        features: (N, D), tensor or array.
        num_clusters: K.
        which: "all", "none" or names out of `NAMES`.
        pixels: (N, ...) raw values of the same rows, or None.
        seed: of the draw and of the methods.
        max_samples: rows that are clustered; of more, so many are drawn, as the cost of some
            methods grows faster than the number of rows.

    Raises:
        UserError: a name that is no baseline.
    """
    names = chosen(which)
    index = sample_rows(len(features), max_samples, seed)
    result = Baselines(index)
    if not names:
        return result
    x = as_array(features[index]).astype(np.float32)
    raw = None
    if pixels is not None:
        raw = as_array(pixels[index]).reshape(len(index), -1).astype(np.float32)
    for name in names:
        start = time.perf_counter()
        try:
            if name != "pixels":
                result.labels[name] = cluster(name, x, num_clusters, seed=seed).labels
            elif raw is None:
                raise ValueError("there are no pixels in memory")
            else:
                # Not of length one: how bright an image is would be lost.
                clustering = cluster("kmeans", raw, num_clusters, seed=seed, normalize=False)
                result.labels[name] = clustering.labels
        # Whatever a library raises: a baseline is a comparison, not the run.
        except Exception as error:
            result.labels[name] = None
            result.reasons[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
        result.seconds[name] = time.perf_counter() - start
    return result


def chosen(which: str | Sequence[str]) -> list[str]:
    """Names of the baselines that `which` stands for. Raises UserError for an unknown one."""
    if isinstance(which, str):
        which = {"all": NAMES, "none": ()}.get(which, (which,))
    for name in which:
        if name not in NAMES:
            raise UserError(
                f"eval.baselines={name}: choose all, none or a list of {', '.join(NAMES)}"
            )
    return list(which)
