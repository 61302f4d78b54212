"""Configuration: every slip is refused with the nearest key, before torch is imported; nothing else
can be built.
"""

from __future__ import annotations

import copy
import inspect
import random
import shutil
import string
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from deepclust.config import check as config
from deepclust.config import settings as sections
from deepclust.config.build import build
from deepclust.config.compose import Composed, compose, conf_folder, options, sweeps
from deepclust.config.load import load
from deepclust.config.run_config import differences
from deepclust.config.settings import SECTIONS, SETTINGS
from deepclust.config.signature import INJECTED, check_node, signature
from deepclust.errors import ConfigError
from deepclust.heads.common.prototypes import PrototypeHead
from deepclust.heads.swav import SwAV

CHECKOUT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def composed() -> Composed:
    tree, problems = compose([])
    assert problems == []
    return tree


@pytest.fixture(scope="module")
def default() -> config.RunConfig:
    return load([])


def problems_of(composed: Composed, tree: dict[str, Any]) -> list[str]:
    problems: list[str] = []
    config._check(Composed(tree, composed.choices, composed.stages, composed.picked), [], problems)
    return problems


def refused(words: list[str], dirs: list[Path] | None = None) -> str:
    with pytest.raises(ConfigError) as error:
        load(words, dirs or [])
    return str(error.value)


# --- what is accepted -------------------------------------------------------------------------


def test_the_default_is_the_scan_recipe_on_digits(default):
    assert list(default.stages) == ["pretext", "scan", "selflabel"]
    assert default.name() == "scan-digits-0" and default.folder() == Path("outputs/scan-digits-0")
    assert default.stages["scan"].head["_target_"] == "deepclust.heads.scan.SCAN"
    assert yaml.safe_load(default.text()) == default.tree


def test_composing_fills_in_the_default_of_every_key_that_no_file_says(composed):
    for key, kind in SETTINGS.items():
        assert config.check_arguments(
            signature(SECTIONS[key]), composed.tree[key], key, []
        ) == asdict(kind())
    bare = check_node({"_target_": "deepclust.heads.swav.SwAV"}, "head", [], section="head")
    composed_head = load(["head=swav", "recipe=single"]).stages["main"].head
    assert (
        set(bare) == {"_target_"}
        and composed_head["temperature"] == 0.1
        and composed_head["num_prototypes"] is None
    )
    named = set(inspect.signature(SwAV).parameters) | set(
        inspect.signature(PrototypeHead).parameters
    )
    assert set(composed_head) - {"_target_"} == named - set(INJECTED) - {"inherited"}


def test_no_file_repeats_what_a_signature_says():
    for group in ("head", "backbone", "data", "optim"):
        for name, description in options(group):
            node = _yaml(conf_folder() / group / f"{name}.yaml")
            node = node.get(group, node)
            known = signature(node.get("_target_") or SECTIONS[group]).parameters
            for key, value in node.items():
                if (
                    key in known and key not in INJECTED
                ):  # an injected one is not filled in where a file says null
                    assert value != known[key].default, (group, name, key)
            assert description, (group, name)


def test_all_options_of_the_small_groups_compose():
    load(
        [
            "data=image_folder",
            "data.root=.",
            "recipe=scan_photo",
            "backbone=timm",
            "optim=sgd",
            "num_clusters=7",
        ]
    )
    load(["data=cifar10", "augment=cifar", "backbone=cifar_resnet18", "head=scan"])


def test_the_recipe_for_photos_brings_the_views_for_photos():
    assert load(["recipe=scan_photo"]).choices["augment"] == "photo"
    assert load(["data=cifar10", "recipe=scan_photo"]).choices["augment"] == "cifar"
    assert load(["recipe=scan_photo", "augment=small_gray"]).choices["augment"] == "small_gray"


def test_a_head_by_itself_is_the_recipe_single():
    chosen = load(
        ["head=simclr", "head.temperature=0.5", "stages.main.optim.lr=1e-2", "num_clusters=4"]
    )
    assert chosen.name() == "single-simclr-digits-k4-0"
    assert (
        chosen.stages["main"].head["temperature"] == 0.5 and chosen.stages["main"].optim.lr == 1e-2
    )


