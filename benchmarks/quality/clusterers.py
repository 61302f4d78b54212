"""Clusterers that train and that do not, on the same frozen features, and label-free choices.

    python -m benchmarks.quality.clusterers --features clothing=clothing.npz

printed the committed tables. Digits and Fashion-MNIST come as features of a SimCLR stage that is
trained once per set and seed, and then frozen; clothing.npz is of `benchmarks.quality.features`.
The number of clusters is that of the classes. Heads train by their own recipe, as
`python train.py data=features head=NAME` does. Tables are printed in Markdown and written to
OUT/table.md, and all figures to OUT/cells.csv.

A finished cell is a file and is read, not computed, the next time; several processes may share one
OUT. Labels are read when the tables are made. A star marks the clustering that a label-free
criterion chooses (--by); the last table says what each criterion's choice costs against the best,
and what one method for all sets costs.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.common import (
    Cell,
    comparison_parser,
    features_of,
    figure,
    named_files,
    publish,
    save_arrays,
    table_row,
    table_rule,
    write_csv,
)
from deepclust import DeepClusterer
from deepclust.clustering.choice import CRITERIA, DEFAULT, choose, criteria
from deepclust.clustering.methods import METHODS, Clustering, cluster
from deepclust.data.features import from_features
from deepclust.errors import UserError
from deepclust.eval import clustering_scores

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
"""Heads see the features alone, and are not evaluated beyond their clusters."""
MORE = {
    "scan": {
        "head.kind": "cosine",
        "head.init": "kmeans",
        "head.num_neighbors": 10,
        "optim.lr": 5e-3,
    },
    "p2ot": {"head.init": "kmeans", "head.view": "strong"},
}
"""Further settings of heads that are made to train a backbone too, which is frozen here."""


# --- clusterings ------------------------------------------------------------------------------


def by_head(head: str, x: np.ndarray, num_clusters: int, seed: int) -> Clustering:
    """Clusters of a head that its own recipe trains on frozen features.

    head: of `HEADS`.
    x: (N, D) float32.
    num_clusters: K.
    seed: of the training.
    """
    # SCAN has no recipe of its own for a single stage.
    recipe = "single" if head == "scan" else f"single_{head}"
    model = DeepClusterer(num_clusters, recipe=recipe, random_state=seed)
    model.set_params(overrides={**QUIET, "head": head, **MORE.get(head, {})})
    model.fit(from_features(x))
    return Clustering(model.labels_, model.confidence_)


def compute(cell: Cell, x: np.ndarray, num_clusters: int, out: Path) -> None:
    """Computes a cell and writes labels, confidences and seconds of CPU time to its file.

    cell: set, seed and method.
    x: (N, D) float32 features of the set.
    num_clusters: K.
    out: of the comparison.
    """
    # CPU time: other processes may be at other cells on the same machine.
    start = time.process_time()
    if cell.method in METHODS:
        result = cluster(cell.method, x, num_clusters, seed=cell.seed)
    else:
        result = by_head(cell.method, x, num_clusters, cell.seed)
    seconds = time.process_time() - start
    path = cell.file(out, ".npz")
    save_arrays(path, labels=result.labels, confidence=result.confidence, seconds=seconds)
    print(f"{cell} in {seconds:.1f} s", file=sys.stderr, flush=True)


# --- figures ----------------------------------------------------------------------------------


@dataclass
class Result:
    """One clustering's figures."""

    cell: Cell
    clusters: int
    seconds: float
    scores: dict[str, float]
    """Against labels, by the names of `SCORES`."""
    criteria: dict[str, float]
    """Without labels, by the names of `CRITERIA`."""
    chosen: dict[str, bool]
    """Whether each criterion chooses this clustering of its set and seed."""


def results(name: str, seed: int, out: Path, file: str | None) -> list[Result]:
    """Figures of all finished cells of a set and seed.

    name: of the set.
    seed: of features and methods.
    out: of the comparison.
    file: of the set's features; None for those of a SimCLR stage.
    """
    cells = [Cell(name, seed, method) for method in NAMES]
    cells = [cell for cell in cells if cell.file(out, ".npz").exists()]
    if not cells:
        return []
    features, classes = features_of(name, seed, out, file)
    contents = {cell.method: np.load(cell.file(out, ".npz")) for cell in cells}
    labels = {method: content["labels"] for method, content in contents.items()}
    measured = criteria(features.numpy(), labels, seed=seed)
    best = {criterion: choose(measured, criterion) for criterion in CRITERIA}
    rows = []
    for cell in cells:
        scores = clustering_scores(labels[cell.method], classes)
        row = Result(
            cell=cell,
            clusters=len(np.unique(labels[cell.method])),
            seconds=float(contents[cell.method]["seconds"]),
            scores={score: scores[score] for score in SCORES},
            criteria=measured[cell.method],
            chosen={criterion: best[criterion] == cell.method for criterion in CRITERIA},
        )
        rows.append(row)
    return rows


def groups(results: Sequence[Result], key: str) -> Iterator[tuple[str, list[Result]]]:
    """Results that share a field of their cells, by its value, in the order in which they come.

    results: to group.
    key: name of a field of `Cell`.
    """
    for value in dict.fromkeys(getattr(result.cell, key) for result in results):
        yield value, [result for result in results if getattr(result.cell, key) == value]


# --- tables -----------------------------------------------------------------------------------


