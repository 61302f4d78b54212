"""DeepCluster, SeLa and ODC against scikit-learn, faiss and the papers' loops in float64; stops and
ranks.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.errors import UserError
from deepclust.heads import sela
from deepclust.heads.base import Bank, Batch, Head, Output, Progress
from deepclust.heads.deepcluster import DeepCluster, uniform_order
from deepclust.heads.odc import ODC, Memory, cluster_weights
from deepclust.heads.sela import SeLa, solve_mark
from deepclust.runtime.checkpoint import digest_state
from deepclust.runtime.distributed import World
from deepclust.training.trainer import Hooks, Stopped, Trainer
from tests.ranks import run_ranks
from tests.toys import toy_backbone, toy_images, toy_transforms

SGD = OptimSettings(name="sgd", lr=0.05)
KINDS = ("deepcluster", "sela", "odc")


def make_head(kind: str, num_samples: int = 60, **changes) -> Head:
    torch.manual_seed(1)
    if kind == "deepcluster":
        return DeepCluster(16, 4, num_samples, **{"num_prototypes": 6, "pca_dim": 8, **changes})
    if kind == "sela":
        return SeLa(16, 4, num_samples, **{"num_heads": 2, "num_solves": 5, **changes})
    return ODC(
        16, 4, num_samples, **{"num_prototypes": 6, "centroid_every": 3, "smallest": 4, **changes}
    )


def make(head: Head, *, images=None, norm=True, hooks=None, world=None, **settings) -> Trainer:
    images = images or toy_images()
    settings = {
        "epochs": 3,
        "batch_size": 16,
        "precision": "float32",
        "log_every_steps": 1,
        **settings,
    }
    return Trainer(
        toy_backbone(norm),
        head,
        images,
        toy_transforms(images),
        settings=TrainerSettings(**settings),
        optim=SGD,
        world=world,
        hooks=hooks,
    )


def bank_of(features: torch.Tensor) -> Bank:
    return Bank(features, torch.arange(len(features)), len(features))


def blobs(num: int = 240, dim: int = 12, clusters: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = 10 * torch.randn(clusters, dim, generator=generator)
    return centers[torch.arange(num) % clusters] + 0.1 * torch.randn(num, dim, generator=generator)


# ------------------------------------------------------------------------------------------- De


@pytest.mark.parametrize(
    ("sizes", "num"), [((3, 0, 50, 7), 60), ((1, 1, 500), 502), ((5,), 17), ((2, 2, 2), 2)]
)
def test_the_order_has_exact_quotas(sizes, num):
    labels = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    order = uniform_order(labels, num, torch.Generator().manual_seed(0))
    quotas = labels[order].bincount(minlength=len(sizes))
    live = torch.tensor(sizes) > 0
    assert len(order) == num and int(quotas[~live].sum()) == 0
    assert int(quotas[live].max() - quotas[live].min()) <= 1
    visits = order.bincount(minlength=len(labels))
    for cluster in range(len(sizes)):
        own = visits[labels == cluster]
        assert not len(own) or int(own.max() - own.min()) <= 1
    assert torch.equal(order, uniform_order(labels, num, torch.Generator().manual_seed(0)))


def test_clusters_are_those_of_faiss_and_scikit_learn():
    """Whitening by faiss, k-means by scikit-learn, on features with well-separated clusters."""
    faiss = pytest.importorskip("faiss")
    cluster = pytest.importorskip("sklearn.cluster")
    metrics = pytest.importorskip("sklearn.metrics")
    x = blobs()
    head = DeepCluster(12, 3, len(x), num_prototypes=6, pca_dim=5, num_restarts=5)
    refresh = head.refresh(bank_of(x))
    matrix = faiss.PCAMatrix(12, 5, -0.5)
    matrix.train(x.numpy())
    rows = F.normalize(torch.from_numpy(matrix.apply(x.numpy())), dim=1).numpy()
    theirs = cluster.KMeans(6, n_init=10, random_state=0).fit_predict(rows)
    assert metrics.adjusted_rand_score(theirs, head.labels.numpy()) == pytest.approx(1)
    assert refresh.order is not None and head.labels[refresh.order].bincount().tolist() == [40] * 6


def test_a_new_clustering_brings_a_new_classifier_without_memory():
    """No momentum and no optimiser state for the classifier, its own k-means seed; NMI as
    scikit-learn has it.
    """
    metrics = pytest.importorskip("sklearn.metrics")
    seen, labels, held = [], [], []
    head = make_head("deepcluster")
    trainer = make(head, hooks=Hooks(log=lambda figures, progress: seen.append(figures)))
    reset_parameters = trainer.stepper.reset_parameters

    def watching(names):
        reset_parameters(names)
        if "layer.weight" not in names:
            return
        labels.append(head.labels.clone())
        held.append(head.layer.weight in trainer.stepper.optimizer.state)
        assert (
            float(head.layer.weight.detach().std()) == pytest.approx(0.01, rel=0.3)
            and not head.layer.bias.any()
        )

    trainer.stepper.reset_parameters = watching  # type: ignore[method-assign]
    trainer.fit()
    assert len(labels) == 3 and not any(held)
    groups = [
        group
        for group in trainer.stepper.optimizer.param_groups
        if head.layer.weight in set(group["params"])
    ]
    assert (
        groups[0]["momentum"] == 0 and trainer.stepper.optimizer.param_groups[0]["momentum"] == 0.9
    )
    expected = metrics.normalized_mutual_info_score(labels[1].numpy(), labels[2].numpy())
    assert seen[-1]["nmi"] == pytest.approx(expected, abs=1e-6) and {
        "cross_entropy",
        "entropy",
    } <= set(seen[-1])


def test_empty_clusters_are_left_out_of_the_order():
    """Three distinct rows cannot fill six clusters."""
    x = blobs(num=60)[:3].repeat(20, 1)
    head = DeepCluster(12, 3, 60, num_prototypes=6)
    refresh = head.refresh(bank_of(x))
    used = head.labels.unique()
    assert refresh.order is not None and 3 <= len(used) < 6
    counts = head.labels[refresh.order].bincount()[used]
    assert int(counts.max() - counts.min()) <= 1


# ------------------------------------------------------------------------------------------- Se


def test_marks_are_the_papers():
    """E = 400 passes and n = 100 labellings: 0, 0.04, 0.16, 0.37, 0.65 and 1.02 passes, 16 of them
    in the first ten.
    """
    num = 1000
    marks = [solve_mark(i, 100, 400 * num, num, "quadratic") / num for i in range(100)]
    assert [round(mark, 2) for mark in marks[:6]] == [0, 0.04, 0.16, 0.37, 0.65, 1.02]
    assert sum(mark < 10 for mark in marks) == 16 and marks[-1] == pytest.approx(401.01)
    assert solve_mark(3, 5, 400, 100, "linear") == pytest.approx(0.75 * 501)


def test_labelling_happens_at_marks_inside_a_pass():
    steps = []
    head = make_head("sela", num_solves=7, schedule="linear")
    original = head.refresh
    trainer = make(head)
    head.refresh = lambda bank: (steps.append((trainer.step, bank.features)), original(bank))[1]  # type: ignore
    trainer.fit()
    marks = [solve_mark(number, 7, 180, 60, "linear") for number in range(7)]
    assert [step for step, _ in steps] == [
        next(s for s in range(13) if s * 15 >= mark) for mark in marks if mark < 180
    ]
    assert any(step % 4 for step, _ in steps) and int(head.solved) == len(steps)


def paper_labels(probs: np.ndarray, power: float, tol: float) -> np.ndarray:
    """The reference's loop in float64: r and c in turn, the error looked at every tenth time."""
    p = (probs**power).T.copy()
    (k, n), t, err = p.shape, 0, math.inf
    c = np.full((n, 1), 1 / n)
    while err > tol:
        r = (1 / k) / (p @ c)
        new = (1 / n) / (r.T @ p).T
        if t % 10 == 0:
            err = np.nansum(np.abs(c / new - 1))
        c, t = new, t + 1
    return np.nanargmax(p * r * c.T, axis=0)


