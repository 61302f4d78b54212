"""Configurations by strangers: nothing that they name is run; and what may be named at all."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from deepclust.config.build import build
from deepclust.config.compose import conf_folder, options
from deepclust.config.load import load
from deepclust.config.signature import Node, signature
from deepclust.config.targets import BACKBONES, DATA, HEADS, LAYERS, SECTIONS, resolve
from deepclust.errors import ConfigError, UserError
from deepclust.heads.base import Head
from tests.strangers import Stranger, write

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stranger(tmp_path: Path) -> Stranger:
    return Stranger(tmp_path)


TRAP = """
open({canary!r}, "w")

class Evil:
    def __init__(self, x: int = 0): ...

def evil(x: int = 0): ...
"""
CALIBRATION = "deepclust.heads.calibration.Calibration"
EXPERIMENTS = {
    "head": "head: {node}",
    "stage": "stages: {{scan: {{head: {node}}}}}",
    "backbone": "backbone: {node}",
    "data": "data: {node}",
    "unknown key beside": "backbone: {{zzz: {node}}}",
    "known key": "backbone: {{width: {node}}}",
    "list": "backbone: {{freeze: [{node}]}}",
    "inner": "stages: {{scan: {{head: {{_target_: " + CALIBRATION + ", inner: {node}}}}}}}",
    "augment": "augment: {{views: {{clean: [{node}]}}}}",
    "settings": "optim: {{lr: {node}}}",
    "top": "zzz: {node}",
    "trust": "trust: [trap, builtins, timm, torchvision]\nbackbone: {node}",
    "decoded": "zzz: 1\nbackbone: '${{oc.decode:''{node}''}}'",
    "created": "backbone: ${{oc.create:{node}}}",
    "from the environment": "backbone: {{_target_: '${{oc.env:STRANGE}}'}}",
    "hydra": "hydra: {{callbacks: {{a: {node}}}, launcher: {node}}}\nzzz: 1",
    "search path": "hydra: {{searchpath: ['pkg://trap']}}",
    "two words": "backbone: {{_target_: '${{zzz}}.${{zzz}}'}}\nzzz: trap",
}


@pytest.mark.parametrize("place", EXPERIMENTS)
def test_nothing_that_a_strangers_experiment_names_is_run(
    stranger: Stranger, place: str, monkeypatch: Any
):
    """The folder holds a module, too, whose import would leave the canary."""
    write(stranger.folder / "trap.py", TRAP.format(canary=str(stranger.canary)))
    monkeypatch.setenv("STRANGE", "trap.Evil")
    nodes = [
        stranger.nodes()["unpickle"],
        stranger.nodes()["open"],
        {"_target_": "trap.Evil"},
        {"_target_": "trap.evil"},
    ]
    for node in nodes:
        text = EXPERIMENTS[place].format(node=json.dumps(node))
        write(stranger.folder / "conf/experiment/sly.yaml", f"# @package _global_\n{text}\n")
        with pytest.raises(ConfigError):
            load(["experiment=sly"], [stranger.folder / "conf"])
    assert not stranger.canary.exists() and "trap" not in sys.modules


@pytest.mark.parametrize("kind", ["unpickle", "unpack", "open", "trap"])
def test_a_groups_file_and_words_go_by_the_same_rule(stranger: Stranger, kind: str):
    write(stranger.folder / "trap.py", TRAP.format(canary=str(stranger.canary)))
    conf, nodes = (
        [stranger.folder / "conf"],
        {**stranger.nodes(), "trap": {"_target_": "trap.Evil"}},
    )
    node, groups = nodes[kind], ("head", "backbone", "data")
    for group in groups:
        write(conf[0] / f"{group}/sly.yaml", json.dumps(node))
    places = [f"{group}._target_={node['_target_']}: " for group in groups]
    with pytest.raises(ConfigError) as files:
        load([f"{group}=sly" for group in groups], conf)
    with pytest.raises(ConfigError) as words:
        load(["head=scan", *(place[:-2] for place in places)], conf)
    for said in (str(files.value), str(words.value)):
        assert all(place in said for place in places)
    inner = json.dumps(node).replace(": ", ":")
    with pytest.raises(ConfigError, match=r"head\.inner"):
        load(["head=calibration", f"++head.inner={inner}"], conf)
    assert not stranger.canary.exists() and "trap" not in sys.modules


def test_what_the_command_line_trusts_goes_before_what_a_file_does(stranger: Stranger):
    write(stranger.folder / "trap.py", TRAP.format(canary=str(stranger.canary)))
    write(stranger.folder / "mine_own.py", "class Mine:\n    def __init__(self, x: int = 0): ...\n")
    write(stranger.folder / "conf/head/mine.yaml", "_target_: mine_own.Mine\nx: 1\n")
    sly = "# @package _global_\ntrust: [trap]\nbackbone: {_target_: trap.Evil}\n"
    write(stranger.folder / "conf/experiment/sly.yaml", sly)
    conf = [stranger.folder / "conf"]
    with pytest.raises(ConfigError, match=r"backbone._target_=trap.Evil: may not be built"):
        load(["experiment=sly", "head=mine", "recipe=single", "trust=[mine_own]"], conf)
    assert (
        load(["head=mine", "trust=[mine_own]"], conf).stages["main"].head["_target_"]
        == "mine_own.Mine"
    )
    assert not stranger.canary.exists() and "trap" not in sys.modules


def test_files_beside_a_folder_of_groups_are_not_importable(stranger: Stranger):
    """Neither as a plugin of Hydra nor in the place of a package that is not installed."""
    canary = f"open({str(stranger.canary)!r}, 'w')\n"
    for place in (
        "hydra_plugins/sly/plugin.py",
        "hydra_plugins/sly/__init__.py",
        "package_of_nobody.py",
    ):
        write(stranger.folder / place, canary)
    write(stranger.folder / "conf/experiment/plain.yaml", "# @package _global_\nseed: 3\n")
    code = (
        "import importlib.util, sys; from pathlib import Path; from deepclust.config.load import load\n"
        f"assert load(['experiment=plain'], [Path({str(stranger.folder / 'conf')!r})]).seed == 3\n"
        "assert importlib.util.find_spec('package_of_nobody') is None"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert not stranger.canary.exists()


# --- the list ---------------------------------------------------------------------------------


def test_the_list_holds_what_conf_names_and_nothing_but_heads_backbones_and_data_sets():
    for group, listed in (("head", HEADS), ("backbone", BACKBONES), ("data", DATA)):
        for name, _ in options(group):
            lines = (conf_folder() / group / f"{name}.yaml").read_text().splitlines()
            targets = [
                line.partition(":")[2].strip()
                for line in lines
                if line.strip().startswith("_target_:")
            ]
            assert len(targets) == 1 and targets[0] in listed, (group, name)
    for target in HEADS:
        assert (
            issubclass(resolve(target), Head)
            and resolve(target).__module__ == target.rpartition(".")[0]
        )
    for target in (*BACKBONES, *DATA):
        returned = resolve(target).__annotations__["return"]
        assert returned == ("Backbone" if target in BACKBONES else "ImageData"), target
    for target in LAYERS:
        assert issubclass(resolve(target), torch.nn.Module)
    for targets in SECTIONS.values():
        assert all(not part.startswith("_") for target in targets for part in target.split("."))


def test_no_listed_signature_takes_a_nested_object_but_a_head():
    def nodes(kind: Any) -> list[Any]:
        return [each for each in getattr(kind, "options", (kind,)) if isinstance(each, Node)]

    found = {
        (target, name): [each.section for each in nodes(item.kind)]
        for target in (*HEADS, *BACKBONES, *DATA)
        for name, item in signature(target).parameters.items()
        if nodes(item.kind)
    }
    assert found == {("deepclust.heads.calibration.Calibration", "inner"): ["head"]}


OWN = """
from torch import nn

