"""Data larger than the memory that k-means may take: chunks made afresh on every pass, and memory
maps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from deepclust.ops import kmeans
from deepclust.ops.kmeans import bounds
from deepclust.ops.kmeans import filter as filtering
from deepclust.ops.kmeans.bounds import GroupBounds
from deepclust.ops.kmeans.filter import Filter
from deepclust.ops.kmeans.sums import RunningSums
from deepclust.ops.precision import has_onednn
from tests.ops.test_kmeans import assert_nearest, mixture

BUDGET = 64
"""MB beyond the labels."""


class Chunks:
    """76 MB of rows, of which 4 MB exist at a time."""

    def __init__(self) -> None:
        self.base = mixture(16_384, 64, 500)
        self.passes = 0  # complete ones

    def __iter__(self) -> Iterator[torch.Tensor]:
        for number in range(19):
            yield self.base + 0.01 * number
        self.passes += 1


def resident(field: str) -> float:
    """MB of a field of this process's status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def count(owner: type, name: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one at every call of the method."""
    calls, method = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda *arguments: calls.append(1) or method(*arguments))
    return calls


@pytest.mark.parametrize("helped", [False, True])
def test_memory_stays_within_the_budget(helped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain with few clusters, and with the filter, group bounds and running sums all at work."""
    monkeypatch.setattr(filtering, "cpu_has_fast_bfloat16", lambda: helped)
    monkeypatch.setattr(bounds, "START_BELOW", 0.5)
    monkeypatch.setattr(bounds, "STOP_ABOVE", 0.9)
    filtered, bounded = (
        count(Filter, "_assign_chunk", monkeypatch),
        count(GroupBounds, "_search_group", monkeypatch),
    )
    moved = count(RunningSums, "_move", monkeypatch)
    chunks, num_clusters = Chunks(), 500 if helped else 20
    start = chunks.base[:num_clusters].clone()
    kmeans(chunks.base, num_clusters, init=start, num_iters=1)
    try:
        # Memory that is free but not given back would hide what the run takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    except (OSError, AttributeError):
        pytest.skip("this system does not tell the peak of memory")
    found = kmeans(chunks, num_clusters, init=start, num_iters=4 if helped else 2)
    taken = resident("VmHWM") - before
    labels = found.labels.numel() * 8 / 2**20
    assert taken < BUDGET + labels
    assert len(found.labels) == 19 * 16_384
    assert int(found.counts.sum()) == len(found.labels)
    assert_nearest(chunks.base + 0.01 * 18, found.centroids, found.labels[-16_384:])
    assert chunks.passes < 10
    if helped:
        assert bounded
        assert moved
        assert filtered or not has_onednn()


def test_a_memory_map_equals_the_array(tmp_path) -> None:
    x = mixture(40_000, 128, 30).numpy()
    file = np.lib.format.open_memmap(tmp_path / "x.npy", "w+", np.float32, x.shape)
    file[:] = x
    file.flush()
    rows = np.load(tmp_path / "x.npy", mmap_mode="r")
    want, got = (kmeans(source, 30, num_iters=3) for source in (x, rows))
    assert torch.equal(want.labels, got.labels)
    assert torch.equal(want.centroids, got.centroids)
