"""How far a stage's confidences can be trusted: measured where there are labels, estimated where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from deepclust.eval.calibration import calibration_scores
from deepclust.eval.label_free import sample_rows
from deepclust.eval.second_opinion import agreement, constant_confidence, label_free_calibration, opinions, scale
from deepclust.heads.base import Head
from deepclust.model import Network

MAX_SCORED = 50_000
MAX_ASKED = 5_000


@dataclass(frozen=True)
class SecondOpinions:
    """rows: positions (M,) that were asked about. families: clusterings (M,) of them by family."""

    rows: np.ndarray
    families: Mapping[str, list[np.ndarray]]


def ask(features: np.ndarray, num_clusters: int) -> SecondOpinions:
    """Independent clusterings of at most 5,000 of the features (N, D)."""
    rows = sample_rows(len(features), MAX_ASKED, 0)
    return SecondOpinions(rows, opinions(features[rows], min(num_clusters, len(rows))))


def trust(
    network: Network, features: np.ndarray, classes: np.ndarray | None, second: SecondOpinions, num_clusters: int
) -> dict[str, Any]:
    """A stage's `calibration` for summary.json.

    features: (N, D) of the stage. classes: (N,), None without labels. Returns `samples` (50,000 at most are scored),
    `estimate` (label-free: `accuracy`, `ece`, `temperature`; with labels also `accuracy_error` and `ece_error`,
    estimate - truth), `scores` by variant and `reliability` by variant. The variants:
    `predicted`, what the run gives out; `uncalibrated`, the head beneath a calibration; `temperature`, the head's
    probabilities (those beneath a calibration where there is one) scaled so that their mean is the estimated accuracy;
    `constant`, that estimate for every sample. None of them saw a label.
    """
    rows = sample_rows(len(features), MAX_SCORED, 0)
    asked = _probabilities(network, features[second.rows], network.head.predict)
    agreed = agreement(asked.argmax(1), second.families)
    estimate = label_free_calibration(asked, agreed)
    bins = estimate.pop("reliability")
    if classes is None:
        return {"samples": len(rows), "estimate": estimate, "scores": {}, "reliability": {"predicted": bins}}
    variants = _variants(network, features, rows, second, num_clusters)
    scores = {name: calibration_scores(p, classes[rows]) for name, p in variants.items()}
    truth = scores["predicted"]
    estimate["accuracy_error"] = estimate["accuracy"] - truth["acc"]
    estimate["ece_error"] = estimate["ece"] - truth["ece"]
    reliability = {name: found.pop("reliability") for name, found in scores.items()}
    return {"samples": len(rows), "estimate": estimate, "scores": scores, "reliability": reliability}


def _variants(
    network: Network, features: np.ndarray, rows: np.ndarray, second: SecondOpinions, num_clusters: int
) -> dict[str, np.ndarray]:
    """Probabilities (M, K) of the scored rows by variant."""
    head = network.head
    found = {"predicted": _probabilities(network, features[rows], head.predict)}
    raw = found["predicted"]
    if type(head).uncalibrated is not Head.uncalibrated:
        raw = found["uncalibrated"] = _probabilities(network, features[rows], head.uncalibrated)
    asked = _probabilities(network, features[second.rows], head.uncalibrated)
    estimate = label_free_calibration(asked, agreement(asked.argmax(1), second.families))
    found["temperature"] = scale(raw, estimate["temperature"])
    found["constant"] = constant_confidence(raw.argmax(1), num_clusters, estimate["accuracy"])
    return found


@torch.no_grad()
def _probabilities(network: Network, features: np.ndarray, function: Any) -> np.ndarray:
    device = next(network.parameters()).device
    network.eval()
    return torch.cat([function(part.to(device)).cpu() for part in torch.from_numpy(features).split(4096)]).numpy()
