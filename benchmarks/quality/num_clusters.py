"""True and estimated numbers of clusters, on subsets of classes so that the truth varies.

    python -m benchmarks.quality.num_clusters --features clothing=clothing.npz \\
        --features fashion-lite0=fashion_lite0.npz

printed the committed tables. Compared with EVoC and UMAP + HDBSCAN, as they come, on the same
features; a missing package leaves its columns out. Sets: pixels of digits, features of SimCLR
(trained once and kept) of digits and Fashion-MNIST, balanced and thinned to imbalance 10, Gaussian
blobs of 3 to 40 clusters, and files of `benchmarks.quality.features`. Of each set with ten classes
also draws of 4, 6 and 8 of them. Estimates see features alone.

The estimate's criteria and their combination were chosen on some of the cases (`Case.held_out` is
False for them); the others were left alone until then and have their own line.

ARI and NMI count each image that is called noise as a cluster of its own (which NMI forgives more
than ARI). Ours are of the clusterer `diffusion` at the estimated number. Tables are printed in
Markdown and written to OUT/table.md. A finished cell is a file; it is read, not computed, the next
time.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality.common import (
    comparison_parser,
    named_files,
    publish,
    save_arrays,
    table_row,
    table_rule,
)
from benchmarks.quality.num_clusters_cases import Case, cases, rows_of
from deepclust.clustering.methods import cluster
from deepclust.clustering.number import CRITERIA, estimate_num_clusters
from deepclust.errors import UserError
from deepclust.eval import clustering_scores

NAMES = {"ours": "ours", "evoc": "EVoC", "umap_hdbscan": "UMAP + HDBSCAN"}
SLACK = 1e-9
"""Allowed beyond a bound on a factor: 10 / 8 must count as within 25 % whatever the rounding."""


# --- methods ----------------------------------------------------------------------------------


def ours(x: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Labels of the default clustering at the estimated number, and the estimate's fields."""
    start = time.process_time()
    number = estimate_num_clusters(x)
    fields = ("k", "low", "high", "sure", "statement", "votes")
    facts = {name: getattr(number, name) for name in fields}
    facts["estimate_seconds"] = time.process_time() - start
    return cluster("diffusion", x, number.k).labels, facts


def evoc(x: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Labels of EVoC with its defaults, -1 for noise.

    Raises UserError where its package is missing.
    """
    try:
        from evoc import EVoC  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("EVoC needs its package: pip install evoc") from error
    rows = np.ascontiguousarray(x, dtype=np.float32)
    return np.asarray(EVoC(random_state=0).fit_predict(rows)), {}


def umap_hdbscan(x: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """Labels of HDBSCAN on a map by UMAP, -1 for noise; the number of clusters is HDBSCAN's own."""
    return cluster("umap_hdbscan", x, None).labels, {}


METHODS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, dict[str, Any]]]] = {
    "ours": ours,
    "evoc": evoc,
    "umap_hdbscan": umap_hdbscan,
}


def compute(case: Case, method: str, x: np.ndarray, path: Path) -> None:
    """Computes a case and writes labels, and what else the method reports, to a file.

    case: for the line that is printed.
    method: of `METHODS`.
    x: (n, D) float32 features.
    path: of the cell.
    """
    start = time.process_time()
    labels, facts = METHODS[method](x)
    facts["seconds"] = time.process_time() - start
    save_arrays(path, labels=labels, facts=json.dumps(facts))
    line = f"{case} {method}: {labels.max() + 1} in {facts['seconds']:.1f} s"
    print(line, file=sys.stderr, flush=True)


# --- figures ----------------------------------------------------------------------------------


@dataclass
class Result:
    """One method's clustering of one case, scored."""

    k: int
    """Its number of clusters."""
    noise: float
    """Share of images without a cluster."""
    ari: float
    nmi: float
    facts: dict[str, Any]
    """What the method reports beside its labels."""


Results = dict[Case, dict[str, Result]]
"""By case and method."""


def result(path: Path, classes: np.ndarray) -> Result:
    """A finished cell's figures; each image of noise counts as a cluster of its own.

    path: of the cell.
    classes: (n,) of the case.
    """
    with np.load(path) as content:
        labels = content["labels"].astype(np.int64)
        facts = json.loads(str(content["facts"]))
    noise = labels < 0
    k = len(np.unique(labels[~noise]))
    # Counted before: the clusters made up for noise must not be among k.
    labels[noise] = labels.max() + 1 + np.arange(noise.sum())
    scores = clustering_scores(labels, classes)
    k = facts.get("k", k)
    return Result(k, float(noise.mean()), scores["ari"], scores["nmi"], facts)


def halves(results: Results) -> dict[str, list[Case]]:
    """Cases by kind (images, blobs) and by whether they were looked at during development."""
    parts: dict[str, list[Case]] = {}
    for kind in ("images", "blobs"):
        of_kind = [case for case in results if ("blobs" in case.data) == (kind == "blobs")]
        looked_at = [case for case in of_kind if not case.held_out]
        held_out = [case for case in of_kind if case.held_out]
        parts |= {f"{kind}, looked at": looked_at, f"{kind}, held out": held_out}
    return {name: part for name, part in parts.items() if part}


def factors(ks: Sequence[int], cases: Sequence[Case]) -> np.ndarray:
    """(n,) factors >= 1 by which numbers are off; twice too many counts as half of them does.

    ks: a number for each case.
    cases: with the true numbers.
    """
    truth = np.array([case.classes for case in cases])
    # A method may find no cluster at all, and 0 has no logarithm.
    return np.exp(np.abs(np.log(np.maximum(ks, 1e-3) / truth)))


def _mean_factor(off: np.ndarray) -> float:
    """Geometric mean of factors."""
    return float(np.exp(np.log(off).mean()))


