"""Where a run's numbers and messages go: terminal, run folder, Weights & Biases, TensorBoard.

A logger never changes training: it draws no random numbers, and one that fails is switched off with
a warning. Importing this file imports no torch and no wandb.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, Protocol

from deepclust.errors import Advice, UserError

Level = Literal["info", "warning", "error"]


class Logger(Protocol):
    """What every logger does."""

    def start(self, info: Mapping[str, Any]) -> None:
        """Called once before training.

        info: `name`, `folder`, `config` (the resolved tree) and what else describes the run.
        """

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """Takes the numbers of one step; a second call for the same step adds to it.

        metrics: name to number. Names that loggers know: `loss`, `images_per_second`, `epoch`,
            `stage_step` and `stage_steps` (the step within the stage and their number).
        step: macro batches so far over all stages.
        stage: name of the stage.
        """

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Takes a table of results for people to read.

        title: what stands above it.
        columns: names of the columns.
        rows: one cell for each column; None where there is no figure.
        """

    def message(self, text: str, level: Level = "info") -> None:
        """Takes one or more lines of plain words.

        level: `info`, `warning` or `error`.
        """

    def finish(self, state: str) -> None:
        """Called once at the end, however the run ends; `state` is as in status.json."""


class Loggers:
    """Hands everything on to each logger.

    A logger that raises is switched off with a warning that names it, and the run goes on. Only a
    UserError is passed on: a disk too full for the run's own metrics stops the run, which can then
    be resumed without a gap.
    """

    def __init__(self, loggers: Sequence[Logger] = ()) -> None:
        self.active = list(loggers)

    def start(self, info: Mapping[str, Any]) -> None:
        """See `Logger.start`."""
        self._each(lambda logger: logger.start(info))

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """See `Logger.log`.

        Raises:
            TypeError: a value is not a number, which is a mistake of the caller.
        """
        # here and not in a logger, whose exception would only switch it off; float() also makes
        # plain numbers of tensors and NumPy's
        numbers = {
            name: value if isinstance(value, int) else float(value)
            for name, value in metrics.items()
        }
        self._each(lambda logger: logger.log(numbers, step, stage))

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """See `Logger.table`."""
        self._each(lambda logger: logger.table(title, columns, rows))

    def message(self, text: str, level: Level = "info") -> None:
        """See `Logger.message`."""
        self._each(lambda logger: logger.message(text, level))

    @contextmanager
    def advice(self) -> Iterator[None]:
        """Within the context, warnings of the class `Advice` become messages; others stay."""
        with warnings.catch_warnings():
            show_other = warnings.showwarning

            def show(message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
                if issubclass(category, Advice):
                    self.message(str(message), "warning")
                else:
                    show_other(message, category, *args, **kwargs)

            warnings.showwarning = show
            # so that no filter of the environment hides advice, or shows it for one stage only
            warnings.simplefilter("always", Advice)
            yield

    def finish(self, state: str) -> None:
        """See `Logger.finish`. Every logger finishes: no error stops the others here."""
        self._each(lambda logger: logger.finish(state), fatal=())

    def _each(
        self,
        call: Callable[[Logger], None],
        fatal: tuple[type[Exception], ...] = (UserError,),
    ) -> None:
        """Calls each active logger; errors other than the `fatal` ones switch it off."""
        # a copy, as the loop removes loggers
        for logger in list(self.active):
            try:
                call(logger)
            except fatal:
                raise
            except Exception as error:
                # before the message, which is for the others alone
                self.active.remove(logger)
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.message(f"{type(logger).__name__} is off from here on: {cause}", "warning")


def display(value: Any) -> str:
    """A value as text of a table cell: four digits of a float, a dash for None and NaN."""
    if value is None:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if math.isnan(value):
        return "–"
    return f"{value:.4g}"