def test_a_stage_falls_back_to_the_top_level_groups_and_may_choose_its_own():
    chosen = load(
        ["optim.momentum=0.5", "optim@stages.scan.optim=sgd", "stages.selflabel.optim.lr=3e-3"]
    )
    assert chosen.stages["scan"].optim.name == "sgd" and chosen.stages["scan"].optim.momentum == 0.9
    assert chosen.stages["pretext"].optim.momentum == 0.5
    assert chosen.stages["selflabel"].optim.lr == 3e-3


def test_a_head_chosen_for_a_stage_comes_without_what_the_recipe_tunes():
    chosen = load(
        [
            "head@stages.scan.head=simclr",
            "head@stages.pretext.head=scan",
            "stages.pretext.head.num_heads=3",
        ]
    )
    assert chosen.name() == "scan-simclr-scan-digits-0" and list(chosen.stages) == [
        "pretext",
        "scan",
        "selflabel",
    ]
    assert chosen.stages["scan"].head == load(["head=simclr", "recipe=single"]).stages["main"].head
    assert chosen.stages["pretext"].head == {
        **load(["head=scan", "recipe=single"]).stages["main"].head,
        "num_heads": 3,
    }


def test_numbers_may_be_written_with_exponents(tmp_path):
    _write(
        tmp_path / "experiment/small.yaml",
        "# @package _global_\noptim:\n  weight_decay: 1e-3\n  warmup_epochs: 2\n",
    )
    chosen = load(["+experiment=small", "++optim.betas=[1E-1,0.9]"], [tmp_path])
    optim = chosen.stages["pretext"].optim
    assert (optim.weight_decay, optim.warmup_epochs) == (1e-3, 2.0) and optim.betas == (0.1, 0.9)
    assert chosen.name() == "small-scan-digits-0"


def test_a_head_brings_the_recipe_of_its_name(tmp_path):
    _write(
        tmp_path / "recipe/single_simclr.yaml",
        "# @package _global_\ntrainer: {batch_size: 64}\nstages:\n  main: {}\n",
    )
    chosen = load(["head=simclr"], [tmp_path])
    assert (
        chosen.choices["recipe"] == "single_simclr"
        and chosen.stages["main"].trainer.batch_size == 64
    )
    assert (
        load(["head=simclr", "trainer.batch_size=32"], [tmp_path]).stages["main"].trainer.batch_size
        == 32
    )
    assert (
        load(["head=simclr", "recipe=single"], [tmp_path]).stages["main"].trainer.batch_size == 256
    )
    assert load(["head=simclr"]).choices["recipe"] == "single"


def test_a_nested_head_is_a_group_choice(tmp_path):
    _write(
        tmp_path / "wrap_heads.py",
        "from deepclust.heads import Head\n\nclass Wrap(Head):\n"
        "    def __init__(self, inner: Head, *, weight: float = 1.0): ...\n",
    )
    _write(
        tmp_path / "my_conf/head/wrap.yaml",
        "defaults:\n  - /head@inner: scan\n  - _self_\n_target_: wrap_heads.Wrap\nweight: 1.0\n",
    )
    words = ["head=wrap", "trust=[wrap_heads]"]
    inner = (
        load([*words, "head.inner=selflabel", "head.inner.threshold=0.5"], [tmp_path / "my_conf"])
        .stages["main"]
        .head["inner"]
    )
    assert inner["_target_"].endswith("SelfLabel") and inner["threshold"] == 0.5
    message = refused(
        [*words, "head.inner=selflable", "head.inner.treshold=0.5", "head.weigth=2"],
        [tmp_path / "my_conf"],
    )
    assert all(near_key in message for near_key in ("selflabel", "threshold", "weight"))


def test_building_gives_injected_arguments_where_they_are_named_and_not_set():
    node = {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2}
    assert build(node, dim=5, bias=False).bias is None
    assert build({**node, "bias": True}, bias=False).bias is not None
    with pytest.raises(ConfigError, match=r"out_featurs.*out_features"):
        build({"_target_": "torch.nn.Linear", "in_features": 3, "out_featurs": 2})


