"""Training speed, and quality per second of training, beside what is asked of it and lightly.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.speed.train

No committed figures are of it. `--only nets,bank` runs some of its parts:

- `nets`: a whole step, against the bare network and against lightly's step
- `views`: augmentation, against torchvision on PIL images
- `bank`: a pass over all images for their features, against bare forward passes
- `between`: k-means and a new order between two epochs, as a share of an epoch
- `start`: from the start of the process to the end of the first step
- `quality`: features after equal CPU seconds, ours and lightly's

Contestants alternate step by step in one process on one thread; figures are medians of CPU time.
lightly (extra `bench`) gets the same network, first weights, views, batch and optimiser, and uses
its own loss, transforms and torch's DataLoader. It runs twice: in float32 as in its documentation,
and with the autocast and memory layout of our trainer.
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
from torch import Tensor

from benchmarks.speed.contestants import (
    NETS,
    alternate,
    bare,
    lightly_loops,
    pictures,
    trainer_for,
    transforms_for,
)
from benchmarks.speed.harness import measure
from benchmarks.speed.views import engines, photo_like
from benchmarks.speed.views import simclr as torchvision_simclr
from deepclust.data.datasets import digits, fashion_mnist, from_arrays
from deepclust.data.image_set import ImageSet
from deepclust.data.sampler import Plan
from deepclust.errors import UserError
from deepclust.eval import clustering_scores, knn_probe
from deepclust.heads import BankSpec
from deepclust.ops import kmeans
from deepclust.ops.precision import autocast
from deepclust.training.trainer import Hooks, Stopped, Trainer

ROOT = Path(__file__).resolve().parents[2]
REACH = {"small ConvNet": (0.75, 3.0), "ResNet-18": (0.90, 1.0)}
"""Goals: share of the bare network's speed, and times lightly's."""
START = """
import os
import runpy
import sys
import time

began = float(sys.argv[1])
from deepclust import Trainer

train_step = Trainer.train_step


def first_step(*arguments):
    train_step(*arguments)
    print(time.time() - began, time.process_time(), flush=True)
    os._exit(0)


Trainer.train_step = first_step
sys.argv = ["train.py", *sys.argv[2:]]
runpy.run_path("train.py", run_name="__main__")
"""
"""Runs train.py until its first step is done; then prints seconds by the clock and of CPU time."""


def print_figure(
    title: str,
    value: float,
    unit: str,
    goal: float | None = None,
    at_least: bool = True,
    note: str = "",
) -> None:
    """Prints one line: a figure beside its goal.

    title: what was measured.
    value: in `unit`.
    unit: may be empty, for a ratio.
    goal: None where nothing is asked.
    at_least: whether the goal is the least value that reaches it, else the largest.
    note: at the line's end.
    """
    verdict = ""
    if goal is not None:
        reached = value >= goal if at_least else value <= goal
        sign = "≥" if at_least else "≤"
        verdict = f"{sign} {goal:g}  {'reached' if reached else 'MISSED'}"
    print(f"{title:66.66s}{value:10.3g} {unit:8s}{verdict:18s}{note}".rstrip(), flush=True)


# --- parts ------------------------------------------------------------------------------------


def bench_nets(options: argparse.Namespace, speeds: dict[str, float]) -> None:
    """Prints the speed of whole steps: data, augmentation, network, head, loss, update, meter.

    speeds: gets views per second of each net with its first method, which `between` needs.
    """
    for net, (_, batch_size) in NETS.items():
        share, times = REACH[net]
        for method in ("simclr", "swav"):
            images = pictures(8 * batch_size)
            steps = options.rounds + 1
            trainer = trainer_for(method, net, images, max_steps=steps, log_every_steps=1)
            loops = lightly_loops(method, trainer, batch_size)
            others = {name: loop.step for name, loop in loops.items()}
            seconds = alternate(trainer, {"bare": bare(trainer, 2 * batch_size), **others})
            speed = 2 * batch_size / seconds["ours"]
            speeds.setdefault(net, speed)
            title = f"{net}, {method}"
            note = f"batch {batch_size}, {trainer.stepper.dtype or 'float32'}"
            print_figure(f"{title}: trainer", speed, "views/s", note=note)
            ratio = seconds["bare"] / seconds["ours"]
            print_figure(f"{title}: trainer against bare network", ratio, "", share)
            for name in loops:
                ratio = seconds[name] / seconds["ours"]
                print_figure(f"{title}: step against {name}", ratio, "x", times)


def bench_views(options: argparse.Namespace, _: dict[str, float]) -> None:
    """Prints the speed of augmentation; `benchmarks.speed.views` has more cases."""
    images = photo_like(512, 3, 32)
    view = transforms_for(from_arrays(images).train)["strong"]
    runs = engines(images, view, torchvision_simclr)
    runs = {name: runs[name] for name in ("batch", "torchvision PIL")}
    timings = measure(runs, max(3, options.rounds))
    seconds = timings["batch"].seconds
    print_figure("augmentation, SimCLR set, 32 px", 512 / seconds, "images/s")
    ratio = timings["torchvision PIL"].seconds / seconds
    print_figure("augmentation against torchvision on PIL", ratio, "x", 10.0)


def bench_bank(options: argparse.Namespace, _: dict[str, float]) -> None:
    """Prints the speed of a bank pass (features of all images) over the bare network's."""
    for net, count in (("small ConvNet", 4096), ("ResNet-18", 512)):
        trainer = trainer_for("simclr", net, pictures(count))
        runs = {"ours": lambda t=trainer: t.bank(BankSpec()), "bare": _bare_pass(trainer, count)}
        timings = measure(runs, options.rounds)
        ratio = timings["bare"].seconds / timings["ours"].seconds
        print_figure(f"{net}: bank pass against bare forward", ratio, "", 0.90)


