"""Which images a report shows for a cluster, and how close each image is to the centres of the
clusters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from deepclust.collection.history import NOISE, State
from deepclust.collection.run import FolderRun

CHUNK = 4096


class Closeness(NamedTuple):
    """own: (n,) float32, cosine similarity of each image to the centre of its cluster; of noise, to
    the nearest one.

    second: (n,) int64, the cluster whose centre is the nearest of the others (of noise, of all), -1
    for none.
    """

    own: np.ndarray
    second: np.ndarray


def closeness(run: FolderRun, state: State) -> Closeness:
    """Two passes over the images that were kept; excluded ones hold 0 and -1.

    A centre is the mean of its members' features in the leading directions, each of length one;
    near-duplicates count once.
    """
    ids, kept = np.array(state.ids, dtype=np.int64), state.kept
    own, second = np.zeros(len(state.rows), dtype=np.float32), np.full(len(state.rows), NOISE)
    if not len(ids):
        return Closeness(own, second)
    place = np.searchsorted(ids, state.cluster)
    sums = np.zeros((len(ids), run.derived.x.shape[1]), dtype=np.float32)
    counted = kept[(state.cluster[kept] >= 0) & (state.copy_of[kept] < 0)]
    for start in range(0, len(counted), CHUNK):
        part = counted[start : start + CHUNK]
        member = np.zeros((len(ids), len(part)), dtype=np.float32)
        member[place[part], np.arange(len(part))] = 1
        sums += member @ run.directions(state.rows[part])
    centers = sums / np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), 1e-12)
    for start in range(0, len(kept), CHUNK):
        part = kept[start : start + CHUNK]
        values = run.directions(state.rows[part]) @ centers.T
        clustered = np.flatnonzero(state.cluster[part] >= 0)
        own[part] = values.max(1)
        own[part[clustered]] = values[clustered, place[part[clustered]]]
        values[clustered, place[part[clustered]]] = -np.inf
        nearest = values.argmax(1)
        found = np.isfinite(values[np.arange(len(part)), nearest])
        second[part] = np.where(found, ids[nearest], NOISE)
    return Closeness(own, second)


def choose(confidence: np.ndarray, own: np.ndarray, count: int) -> list[np.ndarray]:
    """Typical, borderline and outlying members of a cluster: half of `count`, a quarter and a
    quarter, none twice.

    confidence, own: (n,) of the members. Typical: nearest to the centre among the more confident
    half. Borderline: the least confident. Outlying: farthest from the centre. Returns three arrays
    of positions; where the cluster is small, all are typical.
    """
    order = np.argsort(-own, kind="stable")
    if len(order) <= count:
        return [order, order[:0], order[:0]]
    quarter = max(count // 4, 1)
    sure = confidence[order] >= np.median(confidence)
    typical = np.concatenate([order[sure], order[~sure]])[: max(count - 2 * quarter, 1)]
    rest = np.setdiff1d(order, typical)
    unsure = rest[np.argsort(confidence[rest], kind="stable")]
    borderline = unsure[:quarter]
    rest = np.setdiff1d(rest, borderline)
    return [typical, borderline, rest[np.argsort(own[rest], kind="stable")][:quarter]]


def duplicate_groups(state: State) -> list[np.ndarray]:
    """Groups of near-duplicates among the images that were kept: rows, the original first; the
    largest group first.
    """
    kept = state.kept
    rows, of = state.rows[kept], state.copy_of[kept]
    copies, of = rows[of >= 0], of[of >= 0]
    order = np.argsort(of, kind="stable")
    originals, starts = np.unique(of[order], return_index=True)
    present = set(rows.tolist())
    groups = []
    for original, members in zip(originals.tolist(), np.split(copies[order], starts[1:])):
        group = np.concatenate([[original], members]) if original in present else members
        if len(group) > 1:
            groups.append(group)
    return sorted(groups, key=lambda group: -len(group))
