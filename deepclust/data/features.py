"""Features instead of images: rows of a file, on which heads train with no image in sight."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from deepclust.data.arrays import as_labels, load_array
from deepclust.data.folders import (
    NO_SPLIT,
    Listing,
    by_protocol,
    natural,
    printable,
    read_structure,
)
from deepclust.data.image_set import ImageData, Skipped, as_classes, set_of_arrays
from deepclust.data.store import FeatureStore
from deepclust.errors import UserError
from deepclust.runtime.npz import Unreadable, read_arrays
from deepclust.types import Imbalance


def features(
    file: str,
    labels: str | None = None,
    protocol: Literal["transductive", "inductive", "longtail"] = "transductive",
    imbalance: Imbalance | None = None,
    backbone: str | None = None,
) -> ImageData:
    """Feature vectors of a feature store, or of a .npy, .npz or .safetensors file; goes with
    `backbone=identity`.

    file: a store's folder, as `deepclust features` makes it; or an array (N, D) of any real dtype,
    called `features` (or `x`, or the only one) where the file holds several; beside it a file may
    hold `labels` (N,), `splits` (N,) with the names of splits and `paths` (N,) for clusters.csv.
    labels: another file with them; of a store one for each of its rows, `none` for none, and by
    default the names of folders as for `image_folder`. protocol `inductive`: trains on split train,
    the rest is held out. backbone: which one of a store with several.

    Raises:
        UserError: no such file, another shape, values that are not finite, or a store that was
        changed on disk.
    """
    if os.path.isdir(os.path.expanduser(file)):
        return from_store(file, labels, protocol, imbalance, backbone)
    if backbone is not None:
        raise UserError(
            f"data.backbone={backbone}: chooses among those of a feature store; data.file={file} is"
            " none."
        )
    found = load_columns(file, "data.file")
    if labels is not None:
        found["labels"] = load_array(labels, "data.labels", ("labels", "y"))
    name = Path(file).stem
    return from_features(**found, name=name, protocol=protocol, imbalance=imbalance)


def from_features(
    features: np.ndarray | Tensor,
    labels: Sequence[Any] | np.ndarray | Tensor | None = None,
    splits: Sequence[str] | np.ndarray | None = None,
    paths: Sequence[str] | np.ndarray | None = None,
    name: str = "features",
    protocol: str = "transductive",
    imbalance: float | None = None,
) -> ImageData:
    """The same from arrays: features (N, D), N >= 2, kept as float32.

    Raises UserError also for rows that float32 cannot tell apart.
    """
    rows = as_features(features)
    _refuse_lost(features)
    splits = [NO_SPLIT] * len(rows) if splits is None else _texts("splits", splits, len(rows))
    classes, class_names = (
        (None, []) if labels is None else as_classes(as_labels(labels, len(rows)))
    )
    everything = set_of_arrays(name, rows, splits, classes, class_names)
    if paths is not None:
        everything.paths = _texts("paths", paths, len(rows))
    return by_protocol(name, everything, protocol, imbalance)


def from_store(
    path: str, labels: str | None, protocol: str, imbalance: float | None, backbone: str | None
) -> ImageData:
    """The usable rows of a feature store, as float32 in memory; their ids are the store's rows."""
    store = FeatureStore.open(path)
    name, rows = store.backbone(backbone).name, store.rows(backbone)
    if damaged := store.damaged(name):
        raise UserError(
            f"data.file={path}: {store.file(name)} was changed on disk (SHA-256, {len(damaged)}"
            f" blocks of rows); {store.command} computes them again."
        )
    if waiting := int((~store.computed(name) & (store.status != "deleted")).sum()):
        raise UserError(
            f"data.file={path}: {waiting} images have no features yet; {store.command} goes on."
        )
    listing = Listing(store.root, [store.paths[row] for row in rows])
    read_structure(listing, "none" if labels == "none" else "auto")
    known: list[Any] = listing.labels
    if labels not in (None, "none"):
        column = as_labels(load_array(labels, "data.labels", ("labels", "y")), len(store))
        known = [column[row] for row in rows]
    classes, class_names = as_classes(known, natural if labels is None else None)
    everything = set_of_arrays(
        store.root.name or "features",
        as_features(store.features(name)[rows]),
        listing.splits,
        classes,
        class_names,
    )
    everything.ids, everything.paths, everything.root = rows, listing.paths, str(store.root)
    reasons = (
        (row, store.reasons[row]) for row in np.flatnonzero(store.status == "unreadable").tolist()
    )
    everything.skipped = [
        Skipped(row, printable(store.paths[row]), reason) for row, reason in reasons
    ]
    return by_protocol(everything.name, everything, protocol, imbalance)


