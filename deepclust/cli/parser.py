"""Options read by their whole names, exit codes, and what is said of faults. Imports no torch."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from deepclust.errors import UserError, near
from deepclust.runtime.launched import rank

OK = 0
FAILED = 1
BAD_INPUT = 2
# 128 + the number of SIGINT, as shells report a process that Ctrl-C ended.
INTERRUPTED = 130

INVALID_CHOICE = re.compile(r"invalid choice: '(.*)' \(choose from (.*)\)")


class Parser(argparse.ArgumentParser):
    """An argument parser whose faults are UserErrors that name the nearest option or choice."""

    def __init__(self, prog: str, **options: Any) -> None:
        # With abbreviations, a command that works today would be ambiguous once an option is added.
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self._advice(message)}")

    def _advice(self, message: str) -> str:
        """The nearest valid word to the one that `message` complains about, or where to read on."""
        meant = _nearest_choice(message) or self._nearest_option(message)
        if meant is None:
            return f"see {self.prog} --help"
        return f"did you mean {meant}?"

    def _nearest_option(self, message: str) -> str | None:
        words = [word for word in message.split() if word.startswith("-")]
        if not words:
            return None
        option = words[0].partition("=")[0].rstrip(":")
        known = [name for action in self._actions for name in action.option_strings]
        # argparse also names options that are right, where their value is not.
        if option in known:
            return None
        return near(option, known)


def _nearest_choice(message: str) -> str | None:
    """The choice that was meant, where argparse complains about a choice."""
    match = INVALID_CHOICE.search(message)
    if match is None:
        return None
    # Python 3.12 stopped quoting the choices, so quotes, commas and spaces all divide them.
    return near(match[1], re.split(r"[', ]+", match[2]))


def did_you_mean(word: str, known: Iterable[str], otherwise: str) -> str:
    """`did you mean X?` with the known word nearest to `word`; `otherwise` where none is near."""
    meant = near(word, known)
    if meant is None:
        return otherwise
    return f"did you mean {meant}?"


def say(text: str, code: int) -> int:
    """Prints to stderr and returns `code`."""
    # torchrun starts every rank with the same words, so all would say the same.
    if rank() == 0:
        print(text, file=sys.stderr)
    return code
