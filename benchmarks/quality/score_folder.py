"""What the clusters of `deepclust cluster` are worth where the photos lie in one folder per class: a line, in per cent.

    python -m benchmarks.quality.score_folder outputs/clusters-PHOTOS-k10

Classes are the names of the folders that hold the images; clusters, and their probabilities by the run's model, are
those of the run as it is now. Noise and what was taken out does not count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from deepclust.eval import calibration_scores, clustering_scores
from deepclust.folder.run import FolderRun
from deepclust.folder.votes import clusterer_of

SCORES = ("acc", "macro_acc", "nmi", "ari")


def scores_of(run: FolderRun) -> dict[str, float]:
    """Shares: accuracies, NMI, ARI, and of the confidences their mean, calibration error (15 bins) and AUROC."""
    state = run.state()
    counted = state.kept[state.cluster[state.kept] >= 0]
    rows, clusters = state.rows[counted], state.cluster[counted]
    names = [PurePath(run.store.paths[row]).parent.name for row in rows.tolist()]
    classes = np.unique(names, return_inverse=True)[1]
    probabilities = clusterer_of(run, state).predict_proba(run.features(rows))
    sure = calibration_scores(probabilities, classes, predicted=clusters)
    found = clustering_scores(clusters, classes)
    auroc = float("nan") if sure["auroc"] is None else sure["auroc"]
    return {name: found[name] for name in SCORES} | {
        "confidence": sure["confidence"],
        "ece": sure["ece"],
        "auroc": auroc,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one run's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a folder that deepclust cluster left")
    found = scores_of(FolderRun.open(parser.parse_args(arguments).run))
    print("  ".join(f"{name} {100 * value:.1f}" for name, value in found.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
