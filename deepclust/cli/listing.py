"""What the groups of the configuration offer, as text for `deepclust list` and the help.

Imports no torch.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from deepclust.compose import conf_folder, groups, options

WIDTH = 100
"""Columns of a line: two pages side by side on a common screen."""
UNLISTED = "others"
"""The heading of options that name none where others of their group do."""

_HEADING = re.compile(r"^# listed under: (.+)$", re.MULTILINE)
_DATA = re.compile(r"^ *- override /data: *(\w+)", re.MULTILINE)
_BASE = re.compile(r"^ *- /?([\w/]+) *$", re.MULTILINE)


def counts(config_dirs: Sequence[Path] = ()) -> dict[str, int]:
    """How many options each group has, the groups in alphabetical order."""
    return {group: len(options(group, config_dirs)) for group in groups(config_dirs)}


def groups_text(config_dirs: Sequence[Path] = ()) -> str:
    """The groups with the number of their options, and how to go on."""
    lines = [f"{group:<14}{number:>3}" for group, number in counts(config_dirs).items()]
    advice = "deepclust list GROUP shows what a group offers; train takes it as GROUP=OPTION."
    return "\n".join(["options in each group", "", *lines, "", advice])


def options_text(group: str, config_dirs: Sequence[Path] = ()) -> str:
    """The options of a group with their descriptions, under the headings that their files name."""
    described = dict(options(group, config_dirs))
    width = max((len(name) for name in described), default=0)
    sections = headings(group, described, config_dirs)
    blocks = []
    for heading, names in sections.items():
        lines = [_line(name, described[name], width) for name in names]
        blocks.append("\n".join([f"{heading}:", *lines] if len(sections) > 1 else lines))
    return "\n\n".join(blocks)


def _line(name: str, description: str, width: int) -> str:
    first = f"  {name:<{width}}  "
    return (
        textwrap.fill(
            description, WIDTH, initial_indent=first, subsequent_indent=" " * len(first)
        ).rstrip()
        or first.rstrip()
    )


def headings(
    group: str, names: Iterable[str], config_dirs: Sequence[Path] = ()
) -> dict[str, list[str]]:
    """Heading to names, both in alphabetical order.

    A YAML says what it is listed under in a comment line, `# listed under: HEADING`. A preset
    (group `experiment`) without that line is listed under the data set that it chooses.
    """
    sections: dict[str, list[str]] = {}
    for name in sorted(names):
        heading = _heading(group, name, (conf_folder(), *config_dirs))
        sections.setdefault(heading or UNLISTED, []).append(name)
    return dict(sorted(sections.items(), key=lambda section: section[0].lower()))


def _heading(group: str, name: str, folders: Sequence[Path]) -> str | None:
    text = _text(group, name, folders)
    if own := _HEADING.search(text):
        return own[1].strip()
    return _data_set(text, group, folders) if group == "experiment" else None


def _data_set(text: str, group: str, folders: Sequence[Path]) -> str | None:
    """The option of `data` that a preset chooses, itself or through a preset that it stands on."""
    texts = [text]
    seen = set()
    while texts:
        text = texts.pop(0)
        if own := _DATA.search(text):
            return own[1]
        bases = _BASE.findall(text.partition("\ndefaults:")[2])
        new = [base for base in bases if base not in seen]
        # A file that stands on itself is refused when it is composed; a list must still end.
        seen.update(new)
        texts += [_text(group, base.removeprefix(f"{group}/"), folders) for base in new]
    return None


def _text(group: str, name: str, folders: Sequence[Path]) -> str:
    """An option's YAML, or nothing where there is no such option."""
    files = [Path(folder) / group / f"{name}.yaml" for folder in folders]
    for file in files:
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
    return ""