@pytest.mark.parametrize("keep", [True, False])
def test_labels_are_those_of_the_references_loop(monkeypatch, keep):
    if not keep:
        monkeypatch.setattr(sela, "KEEP_BYTES", 0)
        monkeypatch.setattr(sela, "CHUNK_BYTES", 8 * 5 * 7)
    torch.manual_seed(0)
    head = SeLa(12, 5, 200, num_heads=2, power=10.0, stop="paper", tol=0.01)
    assert all(row.bincount().tolist() == [40] * 5 for row in head.labels)
    assert not torch.equal(head.labels[0], head.labels[1])
    x = torch.randn(200, 12)
    head.refresh(bank_of(x))
    for number, logits in enumerate(head.layer(x)):
        expected = paper_labels(logits.detach().double().softmax(1).numpy(), 10.0, 0.01)
        assert torch.equal(head.labels[number], torch.from_numpy(expected))


def test_no_more_than_a_chunk_of_the_plan_stands_in_memory(monkeypatch):
    """1,500 samples and 3,000 clusters would be 36 MB in float64; the largest tensor that is handed
    on has 1 MB.
    """
    largest = []
    monkeypatch.setattr(sela, "KEEP_BYTES", 8 * 1500 * 3000 - 1)
    monkeypatch.setattr(sela, "CHUNK_BYTES", 1_000_000)
    head = SeLa(8, 3000, 3000, num_heads=1, tol=0.5)
    original = head.log_probs
    head.log_probs = lambda z, number: (
        largest.append(part.nbytes) or part for part in original(z, number)
    )  # type: ignore
    torch.manual_seed(0)
    solver = sela.self_label
    monkeypatch.setattr(
        sela, "self_label", lambda given, **options: solver(given, max_iters=2, **options)
    )
    bank = Bank(torch.randn(1500, 8), torch.arange(1500), 3000)
    head.refresh(bank)
    assert len(largest) > 30 and max(largest) <= 1_000_000


