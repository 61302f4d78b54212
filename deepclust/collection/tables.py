"""The clusters as tables: one row per image that was not excluded, the same in CSV and in Parquet.

Columns: `path`, absolute; `cluster`, -1 for noise; `confidence`; `x`, `y`, the place on the map;
`neighbours`, row numbers (from 0, within the table) of the nearest images and 1 - cosine to them;
`duplicate_of`, the path of the image that this one is a near-duplicate of; `name` of the cluster
where it has one; `index`, the row of the feature store. Bytes of a path that are not UTF-8 are
written as `\\udc..`, in both files alike.
"""

from __future__ import annotations

import io
import os

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from deepclust.collection.derived import Derived
from deepclust.collection.history import State
from deepclust.collection.run import FolderRun
from deepclust.data.folders import printable

EXCLUDED = "taken out with deepclust edit"


def clusters_table(run: FolderRun, state: State, derived: Derived) -> pa.Table:
    """The table with neighbours as a struct {ids: list<int64>, distances: list<float32>}, as
    Embedding Atlas reads it.

    derived: of the run's store. Of an image's 15 nearest those are given that were not excluded.
    """
    kept = state.kept
    cluster = state.cluster[kept]
    names = np.array([state.names.get(each) for each in cluster.tolist()], dtype=object)
    rows, root = state.rows[kept].tolist(), str(run.root)
    paths = {row: printable(os.path.join(root, run.store.paths[row])) for row in rows}
    originals = [None if row < 0 else paths[row] for row in duplicate_of(state).tolist()]
    return pa.table(
        {
            "path": pa.array([paths[row] for row in rows], pa.string()),
            "cluster": pa.array(cluster, pa.int64()),
            "confidence": _known(run.confidence(state)[kept]),
            "x": _known(state.position[kept, 0]),
            "y": _known(state.position[kept, 1]),
            "neighbours": _neighbours(state, derived),
            "duplicate_of": pa.array(originals, pa.string()),
            "name": pa.array(names, pa.string()),
            "index": pa.array(state.rows[kept], pa.int64()),
        }
    )


def _known(values: np.ndarray) -> pa.Array:
    """float32, null where a value is not known."""
    return pa.array(np.ascontiguousarray(values), pa.float32(), from_pandas=True)


def duplicate_of(state: State) -> np.ndarray:
    """(m,) int64: for each image that was not excluded, the row of the one that stands for its
    group; -1: itself does.

    That is the one of `copy_of`, or the first that is left of the group where that one was
    excluded.
    """
    kept = state.kept
    rows, copy_of = state.rows[kept], state.copy_of[kept]
    groups = np.where(copy_of < 0, rows, copy_of)
    first = np.lexsort((copy_of >= 0, groups))  # the group's own image before its copies
    _, start, group = np.unique(groups[first], return_index=True, return_inverse=True)
    stands = np.empty(len(kept), dtype=np.int64)
    stands[first] = rows[first[start]][group]
    return np.where(stands == rows, -1, stands)


def as_csv(table: pa.Table) -> bytes:
    """UTF-8 with a header; text is quoted, what is missing is empty, neighbours are row numbers
    between spaces.
    """
    ids = (
        table["neighbours"].combine_chunks().field("ids")
        if "neighbours" in table.column_names
        else None
    )
    if ids is not None:
        words = [" ".join(map(str, each)) for each in ids.to_pylist()]
        table = table.set_column(
            table.schema.get_field_index("neighbours"), "neighbours", pa.array(words, pa.string())
        )
    file = io.BytesIO()
    file.write((",".join(table.column_names) + "\n").encode())
    pyarrow.csv.write_csv(table, file, pyarrow.csv.WriteOptions(include_header=False))
    return file.getvalue()


def as_parquet(table: pa.Table) -> bytes:
    """The table as a Parquet file."""
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, compression="zstd")
    return file.getvalue()


def left_out_table(run: FolderRun, state: State) -> pa.Table:
    """path and reason of the images that are in no cluster: excluded ones and those that cannot be
    read.
    """
    reasons = dict.fromkeys(state.rows[state.excluded].tolist(), EXCLUDED)
    unreadable = np.flatnonzero(run.store.status == "unreadable")
    for row in np.setdiff1d(unreadable, state.rows[state.kept]).tolist():
        reasons.setdefault(row, run.store.reasons.get(row) or "cannot be read")
    paths = [_path(run, row) for row in sorted(reasons)]
    found = [printable(reasons[row]) for row in sorted(reasons)]
    return pa.table({"path": pa.array(paths, pa.string()), "reason": pa.array(found, pa.string())})


def _path(run: FolderRun, row: int) -> str:
    return printable(os.path.join(run.root, run.store.paths[row]))


def _neighbours(state: State, derived: Derived) -> pa.Array:
    """The nearest images by their row in the table; none for an image whose features are no longer
    in the store.
    """
    similarities, places = derived.neighbors
    rows = state.rows[state.kept]
    number = np.full(len(derived), -1, dtype=np.int64)  # of each usable image in the table
    _, at, there = np.intersect1d(derived.rows, rows, assume_unique=True, return_indices=True)
    number[at] = there
    ids = np.full((len(rows), places.shape[1]), -1, dtype=np.int64)
    distances = np.zeros(ids.shape, dtype=np.float32)
    ids[there], distances[there] = number[places[at]], (1 - similarities[at]).clip(0)
    found = ids >= 0
    starts = pa.array(np.concatenate([[0], found.sum(1).cumsum()]), pa.int32())
    lists = [
        pa.ListArray.from_arrays(starts, pa.array(ids[found], pa.int64())),
        pa.ListArray.from_arrays(starts, pa.array(distances[found], pa.float32())),
    ]
    return pa.StructArray.from_arrays(lists, names=["ids", "distances"])
