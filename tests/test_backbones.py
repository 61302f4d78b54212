"""Backbones: sizes, timm by name and from a local file, freezing by part."""

from __future__ import annotations

import pytest
import torch
import torchvision
from safetensors.torch import save_file

from deepclust.backbones import Sobel, cifar_resnet, classic_net, small_convnet, timm_backbone
from deepclust.errors import UserError


@pytest.mark.parametrize("size", [8, 12, 16, 28, 32, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_small_nets_take_small_images(size, channels):
    net = small_convnet(channels, size, width=8)
    assert net(torch.randn(2, channels, size, size)).shape == (2, net.num_features)
    assert net.training


@pytest.mark.parametrize("depth", [18, 34])
def test_resnets_keep_the_resolution_of_small_images(depth):
    net = cifar_resnet(3, depth=depth)
    assert net(torch.randn(2, 3, 32, 32)).shape == (2, 512) == (2, net.num_features)
    stem = net.body.conv1(torch.randn(1, 3, 32, 32))
    assert net.body.maxpool(stem).shape[-1] == 32
    reference = torchvision.models.get_model(f"resnet{depth}")
    own = {name: value.shape for name, value in net.body.state_dict().items()}
    theirs = {
        name: value.shape
        for name, value in reference.state_dict().items()
        if not name.startswith("fc.")
    }
    assert {name for name in theirs if own[name] != theirs[name]} == {"conv1.weight"}


def test_timm_models_by_name_and_weights_from_a_local_file(tmp_path):
    torch.manual_seed(0)
    first = timm_backbone(3, name="resnet10t")
    assert first.preprocess is None
    assert first(torch.randn(2, 3, 64, 64)).shape == (2, first.num_features)
    import timm

    whole = timm.create_model("resnet10t", pretrained=False)
    save_file(
        {name: value.contiguous() for name, value in whole.state_dict().items()},
        tmp_path / "weights.safetensors",
    )
    loaded = timm_backbone(3, name="resnet10t", weights=str(tmp_path / "weights.safetensors"))
    assert (
        loaded.preprocess is not None
        and len(loaded.preprocess.mean) == 3
        and loaded.preprocess.size
    )
    for name, value in loaded.body.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name]), name
    grey = timm_backbone(1, name="resnet10t", weights=str(tmp_path / "weights.safetensors"))
    assert grey.preprocess is not None and len(grey.preprocess.mean) == 1
    assert grey(torch.randn(1, 1, 64, 64)).shape == (1, grey.num_features)


def test_what_timm_does_not_know_is_named_with_what_is_near(tmp_path):
    with pytest.raises(UserError, match=r"resnet10x.*nearest.*resnet10t"):
        timm_backbone(3, name="resnet10x")
    with pytest.raises(UserError, match=r"backbone\.weights=.*missing"):
        timm_backbone(3, name="resnet10t", weights=str(tmp_path / "missing.safetensors"))
    (tmp_path / "bad.pth").write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match=r"backbone\.weights="):
        timm_backbone(3, name="resnet10t", weights=str(tmp_path / "bad.pth"))


def test_a_pickle_with_code_is_not_run(tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"conv1.weight": Evil()}))
    with pytest.raises(UserError):
        timm_backbone(3, name="resnet10t", weights=str(tmp_path / "evil.pth"))
    assert not (tmp_path / "canary").exists()


def test_freezing_by_part():
    net = cifar_resnet(3, freeze=["conv1", "layer1"])
    frozen = {
        name.split(".")[0] for name, value in net.body.named_parameters() if not value.requires_grad
    }
    assert frozen == {"conv1", "layer1"}
    assert not any(value.requires_grad for value in cifar_resnet(3, freeze=[""]).parameters())
    with pytest.raises(UserError, match=r"layer9.*layer4"):
        cifar_resnet(3, freeze=["layer9"])