class Own(nn.Module):
    def __init__(self, top: nn.Module, more: dict | None = None):
        super().__init__()
        self.top = top
"""


def test_a_head_of_ones_own_may_take_layers_where_its_signature_says_so(
    tmp_path: Path, monkeypatch: Any
):
    write(tmp_path / "own_layers.py", OWN)
    monkeypatch.syspath_prepend(tmp_path)
    layer = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}
    node = {"_target_": "own_layers.Own", "top": layer}
    assert build(node, trust=["own_layers"]).top.out_features == 2
    for sly in (
        {**node, "more": {"x": layer}},
        {**node, "more": layer},
        {**node, "top": {"_target_": "torch.nn.Module"}},
        {**node, "top": {**layer, "device": layer}},
        {**node, "top": {"_target_": "own_layers.nn.Linear", "in_features": 3, "out_features": 2}},
        {**node, "top": {"_target_": "torch.nn.modules.module._load", "x": 1}},
        {**node, "top": {"_target_": "deepclust.heads.scan.SCAN"}},
    ):
        with pytest.raises(UserError):
            build(copy.deepcopy(sly), trust=["own_layers"])


@pytest.mark.parametrize(
    "target",
    ["own_names._hidden.X", "own_names.X._y", "_own.X", "own_names.__class__", "own_names"],
)
def test_names_with_leading_underscores_are_never_built(target: str):
    with pytest.raises(UserError):
        resolve(target, ["own", "_own"])
