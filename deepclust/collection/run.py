"""The folder that `deepclust cluster` leaves: what was asked, what was found, and the files for
people and tools.

```
<run>/
  run.json            what was asked and found: see `FolderRun.facts`
  history/            states of the clusters, each with the facts of its time, see `history.py`
  landmarks.npz       the images that were clustered, see `landmarks.Landmarks`
  model.safetensors   the clusters as a model of features
  clusters.csv  clusters.parquet  left_out.csv  report.html
  sorted/             one folder per cluster, where it was asked for
```
"""

from __future__ import annotations

import json
import shlex
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from deepclust.collection.history import History, State, facts_of
from deepclust.data.folders import printable
from deepclust.data.store import FeatureStore
from deepclust.errors import UserError
from deepclust.runtime.files import write_atomic

if TYPE_CHECKING:
    from deepclust.collection.derived import Derived

FORMAT = 1
FACTS = "run.json"
SHOWN, STEP = "shown", "step"
FOLLOW = ("root", "store", "landmarks")
"""Facts that hold for all steps of a run as they are now: undo leaves them."""


class NewerRun(UserError):
    """A run that a later version wrote."""


class FolderRun:
    """A run that is there.

    facts, plain JSON: `format`; `root`, the folder of images, and `store`, that of their features,
    absolute; `backbone`, its name in the store; `asked` {"num_clusters": K or "auto", "noise":
    bool, "sort": "copy", "symlink" or null, "seed": int, "clusterers": [name]}; `scan` and
    `digest`, of the store when the images were last taken in, and `appended`, those before each
    append; `step`, the SHA-256 of the step of the history that all this belongs to, and `shown`,
    that of the step that the files show; `landmarks`, the SHA-256 of that file; `clusterer`, the
    method that was chosen; `choice` {method: {"seconds", criterion: value} or {"failed": why}};
    `criterion`, the one that chose, or null; `number`, how K was found, or null; `missing`
    {estimate: why it could not be had}; `seconds` {part: seconds}.
    """

    def __init__(self, path: Path, facts: dict[str, Any]) -> None:
        self.path, self.facts = path, facts
        self.history = History(path)

    @classmethod
    def open(cls, path: str | Path) -> FolderRun:
        """The run there, by the facts of its last step where run.json is older, or gone.

        A stop between the two leaves it so. Raises UserError where there is no such run; NewerRun.
        """
        folder = Path(path).expanduser()
        history = History(folder)
        own = history.facts()
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            if not isinstance(facts, dict):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError) as error:
            facts = {} if own is not None else _refuse(folder, error)
        if facts.get("format", 0) > FORMAT or (own or {}).get("format", 0) > FORMAT:
            raise NewerRun(f"{folder} was written by a newer deepclust; update deepclust")
        if own is not None and facts.get(STEP) != history.digest():
            facts = own
        return cls(folder, facts)

    def save(self) -> None:
        """Writes the facts, which are those of the last step."""
        self.facts[STEP] = self.history.digest()
        write_atomic(
            self.path / FACTS, json.dumps({"format": FORMAT, **self.facts}, indent=1) + "\n"
        )

    @property
    def lasting(self) -> dict[str, Any]:
        """The facts that a step is written with: without those of the files."""
        return {
            "format": FORMAT,
            **{key: value for key, value in self.facts.items() if key not in (SHOWN, STEP)},
        }

    def push(self, verb: str, state: State) -> None:
        """Makes a change: a step with the facts as they are now."""
        self.history.push(verb, state, self.lasting)

    def pop(self) -> str:
        """Takes the last change back, with the facts of its time, and gives its verb."""
        files = self.history.files()
        before = facts_of(files[-2]) if files[1:] else None
        facts = self.lasting
        if before is not None:
            facts = {**before, **{key: facts[key] for key in FOLLOW if key in facts}}
            facts["asked"] = {**before["asked"], "sort": self.facts["asked"].get("sort")}
        elif (
            facts.get("appended") and self.history.verbs[-1] == "append"
        ):  # a step of an earlier version
            *known, (facts["scan"], facts["digest"]) = facts["appended"]
            facts["appended"] = known
        verb = self.history.pop(facts)
        self.facts = facts
        return verb

    @cached_property
    def store(self) -> FeatureStore:
        """The features that the clusters were made from. Raises UserError where they are gone."""
        return FeatureStore.open(self.facts["store"])

    @cached_property
    def derived(self) -> Derived:
        """What is made of them once: neighbours, near-duplicates, directions."""
        from deepclust.collection.derived import Derived

        return Derived(self.store, self.facts["backbone"])

    def directions(self, rows: np.ndarray) -> np.ndarray:
        """(n, P) float32 rows of length one of some of the store's images, in the leading
        directions of the features.

        What is not in the store any more has zeros.
        """
        known, x = self.derived.rows, self.derived.x.numpy()
        at = np.searchsorted(known, rows).clip(0, max(len(known) - 1, 0))
        return np.where((known[at] == rows)[:, None], x[at], np.float32(0))

    def append_command(self) -> str:
        """The command that goes on with this run's folder, store and backbone, for a shell."""
        options: dict[str, Any] = {"--out": self.path, "--store": self.facts["store"]}
        with suppress(UserError):  # a store that is gone does not tell what made it
            made_by = self.store.backbone(self.facts["backbone"]).identity.get("made_by") or {}
            options |= {"--backbone": made_by.get("name"), "--weights": made_by.get("weights")}
            options["--size"] = made_by.get("size")
        words = [
            word
            for option, value in options.items()
            if value
            for word in (option, printable(str(value)))
        ]
        return shlex.join(["deepclust", "cluster", printable(str(self.root)), "--append", *words])

    @property
    def root(self) -> Path:
        """The folder of images."""
        return Path(self.facts["root"])

    def features(self, rows: np.ndarray) -> np.ndarray:
        """(n, D) float32 rows of length one of some of the store's images."""
        from deepclust.collection.derived import unit_rows

        return unit_rows(self.store.features(self.facts["backbone"]), rows).numpy()

    @property
    def missing(self) -> dict[str, str]:
        """Why estimates could not be had, by name: `confidence`, `map`, `near-duplicates`,
        `outliers`, ...
        """
        return self.facts.get("missing") or {}

    def confidence(self, state: State) -> np.ndarray:
        """(n,) float32 as they are given out: NaN where nothing tells how far the votes can be
        trusted.
        """
        unknown = np.full_like(state.confidence, np.nan)
        return unknown if "confidence" in self.missing else state.confidence

    def state(self) -> State:
        """Clusters as they are now."""
        return self.history.current()


def _refuse(folder: Path, error: Exception) -> NoReturn:
    """Says why there is no run here, and what to do."""
    if isinstance(error, FileNotFoundError):
        raise UserError(
            f"{folder} is no folder that deepclust cluster left: deepclust cluster IMAGES makes one"
        ) from None
    raise UserError(
        f"{folder / FACTS} cannot be read ({error}); deepclust cluster IMAGES --new makes the"
        " clusters anew"
    ) from error
