"""Report on a stage's confidences: scored where there are labels, else estimated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deepclust.eval.calibration import calibration_scores
from deepclust.eval.label_free import sample_rows
from deepclust.eval.second_opinion import (
    agreement,
    constant_confidence,
    independent_clusterings,
    label_free_calibration,
    scale,
)
from deepclust.heads.base import Head
from deepclust.model import Network

MAX_SCORED = 50_000
"""Samples whose confidences are scored; of more, so many are drawn."""
MAX_REFERENCE = 5_000
"""Samples that are clustered for reference; of more, so many are drawn."""
CHUNK = 4096
"""Samples that a head sees at a time."""


@dataclass(frozen=True)
class Reference:
    """Independent clusterings of some samples, by which all stages' confidences are measured."""

    rows: np.ndarray
    """(M,) int64, the samples that were clustered."""
    families: Mapping[str, list[np.ndarray]]
    """Clusterings (M,) of them by family; see `independent_clusterings`."""


def reference_clusterings(features: np.ndarray, num_clusters: int) -> Reference:
    """Independent clusterings of at most 5,000 of the features (N, D)."""
    # The same rows for every stage, as the seed is fixed.
    rows = sample_rows(len(features), MAX_REFERENCE, 0)
    clusterings = independent_clusterings(features[rows], min(num_clusters, len(rows)))
    return Reference(rows, clusterings)


def confidence_report(
    network: Network,
    features: np.ndarray,
    classes: np.ndarray | None,
    reference: Reference,
    num_clusters: int,
) -> dict[str, Any]:
    """A stage's `calibration` for summary.json.

    It compares variants of the probabilities, none of which saw a label:
    `predicted`, what the run gives out;
    `uncalibrated`, those of the head beneath a calibration, where there is one;
    `temperature`, the head's (those beneath a calibration) scaled so that their mean confidence is
    the estimated accuracy;
    `constant`, that estimate for every sample.

    Args:
        network: the stage's.
        features: (N, D) of the stage's samples.
        classes: (N,), None without labels.
        reference: independent clusterings of the same samples.
        num_clusters: K.

    Returns:
        `samples`: how many were scored, 50,000 at most.
        `estimate`: without labels, `accuracy`, `ece` and `temperature`; where there are labels also
        `accuracy_error` and `ece_error`, estimate - truth.
        `scores`: those of `calibration_scores` by variant, empty without labels.
        `reliability`: bins by variant; without labels those of the estimate, as `predicted`.
    """
    rows = sample_rows(len(features), MAX_SCORED, 0)
    estimate = _estimate(network, features, reference, network.head.predict)
    bins = estimate.pop("reliability")
    if classes is None:
        return {
            "samples": len(rows),
            "estimate": estimate,
            "scores": {},
            "reliability": {"predicted": bins},
        }
    variants = _variants(network, features, rows, reference, num_clusters)
    scores = {name: calibration_scores(p, classes[rows]) for name, p in variants.items()}
    truth = scores["predicted"]
    estimate["accuracy_error"] = estimate["accuracy"] - truth["acc"]
    estimate["ece_error"] = estimate["ece"] - truth["ece"]
    reliability = {name: each.pop("reliability") for name, each in scores.items()}
    return {
        "samples": len(rows),
        "estimate": estimate,
        "scores": scores,
        "reliability": reliability,
    }


def _variants(
    network: Network,
    features: np.ndarray,
    rows: np.ndarray,
    reference: Reference,
    num_clusters: int,
) -> dict[str, np.ndarray]:
    """Probabilities (M, K) of the scored rows (M,) by variant; see `confidence_report`."""
    head = network.head
    raw = _probabilities(network, features[rows], head.predict)
    variants = {"predicted": raw}
    # A head that does not calibrate has no probabilities beneath: `uncalibrated` gives `predict`'s.
    if type(head).uncalibrated is not Head.uncalibrated:
        raw = _probabilities(network, features[rows], head.uncalibrated)
        variants["uncalibrated"] = raw
    estimate = _estimate(network, features, reference, head.uncalibrated)
    variants["temperature"] = scale(raw, estimate["temperature"])
    variants["constant"] = constant_confidence(raw.argmax(1), num_clusters, estimate["accuracy"])
    return variants


def _estimate(
    network: Network,
    features: np.ndarray,
    reference: Reference,
    function: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """`label_free_calibration` of the probabilities that a function gives the reference's rows."""
    p = _probabilities(network, features[reference.rows], function)
    return label_free_calibration(p, agreement(p.argmax(1), reference.families))


@torch.no_grad()
def _probabilities(
    network: Network,
    features: np.ndarray,
    function: Callable[[Tensor], Tensor],
) -> np.ndarray:
    """Probabilities (N, K) of features (N, D) by a function of the network's head."""
    device = next(network.parameters()).device
    network.eval()
    parts = torch.from_numpy(features).split(CHUNK)
    return torch.cat([function(part.to(device)).cpu() for part in parts]).numpy()
