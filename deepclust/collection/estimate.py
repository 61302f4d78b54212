"""How long a folder's clusters will take once the features are there: said before it begins."""

from __future__ import annotations

import time

import torch

from deepclust.collection.derived import NUM_COMPONENTS, NUM_LANDMARKS

PROBE_ROWS, PROBE_TURNS = 1024, 12
REFERENCE = 0.012
"""Seconds of the probe on the machine of two cores (AMD EPYC, Zen 4) on which the parts were timed.
"""


def seconds_for(num_images: int, num_clusters: int | None, *, derived: bool = False) -> float:
    """Seconds from features to report, on this machine as it is now.

    num_clusters: None for auto. derived: whether neighbours, map and near-duplicates are there from
    an earlier run. The parts were timed with 400, 3,409 and 50,000 images; a short probe tells how
    much slower or faster this machine is.
    """
    landmarks = min(num_images, NUM_LANDMARKS)
    seconds = 0.8 + 5.5e-4 * landmarks  # clusterers
    seconds += 0.3 + 1e-4 * landmarks  # confidences
    seconds += 0.8 + 6e-4 * min(num_images, 1700) + 1e-5 * num_images  # files
    if num_clusters is None:
        seconds += 1.2 + 1.2e-3 * landmarks
    if not derived:
        seconds += 1.2 + 1.6e-3 * landmarks + 3.2e-9 * num_images**2
    return seconds * slowness()


def slowness() -> float:
    """How many times longer this machine takes than that of the timings, from 0.2 to 5: by a matrix
    product.

    The fastest of some counts, on one thread, so that what else runs here in this moment does not.
    """
    x, bank = torch.ones(PROBE_ROWS, NUM_COMPONENTS), torch.ones(NUM_COMPONENTS, 4 * PROBE_ROWS)
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        while len(times) < PROBE_TURNS and sum(times) < 0.5:
            began = time.perf_counter()
            (x @ bank).sum()
            times.append(time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
    return min(5.0, max(0.2, min(times) / REFERENCE))
