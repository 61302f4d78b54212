"""deepclust: self-supervised deep clustering. Public names are imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from deepclust.estimator import DeepClusterer
    from deepclust.model import Clusterer
    from deepclust.training.trainer import Trainer

_HOMES = {"DeepClusterer": "estimator", "Clusterer": "model", "Trainer": "training.trainer"}
__all__ = ["Clusterer", "DeepClusterer", "Trainer"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"deepclust.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'deepclust' has no attribute {name!r}")
