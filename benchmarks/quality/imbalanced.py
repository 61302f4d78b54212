"""Clusterings of long-tailed sets, all on the same frozen features.

    python -m benchmarks.quality.imbalanced --features clothing=clothing.npz

printed the committed tables. Digits and Fashion-MNIST are thinned to imbalance 10 and 50
(data.imbalance); SimCLR is trained on what is left, once per set and seed, and then frozen.
--features adds a file of `benchmarks.quality.features` with its own imbalance. Every head has the
same cosine layer, the same k-means prototypes to begin with, the same views (the feature with noise
and dropout), optimiser and number of steps: they differ in their targets alone.

Tables are printed in Markdown and written to OUT/table.md, and all figures to OUT/cells.csv. A
finished cell is a file and is read, not computed, the next time; several processes may share one
OUT.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality.common import (
    Cell,
    comparison_parser,
    features_of,
    figure,
    named_files,
    publish,
    table_row,
    table_rule,
    write_csv,
)
from deepclust.config.build import build
from deepclust.config.load import load
from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.features import from_features
from deepclust.data.views.transform import build_views
from deepclust.eval import clustering_scores
from deepclust.heads.p2ot import P2OT
from deepclust.ops import kmeans, sinkhorn
from deepclust.ops.spectral import spectral_clusters
from deepclust.ops.transport import TransportResult
from deepclust.runtime.files import write_atomic
from deepclust.training.trainer import Trainer

SETS = ("digits-10", "digits-50", "fashion_mnist-10", "fashion_mnist-50")
"""The last number is the imbalance: images of the largest class over those of the smallest."""
FACTORS = (1.0, 0.7, 1.5, 2.0)
"""Numbers of clusters over the number of classes: the right one, too few, too many."""
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
STEPS = 200
BATCH = 256
LR = 5e-4
"""Settled while labelled figures of some seeds were in view, once for all methods."""
MAX_SEED = 100
"""Cells of larger seeds are not looked for."""

Scored = tuple[Cell, dict[str, Any]]
"""A cell and what its file holds: `SCORES`, `clusters` and `seconds`."""


# --- methods ----------------------------------------------------------------------------------


class SinkhornCodes(P2OT):
    """SwAV's codes in P2OT's place: every sample is used, and clusters are of equal size."""

    def solve(
        self,
        logits: Tensor,
        samples: Tensor,
        mass: float,
        warm_start: Tensor | None,
    ) -> TransportResult:
        """Codes over the batch and the memory, which is SwAV's queue."""
        # Logits are cosines over the temperature; SwAV's epsilon, 0.05, is one for cosines.
        codes = sinkhorn(logits * self.layer.temperature, epsilon=0.05)
        return TransportResult(codes, self.log_scale[0], 3, 1.0, 0.0)


@cache
def head_node(words: tuple[str, ...]) -> dict[str, Any]:
    """A head's section of the configuration, as these words of the command line compose it."""
    return load(["recipe=single", *words]).stages["main"].head


COMMON = ("head.init=kmeans", "head.view=strong")
SOLVER = "head.tol=1e-4"
HEADS: dict[str, tuple[str, ...]] = {
    "scan": (
        "head=scan",
        "head.kind=cosine",
        "head.num_neighbors=10",
        "head.entropy_weight=5",
        *COMMON,
    ),
    # mass_start=1: all samples from the first step on. `by_head` puts SwAV's codes in its place.
    "swav": ("head=p2ot", SOLVER, "head.mass_start=1", *COMMON),
    "unbalanced": ("head=p2ot", SOLVER, "head.mass_start=1", *COMMON),
    # An infinite weight makes the prior of equal clusters a constraint.
    "hard": ("head=p2ot", SOLVER, "head.kl_weight=inf", *COMMON),
    "p2ot": ("head=p2ot", SOLVER, *COMMON),
    "sp2ot": ("head=sp2ot", SOLVER, *COMMON),
}
"""Each head in the words of the command line."""