def as_features(features: np.ndarray | Tensor, least: int = 2) -> Tensor:
    """(N, D) real numbers to (N, D, 1, 1) float32. Raises UserError for other shapes and for what
    is not finite.
    """
    values = torch.as_tensor(features)
    if values.ndim != 2 or len(values) < least or not values.shape[1] or values.is_complex():
        raise UserError(
            f"features: {values.dtype} of shape {tuple(values.shape)}; expected (N, D) with N >="
            f" {least}."
        )
    rows = values.detach().cpu().float()
    bad = (~rows.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
    if bad:
        raise UserError(
            f"features: NaN or infinite values in {len(bad)} of {len(rows)} rows, first {bad[:5]}."
        )
    return rows.contiguous()[:, :, None, None]


def _refuse_lost(features: np.ndarray | Tensor) -> None:
    """Raises UserError where rows differ by less than float32 can hold, such as times around
    now."""
    from deepclust.ops.precision import TOLD, lost_by_float32

    values = np.asarray(features.detach().cpu() if isinstance(features, Tensor) else features)
    lost = lost_by_float32(values)
    if lost <= TOLD:
        return
    spread = values.std(0, dtype=np.float64)
    wide = np.abs(values.mean(0, dtype=np.float64))
    column = int(np.argmax(np.where(spread > 0, wide, 0)))
    raise UserError(
        f"features: column {column} holds values around {wide[column]:.6g} that differ by"
        f" {spread[column]:.3g}; in float32, in which heads compute, rounding is {100 * lost:.0f} %"
        " of what tells rows apart. Subtract each column's mean first, of training and later"
        " features alike"
    )


def load_columns(file: str, key: str, mapped: bool = False) -> dict[str, np.ndarray]:
    """What `features` reads from a file: `features`, and those of `labels`, `splits`, `paths` that
    are there.

    key: what the setting is called in messages. mapped: features of a .npy file stay on disk,
    read-only.
    """
    path = Path(os.path.expanduser(file))
    if path.suffix == ".safetensors" and path.is_file():
        return _from_safetensors(path, f"{key}={file}")
    found = {"features": load_array(file, key, ("features", "x"), mapped)}
    if path.suffix == ".npz":
        options = {"labels": "labels", "y": "labels", "splits": "splits", "paths": "paths"}
        try:
            content = read_arrays(path, lambda names: [name for name in options if name in names])
        except Unreadable as error:
            raise UserError(f"{key}={file}: {error}.") from error
        for name, values in content.items():
            found.setdefault(options[name], values)
    return found


def _from_safetensors(path: Path, where: str) -> dict[str, np.ndarray]:
    """Tensors `features` (or the only one) and `labels`; this format holds no text."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{where}: cannot be read ({str(error).splitlines()[0]}).") from error
    if "features" not in content and len(content) == 1:
        content = {"features": next(iter(content.values()))}
    if "features" not in content:
        raise UserError(f"{where}: holds {', '.join(content)}; expected a tensor called features.")
    wide = {
        name: value.float() if value.is_floating_point() else value
        for name, value in content.items()
    }
    return {name: wide[name].numpy() for name in ("features", "labels") if name in wide}


def _texts(name: str, values: Any, count: int) -> list[str]:
    texts = [str(value) for value in np.ravel(values)]
    if len(texts) != count:
        raise UserError(
            f"{name}: {len(texts)} entries; expected {count}, one for each row of features."
        )
    return texts
