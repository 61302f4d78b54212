"""Can confidences be trusted? Raw heads, constants, temperatures and calibration heads beside each other.

    python scripts/compare_calibration.py --seeds 3 --out outputs/calibration
    python scripts/compare_calibration.py --features FILE.npz     # arrays `features` (N, D) and `labels` (N,) as well

Fashion-MNIST's 10,000 test images go through the ordinary recipe (SimCLR, SCAN, self-labelling); rows of a file through
SCAN and self-labelling. From the same weights then start two calibration heads: around self-labelling of the SCAN
clusters, and as the paper has it, both heads from k-means. No choice sees a label. What is done is kept in `--out`, so
that a stopped comparison goes on; the tables are written to it as Markdown and CSV.
"""

from __future__ import annotations

import argparse
import copy
import csv
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from deepclust import checkpoint
from deepclust.config import RunConfig, build, load
from deepclust.data.image_set import ImageSet
from deepclust.data.views import build_views
from deepclust.heads import Head
from deepclust.heads.calibration import Calibration
from deepclust.heads.selflabel import SelfLabel
from deepclust.model import Network, build_network
from deepclust.recipe import train
from deepclust.settings import OptimSettings, TrainerSettings
from deepclust.trainer import Trainer
from deepclust.trust import Reference, confidence_report, reference_clusterings

QUIET = ("eval.baselines=none", "eval.probes=false", "trainer.num_threads=1")
SCORES = ("acc", "confidence", "ece", "adaptive_ece", "brier", "nll", "auroc", "aurc")
ESTIMATES = ("accuracy", "accuracy_error", "ece", "ece_error")
COLUMNS = (*SCORES, *(f"estimated_{name}" for name in ESTIMATES), "seconds")
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


@dataclass
class Start:
    """One data set and seed: images, views, and the networks after the pretext and after SCAN."""

    images: ImageSet
    augment: dict[str, Any]
    pretext: Network
    scan: Network
    reference: Reference
    num_clusters: int
    seed: int


def start_of(data: str, seed: int, out: Path) -> Start:
    """Trains what all methods start from, or reads it from the run folder. data: `fashion_mnist` or a file's path."""
    common = [*QUIET, f"seed={seed}"]
    if data == "fashion_mnist":
        config = load(["data=fashion_mnist", *common, f"run.dir={out / f'fashion-{seed}'}"])
    else:
        scan = [f"{key}={value}" for key, value in _recipe_head("scan").items() if key not in ("_target_", "init")]
        words = ["data=features", f"data.file={data}", "head=scan", "head.init=[spectral,spectral,spectral,kmeans]"]
        words += [f"head.{word}" for word in scan] + ["optim.lr=3e-4", "optim.head_lr=5e-3", "optim.warmup_steps=20"]
        folder = out / f"{Path(data).stem}-{seed}"
        config = load([*words, *common, "num_clusters=10", "trainer.num_images=54000", f"run.dir={folder}"])
    train(config)
    images = build(config.data).train
    names = list(config.stages)
    networks = [_network(config, number, name, images) for number, name in enumerate(names) if name != "selflabel"]
    augment = config.stages[names[-1]].augment
    first = Trainer(networks[0].backbone, networks[0].head, images, _views(augment, images, networks[0].head))
    number = config.num_clusters or int(images.classes.max()) + 1  # pyright: ignore[reportOptionalMemberAccess]
    reference = reference_clusterings(first.features()[0].numpy(), number)
    return Start(images, augment, networks[0], networks[-1], reference, number, seed)


def _recipe_head(stage: str) -> dict[str, Any]:
    return load([]).stages[stage].head


def _network(config: RunConfig, number: int, name: str, images: ImageSet) -> Network:
    """A stage's network as its last checkpoint has it."""
    sizes = {"channels": images.channels, "size": images.size[0], "num_clusters": config.num_clusters or 10}
    network = build_network(config.backbone, config.stages[name].head, sizes, num_samples=len(images))
    root = Path(config.folder()) / "checkpoints"
    path = max((root / f"{number:02d}-{name}").iterdir())
    state = checkpoint.load(path).state
    network.backbone.load_state_dict(state["backbone"])
    network.head.load_state_dict(state["head"])
    return network


def _views(augment: dict[str, Any], images: ImageSet, head: Head) -> Any:
    names = list(dict.fromkeys(["clean", *(view.augment for view in head.views)]))
    return build_views({**augment, "size": None}, images, names)


