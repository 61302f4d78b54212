"""Clusters of landmarks as a model: it gives all other images, and new ones, their clusters and
confidences.
"""

from __future__ import annotations

import hashlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from deepclust.collection.derived import NUM_NEIGHBORS, Derived, project
from deepclust.collection.history import NOISE, State
from deepclust.collection.noise import NOISE_COLUMNS, Noise, outlier_neighbors
from deepclust.collection.run import FolderRun
from deepclust.errors import UserError
from deepclust.eval.confidence import agreement, independent_clusterings
from deepclust.eval.label_free import sample_rows
from deepclust.heads.readout import Votes
from deepclust.model import Clusterer, Network
from deepclust.ops import knn
from deepclust.runtime.estimates import Estimates
from deepclust.runtime.files import write_atomic
from deepclust.runtime.npz import Column, Unreadable, read_columns

FILE = "landmarks.npz"
NEXT = "landmarks-next.npz"
"""Landmarks that are about to take the place of others: they do once the run's history has the
clusters they are of.
"""
COLUMNS = {
    "rows": Column("i", ("m",)),
    "x": Column("f", ("m", "p")),
    "trust": Column("f", ("m",)),
    "basis": Column("f", ("d", "p")),
}
MAX_ASKED = 1500
FEW = 10
"""Anchors of a cluster that holds no landmark."""


@dataclass(frozen=True)
class Landmarks:
    """What a run keeps of the images that were clustered.

    rows: (m,) int64 of the store. x: (m, P) of length one, float16, or float32 where noise is told
    by them. trust: (m,) float32. basis: (D, P) float32. noise: what lies apart, None where that was
    not asked for or could not be told.
    """

    rows: np.ndarray
    x: np.ndarray
    trust: np.ndarray
    basis: np.ndarray
    noise: Noise | None = None

    @classmethod
    def of(cls, derived: Derived, trust: np.ndarray, noise: bool) -> Landmarks:
        """Those of what is derived of a store. noise: whether they shall tell what lies apart."""
        told = derived.outliers if noise else None
        x = derived.x[torch.from_numpy(derived.landmarks)].numpy()
        kept = (
            x.astype(np.float16) if told is None else x
        )  # half precision is too coarse to tell densities
        return cls(derived.rows[derived.landmarks], kept, trust, derived.basis.numpy(), told)

    def save(self, path: Path) -> str:
        """Writes a file, whole or not at all, and gives its SHA-256."""
        buffer = io.BytesIO()
        noise = (
            {}
            if self.noise is None
            else {name: getattr(self.noise, name) for name in NOISE_COLUMNS}
        )
        np.savez(buffer, rows=self.rows, x=self.x, trust=self.trust, basis=self.basis, **noise)
        write_atomic(path, buffer.getvalue())
        return hashlib.sha256(buffer.getvalue()).hexdigest()

    @classmethod
    def load(cls, run: FolderRun) -> Landmarks:
        """Those of a run. Raises UserError where they cannot be had, with the command that makes
        them anew.
        """
        settle_landmarks(run)
        path, wanted = run.path / FILE, run.facts.get("landmarks")
        try:
            found = read_columns(path, COLUMNS, NOISE_COLUMNS)
            if wanted is not None and _digest(path) != wanted:
                raise Unreadable("was changed after it was written (SHA-256)")
        except Unreadable as error:
            raise DamagedLandmarks(
                f"{path} {error}; {run.append_command()} makes it anew"
            ) from error
        noise = {name: found[name] for name in NOISE_COLUMNS if name in found}
        told = Noise(**noise) if len(noise) == len(NOISE_COLUMNS) else None
        return cls(*(found[name] for name in COLUMNS), noise=told)


class DamagedLandmarks(UserError):
    """A run's landmarks cannot be read; they can be made anew."""


def settle_landmarks(run: FolderRun) -> None:
    """Puts the landmarks of the run's last step in place where a stop kept them from it, and
    removes others.
    """
    waiting = run.path / NEXT
    if waiting.is_file():
        if _digest(waiting) == run.facts.get("landmarks"):
            os.replace(waiting, run.path / FILE)
        else:
            waiting.unlink()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def landmarks_again(run: FolderRun, derived: Derived, estimates: Estimates) -> None:
    """Writes a run's landmarks anew, from what is derived of its store and the clusters as they are
    now.
    """
    state, rows = run.state(), derived.rows[derived.landmarks]
    x = derived.x[torch.from_numpy(derived.landmarks)]
    where = np.searchsorted(state.rows, rows).clip(0, max(len(state.rows) - 1, 0))
    known = (state.rows[where] == rows) & ~state.excluded[where] & (state.cluster[where] >= 0)
    kept = np.flatnonzero(known)
    _, labels = np.unique(state.cluster[where[kept]], return_inverse=True)
    seed = run.facts["asked"].get("seed", 0)
    trust = np.ones(len(x), dtype=np.float32)
    found = (
        estimates("confidence", lambda: trust_in(x[torch.from_numpy(kept)], labels, seed))
        if len(kept)
        else None
    )
    if found is not None:
        trust[:] = found.mean()
        trust[kept] = found
    landmarks = Landmarks.of(derived, trust, run.facts["asked"].get("noise", False))
    run.facts["landmarks"] = landmarks.save(run.path / FILE)
    run.save()


