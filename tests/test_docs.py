"""README and docs: commands are valid, and run or marked as not run; code runs; links hold."""

from __future__ import annotations

import ast
import importlib
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from scipy.stats import entropy

from deepclust.cli import main
from deepclust.cli.commands import COMMANDS
from deepclust.cli.options import (
    add_cluster_options,
    add_edit_options,
    add_feature_options,
    add_predict_options,
)
from deepclust.cli.parser import BAD_INPUT, OK, Parser
from deepclust.config.compose import options, sweeps
from deepclust.config.load import load
from deepclust.heads.base import Bank
from tests.pages import (
    BLOCKS,
    PAGES,
    PROGRAMS,
    PYTHON,
    ROOT,
    SHELL,
    commands,
    own_heads,
    prose,
    spans,
    training_words,
)
from tests.runs import pixels

README = PAGES[0]
KB = 1000
FLAGS = {"--cfg", "-m", "--multirun", "-h", "--help"}
PARSERS = {
    "cluster": add_cluster_options,
    "edit": add_edit_options,
    "features": add_feature_options,
    "predict": add_predict_options,
}
QUICK = [
    "num_clusters=4",
    "backbone.width=8",
    "trainer.batch_size=20",
    "trainer.max_steps=1",
    "trainer.num_workers=0",
    "eval.baselines=none",
    "eval.probes=false",
    "eval.gallery_images=1",
    "logger.console=false",
]
"""Appended to commands that train: one step a stage, on sixty small images."""


# --- heads of your own ------------------------------------------------------------------------


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A folder where the heads and recipes of the pages are written down, and sixty images."""
    (tmp_path / "my_package").mkdir()
    for group in ("head", "recipe"):
        (tmp_path / "my_conf" / group).mkdir(parents=True)
    for target, (code, choice) in own_heads().items():
        package, module, _ = target.split(".")
        assert package == "my_package"
        (tmp_path / f"my_package/{module}.py").write_text(code)
        (tmp_path / f"my_conf/head/{module}.yaml").write_text(choice)
    np.save(tmp_path / "images.npy", pixels())
    for name in [name for name in sys.modules if name.partition(".")[0] == "my_package"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_head_of_the_readme_is_complete_and_short(workplace):
    code, choice = own_heads()["my_package.iic.IIC"]
    assert code in README.read_text() and choice in README.read_text()
    statements = [line for line in code.splitlines() if line.strip()]
    assert len(statements) <= 27 and len(choice.splitlines()) == 2


@pytest.mark.parametrize("target", own_heads())
def test_heads_of_the_pages_train_and_predict_after_loading(target, workplace):
    name = target.split(".")[1]
    words = ["--config-dir", "my_conf", f"head={name}", "trust=[my_package]", "data=arrays"]
    words += ["data.images=images.npy", *QUICK, "trainer.max_steps=8", "trainer.log_every_steps=1"]
    assert main(["train", *words, "run.dir=run"]) == OK
    rows = [json.loads(line) for line in (workplace / "run/metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 8 and np.isfinite(losses).all()

    from deepclust import Clusterer

    probabilities = Clusterer.load("run", trust=["my_package"]).predict_proba(pixels())
    assert probabilities.shape == (60, 4)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)


def make(target: str) -> Any:
    module, _, name = target.rpartition(".")
    sys.path.insert(0, "")
    return getattr(importlib.import_module(module), name)


def test_the_loss_of_the_readme_is_minus_the_mutual_information(workplace):
    """I(X; Y) = H(X) + H(Y) - H(X, Y) of the clusters of two views, in float64 by SciPy."""
    torch.manual_seed(0)
    head = make("my_package.iic.IIC")(5, 4)
    outputs = {view: head(torch.randn(50, 5), view) for view in (0, 1)}
    logits = [output.logits[0].detach().double() for output in outputs.values()]
    first, second = (part.softmax(dim=1).numpy() for part in logits)
    joint = first.T @ second / 50
    joint = (joint + joint.T) / 2
    expected = 2 * entropy(joint.sum(axis=0)) - entropy(joint.ravel())
    assert -head.loss(outputs, None, None)["loss"].item() == pytest.approx(expected, rel=1e-3)


def test_the_head_with_a_refresh_predicts_the_clusters_that_it_found(workplace):
    """Weights c and biases -|c|^2 / 2 have their largest output at the nearest centroid c."""
    torch.manual_seed(0)
    head = make("my_package.kmeans_labels.KMeansLabels")(5, 4, 60)
    features = torch.randn(60, 5)
    with torch.no_grad():
        head.refresh(Bank(features, torch.arange(60), 60))
        assert torch.equal(head.predict(features).argmax(dim=1), head.labels)
    assert len(head.labels.unique()) == 4


def test_a_head_brings_the_recipe_of_the_page(workplace):
    page = (ROOT / "docs/own_method.md").read_text()
    (recipe,) = [block.text for block in BLOCKS if "@package _global_" in block.text]
    (name,) = re.findall(r"`my_conf/(recipe/\w+\.yaml)`", page)
    (workplace / "my_conf" / name).write_text(recipe)
    config = load(["head=iic", "trust=[my_package]"], [Path("my_conf")])
    assert (
        config.stages["main"].trainer.num_images == yaml.safe_load(recipe)["trainer"]["num_images"]
    )


# --- commands ---------------------------------------------------------------------------------


def check(command: list[str], capsys) -> None:
    """A command's program, files, options and keys exist."""
    words = training_words(command)
    if words is not None:
        check_training(words)
    elif command[0] == "deepclust":
        check_deepclust(command[1:], capsys)
    elif command[0] == "python":
        check_script(command[1:])
    elif command[0] == "pip":
        assert command[1] == "install", command
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(command)):
            assert f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text(), extra


