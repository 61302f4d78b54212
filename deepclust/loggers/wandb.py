"""Weights & Biases, online or offline. Whatever it does, the run goes on, and the files hold everything it was given.

Only rank 0 has one; its id lies in the run folder, so that a resumed run goes on in the same W&B run.
"""

from __future__ import annotations

import importlib
import random
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepclust.loggers import Level
from deepclust.run_folder import inside

INIT_SECONDS = 20.0
FINISH_SECONDS = 30.0


class WandbLogger:
    """mode: `online` or `offline`. warn: called with the one line that says why W&B is not used as asked."""

    def __init__(self, folder: Path, mode: str, project: str, entity: str | None, warn: Callable[[str], None]) -> None:
        self._folder = folder
        self._mode = mode
        self._project = project
        self._entity = entity
        self._warn = warn
        self._run: Any = None

    def start(self, info: Mapping[str, Any]) -> None:
        """Starts the W&B run; falls back to offline without key or network, to nothing without package or folder."""
        with _same_random_numbers():
            try:
                wandb: Any = importlib.import_module("wandb")
            except ImportError:
                self._warn("W&B is not installed (pip install wandb); the run is logged to files only.")
                return
            run_id = self._run_id()
            wandb.setup(wandb.Settings(silent=True))
            if self._mode == "online" and not _has_key(wandb):
                self._warn("W&B has no key (run `wandb login`, or set WANDB_API_KEY); logging offline.")
                self._mode = "offline"
            try:
                self._run = self._init(wandb, run_id, info)
            except Exception as error:
                if self._mode == "offline":
                    raise
                cause = (str(error).strip() or type(error).__name__).splitlines()[0]
                self._warn(f"W&B cannot be reached ({cause}); logging offline, to be sent later by `wandb sync`.")
                self._mode = "offline"
                wandb.teardown()  # the failed start still holds the id
                self._run = self._init(wandb, run_id, info)
            self._run.define_metric("step")
            self._run.define_metric("*", step_metric="step")

    def log(self, metrics: Mapping[str, float], step: int, stage: str) -> None:
        """One W&B row, with `step` and `stage` as columns of their own."""
        if self._run is not None:
            self._run.log({"step": step, "stage": stage, **metrics})

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A W&B table."""
        if self._run is not None:
            wandb: Any = importlib.import_module("wandb")
            cells = [[None if cell is None else str(cell) for cell in row] for row in rows]
            self._run.log({title: wandb.Table(columns=list(columns), data=cells)})

    def message(self, text: str, level: Level = "info") -> None:
        """Messages stay in the console and log.txt."""

    def finish(self, state: str) -> None:
        """Ends the W&B run; waits a limited time for what is still to be sent."""
        if self._run is not None:
            with _same_random_numbers():
                self._run.finish(exit_code=0 if state in ("finished", "preempted") else 1)

    def _run_id(self) -> str:
        """The id kept in the folder. Writing it first also shows whether the folder can be written.

        In a folder that cannot, wandb itself would go to the system's temporary folder.
        """
        (self._folder / "wandb").mkdir(exist_ok=True)
        file = inside(self._folder, "wandb/run_id")
        run_id = (file.read_text().strip() if file.exists() else "") or secrets.token_hex(4)
        file.write_text(run_id + "\n")
        return run_id

    def _init(self, wandb: Any, run_id: str, info: Mapping[str, Any]) -> Any:
        wanted = {"silent": True, "console": "off", "init_timeout": INIT_SECONDS, "finish_timeout": FINISH_SECONDS}
        # finish_timeout came after the oldest version that we take.
        known = {name: value for name, value in wanted.items() if hasattr(wandb.Settings(), name)}
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
    """wandb's retries draw from Python's global generator; training must not notice."""
    state = random.getstate()
    try:
        yield
    finally:
        random.setstate(state)
