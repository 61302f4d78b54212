"""What is made of a store's features once, whatever number of clusters is asked for: kept beside
them on disk.

Everything is over the store's usable images, n of them, in the order of their rows.
`<store>/derived/` holds it, each part with a key of what it was made from; what no longer fits is
made anew.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from deepclust.collection.duplicates import near_duplicates
from deepclust.collection.noise import NOISE_COLUMNS, Noise, outlier_neighbors
from deepclust.data.store import FeatureStore
from deepclust.eval.label_free import sample_rows
from deepclust.ops import knn
from deepclust.ops.eigen import eigh, principal_scores
from deepclust.ops.outliers import fit_density
from deepclust.runtime.estimates import Estimates
from deepclust.runtime.files import write_atomic
from deepclust.runtime.npz import Column, Unreadable, read_columns

NUM_COMPONENTS = 128
"""Leading directions of the features that are compared: on photos as good as all 1,280, in a tenth
of the time.
"""
NUM_NEIGHBORS = 15
NUM_LANDMARKS = 4000
"""Images that are clustered; all others follow the nearest of them."""
FEWEST = 5
"""Landmarks of which outliers can be told."""
PARTS = {
    "projected": {"basis": Column("f", ("d", "p")), "x": Column("f", ("n", "p"))},
    "neighbors": {"values": Column("f", ("n", "k")), "places": Column("i", ("n", "k"))},
    "duplicates": {"copy_of": Column("i", ("n",))},
    "nearest": {"values": Column("f", ("n", "k")), "places": Column("i", ("n", "k"))},
    "map": {"positions": Column("f", ("n", 2))},
    "outliers": NOISE_COLUMNS,
}
OF_IMAGES = ("x", "values", "places", "copy_of", "positions")
"""Arrays with a row for each image."""
OF_LANDMARKS = ("nearest", "map", "outliers")
"""Parts that are made of the landmarks."""
CHUNK = 8192

Arrays = dict[str, np.ndarray]


class Derived:
    """Parts are made when first asked for. rows: (n,) int64 of the store. told: called with what is
    being made.

    estimates: knows which of near-duplicates, map and outliers failed; then there is none of them.
    """

    def __init__(
        self,
        store: FeatureStore,
        backbone: str,
        told: Callable[[str], None] = lambda what: None,
        estimates: Estimates | None = None,
    ) -> None:
        self.store, self.backbone, self.told = store, backbone, told
        self.estimates = estimates or Estimates()
        self.rows = store.rows(backbone)
        digest = hashlib.sha256(f"{backbone} {store.digest(backbone)}".encode())
        for column in (self.rows, store.perceptual[self.rows], store.has_perceptual[self.rows]):
            digest.update(column.tobytes())
        self.key = digest.hexdigest()

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _projected(self) -> Arrays:
        return self._kept("projected", self._project, "leading directions of the features")

    @property
    def basis(self) -> Tensor:
        """(D, P) float32: orthonormal leading directions of the features, most of their squared
        length first.
        """
        return torch.from_numpy(self._projected["basis"])

    @property
    def x(self) -> Tensor:
        """(n, P) float32 rows of length one: features in these directions."""
        return torch.from_numpy(self._projected["x"])

    @cached_property
    def neighbors(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosines (n, k) float32, descending, and places (n, k) int64 of each image's nearest
        others, k <= 15.
        """
        found = self._kept("neighbors", self._neighbors, "nearest neighbours")
        return found["values"], found["places"]

    @cached_property
    def copy_of(self) -> np.ndarray:
        """(n,) int64: place of the image that this one is a near-duplicate of, -1 for none."""
        found = self.estimates(
            "near-duplicates", lambda: self._kept("duplicates", self._duplicates, "near-duplicates")
        )
        if found is None:
            return np.full(len(self), -1, dtype=np.int64)
        return found["copy_of"]

    @cached_property
    def landmarks(self) -> np.ndarray:
        """(m,) int64 ascending places of the images that are clustered: one of a group of
        duplicates, 4,000 at most.
        """
        single = np.flatnonzero(self.copy_of < 0)
        return single[np.sort(sample_rows(len(single), NUM_LANDMARKS, 0))]

    @cached_property
    def nearest(self) -> tuple[Tensor, Tensor]:
        """Cosines and positions in `landmarks`, (n, k) each, of each image's nearest landmarks
        (itself if it is).
        """
        found = self._kept("nearest", self._nearest, "")
        return torch.from_numpy(found["values"]), torch.from_numpy(found["places"])

    @cached_property
    def map(self) -> np.ndarray:
        """(n, 2) float32 positions on a t-SNE map (van der Maaten and Hinton 2008) of landmarks;
        NaN without one.
        """
        found = self.estimates("map", lambda: self._kept("map", self._map, "a map"))
        return (
            np.full((len(self), 2), np.nan, dtype=np.float32)
            if found is None
            else found["positions"]
        )

    @cached_property
    def outliers(self) -> Noise | None:
        """Which landmarks lie far sparser than others, and what tells that of any image; None where
        that fails.

        Their local outlier factor (Breunig et al. 2000) among 20 neighbours, fewer of few
        landmarks, is more than three times the interquartile range above the upper quartile of the
        landmarks' (Tukey's rule for what is far out). None also of fewer than five landmarks, where
        nothing can be told.
        """
        if len(self.landmarks) < FEWEST:
            return None
        found = self.estimates(
            "outliers", lambda: self._kept("outliers", self._outliers, "outliers")
        )
        return None if found is None else Noise(**found)

    @cached_property
    def outlying(self) -> np.ndarray:
        """(n,) bool: images that lie apart as `outliers` has it; near-duplicates do where their
        original does.
        """
        noise, apart = self.outliers, np.zeros(len(self), dtype=bool)
        if noise is None:
            return apart
        apart[self.landmarks] = noise.outlying
        others = np.setdiff1d(np.arange(len(self)), self.landmarks)
        bank = self.x[torch.from_numpy(self.landmarks)]
        for part in _chunks(others):
            apart[part] = noise.apart(self.x[torch.from_numpy(part)], bank).numpy()
        return apart[np.where(self.copy_of >= 0, self.copy_of, np.arange(len(self)))]

    @property
    def there(self) -> bool:
        """Whether the parts that every run needs are on disk already."""
        return all(self._read(name) is not None for name in ("map", "neighbors", "nearest"))

    def _kept(self, name: str, make: Callable[[], Arrays], words: str) -> Arrays:
        """A part from disk, or made now and kept."""
        found = self._read(name)
        if found is not None:
            return found
        self.told(words)
        made, path = make(), self._path(name)
        path.parent.mkdir(exist_ok=True)
        buffer = io.BytesIO()
        columns: dict[str, Any] = {"key": np.array(self._key(name)), **made}
        np.savez(buffer, **columns)
        write_atomic(path, buffer.getvalue())
        return made

    def _key(self, name: str) -> str:
        """What a part must have been made from. Without near-duplicates all images are landmarks,
        which are others.
        """
        if (
            name in OF_LANDMARKS
            and (self.copy_of < 0).all()
            and "near-duplicates" in self.estimates.missing
        ):
            return f"{self.key} without near-duplicates"
        return self.key

    def _path(self, name: str) -> Path:
        return self.store.path / "derived" / f"{name}-{self.backbone}.npz"

    def _read(self, name: str) -> Arrays | None:
        """A part that is on disk, whole and made from what is there now; else None: it is made
        again.
        """
        try:
            if str(read_columns(self._path(name), {"key": Column("U", ())})["key"]) != self._key(
                name
            ):
                return None
            found = read_columns(self._path(name), PARTS[name])
        except Unreadable:
            return None
        return found if self._fits(name, found) else None

    def _fits(self, name: str, found: Arrays) -> bool:
        """Whether a part has a row for each image, and its places are places."""
        if any(len(values) != len(self) for part, values in found.items() if part in OF_IMAGES):
            return False
        if name == "projected":
            return len(found["basis"]) == self.store.features(self.backbone).shape[1]
        if name == "outliers":
            return len(found["reach"]) == len(self.landmarks)
        places = found.get("places", found.get("copy_of", np.zeros(0)))
        count = len(self.landmarks) if name == "nearest" else len(self)
        lowest = -1 if name == "duplicates" else 0
        return bool(places.min(initial=lowest) >= lowest and places.max(initial=lowest) < count)

    def _project(self) -> Arrays:
        features = self.store.features(self.backbone)
        basis = leading_directions(features, self.rows, NUM_COMPONENTS)
        parts = [project(unit_rows(features, part), basis) for part in _chunks(self.rows)]
        return {"basis": basis.numpy(), "x": torch.cat(parts).numpy()}

    def _neighbors(self) -> Arrays:
        k = min(NUM_NEIGHBORS, len(self) - 1)
        values, places = knn(self.x, self.x, k=k, exclude_self=True)
        return {"values": values.numpy(), "places": places.numpy()}

    def _duplicates(self) -> Arrays:
        store, rows = self.store, self.rows
        features = store.features(self.backbone)
        whole = len(rows) == len(store)
        hashes = [store.hashes[row] for row in rows.tolist()]
        looks = (store.perceptual[rows], store.has_perceptual[rows], store.sizes[rows])
        return {"copy_of": near_duplicates(features if whole else features[rows], hashes, *looks)}

    def _nearest(self) -> Arrays:
        bank = self.x[torch.from_numpy(self.landmarks)]
        values, places = knn(self.x, bank, k=min(NUM_NEIGHBORS, len(bank)))
        return {"values": values.numpy(), "places": places.numpy()}

    def _outliers(self) -> Arrays:
        x = self.x[torch.from_numpy(self.landmarks)]
        density, factors = fit_density(x, outlier_neighbors(len(x)))
        low, high = np.percentile(factors.numpy(), [25, 75])
        limit = np.float32(high + 3 * (high - low))
        known = {"reach": density.reach.numpy(), "density": density.density.numpy()}
        return {**known, "limit": np.array(limit), "outlying": factors.numpy() > limit}

    def _map(self) -> Arrays:
        placed = embed(self.x[torch.from_numpy(self.landmarks)].numpy())
        values, places = self.nearest
        return {"positions": place(values.numpy(), places.numpy(), placed)}


