"""How far confidences can be trusted: raw heads, constants, temperatures, calibration heads.

    python -m benchmarks.quality.calibration --features clothing_lite0.npz

printed the committed tables; `benchmarks.quality.features` writes such a file.
Fashion-MNIST's 10,000 test images go through the ordinary recipe (SimCLR, SCAN, self-labelling);
rows of a file through SCAN and self-labelling. From the same weights then start two calibration
heads: around self-labelling of the SCAN clusters, and as the paper has it, both heads from k-means.
No choice sees a label. Rows of the tables:

- raw head: the head's own probabilities
- constant confidence: the accuracy estimated without labels, for every image
- temperature scaling, label-free: probabilities whose mean is that estimate
- calibration head: its probabilities, and those of the clustering head beneath it

What is done is kept in `--out`, so that a stopped comparison goes on; the tables are written to it
as Markdown and CSV.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch

from benchmarks.quality.common import table_row, table_rule, write_csv
from deepclust.config.build import build
from deepclust.config.load import load
from deepclust.config.run_config import RunConfig
from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.image_set import ImageSet
from deepclust.data.views.transform import ViewTransform, build_views
from deepclust.eval.confidence import Reference, confidence_report, reference_clusterings
from deepclust.heads import Head
from deepclust.heads.calibration import Calibration
from deepclust.heads.selflabel import SelfLabel
from deepclust.model import Network, build_network
from deepclust.runtime import checkpoint
from deepclust.training.recipe import train
from deepclust.training.trainer import Trainer

QUIET = ("eval.baselines=none", "eval.probes=false", "trainer.num_threads=1")
SCORES = ("acc", "confidence", "ece", "adaptive_ece", "brier", "nll", "auroc", "aurc")
ESTIMATES = ("accuracy", "accuracy_error", "ece", "ece_error")
COLUMNS = (*SCORES, *(f"estimated_{name}" for name in ESTIMATES), "seconds")
UNSCALED = ("brier", "nll", "seconds")
"""Columns that are no percentages."""
NAMES = {
    "selflabel/predicted": "self-labelling: raw head",
    "selflabel/constant": "… constant confidence (estimated accuracy)",
    "selflabel/temperature": "… temperature scaling, label-free",
    "calibration/predicted": "… calibration head around it",
    "calibration/uncalibrated": "… its clustering head",
    "kmeans/uncalibrated": "from k-means: raw (clustering) head",
    "kmeans/constant": "… constant confidence (estimated accuracy)",
    "kmeans/temperature": "… temperature scaling, label-free",
    "kmeans/predicted": "… calibration head",
}
"""METHOD/VARIANT to the name of its row."""
STAGE = 7
"""Number of the stage that is measured: its random stream must be none of the recipe's stages."""

Figures = dict[str, dict[str, float | None]]
"""Figures by the names of `COLUMNS`, by METHOD/VARIANT or by variant."""


# --- what all methods start from --------------------------------------------------------------


@dataclass
class Start:
    """What all methods start from: one data set and seed, with networks trained on it."""

    images: ImageSet
    augment: dict[str, Any]
    """Views by name."""
    pretext: Network
    """After SimCLR; with a file of features there is no pretext, and this is after SCAN as well."""
    scan: Network
    reference: Reference
    """Independent clusterings of the first network's features."""
    num_clusters: int
    seed: int


def start_of(data: str, seed: int, out: Path) -> Start:
    """Trains what all methods start from, or reads it from the run folder below `out`.

    data: `fashion_mnist`, or the path of a file of features.
    seed: of the run.
    out: of the comparison.
    """
    config = load([*_words(data, seed, out), *QUIET, f"seed={seed}"])
    train(config)
    images = build(config.data).train
    networks = [
        _network(config, number, name, images)
        for number, name in enumerate(config.stages)
        # Self-labelling is one of the methods compared; all start before it.
        if name != "selflabel"
    ]
    augment = list(config.stages.values())[-1].augment
    num_clusters = config.num_clusters
    if num_clusters is None:
        assert images.classes is not None
        num_clusters = int(images.classes.max()) + 1
    first = networks[0]
    trainer = Trainer(first.backbone, first.head, images, _views(augment, images, first.head))
    reference = reference_clusterings(trainer.features()[0].numpy(), num_clusters)
    return Start(images, augment, first, networks[-1], reference, num_clusters, seed)


