"""What the groups of the configuration offer, as text for `deepclust list` and the help.

Imports no torch.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path

from deepclust.config.compose import conf_folder, groups, options

WIDTH = 100
"""Columns of a line: two pages side by side on a common screen."""
UNLISTED = "others"
"""The heading of options that name none where others of their group do."""

# Composing fifty presets with Hydra takes longer than anybody waits for a list, so the few lines
# that matter are read as text.
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
        # A single heading would divide nothing.
        if len(sections) > 1:
            lines.insert(0, f"{heading}:")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _line(name: str, description: str, width: int) -> str:
    indent = f"  {name:<{width}}  "
    # An option without a description is its name alone, which `fill` would leave out.
    if not description:
        return indent.rstrip()
    following = " " * len(indent)
    return textwrap.fill(description, WIDTH, initial_indent=indent, subsequent_indent=following)


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
    named = _HEADING.search(text)
    if named:
        return named[1].strip()
    if group == "experiment":
        return _data_set(text, group, folders)
    return None


def _data_set(text: str, group: str, folders: Sequence[Path]) -> str | None:
    """The option of `data` that a preset chooses, itself or through a preset that it stands on."""
    texts = [text]
    seen = set()
    while texts:
        text = texts.pop(0)
        choice = _DATA.search(text)
        if choice:
            return choice[1]
        bases = _BASE.findall(text.partition("\ndefaults:")[2])
        new = [base for base in bases if base not in seen]
        # A file that stands on itself is refused when it is composed; a list must still end.
        seen.update(new)
        texts += [_text(group, base.removeprefix(f"{group}/"), folders) for base in new]
    return None


def _text(group: str, name: str, folders: Sequence[Path]) -> str:
    """An option's YAML, or nothing where there is no such option."""
    # The first folder wins, as it does where options are composed.
    files = [Path(folder) / group / f"{name}.yaml" for folder in folders]
    for file in files:
        if file.is_file():
            return file.read_text(encoding="utf-8", errors="replace")
    return ""
