"""A recipe with the habits of scikit-learn: `DeepClusterer(n_clusters=10).fit(X).labels_`."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.base import BaseEstimator, ClusterMixin

from deepclust.errors import UserError


class DeepClusterer(ClusterMixin, BaseEstimator):
    """Clusters images with a recipe of the command line.

    n_clusters: K; None takes the number of sub-folders of a labelled folder. recipe, backbone:
    names as in `deepclust list recipe`; None leaves the recipe's own backbone. random_state: seed,
    an integer. run_dir: where the run folder goes; None for a temporary one. overrides: further
    keys, {"stages.pretext.trainer.epochs": 20}.

    After `fit`: labels_ (N,) int64, confidence_ (N,) float, model_ (`Clusterer`), summary_ (dict),
    skipped_ (list). An image that could not be read has label -1.
    """

    def __init__(
        self,
        n_clusters: int | None = None,
        *,
        recipe: str = "scan",
        backbone: str | None = None,
        random_state: int = 0,
        run_dir: str | None = None,
        overrides: Mapping[str, Any] | None = None,
        verbose: bool = False,
    ) -> None:
        self.n_clusters = n_clusters
        self.recipe = recipe
        self.backbone = backbone
        self.random_state = random_state
        self.run_dir = run_dir
        self.overrides = overrides
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> DeepClusterer:
        """Trains on X: a folder of images, paths, Pillow images, an `ImageData`, or an array (see
        `Clusterer`).

        y is ignored. Raises UserError for bad settings or images.
        """
        from deepclust.config.load import load
        from deepclust.model import Clusterer
        from deepclust.training.recipe import train

        data = as_data(X)
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(self.run_dir or Path(temporary) / "run")
            config = load([*self._words(), f"run.dir={quoted(str(folder))}"])
            if train(config, data):
                raise KeyboardInterrupt("stopped; the same call with a run_dir goes on from there")
            self.model_ = Clusterer.load(folder, trust=config.trust)
            self._read(folder)
        return self

    def _words(self) -> list[str]:
        words = {"recipe": self.recipe, "seed": self.random_state, "eval.baselines": "none"}
        words["logger.console"] = self.verbose
        if self.backbone is not None:
            words["backbone"] = self.backbone
        if self.n_clusters is not None:
            words["num_clusters"] = self.n_clusters
        return [
            f"{key}={_text(value)}" for key, value in {**words, **(self.overrides or {})}.items()
        ]

    def _read(self, folder: Path) -> None:
        import csv
        import json

        with open(folder / "clusters.csv", newline="", encoding="utf-8") as file:
            rows = sorted(csv.DictReader(file), key=lambda row: int(row["index"]))
        self.labels_ = np.array([int(row["cluster"] or -1) for row in rows])
        self.confidence_ = np.array([float(row["confidence"] or "nan") for row in rows])
        self.skipped_ = [row["path"] for row in rows if row["split"] == "unreadable"]
        self.summary_ = json.loads((folder / "summary.json").read_text())

    def predict(self, X: Any) -> np.ndarray:
        """(N,) int64 clusters of images."""
        return self._fitted().predict(X)

    def predict_proba(self, X: Any) -> np.ndarray:
        """(N, K) float32 probabilities."""
        return self._fitted().predict_proba(X)

    def transform(self, X: Any) -> np.ndarray:
        """(N, D) float32 features."""
        return self._fitted().transform(X)

    def _fitted(self) -> Any:
        if not hasattr(self, "model_"):
            raise UserError("this DeepClusterer is not fitted yet; call fit first")
        return self.model_


def as_data(X: Any) -> Any:
    """`ImageData` of what `DeepClusterer.fit` takes, or itself. Raises UserError for anything
    else."""
    from deepclust.data import datasets
    from deepclust.data.given import gathered

    if isinstance(X, datasets.ImageData):
        return X
    if isinstance(X, str | Path):
        return datasets.image_folder(str(X))
    given = gathered(X)
    if not isinstance(given, list):
        return datasets.from_arrays(given)
    pictures = [each for each in given if not isinstance(each, str)]
    return (
        datasets.from_pictures(pictures)
        if pictures
        else datasets.from_paths([str(path) for path in given])
    )


def _text(value: Any) -> str:
    """A Python value as the command line writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_text, value))}]"
    return str(value) if re.fullmatch(r"[\w./+-]+", str(value)) else quoted(str(value))


def quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"
