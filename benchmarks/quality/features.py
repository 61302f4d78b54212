"""Features of a data set by a backbone, as an .npz file that `data=features data.file=OUT` reads.

    python -m benchmarks.quality.features OUT data=image_folder data.root=PHOTOS backbone=timm backbone.name=NAME \\
        backbone.pretrained=true augment.size=224

    python -m benchmarks.quality.features OUT data=image_folder data.root=PHOTOS --module my_nets:encoder --size 160

Words are those of train.py: any data set, any backbone, the clean view of any augment. --module takes a torch module of
your own instead: `FILE_OR_MODULE:FUNCTION`, a function without arguments that gives it, weights and all (see
scripts/efficientnet_lite.py); it is fed --size pixels, with --mean and --std in [0, 1].
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepclust.config import build, load
from deepclust.data.bank import collect
from deepclust.data.image_set import ImageData, ImageSet
from deepclust.data.views import ViewTransform
from deepclust.encoders import load_function

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def main() -> int:
    """Extracts, writes and says where."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--module", help="FILE.py:FUNCTION or MODULE:FUNCTION")
    parser.add_argument("--size", type=int, default=224, help="side in pixels that --module is fed")
    parser.add_argument("--mean", type=float, nargs="+", default=IMAGENET[0])
    parser.add_argument("--std", type=float, nargs="+", default=IMAGENET[1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="run the network under autocast")
    parser.add_argument("overrides", nargs="*")
    asked = parser.parse_args()
    config = load([*asked.overrides, "recipe=single", "head=scan"])
    data = build(config.data, trust=config.trust)
    augment = config.stages["main"].augment
    if asked.module:
        net, size, mean, std = load_function(asked.module, "--module")(), asked.size, asked.mean, asked.std
    else:
        shape = {"in_channels": data.train.channels, "image_size": augment["size"] or data.train.size[0]}
        net = build(config.backbone, trust=config.trust, **shape)
        own = net.preprocess
        size = augment["size"] or (own.size if own else None) or data.train.size
        mean, std = (own.mean, own.std) if own else (data.train.mean, data.train.std)
    view = ViewTransform(augment["views"]["clean"], size, mean, std)
    np.savez(asked.out, **columns(net, data, view, asked.device, asked.bfloat16))
    print(f"{asked.out}: data=features data.file={asked.out}")
    return 0


def columns(net: nn.Module, data: ImageData, view: ViewTransform, device: str, bfloat16: bool) -> dict[str, Any]:
    """features (N, D) float32 of all readable images, held-out ones last, with splits, paths and, if known, labels."""
    net = net.to(device).eval()
    sets = [data.train] if data.test is None else [data.train, data.test]
    found = [features(net, images, view, device, bfloat16) for images in sets]
    rows = [index.numpy() for _, index in found]
    named = ["train"] * len(rows[0]) + ["test"] * sum(map(len, rows[1:]))
    paths = [images.paths[row] for images, index in zip(sets, rows) for row in index]
    made = {"features": torch.cat([part for part, _ in found]).numpy(), "splits": named, "paths": paths}
    if all(images.classes is not None for images in sets):
        made["labels"] = np.concatenate(
            [np.asarray(images.class_names)[images.classes[index]] for images, index in zip(sets, rows)]
        )
    return {name: np.asarray(column) for name, column in made.items()}


@torch.no_grad()
def features(
    net: nn.Module, images: ImageSet, view: ViewTransform, device: str, bfloat16: bool
) -> tuple[Tensor, Tensor]:
    """(n, D) on the CPU and the rows (n,) that they belong to."""

    def forward(batch: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bfloat16):
            return net(batch.contiguous(memory_format=torch.channels_last)).flatten(1)

    found, index = collect(forward, images, view, range(len(images)), batch_size=128, device=device)
    return found.cpu(), index


if __name__ == "__main__":
    sys.exit(main())
