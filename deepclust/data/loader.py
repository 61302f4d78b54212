"""Batches of augmented views, by one of two engines. Nothing here is random: samples bring their
keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepclust.data.datasets import ImageSet
from deepclust.data.images import UnreadableImage
from deepclust.data.random import sample_keys
from deepclust.data.sampler import Samples
from deepclust.data.views.transform import ViewTransform

if TYPE_CHECKING:
    from deepclust.heads.base import View

# Decoding releases the interpreter lock, so threads suffice; few, as every rank has a pool of them.
_READING_THREADS = 4

Failure = tuple[int, str]
"""Index of a sample that could not be read, and the reason."""


@dataclass
class ViewBatch:
    """Views of one rank's part of a macro batch."""

    index: Tensor
    """(B,) int64 sample indices, on the CPU."""
    views: dict[int, Tensor]
    """View number to (B, C, h, w) float32 on the loader's device."""


class Loader:
    """Makes the batches of a stage on one rank.

    images: the samples.
    views: the head's views; their positions in this sequence are the view numbers (slots).
    transforms: the views' transforms by the name of their augmentation.
    device: where batches end up.
    num_workers: processes of the engine `workers`; 0 makes views in this process.
    engine: `device` augments whole batches on the device from uint8 images in memory, `workers`
        sample by sample with torchvision, for images that are read from files.
    on_failure: called with the sample index and the reason for each image that cannot be read; its
        batch is one row smaller.
    """

    def __init__(
        self,
        images: ImageSet,
        views: Sequence[View],
        transforms: Mapping[str, ViewTransform],
        *,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        engine: str = "device",
        on_failure: Callable[[int, str], None] | None = None,
    ) -> None:
        self.images = images
        self.views = tuple(views)
        self.transforms = transforms
        self.device = torch.device(device)
        self.num_workers = num_workers
        self.engine = engine
        self.on_failure = on_failure
        self.pixels: Tensor | None = None
        if engine == "device" and images.images is not None:
            self.pixels = images.images.to(self.device)

    def batches(self, samples: Iterable[Samples]) -> Iterator[ViewBatch]:
        """Views of the samples of macro batch after macro batch."""
        if self.pixels is not None:
            for item in samples:
                yield self._on_device(item)
            return
        for index, views, failures in self._worker_batches(list(samples)):
            if self.on_failure:
                for sample, reason in failures:
                    self.on_failure(sample, reason)
            # non_blocking: the copy from pinned memory overlaps with what the device still computes
            moved = {slot: view.to(self.device, non_blocking=True) for slot, view in views.items()}
            yield ViewBatch(index, moved)

    def _on_device(self, samples: Samples) -> ViewBatch:
        """The views of all slots that share an augmentation are made in one call."""
        assert self.pixels is not None
        views: dict[int, Tensor] = {}
        for name in dict.fromkeys(view.augment for view in self.views):
            slots = [slot for slot, view in enumerate(self.views) if view.augment == name]
            sources = samples.sources[slots].reshape(-1)
            pixels = self.pixels[sources.to(self.device)]
            stacked = self.transforms[name].batch(pixels, samples.keys[slots].reshape(-1))
            views.update(zip(slots, stacked.split(len(samples.index))))
        return ViewBatch(samples.index, {slot: views[slot] for slot in sorted(views)})

    def _worker_batches(
        self, items: list[Samples]
    ) -> Iterator[tuple[Tensor, dict[int, Tensor], list[Failure]]]:
        """Sample indices, views by slot and failures of each batch, made by worker processes."""
        from deepclust.runtime.signals import ignore_in_worker

        names = [view.augment for view in self.views]
        dataset = _WorkerViews(self.images, names, dict(self.transforms), items)
        batch_rows = [
            [(batch, row) for row in range(len(item.index))] for batch, item in enumerate(items)
        ]
        return iter(
            DataLoader(
                dataset,
                batch_sampler=batch_rows,
                num_workers=self.num_workers,
                collate_fn=_stack,
                worker_init_fn=ignore_in_worker,
                # without one the workers' seed comes from the global generator, which would change
                # every later draw of the training
                generator=torch.Generator(),
                pin_memory=self.device.type == "cuda",
            )
        )