def _words(data: str, seed: int, out: Path) -> list[str]:
    """The run that all methods start from, in the words of the command line."""
    if data == "fashion_mnist":
        return ["data=fashion_mnist", f"run.dir={out / f'fashion-{seed}'}"]
    # One stage with the recipe's SCAN head; its beginnings are for frozen features.
    head = load([]).stages["scan"].head
    parameters = {key: value for key, value in head.items() if key not in ("_target_", "init")}
    return [
        "data=features",
        f"data.file={data}",
        "head=scan",
        "head.init=[spectral,spectral,spectral,kmeans]",
        # As JSON: None, true and lists are written alike there and on the command line.
        *(f"head.{key}={json.dumps(value)}" for key, value in parameters.items()),
        "optim.lr=3e-4",
        "optim.head_lr=5e-3",
        "optim.warmup_steps=20",
        "num_clusters=10",
        "trainer.num_images=54000",
        f"run.dir={out / f'{Path(data).stem}-{seed}'}",
    ]


def _network(config: RunConfig, number: int, name: str, images: ImageSet) -> Network:
    """A stage's network as its last checkpoint has it."""
    num_clusters = config.num_clusters or 10
    sizes = {"channels": images.channels, "size": images.size[0], "num_clusters": num_clusters}
    head = config.stages[name].head
    network = build_network(config.backbone, head, sizes, num_samples=len(images))
    # Names of checkpoints hold their step with leading zeros: the last by name is the latest.
    folder = Path(config.folder()) / "checkpoints" / f"{number:02d}-{name}"
    state = checkpoint.load(max(folder.iterdir())).state
    network.backbone.load_state_dict(state["backbone"])
    network.head.load_state_dict(state["head"])
    return network


def _views(augment: dict[str, Any], images: ImageSet, head: Head) -> dict[str, ViewTransform]:
    """The views that a head declares, and `clean`, at the images' own size."""
    names = list(dict.fromkeys(["clean", *(view.augment for view in head.views)]))
    return build_views({**augment, "size": None}, images, names)


# --- methods ----------------------------------------------------------------------------------


def measure(
    start: Start,
    network: Network,
    head: Head,
    settings: TrainerSettings,
    optim: OptimSettings,
) -> Figures:
    """Trains one more stage from a network's weights; returns its figures by variant.

    start: data and seed.
    network: whose weights the stage begins with; it stays as it is.
    head: of the stage.
    settings, optim: of the stage.
    """
    # Two methods start from the same network.
    network = copy.deepcopy(network)
    head.init_from(network.head)
    views = _views(start.augment, start.images, head)
    began = time.process_time()
    trainer = Trainer(
        network.backbone,
        head,
        start.images,
        views,
        settings=settings,
        optim=optim,
        seed=start.seed,
        stage=STAGE,
    )
    trainer.fit()
    seconds = time.process_time() - began
    features, rows = trainer.features()
    classes = start.images.classes
    if classes is not None:
        classes = classes[rows.numpy()]
    report = confidence_report(
        trainer.eval_network, features.numpy(), classes, start.reference, start.num_clusters
    )
    figures: Figures = {
        name: {key: scores[key] for key in SCORES} for name, scores in report["scores"].items()
    }
    estimate = {f"estimated_{key}": report["estimate"][key] for key in ESTIMATES}
    figures["predicted"] |= {**estimate, "seconds": seconds}
    return figures


def compare(start: Start, mini_clusters: int) -> Figures:
    """Figures of all methods from one start, by METHOD/VARIANT.

    start: data, networks and seed.
    mini_clusters: of a macro batch, in both calibration heads.
    """
    dim = cast(int, start.scan.backbone.num_features)
    k = start.num_clusters
    # Heads draw their first weights from the global stream, in the order in which they are made.
    torch.manual_seed(start.seed)
    recipe = load([]).stages["selflabel"]
    calibrated = TrainerSettings(num_images=36_000, batch_size=1000, micro_batches=2, num_threads=1)
    optim = OptimSettings(
        lr=1e-4, backbone_lr=5e-5, schedule="constant", weight_decay=0, step_per="micro"
    )
    shape: dict[str, Any] = {
        "hidden_dim": 128,
        "mini_clusters": mini_clusters,
        # A tenth of the reference's 2000, for layers of 128 units.
        "orthogonal_steps": 200,
    }
    # Ten times the rate of what it wraps: 1e-3, which both heads from k-means have as well.
    around = Calibration(dim, k, SelfLabel(dim, k, kind="cosine"), lr_scale=10.0, **shape)
    anew = Calibration(dim, k, SelfLabel(dim, k, kind="mlp", hidden_dim=128), **shape)
    plain = SelfLabel(dim, k, kind="cosine", quota=0.5)
    jobs: dict[str, tuple[Network, Head, TrainerSettings, OptimSettings]] = {
        "selflabel": (start.scan, plain, recipe.trainer, recipe.optim),
        "calibration": (start.scan, around, calibrated, optim),
        "kmeans": (start.pretext, anew, calibrated, replace(optim, head_lr=1e-3)),
    }
    figures: Figures = {}
    for method, job in jobs.items():
        for variant, scores in measure(start, *job).items():
            figures[f"{method}/{variant}"] = scores
    return figures


