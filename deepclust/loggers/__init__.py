"""Where a run's numbers and messages go: the terminal, files in the run folder, Weights & Biases, TensorBoard.

A logger never changes training: it draws no random numbers, and one that fails is switched off with a warning.
Importing this file imports no torch and no wandb.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

from deepclust.errors import Advice, UserError
from deepclust.settings import LoggerSettings

Level = Literal["info", "warning", "error"]


class Logger(Protocol):
    """What every logger does. `step` counts macro batches over all stages, as the files' and W&B's own axis."""

    def start(self, info: Mapping[str, Any]) -> None:
        """Called once before training; info: `name`, `config` (the resolved tree) and what else describes the run."""

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """One step's numbers. A second call for a step adds to it.

        Names that mean something: `loss`, `images_per_second`, `epoch`, `stage_step` of `stage_steps`.
        """

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table of results, for people."""

    def message(self, text: str, level: Level = "info") -> None:
        """One or more lines of plain words."""

    def finish(self, state: str) -> None:
        """Called once at the end, however it ends; state as in `status.json`."""


class Loggers:
    """Hands everything on to each logger. One that raises is named once and switched off; the run goes on.

    Only a UserError passes: a disk too full for the run's own metrics stops it, and it can be resumed without a gap.
    """

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.active = list(loggers)

    def start(self, info: Mapping[str, Any]) -> None:
        """See `Logger.start`."""
        self._each(lambda logger: logger.start(info))

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """See `Logger.log`. Values that are not numbers are refused by TypeError: a mistake of the caller."""
        numbers = {name: value if isinstance(value, int) else float(value) for name, value in metrics.items()}
        self._each(lambda logger: logger.log(numbers, step, stage))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """See `Logger.table`."""
        self._each(lambda logger: logger.table(title, columns, rows))

    def message(self, text: str, level: Level = "info") -> None:
        """See `Logger.message`."""
        self._each(lambda logger: logger.message(text, level))

    @contextmanager
    def advice(self) -> Iterator[None]:
        """Inside it, warnings of the class `Advice` are messages; all others stay what they are."""
        with warnings.catch_warnings():
            shown = warnings.showwarning

            def show(message: Any, category: type[Warning], *where: Any, **more: Any) -> None:
                if issubclass(category, Advice):
                    self.message(str(message), "warning")
                else:
                    shown(message, category, *where, **more)

            warnings.showwarning = show
            warnings.simplefilter("always", Advice)
            yield

    def finish(self, state: str) -> None:
        """See `Logger.finish`."""
        self._each(lambda logger: logger.finish(state), fatal=())

    def _each(self, call: Callable[[Logger], None], fatal: tuple[type[Exception], ...] = (UserError,)) -> None:
        for logger in list(self.active):
            try:
                call(logger)
            except fatal:
                raise
            except Exception as error:
                self.active.remove(logger)
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.message(f"{type(logger).__name__} is off from here on: {cause}", "warning")


def build_loggers(settings: Mapping[str, Any], folder: Path, rank: int = 0, resumed_step: int = 0) -> Loggers:
    """The loggers that `settings` (keys of `deepclust.settings.LoggerSettings`) ask for; none on ranks above 0.

    resumed_step: the step over all stages that the run goes on from; logged steps after it are cut off, 0 starts anew.
    """
    if rank > 0:
        return Loggers()
    from deepclust.loggers.console import ConsoleLogger
    from deepclust.loggers.files import FileLogger
    from deepclust.loggers.wandb import WandbLogger

    chosen = LoggerSettings(**settings)
    loggers: list[Logger] = [FileLogger(folder, resumed_step)]
    if chosen.console:
        loggers.insert(0, ConsoleLogger())
    together = Loggers(loggers)
    warn = lambda text: together.message(text, "warning")  # noqa: E731
    if chosen.tensorboard:
        from deepclust.loggers.tensorboard import TensorBoardLogger

        together.active.append(TensorBoardLogger(folder, resumed_step, warn))
    if chosen.wandb != "disabled":
        together.active.append(WandbLogger(folder, chosen.wandb, chosen.wandb_project, chosen.wandb_entity, warn))
    return together


def display(value: Any) -> str:
    """A table cell for people: four digits of a float, a dash for nothing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
