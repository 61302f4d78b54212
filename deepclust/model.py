"""A backbone with a head: as it is trained (`Network`), and as it is used afterwards
(`Clusterer`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from deepclust.config.augment import split_view
from deepclust.config.targets import BACKBONES
from deepclust.errors import UserError
from deepclust.heads.base import Head, Output
from deepclust.model_file import check_size, check_spec, mismatch
from deepclust.ops.collectives import all_sum, world_size
from deepclust.types import NOISE

if TYPE_CHECKING:
    from PIL import Image

    from deepclust.data.views.transform import ViewTransform

FORMAT, NOISE_FORMAT = 1, 2
"""Of model files; the second of those that tell noise, which earlier versions would put into
clusters.
"""
MOVED_HEADS = {
    "deepclust.heads.kmeans.KMeansHead": "deepclust.heads.readout.KMeansHead",
    "deepclust.heads.votes.Votes": "deepclust.heads.readout.Votes",
}
"""Heads under the names that model files of earlier versions have for them."""
UNTRAINED = {"pretrained": False, "weights": None}
"""What a backbone is told that gets its weights from elsewhere."""


class Network(nn.Module):
    """Backbone and head. A backbone without trainable parameters runs in eval mode and without
    gradient.
    """

    def __init__(self, backbone: nn.Module, head: Head) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @property
    def backbone_frozen(self) -> bool:
        """Whether no parameter of the backbone is trained."""
        return not any(parameter.requires_grad for parameter in self.backbone.parameters())

    def train(self, mode: bool = True) -> Network:
        """Training mode; a frozen backbone stays in eval mode, so that its batch statistics do not
        move.
        """
        super().train(mode)
        if self.backbone_frozen:
            self.backbone.eval()
        return self

    def features(
        self, images: Tensor, autocast: AbstractContextManager[Any] | None = None
    ) -> Tensor:
        """(B, C, H, W) to (B, D) float32."""
        if images.device.type == "cuda" or images.shape[1] > 1:
            images = images.contiguous(memory_format=torch.channels_last)
        with (
            autocast or nullcontext(),
            torch.set_grad_enabled(torch.is_grad_enabled() and not self.backbone_frozen),
        ):
            return self.backbone(images).float()

    def outputs(
        self, views: Mapping[int, Tensor], autocast: AbstractContextManager[Any] | None = None
    ) -> dict[int, Output]:
        """The head's output of each view. Views of one resolution go through the backbone in one
        call.
        """
        outputs: dict[int, Output] = {}
        for shape in dict.fromkeys(view.shape[1:] for view in views.values()):
            numbers = [number for number, view in views.items() if view.shape[1:] == shape]
            z = self.features(torch.cat([views[number] for number in numbers]), autocast)
            for number, part in zip(numbers, z.split([len(views[number]) for number in numbers])):
                outputs[number] = self.head(part, number)
        return outputs

    @torch.no_grad()
    def follow(self, student: Network, decay: float, buffers: bool = True) -> None:
        """Moves towards the student: theta <- decay theta + (1 - decay) theta_student; buffers are
        copied if asked.
        """
        for mine, theirs in zip(self.parameters(), student.parameters()):
            mine.lerp_(theirs.to(mine.dtype), 1 - decay)
        own = {f"head.{name}" for name in self.head.training_buffers}
        for (name, mine), theirs in zip(self.named_buffers(), student.buffers()):
            if buffers and name not in own:
                mine.copy_(theirs)

    @torch.no_grad()
    def average_batch_statistics(self, group: Any) -> None:
        """Makes the running statistics of every BatchNorm the mean over ranks, so that ranks stay
        one model.
        """
        if group is None:
            return
        layers = [
            part for part in self.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)
        ]
        tensors = [
            t for layer in layers for t in (layer.running_mean, layer.running_var) if t is not None
        ]
        if tensors:
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
            all_sum(flat, group).div_(world_size(group))
            for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
                tensor.copy_(part)


class Clusterer:
    """A trained model: images in, clusters out. It holds no training state.

    spec: plain JSON from which it is rebuilt: `backbone` and `head` (nodes with `_target_`),
    `size`, `channels` and `num_clusters` (what their constructors are told), `clean` (a view's
    operations), `image_size` (of the pixels it is given), `view_size`, `mean` and `std` (of the
    view).

    Images may be given as uint8 or [0, 1] float arrays or tensors (N, H, W), (N, H, W, C) or (N, C,
    H, W), one of them as (H, W, 3); as a path to an image or a folder; as a Pillow image; as a
    list, array or generator of paths, Pillow images or arrays of one shape; or as an `ImageSet`. A
    model of features takes float rows (N, D).
    """

    def __init__(
        self, network: Network, spec: Mapping[str, Any], device: torch.device | str = "cpu"
    ) -> None:
        self.spec = dict(spec)
        self.device = torch.device(device)
        self.network = network.to(self.device).eval()

    @cached_property
    def view(self) -> ViewTransform:
        """Pixels as they are read to what the backbone is fed."""
        from deepclust.data.views.transform import ViewTransform

        size = self.spec["view_size"]
        size = size if isinstance(size, int) else tuple(size)
        return ViewTransform(self.spec["clean"], size, self.spec["mean"], self.spec["std"])

    @property
    def num_clusters(self) -> int:
        """K."""
        return int(self.spec["num_clusters"])

    def transform(self, images: Any, batch_size: int = 256) -> np.ndarray:
        """(N, D) float32 features."""
        return self._apply(images, batch_size, self.network.features)

    def predict_proba(self, images: Any, batch_size: int = 256) -> np.ndarray:
        """(N, K) float32 probabilities of clusters; a row's largest is the confidence. Noise has
        some too.
        """
        return self._apply(images, batch_size, self.probabilities)

    def predict(self, images: Any, batch_size: int = 256) -> np.ndarray:
        """(N,) int64 clusters; -1 for images that are unlike all others, of a model that tells
        those (`--noise`).
        """
        return self._apply(images, batch_size, lambda view: self.assigned(view)[0])

    @torch.no_grad()
    def probabilities(self, view: Tensor) -> Tensor:
        """(B, C, H, W) clean view to (B, K) probabilities."""
        return self.network.head.predict(self.network.features(view))

    @torch.no_grad()
    def assigned(self, view: Tensor) -> tuple[Tensor, Tensor]:
        """Of a clean view (B, C, H, W), clusters (B,) int64, -1 for noise, and confidences (B,)."""
        features = self.network.features(view)
        confidence, cluster = self.network.head.predict(features).max(1)
        apart = self.network.head.outlying(features)
        return cluster if apart is None else cluster.masked_fill(apart, NOISE), confidence

    @torch.no_grad()
    def _apply(
        self, images: Any, batch_size: int, function: Callable[[Tensor], Tensor]
    ) -> np.ndarray:
        parts = [function(self._view(pixels)).cpu() for pixels in self._batches(images, batch_size)]
        return torch.cat(parts).numpy()

    def _view(self, pixels: Tensor) -> Tensor:
        return self.view.batch(
            pixels.to(self.device), torch.zeros(len(pixels), dtype=torch.int64, device=self.device)
        )

    def _batches(self, images: Any, batch_size: int) -> Iterator[Tensor]:
        """(b, C, H, W) uint8 with this model's number of channels."""
        from deepclust.data.arrays import as_images
        from deepclust.data.features import as_features
        from deepclust.data.given import gathered
        from deepclust.data.image_set import ImageSet

        if isinstance(images, ImageSet):
            for start in range(0, len(images), batch_size):
                yield torch.stack(
                    [images.read(row) for row in range(start, min(start + batch_size, len(images)))]
                )
            return
        given = image_paths(images) if isinstance(images, str | Path) else gathered(images)
        if isinstance(given, list):
            for start in range(0, len(given), batch_size):
                yield torch.stack([self.read(each) for each in given[start : start + batch_size]])
        elif given.ndim == 2 and list(self.spec["image_size"]) == [1, 1]:
            rows, wanted = as_features(given, least=1), self.spec["channels"]
            if rows.shape[1] != wanted:
                raise UserError(
                    f"features have {rows.shape[1]} columns; this model was trained on {wanted}"
                )
            yield from rows.split(batch_size)
        else:
            pixels = as_images(given, 1, self.spec["channels"])
            yield from with_channels(pixels, self.spec["channels"]).split(batch_size)

    def read(self, image: str | Path | Image.Image) -> Tensor:
        """(C, H, W) uint8 of an image file or a Pillow image, sized for this model.

        Raises UnreadableImage, which names the file.
        """
        from deepclust.data.images import decode, decode_picture

        side, channels = max(self.spec["image_size"]), self.spec["channels"]
        if isinstance(image, str | Path):
            return torch.from_numpy(decode(image, side, channels))
        return torch.from_numpy(decode_picture(image, side, channels))

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file: weights, and the spec as its metadata."""
        from safetensors.torch import save

        from deepclust.runtime.files import write_atomic

        training = {f"head.{name}" for name in self.network.head.training_buffers}
        weights = {
            n: t.contiguous().cpu()
            for n, t in self.network.state_dict().items()
            if n not in training
        }
        version = NOISE_FORMAT if self.network.head.tells_noise else FORMAT
        spec = {**self.spec, "format": version}
        # One entry: safetensors writes several in any order, and the same model would be another
        # file.
        text = json.dumps({**spec, "sha256": _digest(spec, weights)})
        write_atomic(Path(path), save(weights, {"deepclust": text}))

    @classmethod
    def load(
        cls, path: str | Path, device: torch.device | str = "cpu", trust: Sequence[str] = ()
    ) -> Clusterer:
        """Reads what `save` wrote; a run folder stands for the model in it.

        A model runs no code but ours and that of the modules that `trust` names, and no word of it
        is taken for a file to read or fetch. Raises UserError if it is no such file.
        """
        path = Path(path) / "model.safetensors" if Path(path).is_dir() else Path(path)
        spec, weights = _read(path)
        try:
            backbone, head = check_spec(spec, trust)
            make = partial(build_network, backbone, head, spec, trust=trust)
            try:
                check_size(make, weights)
            except UserError:
                raise
            except Exception:
                if not trust:  # code of one's own need not know how to be built without memory
                    raise
            network = make()
            if fault := mismatch(network, weights):
                raise UserError(fault)
        except Exception as error:
            why = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path} cannot be loaded by its own description: {why}") from error
        network.load_state_dict(weights, strict=False)
        return cls(network, spec, device)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the tensors of a model file. UserError unless it is as it was written."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            spec = json.loads((file.metadata() or {}).get("deepclust", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        told = spec.pop("sha256", None) if isinstance(spec, dict) else None
        digest = _digest(spec, weights)
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"{path} is not a model: {why}. Give a run folder or model.safetensors"
        ) from None
    version = spec.get("format") if isinstance(spec, dict) else None
    if not isinstance(version, int) or not 1 <= version <= NOISE_FORMAT:
        advice = "update deepclust, or train again"
        raise UserError(f"{path} was not written by this version of deepclust; {advice}")
    if told != digest:
        advice = "copy it again, or train again"
        raise UserError(f"{path} was changed after it was written (SHA-256); {advice}")
    del spec["format"]
    head = spec.get("head")
    if isinstance(head, dict) and head.get("_target_") in MOVED_HEADS:
        spec["head"] = {**head, "_target_": MOVED_HEADS[head["_target_"]]}
    return spec, weights


def _digest(spec: Any, weights: Mapping[str, Tensor]) -> str:
    """SHA-256 of a model file's content: a flipped bit of a weight would load silently."""
    from deepclust.runtime.checkpoint import digest_state

    return digest_state(
        {"model": {"spec": json.dumps(spec, sort_keys=True), "weights": dict(weights)}}
    )["model"]


