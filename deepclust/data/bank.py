"""The bank pass: features of all samples by a network that stays exactly as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from deepclust.data.datasets import ImageSet
from deepclust.data.loader import view_batches
from deepclust.data.views import ViewTransform
from deepclust.errors import UserError


@contextmanager
def untouched(module: nn.Module, mode: Literal["eval", "train"] = "eval") -> Iterator[None]:
    """Runs a pass in a mode; afterwards mode, buffers (BatchNorm statistics) and the global RNG are as before."""
    training = {name: part.training for name, part in module.named_modules()}
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()} if mode == "train" else {}
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
    poll: Callable[[], None] = lambda: None,
) -> tuple[Tensor, Tensor]:
    """Features (n, D) float32 on the device and indices (n,) int64 of the given samples; `poll` is called per batch.

    Samples that cannot be read are left out. Raises UserError where a feature is not finite.
    """
    features: list[Tensor] = []
    index: list[Tensor] = []
    for part, view in view_batches(images, transform, rows, batch_size, device, seed):
        features.append(forward(view).float())
        index.append(part)
        poll()
    if not features:
        _, view = next(view_batches(images, transform, range(len(images)), 2, device))
        return forward(view).float()[:0], torch.empty(0, dtype=torch.int64)
    return _finite(torch.cat(features), images, torch.cat(index)), torch.cat(index)


def _finite(features: Tensor, images: ImageSet, index: Tensor) -> Tensor:
    """The features themselves; UserError where some are not numbers: they would end up in a cluster unnoticed."""
    if bool(features.sum().isfinite()):
        return features
    bad = (~features.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if bad:
        raise UserError(
            f"the features of {len(bad)} of {len(features)} images are not finite, {images.paths[int(index[bad[0]])]} "
            "the first: the training has diverged. Try a lower optim.lr, trainer.precision=float32 or a clip_norm"
        )
    return features
