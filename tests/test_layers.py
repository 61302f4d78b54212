"""Imports go down only and in no circle: which part of the package may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import deepclust

PACKAGE = Path(deepclust.__file__).parent

FLOORS = (
    ("errors", "types"),
    ("ops",),
    ("runtime", "weights"),
    ("config",),
    ("backbones", "heads"),
    ("data",),
    ("model_file",),
    ("model",),
    ("eval", "loggers"),
    ("clustering", "report"),
    ("training",),
    ("estimator",),
    ("features",),
    ("collection",),
    ("predict",),
    ("cli",),
)
"""From the ground up: a part imports parts of lower floors, or files of its own."""


def imports_of(path: Path) -> Iterator[str]:
    """Modules of ours that a file imports, wherever it does; not those for type checkers alone."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for_types |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepclust":
            for alias in node.names:
                yield f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("deepclust."))


def part_of(path: Path) -> str:
    """The folder at the top of the package, or the file, that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def files() -> list[Path]:
    return [
        path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__"
    ]


def test_every_part_has_a_floor():
    parts = {part_of(path) for path in files()}
    assert parts == {part for floor in FLOORS for part in floor}


def test_imports_go_down_only():
    floor_of = {part: number for number, floor in enumerate(FLOORS) for part in floor}
    upward = []
    for path in files():
        part = part_of(path)
        for module in imports_of(path):
            other = module.split(".")[1]
            if other != part and floor_of.get(other, 0) >= floor_of[part]:
                upward.append(f"{path.relative_to(PACKAGE)} imports {module}")
    assert upward == []


def test_no_files_import_each_other_in_a_circle():
    modules = {
        ".".join(("deepclust", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in files()
    }
    graph = {}
    for module, path in modules.items():
        targets = set()
        for name in imports_of(path):
            target = name if name in modules else name.rpartition(".")[0]
            if target in modules and target != module:
                targets.add(target)
        graph[module] = targets
    # Raises CycleError, which names the files.
    TopologicalSorter(graph).prepare()
