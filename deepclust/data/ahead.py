"""Images decoded ahead of the network that they are for: threads fill the next batches while it works on this one."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deepclust.data.folders import name_fault
from deepclust.data.images import UnreadableImage, decode_file
from deepclust.data.perceptual import perceptual_hash
from deepclust.data.store_writer import Fact, file_state

BATCHES_AHEAD = 3


class Job(NamedTuple):
    """A batch to be: rows start..start+size of a store, of which `rows` are to be decoded. last: of its block."""

    block: int
    start: int
    size: int
    rows: np.ndarray
    last: bool


class Batch(NamedTuple):
    """pixels: (size, C, side, side) uint8, zeros where nothing was to be decoded or could be. facts: of each row."""

    job: Job
    pixels: np.ndarray
    facts: list[Fact]


def decode_ahead(
    jobs: Iterable[Job], root: Path, paths: Sequence[str], side: int, channels: int, hashing: bool, workers: int
) -> Iterator[Batch]:
    """The jobs in order, decoded by `workers` threads (Pillow and the hash release the interpreter lock).

    At most `BATCHES_AHEAD` batches are held besides the one that was handed out.
    """

    def read(row: int, out: np.ndarray) -> Fact:
        path = root / paths[row]
        state = file_state(path)
        try:
            if fault := name_fault(paths[row]):
                raise UnreadableImage(paths[row], fault)
            found = decode_file(path, side, channels, hashing)
        except UnreadableImage as error:
            return Fact(row, state, (0, 0), None, "unreadable", error.reason)
        out[:] = found.pixels
        return Fact(row, state, found.size, found.sha256 or None, "ok", None, perceptual_hash(found.pixels))

    def begin(job: Job) -> tuple[Job, np.ndarray, list[Future[Fact]]]:
        pixels = np.zeros((job.size, channels, side, side), dtype=np.uint8)
        return job, pixels, [pool.submit(read, row, pixels[row - job.start]) for row in job.rows.tolist()]

    pool = ThreadPoolExecutor(workers)
    waiting: deque[tuple[Job, np.ndarray, list[Future[Fact]]]] = deque()
    remaining = iter(jobs)
    try:
        while True:
            while len(waiting) < BATCHES_AHEAD and (job := next(remaining, None)) is not None:
                waiting.append(begin(job))
            if not waiting:
                return
            job, pixels, futures = waiting.popleft()
            yield Batch(job, pixels, [future.result() for future in futures])
    finally:
        pool.shutdown(cancel_futures=True)
