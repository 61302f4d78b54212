"""Calibrated deep clustering: its equations written out, its two gradients, its start, its place in
a configuration.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from deepclust.config.build import build
from deepclust.config.load import load
from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.errors import ConfigError, UserError
from deepclust.heads.base import Bank, Batch, Output, Progress, Targets
from deepclust.heads.calibration import Calibration, calibration_loss, neighborhood_means, select
from deepclust.heads.common.mlp import ClusterMLP, orthogonalize
from deepclust.heads.scan import SCAN
from deepclust.heads.selflabel import SelfLabel
from deepclust.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.toys import toy_backbone, toy_images, toy_transforms

DIM, K, B = 16, 4, 40
ABOUT = Batch(torch.arange(B), Progress(0, 10, 0, 2, 0, 80))


def drawn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(kind: str = "mlp", **settings) -> Calibration:
    torch.manual_seed(0)
    inner = SelfLabel(DIM, K, kind=kind, hidden_dim=24)  # pyright: ignore[reportArgumentType]
    settings = {"hidden_dim": 24, "mini_clusters": 10, "orthogonal_steps": 50, **settings}
    return Calibration(DIM, K, inner, **settings)


def outputs_of(head: Calibration, z: list[Tensor] | None = None) -> dict[int, Output]:
    z = z or [drawn(B, DIM, seed=n).requires_grad_(True) for n in range(len(head.views))]
    return {number: head(each, number) for number, each in enumerate(z)}


# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per_cluster", [None, 3, 100])
@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_selection_is_the_papers_loop(per_cluster, scale):
    p = drawn(B, K, scale=scale).softmax(1)
    confidence, marked = p.max(1).values.double(), set()
    most = min(B, per_cluster or B // K)
    for cluster in range(K):
        top = p[:, cluster].argsort(descending=True)[:most]
        number = math.floor(float(confidence[top].mean()) * most + 1e-9)
        marked |= set(top[:number].tolist())
    assert set(select(p, per_cluster).nonzero().flatten().tolist()) == marked


def test_sure_rows_are_all_selected_and_a_row_may_be_marked_by_another_cluster():
    assert select(F.one_hot(torch.arange(B) % K, K).float()).all()
    p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.6, 0.4]])
    assert select(p, 2).tolist() == [True, False, False, True]


def test_targets_are_means_over_mini_clusters():
    p, labels = drawn(B, K).softmax(1), torch.arange(B) % 7
    means = neighborhood_means(p, labels, 9)
    for row in range(B):
        torch.testing.assert_close(means[row], p[labels == labels[row]].mean(0))


def test_the_calibration_loss_is_cross_entropy_less_entropy_of_the_mean():
    logits, soft = drawn(B, K).double(), drawn(B, K, seed=1).softmax(1).double()
    mean = logits.softmax(1).mean(0)
    expected = -(soft * logits.log_softmax(1)).sum(1).mean() + 0.7 * (mean * mean.log()).sum()
    loss, entropy = calibration_loss(logits, soft, entropy_weight=0.7)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(entropy, -(mean * mean.log()).sum())


def _ranks(rank: int, size: int) -> dict[str, Tensor]:
    cut = slice(0, 13) if rank == 0 else slice(13, B)
    return _parts(cut, dist.group.WORLD)


def _parts(rows: slice, group) -> dict[str, Tensor]:
    p, labels = drawn(B, K, scale=2.0).softmax(1)[rows], (torch.arange(B) % 7)[rows]
    head = make().eval()  # batch statistics differ between ranks
    with torch.no_grad():
        about = Batch(torch.arange(B)[rows], ABOUT.progress, group)
        z = [drawn(B, DIM, seed=n)[rows] for n in range(3)]
        targets = head.targets(outputs_of(head, z), about)
    return {
        "chosen": select(p, group=group),
        "means": neighborhood_means(p, labels, 7, group=group),
        **targets,
    }


def test_two_ranks_with_unequal_rows_choose_and_target_as_one():
    alone, (first, second) = _parts(slice(0, B), None), run_ranks(_ranks, 2)
    for name, value in alone.items():
        torch.testing.assert_close(
            torch.cat([first[name], second[name]]), value, atol=1e-5, rtol=0, msg=name
        )


# ----------------------------------------------------------------------------------------------


def targets_of(head: Calibration, outputs: dict[int, Output]) -> Targets:
    with torch.no_grad():
        targets = head.targets(
            {number: output.detach() for number, output in outputs.items()}, ABOUT
        )
    targets["chosen"] = torch.arange(B) % 3 == 0
    return targets


def test_each_loss_reaches_its_own_head_alone():
    """Features and clustering head get the gradient of the chosen rows' cross entropy and nothing
    else; the calibration head that of its own loss and nothing else."""
    head = make()
    z = [drawn(B, DIM, seed=n).requires_grad_(True) for n in range(3)]
    outputs = outputs_of(head, z)
    targets = targets_of(head, outputs)
    head.loss(outputs, targets, ABOUT)["loss"].backward()
    assert z[2].grad is None or not z[2].grad.any(), "the weak view makes labels alone"

    other, again = copy.deepcopy(head), z[1].detach().clone().requires_grad_(True)
    other.zero_grad()
    rows = targets["chosen"]
    F.cross_entropy(other(again, 1).logits[0][rows], targets["inner/labels"][rows]).backward()
    torch.testing.assert_close(z[1].grad, again.grad)
    for mine, theirs in zip(head.inner.parameters(), other.inner.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert all(parameter.grad is None for parameter in other.calibrator.parameters())

    calibration_loss(other.calibrator(targets["z"])[0], targets["soft"])[0].backward()
    for mine, theirs in zip(head.calibrator.parameters(), other.calibrator.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_nothing_chosen_teaches_the_backbone_nothing():
    head = make()
    outputs = outputs_of(head)
    targets = targets_of(head, outputs)
    targets["chosen"] = torch.zeros(B, dtype=torch.bool)
    losses = head.loss(outputs, targets, ABOUT)
    losses["loss"].backward()
    assert losses["clustering"] == 0 and all(not p.grad.any() for p in head.inner.parameters())
    assert any(p.grad.any() for p in head.calibrator.parameters())


def test_another_inner_head_keeps_its_targets_and_learns_from_the_chosen_rows():
    inner = SCAN(DIM, K, 60, num_neighbors=3)
    head = Calibration(DIM, K, inner, hidden_dim=24, mini_clusters=10)
    assert [view.augment for view in head.views] == ["strong", "strong", "weak", "clean"]
    outputs = outputs_of(head)
    targets = targets_of(head, outputs)
    rows = targets["chosen"]
    expected = inner.loss({n: outputs[n][rows] for n in (0, 1)}, Targets(), ABOUT[rows])["loss"]
    torch.testing.assert_close(head.loss(outputs, targets, ABOUT)["clustering"], expected.detach())


def test_micro_steps_learn_from_the_features_that_targets_were_made_from():
    """Stale by design: one set of targets, features kept, two optimiser steps."""
    images, head, seen = toy_images(40), make(), []
    original = head.loss

    def watched(outputs, targets, batch):
        seen.append(targets["z"].clone())
        return original(outputs, targets, batch)

    head.loss = watched
    trainer = Trainer(
        toy_backbone(norm=True),
        head,
        images,
        {**toy_transforms(images), "weak": toy_transforms(images)["strong"]},
        settings=TrainerSettings(epochs=1, batch_size=40, micro_batches=2, precision="float32"),
        optim=OptimSettings(step_per="micro", lr=0.1),
    )
    trainer.fit()
    assert [len(each) for each in seen] == [20, 20]
    batch = torch.stack([images.read(row) for row in range(4)]).float()
    assert trainer.step == 1 and torch.isfinite(trainer.network.features(batch)).all()


# ----------------------------------------------------------------------------------------------


def test_the_start_may_be_the_best_of_several_long_kmeans():
    """As near to scikit-learn's best of 10 x 300 as k-means gets, and nearer than one of 25 rounds."""
    from sklearn.cluster import KMeans

    features = drawn(400, 8, seed=3)
    rows = (features - features.mean(1, keepdim=True)) / features.std(1, keepdim=True)
    rows = F.normalize(rows, dim=1)
    theirs = KMeans(40, n_init=10, max_iter=300, random_state=0).fit(rows.double().numpy()).inertia_

    def inertia(**options: int) -> float:
        torch.manual_seed(0)
        net = ClusterMLP(8, 40, K)
        net.init_clusters(features, steps=0, seed=1, **options)
        return float(torch.cdist(rows, net.first.weight.detach()).square().min(1).values.sum())

    quick, long = inertia(), inertia(restarts=10, iterations=300)
    assert long < quick and long <= 1.02 * theirs