def _bare_pass(trainer: Trainer, count: int) -> Callable[[], None]:
    """Forward passes of `count` ready images, 512 at a time as the bank's are."""
    network = copy.deepcopy(trainer.network).eval()
    ready = torch.randn(count, 3, 32, 32)

    def forward() -> None:
        with torch.no_grad():
            for part in ready.split(512):
                network.features(part, autocast(part.device, trainer.stepper.dtype))

    return forward


def bench_between(options: argparse.Namespace, speeds: dict[str, float]) -> None:
    """Prints the share of an epoch that k-means and a new order take: N 50,000, D 128, K 1000.

    speeds: views per second by net, as `bench_nets` leaves them.
    """
    generator = torch.Generator().manual_seed(0)
    modes = torch.randn(1000, 128, generator=generator)
    x = modes[torch.randint(1000, (50_000,), generator=generator)]
    x = F.normalize(x + 0.8 * torch.randn(50_000, 128, generator=generator), dim=1)
    before = kmeans(x, 1000, init="random", num_iters=10, spherical=True).centroids
    # From one epoch to the next features move a little: here by 15 % of their length.
    direction = F.normalize(torch.randn(50_000, 128, generator=generator), dim=1)
    moved = F.normalize(x + 0.15 * direction, dim=1)

    def refresh(init: Any, updates: int) -> None:
        labels = kmeans(moved, 1000, init=init, num_iters=updates, spherical=True).labels
        # A cluster is drawn, then a row of it: every cluster comes equally often.
        by_cluster = torch.argsort(labels, stable=True)
        counts = torch.bincount(labels, minlength=1000)
        drawn = torch.randint(1000, (50_000,), generator=generator)
        offset = (torch.rand(50_000, generator=generator) * counts[drawn]).long()
        positions = (counts.cumsum(0) - counts)[drawn] + offset
        # An empty cluster behind the last row would point beyond the end.
        Plan.draw(50_000, 256, 0, 0, 0, by_cluster[positions.clamp_max(49_999)])

    runs = {
        "cold, 20 updates": lambda: refresh("k-means++", 20),
        "warm, 10 updates": lambda: refresh(before, 10),
    }
    # Seconds each: two rounds are enough.
    timings = measure(runs, min(2, options.rounds))
    for net, speed in speeds.items():
        # Two views of 50,000 images.
        epoch = 100_000 / speed
        for name, timing in timings.items():
            share = 100 * timing.seconds / (timing.seconds + epoch)
            title = f"{net}: k-means ({name}) + sampling, share of an epoch"
            note = f"{timing.seconds:.1f} s of {epoch:.0f} s, two views"
            print_figure(title, share, "%", 5.0, at_least=False, note=note)


