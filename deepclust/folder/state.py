"""What is known of a folder's clusters, and how it came about: every edit leaves the state before it in place.

```
<run>/history/0000-cluster.npz  0001-merge.npz  0002-append.npz ...
```
Each file is a whole state; the last one counts, and taking an edit back removes it. This file imports no torch.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from deepclust.errors import UserError
from deepclust.run_folder import write_atomic

NOISE = -1
COLUMNS = ("rows", "cluster", "confidence", "position", "copy_of", "excluded")


@dataclass(frozen=True)
class State:
    """Clusters of n images.

    rows: (n,) int64, ascending, the images' rows of the feature store. cluster: (n,) int64 ids, -1 for noise; an id
    keeps its meaning over edits and new images, and one that was given up is not given again. confidence: (n,) float32
    from 0 to 1. position: (n, 2) float32 on the map. copy_of: (n,) int64, the row of the image that this one is a
    near-duplicate of, -1 for none. excluded: (n,) bool, images that were taken out by hand. names: of clusters that
    have one, by id. next_id: the next id that a new cluster gets.
    """

    rows: np.ndarray
    cluster: np.ndarray
    confidence: np.ndarray
    position: np.ndarray
    copy_of: np.ndarray
    excluded: np.ndarray
    names: dict[int, str] = field(default_factory=dict)
    next_id: int = 0

    @property
    def kept(self) -> np.ndarray:
        """(m,) int64 places of the images that were not excluded."""
        return np.flatnonzero(~self.excluded)

    @property
    def ids(self) -> list[int]:
        """Clusters that hold an image, ascending; noise is none."""
        found = np.unique(self.cluster[~self.excluded])
        return found[found >= 0].tolist()

    def title(self, cluster: int) -> str:
        """A cluster for people: its name, or `cluster 3`, or `noise`."""
        return self.names.get(cluster) or ("noise" if cluster == NOISE else f"cluster {cluster}")

    def save(self, path: Path) -> None:
        """Writes the file, whole or not at all."""
        buffer = io.BytesIO()
        names = json.dumps({str(key): name for key, name in self.names.items()})
        columns = {name: getattr(self, name) for name in COLUMNS}
        np.savez_compressed(buffer, **columns, names=np.array(names), next_id=np.array(self.next_id))
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> State:
        """Reads what `save` wrote. Raises UserError where it cannot."""
        try:
            with np.load(path, allow_pickle=False) as content:
                names = {int(key): str(name) for key, name in json.loads(str(content["names"])).items()}
                columns = {name: content[name] for name in COLUMNS}
                return cls(**columns, names=names, next_id=int(content["next_id"]))
        except (OSError, KeyError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}). Remove it to go back to the state before") from error


class History:
    """States of one run, oldest first, in the folder `history` below it."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "history"

    def files(self) -> list[Path]:
        """The states' files in order."""
        return sorted(self.folder.glob("[0-9][0-9][0-9][0-9]-*.npz"))

    @property
    def verbs(self) -> list[str]:
        """What made each state: `cluster`, `merge`, `append`, ..."""
        return [file.stem[5:] for file in self.files()]

    def current(self) -> State:
        """The last state. Raises UserError where there is none."""
        files = self.files()
        if not files:
            raise UserError(f"{self.folder.parent} holds no clusters; deepclust cluster IMAGES makes them")
        return State.load(files[-1])

    def push(self, verb: str, state: State) -> Path:
        """Adds a state after the last one."""
        if not re.fullmatch(r"[a-z]+", verb):
            raise ValueError(f"verb {verb!r} must be a word")
        files = self.files()
        number = int(files[-1].name[:4]) + 1 if files else 0
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{number:04d}-{verb}.npz"
        state.save(path)
        return path

    def pop(self) -> str:
        """Removes the last state and gives the verb that made it. Raises UserError where it is the first.

        Ids that were given since the state before are not given again.
        """
        files = self.files()
        if len(files) < 2:
            raise UserError(f"{self.folder.parent}: there is nothing to take back")
        before, next_id = State.load(files[-2]), self.current().next_id
        replace(before, next_id=max(before.next_id, next_id)).save(files[-2])
        files[-1].unlink()
        return files[-1].stem[5:]

    def begin(self, verb: str, state: State) -> None:
        """Starts over with this state; those before go once it is safe."""
        before = self.files()
        self.push(verb, state)
        for file in before:
            file.unlink()


def relabelled(state: State, cluster: np.ndarray, *, names: dict[int, str] | None = None) -> State:
    """The same images with other clusters (n,); `next_id` grows past them, names of clusters that are gone go."""
    next_id = max([state.next_id, *(int(each) + 1 for each in np.unique(cluster))])
    there: Sequence[int] = np.unique(cluster[~state.excluded]).tolist()
    kept = {key: name for key, name in (state.names if names is None else names).items() if key in there}
    return State(state.rows, cluster, state.confidence, state.position, state.copy_of, state.excluded, kept, next_id)