def unit_rows(features: np.ndarray, rows: np.ndarray) -> Tensor:
    """(n, D) float32 of length one: some rows of a store's features."""
    return F.normalize(torch.from_numpy(np.asarray(features[rows], dtype=np.float32)), dim=1)


def _chunks(rows: np.ndarray) -> list[np.ndarray]:
    return [rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK)]


def leading_directions(features: np.ndarray, rows: np.ndarray, num: int) -> Tensor:
    """(D, P) eigenvectors of the mean of x x^T over unit rows, P = min(num, D): principal
    components, not centred.
    """
    dim = features.shape[1]
    if dim <= num:
        return torch.eye(dim)
    total = torch.zeros(dim, dim, dtype=torch.float64)
    for part in _chunks(rows):
        x = unit_rows(features, part)
        total += (x.T @ x).double()
    return eigh(total)[1][:, -num:].flip(1).float().contiguous()


def project(x: Tensor, basis: Tensor) -> Tensor:
    """Unit rows (b, D) in some directions (D, P), of length one again."""
    return F.normalize(x @ basis, dim=1)


def embed(x: np.ndarray) -> np.ndarray:
    """(m, 2) float32 t-SNE positions, centred, the farthest at distance 1; a line where there are
    too few for it.
    """
    from sklearn.manifold import TSNE

    from deepclust.clustering.methods import calm

    if len(x) < 5 or (x == x[0]).all():
        return np.linspace([-1, 0], [1, 0], len(x), dtype=np.float32)
    with calm():
        reduced = principal_scores(x, min(30, *x.shape))
        perplexity = min(30.0, (len(x) - 1) / 3)
        found = TSNE(
            2, init="pca", perplexity=perplexity, max_iter=500, random_state=0
        ).fit_transform(reduced)
    found = found - found.mean(0)
    return (found / max(float(np.linalg.norm(found, axis=1).max()), 1e-12)).astype(np.float32)


def place(values: np.ndarray, places: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """(n, 2) positions of images among placed ones: near the nearest of them, drawn to the next
    two, with a jitter.

    values, places: (n, k) cosines and places of their nearest, descending. What lies on a placed
    one (cosine 1) alone
    is that one itself, or a copy: the first keeps the position.
    """
    near = np.exp((values[:, :3] - values[:, :1]) / 0.02)
    found = (positions[places[:, :3]] * (near / near.sum(1, keepdims=True))[:, :, None]).sum(1)
    own = values[:, 0] > 1 - 1e-5
    found[own] = positions[places[own, 0]]
    random = np.random.default_rng(0)
    angle, radius = (
        random.uniform(0, 2 * np.pi, len(found)),
        0.008 * np.sqrt(random.uniform(0, 1, len(found))),
    )
    first = np.zeros(len(found), dtype=bool)
    first[np.unique(np.where(own, places[:, 0], -1), return_index=True)[1]] = True
    offset = np.stack([np.cos(angle), np.sin(angle)], axis=1) * radius[:, None]
    return (found + np.where((own & first)[:, None], 0, offset)).astype(np.float32)
