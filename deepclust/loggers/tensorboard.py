"""TensorBoard's event files in the run folder (extra `tensorboard`).

`tensorboard --logdir outputs` shows them. A resumed run marks the step from which earlier figures
no longer count, so that no step is shown twice.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deepclust.loggers.base import Level
from deepclust.runtime.files import inside


class TensorBoardLogger:
    """Writes scalars `stage/name` over the step that counts all stages.

    folder: the run folder.
    resumed_step: the step that the run goes on from, 0 for a new one.
    warn: called with the reason if TensorBoard cannot be used.
    """

    def __init__(self, folder: Path, resumed_step: int, warn: Callable[[str], None]) -> None:
        self._folder = inside(folder, "tensorboard")
        # event files only grow; TensorBoard hides older figures from this step on
        self._purge = resumed_step + 1 if resumed_step else None
        self._warn = warn
        self._writer: Any = None

    def start(self, info: Mapping[str, Any]) -> None:
        """Opens an event file."""
        try:
            module: Any = importlib.import_module("torch.utils.tensorboard")
        except ImportError:
            self._warn(
                "TensorBoard is not installed (pip install tensorboard); the run is logged to files"
                " only."
            )
            return
        self._writer = module.SummaryWriter(str(self._folder), purge_step=self._purge)

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """Writes one scalar per number."""
        if self._writer is not None:
            for name, value in metrics.items():
                self._writer.add_scalar(f"{stage}/{name}", value, step)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Writes a Markdown table, which TensorBoard shows under TEXT."""
        if self._writer is not None:
            lines = [list(columns), ["---"] * len(columns), *rows]
            cells = [[_markdown_cell(cell) for cell in line] for line in lines]
            self._writer.add_text(title, "\n".join(f"| {' | '.join(line)} |" for line in cells))

    def message(self, text: str, level: Level = "info") -> None:
        """Messages stay in the console and log.txt."""

    def finish(self, state: str) -> None:
        """Closes the event file."""
        if self._writer is not None:
            self._writer.close()


def _markdown_cell(value: Any) -> str:
    """A cell's text; a bar in it would end the cell, so it becomes a slash."""
    if value is None:
        return ""
    return str(value).replace("|", "/")
