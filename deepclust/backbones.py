"""Backbones: image (B, C, H, W) to feature vector (B, D). Each has `num_features` (D) and `preprocess` (or None)."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.errors import UserError
from deepclust.schema import Count


@dataclass(frozen=True)
class Preprocess:
    """What a pretrained network wants to be fed: side in pixels, per-channel mean and standard deviation in [0, 1]."""

    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Sobel(nn.Module):
    """Mean over colours, then its two Sobel derivatives: (B, C, H, W) to (B, 2, H, W), for normalised images.

    Fixed, as in DeepCluster (Caron et al. 2018, section 3.3): colour alone cannot make a cluster.
    """

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        across = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("filters", torch.stack([across, across.T])[:, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) to (B, 2, H, W); the border is padded with zeros."""
        return nn.functional.conv2d(images.mean(1, keepdim=True), self.filters.to(images.dtype), padding=1)


class Backbone(nn.Module):
    """A network with `num_features` outputs; `preprocess` overrides the data set's own statistics and size.

    note: what is to be said about where its weights come from. sobel: the body is given the two Sobel derivatives in
    place of the colours.
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


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*layers, nn.ReLU(inplace=True)) if relu else nn.Sequential(*layers)


class PoolTo(nn.Module):
    """Averages 2x2 and gives (B, C, *size) whatever came in, so that crops of any size have as many features."""

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, *size)."""
        pooled = F.avg_pool2d(x, 2, ceil_mode=True) if min(x.shape[2:]) > 1 else x
        return pooled if tuple(pooled.shape[2:]) == self.size else F.adaptive_avg_pool2d(x, self.size)


class Residual(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016, basic block)."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.main = nn.Sequential(_conv(inputs, outputs, 3, stride), _conv(outputs, outputs, relu=False))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, 1, stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, outputs, H / stride, W / stride)."""
        return torch.relu(self.main(x) + self.shortcut(x))


def small_convnet(
    in_channels: Count, image_size: Count, *, width: Count = 32, freeze: list[str] | None = None
) -> Backbone:
    """A net for images of 8 to 64 px on a CPU: strided convolutions and a residual block, pooled to a few positions.

    Images of 16 px and more begin with a 5x5 convolution of stride 2, those over 40 px have one more stride. The last
    map is averaged 2x2, not to one position: where things are matters in small images (k-means on such features was
    8 points better on clothes). Smaller crops are averaged to as many positions as an image of `image_size`.
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
    """The input itself as features: for `data=features`; of images, their pixels. Nothing in it is trained."""
    return Backbone(nn.Identity(), in_channels * image_size**2)


def cifar_resnet(
    in_channels: Count,
    *,
    depth: Literal[18, 34] = 18,
    stem: Literal["cifar", "stl"] = "cifar",
    sobel: bool = False,
    freeze: list[str] | None = None,
) -> Backbone:
    """ResNet-18 or -34 with the stem for small images: 3x3 stride 1, no max-pool (`stl`: 2x2 max-pool, padding 1)."""
    import torchvision

    net = torchvision.models.get_model(f"resnet{depth}", weights=None)
    net.conv1 = nn.Conv2d(2 if sobel else in_channels, 64, 3, 1, 1, bias=False)
    net.maxpool = nn.MaxPool2d(2, 2, 1) if stem == "stl" else nn.Identity()
    net.fc = nn.Identity()
    return _frozen(Backbone(net, 512, sobel=sobel), freeze)


CLASSIC: dict[str, list[tuple[int, int, int, int] | int]] = {
    "alexnet": [(96, 11, 4, 2), 3, (256, 5, 1, 2), 3, (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1), 3],
    "vgg16": [
        size if size == 2 else (size, 3, 1, 1)
        for size in (64, 64, 2, 128, 128, 2, 256, 256, 256, 2, 512, 512, 512, 2, 512, 512, 512, 2)
    ],
}
"""Convolutions (channels, kernel, stride, padding), each with batch norm and ReLU; a number: max-pool of that size."""


def classic_net(
    in_channels: Count,
    *,
    name: Literal["alexnet", "vgg16"] = "vgg16",
    sobel: bool = True,
    width: Count = 4096,
    freeze: list[str] | None = None,
) -> Backbone:
    """AlexNet or VGG-16 with batch norm, as in DeepCluster: features end in the second linear layer, before its ReLU.

    width: outputs of both linear layers, D. Convolutions begin as N(0, 2 / (kernel area * outputs)), linear layers as
    N(0, 0.01^2). Made for 224 pixels; maps of other sizes are pooled to as many positions.
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
    hidden = [nn.Linear(channels * side**2, width), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(width, width)]
    top = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten(), *dropout, *hidden)
    for layer in (*layers, *top):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            area = layer.weight[0, 0].numel() * layer.out_channels if isinstance(layer, nn.Conv2d) else 0
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
    """Any timm model by name, its pooled features; with its own normalisation and input size where it is pretrained.

    weights: a local file (.safetensors, or .pth read with `weights_only=True`). The network may be a part of what the
    file holds, as MoCo's `module.encoder_q.`: then all of it must be there, and nothing else but a projection head.
    Raises UserError for an unknown name, with the nearest ones, and for weights that cannot be had or do not fit.
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
    overlay: dict[str, Any] | None = {"file": weights} if weights else None
    note = ""
    try:
        if weights:
            part, note = _part_of(weights, timm.create_model(name, num_classes=0))
            overlay = overlay if part is None else {"state_dict": part}
        with _hub() if pretrained and not weights else nullcontext():
            net = timm.create_model(
                name,
                pretrained=pretrained or weights is not None,
                in_chans=2 if sobel else in_channels,
                num_classes=0,
                pretrained_cfg_overlay=overlay,
            )
    except UserError:
        raise
    except Exception as error:
        source = f"backbone.weights={weights}" if weights else f"the weights of backbone.name={name}"
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"{source} could not be loaded ({line}); give a local file as backbone.weights=PATH") from error
    config = resolve_model_data_config(net)
    own = pretrained or weights is not None
    mean, std = (tuple(config[key]) for key in ("mean", "std"))
    if in_channels == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    size = image_size or (config["input_size"][-1] if own else None)
    preprocess = Preprocess(size, mean, std) if own or size else None
    num_features: Any = net.num_features
    return _frozen(Backbone(net, num_features, preprocess, note, sobel=sobel), freeze)


@contextmanager
def _hub() -> Iterator[None]:
    """Inside, weights come from the local cache alone where the hub cannot be reached: its client retries for a minute.

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


