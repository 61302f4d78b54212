"""Code of the user's own, FILE.py:FUNCTION: run as it was read, remembered if it was named.

A feature store says itself which file made it and what that file's hash was, and it may come from
anybody. So what it names runs without a word only if this user ran the same before: their
configuration folder holds a line for each FILE.py:FUNCTION that they named themselves.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import json
import os
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deepclust.errors import UserError

KNOWN = "known_code.txt"


class NotTrusted(UserError):
    """Code that somebody else may have written, and that would run."""


@dataclass(frozen=True)
class Code:
    """A function of a file. source: what runs, whatever becomes of the file.

    path: absolute. beside: SHA-256 of the other .py files of its folder, which it may import.
    """

    path: str
    function: str
    source: bytes
    beside: str

    @property
    def name(self) -> str:
        """FILE.py:FUNCTION, absolute."""
        return f"{self.path}:{self.function}"

    @property
    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.source).hexdigest()

    def run(self) -> Callable[[], Any]:
        """The function. This runs the file."""
        spec = importlib.util.spec_from_file_location(Path(self.path).stem, self.path)
        if spec is None:
            raise ImportError(f"{self.path} cannot be loaded")
        module = importlib.util.module_from_spec(spec)
        exec(compile(self.source, self.path, "exec"), module.__dict__)
        return getattr(module, self.function)

    def remember(self) -> None:
        """Adds it to what this user ran by name; a folder that cannot be written is passed over."""
        with contextlib.suppress(OSError, RuntimeError):
            if not self.remembered:
                folder = _settings()
                folder.mkdir(parents=True, exist_ok=True)
                with open(folder / KNOWN, "a", encoding="ascii") as file:
                    file.write(f"{self._line}\n")

    @property
    def remembered(self) -> bool:
        """Whether this user ran it by name, it and the files beside it being what they are now."""
        with contextlib.suppress(OSError, RuntimeError):
            text = (_settings() / KNOWN).read_text(encoding="ascii", errors="replace")
            return self._line in text.splitlines()
        return False

    @property
    def _line(self) -> str:
        return f"{self.digest} {self.beside} {json.dumps(self.name)}"


def _settings() -> Path:
    """The user's configuration folder. As XDG asks, a relative one does not count."""
    chosen = os.environ.get("XDG_CONFIG_HOME", "")
    home = Path(chosen) if os.path.isabs(chosen) else Path.home() / ".config"
    return home / "deepclust"


def read_code(name: str) -> Code:
    """What `FILE.py:FUNCTION` names, as it is now. Raises OSError where it cannot be read."""
    place, _, function = name.rpartition(":")
    path = os.path.abspath(place)
    folders = {os.path.dirname(path), os.path.dirname(os.path.realpath(path))}
    files = [file for folder in sorted(folders) for file in sorted(Path(folder).glob("*.py"))]
    others = hashlib.sha256()
    for file in files:
        if str(file) != path and file.is_file():
            content = "unreadable"
            with contextlib.suppress(OSError):
                content = hashlib.sha256(file.read_bytes()).hexdigest()
            others.update(f"{content} {json.dumps(file.name)}\n".encode())
    return Code(path, function, Path(path).read_bytes(), others.hexdigest())


def recorded_code(name: str, digest: Any, trust: Sequence[str] = ()) -> Code:
    """The code of a store's `FILE.py:FUNCTION`, if it may run.

    digest: the SHA-256 of the file of then, as the store has it. trust: FILE.py that the user
    trusts. Raises UserError where it is gone or was changed, NotTrusted with what would run.
    """
    place = name.rpartition(":")[0]
    shown, file = _quoted(name), _quoted(place)
    if not place.endswith(".py") or not Path(place).is_file():
        raise UserError(
            f"--backbone {shown} made these features; give it again, if it is still to be trusted"
        )
    code = read_code(name)
    if code.digest != digest:
        raise UserError(
            f"{file}, which made these features, was changed since; --backbone {shown} runs it"
            " as is"
        )
    trusted = code.path in [os.path.abspath(os.path.expanduser(each)) for each in trust]
    if not trusted and not code.remembered:
        raise NotTrusted(
            f"That would run the function {_quoted(code.function)} of {file} (SHA-256 "
            f"{code.digest}), which you have not run by name as it is now, with the .py files "
            f"beside it. If you trust it: --trust {file}, or --backbone {shown}"
        )
    return code


def _quoted(text: str) -> str:
    """As a shell takes it: the words are a stranger's, and the user may copy them."""
    return shlex.quote("".join(letter if letter.isprintable() else "?" for letter in text))


def load_function(name: str, option: str, code: Code | None = None) -> Callable[[], Any]:
    """The function that `FILE.py:FUNCTION` or `MODULE:FUNCTION` names; runs the file.

    code: what is to run, where the file was read before. Raises UserError if there is none.
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            return (code or read_code(name)).run()
        return getattr(importlib.import_module(place), attribute)
    except ModuleNotFoundError as error:
        raise UserError(uninstalled(name, option, error)) from error
    except (ImportError, AttributeError, OSError, ValueError, SyntaxError) as error:
        expected = "expected FILE.py:FUNCTION or MODULE:FUNCTION"
        raise UserError(f"{option} {name}: {error}; {expected}") from error


def uninstalled(name: str, option: str, error: ModuleNotFoundError) -> str:
    """What to say where a package is missing that the function wants."""
    place = name.rpartition(":")[0]
    advice = f"Install the package that holds it (pip install ...); {place} may say which"
    return f"{option} {name}: {error}. {advice}"
