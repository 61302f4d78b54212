"""Stopping on request: SIGTERM, SIGINT and SIGUSR1 set a flag that the trainer polls, and the run
is saved first.

A signal is only noted; the loop asks `requested` after every step and ends cleanly. Inside
`interruptible()` (one process in a long k-means or evaluation: the state before it is what gets
saved) it raises `StopRequested` at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name)
)


class StopRequested(BaseException):
    """Raised inside `interruptible()`. Not an `Exception`: a broad `except Exception` on the way
    must let it pass.
    """


class StopRequest:
    """Context manager that installs the handlers (in the main thread only) and puts the old ones
    back.

    requested: True once a signal came. reason: its name, for `status.json`. quiet: do not answer
    Ctrl-C on stderr. A second Ctrl-C is an immediate KeyboardInterrupt, but not under torchrun,
    which repeats the first one itself.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.requested = False
        self.reason: str | None = None
        self._quiet = quiet
        self._raises = False
        self._interrupts = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old = {}

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """While open, a stop raises `StopRequested`, at once if it was asked for before. Sections
        may nest.
        """
        outer = self._raises
        self._raises = True
        try:
            if self.requested:
                raise StopRequested(self.reason)
            yield
        finally:
            self._raises = outer

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if (
            self._interrupts > 1
            and number == signal.SIGINT
            and "TORCHELASTIC_RUN_ID" not in os.environ
        ):
            raise KeyboardInterrupt
        if not self.requested:
            self.requested = True
            self.reason = signal.Signals(number).name
            if number == signal.SIGINT and not self._quiet:
                # print() may be in the middle of a line when the signal comes, and is not
                # re-entrant.
                os.write(
                    2,
                    b"\nStopping: the run is being saved. Press Ctrl-C again to leave without"
                    b" saving.\n",
                )
        if self._raises:
            raise StopRequested(self.reason)


def ignore_in_worker(worker_id: int = 0) -> None:
    """For a loader's `worker_init_fn`: a data worker ignores the stop signals and dies with the
    process it serves.

    SIGTERM is obeyed if that process sends it: `multiprocessing` ends its workers so when it exits,
    and waits for them. Where the system does not tell the sender (macOS) SIGTERM is left as it is.
    """
    for number in SIGNALS:
        if number != signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey_parent, daemon=True).start()
    die_with_parent()


def _obey_parent() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def die_with_parent() -> None:
    """Asks Linux to kill this process when its parent ends (prctl PR_SET_PDEATHSIG); does nothing
    elsewhere.

    For data workers and ranks started by a launcher. A process started from a shell must not call
    it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)
