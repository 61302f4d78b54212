"""Memories of features that outlive a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deepclust.ops.collectives import row_counts


class FeatureQueue(nn.Module):
    """The last `length` rows that all ranks together pushed; a rank holds those that came from it.

    rows: (A, length, E), one plane per kind of feature that is pushed together. serial: (length,)
    int64, the running number of the row in each place, -1 where another rank holds it or nothing
    came yet. count: rows pushed by all. A row's place is its number modulo the length, so that the
    ranks' parts make up exactly the queue of one rank.
    """

    rows: Tensor
    serial: Tensor
    count: Tensor

    def __init__(self, planes: int, length: int, dim: int) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("rows", torch.zeros(planes, length, dim))
        self.register_buffer("serial", torch.full((length,), -1, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def full(self) -> bool:
        """Whether `length` rows have been pushed."""
        return int(self.count) >= self.length

    def held(self, plane: int) -> Tensor:
        """This rank's rows (m, E) of one plane."""
        return self.rows[plane][self.serial >= 0]

    @torch.no_grad()
    def push(self, features: Sequence[Tensor], group: Any = None) -> None:
        """Adds a batch, (B, E) for each plane; B may differ by rank. The oldest rows fall out."""
        device, size = self.serial.device, self.length
        counts = row_counts(len(features[0]), group, device)
        rank = 0 if group is None else torch.distributed.get_rank(group)
        first, total = int(self.count), sum(counts)
        last = torch.arange(max(0, total - size), total, device=device) + first
        self.serial[last % size] = -1
        mine = first + sum(counts[:rank]) + torch.arange(counts[rank], device=device)
        kept = mine >= first + total - size
        places = mine[kept] % size
        self.rows[:, places] = torch.stack([each[kept] for each in features]).to(self.rows)
        self.serial[places] = mine[kept]
        self.count += total
