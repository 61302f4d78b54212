"""Images decoded ahead of the network: threads fill the next batches while it works on this one."""

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
"""Batches held besides the one in use. More would hide longer waits and take more memory."""


class Job(NamedTuple):
    """A batch to decode: rows `start` to `start + size` of a store."""

    block: int
    """Number of the store's block that the batch is part of."""
    start: int
    size: int
    rows: np.ndarray
    """(n,) int64: those of the rows that are to be decoded."""
    last: bool
    """Whether it is the last batch of its block."""


class Batch(NamedTuple):
    """A decoded batch."""

    job: Job
    pixels: np.ndarray
    """(size, C, side, side) uint8; zeros where nothing was to be decoded or could be."""
    facts: list[Fact]
    """What is known of the file of each row in `job.rows`."""


def decode_ahead(
    jobs: Iterable[Job],
    root: Path,
    paths: Sequence[str],
    side: int,
    channels: int,
    hashing: bool,
    workers: int,
) -> Iterator[Batch]:
    """The batches of the jobs in order, decoded by threads ahead of their use.

    At most `BATCHES_AHEAD` batches are held besides the one that was handed out.

    jobs: batches to decode; the next job is taken when there is room for its batch.
    root: folder that the paths are relative to.
    paths: of all rows of the store.
    side: height and width in pixels of the decoded images.
    channels: 1 or 3.
    hashing: whether facts hold the SHA-256 of the file.
    workers: threads; Pillow and the perceptual hash release the interpreter lock.
    """

    def read(row: int, out: np.ndarray) -> Fact:
        path = root / paths[row]
        # before the decoding: a file that changes meanwhile is then seen as changed next time
        state = file_state(path)
        try:
            if fault := name_fault(paths[row]):
                raise UnreadableImage(paths[row], fault)
            image = decode_file(path, side, channels, hashing)
        except UnreadableImage as error:
            return Fact(row, state, (0, 0), None, "unreadable", error.reason)
        out[:] = image.pixels
        return Fact(
            row, state, image.size, image.sha256 or None, "ok", None, perceptual_hash(image.pixels)
        )

    def begin(job: Job) -> tuple[Job, np.ndarray, list[Future[Fact]]]:
        # each thread writes into its own row of the batch, so no copy is made afterwards
        pixels = np.zeros((job.size, channels, side, side), dtype=np.uint8)
        futures = [pool.submit(read, row, pixels[row - job.start]) for row in job.rows.tolist()]
        return job, pixels, futures

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
        # a consumer that stops early does not wait for files that were only queued
        pool.shutdown(cancel_futures=True)
