"""Small images, nets and heads for tests of the trainer. Each head needs something that other
trainers cannot carry.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deepclust.backbones import Backbone
from deepclust.data.datasets import digits
from deepclust.data.image_set import ImageSet
from deepclust.data.views.transform import ViewTransform, build_views
from deepclust.heads import BankSpec, Head, Output, Refresh, Targets, View
from deepclust.heads.common.layers import ClusterLayer
from deepclust.ops import kmeans

AUGMENT = {
    "size": None,
    "views": {
        "clean": [],
        "strong": [
            {"random_affine": {"degrees": 15, "translate": 0.1}},
            {"pixel_noise": {"std": 0.05}},
        ],
    },
}


def toy_images(count: int = 60) -> ImageSet:
    """The first digits."""
    return digits().train.select(list(range(count)))


def toy_transforms(images: ImageSet) -> dict[str, ViewTransform]:
    return build_views(AUGMENT, images, ["clean", "strong"])


def toy_backbone(norm: bool = False, seed: int = 0) -> Backbone:
    """8 x 8 grey to 16 features; without batch statistics unless asked for."""
    torch.manual_seed(seed)
    middle: nn.Module = nn.BatchNorm2d(8) if norm else nn.Identity()
    return Backbone(
        nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), middle, nn.Tanh(), nn.Flatten(), nn.Linear(128, 16)
        ),
        16,
    )


class Plain(Head):
    """Cross entropy between two views."""

    views = (View("strong"), View("strong"))

    def __init__(self, dim: int = 16, num_clusters: int = 4) -> None:
        super().__init__()
        self.layer = ClusterLayer(dim, num_clusters)

    def forward(self, z: Tensor, view: int) -> Output:
        return Output(z, logits=self.layer(z))

    def targets(self, outputs, batch) -> Targets:
        return Targets(codes=outputs[1].logits[0].softmax(1))

    def loss(self, outputs, targets, batch):
        return {"loss": F.cross_entropy(outputs[0].logits[0], targets["codes"])}

    def predict(self, z: Tensor) -> Tensor:
        return self.layer(z)[0].softmax(1)


class LearntTargets(Plain):
    """Targets that carry gradient, made inside the loss, towards a parameter of their own (as in
    TURTLE).
    """

    def __init__(self, dim: int = 16, num_clusters: int = 4) -> None:
        super().__init__(dim, num_clusters)
        self.assigner = nn.Linear(dim, num_clusters)

    def targets(self, outputs, batch) -> Targets:
        return Targets()

    def loss(self, outputs, targets, batch):
        made = self.assigner(outputs[1].z.detach()).softmax(1)
        mean = made.mean(0)
        entropy = -(mean * mean.log()).sum()
        return {"loss": F.cross_entropy(outputs[0].logits[0], made) - entropy, "entropy": entropy}


class InnerLoop(Plain):
    """A classifier fitted by gradient steps inside the loss."""

    def loss(self, outputs, targets, batch):
        z, codes = outputs[0].z, outputs[0].logits[0].softmax(1)
        weight = torch.zeros(codes.shape[1], z.shape[1], requires_grad=True)
        for _ in range(3):
            inner = F.cross_entropy(z.detach() @ weight.T, codes.detach())
            (grad,) = torch.autograd.grad(inner, weight)
            weight = (weight - 0.5 * grad).detach().requires_grad_(True)
        return {"loss": F.cross_entropy(z.detach() @ weight.detach().T, codes) + 0 * z.sum()}


class Pairwise(Plain):
    """Targets between the samples of a batch: no cluster axis, and rows that belong together (as in
    I-Con).
    """

    def targets(self, outputs, batch) -> Targets:
        return Targets(index=batch.index)

    def loss(self, outputs, targets, batch):
        codes = outputs[0].logits[0].softmax(1)
        together = (targets["index"][:, None] == targets["index"][None]).float()
        return {"loss": F.binary_cross_entropy((codes @ codes.T).clamp(1e-6, 1 - 1e-6), together)}


class CrossHeads(Plain):
    """A term between sub-heads (as in DivClust), and a label-free choice between them."""

    num_heads = 2

    def __init__(self, dim: int = 16, num_clusters: int = 4) -> None:
        super().__init__(dim, num_clusters)
        self.layer = ClusterLayer(dim, num_clusters, 2)

    def loss(self, outputs, targets, batch):
        first, second = (logits.softmax(1) for logits in outputs[0].logits)
        return {
            "loss": F.cross_entropy(outputs[0].logits[0], targets["codes"])
            + (first.T @ second).square().mean()
        }

    def score(self, bank) -> Tensor:
        return torch.tensor([1.0, 0.5])

    def predict(self, z: Tensor) -> Tensor:
        return self.layer(z)[int(self.best)].softmax(1)


class Relabelling(Plain):
    """K-means labels by index before each pass, quotas in the order, a classifier drawn anew,
    partners, a memory.
    """

    views = (View("strong", used_for="loss"), View("strong", source="partner", used_for="loss"))
    training_buffers = ("labels", "memory")
    labels: Tensor
    memory: Tensor

    def __init__(self, dim: int = 16, num_clusters: int = 4, num_samples: int = 60) -> None:
        super().__init__(dim, num_clusters)
        self.register_buffer("labels", torch.zeros(num_samples, dtype=torch.int64))
        self.register_buffer("memory", torch.zeros(num_samples, dim))

    def bank_due(self, progress) -> BankSpec | None:
        due = (
            progress.epoch * progress.num_steps // progress.num_epochs == progress.step
            and not progress.final
        )
        return BankSpec() if due else None

    def refresh(self, bank) -> Refresh:
        result = kmeans(bank.features, self.layer.num_clusters, seed=int(self.labels.sum()) + 1)
        self.labels[bank.index] = result.labels.to(self.labels)
        with torch.no_grad():
            self.layer.weight.normal_(0, 0.01)
        partners = torch.arange(len(self.labels)).roll(1)[:, None]
        order = torch.argsort(self.labels, stable=True).roll(7)
        return Refresh(partners=partners, order=order, reset=("layer.weight",))

    def targets(self, outputs, batch) -> Targets:
        return Targets(labels=self.labels[batch.index])

    def loss(self, outputs, targets, batch):
        terms = [F.cross_entropy(outputs[view].logits[0], targets["labels"]) for view in (0, 1)]
        return {"loss": terms[0] + terms[1]}

    def after_step(self, outputs, batch) -> None:
        self.memory[batch.index] = outputs[0].z


TOYS = (Plain, LearntTargets, InnerLoop, Pairwise, CrossHeads, Relabelling)
