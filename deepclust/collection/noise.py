"""What `--noise` sets apart: one rule for the images that are clustered, for those that come later,
and for a model.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from deepclust.heads.readout import apart
from deepclust.ops.outliers import Density
from deepclust.runtime.npz import Column

NOISE_COLUMNS = {
    "reach": Column("f", ("m",)),
    "density": Column("f", ("m",)),
    "limit": Column("f", ()),
    "outlying": Column("b", ("m",)),
}


@dataclass(frozen=True)
class Noise:
    """How densely m landmarks lie, and which of them lie apart.

    reach, density: (m,) float32, see `ops.outliers.Density`. limit: the local outlier factor above
    which a row lies apart. outlying: (m,) bool, of the landmarks.
    """

    reach: np.ndarray
    density: np.ndarray
    limit: np.ndarray
    outlying: np.ndarray

    def apart(self, x: Tensor, landmarks: Tensor) -> Tensor:
        """(n,) bool: which of other rows (n, P) lie apart. landmarks: (m, P), all of length one."""
        density = Density(torch.from_numpy(self.reach), torch.from_numpy(self.density))
        limit, outlying = torch.from_numpy(self.limit), torch.from_numpy(self.outlying)
        return apart(x, landmarks, density, limit, outlying, outlier_neighbors(len(landmarks)))


def outlier_neighbors(num_landmarks: int) -> int:
    """Neighbours among which outliers are told: 20, fewer of few landmarks."""
    return max(3, min(20, num_landmarks // 10))
