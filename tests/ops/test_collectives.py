"""What goes from rank to rank: any layout may be given, contiguous tensors are sent, the result
keeps its layout.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import deepclust
from deepclust.ops import pca_whiten
from deepclust.ops.collectives import (
    all_max,
    all_sum,
    broadcast,
    gather_equal,
    gather_rows,
    sum_over,
)
from deepclust.ops.kmeans.ranks import Ranks
from deepclust.runtime.distributed import World
from tests.ranks import TENSOR_COLLECTIVES, run_ranks


def layouts(rank: int) -> dict[str, Tensor]:
    """Tensors of one shape for all ranks that are not contiguous, each with values of its rank."""
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(rank)).double()
    images = torch.arange(48.0).reshape(2, 3, 2, 4) * (rank + 1)
    return {
        "columns": torch.linalg.eigh(x @ x.T).eigenvectors,
        "turned": x.T,
        "every other": x[:, ::2],
        "channels last": images.to(memory_format=torch.channels_last),
    }


def exchange(rank: int, size: int) -> None:
    """Every collective of ours, in every layout."""
    group, everyone = dist.group.WORLD, [layouts(other) for other in range(size)]
    for name, own in layouts(rank).items():
        assert not own.is_contiguous()
        values = torch.stack([other[name] for other in everyone])
        for result, expected in (
            (all_sum(own.clone(), group), values.sum(0)),
            (all_max(own.clone(), group), values.amax(0)),
            (broadcast(own.clone(), 1, group), values[1]),
            (Ranks(group).sum(own.clone()), values.sum(0)),
            (Ranks(group).broadcast(own.clone()), values[0]),
        ):
            torch.testing.assert_close(result, expected)
            assert result.stride() == own.clone().stride()
        torch.testing.assert_close(torch.stack(gather_equal(own, group)), values)
        view = layouts(rank)[name]
        assert all_sum(view, group) is view, "in place"
        torch.testing.assert_close(view, values.sum(0))
        leaf = own.clone().requires_grad_()
        gathered, offset = gather_rows(leaf, group)
        torch.testing.assert_close(gathered, values.flatten(0, 1))
        assert offset == rank * len(own)
        # gradients that come back in another layout, too
        (sum_over(leaf, group) * own).sum().backward(retain_graph=True)
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, values.sum(0))
        (gathered.transpose(0, 1) * values.flatten(0, 1).transpose(0, 1)).sum().backward()
        torch.testing.assert_close(leaf.grad, values.sum(0) + size * own)
    world = World(rank, size, torch.device("cpu"), group)
    given = layouts(rank)["turned"]
    kept = given.clone()
    torch.testing.assert_close(world.sum(given), sum(other["turned"] for other in everyone))
    assert torch.equal(given, kept), "what is summed is not changed"


def strided() -> None:
    """What NCCL refuses is refused on the ranks of these tests."""
    with pytest.raises(ValueError, match="all_reduce: Tensors must be contiguous"):
        dist.all_reduce(torch.zeros(2, 3).T)
    with pytest.raises(ValueError, match="all_gather: Tensors must be contiguous"):
        dist.all_gather([torch.zeros(2, 3), torch.zeros(3, 2).T], torch.zeros(2, 3))


def rows() -> Tensor:
    return torch.randn(30, 5, generator=torch.Generator().manual_seed(0))


def work(rank: int, size: int) -> Tensor:
    strided()
    exchange(rank, size)
    return pca_whiten(rows()[rank::2], 3, group=dist.group.WORLD)


def test_any_layout_goes_from_rank_to_rank() -> None:
    """Whitening has the case in point: principal directions are columns."""
    together = torch.stack(run_ranks(work, 2), dim=1).flatten(0, 1)
    torch.testing.assert_close(together, pca_whiten(rows(), 3), atol=1e-5, rtol=1e-5)


def test_no_other_module_sends_tensors() -> None:
    root = Path(deepclust.__file__).parent
    for file in root.rglob("*.py"):
        if file == root / "ops" / "collectives.py":
            continue
        calls = [
            node.func
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call)
        ]
        names = {
            f"{ast.unparse(call.value)}.{call.attr}"
            for call in calls
            if isinstance(call, ast.Attribute)
        }
        sent = names & {
            f"{home}.{name}"
            for home in ("dist", "torch.distributed")
            for name in TENSOR_COLLECTIVES
        }
        assert not sent, (
            f"{file}: {sent}: use deepclust.ops.collectives, which sends contiguous tensors"
        )
