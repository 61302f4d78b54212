"""Operations made of others."""

from __future__ import annotations

from typing import Any

from deepclust.config.augment import make_ops
from deepclust.data.views.base import Erase, Op
from deepclust.types import Count

# Any size that is not square and no view size: an operation that changes it is a crop or a resize.
_SIZE = (32, 48)
_TARGET = (24, 24)


class RandomOps(Op):
    """Operations drawn at random, one after the other, as in RandAugment (Cubuk et al. 2020).

    count: how many are drawn, with replacement.
    ops: descriptions of the operations to draw from; those that keep the image's size.
    """

    def __init__(self, count: Count, ops: list[dict[str, Any]]) -> None:
        self.count = count
        self.ops = make_ops(ops)
        if not ops:
            raise ValueError("ops=[]: at least one operation to draw from")
        for op in self.ops:
            # images of a batch have one size, so none of them may be cropped alone; erasing comes
            # after normalisation, when all drawn operations are done
            if isinstance(op, Erase | RandomOps) or op.out_size(_SIZE, _TARGET) != _SIZE:
                raise ValueError(
                    f"ops: {type(op).__name__} cannot be drawn; give operations that keep the"
                    " image's size"
                )
