"""What every transport solver needs on several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.ops.collectives import all_max


def refuse_not_finite(x: Tensor, name: str, group: Any) -> None:
    """Raises ValueError on all ranks together if any rank's (rows, ...) has NaN or infinite
    entries.
    """
    bad = (~x.isfinite().flatten(1).all(1)).nonzero().flatten()
    if all_max(torch.tensor(float(len(bad)), device=x.device), group) > 0:
        raise ValueError(
            f"{name}: NaN or infinite values; first bad rows of this rank: {bad[:5].tolist()}"
        )


def exp_(x: Tensor) -> Tensor:
    """exp in place. On processors NumPy's takes half the time of torch's, at 3 units in the last
    place.
    """
    if x.device.type == "cpu":
        np.exp(x.numpy(), out=x.numpy())
        return x
    return x.exp_()
