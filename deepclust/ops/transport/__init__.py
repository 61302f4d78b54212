"""Optimal transport between samples and clusters: balanced, self-labelling, partial, semantic.

Importing this package imports no torch; the solvers come with their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deepclust.ops.transport.balanced import sinkhorn
    from deepclust.ops.transport.labels import SelfLabelResult, self_label
    from deepclust.ops.transport.partial import TransportResult, mass_schedule, partial_transport
    from deepclust.ops.transport.semantic import semantic_partial_transport

_HOME = {
    "sinkhorn": "balanced",
    "SelfLabelResult": "labels",
    "self_label": "labels",
    "TransportResult": "partial",
    "mass_schedule": "partial",
    "partial_transport": "partial",
    "semantic_partial_transport": "semantic",
}
__all__ = [
    "SelfLabelResult",
    "TransportResult",
    "mass_schedule",
    "partial_transport",
    "self_label",
    "semantic_partial_transport",
    "sinkhorn",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