# --- tables -----------------------------------------------------------------------------------


def table(results: Results, methods: Sequence[str]) -> list[str]:
    """Lines of a table with one row per case.

    results: of all cases.
    methods: its columns; `ours` must be among them.
    """
    others = [method for method in methods if method != "ours"]
    columns = ["", "classes", "draw", "held out", "ours", "range", "sure"]
    for method in others:
        columns += [NAMES[method], f"{NAMES[method]} noise"]
    columns += [f"{score}: {NAMES[method]}" for score in ("ARI", "NMI") for method in methods]
    lines = [table_row(columns), table_rule(len(columns))]
    for case, by_method in results.items():
        facts = by_method["ours"].facts
        cells = [case.data, str(case.classes), str(case.draw), "yes" if case.held_out else ""]
        cells += [str(facts["k"]), f"{facts['low']}-{facts['high']}", facts["sure"]]
        for method in others:
            cells += [str(by_method[method].k), f"{100 * by_method[method].noise:.0f} %"]
        for score in ("ari", "nmi"):
            cells += [f"{100 * getattr(by_method[method], score):.1f}" for method in methods]
        lines.append(table_row(cells))
    return lines


def summary(results: Results, methods: Sequence[str]) -> list[str]:
    """Lines of a table: how far off each method is, in the cases looked at and in the others.

    results: of all cases.
    methods: one row each for every half of the cases.
    """
    columns = ["cases", "", "off by a factor of", "exact", "within 25 %", "within a factor of 2"]
    columns += ["noise", "ARI", "NMI"]
    lines = [table_row(columns), table_rule(len(columns))]
    for name, part in halves(results).items():
        for method in methods:
            of_method = [results[case][method] for case in part]
            off = factors([each.k for each in of_method], part)
            cells = [f"{name} ({len(part)})", NAMES[method], f"{_mean_factor(off):.2f}"]
            cells += [f"{100 * np.mean(off <= most + SLACK):.0f} %" for most in (1, 1.25, 2)]
            cells.append(f"{100 * np.mean([each.noise for each in of_method]):.0f} %")
            cells.append(f"{100 * np.mean([each.ari for each in of_method]):.1f}")
            cells.append(f"{100 * np.mean([each.nmi for each in of_method]):.1f}")
            lines.append(table_row(cells))
    return lines


def alone(results: Results) -> list[str]:
    """Lines of a table: how far off each criterion's vote alone is; the last row always says 7."""
    parts = halves(results)
    lines = [table_row(["off by a factor of (within 25 %)", *parts]), table_rule(len(parts) + 1)]
    guesses: dict[str, Callable[[dict[str, Any]], int]] = {}
    for criterion in CRITERIA:
        # Without a vote (too few images) the estimate itself stands for the criterion.
        guesses[criterion] = lambda facts, name=criterion: facts["votes"].get(name, facts["k"])
    guesses["all together"] = lambda facts: facts["k"]
    # About the geometric mean of 4, 6, 8 and 10, the numbers of classes of the images.
    guesses["always 7"] = lambda facts: 7
    for name, guess in guesses.items():
        cells = []
        for part in parts.values():
            off = factors([guess(results[case]["ours"].facts) for case in part], part)
            within = 100 * np.mean(off <= 1.25 + SLACK)
            cells.append(f"{_mean_factor(off):.2f} ({within:.0f} %)")
        lines.append(table_row([name, *cells]))
    return lines


def honesty(results: Results) -> list[str]:
    """Lines of a table: how often k is right and in the range, by `sure`, in held-out cases."""
    columns = ["held out, sure", "cases", "exact", "within 25 %", "truth in the range"]
    columns.append("range, high / low")
    lines = [table_row(columns), table_rule(len(columns))]
    held_out = [case for case in results if case.held_out]
    for sure in ("clear", "likely", "unclear"):
        part = [case for case in held_out if results[case]["ours"].facts["sure"] == sure]
        if not part:
            continue
        facts = [results[case]["ours"].facts for case in part]
        off = factors([each["k"] for each in facts], part)
        inside = [each["low"] <= case.classes <= each["high"] for case, each in zip(part, facts)]
        widths = np.array([each["high"] / each["low"] for each in facts])
        shares = [np.mean(off <= 1 + SLACK), np.mean(off <= 1.25 + SLACK), np.mean(inside)]
        figures = [f"{100 * share:.0f} %" for share in shares]
        lines.append(table_row([sure, str(len(part)), *figures, f"{_mean_factor(widths):.2f}"]))
    return lines


# --- the command ------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes what is missing, then prints everything that is there."""
    parser = comparison_parser(__doc__, "outputs/numbers")
    parser.add_argument("--sets", nargs="+", help="the sets to look at; all that can be had else")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    options = parser.parse_args(arguments)
    files = named_files(options.features)
    results: Results = {}
    missing: set[str] = set()
    for case in cases(files):
        if options.sets and case.data not in options.sets:
            continue
        x, classes = rows_of(case, options.out, files.get(case.data))
        for method in options.methods:
            # "unequal blobs" is a set's name, and no good one for a file.
            path = options.out / "cells" / f"{case}_{method}.npz".replace(" ", "-")
            try:
                if not path.exists():
                    compute(case, method, x, path)
                results.setdefault(case, {})[method] = result(path, classes)
            except UserError as error:
                print(f"{method} is left out: {error}", file=sys.stderr)
                missing.add(method)
    methods = [method for method in options.methods if method not in missing]
    # Ranges and votes are of our estimate: without it there is no table.
    if results and "ours" in methods:
        tables = (
            table(results, methods),
            summary(results, methods),
            alone(results),
            honesty(results),
        )
        text = "\n\n".join("\n".join(lines) for lines in tables) + "\n"
        publish(options.out / "table.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
