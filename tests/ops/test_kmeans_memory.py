"""Data larger than the memory that k-means may take: chunks made afresh on every pass, and memory maps."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.ops import kmeans
from tests.ops.test_kmeans import assert_nearest, mixture

BUDGET = 64
"""MB beyond the labels."""


class Chunks:
    """96 MB of rows, of which 4 MB exist at a time."""

    def __init__(self) -> None:
        self.base = mixture(16_384, 64, 20)
        self.passes = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.passes += 1
        for number in range(24):
            yield self.base + 0.01 * number


def resident(field: str) -> float:
    """MB of a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


@pytest.mark.parametrize("num_clusters", [20])
def test_memory_stays_within_the_budget(num_clusters: int) -> None:
    chunks = Chunks()
    kmeans(chunks.base, 20, num_iters=1)
    try:
        # Memory that is free but not given back would hide what the run takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    except (OSError, AttributeError):
        pytest.skip("this system does not tell the peak of memory")
    found = kmeans(chunks, num_clusters, init="random", num_iters=2)
    taken = resident("VmHWM") - before
    labels = found.labels.numel() * 8 / 2**20
    assert taken < BUDGET + labels
    assert len(found.labels) == 24 * 16_384
    assert int(found.counts.sum()) == len(found.labels)
    assert_nearest(chunks.base + 0.01 * 23, found.centroids, found.labels[-16_384:])
    assert chunks.passes < 10


def test_a_memory_map_equals_the_array(tmp_path) -> None:
    x = mixture(40_000, 128, 30).numpy()
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, x.shape)
    file[:] = x
    file.flush()
    rows = np.load(tmp_path / "x.npy", mmap_mode="r")
    want, got = (kmeans(source, 30, num_iters=3) for source in (x, rows))
    assert torch.equal(want.labels, got.labels)
    assert torch.equal(want.centroids, got.centroids)
