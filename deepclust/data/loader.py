"""Batches of augmented views: which sample stands where in a pass, and two engines that make its views.

Nothing here holds random state. The order of a pass is a function of (seed, stage, pass), the views of a sample one of
(seed, stage, pass, position in the pass, view slot), so any rank, worker or resumed run draws the same.
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
from deepclust.data.random import sample_keys, uniforms
from deepclust.data.views import ViewTransform

if TYPE_CHECKING:
    from deepclust.heads.base import View

PARTNER_STREAM = 7


@dataclass(frozen=True)
class Plan:
    """The order in which one pass visits the samples, cut into macro batches of nearly equal size.

    Every sample comes exactly once and no batch is larger than asked: there is no ragged tail to drop or to pad.
    """

    order: Tensor
    num_batches: int

    @classmethod
    def draw(
        cls, num_samples: int, batch_size: int, seed: int, stage: int, pass_index: int, order: Tensor | None
    ) -> Plan:
        """A random permutation, or the order that a head asked for."""
        if order is None:
            generator = torch.Generator().manual_seed(
                int(sample_keys(seed, stage, pass_index, torch.zeros(1).long(), -1))
            )
            order = torch.randperm(num_samples, generator=generator)
        return cls(order, -(-len(order) // batch_size))

    def positions(self, batch: int, rank: int = 0, size: int = 1) -> Tensor:
        """Positions in the pass of one rank's part of a macro batch."""
        total, count = len(self.order), self.num_batches
        start, stop = batch * total // count, (batch + 1) * total // count
        rows = stop - start
        return torch.arange(start + rank * rows // size, start + (rank + 1) * rows // size)


@dataclass
class Samples:
    """Rows of a macro batch before their views are made: sources and keys (V, B), index (B,)."""

    index: Tensor
    sources: Tensor
    keys: Tensor


@dataclass
class ViewBatch:
    """index (B,) int64 on the CPU; views: one (B, C, h, w) float32 tensor per view number."""

    index: Tensor
    views: dict[int, Tensor]


class Loader:
    """Makes the batches of a stage on one rank.

    `engine`: `device` augments whole batches on the device from uint8 images in memory, `workers` augments sample by
    sample in loader processes. An image that cannot be read leaves its batch one row smaller, and `on_failure` is told.
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
        self.images, self.views, self.transforms = images, tuple(views), transforms
        self.seed, self.stage, self.rank, self.size = seed, stage, rank, size
        self.device, self.num_workers, self.engine = torch.device(device), num_workers, engine
        self.on_failure = on_failure
        self.partners: Tensor | None = None
        self.pixels = images.images.to(self.device) if engine == "device" and images.images is not None else None

    def samples(self, plan: Plan, pass_index: int, batch: int) -> Samples:
        """Who stands in this rank's part of a macro batch, with whom as partner, under which keys."""
        positions = plan.positions(batch, self.rank, self.size)
        index = plan.order[positions]
        keys = torch.stack(
            [sample_keys(self.seed, self.stage, pass_index, positions, slot) for slot in range(len(self.views))]
        )
        sources = index.repeat(len(self.views), 1)
        for slot, view in enumerate(self.views):
            if view.source == "partner" and self.partners is not None:
                options = self.partners[index]
                chosen = (uniforms(keys[slot], 1, PARTNER_STREAM) * options.shape[1]).long()
                sources[slot] = options.gather(1, chosen.clamp_max(options.shape[1] - 1))[:, 0]
        return Samples(index, sources, keys)

    def batches(self, plan: Plan, pass_index: int, start: int = 0) -> Iterator[ViewBatch]:
        """The macro batches of a pass from number `start` on."""
        if self.pixels is not None:
            for batch in range(start, plan.num_batches):
                yield self._on_device(self.samples(plan, pass_index, batch))
            return
        items = [self.samples(plan, pass_index, batch) for batch in range(start, plan.num_batches)]
        for index, views, failed in self._worker_batches(items):
            for sample, reason in failed:
                if self.on_failure:
                    self.on_failure(sample, reason)
            yield ViewBatch(index, {slot: view.to(self.device, non_blocking=True) for slot, view in views.items()})

    def _on_device(self, samples: Samples) -> ViewBatch:
        """Views of one augmentation are made in one call, whatever their slot."""
        assert self.pixels is not None
        views: dict[int, Tensor] = {}
        for name in dict.fromkeys(view.augment for view in self.views):
            slots = [slot for slot, view in enumerate(self.views) if view.augment == name]
            pixels = self.pixels[samples.sources[slots].reshape(-1).to(self.device)]
            made = self.transforms[name].batch(pixels, samples.keys[slots].reshape(-1))
            views.update(zip(slots, made.split(len(samples.index))))
        return ViewBatch(samples.index, {slot: views[slot] for slot in sorted(views)})

    def _worker_batches(
        self, items: list[Samples]
    ) -> Iterator[tuple[Tensor, dict[int, Tensor], list[tuple[int, str]]]]:
        from deepclust.signals import ignore_in_worker

        dataset = _WorkerViews(self.images, [view.augment for view in self.views], dict(self.transforms), items)
        where = [[(batch, row) for row in range(len(item.index))] for batch, item in enumerate(items)]
        return iter(
            DataLoader(
                dataset,
                batch_sampler=where,
                num_workers=self.num_workers,
                collate_fn=_stack,
                worker_init_fn=ignore_in_worker,
                generator=torch.Generator(),
                pin_memory=self.device.type == "cuda",
            )
        )


class _WorkerViews(Dataset):
    """One sample's views, by (batch, row)."""

    def __init__(
        self, images: ImageSet, names: Sequence[str], transforms: dict[str, ViewTransform], items: list[Samples]
    ) -> None:
        self.images, self.names, self.transforms, self.items = images, names, transforms, items

    def __getitem__(self, where: tuple[int, int]) -> tuple[int, list[Tensor] | str]:
        batch, row = where
        item = self.items[batch]
        index = int(item.index[row])
        sources = item.sources[:, row].tolist()
        try:
            images = {source: self.images.read(source) for source in dict.fromkeys(sources)}
            views = [
                self.transforms[name].sample(images[source], int(item.keys[slot, row]))
                for slot, (name, source) in enumerate(zip(self.names, sources))
            ]
        except (OSError, UnreadableImage) as error:
            return index, str(error) or type(error).__name__
        return index, views


def _stack(rows: list[tuple[int, list[Tensor] | str]]) -> tuple[Tensor, dict[int, Tensor], list[tuple[int, str]]]:
    """Stacks what could be read: index, views by slot, and (sample, reason) of what could not."""
    good = [(index, views) for index, views in rows if not isinstance(views, str)]
    failed = [(index, reason) for index, reason in rows if isinstance(reason, str)]
    if not good:
        return torch.empty(0, dtype=torch.int64), {}, failed
    views = {slot: torch.stack([views[slot] for _, views in good]) for slot in range(len(good[0][1]))}
    return torch.tensor([index for index, _ in good]), views, failed


def view_batches(
    images: ImageSet,
    transform: ViewTransform,
    rows: Sequence[int],
    batch_size: int,
    device: torch.device | str,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(index (b,), view (b, C, h, w)) over the given samples in order. What cannot be read is left out.

    A view with randomness draws from (seed, sample index): it does not depend on the batches.
    """
    from concurrent.futures import ThreadPoolExecutor

    def read(row: int) -> Tensor | None:
        try:
            return images.read(row)
        except (OSError, UnreadableImage):
            return None

    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(rows), batch_size):
            some = rows[start : start + batch_size]
            index = torch.as_tensor(list(some))
            if images.images is not None:
                # Rows side by side need no copy; views never overwrite pixels.
                chosen = slice(some.start, some.stop) if isinstance(some, range) and some.step == 1 else index
                pixels = images.images[chosen].to(device)
            else:
                read_images = list(pool.map(read, index.tolist()))
                index = index[torch.tensor([image is not None for image in read_images])]
                if not len(index):
                    continue
                pixels = torch.stack([image for image in read_images if image is not None]).to(device)
            yield index, transform.batch(pixels, sample_keys(seed, 0, 0, index, 0))
