"""Data sets, random views of images, loading, and the bank of features. Public names are imported
when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepclust.data.datasets import from_arrays
    from deepclust.data.image_set import ImageData, ImageSet

_HOMES = {"ImageData": "image_set", "ImageSet": "image_set", "from_arrays": "datasets"}
__all__ = ["ImageData", "ImageSet", "from_arrays"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"deepclust.data.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'deepclust.data' has no attribute {name!r}")