def build_network(
    backbone: Mapping[str, Any],
    head: Mapping[str, Any],
    sizes: Mapping[str, Any],
    *,
    num_samples: int = 2,
    pretrained: bool = False,
    trust: Sequence[str] = (),
) -> Network:
    """Backbone and head from their `_target_` nodes. sizes: `channels`, `size`, `num_clusters`.

    `pretrained=False` fetches and reads no pretrained weights: they are about to be overwritten.
    """
    from deepclust.config.build import build

    node = dict(backbone)
    if not pretrained and (node.get("_target_") in BACKBONES or "pretrained" in node):
        node.update({key: value for key, value in UNTRAINED.items() if key in node})
    shape = {"in_channels": sizes["channels"], "image_size": sizes["size"]}
    body = build(node, section="backbone", trust=trust, **shape)
    told = {"dim": body.num_features, "num_clusters": sizes["num_clusters"]}
    top = build(head, section="head", trust=trust, num_samples=num_samples, **told)
    return Network(body, top)


def view_size(
    backbone: nn.Module, augment: Mapping[str, Any], size: tuple[int, int]
) -> tuple[int, int]:
    """(height, width) of views that have no size of their own: the configured one, else what a
    pretrained backbone wants, else `size`, the images'."""
    own = getattr(backbone, "preprocess", None)
    side = augment.get("size") or (own.size if own else None)
    return (side, side) if side else size


def feeding(backbone: nn.Module, augment: Mapping[str, Any], images: Any) -> dict[str, Any]:
    """How clean images are fed, for a model's spec; a pretrained backbone's own statistics go
    before the data's.
    """
    own = getattr(backbone, "preprocess", None) or images
    clean, size = split_view(augment["views"]["clean"], view_size(backbone, augment, images.size))
    statistics = {"mean": list(own.mean), "std": list(own.std)}
    return {"clean": clean, "view_size": list(size), "image_size": list(images.size), **statistics}


def image_paths(images: str | Path | Sequence[str | Path]) -> list[Path]:
    """Image files of a folder (in natural order), a file, or a list of files."""
    from deepclust.data.folders import list_folder

    if not isinstance(images, str | Path):
        return [Path(path) for path in images]
    if not Path(images).is_dir():
        return [Path(images)]
    listing = list_folder(str(images))
    return [listing.root / path for path in listing.paths]


def with_channels(images: Tensor, channels: int) -> Tensor:
    """(N, C, H, W) uint8 to the given number of channels: grey is repeated, colour becomes its luma
    (ITU-R 601).
    """
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.expand(-1, 3, -1, -1)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return (images * weights).sum(1, keepdim=True).round().to(torch.uint8)