def test_orthogonalised_rows_stand_like_a_simplex():
    rows = orthogonalize(F.normalize(drawn(6, 32), dim=1), 400)
    cosines = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
    apart = cosines[~torch.eye(6, dtype=torch.bool)]
    assert apart.max() < 0 and abs(float(apart.mean()) + 1 / 5) < 0.03


def blobs(seed: int = 0) -> tuple[Tensor, Tensor]:
    labels = torch.arange(200) % K
    return drawn(K, DIM, seed=seed, scale=2.0)[labels] + drawn(200, DIM, seed=1, scale=0.3), labels


def test_both_heads_begin_as_the_same_k_means():
    head, (x, labels) = make(), blobs()
    head.init_prototypes(Bank(x, torch.arange(200), 200))
    head.eval()
    assert torch.equal(head.predict(x), head.uncalibrated(x))
    found = head.predict(x).argmax(1)
    assert len({(int(a), int(b)) for a, b in zip(found, labels)}) == K, "clusters are the blobs"


def test_the_calibration_begins_as_the_clustering_that_was_taken_over():
    head, (x, labels) = make("cosine"), blobs()
    previous = SelfLabel(DIM, K, kind="cosine")
    with torch.no_grad():
        means = F.normalize(
            torch.stack([x[labels == (cluster + 1) % K].mean(0) for cluster in range(K)]), dim=1
        )
        previous.layer.weight.copy_(means)
    head.init_from(previous)
    head.init_prototypes(Bank(x, torch.arange(200), 200))
    head.eval()
    assert torch.equal(head.uncalibrated(x).argmax(1), (labels - 1) % K)
    assert torch.equal(head.predict(x).argmax(1), (labels - 1) % K)