def measure(
    start: Start, network: Network, head: Head, settings: TrainerSettings, optim: OptimSettings
) -> dict[str, dict[str, float | None]]:
    """Trains one more stage from a network's weights; its figures by variant."""
    network = copy.deepcopy(network)
    head.init_from(network.head)
    views, began = _views(start.augment, start.images, head), time.process_time()
    where: dict[str, Any] = {"settings": settings, "optim": optim, "seed": start.seed, "stage": 7}
    trainer = Trainer(network.backbone, head, start.images, views, **where)
    trainer.fit()
    seconds = time.process_time() - began
    features, rows = trainer.features()
    classes = None if start.images.classes is None else start.images.classes[rows.numpy()]
    found = confidence_report(trainer.evaluated, features.numpy(), classes, start.reference, start.num_clusters)
    figures = {name: {key: scores[key] for key in SCORES} for name, scores in found["scores"].items()}
    figures["predicted"] |= {f"estimated_{key}": found["estimate"][key] for key in ESTIMATES}
    figures["predicted"]["seconds"] = seconds
    return figures


def compare(start: Start, mini_clusters: int) -> dict[str, dict[str, float | None]]:
    """All methods from one start: figures by method and variant."""
    dim, k = start.scan.backbone.num_features, start.num_clusters
    torch.manual_seed(start.seed)
    recipe = load([]).stages["selflabel"]
    micro = TrainerSettings(num_images=36_000, batch_size=1000, micro_batches=2, num_threads=1)
    plain = OptimSettings(lr=1e-4, backbone_lr=5e-5, schedule="constant", weight_decay=0, step_per="micro")
    shape: dict[str, Any] = {"hidden_dim": 128, "mini_clusters": mini_clusters, "orthogonal_steps": 200}
    around = Calibration(dim, k, SelfLabel(dim, k, kind="cosine"), lr_scale=10.0, **shape)
    anew = Calibration(dim, k, SelfLabel(dim, k, kind="mlp", hidden_dim=128), **shape)
    jobs: dict[str, tuple[Network, Head, TrainerSettings, OptimSettings]] = {
        "selflabel": (start.scan, SelfLabel(dim, k, kind="cosine", quota=0.5), recipe.trainer, recipe.optim),
        "calibration": (start.scan, around, micro, plain),
        "kmeans": (start.pretext, anew, micro, replace(plain, head_lr=1e-3)),
    }
    found: dict[str, dict[str, float | None]] = {}
    for name, (network, head, settings, optim) in jobs.items():
        for variant, figures in measure(start, network, head, settings, optim).items():
            found[f"{name}/{variant}"] = figures
    return found


def table(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row a method: mean and standard deviation over seeds of every figure."""
    rows = []
    for method in (name for name in NAMES if name in results[0]):
        row: dict[str, Any] = {"method": NAMES[method]}
        for column in COLUMNS:
            values = [result[method][column] for result in results if result[method].get(column) is not None]
            if values:
                row[column] = statistics.fmean(values)
                row[f"{column}_std"] = statistics.pstdev(values)
        rows.append(row)
    return rows


def markdown(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Figures in % but for Brier, NLL and seconds; mean ± standard deviation over seeds."""
    heads = ["method", *(column.replace("_", " ") for column in COLUMNS)]
    lines = [f"### {title}", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for row in rows:
        cells = [row["method"]]
        for column in COLUMNS:
            scale, digits = (1, 2) if column in ("brier", "nll", "seconds") else (100, 1)
            mean, spread = row.get(column), row.get(f"{column}_std")
            empty = mean is None or spread is None
            cells.append("" if empty else f"{scale * mean:.{digits}f} ± {scale * spread:.{digits}f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--features", type=Path, action="append", default=[], help="a .npz file; may be repeated")
    parser.add_argument("--no-fashion", action="store_true", help="leave Fashion-MNIST out")
    parser.add_argument("--mini-clusters", type=int, default=20, help="neighbourhoods of 1,000 images (default 2 K)")
    parser.add_argument("--out", type=Path, default=Path("outputs/calibration"))
    words = parser.parse_args()
    torch.set_num_threads(1)
    words.out.mkdir(parents=True, exist_ok=True)
    texts, lines = [], []
    for data in [*([] if words.no_fashion else ["fashion_mnist"]), *map(str, words.features)]:
        results = []
        for seed in range(words.seeds):
            file = words.out / f"{Path(data).stem}-{seed}-{words.mini_clusters}.json"
            if not file.exists():
                found = compare(start_of(data, seed, words.out), words.mini_clusters)
                file.write_text(json.dumps(found, indent=2))
            results.append(json.loads(file.read_text()))
        rows = table(results)
        texts.append(markdown(f"{Path(data).stem}, {words.seeds} seeds, {words.mini_clusters} mini-clusters", rows))
        lines += [{"data": Path(data).stem, "mini_clusters": words.mini_clusters, **row} for row in rows]
    names = ["data", "mini_clusters", "method", *(name for column in COLUMNS for name in (column, f"{column}_std"))]
    with open(words.out / f"calibration-{words.mini_clusters}.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, names)
        writer.writeheader()
        writer.writerows(lines)
    (words.out / f"calibration-{words.mini_clusters}.md").write_text("\n".join(texts))
    print("\n".join(texts))


if __name__ == "__main__":
    main()