def test_one_sub_head_in_turn():
    head = make_head("sela", solve="one")
    before = head.labels.clone()
    head.refresh(bank_of(torch.randn(60, 16)))
    assert torch.equal(head.labels[1], before[1]) and not torch.equal(head.labels[0], before[0])
    head.refresh(bank_of(torch.randn(60, 16)))
    assert not torch.equal(head.labels[1], before[1])


# ------------------------------------------------------------------------------------------- OD


def test_steps_are_those_of_the_papers_loop():
    """Features, labels, centroids and weights after 25 steps, against a float64 rendering of the
    loop.
    """
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(60, 16, generator=generator)
    head = make_head("odc", smallest=0, centroid_every=10)
    head.refresh(bank_of(start))
    labels = head.memory.labels.clone().numpy()
    features = F.normalize(start.double(), dim=1).numpy()
    centroids = np.stack([features[labels == c].mean(0) for c in range(6)])
    for step in range(25):
        index = torch.randperm(60, generator=generator)[:20]
        new = torch.randn(20, 16, generator=generator)
        batch = Batch(index, Progress(step, 100, 0, 10, 0, 600))
        outputs = {0: Output(new, new, [torch.randn(20, 6, generator=generator)])}
        targets = head.targets(outputs, batch)
        i = index.numpy()
        assert np.array_equal(targets["labels"].numpy(), labels[i])
        counts = np.bincount(labels, minlength=6)
        weights = torch.from_numpy((counts + 1e-5) ** -0.5 / ((counts + 1e-5) ** -0.5).sum())
        losses = head.loss(outputs, targets, batch)
        ours = F.cross_entropy(outputs[0].logits[0].double(), targets["labels"], weight=weights)
        torch.testing.assert_close(losses["loss"].double(), ours, atol=1e-6, rtol=1e-5)
        head.after_step(outputs, batch)
        moved = 0.5 * features[i] + 0.5 * F.normalize(new.double(), dim=1).numpy()
        features[i] = moved / np.linalg.norm(moved, axis=1, keepdims=True)
        fresh = (features[i] @ centroids.T).argmax(1)
        assert float(head.changed) == pytest.approx((fresh != labels[i]).mean())
        labels[i] = fresh
        if (step + 1) % 10 == 0:
            means = [
                features[labels == c].mean(0) if (labels == c).any() else centroids[c]
                for c in range(6)
            ]
            centroids = np.stack(means)
    assert np.array_equal(head.memory.labels.numpy(), labels)
    np.testing.assert_allclose(head.memory.features.numpy(), features, atol=1e-6)
    np.testing.assert_allclose(head.memory.centroids.numpy(), centroids, atol=1e-6)
    weights = (np.bincount(labels, minlength=6) + 1e-5) ** -0.5
    np.testing.assert_allclose(
        cluster_weights(head.memory.counts), weights / weights.sum(), rtol=1e-5
    )


def filled(labels: list[int], x: torch.Tensor, num_clusters: int) -> Memory:
    memory = Memory(len(x), num_clusters, x.shape[1])
    memory.features.copy_(F.normalize(x, dim=1))
    memory.labels.copy_(torch.tensor(labels))
    memory.recenter()
    return memory


