"""Clusterings of long-tailed sets, all on the same frozen features: Markdown on stdout, OUT/table.md and OUT/cells.csv.

    python -m benchmarks.quality.imbalanced --out outputs/imbalanced
    python -m benchmarks.quality.imbalanced --out outputs/imbalanced --features clothing=clothing.npz --sets clothing

Digits and Fashion-MNIST are thinned to imbalance 10 and 50 (data.imbalance); SimCLR is trained on what is left, once
per set and seed, and then frozen. --features NAME=FILE adds a set of benchmarks/quality/features.py with its own
imbalance. Every head has the same cosine layer, the same k-means prototypes to begin with, the same views (the feature
with noise and dropout), optimiser and number of steps; they differ in their targets alone.

A finished cell is a file and is read, not computed, the next time; several processes may share one OUT.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deepclust import DeepClusterer
from deepclust.config import build, load
from deepclust.data.features import features as read_features
from deepclust.data.features import from_features
from deepclust.data.image_set import ImageData
from deepclust.data.views import build_views
from deepclust.eval import clustering_scores
from deepclust.heads.p2ot import P2OT
from deepclust.ops import kmeans, sinkhorn
from deepclust.ops.spectral import spectral_clusters
from deepclust.ops.transport import TransportResult
from deepclust.run_folder import write_atomic
from deepclust.settings import OptimSettings, TrainerSettings
from deepclust.trainer import Trainer

SETS = ("digits-10", "digits-50", "fashion_mnist-10", "fashion_mnist-50")
FACTORS = (1.0, 0.7, 1.5, 2.0)
SCORES = ("macro_acc", "acc", "nmi", "macro_f1", "head_acc", "medium_acc", "tail_acc")
NAMES = {
    "kmeans": "k-means",
    "spectral": "spectral",
    "scan": "SCAN",
    "swav": "SwAV codes",
    "unbalanced": "unbalanced (no ramp)",
    "hard": "hard (equal clusters)",
    "p2ot": "P²OT",
    "sp2ot": "SP²OT",
}
BALANCED = ("scan", "swav", "hard")
"""Methods whose targets ask for clusters of equal size."""
PRETEXT_IMAGES = {"digits": 40_000, "fashion_mnist": 50_000}
STEPS, BATCH, LR = 200, 256, 5e-4


@dataclass(frozen=True)
class Cell:
    """One clustering: a set, how wrong k is (a factor of the number of classes), a seed and a method."""

    data: str
    factor: float
    seed: int
    method: str

    def file(self, out: Path) -> Path:
        """Where its scores are kept."""
        return out / "cells" / f"{self.data}_{self.factor:g}_{self.seed}_{self.method}.json"


# --- features -------------------------------------------------------------------------------------------------------


@cache
def features_of(name: str, seed: int, out: Path, file: str | None) -> tuple[Tensor, np.ndarray]:
    """Features (N, D) and classes (N,) of a set: from its file, or by a SimCLR stage that is trained once and kept."""
    if file is None:
        path = out / "features" / f"{name}-{seed}.npz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, **pretext(name, seed))
        file = str(path)
    images = read_features(file).train
    if images.images is None or images.classes is None:
        raise SystemExit(f"{file}: has no labels to compare with")
    return images.images.flatten(1), images.classes


def pretext(name: str, seed: int) -> dict[str, np.ndarray]:
    """Trains SimCLR on the thinned set alone; its features z and the classes."""
    base, imbalance = name.rsplit("-", 1)
    data: ImageData = build(load([f"data={base}", f"data.imbalance={imbalance}"]).data)
    settings = {
        "head": "simclr",
        "head.temperature": 0.5,
        "head.neighbors_from": 0.5,
        "optim.lr": 2e-3,
        "optim.warmup_steps": 20,
        "trainer.num_images": PRETEXT_IMAGES[base],
        "trainer.num_threads": torch.get_num_threads(),
        "eval.probes": False,
    }
    model = DeepClusterer(10, recipe="single", random_state=seed, overrides=settings).fit(data)
    assert data.train.classes is not None
    return {"features": model.transform(data.train), "labels": data.train.classes}


# --- methods --------------------------------------------------------------------------------------------------------


class SinkhornCodes(P2OT):
    """SwAV's codes in P2OT's place: every sample used, clusters equal (3 iterations, epsilon 0.05 on cosines)."""

    def solve(self, logits: Tensor, samples: Tensor, mass: float, warm_start: Tensor | None) -> TransportResult:
        """Codes over the batch and the memory, which is SwAV's queue."""
        codes = sinkhorn(logits * self.layer.temperature, epsilon=0.05)
        return TransportResult(codes, self.log_scale[0], 3, 1.0, 0.0)


