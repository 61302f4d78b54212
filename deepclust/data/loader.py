"""Batches of augmented views: the order of the samples in a pass, and two engines that make views.

Nothing here holds random state. The order of a pass is a function of (seed, stage, pass), the views
of a sample one of (seed, stage, pass, position in the pass, view slot). So every rank, every worker
and a resumed run draw the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from deepclust.data.datasets import ImageSet
from deepclust.data.images import UnreadableImage
from deepclust.data.random import Stream, sample_keys, seed_for, uniforms
from deepclust.data.views import ViewTransform

if TYPE_CHECKING:
    from deepclust.heads.base import View

# Decoding releases the interpreter lock, so threads suffice; few, as every rank has a pool of them.
_READING_THREADS = 4

Failure = tuple[int, str]
"""Index of a sample that could not be read, and the reason."""


@dataclass(frozen=True)
class Plan:
    """The order in which one pass visits the samples, cut into macro batches of nearly equal size.

    Every sample comes exactly once and no batch is larger than `batch_size`: there is no small last
    batch to drop or to pad.
    """

    order: Tensor
    """(N,) int64: the sample index at each position."""
    num_batches: int

    @classmethod
    def draw(
        cls,
        num_samples: int,
        batch_size: int,
        seed: int,
        stage: int,
        pass_index: int,
        order: Tensor | None,
    ) -> Plan:
        """The plan of a pass: a random permutation of the samples, or the given `order`.

        num_samples: N, not used with an `order`.
        batch_size: most samples of a macro batch over all ranks.
        seed, stage, pass_index: what the permutation depends on.
        order: (M,) int64 sample indices from a head that draws its own order, or None.
        """
        if order is None:
            generator = torch.Generator()
            generator.manual_seed(seed_for(seed, stage, pass_index, Stream.ORDER))
            order = torch.randperm(num_samples, generator=generator)
        num_batches = -(-len(order) // batch_size)
        return cls(order, num_batches)

    def positions(self, batch: int, rank: int = 0, size: int = 1) -> Tensor:
        """(B,) int64 positions in the pass of one rank's part of a macro batch.

        batch: number of the macro batch.
        rank, size: the rank and the number of ranks.
        """
        # Cuts at i * total // count leave parts that differ by at most one, between batches and
        # between ranks, and the parts of all ranks together are the batch in order.
        total = len(self.order)
        start = batch * total // self.num_batches
        stop = (batch + 1) * total // self.num_batches
        rows = stop - start
        first = start + rank * rows // size
        last = start + (rank + 1) * rows // size
        return torch.arange(first, last)


@dataclass
class Samples:
    """What the views of one rank's part of a macro batch are made from; V views of B samples."""

    index: Tensor
    """(B,) int64 sample indices."""
    sources: Tensor
    """(V, B) int64: the image that each view shows, the sample's own or a partner's."""
    keys: Tensor
    """(V, B) int64 random key of each view."""


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
    seed, stage: what keys and orders depend on.
    rank, size: the rank and the number of ranks.
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
        seed: int,
        stage: int,
        rank: int = 0,
        size: int = 1,
        device: torch.device | str = "cpu",
        num_workers: int = 0,
        engine: str = "device",
        on_failure: Callable[[int, str], None] | None = None,
    ) -> None:
        self.images = images
        self.views = tuple(views)
        self.transforms = transforms
        self.seed = seed
        self.stage = stage
        self.rank = rank
        self.size = size
        self.device = torch.device(device)
        self.num_workers = num_workers
        self.engine = engine
        self.on_failure = on_failure
        # (N, P) int64, set by the trainer: candidates for views of a partner, e.g. mined neighbours
        self.partners: Tensor | None = None
        self.pixels: Tensor | None = None
        if engine == "device" and images.images is not None:
            self.pixels = images.images.to(self.device)

    def samples(self, plan: Plan, pass_index: int, batch: int) -> Samples:
        """Sample indices of this rank's part of a macro batch, their partners and random keys.

        One key per sample and view. Without `partners` a view of a partner shows the sample itself.

        plan: of the pass.
        pass_index: number of the pass over the samples.
        batch: number of the macro batch within the pass.
        """
        # keys belong to positions, not to ranks: any number of ranks draws the same views
        positions = plan.positions(batch, self.rank, self.size)
        index = plan.order[positions]
        slots = range(len(self.views))
        keys = torch.stack(
            [sample_keys(self.seed, self.stage, pass_index, positions, slot) for slot in slots]
        )
        sources = index.repeat(len(self.views), 1)
        for slot, view in enumerate(self.views):
            if view.source == "partner" and self.partners is not None:
                sources[slot] = _draw_partners(keys[slot], self.partners[index])
        return Samples(index, sources, keys)

    def batches(self, plan: Plan, pass_index: int, start: int = 0) -> Iterator[ViewBatch]:
        """This rank's parts of the macro batches of a pass.

        plan: of the pass.
        pass_index: number of the pass over the samples.
        start: number of the first batch, where a resumed run is in the middle of a pass.
        """
        numbers = range(start, plan.num_batches)
        if self.pixels is not None:
            for batch in numbers:
                yield self._on_device(self.samples(plan, pass_index, batch))
            return
        items = [self.samples(plan, pass_index, batch) for batch in numbers]
        for index, views, failures in self._worker_batches(items):
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
        from deepclust.signals import ignore_in_worker

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


def _draw_partners(keys: Tensor, candidates: Tensor) -> Tensor:
    """(B,) int64: one of the (B, P) candidates in each row, uniformly drawn by its key."""
    count = candidates.shape[1]
    # a stream of its own, so that the choice is independent of the view's parameters (stream 0)
    column = (uniforms(keys, 1, Stream.PARTNER) * count).long()
    # the product of a float32 just under 1 may round up to `count`
    return candidates.gather(1, column.clamp_max(count - 1))[:, 0]


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