def check_training(words: list[str]) -> None:
    overrides = [word for word in words if word not in FLAGS]
    folders = []
    if "--config-dir" in overrides:
        index = overrides.index("--config-dir")
        folders = [Path(overrides[index + 1])]
        del overrides[index : index + 2]
    for run in sweeps(overrides) if {"-m", "--multirun"} & set(words) else [overrides]:
        load(run, folders)


def check_deepclust(words: list[str], capsys) -> None:
    if words == ["--help"]:
        return
    assert words[0] in COMMANDS, words
    with pytest.raises(SystemExit):
        main([words[0], "--help"])
    known = set(re.findall(r"(?<![\w-])--?[a-z][\w-]*", capsys.readouterr().out))
    given = {word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)}
    assert given <= known, given - known


def check_positions(words: list[str]) -> None:
    """The words of a whole command: everything that it needs, and nothing else."""
    if words[0] in PARSERS:
        parser = Parser(words[0])
        PARSERS[words[0]](parser)
        parser.parse_intermixed_args(words[1:])


def check_script(words: list[str]) -> None:
    script = ROOT / words[0]
    if words[0] == "-m":
        script = ROOT / f"{words[1].replace('.', '/')}.py"
        words = words[1:]
    assert script.is_file(), words
    text = "".join(file.read_text() for file in script.parent.glob("*.py"))
    for word in words[1:]:
        if word.startswith("--"):
            assert f'"{word}"' in text, f"{words[0]} has no {word}"
    given = [word for word in words[1:] if re.fullmatch(r"[a-z][\w.]*=\S+", word)]
    files = [place + 1 for place, word in enumerate(words) if word == "--features"]
    load([word for word in given if words.index(word) not in files])


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_commands_are_valid(block, workplace, capsys):
    if "it is refused" in block.reason:
        pytest.skip("a refusal, which has a test of its own")
    for command in commands(block.text):
        assert block.reason or command[0] in PROGRAMS, (
            f"{command[0]} is not run here; say why above"
        )
        check(command, capsys)
        if command[0] == "deepclust":
            check_positions(command[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_in_running_text_are_valid(page, workplace, capsys):
    for span in sorted(spans(page)):
        for command in commands(span):
            check(command, capsys)


@pytest.mark.parametrize("block", [block for block in SHELL if not block.reason], ids=str)
def test_commands_that_are_not_marked_run(block, workplace, capsys):
    """Training goes one step a stage, on sixty images; all else runs as it stands."""
    for number, command in enumerate(commands(block.text)):
        words = training_words(command)
        if words is None:
            assert command[0] == "deepclust" and command[1] in ("list", "--help"), (
                f"{' '.join(command)}: not run here; say why above the block"
            )
            assert main(command[1:]) == OK
        elif {"--cfg", "--help"} & set(words):
            assert main(["train", *words]) == OK
        else:
            data = ["data=arrays", "data.images=images.npy", f"run.root=run{number}"]
            assert main(["train", *words, *data, *QUICK]) == OK
            assert list((workplace / f"run{number}").glob("*/clusters.csv"))


def test_refusals_are_printed_as_the_page_shows_them(capsys):
    numbered = list(enumerate(BLOCKS))
    index = next(number for number, block in numbered if "it is refused" in block.reason)
    (command,) = commands(BLOCKS[index].text)
    assert main(["train", *command[2:]]) == BAD_INPUT
    printed = capsys.readouterr().err
    shown = BLOCKS[index + 1].text
    assert sorted(printed.splitlines()) == sorted(shown.splitlines())


# --- code -------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_is_valid_and_runs_unless_it_is_marked(block):
    tree = ast.parse(block.text)
    if not block.reason:
        exec(compile(tree, str(block), "exec"), {"__name__": "page"})


# --- pages ------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
    for link in re.findall(r"\]\(([^)]+)\)", prose(page)):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_index_names_every_page_and_the_readme_names_the_index():
    text = (ROOT / "docs/index.md").read_text()
    pages = {page.name for page in PAGES} - {"README.md", "index.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", text))
    assert "(docs/index.md)" in README.read_text()


def test_the_readme_and_its_picture_are_small():
    assert len(README.read_bytes()) <= 9 * KB
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", README.read_text())
    content = (ROOT / picture).read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) < 120 * KB


@pytest.mark.parametrize("page", [README, ROOT / "docs/methods.md"], ids=lambda page: page.name)
def test_every_head_is_described_with_a_paper(page):
    text = page.read_text(encoding="utf-8")
    paragraphs = [line for part in text.split("\n\n") for line in rows(part)]
    for name, _ in options("head"):
        about = [part for part in paragraphs if re.match(rf"(\|.*?)?(\*\*)?`{name}`", part)]
        assert any("https://arxiv.org/abs/" in part for part in about), name


def rows(part: str) -> list[str]:
    """The rows of a table, else the paragraph."""
    lines = part.splitlines()
    return lines if part.startswith("|") else [" ".join(lines)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_markers_of_generated_tables_come_in_pairs(page):
    marks = re.findall(r"<!-- (\w+) (begins|ends) -->", page.read_text(encoding="utf-8"))
    assert marks[::2] == [(name, "begins") for name, _ in marks[1::2]]
