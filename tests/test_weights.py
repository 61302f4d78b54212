"""Weights of a file: the network is found wherever it lies, whole, or refused in words; nothing of
it stays random.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

from deepclust.backbones import timm_backbone
from deepclust.errors import UserError
from deepclust.features.encoder import find_encoder
from deepclust.weights import read_weights

NAME = "test_vit"
State = dict[str, Tensor]


def state_of(seed: int, name: str = NAME, **options: Any) -> State:
    torch.manual_seed(seed)
    state = timm.create_model(name, num_classes=0, **options).state_dict()
    return {
        key: torch.randn_like(value) if value.is_floating_point() else value
        for key, value in state.items()
    }


def below(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def load(path: Path, content: Any, name: str = NAME, channels: int = 3) -> Any:
    torch.save(content, path)
    torch.manual_seed(99)
    return timm_backbone(channels, name=name, weights=str(path))


def same(backbone: Any, state: State) -> bool:
    return all(torch.equal(value, state[key]) for key, value in backbone.body.state_dict().items())


def layouts(state: State) -> dict[str, Any]:
    """The network as training scripts leave it."""
    half = len(state) // 2
    mixed = {
        f"module.{key}" if index < half else key: value
        for index, (key, value) in enumerate(state.items())
    }
    compiled = {
        key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in state.items()
    }
    return {
        "plain": state,
        "net": {"net": state, "epoch": 3, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        "ema": {"ema": state, "args": argparse.Namespace(lr=0.1)},
        "encoder": {"encoder": state},
        "teacher": {"teacher": below("backbone.", state), "best": 0.5},
        "model_ema": {"model_ema": below("module.", state)},
        "state_dict inside model": {"model": {"state_dict": state}},
        "module.": {"state_dict": below("module.", state)},
        "_orig_mod.": below("_orig_mod.", state),
        "module._orig_mod.backbone.": {"model": below("module._orig_mod.backbone.", state)},
        "encoder_q.": {"state_dict": below("encoder_q.", state)},
        "target_encoder": {
            "target_encoder": below("module.", state),
            "predictor": {"module.norm.weight": torch.ones(4)},
        },
        "mixed": mixed,
        "compiled blocks": {"model": compiled},
        "projection beside it": {
            **state,
            "projection_head.0.weight": torch.ones(4, 4),
            "mask_token": torch.ones(4),
        },
    }


@pytest.mark.parametrize("layout", list(layouts({})))
def test_the_network_is_found_wherever_a_training_script_left_it(
    tmp_path: Path, layout: str
) -> None:
    state = state_of(0)
    backbone = load(tmp_path / "w.pth", layouts(state)[layout])
    assert same(backbone, state)
    assert re.search(r"77 of 77|78 of 78", backbone.note) and "w.pth" in backbone.note


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("student/backbone.", "teacher/backbone."),
        ("model/", "model_ema/module."),
        ("online_network.", "target_network."),
        ("encoder.", "target_encoder."),
        ("", "ema."),
        ("state_dict/", "state_dict_ema/"),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_of_several_networks_the_averaged_one_is_taken_and_both_are_named(
    tmp_path: Path, first: str, second: str, turned: bool
) -> None:
    one, average = state_of(0), state_of(1)
    parts = [(first, one), (second, average)]
    content: dict[str, Any] = {}
    for place, state in reversed(parts) if turned else parts:
        outer, slash, inner = place.rpartition("/")
        if slash:
            content[outer] = below(inner, state)
        else:
            content |= below(inner, state)
    backbone = load(tmp_path / "w.pth", content)
    assert same(backbone, average)
    assert f"found under {second}" in backbone.note
    assert f"not used: the same {f'under {first}' if first else 'at the top'}" in backbone.note


def test_safetensors_are_known_by_content_and_home_is_expanded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(0)
    save_file(below("backbone.", state), tmp_path / "weights.bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert same(timm_backbone(3, name=NAME, weights="~/weights.bin"), state)


def test_weights_of_another_network_are_refused_with_what_differs(tmp_path: Path) -> None:
    path, state = tmp_path / "w.pth", state_of(0)
    deep = {
        **state,
        **{key.replace("blocks.1.", "blocks.9."): value for key, value in state.items()},
    }
    thin = {key: value for key, value in state.items() if not key.startswith("blocks.1.")}
    wide = {**state, "norm.weight": torch.ones(65)}
    other = {f"layer{index}.weight": torch.ones(2) for index in range(9)}
    cases = [
        (
            deep,
            r"78 of 78 tensors found at the top; not of this network: blocks\.9\.\S+, \S+, \S+ and \d+ more",
        ),
        (
            thin,
            r"66 of 78 tensors found at the top; missing: blocks\.1\.norm1\.weight, \S+, \S+ and 9 more",
        ),
        ({"net": thin}, r"66 of 78 tensors found under net/; missing"),
        (wide, r"of another shape: norm\.weight \(65,\) in the file and \(64,\) in the network"),
        ({**state, "norm_pre.weight": torch.ones(64)}, r"not of this network: norm_pre\.weight"),
        (other, r"None of its 78 tensors .* is there; the file holds layer0\.weight"),
        ({"epoch": 3}, "it holds no tensors by name"),
        ([1, 2], "it holds no tensors by name"),
    ]
    for content, words in cases:
        with pytest.raises(UserError, match=words) as refused:
            load(path, content)
        assert str(refused.value).startswith(f"backbone.weights={path} could not be loaded")
    with pytest.raises(
        UserError, match=r"^--weights .*w\.pth.*could not be loaded.*Give the --backbone NAME"
    ):
        torch.save(thin, path)
        find_encoder(NAME, str(path))


def test_of_two_parts_the_one_that_is_whole_is_taken(tmp_path: Path) -> None:
    state = state_of(0)
    broken = {**state_of(1), "norm.weight": torch.ones(65)}
    backbone = load(tmp_path / "w.pth", {"teacher": broken, "student": state})
    assert same(backbone, state) and "found under student/" in backbone.note


def test_position_embeddings_of_another_size_are_resized_as_timm_does(tmp_path: Path) -> None:
    from timm.layers.pos_embed import resample_abs_pos_embed

    state = state_of(0, img_size=96)
    backbone = load(tmp_path / "w.pth", {"teacher": below("module.", state)})
    wanted = resample_abs_pos_embed(state["pos_embed"], [10, 10], [6, 6], num_prefix_tokens=1)
    own = backbone.body.state_dict()
    torch.testing.assert_close(own.pop("pos_embed"), wanted)
    assert all(torch.equal(value, state[key]) for key, value in own.items())


@pytest.mark.parametrize("channels", [1, 2])
def test_the_first_layer_is_fitted_to_the_channels(tmp_path: Path, channels: int) -> None:
    from timm.models import adapt_input_conv

    state = state_of(0)
    backbone = load(tmp_path / "w.pth", {"net": state}, channels=channels)
    wanted = adapt_input_conv(channels, state["patch_embed.proj.weight"])
    torch.testing.assert_close(backbone.body.state_dict()["patch_embed.proj.weight"], wanted)


def original_convnext(state: State) -> State:
    """A ConvNeXt by the names of its authors' code: timm's conversion read backwards."""
    names = [
        (r"^stem\.", "downsample_layers.0."),
        (r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1."),
        (r"^stages\.(\d)\.blocks\.", r"stages.\1."),
        (r"\.conv_dw\.", ".dwconv."),
        (r"\.mlp\.fc(\d)\.", r".pwconv\1."),
        (r"^head\.norm\.", "norm."),
    ]
    renamed = {}
    for key, value in state.items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        renamed[key] = value
    return renamed


@pytest.mark.parametrize("where", ["model", "teacher"])
def test_names_of_the_authors_are_converted_as_timm_does_and_must_cover_all(
    tmp_path: Path, where: str
) -> None:
    state = state_of(0, "test_convnext")
    theirs = {
        **original_convnext(state),
        "head.weight": torch.ones(1000, 64),
        "head.bias": torch.ones(1000),
    }
    backbone = load(
        tmp_path / "w.pth", {where: theirs, "args": argparse.Namespace()}, "test_convnext"
    )
    assert same(backbone, state) and "names converted" in backbone.note
    lacking = {key: value for key, value in theirs.items() if not key.startswith("stages.2.0.")}
    with pytest.raises(UserError, match=r"missing: stages\.2\.blocks\.0"):
        load(tmp_path / "w.pth", {where: lacking}, "test_convnext")


def test_what_timms_own_weights_lack_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the hub, whose file has no last norm: timm loads it without a word."""
    state, usual = state_of(0), timm.create_model
    del state["norm.bias"]

    def create(name: str, pretrained: bool = False, **options: Any) -> Any:
        more: dict[str, Any] = (
            {"pretrained_cfg_overlay": {"state_dict": state}} if pretrained else {}
        )
        return usual(name, pretrained=pretrained, **options, **more)

    monkeypatch.setattr(timm, "create_model", create)
    backbone = timm_backbone(3, name=NAME, pretrained=True)
    assert (
        backbone.note == "timm's weights of test_vit lack norm.bias, which stay as they were drawn"
    )
    state["norm.bias"] = torch.zeros(64)
    assert timm_backbone(3, name=NAME, pretrained=True).note == ""


def test_objects_in_a_file_are_refused_by_name_and_never_built(tmp_path: Path) -> None:
    torch.save({"state_dict": state_of(0), "where": tmp_path}, tmp_path / "w.pth")
    with pytest.raises(
        UserError,
        match=r"could not be loaded \(it holds Python objects, pathlib\S*, which are never",
    ):
        read_weights(str(tmp_path / "w.pth"))
