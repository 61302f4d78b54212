"""Errors that a user can mend, and all others in a few words. Nothing here imports torch."""

from __future__ import annotations

import difflib
import os
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

TRACEBACK = "DEEPCLUST_TRACEBACK"
"""The environment variable that, where it is set, shows where an error came from."""


class UserError(Exception):
    """Bad configuration, data or surroundings: says which key or file, its value, what would be
    valid, and the fix.

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


def unknown_key(path: str, key: str, value: Any, valid: Iterable[str]) -> str:
    """The line for a key that does not exist, with the nearest one, else with all that do."""
    names = list(valid)
    prefix = f"{path}." if path else ""
    found = near(key, names)
    advice = f"did you mean {found}?" if found else f"valid here: {', '.join(names) or 'nothing'}"
    below = ""
    while isinstance(value, Mapping) and value:
        name, value = next(iter(value.items()))
        below += f".{name}"
    return (
        f"{prefix}{key}{below}={show(value)}: there is no key {key}{f' in {path}' if path else ''};"
        f" {advice}"
    )


def show(value: Any) -> str:
    """A value as it would be typed, cut to one short line."""
    text = (
        "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    )
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def near(word: str, words: Iterable[str]) -> str | None:
    """The names that are one typing slip away (joined by "or"), else the most similar name, else
    None.
    """
    names = list(words)
    slips = [name for name in names if _one_slip(word, name)]
    return " or ".join(slips[:3] or difflib.get_close_matches(word, names, 1, 0.6)) or None


def _one_slip(a: str, b: str) -> bool:
    """Whether one letter was left out, added, changed, or swapped with its neighbour."""
    if abs(len(a) - len(b)) > 1 or a == b:
        return False
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))
    a, b = a[same:], b[same:]
    return a[1:] == b[1:] or a[1:] == b or a == b[1:] or (a[:2] == b[1::-1] and a[2:] == b[2:])


class ConfigError(UserError):
    """Everything that is wrong with a configuration, one line each."""

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))
