"""What a run leaves behind: each stage's clusters, the table beside the baselines, and the files of
the run folder.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from deepclust.clustering.baselines import NAMES, baselines, chosen
from deepclust.config.settings import EvalSettings
from deepclust.data.image_set import ImageData, ImageSet
from deepclust.eval.confidence import Reference, confidence_report, reference_clusterings
from deepclust.eval.label_free import better_stage, churn, label_free_scores, silhouette
from deepclust.eval.metrics import BY_CLASS, LONG_TAILED, clustering_scores, imbalance
from deepclust.eval.probes import knn_probe, linear_probe
from deepclust.loggers.base import Loggers
from deepclust.loggers.files import read_metrics
from deepclust.model import Network
from deepclust.ops import knn
from deepclust.ops.agreement import neighbor_agreement
from deepclust.report import write_report
from deepclust.report.gallery import make_galleries
from deepclust.report.plots import metric_curves
from deepclust.report.reliability import trust_table, trust_words
from deepclust.runtime.estimates import Estimates
from deepclust.training.run_folder import RunFolder

SCORES = ("acc", "nmi", "ari")


@dataclass
class Split:
    """One stage on one set of images: features (N, D), clusters (N,), confidence (N,), rows (N,) of
    the image set.
    """

    features: np.ndarray
    clusters: np.ndarray
    confidence: np.ndarray
    rows: np.ndarray


@dataclass
class StageResult:
    """A finished stage. `scores` holds what goes into summary.json; `network` is what evaluation
    and export use.
    """

    name: str
    network: Network
    head: Mapping[str, Any]
    train: Split
    test: Split | None
    seconds: float
    scores: dict[str, Any] = field(default_factory=dict)
    ground: Ground | None = None


@dataclass(frozen=True)
class Ground:
    """What the first stage's features give to measure every stage by: neighbours (N, k) and
    independent clusterings.

    missing: why one of them is None, by the score that rests on it.
    """

    graph: np.ndarray | None
    reference: Reference | None
    missing: Mapping[str, str] = field(default_factory=dict)


def predict_split(network: Network, features: torch.Tensor, rows: torch.Tensor) -> Split:
    """Clusters of features (N, D) on the CPU by the network's head."""
    device = next(network.parameters()).device
    network.eval()  # a head may have batch statistics of its own
    with torch.no_grad():
        parts = [network.head.predict(part.to(device)).cpu() for part in features.split(4096)]
    confidence, clusters = torch.cat(parts).max(dim=1)
    return Split(features.numpy(), clusters.numpy(), confidence.numpy(), rows.numpy())


def neighbor_graph(features: np.ndarray, num_neighbors: int) -> np.ndarray:
    """(N, k) nearest neighbours by cosine: the fixed graph on which stages are compared."""
    x = torch.from_numpy(features)
    _, graph = knn(x, x, k=min(num_neighbors, len(x) - 1), exclude_self=True)
    return graph.numpy()


def ground_of(
    features: np.ndarray,
    num_clusters: int,
    settings: EvalSettings,
    tell: Callable[[str], None] | None = None,
) -> Ground:
    """What the first stage's features (N, D) give to measure every stage by. tell: is given what is
    missing.
    """
    estimates = Estimates(tell, "what stages are compared by")
    reference = None
    if settings.calibration:
        reference = estimates("calibration", lambda: reference_clusterings(features, num_clusters))
    graph = estimates(
        "neighbor_agreement", lambda: neighbor_graph(features, settings.graph_neighbors)
    )
    return Ground(graph, reference, estimates.missing)


