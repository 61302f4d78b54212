"""Training steps of lightly beside ours: the same network, views, batch and optimiser, its own loss and loader."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lightly import loss as losses
from lightly import transforms
from lightly.models.modules.heads import SwaVPrototypes
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from deepclust.data.image_set import ImageSet
from deepclust.precision import autocast


class Pictures(Dataset):
    """PIL images through a transform, as lightly's data sets give them: (views, label)."""

    def __init__(self, images: ImageSet, transform: Callable[[Any], list[Tensor]]) -> None:
        assert images.images is not None
        self.pictures = [v2.functional.to_pil_image(image) for image in images.images]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, row: int) -> list[Tensor]:
        return self.transform(self.pictures[row])


class Lightly:
    """lightly's loop for SimCLR or SwAV as its documentation writes it, in this process, one step per call of `step`.

    `dtype`: autocast, None for float32 and the usual memory layout, as in its documentation; with a dtype the layout is
    that of our trainer, too.
    """

    def __init__(
        self,
        method: str,
        backbone: nn.Module,
        projector: nn.Module,
        images: ImageSet,
        batch_size: int,
        num_prototypes: int,
        dtype: Any,
    ) -> None:
        self.method, self.dtype = method, dtype
        self.backbone, self.projector = copy.deepcopy(backbone), copy.deepcopy(projector)
        if dtype is not None:
            self.backbone.to(memory_format=torch.channels_last)
        modules: list[nn.Module] = [self.backbone, self.projector]
        if method == "swav":
            self.prototypes = SwaVPrototypes(64, num_prototypes)
            modules.append(self.prototypes)
        self.loss: Any = losses.SwaVLoss() if method == "swav" else losses.NTXentLoss(temperature=0.3)
        self.optimizer = torch.optim.AdamW(itertools.chain(*(module.parameters() for module in modules)), lr=1e-3)
        data = Pictures(images, views_like_ours(method, images))
        self.loader = DataLoader(data, batch_size=batch_size, shuffle=True, drop_last=True, num_workers=0)
        self.batches = self._forever()

    def _forever(self) -> Iterator[list[Tensor]]:
        while True:
            yield from self.loader

    def step(self) -> None:
        """One batch: load, augment, forward, loss, backward, update."""
        views = next(self.batches)
        if self.method == "swav":
            self.prototypes.normalize()
        embeddings = [self.projector(self.features(view)) for view in views]
        if self.method == "swav":
            high = [self.prototypes(nn.functional.normalize(embedding, dim=1)) for embedding in embeddings]
            value = self.loss(high, [])
        else:
            value = self.loss(*embeddings)
        value.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def features(self, view: Tensor) -> Tensor:
        """(B, C, H, W) to (B, D) float32."""
        if self.dtype is not None:
            view = view.contiguous(memory_format=torch.channels_last)
        with autocast(view.device, self.dtype):
            return self.backbone(view).float()


def views_like_ours(method: str, images: ImageSet) -> Callable[[Any], list[Tensor]]:
    """lightly's transform with the parameters of `benchmarks.speed.train.VIEW`."""
    color = images.channels == 3
    options: dict[str, Any] = {
        "cj_bright": 0.4,
        "cj_contrast": 0.4,
        "cj_sat": 0.4 if color else 0.0,
        "cj_hue": 0.1 if color else 0.0,
        "random_gray_scale": 0.2 if color else 0.0,
        "gaussian_blur": 0.0,
        "normalize": {"mean": list(images.mean), "std": list(images.std)},
    }
    side = images.size[0]
    if method == "swav":
        crops: dict[str, Any] = {"crop_sizes": (side,), "crop_counts": (2,)}
        scales: dict[str, Any] = {"crop_min_scales": (0.2,), "crop_max_scales": (1.0,)}
        return transforms.SwaVTransform(**crops, **scales, **options)
    return transforms.SimCLRTransform(input_size=side, min_scale=0.2, **options)