def by_head(method: str, x: Tensor, k: int, seed: int) -> np.ndarray:
    """Clusters (N,) of a head that is trained on frozen features.

    method: of `HEADS`.
    x: (N, D) float32.
    k: number of clusters.
    seed: of weights, views and order.
    """
    data = from_features(x.numpy()).train
    augment = load(["augment=features"]).stages["pretext"].augment
    views = build_views(augment, data, ["clean", "strong"])
    # Heads draw their first weights from the global stream.
    torch.manual_seed(seed)
    settings = TrainerSettings(
        # Whole passes that come nearest to the number of steps.
        epochs=max(1, round(STEPS * BATCH / len(x))),
        batch_size=BATCH,
        # One small layer: bfloat16 and another memory layout would save nothing.
        precision="float32",
        channels_last=False,
    )
    head = build_head(method, x.shape[1], k, len(x))
    trainer = Trainer(
        nn.Flatten(),
        head,
        data,
        views,
        settings=settings,
        optim=OptimSettings(name="adamw", lr=LR, weight_decay=0.0),
        seed=seed,
    )
    trainer.fit()
    return head.predict(x).argmax(1).numpy()


def build_head(method: str, dim: int, k: int, num_samples: int) -> Any:
    """A method's head, with random weights.

    method: of `HEADS`.
    dim: of the features.
    k: number of clusters.
    num_samples: N, for heads that keep something for each sample.
    """
    node = head_node(HEADS[method])
    sizes: dict[str, Any] = {"dim": dim, "num_clusters": k, "num_samples": num_samples}
    if method == "swav":
        parameters = {key: value for key, value in node.items() if key != "_target_"}
        return SinkhornCodes(**sizes, **parameters)
    return build(node, **sizes)


def clusters_of(method: str, x: Tensor, k: int, seed: int) -> np.ndarray:
    """Clusters (N,) of features by a method.

    method: of `NAMES`.
    x: (N, D) float32.
    k: number of clusters.
    seed: of the method.
    """
    with torch.no_grad():
        if method == "kmeans":
            # As a user would who wants the best of it: many restarts, each to its end.
            result = kmeans(x, k, spherical=True, num_restarts=10, num_iters=100, seed=seed)
            return result.labels.numpy()
        if method == "spectral":
            return spectral_clusters(x, k, num_neighbors=15, seed=seed).numpy()
    return by_head(method, x, k, seed)


def compute(cell: Cell, x: Tensor, classes: np.ndarray) -> dict[str, Any]:
    """Scores of one cell, its number of clusters and its seconds of CPU time.

    cell: with a factor.
    x: (N, D) float32 features of its set.
    classes: (N,) of its set.
    """
    assert cell.factor is not None
    # One cluster would be no clustering, however few classes there are.
    k = max(2, round(cell.factor * len(np.unique(classes))))
    start = time.process_time()
    scores = clustering_scores(clusters_of(cell.method, x, k, cell.seed), classes)
    seconds = time.process_time() - start
    return {**{score: scores[score] for score in SCORES}, "clusters": k, "seconds": seconds}


# --- tables -----------------------------------------------------------------------------------


def rows_of(cells: Sequence[Scored]) -> Iterator[tuple[str, float, str, list[dict[str, Any]]]]:
    """Set, factor, method and the scores of its seeds, for each line of the tables, in order."""
    groups: dict[tuple[str, float, str], list[dict[str, Any]]] = {}
    for cell, scores in cells:
        assert cell.factor is not None
        groups.setdefault((cell.data, cell.factor, cell.method), []).append(scores)
    for (data, factor, method), of_seeds in groups.items():
        yield data, factor, method, of_seeds