def test_a_small_cluster_is_dissolved_and_refilled_from_the_largest():
    """The largest holds two blobs, which scikit-learn's 2-means tells apart as well."""
    cluster = pytest.importorskip("sklearn.cluster")
    x = blobs(num=90, clusters=3)
    labels = [0 if i % 3 < 2 else 1 for i in range(90)]
    memory = filled(labels, x, 3)
    largest = memory.labels == 0
    memory.mend(5)
    assert memory.counts.tolist() == [30, 30, 30]
    theirs = torch.from_numpy(
        cluster.KMeans(2, n_init=3).fit_predict(memory.features[largest].numpy())
    )
    ours = (memory.labels[largest] == 2).long()
    assert torch.equal(ours, theirs.long()) or torch.equal(ours, 1 - theirs.long())
    for number in range(3):
        expected = memory.features[memory.labels == number].mean(0)
        torch.testing.assert_close(memory.centroids[number], expected, atol=1e-5, rtol=0)


def test_empty_clusters_and_equal_members_are_mended():
    memory = filled([0] * 40, torch.ones(40, 4), 4)
    memory.mend(3)
    assert memory.counts.tolist() == [10, 10, 10, 10]
    everyone_small = filled([0, 1], torch.eye(2), 2)
    everyone_small.mend(5)
    assert everyone_small.counts.tolist() == [1, 1]


# ------------------------------------------------------------------------------------------- al


@pytest.mark.parametrize("kind", KINDS)
def test_too_few_images_are_said_before_training(kind):
    head = make_head(kind, num_prototypes=61)
    with pytest.raises(UserError, match="num_prototypes=61 is more than the 60 images"):
        make(head).fit()


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_cut_short_can_be_read(kind):
    trainer = make(make_head(kind, num_prototypes=6), max_steps=2)
    trainer.fit()
    features, _ = trainer.features()
    assert len(trainer.eval_network.head.predict(features).argmax(1).unique()) == 4


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stop", [1, 4, 6, 11])
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind, stop):
    saved = []
    whole = make(make_head(kind), ema=0.9, hooks=Hooks(save=lambda state, progress: None))
    whole.fit()
    hooks = Hooks(save=lambda state, progress: saved.append(copy.deepcopy(state)))
    broken = make(make_head(kind), ema=0.9, hooks=hooks)
    hooks.stop_requested = lambda: broken.step == stop
    with pytest.raises(Stopped):
        broken.fit()
    resumed = make(make_head(kind), ema=0.9)
    torch.manual_seed(99)
    resumed.load_state_dict(saved[-1])
    resumed.fit()
    assert digest_state(resumed.state_dict()) == digest_state(whole.state_dict())


@pytest.mark.parametrize(
    ("kind", "place"), [("deepcluster", "kmeans"), ("sela", "self_label"), ("odc", "kmeans")]
)
def test_a_stop_inside_a_refresh_is_made_good(kind, place, monkeypatch):
    module = __import__(f"deepclust.heads.{kind}", fromlist=[place])
    whole = make(make_head(kind))
    whole.fit()
    original, calls = getattr(module, place), iter(range(100))

    def interrupted(*args, **kwargs):
        found = original(*args, **kwargs)
        if next(calls) == (3 if kind == "sela" else 1):
            raise KeyboardInterrupt
        return found

    trainer = make(make_head(kind))
    with monkeypatch.context() as patch:
        patch.setattr(module, place, interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer.fit()
    if (
        kind == "odc"
    ):  # its k-means after the first is a step's own: the whole step is lost, not half of it
        return
    resumed = make(make_head(kind))
    resumed.load_state_dict(trainer.state_dict())
    resumed.fit()
    assert digest_state(resumed.state_dict()) == digest_state(whole.state_dict())


def trained(rank: int, size: int) -> dict[str, dict[str, torch.Tensor]]:
    """Two passes over 21 images, which do not divide by 2, without batch statistics: weights and
    buffers.
    """
    import torch.distributed as dist

    world = World(rank, size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    ends = {}
    for kind in KINDS:
        images = toy_images(21)
        head = make_head(kind, 21, num_prototypes=4)
        trainer = make(head, images=images, norm=False, world=world, epochs=2, batch_size=7)
        trainer.fit()
        ends[kind] = {name: value.clone() for name, value in trainer.network.state_dict().items()}
    return ends


def test_two_ranks_are_one():
    alone = trained(0, 1)
    for result in run_ranks(trained, 2):
        for kind, expected in alone.items():
            for name, value in expected.items():
                torch.testing.assert_close(
                    result[kind][name],
                    value,
                    atol=1e-5,
                    rtol=1e-5,
                    msg=lambda text, at=f"{kind} {name}": f"{at}: {text}",
                )
