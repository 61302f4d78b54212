"""Commands of benchmarks that documents and docstrings give name modules and options there are."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "benchmarks").glob("*/[!_]*.py"))
COMMAND = re.compile(r"python -m (benchmarks[.\w]+)((?:[^`\n\\]|\\+\n)*)")
NEEDS = {"benchmarks.speed.peers": "lightly"}


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_each_file_can_be_imported_and_a_command_shows_its_own_docstring(path: Path) -> None:
    name = name_of(path)
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    module = importlib.import_module(name)
    assert module.__doc__ and len(module.__doc__.splitlines()[0]) <= 100
    if hasattr(module, "main"):
        assert f"python -m {name}" in module.__doc__


def test_commands_name_modules_and_options_that_there_are() -> None:
    texts = [ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md"), *FILES]
    commands = [
        (path, *match.groups())
        for path in texts
        for match in COMMAND.finditer(path.read_text(encoding="utf-8"))
    ]
    assert len(commands) > len(FILES)
    for path, name, words in commands:
        module = ROOT / f"{name.replace('.', '/')}.py"
        assert module.is_file(), f"{path}: {name}"
        known = {
            node.value
            for file in (module, ROOT / "benchmarks/quality/common.py")
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        for option in re.findall(r"(?<!\S)--[a-z-]+", words):
            assert option in known | {"--help"}, f"{path}: {name} {option}"
