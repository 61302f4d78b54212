"""Source files read without importing them, and the nearest name to a mistyped one."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from deepclust.errors import UserError

PACKAGE = Path(__file__).resolve().parents[1]


class TargetError(UserError):
    """A `_target_` that may not be built, or that does not exist."""


@lru_cache(maxsize=256)
def _parse(path: Path, stamp: int) -> ast.Module:
    """The syntax tree of a file; `stamp` (its time of change) renews the cache."""
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


def parse(path: Path) -> ast.Module:
    """The syntax tree of a source file. Raises TargetError where it is not valid Python."""
    try:
        return _parse(path, path.stat().st_mtime_ns)
    except (SyntaxError, ValueError, OSError) as error:
        raise TargetError(f"{path} cannot be read as Python: {error}") from None


def source(module: str) -> Path | None:
    """The file of a module, found without importing it or any of its parents; None where there is
    none.
    """
    top, *rest = module.split(".")
    if top == "deepclust":
        folders: Sequence[str] = [str(PACKAGE)]
    else:
        spec = importlib.util.find_spec(top)
        if spec is None:
            return None
        if not rest and spec.origin and spec.origin.endswith(".py"):
            return Path(spec.origin)
        folders = list(spec.submodule_search_locations or [])
    for folder in folders:
        base = Path(folder, *rest)
        for candidate in (base.with_name(base.name + ".py"), base / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def definitions(path: Path) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    """Public classes and functions written in a file, by name."""
    kinds = (ast.ClassDef, ast.FunctionDef)
    return {
        node.name: node
        for node in parse(path).body
        if isinstance(node, kinds) and not node.name.startswith("_")
    }


@lru_cache(maxsize=256)
def imports(path: Path) -> dict[str, str]:
    """Names that a file imports from elsewhere, to their full names."""
    nodes = [
        node for node in ast.walk(parse(path)) if isinstance(node, ast.ImportFrom) and node.module
    ]
    return {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in nodes
        for alias in node.names
    }


def siblings(module: str) -> list[str]:
    """Names of the public modules beside `module`."""
    parent = module.rpartition(".")[0]
    path = source(parent) if parent else None
    if path is None or path.name != "__init__.py":
        return []
    return [file.stem for file in sorted(path.parent.glob("*.py")) if not file.stem.startswith("_")]
