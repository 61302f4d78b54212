"""What a stranger may leave: files that do harm, and nodes that would have them do it."""

from __future__ import annotations

import pickle
import tarfile
from pathlib import Path
from typing import Any


class Payload:
    """Unpickles into a call that leaves a trace."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


class Stranger:
    """Files in a folder, and nodes that would leave a canary there if they were built."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "canary"
        (folder / "evil.pth").write_bytes(pickle.dumps(Payload(self.canary)))
        (folder / "words").write_text("canary")
        with tarfile.open(folder / "evil.tar", "w") as archive:
            archive.add(folder / "words", "canary")
        (folder / "words").unlink()

    def nodes(self) -> dict[str, dict[str, Any]]:
        """Nodes by what they would do."""
        return _nodes(self.folder)


def _nodes(folder: Path) -> dict[str, dict[str, Any]]:
    here, canary = str(folder), str(folder / "canary")
    evil = f"{here}/evil.pth"
    return {
        "unpickle": {
            "_target_": "timm.models._helpers.load_state_dict",
            "checkpoint_path": evil,
            "weights_only": False,
        },
        "unpack": {
            "_target_": "torchvision.datasets.utils.extract_archive",
            "from_path": f"{here}/evil.tar",
            "to_path": here,
        },
        "download": {
            "_target_": "torchvision.datasets.utils.download_url",
            "url": f"file://{evil}",
            "root": here,
            "filename": "canary",
        },
        "open": {"_target_": "builtins.open", "file": canary, "mode": "w"},
        "alias": {"_target_": "deepclust.heads.scan.torch.load", "f": evil, "weights_only": False},
        "method": {"_target_": "deepclust.heads.scan.torch.serialization.load", "f": evil},
        "own function": {
            "_target_": "deepclust.runtime.files.write_atomic",
            "path": canary,
            "data": "x",
        },
        "own writer": {
            "_target_": "deepclust.data.store_writer.connect",
            "file": canary,
            "mode": "rwc",
        },
        "own runner": {
            "_target_": "deepclust.runtime.own_code.load_function",
            "name": "os:getcwd",
            "option": "",
        },
        "command": {"_target_": "deepclust.cli.entry.main", "arguments": ["--help"]},
        "module": {"_target_": "torch.jit.load", "f": evil},
        "optimizer": {"_target_": "torch.optim.SGD", "params": []},
        "factory": {
            "_target_": "timm.create_model",
            "model_name": "resnet18",
            "checkpoint_path": evil,
        },
        "torchvision": {
            "_target_": "torchvision.models.get_model",
            "name": "resnet18",
            "weights": "DEFAULT",
        },
    }


KINDS = tuple(_nodes(Path()))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
