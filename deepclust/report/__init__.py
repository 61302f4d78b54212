"""The report of a run: one self-contained HTML page."""

from __future__ import annotations

from typing import Any

__all__ = ["write_report"]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    # imported when first used, so that a part of the report loads no more than it needs
    if name == "write_report":
        from deepclust.report.page import write_report

        return write_report
    raise AttributeError(f"module 'deepclust.report' has no attribute {name!r}")
