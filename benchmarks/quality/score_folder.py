"""What the clusters of `deepclust cluster` are worth where photos lie in one folder per class.

    python -m benchmarks.quality.score_folder RUN

printed the committed figures of the clothing photos, RUN being what
`deepclust cluster CLOTHING -k 10` left: a line of scores in per cent. Classes are the names of the
folders that hold the images; clusters, and their probabilities by the run's model, are those of the
run as it is now. Noise and images that were taken out do not count.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path, PurePath

import numpy as np

from deepclust.collection.landmarks import clusterer_of
from deepclust.collection.run import FolderRun
from deepclust.eval import calibration_scores, clustering_scores

SCORES = ("acc", "macro_acc", "nmi", "ari")


def scores_of(run: FolderRun) -> dict[str, float]:
    """Scores of a run as fractions.

    Those of `SCORES`, and of the confidences their mean (`confidence`), their expected calibration
    error in 15 bins (`ece`) and how well they tell right from wrong (`auroc`, NaN where all images
    are right or all wrong).
    """
    state = run.state()
    counted = state.kept[state.cluster[state.kept] >= 0]
    rows = state.rows[counted]
    clusters = state.cluster[counted]
    names = [PurePath(run.store.paths[row]).parent.name for row in rows.tolist()]
    classes = np.unique(names, return_inverse=True)[1]
    scores = clustering_scores(clusters, classes)
    probabilities = clusterer_of(run, state).predict_proba(run.features(rows))
    # An edit can give an image another cluster than the model would: the run's clusters count.
    calibration = calibration_scores(probabilities, classes, predicted=clusters)
    auroc = calibration["auroc"]
    return {
        **{name: scores[name] for name in SCORES},
        "confidence": calibration["confidence"],
        "ece": calibration["ece"],
        "auroc": float("nan") if auroc is None else auroc,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints one run's figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="a folder that deepclust cluster left")
    options = parser.parse_args(arguments)
    scores = scores_of(FolderRun.open(options.run))
    print("  ".join(f"{name} {100 * value:.1f}" for name, value in scores.items()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