def test_few_images_leave_hidden_units_as_drawn():
    net = ClusterMLP(DIM, 64, K)
    before = net.first.weight.clone()
    net.init_clusters(drawn(20, DIM), steps=1)
    assert torch.isfinite(net.first.weight).all() and not torch.equal(
        net.first.weight[:10], before[:10]
    )


# ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", ["selflabel", "scan"])
def test_the_inner_head_is_a_choice_on_the_command_line(inner):
    node = load(["head=calibration", f"head.inner={inner}"]).stages["main"].head
    head = build(node, dim=DIM, num_clusters=K, num_samples=60)
    assert type(head.inner).__name__.lower() == inner
    with pytest.raises(ConfigError, match="did you mean scan"):
        load(["head=calibration", "head.inner=scam"])
    with pytest.raises(ConfigError, match="thresholt"):
        load(["head=calibration", "head.inner.thresholt=0.5"])


def test_both_nets_must_be_of_one_shape():
    with pytest.raises(UserError, match="must be equal"):
        make(hidden_dim=12)


PAPER = {  # batch, sub-batch, images a cluster, mini-clusters, learning rate of the backbone
    "cifar10": (1000, 500, 100, 500, 5e-5),
    "cifar20": (1000, 500, 50, 40, 1e-5),
    "stl10": (1000, 500, 100, 150, 5e-5),
    "imagenet10": (500, 125, 50, 150, 5e-5),
    "imagenet_dogs": (500, 125, 33, 40, 5e-5),
    "tiny_imagenet": (5000, 1000, 25, 1000, 1e-5),
}


@pytest.mark.parametrize("name", PAPER)
def test_presets_hold_the_papers_settings(name):
    stage = load([f"experiment=cdc_{name}"]).stages["calibration"]
    trainer, optim, head = stage.trainer, stage.optim, stage.head
    batch, part, per_cluster, mini_clusters, backbone_lr = PAPER[name]
    assert (trainer.batch_size, trainer.batch_size // trainer.micro_batches, trainer.epochs) == (
        batch,
        part,
        100,
    )
    assert (head["per_cluster"], head["mini_clusters"], head["entropy_weight"]) == (
        per_cluster,
        mini_clusters,
        1,
    )
    assert (optim.name, optim.lr, optim.backbone_lr, optim.weight_decay) == (
        "adam",
        1e-4,
        backbone_lr,
        0,
    )
    assert (optim.step_per, optim.schedule, head["inner"]["kind"]) == ("micro", "constant", "mlp")
    assert (head["restarts"], head["iterations"], head["warm_start"], head["hidden_dim"]) == (
        10,
        300,
        False,
        512,
    )
