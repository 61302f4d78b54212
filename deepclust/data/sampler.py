"""Which sample stands where in a pass over the data, with which partner, under which random keys.

The order of a pass is a function of (seed, stage, pass), the keys of a sample one of (seed, stage,
pass, position in the pass, view slot). So every rank, every worker and a resumed run draw the same,
and all the state there is is what a head asked for: the order of a pass, and the samples' partners.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from deepclust.data.random import Stream, sample_keys, seed_for, uniforms

if TYPE_CHECKING:
    from deepclust.heads.base import Refresh, View


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
        stage_index: int,
        pass_index: int,
        order: Tensor | None,
    ) -> Plan:
        """The plan of a pass: a random permutation of the samples, or the given `order`.

        num_samples: N, not used with an `order`.
        batch_size: most samples of a macro batch over all ranks.
        seed, stage_index, pass_index: what the permutation depends on.
        order: (M,) int64 sample indices from a head that draws its own order, or None.
        """
        if order is None:
            generator = torch.Generator()
            generator.manual_seed(seed_for(seed, stage_index, pass_index, Stream.ORDER))
            order = torch.randperm(num_samples, generator=generator)
        num_batches = -(-len(order) // batch_size)
        return cls(order, num_batches)

    def positions(self, batch: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """(B,) int64 positions in the pass of one rank's part of a macro batch.

        batch: number of the macro batch.
        rank, world_size: the rank and the number of ranks.
        """
        # Cuts at i * total // count leave parts that differ by at most one, between batches and
        # between ranks, and the parts of all ranks together are the batch in order.
        total = len(self.order)
        start = batch * total // self.num_batches
        stop = (batch + 1) * total // self.num_batches
        rows = stop - start
        first = start + rank * rows // world_size
        last = start + (rank + 1) * rows // world_size
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


class Sampler:
    """Sample indices of this rank's part of each macro batch, their partners and random keys.

    num_samples: N.
    batch_size: most samples of a macro batch over all ranks.
    views: the head's views; their positions in this sequence are the view numbers (slots).
    seed, stage_index: what keys and orders depend on.
    rank, world_size: the rank and the number of ranks.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        views: Sequence[View],
        *,
        seed: int,
        stage_index: int,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.views = tuple(views)
        self.seed = seed
        self.stage_index = stage_index
        self.rank = rank
        self.world_size = world_size
        self.order: Tensor | None = None
        """(M,) int64: the order a head asked for the pass in progress; None: a permutation."""
        self.next_order: Tensor | None = None
        """The same for the next pass: what is under way is not reordered."""
        self.partners: Tensor | None = None
        """(N, P) int64: candidates for views of a partner, e.g. mined neighbours."""

    @property
    def steps_per_pass(self) -> int:
        """Macro batches in a pass, the same for all passes, so that schedules know the end."""
        return -(-self.num_samples // self.batch_size)

    def accept(self, refresh: Refresh) -> None:
        """Takes over the partners and the order of the next pass that a head's refresh asks for."""
        if refresh.partners is not None:
            self.partners = refresh.partners.cpu()
        if refresh.order is not None:
            self.next_order = refresh.order.cpu()

    def rest_of_pass(self, step: int) -> Iterator[Samples]:
        """This rank's parts of the macro batches of the pass in which `step` lies, from it on."""
        pass_index, start = divmod(step, self.steps_per_pass)
        if start == 0:
            self.order = self.next_order
            self.next_order = None
        batch_size = self.batch_size
        if self.order is not None:
            # An order may leave samples out or repeat them (quotas), but the number of steps stays.
            batch_size = -(-len(self.order) // self.steps_per_pass)
        plan = Plan.draw(
            self.num_samples, batch_size, self.seed, self.stage_index, pass_index, self.order
        )
        return (self.samples(plan, pass_index, batch) for batch in range(start, plan.num_batches))

    def samples(self, plan: Plan, pass_index: int, batch: int) -> Samples:
        """This rank's part of one macro batch.

        One key per sample and view. Without `partners` a view of a partner shows the sample itself.

        plan: of the pass.
        pass_index: number of the pass over the samples.
        batch: number of the macro batch within the pass.
        """
        # keys belong to positions, not to ranks: any number of ranks draws the same views
        positions = plan.positions(batch, self.rank, self.world_size)
        index = plan.order[positions]
        slots = range(len(self.views))
        keys = torch.stack(
            [
                sample_keys(self.seed, self.stage_index, pass_index, positions, slot)
                for slot in slots
            ]
        )
        sources = index.repeat(len(self.views), 1)
        for slot, view in enumerate(self.views):
            if view.source == "partner" and self.partners is not None:
                sources[slot] = _draw_partners(keys[slot], self.partners[index])
        return Samples(index, sources, keys)

    def state_dict(self) -> dict[str, Any]:
        """What a head asked for; all else follows from the settings and the step."""
        return {"order": self.order, "next_order": self.next_order, "partners": self.partners}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where `state_dict` was taken."""
        self.order = state["order"]
        self.next_order = state["next_order"]
        self.partners = state["partners"]


def _draw_partners(keys: Tensor, candidates: Tensor) -> Tensor:
    """(B,) int64: one of the (B, P) candidates in each row, uniformly drawn by its key."""
    count = candidates.shape[1]
    # a stream of its own, so that the choice is independent of the view's parameters (stream 0)
    column = (uniforms(keys, 1, Stream.PARTNER) * count).long()
    # the product of a float32 just under 1 may round up to `count`
    return candidates.gather(1, column.clamp_max(count - 1))[:, 0]