def score_stage(
    result: StageResult,
    first: StageResult,
    before: StageResult | None,
    data: ImageData,
    num_clusters: int,
    settings: EvalSettings,
    tell: Callable[[str], None] | None = None,
) -> None:
    """Fills `scores`: label-free ones always, the others where there are labels. first, before:
    stages before it.

    One that fails is None, and `missing` says why; tell: is given a line on it.
    """
    first.ground = ground = first.ground or ground_of(
        first.train.features, num_clusters, settings, tell
    )
    estimates = Estimates(tell, result.name)
    scores: dict[str, Any] = {"seconds": result.seconds}
    scores.update(_label_free_scores(result, before, ground, num_clusters, estimates))
    classes = _classes(data.train, result.train)
    scores.update(_labelled_scores(result.train, data.train, None, estimates))
    if ground.reference is not None and _fits(ground, first, result):
        reference = ground.reference
        scores["calibration"] = estimates(
            "calibration",
            lambda: _plain(
                confidence_report(
                    result.network, result.train.features, classes, reference, num_clusters
                )
            ),
        )
    if classes is not None and settings.probes:
        scores["knn_probe"] = estimates(
            "knn_probe", lambda: knn_probe(result.train.features, classes)
        )
        scores["linear_probe"] = estimates(
            "linear_probe", lambda: linear_probe(result.train.features, classes)
        )
    if result.test is not None and data.test is not None:
        tests = Estimates(tell, f"{result.name}, held-out images")
        scores["test"] = _labelled_scores(result.test, data.test, _class_sizes(data.train), tests)
        estimates.missing.update({f"test {name}": reason for name, reason in tests.missing.items()})
    missing = {**ground.missing, **estimates.missing}
    result.scores = {**scores, **dict.fromkeys(ground.missing)}
    if missing:
        result.scores["missing"] = missing


def _label_free_scores(
    result: StageResult,
    before: StageResult | None,
    ground: Ground,
    num_clusters: int,
    estimates: Estimates,
) -> dict[str, Any]:
    """What can be said about the clusters without labels."""
    split, graph = result.train, ground.graph
    scores: dict[str, Any] = label_free_scores(
        split.clusters, num_clusters, confidence=split.confidence
    )
    scores["silhouette"] = estimates(
        "silhouette", lambda: silhouette(split.features, split.clusters)
    )
    if graph is not None and len(graph) == len(split.clusters):
        clusters = torch.from_numpy(split.clusters)
        neighbors = torch.from_numpy(graph)
        scores["neighbor_agreement"] = estimates(
            "neighbor_agreement", lambda: float(neighbor_agreement(clusters, neighbors))
        )
    previous = None if before is None else before.train.clusters
    if previous is not None and len(previous) == len(split.clusters):
        scores["churn"] = estimates("churn", lambda: churn(previous, split.clusters))
    return scores


def _fits(ground: Ground, first: StageResult, result: StageResult) -> bool:
    """Whether a stage clustered as many images as what it is measured by."""
    known = first.train.clusters if ground.graph is None else ground.graph
    return len(known) == len(result.train.clusters)


def _classes(images: ImageSet, split: Split) -> np.ndarray | None:
    """Classes of a split's rows, None if any is unknown."""
    if images.classes is None:
        return None
    classes = images.classes[split.rows]
    return None if (classes < 0).any() else classes


def _class_sizes(images: ImageSet) -> dict[int, int] | None:
    """Images by class, None without labels."""
    if images.classes is None:
        return None
    names, sizes = np.unique(images.classes, return_counts=True)
    return dict(zip(names.tolist(), sizes.tolist()))


def _labelled_scores(
    split: Split, images: ImageSet, class_sizes: dict[int, int] | None, estimates: Estimates
) -> dict[str, Any]:
    """class_sizes: of the set that was trained on, by which head, medium and tail classes are told;
    None = this one.
    """
    classes = _classes(images, split)
    if classes is None:
        return {}
    scores = estimates(
        "acc", lambda: clustering_scores(split.clusters, classes, class_sizes=class_sizes)
    )
    if scores is None:
        return dict.fromkeys(SCORES)
    return {name: _plain(value) for name, value in scores.items()}


def imbalance_of(images: ImageSet) -> float | None:
    """For summary.json: how long the tail of the training set is, None without labels."""
    return None if images.classes is None else imbalance(images.classes)


def run_baselines(
    result: StageResult, data: ImageData, num_clusters: int, settings: EvalSettings, seed: int
) -> dict[str, Any]:
    """Scores of classical clusterings of this stage's features; a baseline that failed says why.

    None are fitted where no labels could say how good they are.
    """
    classes = _classes(data.train, result.train)
    if classes is None:
        return {}
    pixels = None
    if data.train.images is not None and not data.train.is_features:
        pixels = data.train.images[torch.from_numpy(result.train.rows)].flatten(1)
    which = settings.baselines
    if which == "all" and pixels is None:
        which = [name for name in NAMES if name != "pixels"]
    found = baselines(
        result.train.features,
        num_clusters,
        which=which,
        pixels=pixels,
        seed=seed,
        max_samples=settings.baseline_samples,
    )
    scores: dict[str, Any] = {}
    for name, labels in found.labels.items():
        entry: dict[str, Any] = {"samples": len(found.index), "seconds": found.seconds.get(name)}
        estimates = Estimates()
        measured = None
        if labels is not None:
            measured = estimates(
                name, lambda labels=labels: clustering_scores(labels, classes[found.index])
            )
        if measured is None:
            entry["failed"] = found.reasons.get(name) or estimates.missing[name]
        else:
            entry.update({key: measured[key] for key in (*SCORES, *BY_CLASS) if key in measured})
        scores[name] = entry
    return scores


