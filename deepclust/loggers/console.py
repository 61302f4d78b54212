"""Progress on the terminal: a live bar where there is one, a plain line about every ten seconds where there is none."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from deepclust.loggers import Level, display

SECONDS_BETWEEN_LINES = 10.0
SECONDS_BETWEEN_REDRAWS = 0.1
STYLES = {"info": "", "warning": "yellow", "error": "bold red"}


class ConsoleLogger:
    """Stage, step of steps, loss, images per second and time left; tables and messages above the bar.

    console and clock (seconds) may be given for tests.
    """

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._progress: Progress | None = None
        self._task = TaskID(0)
        self._stage: str | None = None
        self._shown = 0.0
        self._start = (0.0, 0)
        self._pending: str | None = None

    def start(self, info: Mapping[str, Any]) -> None:
        """Says which run this is."""
        if "name" in info:
            self.message(f"{info['name']} in {info['folder']}" if "folder" in info else str(info["name"]))

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """Moves the bar, or prints a line if none was for ten seconds. Without a `stage_step` it is no progress."""
        if "stage_step" not in metrics:
            return
        done, total = int(metrics["stage_step"]), int(metrics.get("stage_steps", 0))
        now = self._clock()
        if stage != self._stage:
            self._close_stage()
            self._stage, self._start, self._shown = stage, (now, done), float("-inf")
        if self._console.is_terminal:
            self._draw(metrics, done, total, now)
            return
        self._pending = f"{stage} {done}/{total or '?'}  {_numbers(metrics)}{self._time_left(done, total, now)}"
        if now - self._shown >= SECONDS_BETWEEN_LINES:
            self._flush(now)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Numbers to the right, words to the left."""
        self._close_stage()
        table = Table(title=escape(title), title_justify="left")
        for number, column in enumerate(columns):
            words = all(isinstance(row[number], str) for row in rows)
            table.add_column(escape(str(column)), justify="left" if words else "right")
        for row in rows:
            table.add_row(*(escape(display(cell)) for cell in row))
        self._console.print(table)

    def message(self, text: str, level: Level = "info") -> None:
        """Plain text; warnings and errors say what they are. A terminal breaks it between words, a file nowhere."""
        text = text if level == "info" else f"{level}: {text}"
        if self._console.is_terminal:
            width = self._console.width
            lines = (
                textwrap.fill(line, width, break_long_words=False, break_on_hyphens=False) for line in text.split("\n")
            )
            text = "\n".join(lines)
        self._console.print(text, style=STYLES[level], markup=False, highlight=False, soft_wrap=True)

    def finish(self, state: str) -> None:
        """Takes the bar down, so that the terminal is as it was."""
        self._close_stage()

    def _draw(self, metrics: Mapping[str, float], done: int, total: int, now: float) -> None:
        if self._progress is None:
            self._progress = self._new_bar()
            self._task = self._progress.add_task(escape(str(self._stage)), total=total or None, numbers="")
            self._progress.start()
        self._progress.update(self._task, completed=done, numbers=_numbers(metrics))
        if now - self._shown >= SECONDS_BETWEEN_REDRAWS or done == total:
            self._progress.refresh()
            self._shown = now

    def _new_bar(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
        )
        # No refreshing thread of rich: data workers are forked while it might hold the console's lock.
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
        if self._pending is not None:
            self.message(self._pending)
            self._pending, self._shown = None, now

    def _time_left(self, done: int, total: int, now: float) -> str:
        began, first = self._start
        if done <= first or total <= done:
            return ""
        seconds = round((now - began) / (done - first) * (total - done))
        return f"  {seconds // 60}:{seconds % 60:02d} left"


def _numbers(metrics: Mapping[str, float]) -> str:
    parts = [f"loss {metrics['loss']:.4f}"] if "loss" in metrics else []
    parts += [f"{metrics['images_per_second']:.0f} images/s"] if "images_per_second" in metrics else []
    return "  ".join(parts)
