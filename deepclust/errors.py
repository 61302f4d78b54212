"""Errors that a user can mend, and all others in a few words. Nothing here imports torch."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

TRACEBACK = "DEEPCLUST_TRACEBACK"
"""The environment variable that, where it is set, shows where an error came from."""


class UserError(Exception):
    """Bad configuration, data or surroundings: says which key or file, its value, what would be valid, and the fix.

    Its text is the whole message; the command line prints it without a traceback.
    """


class Advice(UserWarning):
    """A warning that says what to do; a run shows it on the console and in log.txt, once."""


def in_short(error: BaseException) -> str:
    """What happened and where, on one line: the kind of the error, its message, file and line."""
    frames = traceback.extract_tb(error.__traceback__)
    message = " ".join(str(error).split()) or "no message"
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {message}{where}"


def show_where(error: BaseException) -> None:
    """Prints the traceback of an error that is dealt with, where the user asked for such."""
    if os.environ.get(TRACEBACK):
        traceback.print_exception(error, file=sys.stderr)