def compare_with_kmeans(
    results: Sequence[StageResult],
    data: ImageData,
    num_clusters: int,
    settings: EvalSettings,
    seed: int,
) -> None:
    """Adds to each clustering stage behind the first the scores of k-means on its own features, as
    `kmeans`.

    The first stage's stand among the baselines.
    """
    if "kmeans" not in chosen(settings.baselines):
        return
    for result in results[1:]:
        if "reads" not in result.scores:
            found = run_baselines(
                result, data, num_clusters, replace(settings, baselines=["kmeans"]), seed
            )
            result.scores.update(found)


def keep_best(results: Sequence[StageResult]) -> tuple[StageResult, str]:
    """The stage whose clusters agree best, beyond chance, on the pretext's neighbour graph; ties
    keep the earlier.

    A pretext's clusters are k-means on the very features that the graph is made of, which the graph
    favours: they stand only where no stage has clusters of its own.
    """
    own = [result for result in results if "reads" not in result.scores] or list(results)
    measured = {result.name: result.scores.get("neighbor_agreement") for result in own}
    name, why = better_stage(measured)
    if 1 < len(own) < len(results):
        why += " A pretext's k-means is not compared: the graph is made of the features it divides."
    return next(result for result in results if result.name == name), why


def table_rows(summary: Mapping[str, Any]) -> tuple[list[str], list[list[Any]]]:
    """Columns and rows of the result table, from summary.json alone."""
    stages = summary["stages"].values()
    shown = [
        key
        for key in _shown_scores(summary)
        if any(scores.get(key) is not None for scores in stages)
    ]
    columns = ["", *(COLUMN_WORDS[key] for key in shown), "agreement", "used", "seconds"]
    rows = []
    for name, scores in summary["stages"].items():
        label = f"{name} (kept)" if name == summary["kept_stage"] else name
        label += f" + {scores['reads']}" if "reads" in scores else ""
        label_free = [
            scores.get("neighbor_agreement"),
            scores["clusters_used"],
            _round(scores["seconds"]),
        ]
        rows.append([label, *_percent(scores, shown), *label_free])
        if "test" in scores:
            rows.append(
                [f"{name}, held-out images", *_percent(scores["test"], shown), None, None, None]
            )
        if "kmeans" in scores:
            own = scores["kmeans"]
            rows.append(
                [
                    f"{name}, k-means on its features",
                    *_percent(own, shown),
                    None,
                    None,
                    _round(own["seconds"]),
                ]
            )
    for name, scores in summary["baselines"].items():
        label = BASELINE_WORDS.get(name, str(name))
        if scores["samples"] < summary["num_images"]:
            label += f" ({scores['samples']} images)"
        label += f": failed, {scores['failed']}" if "failed" in scores else ""
        rows.append([label, *_percent(scores, shown), None, None, _round(scores["seconds"])])
    return columns, rows


