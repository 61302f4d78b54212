"""Clusterers that train and that do not, all on the same frozen features: Markdown on stdout, table.md and cells.csv.

    python -m benchmarks.quality.clusterers --out outputs/clusterers
    python -m benchmarks.quality.clusterers --out outputs/clusterers --features clothing=clothing.npz --sets clothing

Digits and Fashion-MNIST come as features of a SimCLR stage that is trained once per set and seed, and then frozen.
--features NAME=FILE adds a file of features and labels, as benchmarks/quality/features.py writes it. The number of
clusters is that of the classes. Heads train by their own recipe, as `python train.py data=features head=NAME` does.

A finished cell is a file and is read, not computed, the next time; several processes may share one OUT. Labels are read
when the tables are made. A star marks the clustering that a label-free criterion chooses (--by); the second table says
what each criterion's choice costs against the best, and what one method for all sets costs.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from benchmarks.quality.imbalanced import features_of, figure
from deepclust import DeepClusterer
from deepclust.clusterers import METHODS, Clustering, cluster
from deepclust.data.features import from_features
from deepclust.errors import UserError
from deepclust.eval import clustering_scores
from deepclust.eval.choice import CRITERIA, DEFAULT, choose, criteria
from deepclust.run_folder import write_atomic

SETS = ("digits-1", "fashion_mnist-1")
"""The last number is the imbalance; 1: none."""
SCORES = ("acc", "macro_acc", "nmi", "ari")
HEADS = ("temi", "scan", "p2ot")
NAMES = (*METHODS, *HEADS)
QUIET = {
    "augment": "features",
    "backbone": "identity",
    "eval.probes": False,
    "eval.calibration": False,
    "eval.gallery_images": 1,
    "trainer.num_threads": 1,
}


@dataclass(frozen=True)
class Cell:
    """One clustering: a set, a seed and a method."""

    data: str
    seed: int
    method: str

    def file(self, out: Path) -> Path:
        """Where its clusters are kept."""
        return out / "cells" / f"{self.data}_{self.seed}_{self.method}.npz"


def by_head(head: str, x: np.ndarray, num_clusters: int, seed: int) -> Clustering:
    """Clusters of a head that its own recipe trains on features (N, D)."""
    model = DeepClusterer(num_clusters, recipe=f"single_{head}" if head != "scan" else "single", random_state=seed)
    model.set_params(overrides={**QUIET, "head": head, **MORE.get(head, {})})
    model.fit(from_features(x))
    return Clustering(model.labels_, model.confidence_)


MORE = {
    "scan": {"head.kind": "cosine", "head.init": "kmeans", "head.num_neighbors": 10, "optim.lr": 5e-3},
    "p2ot": {"head.init": "kmeans", "head.view": "strong"},
}
"""What heads that are no clusterers of frozen features by themselves are told besides."""


def compute(cell: Cell, x: np.ndarray, num_clusters: int, out: Path) -> None:
    """Leaves a cell's labels, confidences and seconds of processor time in its file."""
    began = time.process_time()
    if cell.method in METHODS:
        found = cluster(cell.method, x, num_clusters, seed=cell.seed)
    else:
        found = by_head(cell.method, x, num_clusters, cell.seed)
    seconds = time.process_time() - began
    path = cell.file(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, labels=found.labels, confidence=found.confidence, seconds=seconds)
    part.replace(path)
    print(f"{cell} in {seconds:.1f} s", file=sys.stderr, flush=True)


@dataclass
class Result:
    """One clustering's figures against labels and without them, and whether each criterion chooses it."""

    cell: Cell
    clusters: int
    seconds: float
    scores: dict[str, float]
    criteria: dict[str, float]
    chosen: dict[str, bool]


def results(name: str, seed: int, out: Path, file: str | None) -> list[Result]:
    """Figures of all finished cells of a set and seed."""
    cells = [cell for cell in (Cell(name, seed, method) for method in NAMES) if cell.file(out).exists()]
    if not cells:
        return []
    x, classes = _set(name, seed, out, file)
    kept = {cell.method: np.load(cell.file(out)) for cell in cells}
    labels = {method: content["labels"] for method, content in kept.items()}
    measured = criteria(x, labels, seed=seed)
    best = {criterion: choose(measured, criterion) for criterion in CRITERIA}
    return [
        Result(
            cell,
            len(np.unique(labels[cell.method])),
            float(kept[cell.method]["seconds"]),
            {score: clustering_scores(labels[cell.method], classes)[score] for score in SCORES},
            measured[cell.method],
            {criterion: best[criterion] == cell.method for criterion in CRITERIA},
        )
        for cell in cells
    ]


@cache
def _set(name: str, seed: int, out: Path, file: str | None) -> tuple[np.ndarray, np.ndarray]:
    features, classes = features_of(name, seed, out, file)
    return features.numpy(), classes


