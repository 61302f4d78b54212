"""Classical clusterings of the very features a head was trained on: what deep clustering has to
beat.

All of them see the same rows, L2-normalised, and no labels; the methods are those of
`deepclust.clustering.methods`.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepclust.clustering.methods import cluster
from deepclust.errors import UserError, in_short, show_where
from deepclust.eval.label_free import as_array, sample_rows
from deepclust.ops.precision import as_rows
from deepclust.runtime.estimates import ends_the_run

NAMES = ("kmeans", "gmm", "spectral", "tsne_gmm", "pixels")


@dataclass
class Baselines:
    """What came out. index: (n,) int64, the rows clustered, ascending. labels: name to (n,) int64
    clusters, None where a baseline failed. reasons: name to why it failed, one line. seconds: name
    to wall time."""

    index: np.ndarray
    labels: dict[str, np.ndarray | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def baselines(
    features: Any,
    num_clusters: int,
    *,
    which: str | Sequence[str] = "all",
    pixels: Any = None,
    seed: int = 0,
    max_samples: int = 5000,
) -> Baselines:
    """Clusters at most `max_samples` rows, drawn by `seed`, with each baseline asked for.

    features: (N, D), tensor or array. which: `all`, `none` or names out of `NAMES`. pixels: (N, P)
    raw values of the same rows, or None. A baseline that fails is None with a reason; it ends no
    run. Raises UserError on a name that is no baseline.
    """
    names = chosen(which)
    index = sample_rows(len(features), max_samples, seed)
    result = Baselines(index)
    if not names:
        return result
    x = as_rows(as_array(features[index]))
    raw = None if pixels is None else as_array(pixels[index]).reshape(len(index), -1)
    for name in names:
        start = time.perf_counter()
        try:
            if name != "pixels":
                result.labels[name] = cluster(name, x, num_clusters, seed=seed).labels
            elif raw is None:
                raise ValueError("there are no pixels in memory")
            else:
                result.labels[name] = cluster(
                    "kmeans", raw, num_clusters, seed=seed, normalize=False
                ).labels
        except (
            Exception
        ) as error:  # whatever a library raises: a baseline is a comparison, not the run
            if ends_the_run(error):
                raise
            result.labels[name] = None
            result.reasons[name] = in_short(error)
            show_where(error)
        result.seconds[name] = time.perf_counter() - start
    return result


def chosen(which: str | Sequence[str]) -> list[str]:
    """The names that `eval.baselines` asks for. Raises UserError on an unknown one."""
    if isinstance(which, str):
        which = {"all": NAMES, "none": ()}.get(which, (which,))
    for name in which:
        if name not in NAMES:
            raise UserError(
                f"eval.baselines={name}: choose all, none or a list of {', '.join(NAMES)}"
            )
    return list(which)
