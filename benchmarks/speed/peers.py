"""lightly's training loop, for `benchmarks.speed.train`: its own loss, transforms and loader.

It shares with ours the network, its first weights, the parameters of the views, the batch and the
optimiser. It needs lightly (extra `bench`) and has no command of its own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightly import loss as losses  # pyright: ignore[reportMissingImports]
from lightly import transforms  # pyright: ignore[reportMissingImports]
from lightly.models.modules.heads import SwaVPrototypes  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from deepclust.data.image_set import ImageSet
from deepclust.ops.precision import autocast


class Pictures(Dataset):
    """PIL images through a transform, as lightly's data sets give them: a list of views each."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], list[Tensor]]) -> None:
        assert images.images is not None
        # Converted once, before any step is timed.
        self.pictures = [v2.functional.to_pil_image(image) for image in images.images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> list[Tensor]:
        return self.transform(self.pictures[row])


class Lightly:
    """lightly's loop for SimCLR or SwAV as its documentation writes it, one step per `step()`.

    method: `simclr` or `swav`.
    backbone, projector: copied, so that both contestants begin with the same weights.
    images: of one size, in memory.
    batch_size: images of a step.
    num_prototypes: of SwAV.
    dtype: of autocast, with our trainer's memory layout; None for float32 and torch's usual layout,
        as in its documentation.
    """

    def __init__(
        self,
        method: str,
        backbone: nn.Module,
        projector: nn.Module,
        images: ImageSet,
        batch_size: int,
        num_prototypes: int,
        dtype: torch.dtype | None,
    ) -> None:
        self.method = method
        self.dtype = dtype
        self.backbone = copy.deepcopy(backbone)
        self.projector = copy.deepcopy(projector)
        if dtype is not None:
            self.backbone.to(memory_format=torch.channels_last)
        modules: list[nn.Module] = [self.backbone, self.projector]
        self.loss: Any
        if method == "swav":
            # 64: the dimension of our projector's embeddings.
            self.prototypes = SwaVPrototypes(64, num_prototypes)
            modules.append(self.prototypes)
            self.loss = losses.SwaVLoss()
        else:
            self.loss = losses.NTXentLoss(temperature=0.3)
        parameters = itertools.chain(*(module.parameters() for module in modules))
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        data = Pictures(images, views_like_ours(method, images))
        # No workers: their CPU time would not count as this process's.
        self.loader = DataLoader(
            data, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=0
        )
        self.batches = self._forever()

    def _forever(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def step(self) -> None:
        """Trains on one batch: load, augment, forward, loss, backward, update."""
        views = next(self.batches)
        if self.method == "swav":
            self.prototypes.normalize()
        embeddings = [self.projector(self.features(view)) for view in views]
        if self.method == "swav":
            high = [self.prototypes(nn.functional.normalize(each, dim=1)) for each in embeddings]
            # No small crops: ours has two views of the whole size as well.
            value = self.loss(high, [])
        else:
            value = self.loss(*embeddings)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def features(self, view: Tensor) -> Tensor:
        """(B, D) float32 features of a view (B, C, H, W)."""
        if self.dtype is not None:
            view = view.contiguous(memory_format=torch.channels_last)
        with autocast(view.device, self.dtype):
            return self.backbone(view).float()


def views_like_ours(method: str, images: ImageSet) -> Callable[[Any], list[Tensor]]:
    """lightly's transform for a method, with the parameters of `contestants.VIEW`."""
    color = images.channels == 3
    options: dict[str, Any] = {
        "cj_bright": 0.4,
        "cj_contrast": 0.4,
        # Grey images have neither saturation nor hue to change.
        "cj_sat": 0.4 if color else 0.0,
        "cj_hue": 0.1 if color else 0.0,
        "random_gray_scale": 0.2 if color else 0.0,
        "gaussian_blur": 0.0,
        "normalize": {"mean": list(images.mean), "std": list(images.std)},
    }
    side = images.size[0]
    if method == "swav":
        return transforms.SwaVTransform(
            crop_sizes=(side,),
            crop_counts=(2,),
            crop_min_scales=(0.2,),
            crop_max_scales=(1.0,),
            **options,
        )
    return transforms.SimCLRTransform(input_size=side, min_scale=0.2, **options)
