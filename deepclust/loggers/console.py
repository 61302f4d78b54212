"""Progress on the terminal: a live bar.

Where the output is no terminal (a file, a pipe), a plain line about every ten seconds instead.
"""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from deepclust.loggers.base import Level, display

# Seldom enough for a log of hours, often enough to see that a job is alive.
SECONDS_BETWEEN_LINES = 10.0
# Looks continuous; steps of small networks are much faster, and drawing each would slow them.
SECONDS_BETWEEN_REDRAWS = 0.1
STYLES = {"info": "", "warning": "yellow", "error": "bold red"}


class ConsoleLogger:
    """Shows stage, step of steps, loss, images per second and time left.

    Tables and messages appear above the bar.

    console, clock: rich's console and a clock in seconds; given by tests.
    """

    def __init__(
        self,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._console = console or Console()
        self._clock = clock
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._stage: str | None = None
        # when the bar was last drawn, or the last line printed
        self._shown = 0.0
        # time and step at which this process took up the stage: not 0 where a run was resumed
        self._start_time = 0.0
        self._start_step = 0
        # the latest line, while it is held back
        self._pending: str | None = None

    def start(self, info: Mapping[str, Any]) -> None:
        """Says which run this is."""
        if "name" not in info:
            return
        text = str(info["name"])
        if "folder" in info:
            text += f" in {info['folder']}"
        self.message(text)

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """Moves the bar, or prints a line if there was none for ten seconds.

        Metrics without a `stage_step` say nothing about progress and are not shown.
        """
        if "stage_step" not in metrics:
            return
        done = int(metrics["stage_step"])
        total = int(metrics.get("stage_steps", 0))
        now = self._clock()
        if stage != self._stage:
            self._close_stage()
            self._stage = stage
            self._start_time = now
            self._start_step = done
            # so that the first step of a stage is shown at once
            self._shown = float("-inf")
        if self._console.is_terminal:
            self._draw(metrics, done, total, now)
            return
        left = self._time_left(done, total, now)
        self._pending = f"{stage} {done}/{total or '?'}  {_numbers(metrics)}{left}"
        if now - self._shown >= SECONDS_BETWEEN_LINES:
            self._flush(now)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Prints the table; columns of words are aligned to the left, all others to the right."""
        self._close_stage()
        table = Table(title=escape(title), title_justify="left")
        for number, column in enumerate(columns):
            words = all(isinstance(row[number], str) for row in rows)
            table.add_column(escape(str(column)), justify="left" if words else "right")
        for row in rows:
            table.add_row(*(escape(display(cell)) for cell in row))
        self._console.print(table)

    def message(self, text: str, level: Level = "info") -> None:
        """Prints plain text; warnings and errors begin with their level.

        Lines are broken between words on a terminal, and nowhere in a file.
        """
        if level != "info":
            text = f"{level}: {text}"
        if self._console.is_terminal:
            text = "\n".join(self._wrapped(line) for line in text.split("\n"))
        # soft_wrap, and no markup: rich would break paths, and take [brackets] in them for styles
        self._console.print(
            text, style=STYLES[level], markup=False, highlight=False, soft_wrap=True
        )

    def _wrapped(self, line: str) -> str:
        """The line broken to the terminal's width; paths and keys stay whole, to be copied."""
        width = self._console.width
        return textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False)

    def finish(self, state: str) -> None:
        """Takes the bar down, so that the terminal is as it was."""
        self._close_stage()

    def _draw(self, metrics: Mapping[str, float], done: int, total: int, now: float) -> None:
        """Moves the bar, and draws it if it was not drawn a moment ago."""
        if self._progress is None:
            self._progress = self._new_bar()
            stage = escape(str(self._stage))
            self._task = self._progress.add_task(stage, total=total or None, numbers="")
            self._progress.start()
        self._progress.update(self._task, completed=done, numbers=_numbers(metrics))
        # the last step is always drawn: nothing follows that would
        if now - self._shown >= SECONDS_BETWEEN_REDRAWS or done == total:
            self._progress.refresh()
            self._shown = now

    def _new_bar(self) -> Progress:
        """A bar of stage, steps, numbers and time left."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        # Without rich's refreshing thread: data workers are forked, and if that thread holds the
        # console's lock just then, the lock stays locked in them for ever.
        return Progress(*columns, console=self._console, auto_refresh=False)

    def _close_stage(self) -> None:
        """Ends the bar, or prints the stage's last line if it was held back."""
        if self._progress is not None:
            self._progress.refresh()
            self._progress.stop()
            self._progress = None
        self._flush(self._clock())
        self._stage = None

    def _flush(self, now: float) -> None:
        """Prints the line that was held back, if there is one."""
        if self._pending is not None:
            self.message(self._pending)
            self._pending = None
            self._shown = now

    def _time_left(self, done: int, total: int, now: float) -> str:
        """Minutes and seconds to the end of the stage at its speed so far; empty if unknown."""
        if done <= self._start_step or total <= done:
            return ""
        # from the step that this process began at, as earlier ones were not of its time
        seconds_per_step = (now - self._start_time) / (done - self._start_step)
        seconds = round(seconds_per_step * (total - done))
        return f"  {seconds // 60}:{seconds % 60:02d} left"


def _numbers(metrics: Mapping[str, float]) -> str:
    """Loss and images per second, as far as they are known."""
    parts = []
    if "loss" in metrics:
        parts.append(f"loss {metrics['loss']:.4f}")
    if "images_per_second" in metrics:
        parts.append(f"{metrics['images_per_second']:.0f} images/s")
    return "  ".join(parts)
