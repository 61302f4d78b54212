"""How the benchmarks of the operations measure and print: contestants in turn, medians of CPU time, ratios."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Contestants = dict[str, Callable[[], Any]]


@dataclass
class Timing:
    """seconds: median of CPU time. spread: (largest - smallest) / median. result: what the last run returned."""

    seconds: float
    spread: float
    result: Any


def measure(contestants: Contestants, repeats: int) -> dict[str, Timing]:
    """Runs all in turn, `repeats` times and once before that does not count.

    Each time in another order: whoever runs finds the caches as the one before has left them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results, shuffled = {}, random.Random(0)
    for _ in range(repeats + 1):
        for name, run in shuffled.sample(list(contestants.items()), len(contestants)):
            start = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - start)
    timings = {}
    for name, values in seconds.items():
        median = statistics.median(values[1:])
        timings[name] = Timing(median, (max(values[1:]) - min(values[1:])) / median, results[name])
    return timings


def show(
    title: str, timings: Mapping[str, Timing], passes: Mapping[str, int] = {}, notes: Mapping[str, str] = {}
) -> None:
    """Prints one comparison; a contestant's time is divided by its number of passes."""
    each = {name: timing.seconds / passes.get(name, 1) for name, timing in timings.items()}
    floor = min((value for name, value in each.items() if name.startswith("floor")), default=math.nan)
    print(title)
    for name, value in each.items():
        ratios = f"{value / each['ours']:7.2f} x ours"
        ratios += "" if math.isnan(floor) else f"{value / floor:7.2f} x floor"
        spread = f"spread {timings[name].spread:4.0%}"
        print(f"  {name:26s}{1e3 * value:10.2f} ms  {ratios}  {spread}  {notes.get(name, '')}".rstrip(), flush=True)
