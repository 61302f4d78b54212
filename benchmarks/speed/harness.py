"""How the benchmarks of this folder measure and print; it has no command of its own."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Contestants = Mapping[str, Callable[[], Any]]
"""Name to what is run. Names that begin with `floor` are what nobody can do without."""


@dataclass
class Timing:
    """CPU time of one contestant."""

    seconds: float
    """Median over the runs that count."""
    spread: float
    """(Largest - smallest) / median."""
    result: Any
    """What the last run returned."""


def measure(contestants: Contestants, repeats: int) -> dict[str, Timing]:
    """CPU time of each contestant: runs all of them in turn, `repeats` times.

    contestants: functions without arguments, by name.
    repeats: rounds that count; one more before them does not.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    results: dict[str, Any] = {}
    # Each round has another order: whoever runs finds the caches as the one before has left them.
    shuffled = random.Random(0)
    # The first round pays for imports, memory from the system and code that compiles itself.
    for _ in range(repeats + 1):
        for name, run in shuffled.sample(list(contestants.items()), len(contestants)):
            # CPU time and not the clock: other jobs on the machine disturb it least.
            start = time.process_time()
            results[name] = run()
            seconds[name].append(time.process_time() - start)
    return {name: _timing(values[1:], results[name]) for name, values in seconds.items()}


def _timing(seconds: list[float], result: Any) -> Timing:
    median = statistics.median(seconds)
    return Timing(median, (max(seconds) - min(seconds)) / median, result)


def print_timings(
    title: str,
    timings: Mapping[str, Timing],
    passes: Mapping[str, int] | None = None,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Prints one comparison, a line a contestant: time, ratio to `ours`, ratio to the best floor.

    title: of the comparison.
    timings: as `measure` returns them; `ours` must be among them.
    passes: by which a contestant's time is divided; 1 if not given.
    notes: text at the end of a contestant's line.
    """
    passes = passes or {}
    notes = notes or {}
    seconds = {name: timing.seconds / passes.get(name, 1) for name, timing in timings.items()}
    # Several products of the same shape may stand as floors; the fastest is the true one.
    floors = [value for name, value in seconds.items() if name.startswith("floor")]
    floor = min(floors, default=math.nan)
    print(title)
    for name, value in seconds.items():
        ratios = f"{value / seconds['ours']:7.2f} x ours"
        if floors:
            ratios += f"{value / floor:7.2f} x floor"
        spread = f"spread {timings[name].spread:4.0%}"
        line = f"  {name:26s}{1e3 * value:10.2f} ms  {ratios}  {spread}  {notes.get(name, '')}"
        print(line.rstrip(), flush=True)
