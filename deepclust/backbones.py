"""Backbones: image (B, C, H, W) to feature vector (B, D). Each has `num_features` (D) and
`preprocess` (or None).
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.errors import UserError
from deepclust.types import Count
from deepclust.weights import load_from_file, missing_in, watched_loading


@dataclass(frozen=True)
class Preprocess:
    """What a pretrained network wants to be fed: side in pixels, per-channel mean and standard
    deviation in [0, 1].
    """

    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Sobel(nn.Module):
    """Mean over colours, then its two Sobel derivatives: (B, C, H, W) to (B, 2, H, W), for
    normalised images.

    Fixed, as in DeepCluster (Caron et al. 2018, section 3.3): colour alone cannot make a cluster.
    """

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("filters", torch.stack([across, across.T])[:, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 2, H, W); the border is padded with zeros."""
        return nn.functional.conv2d(
            images.mean(1, keepdim=True), self.filters.to(images.dtype), padding=1
        )


class Backbone(nn.Module):
    """A network with `num_features` outputs; `preprocess` overrides the data set's own statistics
    and size.

    note: what is to be said about where its weights come from. sobel: the body is given the two
    Sobel derivatives in place of the colours.
    """

    def __init__(
        self,
        body: nn.Module,
        num_features: int,
        preprocess: Preprocess | None = None,
        note: str = "",
        *,
        sobel: bool = False,
    ) -> None:
        super().__init__()
        self.note = note
        self.body = body
        self.num_features = num_features
        self.preprocess = preprocess
        self.edges = Sobel() if sobel else None

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) float images to (B, D) features."""
        return self.body(images if self.edges is None else self.edges(images)).flatten(1)


def _conv(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True
) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class PoolTo(nn.Module):
    """Averages 2x2 and gives (B, C, *size) whatever came in, so that crops of any size have as many
    features.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size)."""
        pooled = F.avg_pool2d(x, 2, ceil_mode=True) if min(x.shape[2:]) > 1 else x
        return (
            pooled if tuple(pooled.shape[2:]) == self.size else F.adaptive_avg_pool2d(x, self.size)
        )


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016, basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(
            _conv(inputs, outputs, 3, stride), _conv(outputs, outputs, relu=False)
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        return torch.relu(self.main(x) + self.shortcut(x))


def small_convnet(
    in_channels: Count, image_size: Count, *, width: Count = 32, freeze: list[str] | None = None
) -> Backbone:
    """A net for images of 8 to 64 px on a CPU: strided convolutions and a residual block, pooled to
    a few positions.

    Images of 16 px and more begin with a 5x5 convolution of stride 2, those over 40 px have one
    more stride. The last
    map is averaged 2x2, not to one position: where things are matters in small images (k-means on
    such features was 8 points better on clothes). Smaller crops are averaged to as many positions
    as an image of `image_size`.
    """
    steps = 3 if image_size <= 40 else 4
    stem = _conv(in_channels, width, 5, 2) if image_size >= 16 else _conv(in_channels, width)
    middle = [_conv(width * 2**i, width * 2 ** (i + 1), 3, 2) for i in range(steps - 2)]
    last = width * 2 ** (steps - 1)
    body = nn.Sequential(stem, *middle, Residual(last // 2, last, 2)).eval()
    with torch.no_grad():
        positions = (body(torch.zeros(1, in_channels, image_size, image_size)).shape[2] + 1) // 2
    body.append(PoolTo((positions, positions)))
    return _frozen(Backbone(body.train(), last * positions**2), freeze)


def identity(in_channels: Count, image_size: Count) -> Backbone:
    """The input itself as features: for `data=features`; of images, their pixels. Nothing in it is
    trained.
    """
    return Backbone(nn.Identity(), in_channels * image_size**2)


def cifar_resnet(
    in_channels: Count,
    *,
    depth: Literal[18, 34] = 18,
    stem: Literal["cifar", "stl"] = "cifar",
    sobel: bool = False,
    freeze: list[str] | None = None,
) -> Backbone:
    """ResNet-18 or -34 with the stem for small images: 3x3 stride 1, no max-pool (`stl`: 2x2
    max-pool, padding 1).
    """
    import torchvision

    net = torchvision.models.get_model(f"resnet{depth}", weights=None)
    net.conv1 = nn.Conv2d(2 if sobel else in_channels, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.MaxPool2d(2, 2, 1) if stem == "stl" else nn.Identity()
    net.fc = nn.Identity()
    return _frozen(Backbone(net, 512, sobel=sobel), freeze)


CLASSIC: dict[str, list[tuple[int, int, int, int] | int]] = {
    "alexnet": [
        (96, 11, 4, 2),
        3,
        (256, 5, 1, 2),
        3,
        (384, 3, 1, 1),
        (384, 3, 1, 1),
        (256, 3, 1, 1),
        3,
    ],
    "vgg16": [
        size if size == 2 else (size, 3, 1, 1)
        for size in (64, 64, 2, 128, 128, 2, 256, 256, 256, 2, 512, 512, 512, 2, 512, 512, 512, 2)
    ],
}
"""Convolutions (channels, kernel, stride, padding), each with batch norm and ReLU; a number:
max-pool of that size.
"""


def classic_net(
    in_channels: Count,
    *,
    name: Literal["alexnet", "vgg16"] = "vgg16",
    sobel: bool = True,
    width: Count = 4096,
    relu: bool = False,
    freeze: list[str] | None = None,
) -> Backbone:
    """AlexNet or VGG-16 with batch norm, as in DeepCluster: features end in the second linear
    layer, before its ReLU.

    width: outputs of both linear layers, D. relu: whether features end after that ReLU, as in SeLa.
    Convolutions begin as N(0, 2 / (kernel area * outputs)), linear layers as N(0, 0.01^2). Made for
    224 pixels; maps of other sizes are pooled to as many positions.
    """
    layers: list[nn.Module] = []
    channels = 2 if sobel else in_channels
    for part in CLASSIC[name]:
        if isinstance(part, int):
            layers.append(nn.MaxPool2d(part, 2))
            continue
        layers += [nn.Conv2d(channels, *part), nn.BatchNorm2d(part[0]), nn.ReLU(inplace=True)]
        channels = part[0]
    side = 6 if name == "alexnet" else 7
    dropout = [nn.Dropout(0.5)] if name == "alexnet" else []
    hidden = [
        nn.Linear(channels * side**2, width),
        nn.ReLU(inplace=True),
        nn.Dropout(0.5),
        nn.Linear(width, width),
    ]
    last = [nn.ReLU(inplace=True)] if relu else []
    top = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(), *dropout, *hidden, *last)
    for layer in (*layers, *top):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            area = (
                layer.weight[0, 0].numel() * layer.out_channels
                if isinstance(layer, nn.Conv2d)
                else 0
            )
            nn.init.normal_(layer.weight, 0, (2 / area) ** 0.5 if area else 0.01)
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
    return _frozen(Backbone(nn.Sequential(*layers, top), width, sobel=sobel), freeze)


def timm_backbone(
    in_channels: Count,
    *,
    name: str,
    pretrained: bool = False,
    weights: str | None = None,
    image_size: Count | None = None,
    sobel: bool = False,
    freeze: list[str] | None = None,
) -> Backbone:
    """Any timm model by name, its pooled features; with its own normalisation and input size where
    it is pretrained.

    weights: a local file, see `deepclust.weights.load_from_file`: all of the network comes from it,
    or it is refused. Raises UserError for an unknown name, with the nearest ones, and for weights
    that cannot be had or do not fit.
    """
    import difflib

    import timm
    from timm.data.config import resolve_model_data_config

    if name not in timm.list_models() and name.split(".")[0] not in timm.list_models():
        near = difflib.get_close_matches(name, timm.list_models(), 3)
        raise UserError(
            f"backbone.name={name}: timm has no such model; nearest: {', '.join(near) or 'none'}; "
            "timm.list_models() names them all"
        )
    create = partial(timm.create_model, name, in_chans=2 if sobel else in_channels, num_classes=0)
    if weights:
        net, note = load_from_file(weights, name, create)
    else:
        net, note = _from_hub(name, create) if pretrained else (create(), "")
    config = resolve_model_data_config(net)
    own = pretrained or weights is not None
    mean, std = (tuple(config[key]) for key in ("mean", "std"))
    if in_channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    size = image_size or (config["input_size"][-1] if own else None)
    preprocess = Preprocess(size, mean, std) if own or size else None
    num_features: Any = net.num_features
    return _frozen(Backbone(net, num_features, preprocess, note, sobel=sobel), freeze)


def _from_hub(name: str, create: Callable[..., nn.Module]) -> tuple[nn.Module, str]:
    """The network with timm's own weights, and what they lack, if anything. UserError where they
    cannot be had.
    """
    lacking: list[str] = []

    def look(net: nn.Module, state: Mapping[str, Any]) -> None:
        lacking[:] = missing_in(net, state)

    try:
        with _hub(), watched_loading(look):
            net = create(pretrained=True)
    except Exception as error:
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"the weights of backbone.name={name} could not be loaded ({line}); give a local file"
            " as backbone.weights=PATH"
        ) from error
    note = (
        f"timm's weights of {name} lack {', '.join(lacking)}, which stay as they were drawn"
        if lacking
        else ""
    )
    return net, note


@contextmanager
def _hub() -> Iterator[None]:
    """Inside, weights come from the local cache alone where the hub cannot be reached: its client
    retries for a minute.

    A proxy may reach what we cannot; where one is set nothing is tried.
    """
    from huggingface_hub import constants

    place, before = urlsplit(constants.ENDPOINT), constants.HF_HUB_OFFLINE
    if not before and not getproxies():
        try:
            socket.create_connection((place.hostname, place.port or 443), timeout=5).close()
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _frozen(backbone: Backbone, prefixes: list[str] | None) -> Backbone:
    """Freezes the parameters whose names (inside the body) begin with one of the prefixes; `['']`
    freezes all.
    """
    for prefix in prefixes or []:
        chosen = [p for name, p in backbone.body.named_parameters() if name.startswith(prefix)]
        if not chosen:
            parts = sorted({name.split(".")[0] for name, _ in backbone.body.named_parameters()})
            raise UserError(
                f"backbone.freeze: nothing begins with {prefix!r}; parts are {', '.join(parts)}"
            )
        for parameter in chosen:
            parameter.requires_grad_(False)
    return backbone
