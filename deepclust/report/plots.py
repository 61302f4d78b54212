"""Plots as small pieces of HTML and SVG, without a plotting library.

So they follow the width of the page and its light or dark colours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

MAX_POINTS = 300
"""Most points of a curve; a plot is hardly more pixels wide."""
MAX_LABELLED = 20
"""Most bars that have room for labels."""
# The box that a curve is drawn in, in units of its own, which the page stretches to its width.
WIDTH = 1000
HEIGHT = 300
NOT_DRAWN = ("step", "stage", "stage_step", "stage_steps", "epoch")
"""Names in metrics.jsonl that say which step a line is of, and are no metrics."""


def metric_curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[float], list[float]]]:
    """Curves of a run: "stage: metric" to (steps, values), in the order in which they first appear.

    rows: the lines of metrics.jsonl.
    """
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if name not in NOT_DRAWN and isinstance(value, int | float):
                steps, values = curves.setdefault(f"{row['stage']}: {name}", ([], []))
                steps.append(row["step"])
                values.append(value)
    return curves


class Bar(NamedTuple):
    """The bar of a cluster."""

    cluster: int
    size: int
    """Number of its images."""
    title: str = ""
    """Its name for people; `Cluster 3` by default."""
    label: str = ""
    """What stands below the bar; `3` by default."""
    colour: str = ""
    """As CSS has it."""


def size_bars(sizes: Sequence[tuple[Any, ...]]) -> str:
    """HTML of a bar for each cluster, linked to its gallery.

    sizes: `Bar`, or tuples of its first fields.
    """
    bars = [Bar(*size) for size in sizes]
    # not 0, by which heights would be divided where all clusters are empty
    largest = max((bar.size for bar in bars), default=0) or 1
    labelled = len(bars) <= MAX_LABELLED
    items = "".join(_bar(bar, largest, labelled) for bar in bars)
    kind = "bars" if labelled else "bars many"
    return f'<ol class="{kind}">{items}</ol>'


def _bar(bar: Bar, largest: int, labelled: bool) -> str:
    """One bar, its height relative to the largest."""
    title = bar.title or f"Cluster {bar.cluster}"
    text = escape(f"{title}: {bar.size:,} images", quote=True)
    count = ""
    label = ""
    if labelled:
        count = f"<small>{bar.size:,}</small>"
        label = f"<b>{escape(bar.label or str(bar.cluster))}</b>"
    style = f"height:{100 * bar.size / largest:.1f}%"
    if bar.colour:
        style += f";background:{bar.colour}"
    return (
        f'<li><a href="#cluster-{bar.cluster}" title="{text}" aria-label="{text}">'
        f'<span>{count}<i style="{style}"></i></span>{label}</a></li>'
    )


def curve(
    name: str,
    steps: Sequence[float],
    values: Sequence[float],
    axis: str = "step",
    mark: float | None = None,
) -> str:
    """HTML of a line over steps, with its range in words; empty below two finite values.

    name: of the curve.
    steps, values: of its points; those that are not finite are left out.
    axis: what the steps are.
    mark: a step to point out; its value stands beside the name, in place of the last one.
    """
    points = [
        (float(step), float(value))
        for step, value in zip(steps, values)
        if math.isfinite(step) and math.isfinite(value)
    ]
    if len(points) < 2:
        return ""
    drawn = _thinned(points)
    first = drawn[0][0]
    last = drawn[-1][0]
    # the range is of all points, so that thinning out never moves a curve
    low = min(value for _, value in points)
    high = max(value for _, value in points)
    path = " ".join(
        f"{WIDTH * _position(step, first, last):.0f},"
        f"{HEIGHT - HEIGHT * _position(value, low, high):.0f}"
        for step, value in drawn
    )
    name = escape(name, quote=True)
    axis = escape(axis, quote=True)
    words = (
        f"{name}: from {points[0][1]:.4g} at {axis} {first:,.0f} to {points[-1][1]:.4g} at {axis}"
        f" {last:,.0f}"
    )
    fact = f"{points[-1][1]:.4g}"
    line = ""
    marked = next((value for step, value in points if step == mark), None)
    if mark is not None and marked is not None:
        fact = f"{marked:.4g} at {axis} {mark:,.0f}"
        words += f"; {fact} is marked"
        line = _vertical(WIDTH * _position(mark, first, last))
    # non-scaling-stroke: the box is stretched to the page's width, its lines are not
    return (
        f'<figure class="curve"><figcaption>{name} <span class="facts">{fact}</span></figcaption>'
        f'<div class="axes"><div class="range"><span>{high:.3g}</span><span>{low:.3g}</span></div>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" preserveAspectRatio="none" role="img" '
        f'aria-label="{words}">{line}'
        f'<polyline points="{path}" vector-effect="non-scaling-stroke"/></svg></div>'
        f'<div class="steps"><span>{axis} {first:,.0f}</span>'
        f"<span>{last:,.0f}</span></div></figure>"
    )


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every nth point so that about `MAX_POINTS` remain, the last one always."""
    stride = -(-len(points) // MAX_POINTS)
    thinned = points[::stride]
    if (len(points) - 1) % stride != 0:
        thinned.append(points[-1])
    return thinned


def _vertical(x: float) -> str:
    """A line from top to bottom of a curve's box."""
    return (
        f'<line x1="{x:.0f}" x2="{x:.0f}" y1="0" y2="{HEIGHT}" vector-effect="non-scaling-stroke"/>'
    )


def _position(value: float, low: float, high: float) -> float:
    """Where value lies between low and high, in [0, 1]; the middle where they are equal."""
    if high <= low:
        return 0.5
    return (value - low) / (high - low)