def table(results: Sequence[Result], by: str) -> list[str]:
    """Lines of one table for each set; figures are means over seeds.

    results: of all sets and seeds.
    by: the criterion whose choice gets the star.
    """
    lines: list[str] = []
    for name, of_set in groups(results, "data"):
        seeds = len({result.cell.seed for result in of_set})
        # "-1" says that a set is whole, and is no part of its name for people.
        lines += ["", f"**{name.removesuffix('-1')}**, {seeds} seed{'s' * (seeds > 1)}", ""]
        lines.append("| | clusters | ACC | macro ACC | NMI | ARI | s | chosen |")
        lines.append(table_rule(8))
        for method, rows in groups(of_set, "method"):
            clusters = f"{statistics.mean(row.clusters for row in rows):.3g}"
            figures = [figure([row.scores[score] for row in rows]) for score in SCORES]
            seconds = f"{statistics.mean(row.seconds for row in rows):.1f}"
            star = _star(sum(row.chosen[by] for row in rows), seeds)
            lines.append(table_row([method, clusters, *figures, seconds, star]))
    return lines


def _star(times: int, seeds: int) -> str:
    """A star where a clustering was chosen and, of several seeds, in how many of them."""
    if times == 0:
        return ""
    return "★" if seeds == 1 else f"★ {times} of {seeds}"


def verdicts(results: Sequence[Result]) -> list[str]:
    """Lines of a table: how far each criterion's choice is behind the best, and how it ranks.

    Over all sets and seeds; then the same of one method for all sets, where it is there for all.
    """
    lines = ["", "| criterion | ACC behind the best | NMI behind the best "]
    lines[-1] += "| rank correlation with ACC | with NMI |"
    lines.append(table_rule(5))
    by_set = [
        of_seed for _, of_set in groups(results, "data") for _, of_seed in groups(of_set, "seed")
    ]
    for criterion in CRITERIA:
        chosen = [next(row for row in rows if row.chosen[criterion]) for rows in by_set]
        correlations = [_rank_correlation(by_set, criterion, score) for score in ("acc", "nmi")]
        lines.append(table_row([criterion, *_behind(by_set, chosen), *correlations]))
    for method in NAMES:
        always = [row for rows in by_set for row in rows if row.cell.method == method]
        if len(always) == len(by_set):
            behind = " | ".join(_behind(by_set, always))
            # A method that never looks ranks nothing: no correlations.
            lines.append(f"| always {method} | {behind} | | |")
    return lines


def _rank_correlation(by_set: Sequence[Sequence[Result]], criterion: str, score: str) -> str:
    """Spearman's correlation of a criterion with a score over methods, mean over sets and seeds."""
    from scipy.stats import spearmanr

    ranks = []
    for rows in by_set:
        # Two methods correlate by 1 or -1, whatever they are.
        if len(rows) > 2:
            values = [row.criteria[criterion] for row in rows]
            scores = [row.scores[score] for row in rows]
            correlation: Any = spearmanr(values, scores)
            ranks.append(float(correlation.statistic))
    # A set whose methods are all equal has no correlation; it is left out of the mean.
    return f"{np.nanmean(ranks):.2f}" if ranks else ""


def _behind(by_set: Sequence[Sequence[Result]], chosen: Sequence[Result]) -> list[str]:
    """Mean points of ACC and of NMI by which the chosen are behind the best of their sets."""
    columns = []
    for score in ("acc", "nmi"):
        best = [max(row.scores[score] for row in rows) for rows in by_set]
        behind = [top - row.scores[score] for top, row in zip(best, chosen)]
        columns.append(f"{100 * statistics.mean(behind):.1f}")
    return columns


def csv_row(result: Result) -> list[object]:
    """A line of cells.csv."""
    cell = result.cell
    scores = [f"{result.scores[score]:.4f}" for score in SCORES]
    values = [f"{result.criteria[criterion]:.4f}" for criterion in CRITERIA]
    seconds = f"{result.seconds:.2f}"
    return [cell.data, cell.seed, cell.method, result.clusters, *scores, *values, seconds]


# --- the command ------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes what is missing, then prints all cells of the sets, seeds and methods asked for.

    A missing package leaves a method out.
    """
    parser = comparison_parser(__doc__, "outputs/clusterers")
    parser.add_argument("--sets", nargs="+", help="the sets to look at; all if not given")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--by", choices=CRITERIA, default=DEFAULT)
    options = parser.parse_args(arguments)
    files = named_files(options.features)
    rows: list[Result] = []
    for name in options.sets or [*SETS, *files]:
        for seed in options.seeds:
            compute_missing(name, seed, options.methods, options.out, files.get(name))
            rows += results(name, seed, options.out, files.get(name))
    if rows:
        columns = ["data", "seed", "method", "clusters", *SCORES, *CRITERIA, "seconds"]
        write_csv(options.out / "cells.csv", columns, map(csv_row, rows))
        text = "\n".join([*table(rows, options.by), *verdicts(rows), ""]).lstrip()
        publish(options.out / "table.md", text)
    return 0


def compute_missing(
    name: str,
    seed: int,
    methods: Sequence[str],
    out: Path,
    file: str | None,
) -> None:
    """Computes the cells of a set and seed that are not there yet.

    name: of the set.
    seed: of features and methods.
    methods: of `NAMES`.
    out: of the comparison.
    file: of the set's features; None for those of a SimCLR stage.
    """
    for method in methods:
        cell = Cell(name, seed, method)
        if cell.file(out, ".npz").exists():
            continue
        features, classes = features_of(name, seed, out, file)
        try:
            compute(cell, features.numpy(), len(np.unique(classes)), out)
        except UserError as error:
            print(f"{cell} is left out: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
