"""The contract between a clustering method and the trainer.

A `Head` is what one method adds on top of a backbone: layers, how it makes its targets, its loss,
its state. It gets tensors and gives tensors; it never sees the trainer, the loader, the optimiser,
the logger or the configuration.

Axes: B batch, N samples, D feature dim, E embedding dim, K clusters, H sub-heads, V views.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class View:
    """One augmented version of an image.

    augment: name of a view of the `augment` group (`clean`, `weak`, `strong`, `simclr`, ...).
    source: the image itself, or one of its partners (`Refresh.partners`; itself while there are
    none).
    used_for: a view used only for targets gets no gradient and is seen by the teacher alone.
    """

    augment: str
    source: Literal["self", "partner"] = "self"
    used_for: Literal["loss", "targets", "both"] = "both"


@dataclass
class Output:
    """What a head gives for one view: features z (B, D), embedding (B, E), logits: a list of H
    tensors (B, K_h).
    """

    z: Tensor
    embedding: Tensor | None = None
    logits: list[Tensor] = field(default_factory=list)

    def detach(self) -> Output:
        """The same values without gradient."""
        embedding = None if self.embedding is None else self.embedding.detach()
        return Output(self.z.detach(), embedding, [logits.detach() for logits in self.logits])

    def __getitem__(self, rows: slice | Tensor) -> Output:
        """Some rows: those of a micro batch, or any by mask or indices."""
        embedding = None if self.embedding is None else self.embedding[rows]
        return Output(self.z[rows], embedding, [logits[rows] for logits in self.logits])


def join_outputs(parts: Sequence[Mapping[int, Output]]) -> dict[int, Output]:
    """Outputs by view of micro batches, put together to those of the macro batch."""
    if len(parts) == 1:
        return dict(parts[0])
    joined = {}
    for number in parts[0] if parts else ():
        outs = [part[number] for part in parts]
        embeddings = [out.embedding for out in outs if out.embedding is not None]
        logits = [torch.cat(each) for each in zip(*(out.logits for out in outs))]
        joined[number] = Output(
            torch.cat([out.z for out in outs]),
            torch.cat(embeddings) if embeddings else None,
            logits,
        )
    return joined


class Targets(dict[str, Tensor]):
    """Named tensors whose first axis is the macro batch's B, so that rows can be taken: by slice,
    mask or indices.
    """

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice | Tensor):
            return Targets({name: value[key] for name, value in self.items()})
        return super().__getitem__(key)


@dataclass(frozen=True)
class Progress:
    """Where a stage stands. Steps count macro batches; `images_seen` counts over all ranks."""

    step: int
    num_steps: int
    epoch: int
    num_epochs: int
    images_seen: int
    num_images: int
    final: bool = False

    @property
    def starts_epoch(self) -> bool:
        """Whether the next macro batch is the first of a pass."""
        return not self.final and self.step % (self.num_steps // self.num_epochs) == 0


@dataclass
class Batch:
    """What a head may know of a batch besides its outputs: index (B,) int64 sample indices of view
    0, and progress.

    `group` may be handed on to `deepclust.ops`, never stored. `targets`: the macro batch's, in
    `after_step` alone.
    """

    index: Tensor
    progress: Progress
    group: Any = None
    targets: Targets = field(default_factory=Targets)

    def __getitem__(self, rows: slice | Tensor) -> Batch:
        return Batch(self.index[rows], self.progress, self.group)


@dataclass(frozen=True)
class BankSpec:
    """Which features a head wants of all samples.

    mode: `eval` = running statistics, clean pass; `train` = batch statistics. view: name of an
    augmentation.
    of: backbone features `z` or the head's `embedding`. num_samples: a random subset, None for all.
    needs_pass: False when the head kept its own rows and only wants to be called with all ranks
    together.
    """

    mode: Literal["eval", "train"] = "eval"
    view: str = "clean"
    of: Literal["z", "embedding"] = "z"
    num_samples: int | None = None
    needs_pass: bool = True


@dataclass
class Bank:
    """Detached features of the samples; each rank holds a contiguous block.

    features: (n, D) float32, this rank's rows. index: (n,) int64, their sample indices.
    num_samples: N over all ranks.
    final: whether the stage's last step is done, so that what only predictions need can be made.
    """

    features: Tensor
    index: Tensor
    num_samples: int
    group: Any = None
    final: bool = False


@dataclass
class Refresh:
    """What a head asks of the trainer after it has seen a bank. Only the trainer applies it.

    partners: (N, k) int64, row i = sample indices that may stand in for sample i.
    order: (M,) int64, the next pass's exact sample order (quotas included).
    reset: names of re-drawn parameters or buffers: optimiser state is dropped, the teacher takes
    the new values.
    """

    partners: Tensor | None = None
    order: Tensor | None = None
    reset: tuple[str, ...] = ()


class Head(nn.Module):
    """Base of every method. Subclasses override what they need; state lives in parameters and
    buffers alone.

    `dim`, `num_clusters` and `num_samples` are injected where a constructor names them.
    """

    views: tuple[View, ...] = (View("clean"),)
    sharded_buffers: tuple[str, ...] = ()
    """Names of buffers that differ by rank; every other buffer is replicated."""
    training_buffers: tuple[str, ...] = ()
    """Names of buffers that only training needs: never copied to the teacher, never exported with
    the model.
    """
    num_heads: int = 1
    """H, the number of sub-heads between which `score` chooses."""
    needs_prototypes: bool = False
    """Whether `init_prototypes` is to be called."""
    teacher_decay: float | None = None
    """Decay of the EMA teacher that this head needs, where the stage sets none (`trainer.ema`)."""

    best: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("best", torch.zeros((), dtype=torch.int64))

    def forward(self, z: Tensor, view: int) -> Output:
        """(B, D) backbone features of view number `view` to this method's outputs."""
        raise NotImplementedError

    def bank_due(self, progress: Progress) -> BankSpec | None:
        """Asked before every macro batch: the bank this head wants now, or None."""
        return None

    def refresh(self, bank: Bank) -> Refresh:
        """Called when a bank is due, on all ranks together."""
        return Refresh()

    def targets(self, outputs: Mapping[int, Output], batch: Batch) -> Targets:
        """Targets of a macro batch, without gradient, from the teacher's outputs by view number."""
        return Targets()

    def loss(
        self, outputs: Mapping[int, Output], targets: Targets, batch: Batch
    ) -> dict[str, Tensor]:
        """A dict with `loss` (scalar, mean over the micro batch) and what is worth logging; called
        in float32.

        `cross_entropy` and `entropy` (of the mean assignment; both in nats) are watched for a
        collapse, among `num_clusters`, or among exp(`ln_k`) where that is logged too.
        """
        raise NotImplementedError

    def after_step(self, outputs: Mapping[int, Output], batch: Batch) -> None:
        """Called once per macro batch after the optimiser's step: queues, memories, running
        statistics.
        """

    def predict(self, z: Tensor) -> Tensor:
        """(B, D) features to (B, K) probabilities of sub-head `best`. A pretext raises
        NotImplementedError.
        """
        raise NotImplementedError(f"{type(self).__name__} learns features, it predicts no clusters")

    def uncalibrated(self, z: Tensor) -> Tensor:
        """(B, D) to (B, K) probabilities before calibration: `predict`, unless a head
        calibrates."""
        return self.predict(z)

    @property
    def tells_noise(self) -> bool:
        """Whether `outlying` may set samples apart."""
        return False

    def outlying(self, z: Tensor) -> Tensor | None:
        """(B, D) to (B,) bool: which features are unlike all that have a cluster; None from a head
        that tells none.
        """
        return None

    @property
    def clusters(self) -> bool:
        """Whether `predict` gives clusters (False for a pretext)."""
        return type(self).predict is not Head.predict

    def score(self, bank: Bank) -> Tensor:
        """(H,) label-free score per sub-head on the clean bank, lower is better; the trainer sets
        `best`.
        """
        return torch.zeros(1)

    def init_prototypes(self, bank: Bank) -> None:
        """Called once at a stage's start with a clean bank of z, if `needs_prototypes`: clusters
        become weights.
        """

    def init_from(self, previous: Head) -> None:
        """Takes over what it can from the previous stage's head (a projector, a kept sub-head)."""

    def param_groups(self) -> Iterator[tuple[list[nn.Parameter], dict[str, float]]]:
        """Parameters with settings of their own: `lr_scale`, `momentum`, `weight_decay`; the rest
        gets the stage's.
        """
        yield list(self.parameters()), {}

    def frozen(self, progress: Progress) -> tuple[str, ...]:
        """Names of own parameters whose gradients the trainer clears after backward."""
        return ()
