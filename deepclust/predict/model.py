"""The model of a run as `deepclust predict` uses it: what it wants to be given, and clusters of a
batch of that.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from deepclust.collection.history import NOISE, State
from deepclust.collection.run import FACTS, FolderRun
from deepclust.data.store import MANIFEST, FeatureStore, StoredBackbone
from deepclust.errors import UserError
from deepclust.features.encoder import Encoder, precision_of, rebuild
from deepclust.model import Clusterer
from deepclust.runtime.own_code import NotTrusted

MODEL = "model.safetensors"
SMALL_SIDE = 64
NOT_FINITE = "its features are not finite"


class Found(NamedTuple):
    """Clusters of n images or rows. cluster: (n,) int64. confidence: (n,) float32. faults: n
    reasons, None where fine.

    Where there is a fault, the other two mean nothing.
    """

    cluster: np.ndarray
    confidence: np.ndarray
    faults: list[str | None]


@dataclass
class RunModel:
    """A run's model. names: of clusters, by id; None for runs that name none. digest: SHA-256 of
    the model file.

    stored: what made the features that a model of features learned, None where that is not known
    and `why`, or for a model of images. num_named: how many clusters a run that may name them has
    now. notes: what is to be known of its results.
    """

    run: Path
    clusterer: Clusterer
    digest: str
    names: dict[int, str] | None
    stored: StoredBackbone | None
    why: str = ""
    num_named: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def of_features(self) -> bool:
        """Whether it learned from rows of features."""
        return list(self.clusterer.spec["image_size"]) == [1, 1]

    @property
    def num_features(self) -> int:
        """D of the rows that a model of features wants."""
        return int(self.clusterer.spec["channels"])

    @property
    def num_clusters(self) -> int:
        """How many there are; a model has more where some were merged."""
        return self.clusterer.num_clusters if self.num_named is None else self.num_named

    def of_rows(self, rows: np.ndarray) -> Found:
        """Clusters of features (n, D) of any real dtype."""
        values = torch.from_numpy(np.asarray(rows, dtype=np.float32)[:, :, None, None])
        finite = values.isfinite().flatten(1).all(1)
        return self._found(torch.where(finite[:, None, None, None], values, 0.0), finite.tolist())

    def of_pixels(self, pixels: np.ndarray) -> Found:
        """Clusters of images (n, C, side, side) uint8 by a model of images."""
        return self._found(torch.from_numpy(pixels), [True] * len(pixels))

    def _found(self, given: Tensor, fine: list[bool]) -> Found:
        """The most probable clusters of what the network is given, and their probabilities."""
        clusterer = self.clusterer
        keys = torch.zeros(len(given), dtype=torch.int64, device=clusterer.device)
        with torch.inference_mode():
            cluster, confidence = clusterer.assigned(
                clusterer.view.batch(given.to(clusterer.device), keys)
            )
        faults = [None if each else NOT_FINITE for each in fine]
        return Found(cluster.cpu().numpy(), confidence.float().cpu().numpy(), faults)


def open_model(run: Path, device: torch.device, trust: Sequence[str] = ()) -> RunModel:
    """The model of a run folder or of its model.safetensors. Raises UserError where it cannot be
    had.
    """
    clusterer = Clusterer.load(run, device, trust)
    file = run / MODEL if run.is_dir() else run
    folder = file.parent
    model = RunModel(run, clusterer, hashlib.sha256(file.read_bytes()).hexdigest(), None, None)
    if file.name == MODEL and (folder / FACTS).is_file():
        found = FolderRun.open(folder)
        state = found.state()
        model.names, model.num_named = dict(state.names), len(state.ids)
        model.notes = tuple(_notes(found, state, clusterer))
        try:
            model.stored = found.store.backbone(found.facts["backbone"])
        except UserError as error:
            model.why = f"what made its features is not known: {error}"
    elif model.of_features:
        model.stored, model.why = _trained_on(folder if file.name == MODEL else None)
    return model


def _notes(run: FolderRun, state: State, clusterer: Clusterer) -> Iterator[str]:
    """What a run's clusters cannot tell of other images."""
    if "confidence" in run.missing:
        reason = run.missing["confidence"]
        yield (
            "confidences are shares of votes; how far to trust them could not be estimated:"
            f" {reason}"
        )
    tells = bool(getattr(clusterer.network.head, "outlier_neighbors", 0))
    if run.facts["asked"].get("noise") and not tells and (state.cluster[state.kept] == NOISE).any():
        yield (
            "noise is not told, every image gets a cluster: the run does not know how yet;"
            f" {run.append_command()}"
        )


