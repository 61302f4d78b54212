"""Stop requests: noted, polled, raised where a section allows it, and ignored by data workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deepclust.runtime.signals import SIGNALS, StopRequest, StopRequested


@pytest.fixture(autouse=True)
def same_handlers() -> Iterator[None]:
    before = [signal.getsignal(number) for number in SIGNALS]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_noted_and_nothing_else_happens(number: signal.Signals) -> None:
    with StopRequest(quiet=True) as stop:
        assert not stop.requested and stop.reason is None
        os.kill(os.getpid(), number)
        assert stop.requested and stop.reason == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.reason == number.name, "the first one is the reason"


def test_inside_a_section_it_raises_at_once_and_no_except_exception_swallows_it() -> None:
    with StopRequest() as stop:
        reached = False
        with pytest.raises(StopRequested), stop.interruptible():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(30)
                reached = True
            except Exception:
                reached = True
        assert not reached and stop.requested
        with pytest.raises(StopRequested), stop.interruptible():
            reached = True
        assert not reached, "a section does not begin once a stop was asked for"
        os.kill(os.getpid(), signal.SIGTERM)  # outside again: no exception


def test_sections_nest() -> None:
    with StopRequest() as stop, stop.interruptible():
        with stop.interruptible():
            pass
        with pytest.raises(StopRequested):
            os.kill(os.getpid(), signal.SIGUSR1)


def test_the_second_ctrl_c_is_immediate(capfd: Any) -> None:
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested and "Ctrl-C again" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_ctrl_c_after_a_scheduler_s_signal_counts_as_the_first() -> None:
    with StopRequest(quiet=True):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)


def test_torchrun_repeats_the_interrupt_and_that_is_no_second_one(monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    with StopRequest(quiet=True) as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.requested


def test_outside_the_main_thread_it_installs_nothing_and_works() -> None:
    seen = []

    def body() -> None:
        with StopRequest() as stop:
            seen.append((stop.requested, [signal.getsignal(number) for number in SIGNALS]))

    before = [signal.getsignal(number) for number in SIGNALS]
    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [(False, before)]


PARENT = """
import os, signal, sys, time
from deepclust.runtime.signals import ignore_in_worker
worker = os.fork()
if worker == 0:
    ignore_in_worker()
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(1)
sys.stdin.readline()
os.kill(worker, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]), flush=True)
"""


@pytest.fixture
def parent() -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    yield process
    process.kill()
    process.communicate()


@pytest.mark.skipif(
    sys.platform != "linux", reason="the sender of a signal and PDEATHSIG are Linux"
)
def test_a_worker_ignores_strangers_and_dies_with_its_parent(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    for number in SIGNALS * 2:
        os.kill(worker, number)
        time.sleep(0.02)
    assert _running(worker)
    parent.kill()
    end = time.monotonic() + 10
    while _running(worker) and time.monotonic() < end:
        time.sleep(0.02)
    assert not _running(worker)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere SIGTERM is left as it is")
def test_a_worker_obeys_its_parent(parent: subprocess.Popen[str]) -> None:
    assert parent.stdout is not None
    parent.stdout.readline()
    assert parent.communicate("now\n", timeout=30)[0] == "0\n"


LEFT_OPEN = """
from torch.utils.data import DataLoader
from deepclust.runtime.signals import ignore_in_worker
loader = DataLoader(range(100), num_workers=1, worker_init_fn=ignore_in_worker, persistent_workers=True)
batches = iter(loader)
next(batches)
"""


@pytest.mark.slow  # PyTorch itself waits five seconds here
@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_process_that_leaves_its_loader_open_can_end() -> None:
    subprocess.run([sys.executable, "-c", LEFT_OPEN], check=True, timeout=120)


def _running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_importing_leaves_torch_alone() -> None:
    subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, deepclust.runtime.signals; sys.exit('torch' in sys.modules)",
        ],
        check=True,
    )