@pytest.mark.parametrize("size", [8, 12, 28, 32, 64])
def test_small_nets_give_as_many_features_for_smaller_crops(size):
    """What comes out at the nominal size is the 2x2 average of the last map, to the bit."""
    import torch.nn.functional as F

    torch.manual_seed(0)
    net = small_convnet(1, size, width=8).eval()
    for side in (size // 2, size * 3 // 4, size - 1, size + 3, 3):
        assert net(torch.randn(2, 1, side, side)).shape == (2, net.num_features)
    images = torch.randn(2, 1, size, size)
    expected = F.avg_pool2d(net.body[:-1](images), 2, ceil_mode=True).flatten(1)
    assert torch.equal(net(images), expected)


def test_resnets_and_pooled_timm_models_take_crops_of_any_size():
    for net in (cifar_resnet(3), timm_backbone(3, name="resnet10t")):
        for side in (32, 18):
            assert net(torch.randn(1, 3, side, side).repeat(2, 1, 1, 1)).shape == (
                2,
                net.num_features,
            )


def moco_checkpoint(path, net, **more):
    """A file as MoCo's code writes it: the query encoder below its prefix, its projection head in
    place of fc.
    """
    state = {
        f"module.encoder_q.{key}": value
        for key, value in net.state_dict().items()
        if not key.startswith("fc.")
    }
    head = {
        f"module.encoder_q.fc.{layer}.{kind}": torch.zeros(3)
        for layer in (0, 2)
        for kind in ("weight", "bias")
    }
    torch.save({"epoch": 800, "arch": "resnet18", "state_dict": {**state, **head, **more}}, path)
    return state


def test_a_moco_checkpoint_loads_whole_and_says_so(tmp_path):
    torch.manual_seed(0)
    net, path = torchvision.models.resnet18().eval(), tmp_path / "moco.pth.tar"
    net.fc = torch.nn.Identity()
    state = moco_checkpoint(path, net)
    backbone = timm_backbone(3, name="resnet18", weights=str(path)).eval()
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), net(images))
    wanted = len([key for key in state if "num_batches" not in key])
    assert f"{wanted} of {wanted} tensors found under state_dict/module.encoder_q." in backbone.note
    assert "left out: fc.0.bias fc.0.weight fc.2.bias fc.2.weight" in backbone.note
    with torch.no_grad():
        assert timm_backbone(1, name="resnet18", weights=str(path))(images[:, :1]).shape == (2, 512)
    moco_checkpoint(path, net, **{"module.encoder_q.layer5.0.conv1.weight": torch.zeros(3)})
    with pytest.raises(
        UserError, match=r"100 of 100 tensors .* not of this network: layer5\.0\.conv1\.weight"
    ):
        timm_backbone(3, name="resnet18", weights=str(path))
    with pytest.raises(UserError, match=r"100 of 180 tensors .*missing: layer1\.2\.conv1\.weight"):
        timm_backbone(3, name="resnet34", weights=str(path))


def test_sobel_filters_are_those_of_scipy():
    ndimage = pytest.importorskip("scipy.ndimage")
    torch.manual_seed(0)
    images = torch.randn(2, 3, 9, 11)
    edges = Sobel()(images)
    assert edges.shape == (2, 2, 9, 11) and not list(Sobel().parameters())
    for image, (across, down) in zip(images.double().mean(1), edges):
        for axis, ours in ((1, across), (0, down)):
            theirs = ndimage.sobel(image.numpy(), axis=axis, mode="constant")
            torch.testing.assert_close(
                ours.double(), -torch.from_numpy(theirs), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize("channels", [1, 3])
def test_nets_on_edges_see_no_colour(channels):
    """The filter is in the model and has no weights of its own; which colour is which does not
    matter.
    """
    for net in (
        cifar_resnet(channels, sobel=True),
        timm_backbone(channels, name="resnet10t", sobel=True),
    ):
        assert net.eval()(torch.randn(2, channels, 32, 32)).shape == (2, net.num_features)
        assert not any(name.startswith("edges") for name in net.state_dict())
    images = torch.randn(2, 3, 8, 8)
    swapped = images[:, [2, 0, 1]]
    torch.testing.assert_close(Sobel()(images), Sobel()(swapped))


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_classic_nets_are_torchvisions_up_to_their_top(name):
    import torchvision

    with torch.device("meta"):
        net = classic_net(3, name=name, sobel=False)
        theirs = torchvision.models.get_model("vgg16_bn" if name == "vgg16" else "alexnet")
    own = [tuple(p.shape) for p in net.parameters() if p.ndim > 1]
    assert own[-2:] == [(4096, 256 * 36 if name == "alexnet" else 512 * 49), (4096, 4096)]
    if name == "vgg16":
        assert own == [tuple(p.shape) for p in theirs.parameters() if p.ndim > 1][:-1]
    small = classic_net(3, name=name, width=16)
    assert small.eval()(torch.randn(2, 3, 96, 96)).shape == (2, 16)


@pytest.mark.parametrize("name", ["alexnet", "vgg16"])
def test_classic_nets_may_end_after_their_last_relu(name):
    found = []
    for relu in (False, True):
        torch.manual_seed(0)
        net = classic_net(3, name=name, width=16, relu=relu).eval()
        found.append(net(torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))))
    assert (found[0] < 0).any() and torch.equal(found[1], found[0].relu())


@pytest.mark.parametrize("reached", [True, False])
def test_a_hub_out_of_reach_is_not_asked_again_and_again(
    monkeypatch: pytest.MonkeyPatch, reached: bool
) -> None:
    from contextlib import nullcontext

    from huggingface_hub import constants

    from deepclust import backbones

    class Connection(nullcontext[None]):
        def close(self) -> None: ...

    def connect(*_: object, **__: object) -> Connection:
        if not reached:
            raise OSError("no network")
        return Connection()

    monkeypatch.setattr(backbones.socket, "create_connection", connect)
    monkeypatch.setattr(backbones, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with backbones._hub():
        assert constants.HF_HUB_OFFLINE is not reached
    assert not constants.HF_HUB_OFFLINE
