"""metrics.jsonl, metrics.csv and log.txt in the run folder.

metrics.jsonl has one JSON object for each logged step, in full precision; `step` counts over all
stages. It is cut back to the step that a run resumes from, so no step is missing or there twice.
metrics.csv is the same as a table, rewritten between stages and at the end. A number that is not
finite is null, as JSON has no NaN.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepclust.loggers.base import Level, display
from deepclust.runtime.files import FolderError, explain, inside, write_atomic


class FileLogger:
    """Writes a run's numbers and messages into its folder.

    folder: the run folder.
    resumed_step: the step over all stages that the run goes on from, 0 for a new one.

    Raises:
        FolderError: the numbers cannot be written (from `start`, `log` and `finish`).
    """

    def __init__(self, folder: Path, resumed_step: int = 0) -> None:
        self._metrics = inside(folder, "metrics.jsonl")
        self._table = inside(folder, "metrics.csv")
        self._log = inside(folder, "log.txt")
        # the last line of metrics.jsonl, which a second call for its step extends
        self._last: dict[str, Any] = {}
        self._resumed_step = resumed_step

    def start(self, info: Mapping[str, Any]) -> None:
        """Cuts off lines after the resumed step, and a last line that a kill left incomplete."""
        rows = [row for row in read_metrics(self._metrics) if 0 < self._resumed_step >= row["step"]]
        write_atomic(self._metrics, "".join(_line(row) for row in rows))
        self._last = rows[-1] if rows else {}
        self._rewrite_table()

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """Appends a line, or extends the last one if it is of the same step."""
        row = {"step": step, "stage": stage, **metrics}
        if self._last and self._last["stage"] != stage:
            self._rewrite_table()
        try:
            if self._last.get("step") == step and self._last.get("stage") == stage:
                row = {**self._last, **row}
                with open(self._metrics, "r+b") as file:
                    # back over the last line, which the row with both calls' names replaces
                    file.seek(-len(_line(self._last).encode()), os.SEEK_END)
                    file.write(_line(row).encode())
            else:
                with open(self._metrics, "ab") as file:
                    file.write(_line(row).encode())
        except OSError as error:
            raise FolderError(f"{self._metrics} cannot be written: {explain(error)}") from error
        self._last = row

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Appends the table to log.txt as plain text, columns padded to equal width."""
        head = [str(cell) for cell in columns]
        lines = [head, *([display(cell) for cell in row] for row in rows)]
        widths = [max(len(cell) for cell in column) for column in zip(*lines)]
        text = [title]
        for line in lines:
            padded = [cell.ljust(width) for cell, width in zip(line, widths)]
            text.append("  ".join(padded).rstrip())
        self.message("\n".join(text))

    def message(self, text: str, level: Level = "info") -> None:
        """Appends to log.txt with the time and the level; further lines are indented."""
        stamp = time.strftime("%Y-%m-%d %H:%M:%S")
        # a full disk stops a run for its numbers, not for its words
        with contextlib.suppress(OSError), open(self._log, "a", encoding="utf-8") as file:
            file.write(f"{stamp} {level:<7} " + text.replace("\n", "\n    ") + "\n")

    def finish(self, state: str) -> None:
        """Rewrites metrics.csv."""
        self._rewrite_table()

    def _rewrite_table(self) -> None:
        """Writes metrics.csv anew from metrics.jsonl."""
        rows = read_metrics(self._metrics)
        # rewritten as a whole, since a stage may log names that earlier lines have no column for
        columns = list(dict.fromkeys(name for row in rows for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self._table, text.getvalue())


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every complete line of a metrics.jsonl, in order; none if there is no such file."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        # a cut line may still be valid JSON: a number, say, or an object without its line end
        if line.endswith(b"\n") and isinstance(row, dict) and isinstance(row.get("step"), int):
            rows.append(row)
    return rows


def _line(row: Mapping[str, Any]) -> str:
    """The row as a line of JSON."""
    finite = {name: _finite(value) for name, value in row.items()}
    return json.dumps(finite) + "\n"


def _finite(value: Any) -> Any:
    """The value; None for NaN and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
