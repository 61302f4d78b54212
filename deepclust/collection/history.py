"""What is known of a folder's clusters, and how it came about: every edit leaves the state before
it in place.

```
<run>/history/0000-cluster.npz  0001-merge.npz  0002-append.npz ...
```
Each file is a step: a whole state, and the facts of the run that it belongs to. The last one
counts, and its appearance
is the moment at which a change is made: whatever is written besides can be made from it. Taking an
edit back removes it. A `cluster` step starts over; what is before it goes. This file imports no
torch.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from deepclust.errors import UserError
from deepclust.runtime.files import write_atomic
from deepclust.runtime.npz import Column, Unreadable, read_columns
from deepclust.types import NOISE

BEGINS = "cluster"
"""The step that starts over."""
COLUMNS = {
    "rows": Column("i", ("n",)),
    "cluster": Column("i", ("n",)),
    "confidence": Column("f", ("n",)),
    "position": Column("f", ("n", 2)),
    "copy_of": Column("i", ("n",)),
    "excluded": Column("b", ("n",)),
}
SCALARS = {"names": Column("U", ()), "next_id": Column("iu", ())}
FACTS = {"facts": Column("U", ())}
"""Steps of earlier versions have none."""


@dataclass(frozen=True)
class State:
    """Clusters of n images.

    rows: (n,) int64, ascending, the images' rows of the feature store. cluster: (n,) int64 ids, -1
    for noise; an id keeps its meaning over edits and new images, and one that was given up is not
    given again. confidence: (n,) float32 from 0 to 1. position: (n, 2) float32 on the map. copy_of:
    (n,) int64, the row of the image that this one is a near-duplicate of, -1 for none. excluded:
    (n,) bool, images that were taken out by hand. names: of clusters that have one, by id. next_id:
    the next id that a new cluster gets.
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

    def save(self, path: Path, facts: Mapping[str, Any] | None = None) -> None:
        """Writes a step, whole or not at all. facts: of the run, plain JSON."""
        buffer = io.BytesIO()
        names = json.dumps({str(key): name for key, name in self.names.items()})
        columns = {name: getattr(self, name) for name in COLUMNS}
        columns |= {"names": np.array(names), "next_id": np.array(self.next_id)}
        if facts is not None:
            columns["facts"] = np.array(json.dumps(facts))
        np.savez_compressed(buffer, **columns)
        write_atomic(path, buffer.getvalue())

    @classmethod
    def load(cls, path: Path) -> State:
        """Reads what `save` wrote. Raises UserError where it cannot."""
        try:
            found = read_columns(path, {**COLUMNS, **SCALARS}, FACTS)
            json.loads(
                str(found.get("facts", "{}"))
            )  # facts that are damaged are those of no state
            names = {
                int(key): str(name) for key, name in json.loads(str(found.pop("names"))).items()
            }
        except (Unreadable, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} {error if isinstance(error, Unreadable) else 'is damaged'}"
            ) from error
        return cls(
            **{name: found[name] for name in COLUMNS}, names=names, next_id=int(found["next_id"])
        )


def facts_of(path: Path) -> dict[str, Any] | None:
    """Those that a step was written with; None where it has none, as of earlier versions, or is
    damaged.
    """
    try:
        facts = json.loads(str(read_columns(path, FACTS)["facts"]))
    except (Unreadable, ValueError):
        return None
    return facts if isinstance(facts, dict) else None


class History:
    """Steps of one run, oldest first, in the folder `history` below it."""

    def __init__(self, run: Path) -> None:
        self.folder = run / "history"

    def _every(self) -> list[Path]:
        return sorted(self.folder.glob("[0-9][0-9][0-9][0-9]-*.npz"))

    def files(self) -> list[Path]:
        """The steps' files in order, from the last one that started over."""
        every = self._every()
        starts = [place for place, file in enumerate(every) if file.stem[5:] == BEGINS]
        return every[starts[-1] :] if starts else every

    @property
    def verbs(self) -> list[str]:
        """What made each state: `cluster`, `merge`, `append`, ..."""
        return [file.stem[5:] for file in self.files()]

    def current(self) -> State:
        """The last state. Raises UserError where there is none, or where it is damaged, with the
        way out.
        """
        files = self.files()
        if not files:
            raise UserError(
                f"{self.folder.parent} holds no clusters; deepclust cluster IMAGES makes them"
            )
        try:
            return State.load(files[-1])
        except UserError as error:
            undo = (
                f"deepclust edit {self.folder.parent} undo goes back to the step before; "
                if files[1:]
                else ""
            )
            raise UserError(
                f"{error}. {undo}deepclust cluster IMAGES --new makes the clusters anew"
            ) from error

    def facts(self) -> dict[str, Any] | None:
        """Those of the last step, None where it has none."""
        files = self.files()
        return facts_of(files[-1]) if files else None

    def digest(self) -> str:
        """SHA-256 of the last step's file; empty where there is none."""
        files = self.files()
        return hashlib.sha256(files[-1].read_bytes()).hexdigest() if files else ""

    def push(self, verb: str, state: State, facts: Mapping[str, Any] | None = None) -> Path:
        """Adds a step after the last one."""
        if not re.fullmatch(r"[a-z]+", verb):
            raise ValueError(f"verb {verb!r} must be a word")
        files = self._every()
        number = int(files[-1].name[:4]) + 1 if files else 0
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{number:04d}-{verb}.npz"
        state.save(path, facts)
        return path

    def pop(self, facts: Mapping[str, Any] | None = None) -> str:
        """Removes the last step and gives the verb that made it. Raises UserError where it is the
        first.

        facts: what the step before is given in place of its own. Ids that were given since are not
        given again, unless
        the last step is damaged: then nobody knows them.
        """
        files = self.files()
        if len(files) < 2:
            raise UserError(f"{self.folder.parent}: there is nothing to take back")
        try:
            before = State.load(files[-2])
        except UserError as error:
            raise UserError(
                f"{error}: it cannot be gone back to. deepclust cluster IMAGES --new makes the"
                " clusters anew"
            ) from error
        try:
            next_id = State.load(files[-1]).next_id
        except UserError:
            next_id = before.next_id
        known = facts_of(files[-2]) if facts is None else facts
        replace(before, next_id=max(before.next_id, next_id)).save(files[-2], known)
        files[-1].unlink()
        return files[-1].stem[5:]

    def begin(self, state: State, facts: Mapping[str, Any] | None = None) -> None:
        """Starts over with this state; the steps before do not count from then on, and go."""
        self.push(BEGINS, state, facts)
        self.tidy()

    def tidy(self) -> None:
        """Removes steps from before the last start, and what a stop left of one that was being
        written.
        """
        counting = set(self.files())
        for file in (*self._every(), *self.folder.glob(".tmp-*")):
            if file not in counting:
                file.unlink(missing_ok=True)


def relabelled(state: State, cluster: np.ndarray, *, names: dict[int, str] | None = None) -> State:
    """The same images with other clusters (n,); `next_id` grows past them, names of clusters that
    are gone go.
    """
    next_id = max([state.next_id, *(int(each) + 1 for each in np.unique(cluster))])
    there: Sequence[int] = np.unique(cluster[~state.excluded]).tolist()
    kept = {
        key: name for key, name in (state.names if names is None else names).items() if key in there
    }
    return State(
        state.rows,
        cluster,
        state.confidence,
        state.position,
        state.copy_of,
        state.excluded,
        kept,
        next_id,
    )
