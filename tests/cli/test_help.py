"""The help is one screen, and what it leaves out is a `deepclust list` away."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deepclust.cli import main
from deepclust.cli.commands import COMMANDS
from deepclust.cli.help import GROUPS, HELP, help_text
from deepclust.cli.listing import UNLISTED, headings
from deepclust.cli.parser import OK
from deepclust.config.compose import groups, options
from deepclust.config.load import load
from deepclust.config.run_config import RunConfig

LINES = 60
COLUMNS = 100
CHOICES = [group for group in groups() if len(options(group)) > 1]
"""Groups that offer a choice; the others have one option each, `default`."""


def listing(capsys, *words: str) -> str:
    assert main(["list", *words]) == OK
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["train", "--help"], ["train", "-h"]])
def test_the_help_is_one_screen(words, capsys):
    assert main(words) == OK
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= LINES
    assert max(map(len, lines)) <= COLUMNS
    assert "\n".join(lines) == help_text()


def test_the_help_names_every_command_with_its_usage_and_no_other():
    text = help_text().partition("Commands (")[2].partition("\n\n")[0]
    lines = text.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(COMMANDS)
    for line, (name, command) in zip(lines, COMMANDS.items()):
        assert command.usage.split()[0] == name
        assert line.strip().startswith(command.usage)
        assert line.endswith(command.summary)


def test_the_help_counts_the_options_of_every_group_that_offers_a_choice():
    text = help_text().partition("Groups of train")[2].partition("\n\n")[0]
    counted = {line.split()[0]: int(line.split()[1]) for line in text.splitlines()[1:]}
    assert counted == {group: len(options(group)) for group in GROUPS}
    assert set(counted) == set(CHOICES)


def test_examples_of_the_help_are_valid(tmp_path, trained):
    calls: list[RunConfig] = trained(lambda config: OK)
    block = HELP.partition("Five to train with\n")[2].partition("\n\n")[0]
    assert len(block.splitlines()) == 5
    for line in block.splitlines():
        command = re.split(r" {2,}", line.strip())[0]
        words = command.replace("PHOTOS", str(tmp_path)).split()
        assert words[:2] == ["python", "train.py"]
        assert main(["train", *words[2:]]) == OK
    assert len(calls) == 7
    assert {config.seed for config in calls[-3:]} == {0, 1, 2}


@pytest.mark.parametrize("group", groups())
def test_list_shows_every_option_with_its_description(group, capsys):
    text = listing(capsys, group)
    assert max(map(len, text.splitlines())) <= COLUMNS
    rows = re.findall(r"^  (\w+)", text, re.MULTILINE)
    assert sorted(rows) == [name for name, _ in options(group)]
    unwrapped = " ".join(text.split())
    for _, description in options(group):
        assert " ".join(description.split()) in unwrapped


def test_list_without_a_group_shows_the_groups(capsys):
    text = listing(capsys)
    counted = dict(re.findall(r"^(\w+) +(\d+)$", text, re.MULTILINE))
    assert counted == {group: str(len(options(group))) for group in groups()}


def test_presets_are_listed_under_their_data_set():
    """The heading is the option of `data` of the composed preset, unless its file names another."""
    conf = Path(__file__).parents[2] / "conf/experiment"
    sections = headings("experiment", [name for name, _ in options("experiment")])
    assert UNLISTED not in sections
    checked = 0
    for heading, names in sections.items():
        # One of each section: composing takes a third of a second.
        name = names[-1]
        if "# listed under" in (conf / f"{name}.yaml").read_text():
            continue
        weights = ["backbone.weights=FILE"] if name.startswith("scan_imagenet") else []
        config = load([f"experiment={name}", "num_clusters=20", *weights])
        assert config.choices["data"] == heading
        checked += 1
    assert checked > 5


def test_heads_are_listed_by_what_they_do(capsys):
    text = listing(capsys, "head")
    sections = dict(re.findall(r"^(\S.*):\n((?:  .*\n)+)", text, re.MULTILINE))
    assert UNLISTED not in sections
    assert len(sections) > 3
    assert "simclr" in next(rows for heading, rows in sections.items() if "pretext" in heading)
    assert "p2ot" in next(rows for heading, rows in sections.items() if "imbalanced" in heading)


def test_list_shows_further_groups_too(tmp_path, capsys):
    (tmp_path / "head").mkdir()
    (tmp_path / "head/mine.yaml").write_text("# My own\n_target_: mine.Mine\n")
    (tmp_path / "head/ours.yaml").write_text(
        "# Ours\n# listed under: new things\n_target_: mine.Ours\n"
    )
    text = listing(capsys, "head", "--config-dir", str(tmp_path))
    assert re.search(rf"^{UNLISTED}:\n  mine +My own\n", text, re.MULTILINE)
    assert re.search(r"^new things:\n  ours +Ours\n", text, re.MULTILINE)
    assert "simclr" in text


def test_a_preset_is_listed_under_the_data_set_of_the_preset_that_it_stands_on(tmp_path):
    folder = tmp_path / "experiment"
    (folder / "base").mkdir(parents=True)
    (folder / "base/first.yaml").write_text("defaults:\n  - override /data: stl10\n")
    (folder / "second.yaml").write_text("# x\ndefaults:\n  - /experiment/base/first\n  - _self_\n")
    (folder / "third.yaml").write_text("# x\ndefaults:\n  - second\n  - _self_\n")
    (folder / "round.yaml").write_text("# x\ndefaults:\n  - round\n  - _self_\n")
    sections = headings("experiment", ["third", "round"], [tmp_path])
    assert sections == {"stl10": ["third"], UNLISTED: ["round"]}