PROJECTION = (
    "fc",
    "head",
    "classifier",
    "projector",
    "projection",
    "contrastive_head",
    "mlp",
    "predictor",
    "prototypes",
)
"""What the layers on top of a backbone are called in published checkpoints."""


def _part_of(weights: str, net: nn.Module) -> tuple[dict[str, Tensor] | None, str]:
    """The network's tensors where a checkpoint file has them below a prefix, and a line that says so; else None, "".

    Raises UserError unless the network is there as a whole, with nothing beside it but layers that `PROJECTION` names.
    """
    state = _read_state(weights)
    wanted = {key: value for key, value in net.state_dict().items() if not key.endswith("num_batches_tracked")}
    first = next(iter(wanted))
    prefixes = dict.fromkeys(key.removesuffix(first) for key in state if key.endswith(first))
    if not prefixes or "" in prefixes:
        return None, ""
    prefix = max(prefixes, key=lambda prefix: sum(prefix + key in state for key in wanted))
    part = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    missing = [key for key in wanted if key not in part]
    others = [key for key in part if key not in net.state_dict()]
    strange = [key for key in others if key.split(".")[0] not in PROJECTION]
    loaded = f"backbone.weights={weights}: {len(wanted) - len(missing)} of {len(wanted)} tensors found under {prefix}"
    if missing or strange:
        faults = [f"missing: {', '.join(missing[:3])}"] if missing else []
        faults += [f"not of this network: {', '.join(strange[:3])}"] if strange else []
        raise UserError(f"{loaded}; {'; '.join(faults)}. Choose the backbone.name that these weights were trained with")
    note = " ".join([loaded + ("; left out:" if others else ""), *sorted(others)])
    return {key: value for key, value in part.items() if key not in others}, note


def _read_state(weights: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint file by name, taken out of `state_dict` or the like."""
    if weights.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(weights)
    state: Any = torch.load(weights, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model", "model_state_dict"):
        if isinstance(state, dict) and isinstance(state.get(name), dict):
            state = state[name]
    return {str(key): value for key, value in dict(state).items() if isinstance(value, Tensor)}


def _frozen(backbone: Backbone, prefixes: list[str] | None) -> Backbone:
    """Freezes the parameters whose names (inside the body) begin with one of the prefixes; `['']` freezes all."""
    for prefix in prefixes or []:
        chosen = [p for name, p in backbone.body.named_parameters() if name.startswith(prefix)]
        if not chosen:
            parts = sorted({name.split(".")[0] for name, _ in backbone.body.named_parameters()})
            raise UserError(f"backbone.freeze: nothing begins with {prefix!r}; parts are {', '.join(parts)}")
        for parameter in chosen:
            parameter.requires_grad_(False)
    return backbone