def markdown(cells: Sequence[Scored]) -> str:
    """A table for each set and number of clusters, then what P2OT and SP2OT are ahead by."""
    lines: list[str] = []
    macro: dict[tuple[str, float], dict[str, float]] = {}
    for data, factor, method, of_seeds in rows_of(cells):
        key = (data, factor)
        if key not in macro:
            macro[key] = {}
            clusters = f"{of_seeds[0]['clusters']} clusters ({factor:g} x classes)"
            lines += ["", f"**{data}**, {clusters}, {len(of_seeds)} seeds", ""]
            lines.append("| | macro ACC | ACC | NMI | macro F1 | head | medium | tail | s |")
            lines.append(table_rule(9))
        macro[key][method] = statistics.mean(scores["macro_acc"] for scores in of_seeds)
        figures = [figure([scores[score] for scores in of_seeds]) for score in SCORES]
        seconds = f"{statistics.mean(scores['seconds'] for scores in of_seeds):.1f}"
        lines.append(table_row([NAMES[method], *figures, seconds]))
    lines += ["", "Against the best of the balanced methods:", "", *_verdicts(macro), ""]
    return "\n".join(lines).lstrip()


def _verdicts(macro: dict[tuple[str, float], dict[str, float]]) -> Iterator[str]:
    """Points of macro accuracy by which P2OT and SP2OT are ahead of the best balanced method.

    macro: mean macro accuracy by method, by set and factor.
    """
    for (data, factor), means in macro.items():
        others = {method: means[method] for method in BALANCED if method in means}
        for method in ("p2ot", "sp2ot"):
            if method in means and others:
                best = max(others, key=lambda name: others[name])
                gain = f"{100 * (means[method] - others[best]):+.1f} macro ACC"
                ahead = f"{NAMES[method]} {gain} against {NAMES[best]}"
                yield f"* {data}, {factor:g} x classes: {ahead}"


def csv_row(scored: Scored) -> list[object]:
    """A line of cells.csv."""
    cell, scores = scored
    figures = [f"{scores[score]:.4f}" for score in SCORES]
    seconds = f"{scores['seconds']:.2f}"
    return [cell.data, cell.factor, cell.seed, cell.method, scores["clusters"], *figures, seconds]


# --- the command ------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes what is missing, then prints everything that is there."""
    parser = comparison_parser(__doc__, "outputs/imbalanced")
    parser.add_argument("--sets", nargs="+", help="the sets to compute now; all if not given")
    parser.add_argument("--methods", nargs="+", choices=list(NAMES), default=list(NAMES))
    parser.add_argument("--factors", nargs="+", type=float, default=list(FACTORS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(arguments)
    files = named_files(options.features)
    for name in options.sets or [*SETS, *files]:
        for seed in options.seeds:
            missing = [
                cell
                for factor in options.factors
                for method in options.methods
                if not (cell := Cell(name, seed, method, factor))
                .file(options.out, ".json")
                .exists()
            ]
            if missing:
                features, classes = features_of(name, seed, options.out, files.get(name))
                compute_all(missing, features, classes, options.out)
    cells = list(finished(options.out, [*SETS, *files]))
    if cells:
        columns = ["data", "factor", "seed", "method", "clusters", *SCORES, "seconds"]
        write_csv(options.out / "cells.csv", columns, map(csv_row, cells))
        publish(options.out / "table.md", markdown(cells))
    return 0


def compute_all(cells: Sequence[Cell], x: Tensor, classes: np.ndarray, out: Path) -> None:
    """Computes cells of one set and writes their scores to their files.

    cells: of the set and one seed.
    x: (N, D) float32 features.
    classes: (N,).
    out: of the comparison.
    """
    for cell in cells:
        scores = compute(cell, x, classes)
        path = cell.file(out, ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(scores))
        line = f"{cell} {100 * scores['macro_acc']:.1f} in {scores['seconds']:.1f} s"
        print(line, file=sys.stderr, flush=True)


def finished(out: Path, names: Sequence[str]) -> Iterator[Scored]:
    """Finished cells with their scores, in the order of the tables.

    out: of the comparison.
    names: of the sets.
    """
    present = {path.name for path in (out / "cells").glob("*.json")}
    for name in names:
        for factor in FACTORS:
            for method in NAMES:
                for seed in range(MAX_SEED):
                    path = Cell(name, seed, method, factor).file(out, ".json")
                    if path.name in present:
                        yield Cell(name, seed, method, factor), json.loads(path.read_text())


if __name__ == "__main__":
    sys.exit(main())
