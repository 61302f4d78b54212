"""Training speed and quality per second, beside what is asked of it and beside lightly, in one process on one thread.

    python -m benchmarks.speed.train [--only nets,views,bank,between,start,quality] [--rounds 3] [--seconds 10]

Contestants alternate step by step, and figures are medians of CPU time (`time.process_time`), which other jobs on the
machine disturb least. lightly (extra `bench`) gets the same network, first weights, views, batch and optimiser, and
uses its own loss, transforms and torch's DataLoader in the same process. It runs twice: in float32 as in its
documentation, and with the autocast and memory layout of our trainer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.harness import measure
from benchmarks.speed.views import engines, photo_like
from benchmarks.speed.views import simclr as torchvision_simclr
from deepclust.backbones import cifar_resnet, small_convnet
from deepclust.data.datasets import digits, fashion_mnist, from_arrays
from deepclust.data.image_set import ImageSet
from deepclust.data.loader import Plan
from deepclust.data.views import ViewTransform, build_views
from deepclust.errors import UserError
from deepclust.eval import clustering_scores, knn_probe
from deepclust.heads import BankSpec, Head
from deepclust.heads.simclr import SimCLR
from deepclust.heads.swav import SwAV
from deepclust.ops import kmeans
from deepclust.precision import autocast
from deepclust.settings import OptimSettings, TrainerSettings
from deepclust.trainer import Hooks, Stopped, Trainer

ROOT = Path(__file__).resolve().parents[2]
JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "p": 0.8}
VIEW: list[dict[str, Any]] = [
    {"random_resized_crop": {"scale": [0.2, 1.0]}},
    {"horizontal_flip": {}},
    {"color_jitter": JITTER},
    {"grayscale": {"p": 0.2}},
]
GREY_VIEW = [*VIEW[:2], {"color_jitter": {**JITTER, "saturation": 0.0, "hue": 0.0}}]
NETS: dict[str, tuple[Callable[[int, int], nn.Module], int]] = {
    "small ConvNet": (lambda channels, side: small_convnet(channels, side), 256),
    "ResNet-18": (lambda channels, side: cifar_resnet(channels), 64),
}
"""Constructor by channels and side, and the batch."""
NUM_PROTOTYPES = 64
"""As many as the smaller batch has rows."""
REACH = {"small ConvNet": (0.75, 3.0), "ResNet-18": (0.90, 1.0)}
"""Share of the bare network's speed, and times lightly's."""
START = """
import sys, time
began = float(sys.argv[1])
from deepclust import trainer
step = trainer.Trainer.train_step
def first(*arguments):
    step(*arguments)
    print(time.time() - began, time.process_time())
    sys.stdout.flush()
    import os
    os._exit(0)
trainer.Trainer.train_step = first
from deepclust.cli import main
sys.exit(main(["train", *sys.argv[2:]]))
"""


def show(what: str, value: float, unit: str, reach: float | None = None, least: bool = True, note: str = "") -> None:
    """One line: the figure beside what is asked."""
    asked = ""
    if reach is not None:
        met = value >= reach if least else value <= reach
        asked = f"{'≥' if least else '≤'} {reach:g}  {'reached' if met else 'MISSED'}"
    print(f"{what:66.66s}{value:10.3g} {unit:8s}{asked:18s}{note}".rstrip(), flush=True)


def pictures(count: int, side: int = 32) -> ImageSet:
    """Smooth random colour images."""
    return from_arrays(photo_like(count, 3, side)).train


def transforms_for(images: ImageSet) -> dict[str, ViewTransform]:
    view = VIEW if images.channels == 3 else GREY_VIEW
    augment = {"size": None, "views": {"clean": [], "strong": view}}
    return build_views(augment, images, ["clean", "strong"])


def head_for(method: str, dim: int) -> Head:
    if method == "simclr":
        return SimCLR(dim, view="strong")
    return SwAV(dim, 10, num_prototypes=[NUM_PROTOTYPES], global_view="strong")


def trainer_for(method: str, net: str, images: ImageSet, **settings: Any) -> Trainer:
    """Our trainer with its defaults."""
    build, batch_size = NETS[net]
    torch.manual_seed(0)
    backbone = build(images.channels, images.size[0])
    chosen = {"epochs": 10_000, "batch_size": batch_size, **settings}
    head = head_for(method, backbone.num_features)  # pyright: ignore[reportArgumentType]
    optim = OptimSettings(schedule="constant")
    return Trainer(backbone, head, images, transforms_for(images), settings=TrainerSettings(**chosen), optim=optim)


def peers(method: str, trainer: Trainer, batch_size: int) -> dict[str, Any]:
    """lightly's loops by name, from our first weights; none where lightly is not installed."""
    if find_spec("lightly") is None:
        return {}
    from benchmarks.speed.peers import Lightly

    network = trainer.network
    dtypes = {"lightly, float32": None, "lightly, autocast too": trainer.stepper.dtype}
    parts = (network.backbone, network.head.projector)
    settings = (trainer.images, batch_size, NUM_PROTOTYPES)
    return {name: Lightly(method, *parts, *settings, dtype) for name, dtype in dtypes.items()}


