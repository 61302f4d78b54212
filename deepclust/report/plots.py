"""Plots as small pieces of HTML and SVG, drawn by hand: they follow the page's width and its light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

MAX_POINTS = 300
NOT_DRAWN = ("step", "stage", "stage_step", "stage_steps", "epoch")
"""What says where a line of metrics.jsonl stands, rather than how well it goes."""


def metric_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """The lines of metrics.jsonl as curves: "stage: metric" to (steps, values), in the order they were first logged."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in NOT_DRAWN and isinstance(value, int | float):
                steps, values = curves.setdefault(f"{row['stage']}: {name}", ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


def size_bars(sizes: Sequence[tuple[int, int]]) -> str:
    """A bar for each cluster, linked to its gallery. sizes: (cluster, number of images)."""
    largest = max((size for _, size in sizes), default=0) or 1
    labelled = len(sizes) <= 20
    bars = []
    for cluster, size in sizes:
        text = f"Cluster {cluster}: {size:,} images"
        count, label = (f"<small>{size:,}</small>", f"<b>{cluster}</b>") if labelled else ("", "")
        bars.append(
            f'<li><a href="#cluster-{cluster}" title="{text}" aria-label="{text}">'
            f'<span>{count}<i style="height:{100 * size / largest:.1f}%"></i></span>{label}</a></li>'
        )
    return f'<ol class="bars{"" if labelled else " many"}">{"".join(bars)}</ol>'


def curve(name: str, steps: Sequence[float], values: Sequence[float]) -> str:
    """One line over steps with its range in words; empty if fewer than two values are finite."""
    points = [(float(s), float(v)) for s, v in zip(steps, values) if math.isfinite(s) and math.isfinite(v)]
    if len(points) < 2:
        return ""
    stride = -(-len(points) // MAX_POINTS)
    drawn = points[::stride] if (len(points) - 1) % stride == 0 else [*points[::stride], points[-1]]
    low, high = min(v for _, v in points), max(v for _, v in points)
    first, last = drawn[0][0], drawn[-1][0]
    path = " ".join(
        f"{1000 * _position(s, first, last):.0f},{300 - 300 * _position(v, low, high):.0f}" for s, v in drawn
    )
    name = escape(name, quote=True)
    words = f"{name}: from {points[0][1]:.4g} at step {first:,.0f} to {points[-1][1]:.4g} at step {last:,.0f}"
    return (
        f'<figure class="curve"><figcaption>{name} <span class="facts">{points[-1][1]:.4g}</span></figcaption>'
        f'<div class="axes"><div class="range"><span>{high:.3g}</span><span>{low:.3g}</span></div>'
        f'<svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{words}">'
        f'<polyline points="{path}" vector-effect="non-scaling-stroke"/></svg></div>'
        f'<div class="steps"><span>step {first:,.0f}</span><span>{last:,.0f}</span></div></figure>'
    )


def _position(value: float, low: float, high: float) -> float:
    """Where value lies between low and high, in [0, 1]; the middle where they are equal."""
    return (value - low) / (high - low) if high > low else 0.5
