"""Model files by strangers: nothing that one of them names is run, read or fetched."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from deepclust import Clusterer
from deepclust.cli import main
from deepclust.errors import UserError
from deepclust.model import _digest, build_network
from tests.strangers import KINDS, Stranger, write

SPEC: dict[str, Any] = {
    "backbone": {"_target_": "deepclust.backbones.small_convnet", "width": 4},
    "head": {"_target_": "deepclust.heads.selflabel.SelfLabel"},
    "channels": 3,
    "size": 8,
    "num_clusters": 2,
    "clean": [],
    "view_size": [8, 8],
    "image_size": [8, 8],
    "mean": [0.5, 0.5, 0.5],
    "std": [0.25, 0.25, 0.25],
}


@pytest.fixture
def stranger(tmp_path: Path) -> Stranger:
    return Stranger(tmp_path)


def forged(path: Path, **changes: Any) -> Path:
    """A model file with any description, and the hash that belongs to it."""
    from safetensors.torch import save_file

    weights = build_network(SPEC["backbone"], SPEC["head"], SPEC).state_dict()
    spec = {
        key: value for key, value in {"format": 1, **SPEC, **changes}.items() if value is not ...
    }
    save_file(weights, path, {"deepclust": json.dumps({**spec, "sha256": _digest(spec, weights)})})
    return path


def refused(path: Path, trust: list[str] | None = None) -> str:
    """What is said of a model file, in one line that names it."""
    with pytest.raises(UserError) as error:
        Clusterer.load(path, trust=trust or ())
    text = str(error.value)
    assert "\n" not in text and str(path) in text
    return text


def hidden(node: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Descriptions that hold a node somewhere, by the place."""
    calibration = {"_target_": "deepclust.heads.calibration.Calibration"}
    convnet, head = SPEC["backbone"], SPEC["head"]
    return {
        "backbone": {"backbone": node},
        "head": {"head": node},
        "inner head": {"head": {**calibration, "inner": node}},
        "inner of inner": {"head": {**calibration, "inner": {**calibration, "inner": node}}},
        "inner with an unknown key beside": {"head": {**calibration, "inner": node, "zzz": 1}},
        "unknown key": {"backbone": {**convnet, "zzz": node}},
        "known key": {"backbone": {**convnet, "width": node}},
        "list": {"backbone": {**convnet, "freeze": [node]}},
        "list in a list": {"backbone": {**convnet, "freeze": [[node]]}},
        "mapping": {"head": {**head, "threshold": {"x": node}}},
        "_args_": {"head": {**head, "_args_": [node]}},
        "_partial_": {"head": {**node, "_partial_": True}},
        "_convert_": {"head": {**head, "_convert_": node, "_recursive_": True}},
        "clean": {"clean": [node]},
        "operation": {"clean": [{"resize": {"size": node}}]},
        "operations": {"clean": [{"random_ops": {"count": 1, "ops": [node]}}]},
        "number": {"num_clusters": node},
        "mean": {"mean": [node, 0.5, 0.5]},
        "more": {"more": node},
        "trust": {"trust": ["timm", "torchvision", "builtins"], "backbone": node},
        "no format": {"format": ..., "backbone": node},
        "old format": {"format": 0, "backbone": node},
    }


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_that_a_model_file_names_is_built(stranger: Stranger, kind: str):
    for place, changes in hidden(stranger.nodes()[kind]).items():
        file = forged(stranger.folder / "model.safetensors", **changes)
        refused(file)
        assert not stranger.canary.exists(), place


LOADER = """
import torch

def read(file: str):
    return torch.load(file, weights_only=False)
"""


@pytest.mark.parametrize("kind", ["unpickle", "unpack"])
def test_such_nodes_run_where_the_user_trusts_them(stranger: Stranger, kind: str, monkeypatch: Any):
    node = stranger.nodes()[kind]
    if kind == "unpickle":  # by a module of one's own: names with underscores are never built
        write(stranger.folder / "loader_of_mine.py", LOADER)
        monkeypatch.syspath_prepend(stranger.folder)
        node = {"_target_": "loader_of_mine.read", "file": node["checkpoint_path"]}
    file = forged(stranger.folder / "model.safetensors", backbone=node)
    refused(file)
    assert not stranger.canary.exists()
    refused(file, [node["_target_"].rpartition(".")[0]])
    assert stranger.canary.exists(), "else the other tests show nothing"


@pytest.mark.parametrize("kind", ["unpickle", "unpack", "open"])
def test_every_command_that_takes_a_model_refuses_it(stranger: Stranger, kind: str, capsys: Any):
    (stranger.folder / "run").mkdir()
    file = forged(stranger.folder / "real.safetensors", backbone=stranger.nodes()[kind])
    (stranger.folder / "run/model.safetensors").symlink_to(file)
    photos = stranger.folder / "photos"
    photos.mkdir()
    for number in range(4):
        Image.fromarray(np.full((8, 8, 3), 9 * number, np.uint8)).save(photos / f"{number}.png")
    out, store = str(stranger.folder / "c.csv"), str(stranger.folder / "store")
    for model in (stranger.folder / "run", file):
        for words in (
            ["predict", str(model), str(photos), "-o", out],
            ["features", str(photos), "--backbone", str(model), "--store", store],
            [
                "cluster",
                str(photos),
                "-k",
                "2",
                "--backbone",
                str(model),
                "--store",
                store,
                "-o",
                f"{out}d",
            ],
        ):
            assert main(words) == 2
            assert (
                "cannot be loaded by its own description: backbone._target_="
                in capsys.readouterr().err
            )
    assert not stranger.canary.exists()


