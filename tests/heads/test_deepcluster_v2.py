"""DeepCluster-v2: the loop of its k-means in float64, what it collects, and what it never learns."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from deepclust.config.settings import OptimSettings
from deepclust.errors import UserError
from deepclust.heads.base import Bank, Batch, Progress
from deepclust.heads.deepcluster_v2 import DeepClusterV2, multicrop_cross_entropy
from deepclust.ops import kmeans
from deepclust.runtime.checkpoint import digest_state
from tests.heads.test_swav import trainer, unit
from tests.toys import toy_backbone, toy_images

NUM = 60


def head(num_samples: int = NUM, **settings) -> DeepClusterV2:
    torch.manual_seed(0)
    given = {"num_prototypes": [4, 6, 9], "hidden_dim": 12, "embedding_dim": 8, **settings}
    return DeepClusterV2(16, 4, num_samples, **given)


def filled(model: DeepClusterV2, seen: int = NUM) -> DeepClusterV2:
    """As after an epoch in which the last images could not be read."""
    model.memory[:, :seen] = torch.stack(
        [unit(seen, 8, seed=crop) for crop in range(len(model.memory))]
    )
    model.seen[:seen] = True
    model.rounds += 1
    return model


def nothing(group: object = None) -> Bank:
    return Bank(torch.empty(0), torch.empty(0, dtype=torch.int64), NUM, group)


def spherical_by_hand(rows, centroids, updates):
    """11 assignments around 10 updates, as the authors' code has them; an empty cluster keeps its
    centroid.
    """
    rows, centroids = rows.double(), centroids.double().clone()
    for step in range(updates + 1):
        labels = (rows @ centroids.T).argmax(1)
        if step == updates:
            return centroids, labels
        for k in range(len(centroids)):
            if (labels == k).any():
                centroids[k] = F.normalize(rows[labels == k].mean(0), dim=0)


def test_the_loss_is_the_mean_over_crops_and_labelled_images():
    torch.manual_seed(0)
    logits, labels = [torch.randn(6, 5) for _ in range(4)], torch.tensor([0, 4, -100, 2, -100, 1])
    known = labels >= 0
    expected = sum(
        -float(each.double().log_softmax(1)[row, labels[row]])
        for each in logits
        for row in known.nonzero()[:, 0]
    ) / (4 * int(known.sum()))
    assert float(multicrop_cross_entropy(logits, labels)) == pytest.approx(expected, rel=1e-6)
    nobody = [each.requires_grad_() for each in logits]
    loss = multicrop_cross_entropy(nobody, torch.full((6,), -100))
    loss.backward()
    assert float(loss.detach()) == 0 and float(nobody[0].grad.abs().sum()) == 0


def test_clusters_are_ten_updates_from_drawn_rows_and_banks_take_turns():
    model = filled(head(), seen=50)
    rounds = int(model.rounds)
    asked = model.refresh(nothing())
    assert asked.reset == ("prototypes.sets.0", "prototypes.sets.1", "prototypes.sets.2")
    for number, size in enumerate((4, 6, 9)):
        rows = model.memory[number % 2][:50]
        settings = {"init": "random", "spherical": True, "seed": rounds * 3 + number}
        start = kmeans(rows, size, num_iters=0, **settings).centroids
        assert (start[:, None] - rows[None]).abs().amax(2).amin(1).max() < 1e-6, (
            "centroids begin as rows"
        )
        centroids, labels = spherical_by_hand(rows, start, 10)
        torch.testing.assert_close(
            model.prototypes.sets[number].double(), centroids, atol=1e-5, rtol=0
        )
        assert torch.equal(model.labels[number][:50], labels)
        assert set(model.labels[number][50:].tolist()) == {-100}
    assert int(model.rounds) == rounds + 1


def test_training_collects_its_own_embeddings_and_passes_once_in_training_mode():
    model, specs, kept = head(num_local=1), [], {}
    run = trainer(model, epochs=3, backbone=_convnet())
    bank = run.bank
    run.bank = lambda spec: specs.append(spec) or bank(spec)
    after = model.after_step

    def watched(outputs, batch):
        after(outputs, batch)
        for crop in (0, 1):
            kept.update(
                {(crop, int(i)): row for i, row in zip(batch.index, outputs[crop].embedding)}
            )

    model.after_step = watched
    run.fit()
    assert [(spec.mode, spec.of, spec.needs_pass) for spec in specs[:3]] == [
        ("train", "embedding", True),
        ("eval", "z", False),
        ("eval", "z", False),
    ]
    assert specs[0].view == "global" and all(spec.mode == "eval" for spec in specs[1:])
    for (crop, index), row in kept.items():
        assert torch.equal(model.memory[crop, index], row)
    assert len(kept) == 2 * NUM and bool(model.seen.all()) and int(model.labels.min()) >= 0
    torch.testing.assert_close(model.memory.norm(dim=2), torch.ones(2, NUM))


def _convnet():
    from deepclust.backbones import small_convnet

    torch.manual_seed(7)
    return small_convnet(1, 8, width=4)


def test_prototypes_are_centroids_and_are_never_learnt():
    model = head()
    run = trainer(model, optim=OptimSettings(name="sgd", lr=0.1, weight_decay=0.1), ema=0.5)
    run.prepare()
    run.refresh(run.progress())
    before = [each.detach().clone() for each in model.prototypes.sets]
    batches = run.batches()
    for _ in range(3):
        run.train_step(next(batches), run.progress())
        run.step += 1
    learnt = {id(p) for group in run.stepper.optimizer.param_groups for p in group["params"]}
    for each, theirs, first in zip(
        model.prototypes.sets, run.stepper.teacher.head.prototypes.sets, before, strict=True
    ):
        assert torch.equal(each, first) and torch.equal(theirs, first), (
            "the teacher takes them as they are"
        )
        assert id(each) not in learnt
        torch.testing.assert_close(each.norm(dim=1), torch.ones(len(each)))


def test_an_image_without_a_label_teaches_nothing():
    model = head()
    model.labels[:, :30] = torch.arange(30) % 4
    outputs = {
        crop: model(torch.randn(8, 16, generator=torch.Generator().manual_seed(crop)), crop)
        for crop in (0, 1)
    }
    whole, half = torch.arange(26, 34), Batch(torch.arange(26, 30), Progress(1, 9, 0, 1, 0, NUM))
    all_of_them = Batch(whole, Progress(1, 9, 0, 1, 0, NUM))
    loss = model.loss(outputs, model.targets({}, all_of_them), all_of_them)["loss"]
    first = {crop: output[slice(0, 4)] for crop, output in outputs.items()}
    torch.testing.assert_close(loss, model.loss(first, model.targets({}, half), half)["loss"])


def test_fewer_images_than_prototypes_are_refused():
    with pytest.raises(UserError, match=r"num_prototypes=\[100\].*60 images"):
        trainer(head(num_prototypes=[100])).fit()
    with pytest.raises(UserError, match="only 5 images could be read"):
        filled(head(), seen=5).refresh(nothing())


def test_the_first_pass_mixes_images_before_batch_statistics_are_taken():
    """Images that lie sorted by class would each be normalised by their own class."""
    run, orders = trainer(head()), []
    original = run.transforms["global"].batch
    run.transforms["global"].batch = lambda images, keys: (
        orders.append(images) or original(images, keys)
    )
    spec = head().bank_due(Progress(0, 6, 0, 2, 0, 2 * NUM))
    assert spec is not None
    bank = run.bank(spec)
    assert torch.equal(bank.index, torch.arange(NUM))
    assert not torch.equal(orders[0], toy_images().images)


# ------------------------------------------------------------------------------------------- st


@pytest.mark.parametrize("stop", [1, 3, 5, 6])
def test_a_run_that_goes_on_ends_the_same(stop):
    """Memory, labels and rounds are in the state: stops inside an epoch (1, 5) and before a
    clustering (3, 6).
    """
    whole = trainer(head(num_local=1), backbone=_convnet(), epochs=3)
    whole.fit()
    first = trainer(head(num_local=1), backbone=_convnet(), epochs=3, max_steps=stop)
    first.fit()
    state = copy.deepcopy(first.state_dict())
    second = trainer(head(num_local=1), backbone=_convnet(), epochs=3)
    second.load_state_dict(state)
    second.fit()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, second.network.state_dict()[name]), name


def test_a_stop_inside_a_clustering_leaves_the_state_before_it(monkeypatch):
    import deepclust.heads.deepcluster_v2 as module

    run, calls = trainer(head(), backbone=toy_backbone(norm=True), epochs=3), []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return kmeans(*args, **kwargs)

    monkeypatch.setattr(module, "kmeans", stopped)
    with monkeypatch.context() as patch:
        patch.setattr(run.hooks, "save_every_steps", 3)
        saved = []
        patch.setattr(run.hooks, "save", lambda state, progress: saved.append(copy.deepcopy(state)))
        with pytest.raises(KeyboardInterrupt):
            run.fit()
    assert run.step == 3 and digest_state(run.state_dict()) == digest_state(saved[-1])
    run.fit()
    whole = trainer(head(), backbone=toy_backbone(norm=True), epochs=3)
    whole.fit()
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, run.network.state_dict()[name]), name


@pytest.mark.parametrize(
    "settings", [{"precision": "bfloat16"}, {"ema": 0.9}, {"micro_batches": 3}]
)
def test_it_trains_under_autocast_with_a_teacher_and_in_micro_batches(settings):
    model = head()
    trainer(model, **settings).fit()
    torch.testing.assert_close(model.memory.norm(dim=2), torch.ones(2, NUM))