def test_the_default_data_backbone_and_heads_can_be_built(default):
    import torch

    data = build(default.data)
    assert len(data.train) == 1797
    backbone = build(default.backbone, in_channels=1, image_size=8)
    for stage in default.stages.values():
        head = build(stage.head, dim=backbone.num_features, num_clusters=10, num_samples=1797)
        assert isinstance(head, torch.nn.Module)


# --- wrong keys -------------------------------------------------------------------------------


def _keys(tree: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all keys but the names of views, which are free, and what lies in lists."""
    if not isinstance(tree, dict):
        return []
    below = [
        item for key, value in tree.items() if key != "views" for item in _keys(value, (*path, key))
    ]
    return [*((*path, key) for key in tree), *below]


def _slips(word: str, draw: random.Random) -> list[str]:
    letter = draw.choice(string.ascii_lowercase + "_")
    left_out = [word[:i] + word[i + 1 :] for i in range(len(word))]
    swapped = [word[:i] + word[i + 1] + word[i] + word[i + 2 :] for i in range(len(word) - 1)]
    changed = [word[:i] + letter + word[i + 1 :] for i in range(len(word))]
    added = [word[:i] + letter + word[i:] for i in range(len(word) + 1)]
    return [
        slip
        for slip in dict.fromkeys([*left_out, *swapped, *changed, *added])
        if slip and slip != word
    ]


def _at(tree: dict[str, Any], path: tuple[str, ...]) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@pytest.mark.parametrize(
    "words", [[], ["head=scan", "backbone=timm"]], ids=["recipe scan", "single head"]
)
def test_every_one_letter_slip_of_every_key_is_refused_with_the_near_key(words):
    composed, _ = compose(words)
    draw = random.Random(0)
    keys = {path: _slips(path[-1], draw) for path in _keys(composed.tree)}
    assert len(keys) > 80
    for turn in range(max(map(len, keys.values()))):
        tree, expected = copy.deepcopy(composed.tree), {}
        for path, slips in keys.items():
            *above, key = path
            place = _at(tree, tuple(above))
            if turn < len(slips) and slips[turn] not in place:
                place[slips[turn]] = copy.deepcopy(_at(composed.tree, path))
                expected[".".join((*above, slips[turn]))] = key
        problems = problems_of(composed, tree)
        for slip, key in expected.items():
            lines = [line for line in problems if line.startswith((f"{slip}=", f"{slip}."))]
            assert any(key in line.rpartition("did you mean")[2] for line in lines), (
                slip,
                key,
                lines,
            )


def test_every_key_mistyped_on_the_command_line_is_refused_at_once(composed):
    def slip(key: str) -> str:
        return key[:-1] if len(key) > 2 else key + "x"

    paths = [
        path for path in _keys(composed.tree) if path[-1] != "_target_" and "augment" not in path
    ]
    words = [".".join((*path[:-1], slip(path[-1]))) + "=1" for path in paths]
    prefixed = [
        word if place % 3 else "+" * (1 + place % 2) + word for place, word in enumerate(words)
    ]
    with pytest.raises(ConfigError) as error:
        load(prefixed)
    for word, path in zip(words, paths):
        assert any(line.startswith(word) and path[-1] in line for line in error.value.problems), (
            word
        )


EXPERIMENT = """\
# @package _global_
defaults:
  - override /head: simclr
  - override /recipe: single
head: {temprature: 0.5}
optm: {lr: 1}
optim: {lrr: 1}
stages:
  mian: {optim: {lr: 1}}
  main: {trainr: {epochs: 1}}
data: {roott: a}
augment: {views: {strong: [{gama: {}}, {cutout: {fractoin: 0.5}}]}}
lr: 0.1
"""


def test_slips_in_experiments_are_refused(tmp_path):
    _write(tmp_path / "experiment/mine.yaml", EXPERIMENT)
    lines = refused(["experiment=mine"], [tmp_path]).splitlines()
    for slip, near_key in (
        ("head.temprature=0.5", "temperature"),
        ("optm.lr=1", "optim"),
        ("optim.lrr=1", "lr"),
        ("stages.mian.optim.lr=1", "main"),
        ("stages.main.trainr.epochs=1", "trainer"),
        ("data.roott=a", "_target_"),
        ("augment.views.strong[0].gama", "gamma"),
        ("augment.views.strong[1].cutout.fractoin=0.5", "fraction"),
        ("lr=0.1", "optim.lr"),
    ):
        assert any(line.startswith(slip) and near_key in line for line in lines), (slip, lines)


def test_all_errors_come_at_once_in_one_line_each():
    words = [
        "head=simlcr",
        "optm.lr=1",
        "optim.lr=abc",
        "optim.momentum=nan",
        "seed=-1",
        "num_clusters=0",
        "a=[",
        "~seed",
    ]
    words += [
        "trainer.epochs=1e3",
        "trainer.epochz=1",
        "run.name=../x",
        "resume=atuo",
        "data._target_=os.system",
        "seed=1,2",
    ]
    with pytest.raises(ConfigError) as error:
        load(words)
    lines = error.value.problems
    assert len(lines) >= len(words) - 1 and all("\n" not in line and ":" in line for line in lines)
    assert any("(write 1000)" in line for line in lines) and any(
        "did you mean simclr" in line for line in lines
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["head=nope", "optim=addamw"], ["Choices: ", "did you mean adamw"]),
        (["recipe=single"], ["stages.main has no head; choose one with head=NAME"]),
        (["optim.lr=0.5"], ["would do nothing", "stages.pretext.optim.lr"]),
        (["recipe=scan", "head=simclr"], ["leave recipe=scan out"]),
        (
            ["head.entropy_weight=3", "augment=null"],
            ["did you mean stages.scan.head.entropy_weight?", "augment=NAME"],
        ),
        (
            ["stages.scan.head=simclr", "hydra.run.dir=x"],
            ["head@stages.scan.head=NAME", "not used here"],
        ),
        (["head@stages.scam.head=simclr"], ["did you mean scan?"]),
        (
            ["bakbone@x=small_convnet", "trainer=null"],
            ["there is no group bakbone", "must be a mapping"],
        ),
        (
            ["stages.scan.head.dim=4", "eval.baselines=[kmens]"],
            ["filled in by the program", "kmeans"],
        ),
        (["data=image_folder", "optim.lr=${sed}"], ["data.root has no value", "sed"]),
        (["optim.nesterov=true", "optim.momentum=0"], ["needs optim.momentum above 0"]),
        (
            ["head=moco", "trainer.epochs=3"],
            ["trainer.epochs=3: would do nothing", "add trainer.num_images=null"],
        ),
        (
            ["optim.milestones=[3]"],
            ["stages.pretext.optim.milestones=[3.0] with", "schedule=cosine"],
        ),
        (["optim.schedule=step"], ["step needs milestones"]),
        (["trainer.batch_size=4", "trainer.micro_batches=8"], ["at most batch_size (4)"]),
    ],
)
def test_messages_say_what_would_be_valid(words, parts):
    message = refused(words)
    assert all(part in message for part in parts), message


def test_faults_of_yaml_files_are_one_line(tmp_path):
    _write(tmp_path / "experiment/broken.yaml", "a: [1\nb")
    _write(
        tmp_path / "experiment/missing.yaml",
        "# @package _global_\ndefaults:\n  - override /head: simcl\n",
    )
    broken, missing = (
        refused(["experiment=broken"], [tmp_path]),
        refused(["experiment=missing"], [tmp_path]),
    )
    assert (
        "broken.yaml, line 2" in broken
        and "did you mean simclr" in missing
        and "missing.yaml" in missing
    )
    assert "no such folder" in refused([], [tmp_path / "nowhere"])


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "", "x" * 300, "a\\b", "a b"])
def test_names_that_leave_the_folder_are_refused(composed, name):
    tree = copy.deepcopy(composed.tree)
    tree["run"]["name"] = name
    assert any(line.startswith("run.name=") for line in problems_of(composed, tree))


def test_a_head_from_outside_must_be_trusted_on_the_command_line(tmp_path):
    _write(
        tmp_path / "outside_head.py",
        "raise SystemExit('imported')\n\nclass Mine:\n    def __init__(self, dim: int, *, x: int = 2): ...\n",
    )
    _write(tmp_path / "conf/head/mine.yaml", "_target_: outside_head.Mine\nx: 1\n")
    _write(tmp_path / "conf/experiment/sly.yaml", "# @package _global_\ntrust: [outside_head]\n")
    dirs = [tmp_path / "conf"]
    assert "trust=[outside_head]" in refused(["head=mine"], dirs)
    assert "only be given on the command line" in refused(["head=mine", "experiment=sly"], dirs)
    assert "did you mean x" in refused(["head=mine", "trust=[outside_head]", "head.xx=1"], dirs)
    chosen = load(["head=mine", "trust=[outside_head]", "head.x=5"], dirs)
    assert chosen.stages["main"].head["x"] == 5 and "outside_head" not in sys.modules


# --- what differs, sweeps, where conf/ is -----------------------------------------------------


def test_only_what_changes_results_counts_as_a_difference(default):
    chatty = load(
        [
            "run.name=other",
            "trainer.log_every_steps=1",
            "trainer.num_workers=0",
            "eval.probes=false",
        ]
    )
    assert differences(default.text(), chatty) == []
    changed = load(
        ["seed=3", "stages.scan.head.entropy_weight=3", "optim.weight_decay=0.1", "num_clusters=5"]
    )
    lines = differences(default.text(), changed)
    assert "seed: 0 -> 3" in lines and "num_clusters: null -> 5" in lines
    assert any(line.startswith("stages.scan.head.entropy_weight: ") for line in lines)
    assert not any(".optim.lr" in line for line in lines if line.startswith("stages.scan")), (
        "each stage sets its own lr"
    )
    assert sum("optim.weight_decay" in line for line in lines) == 3
    assert differences(default.text(), load(["head=simclr"]))[0] == "stages.main: absent -> present"
    assert differences("{", default) == ["config.yaml of the run folder cannot be read"]


def test_sweeps_are_the_product():
    assert sweeps(["seed=0,1", "optim=adamw,sgd", "a=[1,2]"]) == [
        [f"seed={seed}", f"optim={optim}", "a=[1,2]"]
        for seed in (0, 1)
        for optim in ("adamw", "sgd")
    ]
    assert sweeps(["seed=range(0,3)"]) == [["seed=0"], ["seed=1"], ["seed=2"]]
    assert sweeps([]) == [[]]


def test_conf_is_found_inside_the_package_as_in_a_wheel(tmp_path):
    shutil.copytree(
        CHECKOUT / "deepclust", tmp_path / "deepclust", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(conf_folder(), tmp_path / "deepclust/conf", dirs_exist_ok=True)
    code = (
        "from deepclust.config.compose import conf_folder; from deepclust.config.load import load;"
        " print(load([]).name(), conf_folder())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["scan-digits-0", str((tmp_path / "deepclust/conf").resolve())], (
        done.stderr
    )


def test_sections_keep_their_public_names():
    assert set(config.TOP) >= {
        "seed",
        "num_clusters",
        "resume",
        "run",
        "checkpoint",
        "distributed",
        "trainer",
        "optim",
    }
    assert {"name", "dir", "new", "traceback"} <= set(asdict(sections.RunSettings()))


def _yaml(file: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    return OmegaConf.to_container(OmegaConf.load(file))  # type: ignore[return-value]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_epochs_that_a_budget_in_images_would_hide_are_refused():
    key = "stages.pretext.trainer"
    with pytest.raises(
        ConfigError, match=rf"{key}.epochs=3: would do nothing.*{key}.num_images=null"
    ):
        load([f"{key}.epochs=3"])
    assert load([f"{key}.epochs=3", f"{key}.num_images=null"]).stages["pretext"].trainer.epochs == 3
