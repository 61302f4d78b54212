"""`deepclust predict`: clusters of any number of new images, or of rows of features, with the model
of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.data.images import num_decoders
from deepclust.features.decode_ahead import Batch, Job, decode_ahead
from deepclust.loggers.console import ConsoleLogger
from deepclust.loggers.progress_bar import Progress
from deepclust.predict.model import Found, ImageModel, RunModel, open_model
from deepclust.predict.parts import Parts, check_out
from deepclust.predict.source import Source, open_source, states_digest
from deepclust.runtime.devices import choose_device
from deepclust.runtime.signals import StopRequest, StopRequested

PART_IMAGES, PART_ROWS = 256, 65_536
"""What is kept together: images, rows of features. A stop loses at most as much."""
BATCH_ROWS = 1024
FINISHED, NOTHING_CLUSTERED, STOPPED = 0, 2, 143


@dataclass
class Asked:
    """What the command line asks for. None: a default that the docstrings of its parts tell."""

    run: Path
    data: Path
    out: Path = Path("clusters.csv")
    new: bool = False
    backbone: str | None = None
    weights: str | None = None
    device: str = "auto"
    batch_size: int | None = None
    workers: int | None = None
    trust: Sequence[str] = ()


def predict(asked: Asked, console: ConsoleLogger | None = None) -> int:
    """Writes path, cluster, confidence and error of each image to a CSV or Parquet file.

    Runs of `deepclust cluster` add the cluster's name. What cannot be read has no cluster, and the
    reason in `error`. The file does not depend on where an earlier command was stopped. Returns 0,
    2 where nothing could be clustered, 143 where it was stopped.

    Raises UserError: no such model or images, features that do not fit it, or what was done for
    another command.
    """
    console = console or ConsoleLogger()
    check_out(asked.out)
    done = ""
    with StopRequest(quiet=True) as stop:
        parts: Parts | None = None
        try:
            with stop.interruptible():
                model = open_model(asked.run, choose_device(asked.device, "--device "), asked.trust)
                source = open_source(asked.data, model, asked.backbone)
                images = None
                if source.root is not None:
                    images = ImageModel(
                        model, asked.backbone, asked.weights, asked.batch_size, asked.trust
                    )
                parts = Parts(asked.out, len(source), _part_size(images))
                _resume(parts, model, images, source, asked, console)
                _compute(parts, model, images, source, asked, console)
                clustered, failed = parts.finish(source.names, model.names)
        except (StopRequested, KeyboardInterrupt):
            console.finish("stopped")
            if parts is not None:
                done = f" {parts.images_done:,} of {parts.count:,} are done."
            console.message(f"Stopped.{done} The same command goes on from there.", "warning")
            return STOPPED
        finally:
            if parts is not None:
                parts.close()
    what = "images" if images else "rows"
    console.message(
        f"{clustered:,} {what} clustered{f', {failed:,} could not be read' if failed else ''}:"
        f" {asked.out}"
    )
    return FINISHED if clustered else NOTHING_CLUSTERED


def _part_size(images: ImageModel | None) -> int:
    """Images of a part: whole batches."""
    return (
        PART_ROWS
        if images is None
        else max(1, PART_IMAGES // images.batch_size) * images.batch_size
    )


def _resume(
    parts: Parts,
    model: RunModel,
    images: ImageModel | None,
    source: Source,
    asked: Asked,
    console: ConsoleLogger,
) -> None:
    """Says what is to be done, and finds what was done before."""
    what = f"{len(source):,} {'images' if images else 'rows of features'} in {asked.data}"
    ignored = (
        f"; {source.num_ignored:,} files of other kinds left out" if source.num_ignored else ""
    )
    device = model.clusterer.device
    told = images.said if images else "a model of features"
    console.message(f"{what}{ignored}")
    console.message(f"{asked.run}: {told}, {model.num_clusters} clusters, on {device}")
    for note in model.notes:
        console.message(note, "warning")
    if images and model.of_features and model.stored is None:
        console.message(
            f"{model.why}; that --backbone {asked.backbone} made them is taken on trust, only their"
            " number fits",
            "warning",
        )
    facts: dict[str, Any] = images.facts if images else {}
    manifest = {
        "model": model.digest,
        "list of images": source.digest(),
        "device": device.type,
        **facts,
    }
    again = parts.open(manifest, source.states, asked.new)
    if parts.done:
        console.message(f"{parts.images_done:,} of them were done before; going on from there")
    if again:
        console.message(
            f"{again:,} part(s) of {parts.size:,} made again: images changed since", "warning"
        )


def _compute(
    parts: Parts,
    model: RunModel,
    images: ImageModel | None,
    source: Source,
    asked: Asked,
    console: ConsoleLogger,
) -> None:
    """All parts that are not there."""
    waiting = [part for part in range(parts.number) if part not in parts.done]
    progress = Progress(console, parts.count - parts.images_done, stage="predict")
    if images is None:
        for part in waiting:
            parts.write(part, _rows(model, source, part * parts.size, parts.size, progress), "")
    else:
        for part, found, states in _images(
            images, source, waiting, parts.size, asked.workers, progress
        ):
            parts.write(part, found, states)
    progress.finish()


def _rows(model: RunModel, source: Source, first: int, count: int, progress: Progress) -> Found:
    """Clusters of rows of features."""
    assert source.read is not None
    last, found = min(first + count, len(source)), []
    for start in range(first, last, BATCH_ROWS):
        end = min(start + BATCH_ROWS, last)
        found.append(model.of_rows(source.read(start, end)))
        progress.step(end - start)
    whole = _joined(found)
    return whole._replace(
        faults=[source.faults.get(first + row, fault) for row, fault in enumerate(whole.faults)]
    )


def _images(
    images: ImageModel,
    source: Source,
    waiting: Sequence[int],
    size: int,
    workers: int | None,
    progress: Progress,
) -> Iterator[tuple[int, Found, str]]:
    """Clusters of the images of parts, with what tells whether their files change.

    An image has its place in its batch whatever else has to be done, so that its cluster depends on
    nothing else.
    """
    assert source.root is not None
    jobs = (job for part in waiting for job in _jobs(images, len(source), part, size))
    batches = decode_ahead(
        jobs,
        source.root,
        source.paths,
        images.side,
        images.channels,
        False,
        workers or num_decoders(),
    )
    found: list[Found] = []
    states = []
    try:
        for batch in batches:
            found.append(_of_batch(images, batch))
            states += [fact.state for fact in batch.facts]
            progress.step(len(batch.facts))
            if batch.job.last:
                yield batch.job.block, _joined(found), states_digest(states)
                found, states = [], []
    finally:
        batches.close()  # pyright: ignore[reportAttributeAccessIssue]


def _jobs(images: ImageModel, count: int, part: int, size: int) -> list[Job]:
    """The batches of one part."""
    last, jobs = min((part + 1) * size, count), []
    for start in range(part * size, last, images.batch_size):
        end = min(start + images.batch_size, last)
        length = images.batch_size if images.padded else end - start
        jobs.append(Job(part, start, length, np.arange(start, end), end == last))
    return jobs


def _of_batch(images: ImageModel, batch: Batch) -> Found:
    """Clusters of a batch, with the reasons of what could not be read."""
    count = len(batch.facts)
    unread = [fact.reason for fact in batch.facts]
    if all(unread):
        return Found(np.zeros(count, np.int64), np.zeros(count, np.float32), unread)
    cluster, confidence, faults = images(batch.pixels)
    both = [reason or fault for reason, fault in zip(unread, faults[:count])]
    return Found(cluster[:count], confidence[:count], both)


def _joined(found: Sequence[Found]) -> Found:
    clusters, confidences, faults = zip(*found)
    return Found(
        np.concatenate(clusters),
        np.concatenate(confidences),
        [each for part in faults for each in part],
    )