@cache
def head_node(words: tuple[str, ...]) -> dict[str, Any]:
    """A head as the command line asks for it."""
    return load(["recipe=single", *words]).stages["main"].head


COMMON = ("head.init=kmeans", "head.view=strong")
SOLVER = "head.tol=1e-4"
HEADS: dict[str, tuple[str, ...]] = {
    "scan": ("head=scan", "head.kind=cosine", "head.num_neighbors=10", "head.entropy_weight=5", *COMMON),
    "swav": ("head=p2ot", SOLVER, "head.mass_start=1", *COMMON),
    "unbalanced": ("head=p2ot", SOLVER, "head.mass_start=1", *COMMON),
    "hard": ("head=p2ot", SOLVER, "head.kl_weight=inf", *COMMON),
    "p2ot": ("head=p2ot", SOLVER, *COMMON),
    "sp2ot": ("head=sp2ot", SOLVER, "head.max_linearisations=3", *COMMON),
}


def by_head(method: str, x: Tensor, k: int, seed: int) -> np.ndarray:
    """Clusters (N,) of a head that was trained on frozen features (N, D)."""
    data = from_features(x.numpy()).train
    views = build_views(load(["augment=features"]).stages["pretext"].augment, data, ["clean", "strong"])
    node = head_node(HEADS[method])
    torch.manual_seed(seed)
    sizes = {"dim": x.shape[1], "num_clusters": k, "num_samples": len(x)}
    if method == "swav":
        head: Any = SinkhornCodes(**sizes, **{key: value for key, value in node.items() if key != "_target_"})
    else:
        head = build(node, **sizes)
    settings = TrainerSettings(
        epochs=max(1, round(STEPS * BATCH / len(x))), batch_size=BATCH, precision="float32", channels_last=False
    )
    optim = OptimSettings(name="adamw", lr=LR, weight_decay=0.0)
    trainer = Trainer(nn.Flatten(), head, data, views, settings=settings, optim=optim, seed=seed)
    trainer.fit()
    return head.predict(x).argmax(1).numpy()


def clusters_of(method: str, x: Tensor, k: int, seed: int) -> np.ndarray:
    """Clusters (N,) of features (N, D) by a method."""
    with torch.no_grad():
        if method == "kmeans":
            return kmeans(x, k, spherical=True, num_restarts=10, num_iters=100, seed=seed).labels.numpy()
        if method == "spectral":
            return spectral_clusters(x, k, num_neighbors=15, seed=seed).numpy()
    return by_head(method, x, k, seed)


def compute(cell: Cell, x: Tensor, classes: np.ndarray) -> dict[str, Any]:
    """Scores of one cell, with its number of clusters and its seconds of processor time."""
    k, began = max(2, round(cell.factor * len(np.unique(classes)))), time.process_time()
    found = clustering_scores(clusters_of(cell.method, x, k, cell.seed), classes)
    seconds = time.process_time() - began
    return {**{score: found[score] for score in SCORES}, "clusters": k, "seconds": seconds}


# --- tables ---------------------------------------------------------------------------------------------------------


