"""The pages of the documentation as tests read them: fenced blocks, commands, links.

A block of commands or Python that is not run has a line above it: `<!-- not run in tests: WHY -->`.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

MARKER = re.compile(r"<!-- not run in tests: (\S.*) -->")
HEAD = re.compile(r"^class (\w+)\(Head\):", re.MULTILINE)
PROGRAMS = ("deepclust", "python", "torchrun", "pip")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str
    reason: str
    """Why it is not run; nothing if it is."""

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> Iterator[Block]:
    lines = page.read_text(encoding="utf-8").splitlines()
    start = None
    for number, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = number
            continue
        before = next((text for text in reversed(lines[:start]) if text.strip()), "")
        marker = MARKER.fullmatch(before.strip())
        text = "\n".join(lines[start + 1 : number]) + "\n"
        yield Block(page, start + 1, lines[start][3:], text, marker[1] if marker else "")
        start = None
    assert start is None, f"{page}: a fence is not closed"


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]
PYTHON = [block for block in BLOCKS if block.language == "python"]


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command, without comments and what sets up its surroundings."""
    for line in text.splitlines():
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            command, words = words[:end], words[end + 1 :]
            while re.match(r"[A-Z_]+=", command[0]):
                command = command[1:]
            yield command[3:] if command[0] == "taskset" else command


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    text = page.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> set[str]:
    """Commands in running text, of which the words are complete."""
    code = {" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))}
    return {span for span in code if span.split()[0] in PROGRAMS and "..." not in span}


def training_words(command: list[str]) -> list[str] | None:
    """What `train` gets, or None for a command that does not train."""
    if command[:2] in (["python", "train.py"], ["deepclust", "train"]):
        return command[2:]
    if command[0] == "torchrun":
        return command[command.index("train.py") + 1 :]
    return None


def own_heads() -> dict[str, tuple[str, str]]:
    """Target (package.module.Class) to Python and YAML, for each head that the pages write out."""
    yamls = {}
    for block in BLOCKS:
        if block.language == "yaml" and (
            target := re.search(r"^_target_: (\S+)$", block.text, re.M)
        ):
            yamls[target[1]] = block.text
    heads = {}
    for block in PYTHON:
        if name := HEAD.search(block.text):
            target = next(target for target in yamls if target.endswith(f".{name[1]}"))
            heads[target] = (block.text, yamls[target])
    return heads
