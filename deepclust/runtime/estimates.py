"""What a run can do without: an estimate that fails is missing, its reason is said and kept, and
the run goes on.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from deepclust.errors import TRACEBACK, UserError, in_short, show_where

Value = TypeVar("Value")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class Estimates:
    """Makes estimates. missing: by name, why those that failed did. told: is given a line on each
    for people.

    stage: what they are estimates of, in those lines.
    """

    def __init__(self, told: Callable[[str], None] | None = None, stage: str = "") -> None:
        self.told = told
        self.stage = stage
        self.missing: dict[str, str] = {}

    def __call__(self, name: str, make: Callable[[], Value]) -> Value | None:
        """What `make()` gives; None where it raises.

        A UserError and a full disk pass: they are the user's to mend. So does what is no Exception:
        Ctrl-C, a stop.
        """
        try:
            return make()
        except Exception as error:
            if ends_the_run(error):
                raise
            self.miss(name, in_short(error))
            show_where(error)
        return None

    def miss(self, name: str, reason: str) -> None:
        """Keeps why an estimate is missing, and says so."""
        self.missing[name] = reason
        if self.told is not None:
            what = f"{self.stage}: {name}" if self.stage else name
            self.told(
                f"{what} is missing: {reason}. The run goes on without; {TRACEBACK}=1 shows where"
                " it failed"
            )


def ends_the_run(error: Exception) -> bool:
    """Whether an error is none of an estimate: one that the user can mend, or a disk that is
    full."""
    return isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in FULL)
