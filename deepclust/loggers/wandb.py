"""Weights & Biases, online or offline.

Whatever it does, the run goes on, and the files of the run folder hold all that W&B is given. Only
rank 0 logs. The id of the W&B run is kept in the run folder, so that a resumed run goes on in it.
"""

from __future__ import annotations

import importlib
import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepclust.loggers.base import Level
from deepclust.runtime.files import inside

# wandb's own limits are longer: training waits for its start, and a finished run, with its GPU, for
# what is still to be sent.
INIT_SECONDS = 20.0
FINISH_SECONDS = 30.0


class WandbLogger:
    """Logs to a W&B run.

    folder: the run folder.
    mode: `online` or `offline`.
    project, entity: of the W&B run; None is the account's default entity.
    warn: called with one line that says why W&B is not used as configured.
    """

    def __init__(
        self,
        folder: Path,
        mode: str,
        project: str,
        entity: str | None,
        warn: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self._mode = mode
        self._project = project
        self._entity = entity
        self._warn = warn
        self._run: Any = None

    def start(self, info: Mapping[str, Any]) -> None:
        """Starts the W&B run.

        Without a key or network it logs offline; without the package it logs nothing. An error that
        remains, such as a folder that cannot be written, is raised: `Loggers` switches W&B off.
        """
        with _same_random_numbers():
            try:
                wandb: Any = importlib.import_module("wandb")
            except ImportError:
                self._warn(
                    "W&B is not installed (pip install wandb); the run is logged to files only."
                )
                return
            run_id = self._run_id()
            wandb.setup(wandb.Settings(silent=True))
            if self._mode == "online" and not _has_key(wandb):
                self._warn(
                    "W&B has no key (run `wandb login`, or set WANDB_API_KEY); logging offline."
                )
                self._mode = "offline"
            try:
                self._run = self._init(wandb, run_id, info)
            except Exception as error:
                if self._mode == "offline":
                    raise
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._warn(
                    f"W&B cannot be reached ({cause}); logging offline, to be sent later by `wandb"
                    " sync`."
                )
                self._mode = "offline"
                wandb.teardown()  # the failed start still holds the id
                self._run = self._init(wandb, run_id, info)
            # W&B's own count has one step per call of log; plots are over ours
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """Logs one W&B row, with `step` and `stage` as columns."""
        if self._run is not None:
            self._run.log({"step": step, "stage": stage, **metrics})

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Logs a W&B table."""
        if self._run is not None:
            wandb: Any = importlib.import_module("wandb")
            # as text: a column of a W&B table must have one type, and ours may mix them
            cells = [[None if cell is None else str(cell) for cell in row] for row in rows]
            self._run.log({title: wandb.Table(columns=list(columns), data=cells)})

    def message(self, text: str, level: Level = "info") -> None:
        """Messages stay in the console and log.txt."""

    def finish(self, state: str) -> None:
        """Ends the W&B run; waits a limited time for what is still to be sent."""
        if self._run is not None:
            with _same_random_numbers():
                # a preempted run goes on later, so it is no failure, as W&B calls any other code
                stopped_as_planned = state in ("finished", "preempted")
                self._run.finish(exit_code=0 if stopped_as_planned else 1)

    def _run_id(self) -> str:
        """The id kept in the folder, or a new one, which is written there.

        Raises:
            OSError: the folder cannot be written. wandb itself would then go to the system's
                temporary folder without a word.
        """
        (self._folder / "wandb").mkdir(exist_ok=True)
        file = inside(self._folder, "wandb/run_id")
        run_id = file.read_text().strip() if file.exists() else ""
        if not run_id:
            # from the system's source of randomness, not from a generator that training draws from
            run_id = secrets.token_hex(4)
        file.write_text(run_id + "\n")
        return run_id

    def _init(self, wandb: Any, run_id: str, info: Mapping[str, Any]) -> Any:
        """The started W&B run."""
        settings = {
            "silent": True,
            "console": "off",
            "init_timeout": INIT_SECONDS,
            "finish_timeout": FINISH_SECONDS,
        }
        # finish_timeout is younger than the oldest version of wandb that is supported
        known = {name: value for name, value in settings.items() if hasattr(wandb.Settings(), name)}
        return wandb.init(
            project=self._project,
            entity=self._entity,
            name=info.get("name"),
            config=dict(info.get("config", {})),
            dir=str(self._folder),
            id=run_id,
            resume="allow",
            mode=self._mode,
            save_code=False,
            settings=wandb.Settings(**known),
        )


def _has_key(wandb: Any) -> bool:
    """Whether W&B knows a key, without asking for one on the terminal."""
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # older versions do not know `prompt`
        return bool(wandb.api.api_key)


@contextmanager
def _same_random_numbers() -> Iterator[None]:
    """Restores Python's global random state, which wandb's retries draw from."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
