"""Views per second on one core: the batch engine and the sample engine, beside torchvision.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.views

No committed figures are of it. torchvision gets the nearest it has to each augmentation, once on
PIL images and once on tensors. The figure is images per CPU second, median of `--rounds`
interleaved rounds over `--images` images; ratios in brackets are to torchvision on PIL.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
import yaml
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.speed.harness import Contestants, measure
from deepclust.data.random import sample_keys
from deepclust.data.views.transform import ViewTransform, build_views

CONFIG = Path(__file__).resolve().parents[2] / "conf" / "augment"

Peer = Callable[[int, bool], v2.Compose]
"""By side in pixels, and whether it gets PIL images, torchvision's transform."""


class Images(NamedTuple):
    """What views ask of an image set."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Case(NamedTuple):
    """One augmentation on images of one shape."""

    title: str
    file: str
    """In conf/augment, without its ending."""
    view: str
    """Its name in that file."""
    channels: int
    side: int
    peer: Peer


# --- torchvision ------------------------------------------------------------------------------


def simclr(side: int, from_pil: bool) -> v2.Compose:
    """SimCLR's augmentation as SCAN uses it, which torchvision has in full."""
    return v2.Compose(
        [
            v2.RandomResizedCrop(side, scale=(0.2, 1.0), antialias=True),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            *_to_float(3, from_pil),
        ]
    )


def small_gray(side: int, from_pil: bool) -> v2.Compose:
    """The nearest that torchvision has to the augmentation of small grey images."""
    bilinear = v2.InterpolationMode.BILINEAR
    return v2.Compose(
        [
            v2.RandomAffine((-15, 15), (0.12, 0.12), (0.8, 1.2), (-14, 14), interpolation=bilinear),
            # torchvision draws no random gamma; a fixed one costs the same.
            v2.Lambda(lambda image: v2.functional.adjust_gamma(image, 1.3)),
            v2.ColorJitter(brightness=(0.6, 1.1)),
            *_to_float(1, from_pil),
            v2.GaussianNoise(sigma=0.03, clip=False),
        ]
    )


def scan_strong(side: int, from_pil: bool) -> v2.Compose:
    """The nearest that torchvision has to SCAN's strong augmentation: four random operations."""
    return v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.RandAugment(4),
            *_to_float(3, from_pil),
            v2.RandomErasing(1.0),
        ]
    )


def _to_float(channels: int, from_pil: bool) -> list[v2.Transform]:
    """Steps from pixels to a normalised float32 tensor."""
    normalise = v2.Normalize([0.5] * channels, [0.25] * channels)
    steps = [v2.ToDtype(torch.float32, scale=True), normalise]
    return [v2.PILToTensor(), *steps] if from_pil else steps


CASES = (
    Case("SimCLR, 32 px colour", "cifar", "simclr", 3, 32, simclr),
    Case("SCAN strong, 32 px colour", "cifar", "strong", 3, 32, scan_strong),
    Case("small grey, 28 px", "small_gray", "simclr", 1, 28, small_gray),
    Case("small grey, 8 px", "small_gray", "simclr", 1, 8, small_gray),
    Case("SimCLR, 96 px colour", "cifar", "simclr", 3, 96, simclr),
)


# --- contestants ------------------------------------------------------------------------------


def photo_like(count: int, channels: int, side: int) -> Tensor:
    """(count, channels, side, side) uint8 smooth random images."""
    # 6 x 6 random colours, enlarged: smooth, as photos are and noise is not.
    coarse = torch.rand(count, channels, 6, 6, generator=torch.Generator().manual_seed(0))
    fine = torch.nn.functional.interpolate(
        coarse, (side, side), mode="bicubic", align_corners=False
    )
    return (fine.clamp(0, 1) * 255).to(torch.uint8)


def engines(images: Tensor, view: ViewTransform, peer: Peer) -> Contestants:
    """Functions that make one view of every image: ours by batch and by sample, torchvision's two.

    images: (N, C, H, W) uint8.
    view: ours.
    peer: torchvision's counterpart.
    """
    side = images.shape[-1]
    # A key holds all of a view's randomness, so that both of our engines draw the same parameters.
    keys = sample_keys(0, 0, 0, torch.arange(len(images)), 0)
    pictures = [v2.functional.to_pil_image(image) for image in images]
    on_pil = peer(side, True)
    on_tensors = peer(side, False)

    def by_sample() -> Tensor:
        return torch.stack([view.sample(image, int(key)) for image, key in zip(images, keys)])

    return {
        "batch": lambda: view.batch(images, keys),
        "sample": by_sample,
        "torchvision PIL": lambda: torch.stack([on_pil(picture) for picture in pictures]),
        "torchvision tensors": lambda: torch.stack([on_tensors(image) for image in images]),
    }


def rates(case: Case, count: int, rounds: int) -> dict[str, float]:
    """Images per CPU second of each engine.

    case: augmentation and shape.
    count: images.
    rounds: that count.
    """
    augment = yaml.safe_load((CONFIG / f"{case.file}.yaml").read_text(encoding="utf-8"))
    size = (case.side, case.side)
    images = Images(size, (0.5,) * case.channels, (0.25,) * case.channels)
    view = build_views(augment, images, [case.view])[case.view]
    runs = engines(photo_like(count, case.channels, case.side), view, case.peer)
    return {name: count / timing.seconds for name, timing in measure(runs, rounds).items()}


def main() -> None:
    """Prints a line for each of `CASES`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {platform.machine()}, "
        f"one thread, {options.images} images, median of {options.rounds} rounds; "
        "images per CPU second (x torchvision on PIL)"
    )
    for case in CASES:
        speed = rates(case, options.images, options.rounds)
        base = speed["torchvision PIL"]
        columns = [f"{name} {value:9,.0f} ({value / base:5.2f})" for name, value in speed.items()]
        print(f"{case.title:28}" + "   ".join(columns), flush=True)


if __name__ == "__main__":
    main()