def show(loggers: Loggers, folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """The table, and where to look."""
    columns, rows = table_rows(summary)
    what = f"{summary['num_images']} images, {summary['num_clusters']} clusters"
    loggers.table(f"{summary['data']}: {what}, {summary['seconds']:.0f} s", columns, rows)
    loggers.message(summary["why"])
    calibration = summary["stages"][summary["kept_stage"]].get("calibration")
    if calibration is not None:
        if calibration["scores"]:
            loggers.table(
                f"Confidences of {summary['kept_stage']}, % but for Brier and NLL",
                *trust_table(calibration),
            )
        loggers.message(trust_words(calibration))
    files = (
        ("clusters", "clusters.csv"),
        ("report", "report.html"),
        ("model", "model.safetensors"),
    )
    loggers.message("\n".join(f"{word + ':':<10}{folder.path / name}" for word, name in files))


BASELINE_WORDS = {
    "kmeans": "k-means, same features",
    "gmm": "GMM, same features",
    "spectral": "spectral, same features",
    "tsne_gmm": "t-SNE + GMM, same features",
    "pixels": "k-means on pixels",
}


COLUMN_WORDS = {
    **{key: key.upper() for key in SCORES},
    "macro_acc": "macro",
    "macro_f1": "F1",
    "head_acc": "head/med/tail",
}
"""Column words by score; the accuracies of head, medium and tail classes share a column, so that 80
characters do.
"""


def _shown_scores(summary: Mapping[str, Any]) -> list[str]:
    long_tailed = (summary.get("imbalance") or 0) >= LONG_TAILED
    return [
        key
        for key in (*SCORES, *BY_CLASS)
        if key in COLUMN_WORDS and (long_tailed or key in SCORES)
    ]


def _percent(scores: Mapping[str, Any], shown: Sequence[str]) -> list[str | None]:
    cells = [
        f"{100 * scores[name]:.1f}" if scores.get(name) is not None else None for name in shown
    ]
    if "head_acc" in shown and "tail_acc" in scores:
        groups = (scores[name] for name in ("head_acc", "medium_acc", "tail_acc"))
        cells[shown.index("head_acc")] = "/".join(f"{100 * value:.0f}" for value in groups)
    return cells


def _round(seconds: float | None) -> str | None:
    return None if seconds is None else f"{seconds:.1f}"


def clusters_csv(result: StageResult, data: ImageData) -> str:
    """index, path, split, cluster, confidence: a line for each image that the protocol clusters,
    then the skipped.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["index", "path", "split", "cluster", "confidence"])
    pairs = [(data.train, result.train)]
    if data.test is not None and result.test is not None:
        pairs.append((data.test, result.test))
    for images, split in pairs:
        clustered = {int(row): place for place, row in enumerate(split.rows)}
        for row in range(len(images)):
            place = clustered.get(row)
            found = (
                ("", "")
                if place is None
                else (int(split.clusters[place]), f"{split.confidence[place]:.6f}")
            )
            writer.writerow([int(images.ids[row]), images.paths[row], images.splits[row], *found])
    for skipped in data.train.skipped:
        writer.writerow([skipped.id, skipped.path, "unreadable", "", ""])
    return text.getvalue()


def write_page(
    folder: RunFolder,
    kept: StageResult,
    data: ImageData,
    summary: Mapping[str, Any],
    gallery_images: int,
) -> None:
    """report.html: the table, the curves and a gallery of each cluster of the kept stage."""
    images, split = data.train, kept.train

    def read(place: int) -> np.ndarray:
        return images.picture(int(split.rows[place]))

    def caption(place: int) -> str:
        return f"{images.paths[split.rows[place]]} ({split.confidence[place]:.0%})"

    shown = 0 if images.is_features and images.root is None else gallery_images
    galleries = make_galleries(
        split.clusters, split.confidence, summary["num_clusters"], shown, read, caption
    )
    model = folder.path.as_posix()
    commands = [
        (
            "Cluster new images, from the command line",
            f"deepclust predict {model} IMAGES -o clusters.csv",
        ),
        (
            "and from Python",
            (
                "from deepclust import Clusterer\n\nclusters ="
                f' Clusterer.load("{model}").predict(images)'
            ),
        ),
    ]
    write_report(
        folder.path / "report.html",
        title=(
            f"{data.name}: {summary['num_clusters']} clusters of {summary['num_images']:,} images"
        ),
        summary=summary,
        galleries=galleries,
        curves=metric_curves(read_metrics(folder.path / "metrics.jsonl")),
        notes=missing_lines(summary),
        commands=commands,
        skipped=[f"{skipped.path}: {skipped.reason}" for skipped in images.skipped],
    )


def missing_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line on each score of a stage that could not be had, from summary.json."""
    return [
        f"{stage}: {name.replace('_', ' ')} is missing: {reason}"
        for stage, scores in summary["stages"].items()
        for name, reason in scores.get("missing", {}).items()
    ]


def write_summary(folder: RunFolder, summary: Mapping[str, Any]) -> None:
    """summary.json."""
    folder.write("summary.json", json.dumps(_plain(summary), indent=2) + "\n")


def _plain(value: Any) -> Any:
    """NumPy scalars and arrays as JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value
