"""The contract of a head, and one file per method."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepclust.heads.base import BankSpec, Head, Output, Refresh, Targets, View

__all__ = ["BankSpec", "Head", "Output", "Refresh", "Targets", "View"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("deepclust.heads.base"), name)
    raise AttributeError(f"module 'deepclust.heads' has no attribute {name!r}")