def trust_in(x: Tensor, labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """(m,) float32: how far each landmark's cluster can be relied on, without labels.

    x: (m, P) unit rows. labels: (m,) clusters. Half of it is the share of independent clusterings
    (`eval.confidence`) that agree on the image and its neighbours, half the mean of that over
    all images: opinions that share errors agree on them, so what they say of a single image is
    believed by half (of clothing photos, digits and Fashion-MNIST, whose labels were in view, this
    had the smaller calibration error beside believing the family of opinions that agrees least). At
    most 1,500 landmarks are asked about, the others go by their nearest.
    """
    num_clusters = len(np.unique(labels))
    rows = np.sort(sample_rows(len(x), MAX_ASKED, seed))
    if num_clusters < 2 or len(rows) <= num_clusters:
        return np.ones(len(x), dtype=np.float32)
    asked = x[torch.from_numpy(rows)]
    asked_for = independent_clusterings(asked.numpy(), num_clusters, seed=seed)
    agreed = agreement(
        labels[rows], {"all": [each for family in asked_for.values() for each in family]}
    )
    if len(rows) < len(x):
        _, places = knn(x, asked, k=min(3, len(rows)))
        agreed = agreed[places.numpy()].mean(1)
    return ((agreed + agreed.mean()) / 2).astype(np.float32)


def save_model(run: FolderRun, state: State) -> None:
    """Writes model.safetensors: the clusters of a state as a model of features."""
    clusterer_of(run, state).save(run.path / "model.safetensors")


def clusterer_of(run: FolderRun, state: State) -> Clusterer:
    """Features (N, D) in, clusters out; probabilities have a column for every id that was ever
    given.

    Landmarks carry the clusters that their images have now. A cluster without any gets some of its
    images as such; noise and what was excluded has no vote. Where noise was asked for, the model
    tells it of other images too, unless all that was found was put into clusters since.
    """
    landmarks = Landmarks.load(run)
    where = np.searchsorted(state.rows, landmarks.rows).clip(0, len(state.rows) - 1)
    there = state.rows[where] == landmarks.rows
    cluster = np.where(there & ~state.excluded[where], state.cluster[where], -1)
    kept = np.flatnonzero(cluster >= 0)
    x, clusters, trust = landmarks.x[kept].astype(np.float16), cluster[kept], landmarks.trust[kept]
    basis = torch.from_numpy(landmarks.basis)
    for missing in sorted(set(state.ids) - set(clusters.tolist())):
        members = np.flatnonzero((state.cluster == missing) & ~state.excluded)
        chosen = members[np.argsort(-state.confidence[members], kind="stable")[:FEW]]
        more = (
            project(torch.from_numpy(run.features(state.rows[chosen])), basis)
            .numpy()
            .astype(np.float16)
        )
        x, clusters = (
            np.concatenate([x, more]),
            np.concatenate([clusters, np.full(len(chosen), missing)]),
        )
        trust = np.concatenate([trust, state.confidence[chosen]])
    if not len(x):
        raise UserError(
            f"{run.path}: no image is in a cluster any more; deepclust edit {run.path} undo takes"
            " it back"
        )
    head = {
        "_target_": "deepclust.heads.readout.Votes",
        "num_anchors": len(x),
        "num_components": basis.shape[1],
        "num_neighbors": NUM_NEIGHBORS,
    }
    buffers = {"basis": basis, "anchors": x, "owners": clusters, "trust": trust}
    noise = landmarks.noise
    if noise is not None:
        apart = np.where(
            there & ~state.excluded[where], state.cluster[where] == NOISE, noise.outlying
        )
        if apart.any() or not noise.outlying.any():
            head |= {
                "num_landmarks": len(apart),
                "outlier_neighbors": outlier_neighbors(len(apart)),
            }
            buffers |= {"landmarks": landmarks.x, "reach": noise.reach, "density": noise.density}
            buffers |= {"limit": noise.limit, "apart": apart}
    dim, num = len(basis), max(state.next_id, 1)
    spec = {
        "backbone": {"_target_": "deepclust.backbones.identity"},
        "head": head,
        "channels": dim,
        "size": 1,
    }
    spec |= {
        "num_clusters": num,
        "clean": [],
        "view_size": [1, 1],
        "image_size": [1, 1],
        "mean": [0.0],
        "std": [1.0],
    }
    votes = Votes(dim, num, **{key: value for key, value in head.items() if key != "_target_"})
    for name, values in buffers.items():
        buffer = getattr(votes, name)
        buffer.copy_(torch.as_tensor(values).to(buffer.dtype))
    from deepclust.backbones import identity

    return Clusterer(Network(identity(dim, 1), votes), spec)
