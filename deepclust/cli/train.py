"""`deepclust train` and `python train.py`: one run or several, and what is left where one fails."""

from __future__ import annotations

import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deepclust.cli.help import help_text
from deepclust.cli.parser import FAILED, OK, Parser, say
from deepclust.errors import UserError, in_short
from deepclust.runtime.launched import rank

# The longest run.name that the configuration takes.
LONGEST_NAME = 200


def train(words: list[str]) -> int:
    """Runs `train [--cfg] [--config-dir DIR] [-m] key=value ...` and returns the exit code."""
    from deepclust.config.compose import sweeps
    from deepclust.config.load import load

    parser = Parser("train.py", add_help=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("-m", "--multirun", action="store_true")
    parser.add_argument("--config-dir", type=Path, action="append", default=[])
    parser.add_argument("overrides", nargs="*")
    # Intermixed: options may stand before, between and after the key=value words.
    options = parser.parse_intermixed_args(words)
    if options.help:
        print(help_text())
        return OK
    if options.multirun:
        return _train_many(sweeps(options.overrides), options.config_dir)
    config = load(options.overrides, options.config_dir)
    if options.cfg:
        print(config.text(), end="")
        return OK
    return _train_one(config)


def _train_many(runs: list[list[str]], config_dirs: Sequence[Path]) -> int:
    """Trains one run after another, each in its own folder, and stops at the first fault.

    All are checked before the first begins: a slip in the last one must not show after hours.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise UserError(
            "-m runs one process after another; under torchrun give one configuration at a time"
        )
    configs = _load_all(runs, config_dirs)
    for number, config in enumerate(configs, 1):
        print(f"run {number} of {len(configs)}: {config.folder()}")
        code = _train_one(config)
        # A run that was stopped ends the sweep as well: Ctrl-C is meant for all of it.
        if code != OK:
            return code
    return OK


def _load_all(runs: list[list[str]], config_dirs: Sequence[Path]) -> list[Any]:
    """The configurations of all runs, no two of which share a folder.

    Raises one ConfigError with the faults of all runs.
    """
    from deepclust.config.load import load
    from deepclust.errors import ConfigError

    configs = []
    problems = []
    # The faults of all runs at once: whoever mends one by one starts the sweep again each time.
    for words in runs:
        try:
            configs.append(load(words, config_dirs))
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(problems)
    if len({config.folder() for config in configs}) == len(runs):
        return configs
    names = _names(configs, runs)
    return [load([*words, f"run.name={name}"], config_dirs) for words, name in zip(runs, names)]


def _names(configs: Sequence[Any], runs: Sequence[Sequence[str]]) -> list[str]:
    """Names of runs that would share a folder: the usual one and the words that differ.

    As in scan-digits-0-optim.lr-0.001.
    """
    if any(config.run.dir is not None or config.run.name is not None for config in configs):
        raise UserError("these runs would share one folder; with -m leave run.name and run.dir out")
    # What all runs share, their names need not say.
    swept = [position for position, words in enumerate(zip(*runs)) if len(set(words)) > 1]
    names = []
    for config, words in zip(configs, runs):
        parts = [config.name(), *(words[position] for position in swept)]
        names.append(re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(parts))[:LONGEST_NAME])
    return names


def _train_one(config: Any) -> int:
    try:
        # Only here: this import brings torch, and the words are checked by now.
        from deepclust.training.recipe import train as train_recipe

        return train_recipe(config)
    except (UserError, KeyboardInterrupt):
        if config.run.traceback:
            traceback.print_exc()
        raise
    except Exception as error:
        return _failed(config, error)


def _failed(config: Any, error: Exception) -> int:
    """Prints one line for a fault of the program; its traceback goes to the run's log.

    With run.traceback=true the traceback is on the screen too.
    """
    text = traceback.format_exc()
    kept = _kept(config.folder() / "log.txt", text)
    if config.run.traceback:
        return say(text, FAILED)
    advice = "run.traceback=true shows it"
    if kept:
        advice = f"{config.folder() / 'log.txt'} has the traceback; {advice}"
    return say(f"failed: {in_short(error)}\n{advice}", FAILED)


def _kept(log: Path, text: str) -> bool:
    """Appends to a run's log, on rank 0 alone. Returns whether it could."""
    if not log.parent.is_dir() or rank() != 0:
        return False
    try:
        with open(log, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError:
        # A full disk is often what failed; the message on the screen must not be lost with it.
        return False
    return True