def bare(trainer: Trainer, num_views: int) -> Callable[[], None]:
    """Forward and backward of a copy of the network on ready tensors, in the trainer's precision and layout."""
    network = copy.deepcopy(trainer.network).train()
    batch = torch.randn(num_views, trainer.images.channels, *trainer.images.size)

    def run() -> None:
        output = network.head(network.features(batch, autocast(batch.device, trainer.stepper.dtype)), 0)
        output.embedding.square().mean().backward()
        network.zero_grad()

    return run


def alternate(trainer: Trainer, others: dict[str, Callable[[], None]]) -> dict[str, float]:
    """Median CPU seconds of our steps, everything between two lines of the log included, and of the others' between."""
    seconds: dict[str, list[float]] = {name: [] for name in ("ours", *others)}
    last = time.process_time()

    def between(*_: Any) -> None:
        nonlocal last
        seconds["ours"].append(time.process_time() - last)
        for name, run in others.items():
            began = time.process_time()
            run()
            seconds[name].append(time.process_time() - began)
        last = time.process_time()

    trainer.hooks.log = between
    trainer.fit()
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def bench_nets(asked: argparse.Namespace, found: dict[str, float]) -> None:
    """A whole step: data, augmentation, network, head, loss, update, meter."""
    for net in NETS:
        for method in ("simclr", "swav"):
            batch_size = NETS[net][1]
            images = pictures(8 * batch_size)
            trainer = trainer_for(method, net, images, max_steps=asked.rounds + 1, log_every_steps=1)
            loops = peers(method, trainer, batch_size)
            others = {"bare": bare(trainer, 2 * batch_size), **{name: loop.step for name, loop in loops.items()}}
            seconds = alternate(trainer, others)
            title, speed = f"{net}, {method}", 2 * batch_size / seconds["ours"]
            found.setdefault(net, speed)
            share, times = REACH[net]
            show(
                f"{title}: trainer", speed, "views/s", note=f"batch {batch_size}, {trainer.stepper.dtype or 'float32'}"
            )
            show(f"{title}: trainer against bare network", seconds["bare"] / seconds["ours"], "", share)
            for name in loops:
                show(f"{title}: step against {name}", seconds[name] / seconds["ours"], "x", times)


def bench_views(asked: argparse.Namespace, found: dict[str, float]) -> None:
    images = photo_like(512, 3, 32)
    view = transforms_for(from_arrays(images).train)["strong"]
    runs = engines(images, view, torchvision_simclr)
    runs = {name: runs[name] for name in ("batch", "torchvision PIL")}
    timings = measure(runs, max(3, asked.rounds))
    show("augmentation, SimCLR set, 32 px", 512 / timings["batch"].seconds, "images/s")
    ratio = timings["torchvision PIL"].seconds / timings["batch"].seconds
    show("augmentation against torchvision on PIL", ratio, "x", 10.0)


def bench_bank(asked: argparse.Namespace, found: dict[str, float]) -> None:
    for net, count in (("small ConvNet", 4096), ("ResNet-18", 512)):
        trainer = trainer_for("simclr", net, pictures(count))
        network = copy.deepcopy(trainer.network).eval()
        ready = torch.randn(count, 3, 32, 32)

        def forward(network: Any = network, ready: Tensor = ready, trainer: Trainer = trainer) -> None:
            with torch.no_grad():
                for part in ready.split(512):
                    network.features(part, autocast(part.device, trainer.stepper.dtype))

        timings = measure({"ours": lambda t=trainer: t.bank(BankSpec()), "bare": forward}, asked.rounds)
        show(f"{net}: bank pass against bare forward", timings["bare"].seconds / timings["ours"].seconds, "", 0.90)


