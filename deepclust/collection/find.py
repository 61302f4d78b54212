"""Clusters of a folder's landmarks, by the best of several clusterers, and of all images by the
landmarks' votes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from deepclust.clustering.choice import DEFAULT, PREFERRED, choose, criteria
from deepclust.clustering.methods import cluster as cluster_rows
from deepclust.clustering.number import estimate_num_clusters
from deepclust.collection.derived import Derived
from deepclust.collection.history import NOISE, State
from deepclust.collection.landmarks import Landmarks, trust_in
from deepclust.errors import UserError, in_short, show_where
from deepclust.heads.readout import vote
from deepclust.loggers.console import ConsoleLogger
from deepclust.runtime.estimates import Estimates, ends_the_run

COLUMNS = {
    "neighbor_agreement": "agreement",
    "silhouette": "silhouette",
    "consensus": "consensus",
    "self_prediction": "prediction",
}
"""Criteria that are shown, in %."""
MOST_GUESSED = 60
CHUNK = 8192


@dataclass
class Found:
    """Clusters of the landmarks: labels (m,) from 0, the largest first; and how they came about.

    choice: by method its seconds and criteria, or why it `failed`. criterion: the one that chose,
    None where the criteria are missing. number: how the number of clusters was found, None where it
    was given or could not be.
    """

    labels: np.ndarray
    method: str
    choice: dict[str, dict[str, Any]]
    criterion: str | None
    number: dict[str, Any] | None


def find_clusters(
    x: np.ndarray,
    num_clusters: int | None,
    methods: Sequence[str],
    seed: int,
    estimates: Estimates,
    watch: Callable[[str], Any],
    console: ConsoleLogger,
) -> Found:
    """Clusters of the landmarks (m, P), unit rows. watch: times a part.

    Raises UserError where no clusterer succeeds.
    """
    number = None
    if num_clusters is None:
        console.message("number of clusters ...")
        with watch("number"):
            num_clusters, number = _number(x, seed, estimates, console)
    with watch("cluster"):
        clusterings, choice = _clusterings(x, num_clusters, methods, seed, console)
        measured = estimates("criteria", lambda: criteria(x, clusterings, seed=seed))
    for name, figures in (measured or {}).items():
        choice[name] |= figures
    criterion = None if measured is None else DEFAULT
    method = _preferred(clusterings) if measured is None else choose(measured)
    rows = [
        [name, *(_percent(each.get(key)) for key in COLUMNS), _rounded(each)]
        for name, each in choice.items()
    ]
    title = (
        f"chosen by {DEFAULT}: {method}" if measured else f"taken without being compared: {method}"
    )
    console.table(title, ["clusterer", *COLUMNS.values(), "seconds"], rows)
    sizes = np.bincount(clusterings[method], minlength=num_clusters)
    place = np.argsort(np.argsort(-sizes, kind="stable"), kind="stable")
    return Found(place[clusterings[method]], method, choice, criterion, number)


def _number(
    x: np.ndarray, seed: int, estimates: Estimates, console: ConsoleLogger
) -> tuple[int, dict[str, Any] | None]:
    """How many clusters, and how that was found; where it cannot be estimated, a rule of thumb that
    says so.
    """
    estimate = estimates("number", lambda: estimate_num_clusters(x, seed=seed))
    if estimate is not None:
        console.message(estimate.statement)
        return max(2, estimate.k), asdict(estimate)
    guess = min(max(2, round(math.sqrt(len(x) / 2))), MOST_GUESSED, len(x) - 1)
    console.message(
        f"how many clusters there are could not be estimated; {guess} are taken, the square root of"
        " half the images, which knows nothing of them. Give a number with -k",
        "warning",
    )
    return guess, None


def _clusterings(
    x: np.ndarray, num_clusters: int, methods: Sequence[str], seed: int, console: ConsoleLogger
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, Any]]]:
    """Labels by method, of those that succeed, and the seconds of each or why it failed."""
    clusterings: dict[str, np.ndarray] = {}
    choice: dict[str, dict[str, Any]] = {}
    for name in methods:
        began = time.monotonic()
        try:
            clusterings[name] = cluster_rows(name, x, num_clusters, seed=seed).labels
            choice[name] = {"seconds": time.monotonic() - began}
        except UserError as error:
            choice[name] = {"failed": str(error)}
        except Exception as error:  # whatever a library raises: there are other clusterers
            if ends_the_run(error):
                raise
            choice[name] = {"failed": in_short(error)}
            show_where(error)
        if name not in clusterings:
            console.message(f"{name} is left out: {choice[name]['failed']}", "warning")
    if not clusterings:
        reasons = "\n".join(f"  {name}: {each['failed']}" for name, each in choice.items())
        raise UserError(
            f"-k {num_clusters}: none of the clusterers finds clusters; try others with"
            f" --clusterers, or another -k\n{reasons}"
        )
    return clusterings, choice


def _preferred(clusterings: dict[str, np.ndarray]) -> str:
    """What is taken where nothing tells the clusterings apart."""
    return PREFERRED if PREFERRED in clusterings else next(iter(clusterings))


def _percent(value: float | None) -> float | None:
    return None if value is None else round(100 * value, 1)


def _rounded(figures: dict[str, Any]) -> float | None:
    return round(figures["seconds"], 1) if "seconds" in figures else None


def carry(
    derived: Derived, labels: np.ndarray, noise: bool, seed: int, estimates: Estimates
) -> tuple[Landmarks, State]:
    """Clusters of all images from those of the landmarks (m,); near-duplicates have that of their
    original.

    noise: whether what lies apart gets none. Where the landmarks' trust is missing, all are trusted
    alike.
    """
    x = derived.x[torch.from_numpy(derived.landmarks)]
    trust = estimates("confidence", lambda: trust_in(x, labels, seed))
    if trust is None:
        trust = np.ones(len(x), dtype=np.float32)
    num_clusters = int(labels.max()) + 1
    owners, weights = torch.from_numpy(labels), torch.from_numpy(trust)
    values, places = derived.nearest
    cluster, confidence = (
        np.zeros(len(derived), dtype=np.int64),
        np.zeros(len(derived), dtype=np.float32),
    )
    for start in range(0, len(derived), CHUNK):
        part = slice(start, start + CHUNK)
        near = places[part]
        most = vote(values[part], owners[near], weights[near], num_clusters).max(dim=1)
        confidence[part], cluster[part] = most.values.numpy(), most.indices.numpy()
    original = np.where(derived.copy_of >= 0, derived.copy_of, np.arange(len(derived)))
    cluster, confidence = cluster[original], confidence[original]
    if noise:
        cluster = np.where(derived.outlying, NOISE, cluster)
    landmarks = Landmarks.of(derived, trust, noise)
    copies = np.where(derived.copy_of >= 0, derived.rows[derived.copy_of], -1)
    nobody = np.zeros(len(derived), dtype=bool)
    return landmarks, State(
        derived.rows, cluster, confidence, derived.map, copies, nobody, {}, num_clusters
    )