def groups(found: Sequence[Result], key: str) -> Iterator[tuple[str, list[Result]]]:
    """Results by set or by method, in the order in which they come."""
    for value in dict.fromkeys(getattr(each.cell, key) for each in found):
        yield value, [each for each in found if getattr(each.cell, key) == value]


def table(found: Sequence[Result], by: str) -> list[str]:
    """A table for each set; figures are means over seeds."""
    lines: list[str] = []
    for name, of_set in groups(found, "data"):
        seeds = len({each.cell.seed for each in of_set})
        lines += ["", f"**{name.removesuffix('-1')}**, {seeds} seed{'s' * (seeds > 1)}", ""]
        lines += ["| | clusters | ACC | macro ACC | NMI | ARI | s | chosen |", "|" + " --- |" * 8]
        for method, rows in groups(of_set, "method"):
            figures = [figure([each.scores[score] for each in rows]) for score in SCORES]
            clusters = f"{statistics.mean(each.clusters for each in rows):.3g}"
            times = sum(each.chosen[by] for each in rows)
            star = "★" if times and seeds == 1 else f"★ {times} of {seeds}" if times else ""
            seconds = f"{statistics.mean(each.seconds for each in rows):.1f}"
            lines.append(f"| {method} | {clusters} | {' | '.join(figures)} | {seconds} | {star} |")
    return lines


def verdicts(found: Sequence[Result]) -> list[str]:
    """How far behind the best each criterion's choice is, and how it ranks clusterings, over sets and seeds.

    Then the same of one method for all sets, where it is there for all.
    """
    from scipy.stats import spearmanr

    lines = ["", "| criterion | ACC behind the best | NMI behind the best | rank correlation with ACC | with NMI |"]
    lines += ["|" + " --- |" * 5]
    sets = [of_seed for _, of_set in groups(found, "data") for _, of_seed in groups(of_set, "seed")]
    for criterion in CRITERIA:
        columns = _behind(sets, [next(each for each in rows if each.chosen[criterion]) for rows in sets])
        for score in ("acc", "nmi"):
            pairs = [([r.criteria[criterion] for r in rows], [r.scores[score] for r in rows]) for rows in sets]
            ranks = [float(spearmanr(*pair).statistic) for pair in pairs if len(pair[0]) > 2]
            columns.append(f"{np.nanmean(ranks):.2f}" if ranks else "")
        lines.append(f"| {criterion} | {' | '.join(columns)} |")
    for method in NAMES:
        always = [each for rows in sets for each in rows if each.cell.method == method]
        if len(always) == len(sets):
            lines.append(f"| always {method} | {' | '.join(_behind(sets, always))} | | |")
    return lines


def _behind(sets: Sequence[Sequence[Result]], chosen: Sequence[Result]) -> list[str]:
    """Points of ACC and of NMI by which the chosen are behind the best of their sets, in the mean."""
    columns = []
    for score in ("acc", "nmi"):
        best = [max(each.scores[score] for each in rows) for rows in sets]
        columns.append(f"{100 * statistics.mean(top - each.scores[score] for top, each in zip(best, chosen)):.1f}")
    return columns


def write_csv(path: Path, found: Sequence[Result]) -> None:
    """One line per cell."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["data", "seed", "method", "clusters", *SCORES, *CRITERIA, "seconds"])
        for each in found:
            place = [each.cell.data, each.cell.seed, each.cell.method, each.clusters]
            figures = [f"{each.scores[score]:.4f}" for score in SCORES]
            writer.writerow([*place, *figures, *(f"{each.criteria[c]:.4f}" for c in CRITERIA), f"{each.seconds:.2f}"])


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes what is missing, then prints everything that is there. A missing package leaves a method out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/clusterers"))
    parser.add_argument("--features", action="append", default=[], help="NAME=FILE.npz, with labels")
    parser.add_argument("--sets", nargs="+", help="the sets to look at; all if not given")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--by", choices=CRITERIA, default=DEFAULT)
    asked = parser.parse_args(arguments)
    files: dict[str, str] = dict(word.split("=", 1) for word in asked.features)
    found: list[Result] = []
    for name in asked.sets or [*SETS, *files]:
        for seed in asked.seeds:
            for method in asked.methods:
                cell = Cell(name, seed, method)
                if not cell.file(asked.out).exists():
                    x, classes = _set(name, seed, asked.out, files.get(name))
                    try:
                        compute(cell, x, len(np.unique(classes)), asked.out)
                    except UserError as error:
                        print(f"{cell} is left out: {error}", file=sys.stderr)
            found += results(name, seed, asked.out, files.get(name))
    if found:
        text = "\n".join([*table(found, asked.by), *verdicts(found), ""]).lstrip()
        write_csv(asked.out / "cells.csv", found)
        write_atomic(asked.out / "table.md", text)
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