def test_a_model_reads_no_file_and_fetches_nothing_that_it_names(
    stranger: Stranger, monkeypatch: Any
):
    import timm

    asked: list[dict[str, Any]] = []
    create = timm.create_model

    def create_model(name: str, **options: Any) -> Any:
        asked.append(options)
        return create(name, **options)

    node = {"_target_": "deepclust.backbones.timm_backbone", "name": "test_vit"}
    spec = {
        **SPEC,
        "backbone": node,
        "size": 160,
        "view_size": [160, 160],
        "image_size": [160, 160],
    }
    network = build_network(node, SPEC["head"], spec)
    Clusterer(network, spec).save(stranger.folder / "honest.safetensors")
    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr("torch.load", None)
    for sly in (
        {"weights": str(stranger.folder / "evil.pth")},
        {"pretrained": True},
        {"weights": "/etc/passwd"},
    ):
        Clusterer(network, {**spec, "backbone": {**node, **sly}}).save(
            stranger.folder / "sly.safetensors"
        )
        Clusterer.load(stranger.folder / "sly.safetensors")
    assert asked and not any(
        each.get("pretrained") or each.get("pretrained_cfg_overlay") for each in asked
    )
    for name in ("hf-hub:evil/model", "local-dir:/tmp", "test_vit.hf-hub:x/y", "../evil"):
        fake = forged(stranger.folder / "model.safetensors", backbone={**node, "name": name})
        assert name in refused(fake)
    assert not stranger.canary.exists()


WRONG: dict[str, list[Any]] = {
    "size": [..., None, 0, -1, 1.5, "8", True, 10**9, [8]],
    "channels": [..., 0, "3", 10**12],
    "num_clusters": [..., 0, -3, 2.0, 10**12],
    "image_size": [..., 8, [8], [8, 8, 8], [8, 0], [8, 10**9], "88"],
    "view_size": [..., 0, [8, "8"], [10**9, 8]],
    "mean": [..., 0.5, [], [0.5, 0.5], ["a", 1, 1], [float("nan"), 0, 0], None],
    "std": [..., [0.0, 1.0, 1.0], [1.0], [-1.0, 1.0, 1.0], [float("inf"), 1.0, 1.0]],
    "clean": [
        ...,
        None,
        "resize",
        [[]],
        [{"system": {}}],
        [{"resize": {"size": -1}}],
        [{"gaussian_blur": {"kernel": 2}}],
    ],
    "backbone": [..., None, [], {}, "identity", {"_target_": "deepclust.heads.scan.SCAN"}],
    "head": [
        ...,
        None,
        {"_target_": "deepclust.backbones.identity"},
        {"_target_": "torch.nn.Identity"},
    ],
    "format": ["1", 99, 1.0, None, [1]],
}


@pytest.mark.parametrize("key", WRONG)
def test_the_description_is_checked_as_a_whole(tmp_path: Path, key: str):
    for value in WRONG[key]:
        said = refused(forged(tmp_path / "model.safetensors", **{key: value}))
        assert key == "format" or key in said or "_target_" in said, (value, said)


HUGE = {
    "anchors": {"head": {"_target_": "deepclust.heads.readout.Votes", "num_anchors": 10**12}},
    "components": {"head": {"_target_": "deepclust.heads.readout.Votes", "num_components": 10**15}},
    "beyond 64 bits": {
        "head": {"_target_": "deepclust.heads.readout.Votes", "num_anchors": 10**30}
    },
    "width": {"backbone": {"_target_": "deepclust.backbones.small_convnet", "width": 10**9}},
    "many modules": {"head": {"_target_": "deepclust.heads.scan.SCAN", "num_heads": 10**9}},
    "queue of training": {"head": {"_target_": "deepclust.heads.moco.MoCo", "queue_size": 10**12}},
    "clusters": {"num_clusters": 999_999},
    "giant network": {
        "backbone": {
            "_target_": "deepclust.backbones.timm_backbone",
            "name": "vit_giant_patch14_224",
        }
    },
    "views": {"clean": [{"resize": {"size": 8000, "ratio": 8000}}]},
    "draws": {"clean": [{"random_ops": {"count": 10**9, "ops": [{"gamma": {}}]}}]},
    "another network": {"backbone": {"_target_": "deepclust.backbones.cifar_resnet"}},
}


@pytest.mark.parametrize("what", HUGE)
def test_sizes_that_the_tensors_do_not_have_take_no_memory(tmp_path: Path, what: str):
    file = forged(tmp_path / "model.safetensors", **HUGE[what])
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    refused(file)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000, "kilobytes"
    assert time.monotonic() - began < 30, "it would never end"


def test_a_description_that_is_nested_without_end_is_refused(tmp_path: Path):
    head: Any = SPEC["head"]
    for _ in range(400):
        head = {"_target_": "deepclust.heads.calibration.Calibration", "inner": head}
    refused(forged(tmp_path / "model.safetensors", head=head))


def test_honest_models_of_every_kind_load(tmp_path: Path):
    calibration = {
        "_target_": "deepclust.heads.calibration.Calibration",
        "inner": SPEC["head"],
        "mini_clusters": 3,
    }
    votes = {"_target_": "deepclust.heads.readout.Votes", "num_anchors": 7, "num_components": 5}
    for head in (
        SPEC["head"],
        calibration,
        votes,
        {"_target_": "deepclust.heads.readout.KMeansHead"},
    ):
        spec = {**SPEC, "head": head}
        model = Clusterer(build_network(spec["backbone"], head, spec), spec)
        model.save(tmp_path / "model.safetensors")
        again = Clusterer.load(tmp_path / "model.safetensors")
        found, wanted = again.network.state_dict(), model.network.state_dict()
        assert again.spec == spec and all(torch.equal(found[name], wanted[name]) for name in found)
