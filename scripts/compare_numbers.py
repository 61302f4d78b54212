"""True and estimated numbers of clusters, on subsets of classes so that the truth varies: Markdown, also OUT/table.md.

    python scripts/compare_numbers.py --out outputs/numbers
    python scripts/compare_numbers.py --out outputs/numbers --features clothing=clothing.npz --features \\
        fashion-lite0=fashion_lite0.npz

Sets: pixels of digits, features of SimCLR (trained once and kept) of digits and Fashion-MNIST, balanced and thinned to
imbalance 10, Gaussian blobs of 3 to 40 clusters, and files that scripts/extract_features.py wrote. Of each set with ten
classes also draws of 4, 6 and 8 of them. Estimates see features alone.

The estimate's criteria and their combination were chosen on some of the cases (`Case.held_out` is False for them);
the others were left alone until then and have their own line.

Compared with EVoC and UMAP + HDBSCAN, as they come, on the same features; a missing package leaves its columns out.
ARI and NMI count each image that they call noise as a cluster of its own (which NMI forgives more than ARI). Ours are
of the clusterer `diffusion` at the estimated number. A finished cell is a file; it is read, not computed, next time.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from compare_imbalanced import features_of

from deepclust.clusterers import cluster
from deepclust.errors import UserError
from deepclust.eval import clustering_scores
from deepclust.eval.number import CRITERIA, estimate_num_clusters
from deepclust.run_folder import write_atomic

SETS = ("clothing", "digits", "digits-simclr", "fashion-lite0", "fashion-simclr")
"""Sets of ten classes, of which subsets are drawn as well; the two of them that are files must be given."""
LONG_TAILS = ("digits-10", "fashion_mnist-10")
SIMCLR = {"digits-simclr": "digits-1", "fashion-simclr": "fashion_mnist-1"} | {name: name for name in LONG_TAILS}
SUBSETS = (4, 6, 8)
BLOBS = {3: 16, 5: 32, 8: 64, 20: 128, 40: 24}
"""Numbers of blobs and their dimensions in the draw that was looked at; 48 in the other."""
MAX_ROWS = {"subset": 1500, "whole": 3500}
NAMES = {"ours": "ours", "evoc": "EVoC", "umap_hdbscan": "UMAP + HDBSCAN"}


@dataclass(frozen=True)
class Case:
    """A set and how many of its classes; draw: which of them."""

    data: str
    classes: int
    draw: int = 0

    @property
    def held_out(self) -> bool:
        """Whether it was left alone while the estimate was built."""
        if self.data in ("digits", "fashion-lite0"):
            return False
        return self.draw == 1 or self.data not in ("clothing", "blobs", "unequal blobs") or self.classes == 10

    def __str__(self) -> str:
        return f"{self.data}_{self.classes}_{self.draw}"


def cases(files: dict[str, str]) -> list[Case]:
    """All that can be had with the files given."""
    found: list[Case] = []
    for name in (*SETS, *(name for name in files if name not in SETS)):
        if name in files or name == "digits" or name in SIMCLR:
            found += [Case(name, 10), *(Case(name, classes, draw) for classes in SUBSETS for draw in (0, 1))]
    found += [Case(name, 10) for name in LONG_TAILS]
    return found + [Case(kind, k, draw) for kind in ("blobs", "unequal blobs") for k in BLOBS for draw in (0, 1)]


# --- data -----------------------------------------------------------------------------------------------------------


def rows_of(case: Case, out: Path, file: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Features (n, D) and classes (n,) of a case."""
    if "blobs" in case.data:
        return blobs(case.classes, case.data == "blobs", case.draw)
    x, classes = whole(case.data, out, file)
    names = np.unique(classes)
    if case.classes < len(names):
        number = SETS.index(case.data) + 1 if case.data in SETS else len(SETS) + len(case.data)
        kept = np.random.default_rng([number, case.classes, case.draw]).permutation(len(names))[: case.classes]
        mine = np.isin(classes, names[kept])
        x, classes = x[mine], classes[mine]
    most = MAX_ROWS["subset" if case.classes < len(names) else "whole"]
    if len(x) > most:
        drawn = np.sort(np.random.default_rng(0).permutation(len(x))[:most])
        x, classes = x[drawn], classes[drawn]
    return x, classes


@cache
def whole(name: str, out: Path, file: str | None) -> tuple[np.ndarray, np.ndarray]:
    """Features and classes of a set, the first 5,000."""
    if name == "digits" and file is None:
        from sklearn.datasets import load_digits

        pixels, classes = load_digits(return_X_y=True)
        return pixels.astype(np.float32), classes
    features, classes = features_of(SIMCLR.get(name, name), 0, out, file)
    return features.numpy()[:5000], classes[:5000]


