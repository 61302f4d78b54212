"""Scores by labels and without, calibration, probes of features, baselines, the collapse alarm.

Labels enter this package and leave it as figures; nothing here feeds training.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepclust.eval.calibration import calibration_scores
    from deepclust.eval.metrics import clustering_scores
    from deepclust.eval.probes import knn_probe, linear_probe

_HOMES = {
    "calibration_scores": "calibration",
    "clustering_scores": "metrics",
    "knn_probe": "probes",
    "linear_probe": "probes",
}
__all__ = ["calibration_scores", "clustering_scores", "knn_probe", "linear_probe"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"deepclust.eval.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'deepclust.eval' has no attribute {name!r}")
