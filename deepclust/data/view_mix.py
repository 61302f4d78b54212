"""Operations made of others."""

from __future__ import annotations

from typing import Any

from deepclust.data.view_base import Erase, Op
from deepclust.data.view_ops import make_ops
from deepclust.schema import Count


class RandomOps(Op):
    """`count` operations drawn from `ops` with replacement, one after the other, as RandAugment does."""

    def __init__(self, count: Count, ops: list[dict[str, Any]]) -> None:
        self.count, self.ops = count, make_ops(ops)
        if not ops:
            raise ValueError("ops=[]: at least one operation to draw from")
        for op in self.ops:
            if isinstance(op, Erase | RandomOps) or op.out_size((32, 48), (24, 24)) != (32, 48):
                raise ValueError(
                    f"ops: {type(op).__name__} cannot be drawn; give operations that keep the image's size"
                )