def blobs(num_clusters: int, equal: bool, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """Some 1,500 points of Gaussians whose centres and spreads are drawn too; unequal: sizes fall to a twelfth."""
    random = np.random.default_rng([num_clusters, 8 if equal else 10, draw])
    dim = 48 if draw else BLOBS[num_clusters]
    sizes = np.geomspace(1, 1 if equal else 1 / 12, num_clusters)
    sizes = np.maximum((1500 * sizes / sizes.sum()).round().astype(int), 8)
    centers = random.normal(size=(num_clusters, dim))
    spreads = random.uniform(0.5, 1.0, size=num_clusters) * (1.25 if draw else 1.0)
    labels = np.repeat(np.arange(num_clusters), sizes)
    noise = random.normal(size=(len(labels), dim)) * spreads[labels, None]
    return (centers[labels] + noise).astype(np.float32), labels


# --- methods --------------------------------------------------------------------------------------------------------


def ours(x: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """The estimate, and the default clustering at it."""
    began = time.process_time()
    found = estimate_num_clusters(x)
    facts = {name: getattr(found, name) for name in ("k", "low", "high", "sure", "statement", "votes")}
    facts["estimate_seconds"] = time.process_time() - began
    return cluster("diffusion", x, found.k).labels, facts


def evoc(x: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """EVoC with its defaults."""
    try:
        from evoc import EVoC  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("EVoC needs its package: pip install evoc") from error
    return np.asarray(EVoC(random_state=0).fit_predict(np.ascontiguousarray(x, dtype=np.float32))), {}


def umap_hdbscan(x: np.ndarray) -> tuple[np.ndarray, dict[str, Any]]:
    """HDBSCAN's own number of clusters on a map by UMAP."""
    return cluster("umap_hdbscan", x, None).labels, {}


METHODS: dict[str, Callable[[np.ndarray], tuple[np.ndarray, dict[str, Any]]]] = {
    "ours": ours,
    "evoc": evoc,
    "umap_hdbscan": umap_hdbscan,
}


def compute(case: Case, method: str, x: np.ndarray, path: Path) -> None:
    """Leaves the labels and what else there is to say in a file."""
    began = time.process_time()
    labels, facts = METHODS[method](x)
    facts["seconds"] = time.process_time() - began
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.npz")
    np.savez_compressed(part, labels=labels, facts=json.dumps(facts))
    part.replace(path)
    print(f"{case} {method}: {labels.max() + 1} in {facts['seconds']:.1f} s", file=sys.stderr, flush=True)


# --- tables ---------------------------------------------------------------------------------------------------------


@dataclass
class Result:
    """What one method found: noise is the share of images without a cluster; facts: what it says besides."""

    k: int
    noise: float
    ari: float
    nmi: float
    facts: dict[str, Any]


def result(path: Path, classes: np.ndarray) -> Result:
    """A finished cell's figures; each noise image counts as a cluster of its own."""
    with np.load(path) as content:
        labels, facts = content["labels"].astype(np.int64), json.loads(str(content["facts"]))
    noise, k = labels < 0, len(np.unique(labels[labels >= 0]))
    labels[noise] = labels.max() + 1 + np.arange(noise.sum())
    scores = clustering_scores(labels, classes)
    return Result(facts.get("k", k), float(noise.mean()), scores["ari"], scores["nmi"], facts)


def table(found: dict[Case, dict[str, Result]], methods: Sequence[str]) -> list[str]:
    """One line per case."""
    others = [method for method in methods if method != "ours"]
    columns = ["", "classes", "draw", "held out", "ours", "range", "sure"]
    columns += [f"{NAMES[method]}{what}" for method in others for what in ("", " noise")]
    columns += [f"{score}: {NAMES[method]}" for score in ("ARI", "NMI") for method in methods]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for case, by in found.items():
        facts = by["ours"].facts
        cells = [case.data, str(case.classes), str(case.draw), "yes" if case.held_out else ""]
        cells += [str(facts["k"]), f"{facts['low']}-{facts['high']}", facts["sure"]]
        cells += [cell for method in others for cell in (str(by[method].k), f"{100 * by[method].noise:.0f} %")]
        cells += [f"{100 * getattr(by[method], score):.1f}" for score in ("ari", "nmi") for method in methods]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def halves(found: dict[Case, dict[str, Result]]) -> dict[str, list[Case]]:
    """The cases by whether they were looked at and whether they are images."""
    parts: dict[str, list[Case]] = {}
    for what, blob in (("images", False), ("blobs", True)):
        for how, held in (("looked at", False), ("held out", True)):
            mine = [case for case in found if case.held_out == held and ("blobs" in case.data) == blob]
            parts |= {f"{what}, {how}": mine} if mine else {}
    return parts


def factors(ks: Sequence[int], mine: Sequence[Case]) -> np.ndarray:
    """By what factor, 1 or more, each number is off."""
    truth = np.array([case.classes for case in mine])
    return np.exp(np.abs(np.log(np.maximum(ks, 1e-3) / truth)))


def alone(found: dict[Case, dict[str, Result]]) -> list[str]:
    """How far off each criterion would be by itself, and a number that never looks."""
    parts = halves(found)
    lines = ["| off by a factor of (within 25 %) | " + " | ".join(parts) + " |", "|" + " --- |" * (len(parts) + 1)]
    guesses: dict[str, Callable[[dict[str, Any]], int]] = {
        name: lambda facts, name=name: facts["votes"].get(name, facts["k"]) for name in CRITERIA
    }
    guesses |= {"all together": lambda facts: facts["k"], "always 7": lambda facts: 7}
    for name, guess in guesses.items():
        cells = []
        for mine in parts.values():
            off = factors([guess(found[case]["ours"].facts) for case in mine], mine)
            cells.append(f"{np.exp(np.log(off).mean()):.2f} ({100 * np.mean(off <= 1.25 + 1e-9):.0f} %)")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def summary(found: dict[Case, dict[str, Result]], methods: Sequence[str]) -> list[str]:
    """How far off each method is, in the cases that were looked at and in the others."""
    head = ["cases", "", "off by a factor of", "exact", "within 25 %", "within a factor of 2", "noise", "ARI", "NMI"]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for name, mine in halves(found).items():
        for method in methods:
            off = factors([found[case][method].k for case in mine], mine)
            cells = [f"{name} ({len(mine)})", NAMES[method], f"{np.exp(np.log(off).mean()):.2f}"]
            cells += [f"{100 * np.mean(off <= most + 1e-9):.0f} %" for most in (1, 1.25, 2)]
            means = [np.mean([getattr(found[case][method], what) for case in mine]) for what in ("noise", "ari", "nmi")]
            cells += [f"{100 * means[0]:.0f} %", *(f"{100 * mean:.1f}" for mean in means[1:])]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def honesty(found: dict[Case, dict[str, Result]]) -> list[str]:
    """Whether `sure` and the range keep what they promise, over the held-out cases."""
    lines = ["| held out, sure | cases | exact | within 25 % | truth in the range | range, high / low |"]
    lines += ["|" + " --- |" * 6]
    held = [(case, by["ours"].facts) for case, by in found.items() if case.held_out]
    for sure in ("clear", "likely", "unclear"):
        mine = [(case.classes, facts) for case, facts in held if facts["sure"] == sure]
        if mine:
            off = np.array([abs(np.log(facts["k"] / k)) for k, facts in mine])
            inside = np.mean([facts["low"] <= k <= facts["high"] for k, facts in mine])
            width = np.exp(np.mean([np.log(facts["high"] / facts["low"]) for _, facts in mine]))
            shares = [np.mean(off < 1e-9), np.mean(off <= np.log(1.25) + 1e-9), inside]
            figures = " | ".join(f"{100 * share:.0f} %" for share in shares)
            lines.append(f"| {sure} | {len(mine)} | {figures} | {width:.2f} |")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes what is missing, then prints everything that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("outputs/numbers"))
    parser.add_argument("--features", action="append", default=[], help="NAME=FILE.npz, with labels")
    parser.add_argument("--sets", nargs="+", help="the sets to look at; all that can be had if not given")
    parser.add_argument("--methods", nargs="+", choices=NAMES, default=list(NAMES))
    asked = parser.parse_args(arguments)
    files: dict[str, str] = dict(word.split("=", 1) for word in asked.features)
    found: dict[Case, dict[str, Result]] = {}
    missing: set[str] = set()
    for case in cases(files):
        if asked.sets and case.data not in asked.sets:
            continue
        x, classes = rows_of(case, asked.out, files.get(case.data))
        for method in asked.methods:
            path = asked.out / "cells" / f"{case}_{method}.npz".replace(" ", "-")
            try:
                if not path.exists():
                    compute(case, method, x, path)
                found.setdefault(case, {})[method] = result(path, classes)
            except UserError as error:
                print(f"{method} is left out: {error}", file=sys.stderr)
                missing.add(method)
    methods = [method for method in asked.methods if method not in missing]
    if found and "ours" in methods:
        parts = (table(found, methods), summary(found, methods), alone(found), honesty(found))
        text = "\n\n".join("\n".join(part) for part in parts) + "\n"
        write_atomic(asked.out / "table.md", text)
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