def bench_start(options: argparse.Namespace, _: dict[str, float]) -> None:
    """Prints the time from the start of `python train.py head=simclr` to its first step's end."""
    seconds = []
    for _round in range(min(3, options.rounds)):
        with tempfile.TemporaryDirectory() as folder:
            words = ["head=simclr", "data=digits", f"run.dir={folder}/run", "logger.console=false"]
            command = [sys.executable, "-c", START, str(time.time()), *words]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
            seconds.append([float(word) for word in done.stdout.split()[-2:]])
    wall, cpu = (statistics.median(values) for values in zip(*seconds))
    note = f"{cpu:.1f} s of CPU time"
    print_figure("process start to first step", wall, "s", 12.0, at_least=False, note=note)


def bench_quality(options: argparse.Namespace, _: dict[str, float]) -> None:
    """Prints scores of SimCLR's features after equal CPU seconds of training, data included."""
    try:
        images = fashion_mnist().train
    except UserError:
        # Fashion-MNIST is not on every machine; digits come with scikit-learn.
        images = digits().train
    net = "small ConvNet"
    batch_size = NETS[net][1]
    trainer = trainer_for("simclr", net, images, log_every_steps=10)
    # Made before the clock starts, from the same first weights.
    loops = lightly_loops("simclr", trainer, batch_size)
    deadline = time.process_time() + options.seconds
    trainer.hooks = Hooks(stop_requested=lambda: time.process_time() > deadline)
    with contextlib.suppress(Stopped):
        trainer.fit()
    views = 2 * len(images) * trainer.step / trainer.steps_per_epoch
    note = f"{options.seconds:.0f} s, {views:,.0f} views"
    judge(f"{images.name}, simclr, ours", trainer.features()[0], images, note)
    for name, loop in loops.items():
        steps = 0
        deadline = time.process_time() + options.seconds
        while time.process_time() < deadline:
            loop.step()
            steps += 1
        note = f"{options.seconds:.0f} s, {2 * batch_size * steps:,.0f} views"
        judge(f"{images.name}, simclr, {name}", _peer_features(loop, images), images, note)


def _peer_features(loop: Any, images: ImageSet) -> Tensor:
    """(N, D) features of lightly's backbone on the same clean views as ours."""
    clean = transforms_for(images)["clean"]
    assert images.images is not None
    loop.backbone.eval()
    parts = []
    with torch.no_grad():
        for part in images.images.split(512):
            # The clean view draws nothing, so that any key will do.
            keys = torch.zeros(len(part), dtype=torch.int64)
            parts.append(loop.features(clean.batch(part, keys)))
    return torch.cat(parts)


def judge(title: str, features: Tensor, images: ImageSet, note: str) -> None:
    """Prints the accuracies of nearest neighbours and of k-means on features (N, D)."""
    classes = images.classes
    assert classes is not None
    labels = kmeans(features, 10, spherical=True, num_restarts=5).labels.numpy()
    print_figure(f"{title}: kNN", 100 * knn_probe(features, classes), "%", note=note)
    accuracy = clustering_scores(labels, classes)["acc"]
    print_figure(f"{title}: k-means ACC", 100 * accuracy, "%", note=note)


BENCHES: dict[str, Callable[[argparse.Namespace, dict[str, float]], None]] = {
    "nets": bench_nets,
    "views": bench_views,
    "bank": bench_bank,
    "between": bench_between,
    "start": bench_start,
    "quality": bench_quality,
}


def main() -> None:
    """Runs the parts asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", default=",".join(BENCHES), help="`between` needs `nets` for an epoch's length"
    )
    parser.add_argument("--rounds", type=int, default=3, help="steps or runs that count")
    parser.add_argument("--seconds", type=float, default=10.0, help="of training, for `quality`")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lightly = "lightly compared" if find_spec("lightly") else "lightly is not installed"
    print(
        f"torch {torch.__version__}, {platform.machine()}, {os.cpu_count()} cores, one thread;"
        f" {lightly}; CPU time"
    )
    speeds: dict[str, float] = {}
    for name in options.only.split(","):
        BENCHES[name](options, speeds)


if __name__ == "__main__":
    main()