def rows_of(cells: Sequence[tuple[Cell, dict[str, Any]]]) -> Iterator[tuple[str, float, str, list[dict[str, Any]]]]:
    """Set, factor, method and the scores of its seeds, for each line of the tables, in order."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for cell, scores in cells:
        groups.setdefault((cell.data, cell.factor, cell.method), []).append(scores)
    for (data, factor, method), found in groups.items():
        yield data, factor, method, found


def figure(values: Sequence[float]) -> str:
    """Mean and, of several, standard deviation in per cent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) < 2 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def markdown(cells: Sequence[tuple[Cell, dict[str, Any]]]) -> str:
    """A table for each set and number of clusters, and what P2OT is ahead of."""
    lines: list[str] = []
    head, verdicts = None, []
    macro: dict[tuple[str, float], dict[str, float]] = {}
    for data, factor, method, found in rows_of(cells):
        if head != (data, factor):
            head = (data, factor)
            lines += ["", f"**{data}**, {found[0]['clusters']} clusters ({factor:g} x classes), {len(found)} seeds", ""]
            lines += ["| | macro ACC | ACC | NMI | macro F1 | head | medium | tail | s |", "|" + " --- |" * 9]
        columns = [figure([scores[score] for scores in found]) for score in SCORES]
        seconds = statistics.mean(scores["seconds"] for scores in found)
        lines.append(f"| {NAMES[method]} | {' | '.join(columns)} | {seconds:.1f} |")
        macro.setdefault(head, {})[method] = statistics.mean(scores["macro_acc"] for scores in found)
    for (data, factor), means in macro.items():
        others = {method: means[method] for method in BALANCED if method in means}
        for own in ("p2ot", "sp2ot"):
            if own in means and others:
                best = max(others, key=lambda method: others[method])
                gain = 100 * (means[own] - others[best])
                verdicts.append(
                    f"* {data}, {factor:g} x classes: {NAMES[own]} {gain:+.1f} macro ACC against {NAMES[best]}"
                )
    return "\n".join([*lines, "", "Against the best of the balanced methods:", "", *verdicts, ""]).lstrip()


def write_csv(path: Path, cells: Sequence[tuple[Cell, dict[str, Any]]]) -> None:
    """One line per cell."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["data", "factor", "seed", "method", "clusters", *SCORES, "seconds"])
        for cell, scores in cells:
            figures = [f"{scores[score]:.4f}" for score in SCORES]
            place = [cell.data, cell.factor, cell.seed, cell.method, scores["clusters"]]
            writer.writerow([*place, *figures, f"{scores['seconds']:.2f}"])


def main() -> int:
    """Computes what is missing, then prints everything that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/imbalanced"))
    parser.add_argument("--features", action="append", default=[], help="NAME=FILE.npz, with labels")
    parser.add_argument("--sets", nargs="+", help="the sets to compute now; all if not given")
    parser.add_argument("--methods", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    asked = parser.parse_args()
    files: dict[str, str] = dict(word.split("=", 1) for word in asked.features)
    for name in asked.sets if asked.sets is not None else [*SETS, *files]:
        for seed in asked.seeds:
            todo = [Cell(name, factor, seed, method) for factor in asked.factors for method in asked.methods]
            todo = [cell for cell in todo if not cell.file(asked.out).exists()]
            if todo:
                _compute_all(todo, *features_of(name, seed, asked.out, files.get(name)), out=asked.out)
    cells = list(finished(asked.out, [*SETS, *files]))
    if cells:
        write_csv(asked.out / "cells.csv", cells)
        write_atomic(asked.out / "table.md", markdown(cells))
        print(markdown(cells))
    return 0


def _compute_all(todo: Sequence[Cell], x: Tensor, classes: np.ndarray, out: Path) -> None:
    for cell in todo:
        scores = compute(cell, x, classes)
        cell.file(out).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(cell.file(out), json.dumps(scores))
        print(f"{cell} {100 * scores['macro_acc']:.1f} in {scores['seconds']:.1f} s", file=sys.stderr, flush=True)


def finished(out: Path, names: Sequence[str]) -> Iterator[tuple[Cell, dict[str, Any]]]:
    """Cells with their scores, in the order of the tables."""
    every = {path.name for path in (out / "cells").glob("*.json")}
    for name in names:
        for factor in FACTORS:
            for method in NAMES:
                for seed in range(100):
                    cell = Cell(name, factor, seed, method)
                    if cell.file(out).name in every:
                        yield cell, json.loads(cell.file(out).read_text())


if __name__ == "__main__":
    sys.exit(main())
