"""What `_target_` may name: a list, and what the user trusts on the command line.

Configurations and model files are written by anybody, so a name in one of them is a wish. A whole
package is no boundary: torchvision downloads and unpacks files, timm unpickles them. So the list
names constructors that take numbers and words, one by one, and no factory of a library:
`timm_backbone` builds timm's networks, from a checked name. Importing this imports no torch.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable, Sequence
from typing import Any

from deepclust.config.sources import TargetError
from deepclust.errors import near

HEADS = (
    "deepclust.heads.calibration.Calibration",
    "deepclust.heads.deepcluster.DeepCluster",
    "deepclust.heads.deepcluster_v2.DeepClusterV2",
    "deepclust.heads.readout.KMeansHead",
    "deepclust.heads.moco.MoCo",
    "deepclust.heads.neighbor_prototypes.NeighborPrototypes",
    "deepclust.heads.odc.ODC",
    "deepclust.heads.p2ot.P2OT",
    "deepclust.heads.scan.SCAN",
    "deepclust.heads.sela.SeLa",
    "deepclust.heads.selflabel.SelfLabel",
    "deepclust.heads.simclr.SimCLR",
    "deepclust.heads.sp2ot.SP2OT",
    "deepclust.heads.swav.SwAV",
    "deepclust.heads.temi.TEMI",
    "deepclust.heads.readout.Votes",
)
BACKBONES = (
    "deepclust.backbones.cifar_resnet",
    "deepclust.backbones.classic_net",
    "deepclust.backbones.identity",
    "deepclust.backbones.small_convnet",
    "deepclust.backbones.timm_backbone",
)
DATA = (
    "deepclust.data.datasets.arrays",
    "deepclust.data.datasets.cifar10",
    "deepclust.data.datasets.cifar100",
    "deepclust.data.datasets.cifar20",
    "deepclust.data.datasets.digits",
    "deepclust.data.datasets.fashion_mnist",
    "deepclust.data.datasets.image_folder",
    "deepclust.data.datasets.image_list",
    "deepclust.data.datasets.stl10",
    "deepclust.data.features.features",
    "deepclust.data.imagenet.imagenet",
    "deepclust.data.imagenet.tiny_imagenet",
)
LAYERS = (
    "torch.nn.AdaptiveAvgPool2d",
    "torch.nn.AdaptiveMaxPool2d",
    "torch.nn.AvgPool2d",
    "torch.nn.BatchNorm1d",
    "torch.nn.BatchNorm2d",
    "torch.nn.Conv2d",
    "torch.nn.Dropout",
    "torch.nn.ELU",
    "torch.nn.Flatten",
    "torch.nn.GELU",
    "torch.nn.GroupNorm",
    "torch.nn.Identity",
    "torch.nn.LayerNorm",
    "torch.nn.LeakyReLU",
    "torch.nn.Linear",
    "torch.nn.MaxPool2d",
    "torch.nn.ReLU",
    "torch.nn.SELU",
    "torch.nn.SiLU",
    "torch.nn.Sigmoid",
    "torch.nn.Softmax",
    "torch.nn.Softplus",
    "torch.nn.Tanh",
)
"""Modules whose constructors take numbers and words alone: for heads of one's own that want one."""

SECTIONS = {"head": HEADS, "backbone": BACKBONES, "data": DATA, "layer": LAYERS}
ANNOTATIONS = {"Head": "head", "Module": "layer"}
"""Annotations of parameters that take a nested object, and what that may be."""
NAME = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)


def check_target(target: Any, section: str | None, trust: Sequence[str] = ()) -> str:
    """The name itself, if it may be built there. Nothing is imported or looked for.

    section: `head`, `backbone`, `data` or `layer`; None for any of them, another word for none.
    trust: names of modules whose classes and functions may be built too. Raises TargetError with
    what would be valid.
    """
    if not isinstance(target, str) or not NAME.fullmatch(target):
        example = "deepclust.heads.simclr.SimCLR"
        raise TargetError(f"must be a name such as {example}, without leading underscores")
    listed = _listed() if section is None else SECTIONS.get(section, ())
    if target in listed or within(target, trust):
        return target
    found = near(target, listed) if within(target, ("deepclust", "torch.nn")) else None
    hint = f"; did you mean {found}?" if found else _choices(section)
    top = target.split(".")[0]
    raise TargetError(
        f"may not be built{hint}; code of your own must be named on the command line: "
        f"trust=[{top}], with deepclust predict --trust {top}"
    )


def _listed() -> list[str]:
    return [name for names in SECTIONS.values() for name in names]


def _choices(section: str | None) -> str:
    if section == "layer":
        return "; a module here is a layer of torch.nn such as torch.nn.Linear"
    if section in SECTIONS:
        return f"; deepclust list {section} names what may"
    return "" if section is None else "; there is nothing of deepclust's own for this place"


def resolve(target: str, trust: Sequence[str] = ()) -> Any:
    """Imports the class or function `module.name`. Raises TargetError unless it may be built.

    What is trusted must be written in what is trusted: a re-export of something else is refused.
    """
    try:
        check_target(target, None, trust)
    except TargetError as error:
        raise TargetError(f"{target}: {error}") from None
    found = load_name(target)
    if target in _listed():
        return found
    origin = f"{getattr(found, '__module__', None)}.{getattr(found, '__qualname__', None)}"
    if not (inspect.isclass(found) or inspect.isfunction(found)) or not within(origin, trust):
        named = ", ".join(trust)
        raise TargetError(f"{target} is {origin}, which may not be built; you trust {named} alone")
    return found


def load_name(target: str) -> Any:
    """What `module.name` is, a name that was checked. Raises TargetError where there is none."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise TargetError(f"{target} cannot be imported: {error}") from None


def within(name: str, homes: Iterable[str]) -> bool:
    """Whether a dotted name is one of `homes` or lies below one."""
    return any(name == home or name.startswith(home + ".") for home in homes)