def _trained_on(folder: Path | None) -> tuple[StoredBackbone | None, str]:
    """What made the features that a run of training learned from, or why that is not known."""
    import yaml

    unknown = "what made its features is not known"
    if folder is None or not (folder / "config.yaml").is_file():
        return None, f"{unknown}: there is no config.yaml beside it"
    try:
        data = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["data"]
        file, name = str(data["file"]), data.get("backbone")
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return None, f"{unknown}: {folder / 'config.yaml'} does not tell ({type(error).__name__})"
    path = Path(os.path.expanduser(file))
    places = [
        path,
        *(above / path for above in folder.absolute().parents),
    ]  # it was relative to where that run began
    store = next((place for place in places if (place / MANIFEST).is_file()), None)
    if store is None:
        there = path.is_file()
        return (
            None,
            (
                f"{unknown}: {file}"
                f" {'is an array, which does not tell' if there else 'is no longer there'}"
            ),
        )
    try:
        return FeatureStore.open(store).backbone(name), ""
    except UserError as error:
        return None, f"{unknown}: {error}"


class ImageModel:
    """Clusters of batches of decoded images, by a model of images or by one of features and what
    makes them.

    side, channels: of the pixels that it is given. batch_size: images in a batch. padded: whether a
    last batch is to be as large as the others. facts: what results depend on besides the run's
    model. said: for people.
    """

    def __init__(
        self,
        model: RunModel,
        backbone: str | None,
        weights: str | None,
        batch_size: int | None,
        trust: Sequence[str] = (),
    ) -> None:
        self.model = model
        self.encoder: Encoder | None = None
        device = model.clusterer.device
        self.dtype, self.padded = np.dtype(np.float32), False
        if not model.of_features:
            if backbone or weights:
                raise UserError(
                    f"{model.run} is a model of images; --backbone and --weights go with a model of"
                    " features"
                )
            spec = model.clusterer.spec
            self.side, self.channels = max(spec["image_size"]), int(spec["channels"])
            precision, usual = (
                "float32",
                256 if device.type == "cuda" or self.side <= SMALL_SIDE else 32,
            )
            self.said = f"a model of images of {self.side} px"
        else:
            self.encoder = encoder = _encoder(model, backbone, weights, trust)
            encoder.device = device
            self.side, self.channels = encoder.side, encoder.channels
            identity = model.stored.identity if model.stored else {}
            self.dtype = np.dtype(model.stored.dtype if model.stored else np.float32)
            self.padded = True
            precision = identity.get("precision") or precision_of(encoder)
            usual = identity.get("batch_size") or (256 if device.type == "cuda" else 32)
            encoder.begin(precision)
            self.said = (
                f"a model of features by {encoder.model}, images of {self.side} px, {precision}"
            )
        self.batch_size = batch_size or usual
        made_by = self.encoder.identity["weights"] if self.encoder else None
        self.facts = {"batch size": self.batch_size, "precision": precision, "backbone": made_by}

    def __call__(self, pixels: np.ndarray) -> Found:
        """Clusters of (n, C, side, side) uint8."""
        if self.encoder is None:
            return self.model.of_pixels(pixels)
        with np.errstate(over="ignore"):
            return self.model.of_rows(
                self.encoder(torch.from_numpy(pixels)).numpy().astype(self.dtype)
            )


def _encoder(
    model: RunModel, backbone: str | None, weights: str | None, trust: Sequence[str]
) -> Encoder:
    """What makes the features that a model of features wants; UserError with the fix where it
    cannot be had.
    """
    fix = (
        "--backbone NAME or FILE.py:FUNCTION, with --weights FILE for a local file, says where"
        " it is"
    )
    if model.stored is None and backbone is None:
        raise UserError(
            f"{model.run} is a model of features, and {model.why}. Give features of these images,"
            f" or {fix}"
        )
    stored = model.stored
    try:
        if stored is None:
            from deepclust.features.encoder import find_encoder

            encoder = find_encoder(str(backbone), weights)
        else:
            encoder = rebuild(stored, backbone, weights, trust)
    except NotTrusted as error:
        raise UserError(f"{model.run} needs the network that made its features. {error}") from error
    except UserError as error:
        raise UserError(
            f"{model.run} needs the network that made its features. {error}.\n{fix}"
        ) from error
    if encoder.num_features != model.num_features:
        raise UserError(
            f"{encoder.model} gives {encoder.num_features} features; {model.run} was trained on"
            f" {model.num_features}"
        )
    return encoder
