"""Plots as small pieces of HTML and SVG, drawn by hand: they follow the page's width and its light or dark colours."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple

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


class Bar(NamedTuple):
    """A cluster's bar. title: its name for people, `Cluster 3` by default; label: below the bar, `3` by default."""

    cluster: int
    size: int
    title: str = ""
    label: str = ""
    colour: str = ""


def size_bars(sizes: Sequence[tuple[Any, ...]]) -> str:
    """A bar for each cluster, linked to its gallery. sizes: `Bar`, or tuples of its first fields."""
    bars = [Bar(*size) for size in sizes]
    largest = max((bar.size for bar in bars), default=0) or 1
    labelled = len(bars) <= 20
    items = []
    for bar in bars:
        text = escape(f"{bar.title or f'Cluster {bar.cluster}'}: {bar.size:,} images", quote=True)
        name = escape(bar.label or str(bar.cluster))
        count, label = (f"<small>{bar.size:,}</small>", f"<b>{name}</b>") if labelled else ("", "")
        colour = f";background:{bar.colour}" if bar.colour else ""
        items.append(
            f'<li><a href="#cluster-{bar.cluster}" title="{text}" aria-label="{text}">'
            f'<span>{count}<i style="height:{100 * bar.size / largest:.1f}%{colour}"></i></span>{label}</a></li>'
        )
    return f'<ol class="bars{"" if labelled else " many"}">{"".join(items)}</ol>'


def curve(
    name: str, steps: Sequence[float], values: Sequence[float], axis: str = "step", mark: float | None = None
) -> str:
    """One line over steps with its range in words; empty if fewer than two values are finite.

    axis: what the steps are. mark: a step to point out; its value stands beside the name, else the last one.
    """
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
    name, axis = escape(name, quote=True), escape(axis, quote=True)
    words = f"{name}: from {points[0][1]:.4g} at {axis} {first:,.0f} to {points[-1][1]:.4g} at {axis} {last:,.0f}"
    fact, line = f"{points[-1][1]:.4g}", ""
    marked = next((value for step, value in points if step == mark), None)
    if mark is not None and marked is not None:
        fact, place = f"{marked:.4g} at {axis} {mark:,.0f}", 1000 * _position(mark, first, last)
        words += f"; {fact} is marked"
        line = f'<line x1="{place:.0f}" x2="{place:.0f}" y1="0" y2="300" vector-effect="non-scaling-stroke"/>'
    return (
        f'<figure class="curve"><figcaption>{name} <span class="facts">{fact}</span></figcaption>'
        f'<div class="axes"><div class="range"><span>{high:.3g}</span><span>{low:.3g}</span></div>'
        f'<svg viewBox="0 0 1000 300" preserveAspectRatio="none" role="img" aria-label="{words}">'
        f'{line}<polyline points="{path}" vector-effect="non-scaling-stroke"/></svg></div>'
        f'<div class="steps"><span>{axis} {first:,.0f}</span><span>{last:,.0f}</span></div></figure>'
    )


def _position(value: float, low: float, high: float) -> float:
    """Where value lies between low and high, in [0, 1]; the middle where they are equal."""
    return (value - low) / (high - low) if high > low else 0.5