def bench_between(asked: argparse.Namespace, found: dict[str, float]) -> None:
    """k-means and the order of the next pass, N 50,000, D 128, K 1000."""
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(1000, 128, generator=generator)
    x = modes[torch.randint(1000, (50_000,), generator=generator)]
    x = F.normalize(x + 0.8 * torch.randn(50_000, 128, generator=generator), dim=1)
    before = kmeans(x, 1000, init="random", num_iters=10, spherical=True).centroids
    moved = F.normalize(x + 0.15 * F.normalize(torch.randn(50_000, 128, generator=generator), dim=1), dim=1)

    def refresh(init: Any, updates: int) -> None:
        labels = kmeans(moved, 1000, init=init, num_iters=updates, spherical=True).labels
        by_cluster = torch.argsort(labels, stable=True)
        counts = torch.bincount(labels, minlength=1000)
        drawn = torch.randint(1000, (50_000,), generator=generator)
        place = (torch.rand(50_000, generator=generator) * counts[drawn]).long()
        rows = (counts.cumsum(0) - counts)[drawn] + place
        Plan.draw(50_000, 256, 0, 0, 0, by_cluster[rows.clamp_max(49_999)])

    runs = {"cold, 20 updates": lambda: refresh("k-means++", 20), "warm, 10 updates": lambda: refresh(before, 10)}
    timings = measure(runs, min(2, asked.rounds))
    for net in NETS:
        if net not in found:
            continue
        epoch = 100_000 / found[net]
        for name, timing in timings.items():
            share = 100 * timing.seconds / (timing.seconds + epoch)
            title = f"{net}: k-means ({name}) + sampling, share of an epoch"
            show(title, share, "%", 5.0, least=False, note=f"{timing.seconds:.1f} s of {epoch:.0f} s, two views")


def bench_start(asked: argparse.Namespace, found: dict[str, float]) -> None:
    """From the start of the process to the end of the first step, as `python train.py head=simclr` goes."""
    taken = []
    for _ in range(min(3, asked.rounds)):
        with tempfile.TemporaryDirectory() as folder:
            words = ["head=simclr", "data=digits", f"run.dir={folder}/run", "logger.console=false"]
            command = [sys.executable, "-c", START, str(time.time()), *words]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            taken.append([float(word) for word in done.stdout.split()[-2:]])
    wall, cpu = (statistics.median(values) for values in zip(*taken))
    show("process start to first step", wall, "s", 12.0, least=False, note=f"{cpu:.1f} s of CPU time")


def bench_quality(asked: argparse.Namespace, found: dict[str, float]) -> None:
    """SimCLR's features after equal CPU seconds of training, data and augmentation included."""
    try:
        images = fashion_mnist().train
    except UserError:
        images = digits().train
    net = "small ConvNet"
    deadline = [0.0]
    trainer = trainer_for("simclr", net, images, log_every_steps=10)
    trainer.hooks = Hooks(stop_requested=lambda: time.process_time() > deadline[0])
    loops = peers("simclr", trainer, NETS[net][1])
    deadline[0] = time.process_time() + asked.seconds
    with contextlib.suppress(Stopped):
        trainer.fit()
    views = 2 * len(images) * trainer.step / trainer.steps_per_epoch
    judge(f"{images.name}, simclr, ours", trainer.features()[0], images, asked.seconds, views)
    for name, loop in loops.items():
        steps, end = 0, time.process_time() + asked.seconds
        while time.process_time() < end:
            loop.step()
            steps += 1
        clean = transforms_for(images)["clean"]
        assert images.images is not None
        loop.backbone.eval()
        with torch.no_grad():
            parts = [loop.features(clean.batch(p, torch.zeros(len(p)).long())) for p in images.images.split(512)]
        judge(f"{images.name}, simclr, {name}", torch.cat(parts), images, asked.seconds, 2 * NETS[net][1] * steps)


def judge(title: str, features: Tensor, images: ImageSet, seconds: float, views: float) -> None:
    classes = images.classes
    assert classes is not None
    labels = kmeans(features, 10, spherical=True, num_restarts=5).labels.numpy()
    note = f"{seconds:.0f} s, {views:,.0f} views"
    show(f"{title}: kNN", 100 * knn_probe(features, classes), "%", note=note)
    show(f"{title}: k-means ACC", 100 * clustering_scores(labels, classes)["acc"], "%", note=note)


BENCHES = {
    "nets": bench_nets,
    "views": bench_views,
    "bank": bench_bank,
    "between": bench_between,
    "start": bench_start,
    "quality": bench_quality,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(BENCHES), help="parts; `between` needs `nets` for an epoch's length")
    parser.add_argument("--rounds", type=int, default=3, help="steps or runs of each contestant that count")
    parser.add_argument("--seconds", type=float, default=10.0, help="CPU seconds of training for `quality`")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    lightly = "lightly compared" if find_spec("lightly") else "lightly is not installed"
    print(f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, one thread; {lightly}; CPU time")
    found: dict[str, float] = {}
    for name in asked.only.split(","):
        BENCHES[name](asked, found)


if __name__ == "__main__":
    main()
