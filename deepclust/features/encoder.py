"""Backbones that feed a feature store: a timm model, a trained model of ours, or a network of the
user's own making.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from deepclust.backbones import Backbone, Preprocess, timm_backbone
from deepclust.data.store import StoredBackbone
from deepclust.data.views.transform import ViewTransform
from deepclust.errors import UserError
from deepclust.ops.precision import autocast, autocast_dtype
from deepclust.runtime.checkpoint import digest_state
from deepclust.runtime.devices import choose_device
from deepclust.runtime.own_code import Code, load_function, read_code, recorded_code, uninstalled

RESIZING = "shorter side to `size`, antialiased bicubic; centre crop"
MAX_SIDE = 8192
"""Pixels of a side that a store may ask for."""
LABEL_FREE = r"(dino|mae|fcmae|mim|lvd142m|lvd1689m|sat493m)(_|$)"
LABELLED = r"(^|_)(in1k|in12k|in21k|in22k|inat21|jft)(_|$)"
"""How timm's tags of pretrainings without labels begin, and what those with labels hold, besides
`ft`: fine-tuned.
"""


class NoWeights(UserError):
    """Pretrained weights that cannot be had here."""


@dataclass
class Encoder:
    """Images in, features out. model: its name for people; net: (B, C, H, W) views to (B, D).

    view: (B, C, side, side) uint8 pixels to what `net` is fed. channels, side: of those pixels.
    precision: as a trainer's (`auto`, `float32`, `bfloat16`). identity: what it is, plain JSON; its
    `made_by` tells what `find_encoder` was asked for, with absolute paths and, of FILE.py, the
    SHA-256 of its `code`. note: what is to be said about it.
    """

    model: str
    net: nn.Module
    num_features: int
    channels: int
    side: int
    view: ViewTransform
    identity: dict[str, Any]
    precision: str = "auto"
    note: str = ""
    device: torch.device = field(default_factory=lambda: choose_device("auto"))

    def stored(self, dtype: str) -> StoredBackbone:
        """What a store is told. Its name there holds a digest: other weights, sizes or dtypes lie
        beside these.
        """
        what = {key: self.identity[key] for key in ("model", "weights", "preprocess")}
        digest = hashlib.sha256(
            json.dumps({**what, "dtype": dtype}, sort_keys=True).encode()
        ).hexdigest()[:8]
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", self.model).strip(".-")[:80] or "model"
        return StoredBackbone(f"{name}-{digest}", self.num_features, dtype, self.identity)

    def begin(self, precision: str) -> None:
        """Gets ready to compute in a precision; a `precision` of its own goes before `auto`."""
        self.net = self.net.to(self.device, memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
        self.autocast = autocast_dtype(precision, self.device)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        """(B, C, side, side) uint8 to (B, D) float32 on the CPU."""
        keys = torch.zeros(len(pixels), dtype=torch.int64)
        views = self.view.batch(pixels.to(self.device), keys).contiguous(
            memory_format=torch.channels_last
        )
        with autocast(self.device, self.autocast):
            return self.net(views).flatten(1).float().cpu()


def precision_of(encoder: Encoder) -> str:
    """float32, bfloat16 or float16: what `auto` means here."""
    dtype = autocast_dtype(encoder.precision, encoder.device)
    return "float32" if dtype is None else str(dtype).removeprefix("torch.")


def find_encoder(
    name: str, weights: str | None = None, size: int | None = None, code: Code | None = None
) -> Encoder:
    """The encoder that `--backbone NAME` means. size: side in pixels of what a network is fed; None
    for its own.

    name: a run folder or its model.safetensors; FILE.py:FUNCTION or MODULE:FUNCTION, a function
    without arguments that gives a torch module; or a timm model. weights: a local file for the
    latter. code: what FILE.py:FUNCTION runs, where a store named it; None: the user did, and it is
    remembered for them. Raises UserError for what is none of these, NoWeights where weights cannot
    be had.
    """
    path = Path(name)
    is_ours = (
        path.suffix == ".safetensors"
        or (path / "model.safetensors").is_file()
        or ("/" in name and path.is_dir())
    )
    if name.endswith(".py"):
        raise UserError(
            f"--backbone {name}: give the function too, as in --backbone {name}:FUNCTION"
        )
    recorded = code is not None
    if not is_ours and ":" not in name:
        encoder = timm_encoder(name, weights, size)
    elif weights is not None:
        raise UserError(
            f"--weights {weights}: {name} has weights of its own; --weights goes with a timm model"
        )
    elif is_ours:
        encoder, name = own_encoder(name, size), os.path.abspath(name)
    else:
        code = code or _named_code(name)
        encoder = module_encoder(name, size, code)
    made_by = {
        "name": name,
        "weights": weights and os.path.abspath(os.path.expanduser(weights)),
        "size": size,
    }
    if code is not None:
        made_by |= {"name": code.name, "code": code.digest}
        if not recorded:
            code.remember()
    encoder.identity["made_by"] = made_by
    return encoder


def _named_code(name: str) -> Code | None:
    """The code of FILE.py:FUNCTION, None for MODULE:FUNCTION."""
    if not name.rpartition(":")[0].endswith(".py"):
        return None
    try:
        return read_code(name)
    except OSError as error:
        raise UserError(
            f"--backbone {name}: {error}; expected FILE.py:FUNCTION or MODULE:FUNCTION"
        ) from error


def rebuild(
    stored: StoredBackbone,
    name: str | None = None,
    weights: str | None = None,
    trust: Sequence[str] = (),
) -> Encoder:
    """The encoder that made features which a store holds, ready for images that were not in it.

    stored: what the store knows of it. name, weights: where to find it now, as for `find_encoder`;
    by default where it was then. trust: each FILE.py whose code may run although the user never
    named it. Raises UserError where it cannot be had, or is another one (other weights or another
    way of feeding it), NotTrusted where the store names code that this user has not run by name.
    """
    made_by = stored.identity.get("made_by")
    then: dict[str, Any] = made_by if isinstance(made_by, dict) else {}
    asked = str(name or then.get("name") or stored.identity.get("model"))
    code = recorded_code(asked, then.get("code"), trust) if name is None and ":" in asked else None
    if weights is None and name is None and then.get("weights"):
        weights = str(then["weights"])
        if Path(weights).exists() and not Path(weights).is_file():
            raise UserError(
                f"{weights}, which is to hold the weights of these features, is no file"
            )
    fed = stored.identity.get("preprocess")
    size = then.get("size", fed.get("size") if isinstance(fed, dict) else None)
    if size is not None and not (isinstance(size, int) and 1 <= size <= MAX_SIDE):
        raise UserError(f"the features are of images of {_short(size)} px, which cannot be")
    encoder = find_encoder(asked, weights, size, code)
    for key, what in (
        ("weights", "other weights (SHA-256)"),
        ("preprocess", "images fed in another way"),
    ):
        if encoder.identity[key] != stored.identity.get(key):
            found, was = (_short(each.get(key)) for each in (encoder.identity, stored.identity))
            raise UserError(
                f"{asked} has {what} than what made these features: {found} and not {was}"
            )
    return encoder


def _short(value: Any) -> str:
    return f"{value[:12]}…" if isinstance(value, str) else json.dumps(value)


def timm_encoder(name: str, weights: str | None, size: int | None) -> Encoder:
    """A timm model with its pretrained weights, or with those of a local file."""
    try:
        backbone = timm_backbone(
            3, name=name, pretrained=weights is None, weights=weights, image_size=size
        )
    except UserError as error:
        text = (
            str(error)
            .replace("backbone.name=", "--backbone ")
            .replace("backbone.name", "--backbone NAME")
        )
        text = text.replace("backbone.weights=", "--weights ")
        if "could not be loaded" in text and weights is None:
            why = text.partition("(")[2].rpartition(")")[0] or text
            raise NoWeights(f"pretrained weights of {name} cannot be had here: {why}") from error
        raise UserError(text) from error
    config: dict[str, Any] = getattr(backbone.body, "pretrained_cfg", {})
    told: dict[str, Any] = (
        {"trained_with_labels": None, "source": Path(weights).name} if weights else {}
    )
    if not weights:
        tag = str(config.get("tag", ""))
        told = {
            "trained_with_labels": saw_labels(tag),
            "source": str(config.get("hf_hub_id") or config.get("url")),
        }
    backbone.note = backbone.note.replace("backbone.weights=", "--weights ")
    return _of_backbone(name, backbone, told)


def saw_labels(tag: str) -> bool | None:
    """Whether the pretraining that timm calls `tag` used labels; None where its name does not
    say."""
    if "_ft_" in tag:
        return True
    if re.match(LABEL_FREE, tag):
        return False
    return True if re.search(LABELLED, tag) else None


def module_encoder(name: str, size: int | None, code: Code | None = None) -> Encoder:
    """A module that a function of the user's gives; `preprocess` and `trained_with_labels` are read
    off it if there.
    """
    try:
        net = load_function(name, "--backbone", code)()
    except ModuleNotFoundError as error:
        raise UserError(uninstalled(name, "--backbone", error)) from error
    if not isinstance(net, nn.Module):
        raise UserError(
            f"--backbone {name}: the function gives {type(net).__name__}; expected a torch module"
        )
    preprocess = getattr(net, "preprocess", None) or Preprocess(
        224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    )
    side = size or preprocess.size or 224
    with torch.inference_mode():
        dim = net.eval()(torch.zeros(1, 3, side, side)).flatten(1).shape[1]
    backbone = net if isinstance(net, Backbone) else Backbone(net, dim)
    backbone.preprocess = dataclasses.replace(preprocess, size=side)
    told = {
        "trained_with_labels": getattr(net, "trained_with_labels", None),
        "source": name.partition(":")[0],
    }
    return _of_backbone(name.rpartition(":")[2], backbone, told)


def own_encoder(path: str, size: int | None = None) -> Encoder:
    """The backbone of a trained model: exactly what its `transform` gives, in float32."""
    from deepclust.model import Clusterer

    clusterer = Clusterer.load(path)
    spec = clusterer.spec
    if size is not None:
        raise UserError(
            f"--size {size}: a trained model has a size of its own ({spec['view_size']}); leave"
            " it out"
        )
    if max(spec["image_size"]) == 1:
        raise UserError(f"--backbone {path} is a model of features; give one of images")
    net, folder = clusterer.network.backbone, Path(path).absolute()
    pretrained = bool(spec["backbone"].get("pretrained") or spec["backbone"].get("weights"))
    identity = {
        "model": folder.name if folder.is_dir() else folder.parent.name,
        "weights": weights_digest(net),
        "preprocess": {
            key: spec[key]
            for key in ("image_size", "view_size", "mean", "std", "clean", "channels")
        },
        "trained_with_labels": None if pretrained else False,
        "source": spec["backbone"]["_target_"],
    }
    dim, side = getattr(net, "num_features"), max(spec["image_size"])  # noqa: B009
    return Encoder(
        identity["model"], net, dim, spec["channels"], side, clusterer.view, identity, "float32"
    )


def _of_backbone(model: str, backbone: Backbone, told: dict[str, Any]) -> Encoder:
    """A backbone that is fed colour images of its own size."""
    own = backbone.preprocess
    assert own is not None and own.size is not None
    fed = {"size": own.size, "mean": list(own.mean), "std": list(own.std), "resize": RESIZING}
    identity = {"model": model, "weights": weights_digest(backbone.body), "preprocess": fed, **told}
    view = ViewTransform([], own.size, own.mean, own.std)
    return Encoder(
        model, backbone, backbone.num_features, 3, own.size, view, identity, note=backbone.note
    )


def weights_digest(net: nn.Module) -> str:
    """SHA-256 of a network's parameters and buffers, names included."""
    return digest_state({"model": dict(net.state_dict())})["model"]