class _WorkerViews(Dataset):
    """The views of one sample, indexed by (number of the batch, row in it)."""

    def __init__(
        self,
        images: ImageSet,
        names: Sequence[str],
        transforms: dict[str, ViewTransform],
        items: list[Samples],
    ) -> None:
        self.images = images
        self.names = names
        self.transforms = transforms
        self.items = items

    def __getitem__(self, batch_row: tuple[int, int]) -> tuple[int, list[Tensor] | str]:
        """Sample index and its views, or the reason why they cannot be made."""
        batch, row = batch_row
        item = self.items[batch]
        index = int(item.index[row])
        sources = item.sources[:, row].tolist()
        # A failure travels back as text: an exception in a worker would end the whole pass.
        try:
            # views of the same image decode its file once
            images = {source: self.images.read(source) for source in dict.fromkeys(sources)}
            views = [
                self.transforms[name].sample(images[source], int(item.keys[slot, row]))
                for slot, (name, source) in enumerate(zip(self.names, sources))
            ]
        except (OSError, UnreadableImage) as error:
            return index, str(error) or type(error).__name__
        return index, views


def _stack(
    rows: list[tuple[int, list[Tensor] | str]],
) -> tuple[Tensor, dict[int, Tensor], list[Failure]]:
    """Sample indices (B,) and views by slot of the samples that could be read, and the failures."""
    readable = [(index, views) for index, views in rows if not isinstance(views, str)]
    failures = [(index, reason) for index, reason in rows if isinstance(reason, str)]
    if not readable:
        return torch.empty(0, dtype=torch.int64), {}, failures
    num_views = len(readable[0][1])
    stacked = {
        slot: torch.stack([views[slot] for _, views in readable]) for slot in range(num_views)
    }
    index = torch.tensor([index for index, _ in readable])
    return index, stacked, failures


def view_batches(
    images: ImageSet,
    transform: ViewTransform,
    rows: Sequence[int],
    batch_size: int,
    device: torch.device | str,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of (index (b,) int64, view (b, C, h, w) float32) of the given samples in order.

    Samples that cannot be read are left out.

    images: the set that has the samples.
    transform: the view. If it is random it draws from (seed, sample index), whatever the batches.
    rows: sample indices.
    batch_size: most samples of a batch.
    device: where the view is made.
    seed: of the view's random parameters.
    """
    from concurrent.futures import ThreadPoolExecutor

    def read(row: int) -> Tensor | None:
        try:
            return images.read(row)
        except (OSError, UnreadableImage):
            return None

    with ThreadPoolExecutor(_READING_THREADS) as pool:
        for start in range(0, len(rows), batch_size):
            batch_rows = rows[start : start + batch_size]
            index = torch.as_tensor(list(batch_rows))
            if images.images is not None:
                pixels = _pixels_in_memory(images.images, batch_rows, index).to(device)
            else:
                decoded = list(pool.map(read, index.tolist()))
                index = index[torch.tensor([image is not None for image in decoded])]
                if not len(index):
                    continue
                pixels = torch.stack([image for image in decoded if image is not None]).to(device)
            yield index, transform.batch(pixels, sample_keys(seed, 0, 0, index, 0))


def _pixels_in_memory(images: Tensor, rows: Sequence[int], index: Tensor) -> Tensor:
    """(b, C, H, W) images of the rows, which `index` holds as a tensor; a view where possible."""
    if isinstance(rows, range) and rows.step == 1:
        # Rows side by side need no copy; transforms never overwrite their input.
        return images[rows.start : rows.stop]
    return images[index]
