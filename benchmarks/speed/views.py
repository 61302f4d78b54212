"""Views per second on one core: the batch engine, the sample engine, torchvision on PIL images and on tensors.

    python -m benchmarks.speed.views [--images 512] [--rounds 5]

Each round runs every engine once, one after the other, on the same images; the figure is images over the median of the
process's CPU seconds, so other programs on the machine disturb it little. Ratios are to torchvision on PIL.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
import yaml
from torchvision.transforms import v2

from deepclust.data.random import sample_keys
from deepclust.data.views import ViewTransform, build_views

CONFIG = Path(__file__).resolve().parents[2] / "conf" / "augment"


class Facts(NamedTuple):
    """What views ask of an image set."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def simclr(size: int, from_pil: bool) -> v2.Compose:
    """SimCLR's set as SCAN uses it."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            *finish(3, from_pil),
        ]
    )


def small_gray(size: int, from_pil: bool) -> v2.Compose:
    """The nearest torchvision has to the set for small grey images; a fixed gamma stands in for a random one."""
    return v2.Compose(
        [
            v2.RandomAffine(
                (-15, 15), (0.12, 0.12), (0.8, 1.2), (-14, 14), interpolation=v2.InterpolationMode.BILINEAR
            ),
            v2.Lambda(lambda image: v2.functional.adjust_gamma(image, 1.3)),
            v2.ColorJitter(brightness=(0.6, 1.1)),
            *finish(1, from_pil),
            v2.GaussianNoise(sigma=0.03, clip=False),
        ]
    )


def scan_strong(size: int, from_pil: bool) -> v2.Compose:
    """The nearest torchvision has to SCAN's strong set: RandAugment with four operations."""
    return v2.Compose([v2.RandomHorizontalFlip(), v2.RandAugment(4), *finish(3, from_pil), v2.RandomErasing(1.0)])


def finish(channels: int, from_pil: bool) -> list[v2.Transform]:
    """To a normalised float32 tensor."""
    mean, std = [0.5] * channels, [0.25] * channels
    return [*([v2.PILToTensor()] if from_pil else []), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]


CASES: list[tuple[str, str, str, int, int, Callable[[int, bool], v2.Compose]]] = [
    ("SimCLR, 32 px colour", "cifar", "simclr", 3, 32, simclr),
    ("SCAN strong, 32 px colour", "cifar", "strong", 3, 32, scan_strong),
    ("small grey, 28 px", "small_gray", "simclr", 1, 28, small_gray),
    ("small grey, 8 px", "small_gray", "simclr", 1, 8, small_gray),
    ("SimCLR, 96 px colour", "cifar", "simclr", 3, 96, simclr),
]


def photo_like(count: int, channels: int, size: int) -> torch.Tensor:
    """(count, channels, size, size) uint8: smooth random images."""
    coarse = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return (fine.clamp(0, 1) * 255).to(torch.uint8)


def engines(
    images: torch.Tensor, view: ViewTransform, peer: Callable[[int, bool], v2.Compose]
) -> dict[str, Callable[[], object]]:
    """Name to a function that makes one view of every image."""
    size = images.shape[-1]
    keys = sample_keys(0, 0, 0, torch.arange(len(images)), 0)
    pictures = [v2.functional.to_pil_image(image) for image in images]
    on_pil, on_tensors = peer(size, True), peer(size, False)
    return {
        "batch": lambda: view.batch(images, keys),
        "sample": lambda: torch.stack([view.sample(image, int(key)) for image, key in zip(images, keys)]),
        "torchvision PIL": lambda: torch.stack([on_pil(picture) for picture in pictures]),
        "torchvision tensors": lambda: torch.stack([on_tensors(image) for image in images]),
    }


def rates(runs: dict[str, Callable[[], object]], count: int, rounds: int) -> dict[str, float]:
    """Images per CPU second of each engine: medians over interleaved rounds, the first of which warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: count / statistics.median(values[1:]) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()}, one thread, ", end=""
    )
    print(
        f"{arguments.images} images, median of {arguments.rounds} rounds; images per CPU second (x torchvision on PIL)"
    )
    for title, file, name, channels, size, peer in CASES:
        augment = yaml.safe_load((CONFIG / f"{file}.yaml").read_text(encoding="utf-8"))
        facts = Facts((size, size), (0.5,) * channels, (0.25,) * channels)
        view = build_views(augment, facts, [name])[name]
        runs = engines(photo_like(arguments.images, channels, size), view, peer)
        speed = rates(runs, arguments.images, arguments.rounds)
        base = speed["torchvision PIL"]
        print(f"{title:28}" + "".join(f"{key} {value:9,.0f} ({value / base:5.2f})   " for key, value in speed.items()))


if __name__ == "__main__":
    main()
