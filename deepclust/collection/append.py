"""Clusters that stay what they are while the folder changes: new images, and clusters that are
found again.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from deepclust.collection.derived import Derived, place, project, unit_rows
from deepclust.collection.history import NOISE, State
from deepclust.collection.landmarks import Landmarks, clusterer_of
from deepclust.collection.run import FolderRun
from deepclust.ops import knn

CHUNK = 8192


def append(run: FolderRun, derived: Derived) -> State:
    """The run's state with the images that are new or changed since, and without those that are
    gone.

    A new image that is a near-duplicate of one that the run knows goes where that is; others get
    the vote of the nearest landmarks, and none where noise was asked for and they lie apart. All
    others keep cluster, name and place.
    """
    old, count = run.state(), len(derived)
    touched = derived.store.changed_at[derived.rows] > run.facts["scan"]
    known = np.isin(derived.rows, old.rows) & ~touched
    at = np.searchsorted(old.rows, derived.rows[known])
    copies = np.where(derived.copy_of >= 0, derived.rows[derived.copy_of], -1)
    cluster, confidence = np.full(count, NOISE), np.zeros(count, dtype=np.float32)
    position, excluded = np.zeros((count, 2), dtype=np.float32), np.zeros(count, dtype=bool)
    cluster[known], confidence[known] = old.cluster[at], old.confidence[at]
    position[known], excluded[known] = old.position[at], old.excluded[at]
    fresh = np.flatnonzero(~known)
    if len(fresh):
        cluster[fresh], confidence[fresh], position[fresh] = _voted(run, old, derived, fresh)
    original = np.where(derived.copy_of >= 0, derived.copy_of, np.arange(count))
    held = known & ~excluded
    first = dict(zip(original[held][::-1].tolist(), np.flatnonzero(held)[::-1].tolist()))
    for image in fresh.tolist():
        twin = first.get(int(original[image]))
        if twin is not None:
            cluster[image], confidence[image] = cluster[twin], confidence[twin]
    return State(
        derived.rows, cluster, confidence, position, copies, excluded, dict(old.names), old.next_id
    )


def _voted(
    run: FolderRun, old: State, derived: Derived, fresh: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Clusters, confidences and positions of images (places in `derived`) that the run does not
    know.
    """
    landmarks = Landmarks.load(run)
    features = unit_rows(derived.store.features(derived.backbone), derived.rows[fresh])
    head = clusterer_of(run, old).network.head
    cluster, confidence = (
        np.zeros(len(fresh), dtype=np.int64),
        np.zeros(len(fresh), dtype=np.float32),
    )
    for start in range(0, len(fresh), CHUNK):
        part = slice(start, start + CHUNK)
        most, apart = head.predict(features[part]).max(dim=1), head.outlying(features[part])
        confidence[part] = most.values.numpy()
        cluster[part] = (
            most.indices.numpy()
            if apart is None
            else most.indices.masked_fill(apart, NOISE).numpy()
        )
    at = np.searchsorted(old.rows, landmarks.rows).clip(0, len(old.rows) - 1)
    there = np.flatnonzero(old.rows[at] == landmarks.rows)
    bank = torch.from_numpy(landmarks.x[there].astype(np.float32))
    values, places = knn(
        project(features, torch.from_numpy(landmarks.basis)), bank, k=min(3, len(bank))
    )
    positions = place(values.numpy(), places.numpy(), old.position[at[there]])
    return cluster, confidence, positions


def inherit(old: State, new: State) -> State:
    """`new` with the ids and names of the clusters of `old` that it finds again; the others get ids
    never given before.

    Clusters are matched one-to-one by the images they share, where these are more than half of the
    smaller one.
    """
    from scipy.optimize import linear_sum_assignment

    shared, places, others = np.intersect1d(new.rows, old.rows, return_indices=True)
    ids, known = new.ids, old.ids
    table = np.zeros((len(ids), len(known)))
    if len(shared) and len(known):
        row, column = (
            np.searchsorted(ids, new.cluster[places]),
            np.searchsorted(known, old.cluster[others]),
        )
        counts = (new.cluster[places] >= 0) & (old.cluster[others] >= 0) & ~old.excluded[others]
        np.add.at(table, (row[counts], column[counts]), 1)
    sizes = [
        np.array([(state.cluster[~state.excluded] == each).sum() for each in state.ids])
        for state in (new, old)
    ]
    enough = table > np.minimum(sizes[0][:, None], sizes[1][None]) / 2
    pairs = zip(*linear_sum_assignment(np.where(enough, table, 0), maximize=True))
    renamed = {ids[row]: known[column] for row, column in pairs if enough[row, column]}
    next_id = old.next_id
    for each in ids:
        if each not in renamed:
            renamed[each], next_id = next_id, next_id + 1
    renamed[NOISE] = NOISE
    cluster = np.array([renamed[each] for each in new.cluster.tolist()], dtype=np.int64)
    names = {key: name for key, name in old.names.items() if key in renamed.values()}
    return replace(new, cluster=cluster, names=names, next_id=next_id)
