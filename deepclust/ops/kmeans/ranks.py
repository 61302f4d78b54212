"""What k-means needs from a process group. Without a group every call is free."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from deepclust.ops.collectives import all_sum, broadcast


class Ranks:
    """One process group, or this process alone (`group=None`).

    Rank 0 of the group decides and the others follow: decisions made from equal numbers could still
    differ between unlike processors, and a rank that stops alone leaves the others waiting.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.size = 1
        self.rank = 0
        if group is not None:
            self.size = dist.get_world_size(group)
            self.rank = dist.get_rank(group)

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        return all_sum(tensor, self.group)

    def max(self, value: int) -> int:
        """Largest of one integer per rank."""
        return max(self.gather(value))

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor on every rank, in place."""
        return broadcast(tensor, 0, self.group)

    def gather(self, value: Any) -> list[Any]:
        """One small object per rank, in rank order."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.group)
        return values

    def offset(self, num_rows: int) -> tuple[int, int]:
        """Global index of this rank's first row, and the number of rows of all ranks."""
        counts = self.gather(num_rows)
        return sum(counts[: self.rank]), sum(counts)


def draw(total: int, count: int, seed: int, device: torch.device) -> Tensor:
    """`count` distinct indices below `total`, ascending int64, the same on every rank.

    The global random state is neither read nor changed.
    """
    import numpy as np

    # NumPy's generator: the same numbers on every device and for every version of torch.
    chosen = np.random.default_rng(seed).choice(total, size=count, replace=False, shuffle=False)
    # Sorted, because rows are then taken in one pass over the blocks.
    return torch.from_numpy(np.sort(chosen)).to(device)