# --- tables -----------------------------------------------------------------------------------


def table(results: Sequence[Figures]) -> list[dict[str, Any]]:
    """One row per method: mean and standard deviation over seeds of every figure.

    results: of each seed, by METHOD/VARIANT.
    """
    rows = []
    for method in (name for name in NAMES if name in results[0]):
        row: dict[str, Any] = {"method": NAMES[method]}
        for column in COLUMNS:
            figures = [result[method].get(column) for result in results]
            values = [figure for figure in figures if figure is not None]
            if values:
                row[column] = statistics.fmean(values)
                # Of the seeds at hand, not estimated for others: the committed tables have it so.
                row[f"{column}_std"] = statistics.pstdev(values)
        rows.append(row)
    return rows


def markdown(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """A table of rows as `table` gives them, in per cent but for `UNSCALED`.

    title: of the table.
    rows: means and standard deviations.
    """
    heads = ["method", *(column.replace("_", " ") for column in COLUMNS)]
    lines = [f"### {title}", "", table_row(heads), table_rule(len(heads))]
    lines += [table_row([row["method"], *(_cell(row, name) for name in COLUMNS)]) for row in rows]
    return "\n".join([*lines, ""])


def _cell(row: dict[str, Any], column: str) -> str:
    """Mean ± standard deviation, empty where a method has no such figure."""
    if column not in row:
        return ""
    scale, digits = (1, 2) if column in UNSCALED else (100, 1)
    mean = scale * row[column]
    spread = scale * row[f"{column}_std"]
    return f"{mean:.{digits}f} ± {spread:.{digits}f}"


# --- the command ------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Computes what is missing, then writes and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--features", action="append", default=[], help="a .npz file; may be repeated"
    )
    parser.add_argument("--no-fashion", action="store_true", help="leave Fashion-MNIST out")
    parser.add_argument(
        "--mini-clusters", type=int, default=20, help="of 1,000 images (default 2 K)"
    )
    parser.add_argument("--out", type=Path, default=Path("outputs/calibration"))
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    number = options.mini_clusters
    sets = options.features if options.no_fashion else ["fashion_mnist", *options.features]
    texts: list[str] = []
    lines: list[dict[str, Any]] = []
    for data in sets:
        name = Path(data).stem
        seeds = range(options.seeds)
        rows = table([figures_of(data, seed, number, options.out) for seed in seeds])
        title = f"{name}, {options.seeds} seeds, {number} mini-clusters"
        texts.append(markdown(title, rows))
        lines += [{"data": name, "mini_clusters": number, **row} for row in rows]
    columns = ["data", "mini_clusters", "method"]
    columns += [name for column in COLUMNS for name in (column, f"{column}_std")]
    cells = [[line.get(column) for column in columns] for line in lines]
    write_csv(options.out / f"calibration-{number}.csv", columns, cells)
    text = "\n".join(texts)
    (options.out / f"calibration-{number}.md").write_text(text)
    print(text)
    return 0


def figures_of(data: str, seed: int, mini_clusters: int, out: Path) -> Figures:
    """Figures of one data set and seed, computed or read from `out`.

    data: `fashion_mnist`, or the path of a file of features.
    seed: of the run and the heads.
    mini_clusters: of a macro batch.
    out: of the comparison.
    """
    file = out / f"{Path(data).stem}-{seed}-{mini_clusters}.json"
    if not file.exists():
        figures = compare(start_of(data, seed, out), mini_clusters)
        file.write_text(json.dumps(figures, indent=2))
    # Read in either case: a table must not depend on what was computed in this process.
    return json.loads(file.read_text())


if __name__ == "__main__":
    sys.exit(main())
