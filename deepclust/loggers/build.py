"""The loggers that a configuration asks for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deepclust.config.settings import LoggerSettings
from deepclust.loggers.base import Loggers


def build_loggers(
    settings: Mapping[str, Any],
    folder: Path,
    rank: int = 0,
    resumed_step: int = 0,
) -> Loggers:
    """The loggers of a run; none on ranks above 0.

    settings: keys of `deepclust.config.settings.LoggerSettings`.
    folder: the run folder.
    rank: rank of this process.
    resumed_step: the step over all stages that the run goes on from. Steps that were logged after
        it are cut off, as they are trained again; 0 starts anew.
    """
    if rank > 0:
        return Loggers()
    from deepclust.loggers.console import ConsoleLogger
    from deepclust.loggers.files import FileLogger
    from deepclust.loggers.wandb import WandbLogger

    chosen = LoggerSettings(**settings)
    loggers = Loggers()

    def warn(text: str) -> None:
        loggers.message(text, "warning")

    # console and files first, so that they can show what the services below warn of
    if chosen.console:
        loggers.active.append(ConsoleLogger())
    loggers.active.append(FileLogger(folder, resumed_step))
    if chosen.tensorboard:
        from deepclust.loggers.tensorboard import TensorBoardLogger

        loggers.active.append(TensorBoardLogger(folder, resumed_step, warn))
    if chosen.wandb != "disabled":
        project, entity = chosen.wandb_project, chosen.wandb_entity
        loggers.active.append(WandbLogger(folder, chosen.wandb, project, entity, warn))
    return loggers
