"""The folder of one run: who may write there, what is there, and how it stands.

```
<folder>/
  .deepclust.lock   held (fcntl) by the process that runs; also marks the folder as ours
  config.yaml       the whole configuration      env.json       versions, machine, commit
  status.json       {state, stage, epoch, step, reason}, replaced atomically
  log.txt  metrics.jsonl  metrics.csv  clusters.csv  summary.json  report.html  model.safetensors
  checkpoints/  wandb/
```
Nothing is written outside of it, and only rank 0 writes. Importing this file imports no torch.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import shutil
import socket
import subprocess
from pathlib import Path
from typing import IO, Any, Literal

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows has no fcntl; runs there are not locked
    fcntl = None
from deepclust.runtime.files import (
    LOCK,
    FolderError,
    explain,
    inside,
    release_lock,
    take_lock,
    write_atomic,
)

State = Literal["running", "clustering", "evaluating", "saving", "preempted", "failed", "finished"]
FILES = (
    "config.yaml",
    "env.json",
    "status.json",
    "log.txt",
    "metrics.jsonl",
    "metrics.csv",
    "clusters.csv",
)
FILES += ("summary.json", "report.html", "model.safetensors")
FOLDERS = ("checkpoints", "wandb")
OURS = (*FILES, ".tmp-*", "checkpoints/[0-9]*-*/step-[0-9]*", "checkpoints/.tmp-*")
OURS += (
    "wandb/run_id",
    "wandb/run-*",
    "wandb/offline-run-*",
    "wandb/latest-run",
    "wandb/debug*.log",
)
"""What `run.new=true` removes; a file that somebody else put into the folder stays."""
PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "pot",
    "hydra-core",
    "wandb",
)


class RunFolder:
    """An open run folder. On ranks above 0 every write is a no-op.

    previous_config: text of the config.yaml found there, None in a new folder. previous_status: the
    status found there.
    """

    def __init__(self, path: Path, rank: int, lock: IO[str] | None) -> None:
        self.path = path
        self.rank = rank
        self._lock = lock
        self.previous_config = _read(path / "config.yaml")
        self.previous_status = _read_json(path / "status.json")

    @classmethod
    def open(cls, path: str | Path, *, new: bool = False, rank: int = 0) -> RunFolder:
        """Creates the folder or takes an old one over, and locks it; `new` removes what an earlier
        run wrote there.

        Raises FolderError: no permission, a file in the way, a folder of somebody else, or another
        run inside.
        """
        path = Path(os.path.abspath(path))
        if rank > 0:
            return cls(path, rank, None)
        try:
            path.mkdir(parents=True, exist_ok=True)
            _check_ours(path)
            lock = take_lock(path)
        except OSError as error:
            raise FolderError(f"run.dir={path} cannot be used: {explain(error)}") from error
        folder = cls(path, rank, lock)
        try:
            folder._tidy(new)
        except BaseException:
            folder.close()
            raise
        return cls(path, rank, lock) if new else folder

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def finished(self) -> bool:
        """Whether the run found there had finished."""
        return bool(self.previous_status) and self.previous_status.get("state") == "finished"

    def describe(self, config_text: str, **machine: Any) -> None:
        """Writes config.yaml and env.json; `machine` adds what only the caller knows (device,
        threads, ranks).
        """
        self.write("config.yaml", config_text)
        self.write("env.json", json.dumps({**environment(), **machine}, indent=2) + "\n")

    def status(
        self,
        state: State,
        stage: str | None = None,
        epoch: int = 0,
        step: int = 0,
        reason: str | None = None,
    ) -> None:
        """Replaces status.json. step counts macro batches of `stage`.

        Where `failed` cannot be written the old status stays: what made the run fail is what its
        user must hear.
        """
        status = {"state": state, "stage": stage, "epoch": epoch, "step": step, "reason": reason}
        with contextlib.suppress(*[FolderError] if state == "failed" else []):
            self.write("status.json", json.dumps(status) + "\n")

    def write(self, name: str, data: str | bytes) -> None:
        """Writes `name` inside the folder atomically. Raises FolderError where that is not
        possible.
        """
        if self.rank == 0:
            write_atomic(inside(self.path, name), data)

    def close(self) -> None:
        """Lets another run have the folder."""
        release_lock(self.path, self._lock)
        self._lock = None

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _tidy(self, new: bool) -> None:
        """Removes what a killed write left and, for a new start, what an earlier run wrote: by
        name, nothing else.
        """
        for name in (*FILES, *FOLDERS):
            inside(self.path, name)
            (self.path / f".tmp-{name}").unlink(missing_ok=True)
        for pattern in OURS if new else ():
            for path in self.path.glob(pattern):
                if not path.parent.resolve().is_relative_to(self.path.resolve()):
                    raise FolderError(
                        f"{path.parent} leads outside of the run folder (a link?). Remove it."
                    )
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def environment() -> dict[str, Any]:
    """Versions, machine and commit, for env.json. No environment variables, no command line: they
    may hold secrets.
    """
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "commit": _commit(),
    }


def _commit() -> str | None:
    """Commit of the checkout that this package was imported from, None where there is none."""
    package = Path(__file__).resolve().parents[1]
    command = ["git", "-C", str(package), "rev-parse", "--show-toplevel", "HEAD"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        top, commit = subprocess.run(
            command, capture_output=True, text=True, timeout=5, check=True
        ).stdout.split("\n")[:2]
        return commit if Path(top) == package.parent else None
    return None


def _check_ours(path: Path) -> None:
    """Refuses a folder that holds files under our names which no run of ours wrote."""
    status = _read_json(path / "status.json")
    if (path / LOCK).exists() or (status and "state" in status):
        return
    taken = [name for name in (*FILES, *FOLDERS) if os.path.lexists(path / name)]
    if taken:
        raise FolderError(
            f"run.dir={path} holds {', '.join(taken)}, which no run wrote. Choose another run.dir."
        )


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return None


def _read_json(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(_read(path) or "null")
    except ValueError:
        return None
    return value if isinstance(value, dict) else None
