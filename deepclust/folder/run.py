"""The folder that `deepclust cluster` leaves: what was asked, what was found, and the files for people and tools.

```
<run>/
  run.json            what was asked and found: see `FolderRun.facts`
  history/            states of the clusters, see `state.py`
  landmarks.npz       the images that were clustered, see `votes.Landmarks`
  model.safetensors   the clusters as a model of features
  clusters.csv  clusters.parquet  left_out.csv  report.html
  sorted/             one folder per cluster, where it was asked for
```
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from deepclust.data.store import FeatureStore
from deepclust.errors import UserError
from deepclust.folder.state import History, State
from deepclust.run_folder import write_atomic

if TYPE_CHECKING:
    from deepclust.folder.derived import Derived

FORMAT = 1
FACTS = "run.json"


class FolderRun:
    """A run that is there.

    facts, plain JSON: `format`; `root`, the folder of images, and `store`, that of their features, absolute;
    `backbone`, its name in the store; `asked` {"num_clusters": K or "auto", "noise": bool, "sort": "copy", "symlink" or
    null, "seed": int, "clusterers": [name]}; `scan` and `digest`, of the store when the images were last taken in, and
    `appended`, those before each append; `shown`, the SHA-256 of the state that the files show; `clusterer`, the method
    that was chosen; `choice` {method: {"seconds", criterion: value} or {"failed": why}}; `criterion`, the one that
    chose, or null; `number`, how K was found, or null; `missing` {estimate: why it could not be had}; `seconds` {part:
    seconds}.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.history = History(path)

    @classmethod
    def open(cls, path: str | Path) -> FolderRun:
        """Raises UserError where there is no such run."""
        folder = Path(path).expanduser()
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{path} is no folder that deepclust cluster left: deepclust cluster IMAGES makes one"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(
                f"{folder / FACTS} cannot be read ({error}); deepclust cluster IMAGES makes it anew"
            ) from error
        if not isinstance(facts, dict) or facts.get("format", 0) > FORMAT:
            raise UserError(f"{folder} was written by a newer deepclust; update deepclust")
        return cls(folder, facts)

    def save(self) -> None:
        """Writes the facts."""
        write_atomic(self.path / FACTS, json.dumps({"format": FORMAT, **self.facts}, indent=1) + "\n")

    @cached_property
    def store(self) -> FeatureStore:
        """The features that the clusters were made from. Raises UserError where they are gone."""
        return FeatureStore.open(self.facts["store"])

    @cached_property
    def derived(self) -> Derived:
        """What is made of them once: neighbours, near-duplicates, directions."""
        from deepclust.folder.derived import Derived

        return Derived(self.store, self.facts["backbone"])

    def directions(self, rows: np.ndarray) -> np.ndarray:
        """(n, P) float32 rows of length one of some of the store's images, in the leading directions of the features.

        What is not in the store any more has zeros.
        """
        known, x = self.derived.rows, self.derived.x.numpy()
        at = np.searchsorted(known, rows).clip(0, max(len(known) - 1, 0))
        return np.where((known[at] == rows)[:, None], x[at], np.float32(0))

    @property
    def root(self) -> Path:
        """The folder of images."""
        return Path(self.facts["root"])

    def features(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 rows of length one of some of the store's images."""
        from deepclust.folder.derived import unit_rows

        return unit_rows(self.store.features(self.facts["backbone"]), rows).numpy()

    @property
    def missing(self) -> dict[str, str]:
        """Why estimates could not be had, by name: `confidence`, `map`, `near-duplicates`, `outliers`, ..."""
        return self.facts.get("missing") or {}

    def confidence(self, state: State) -> np.ndarray:
        """(n,) float32 as they are given out: NaN where nothing tells how far the votes can be trusted."""
        unknown = np.full_like(state.confidence, np.nan)
        return unknown if "confidence" in self.missing else state.confidence

    def state(self) -> State:
        """Clusters as they are now."""
        return self.history.current()
