"""The bank pass: features of all samples from a network that the pass leaves unchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from deepclust.data.datasets import ImageSet
from deepclust.data.loader import view_batches
from deepclust.data.views.transform import ViewTransform
from deepclust.errors import UserError


@contextmanager
def untouched(module: nn.Module, mode: Literal["eval", "train"] = "eval") -> Iterator[None]:
    """Runs a block without gradients and with the module in `mode`; restores the module afterwards.

    Restored are the training mode of every submodule, the buffers (BatchNorm's running statistics)
    and torch's global random state.
    """
    # modes one by one: a head may keep frozen parts in eval while the rest trains
    training = {name: part.training for name, part in module.named_modules()}
    buffers: dict[str, Tensor] = {}
    # in eval mode a forward pass changes no buffer, so there is nothing to copy
    if mode == "train":
        buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.train(mode == "train")
    try:
        with torch.random.fork_rng(devices=_cuda_devices(module)), torch.no_grad():
            yield
    finally:
        for name, part in module.named_modules():
            part.training = training[name]
        for name, buffer in module.named_buffers():
            if name in buffers:
                buffer.copy_(buffers[name])


def _cuda_devices(module: nn.Module) -> list[int]:
    """Numbers of the CUDA devices that hold parameters: their random states alone are saved."""
    return sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})


def collect(
    forward: Callable[[Tensor], Tensor],
    images: ImageSet,
    transform: ViewTransform,
    rows: Sequence[int],
    *,
    batch_size: int = 512,
    device: torch.device | str,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Features (n, D) float32 on the device and sample indices (n,) int64 on the CPU, in order.

    Samples that cannot be read are left out, so n may be less than the number of `rows`.

    forward: (b, C, h, w) float32 views to (b, D) features.
    images: the set that has the samples.
    transform: the view that features are taken of.
    rows: sample indices.
    batch_size: without gradients a batch takes far less memory than one of training.
    device: where views and features are computed.
    seed: of the view's random parameters, if it has any.

    Raises:
        UserError: a feature is not finite.
    """
    features: list[Tensor] = []
    indices: list[Tensor] = []
    for index, view in view_batches(images, transform, rows, batch_size, device, seed):
        features.append(forward(view).float())
        indices.append(index)
    if not features:
        # a rank without samples: the width D is learned from any two images, of which none is kept
        _, view = next(view_batches(images, transform, range(len(images)), 2, device))
        return forward(view).float()[:0], torch.empty(0, dtype=torch.int64)
    joined = torch.cat(indices)
    return _finite(torch.cat(features), images, joined), joined


def _finite(features: Tensor, images: ImageSet, index: Tensor) -> Tensor:
    """The features themselves. Raises UserError if any is NaN or infinite.

    Without this check such samples would be given a cluster like all others.
    """
    # one sum shows whether to look at all: it is finite only if every feature is
    if bool(features.sum().isfinite()):
        return features
    bad = (~features.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    # none is bad where only the sum of large finite features overflowed
    if bad:
        first = images.paths[int(index[bad[0]])]
        raise UserError(
            f"the features of {len(bad)} of {len(features)} images are not finite, {first} "
            "the first: the training has diverged. Try a lower optim.lr, "
            "trainer.precision=float32 or a clip_norm"
        )
    return features
