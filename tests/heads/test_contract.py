"""What every head promises, for every YAML in conf/head."""

from __future__ import annotations

import copy

import pytest
import torch

from deepclust.config.build import build
from deepclust.config.compose import options
from deepclust.config.load import load
from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.views.transform import build_views
from deepclust.heads import Head, Output
from deepclust.heads.base import Batch, Progress
from deepclust.runtime.checkpoint import digest_state
from deepclust.training.trainer import Trainer
from tests.toys import toy_backbone, toy_images

NUM_SAMPLES, DIM, NUM_CLUSTERS, BATCH = 60, 16, 4, 12
HEADS = [name for name, _ in options("head")]
IMAGES = toy_images(NUM_SAMPLES)


def make(name: str) -> Head:
    torch.manual_seed(0)
    node = load([f"head={name}", "recipe=single"]).stages["main"].head
    return build(node, dim=DIM, num_clusters=NUM_CLUSTERS, num_samples=NUM_SAMPLES)


def trainer_of(head: Head, **settings) -> Trainer:
    names = list(dict.fromkeys(["clean", *(view.augment for view in head.views)]))
    views = build_views(load([]).stages["pretext"].augment, IMAGES, names)
    settings = {"epochs": 2, "batch_size": 16, "precision": "float32", **settings}
    return Trainer(
        toy_backbone(norm=True),
        head,
        IMAGES,
        views,
        settings=TrainerSettings(**settings),
        optim=OptimSettings(),
    )


def batch_of(size: int = BATCH) -> Batch:
    return Batch(torch.arange(size), Progress(0, 10, 0, 2, 0, 2 * NUM_SAMPLES))


def outputs_of(head: Head, size: int = BATCH, grad: bool = True) -> dict[int, Output]:
    torch.manual_seed(1)
    return {
        number: head(torch.randn(size, DIM, requires_grad=grad), number)
        for number in range(len(head.views))
    }


@pytest.mark.parametrize("name", HEADS)
def test_views_are_declared_and_exist(name):
    head = make(name)
    assert head.views and any(view.used_for != "targets" for view in head.views)
    for recipe in ("small_gray", "photo", "cifar", "imagenet"):
        known = load([f"head={name}", f"augment={recipe}"]).stages["main"].augment["views"]
        assert {view.augment for view in head.views} <= set(known)


@pytest.mark.parametrize("name", HEADS)
def test_outputs_have_the_promised_shapes(name):
    head = make(name)
    for number, output in outputs_of(head).items():
        assert output.z.shape == (BATCH, DIM), number
        assert output.embedding is None or output.embedding.shape[0] == BATCH
        for logits in output.logits:
            assert logits.shape[0] == BATCH and logits.dtype == torch.float32
    assert len(head(torch.randn(3, DIM), 0).logits) in (0, head.num_heads)


@pytest.mark.parametrize("name", HEADS)
def test_targets_have_no_gradient_and_slice_along_the_batch(name):
    head = make(name)
    with torch.no_grad():
        targets = head.targets({n: out.detach() for n, out in outputs_of(head).items()}, batch_of())
    for key, value in targets.items():
        assert value.shape[0] == BATCH and not value.requires_grad, key
        assert torch.equal(targets[3:7][key], value[3:7])


@pytest.mark.parametrize("name", HEADS)
def test_the_loss_is_finite_and_reaches_features_and_parameters(name):
    head = make(name)
    outputs = outputs_of(head)
    with torch.no_grad():
        targets = head.targets({n: out.detach() for n, out in outputs.items()}, batch_of())
    used = {n: out for n, out in outputs.items() if head.views[n].used_for != "targets"}
    losses = head.loss(used, targets, batch_of())
    assert losses["loss"].ndim == 0 and all(
        torch.isfinite(value).all() for value in losses.values()
    )
    losses["loss"].backward()
    assert all(
        parameter.grad is not None for parameter in head.parameters() if parameter.requires_grad
    )


@pytest.mark.parametrize("name", HEADS)
def test_predictions_are_probabilities_that_do_not_depend_on_the_batch(name):
    head = make(name).eval()
    z = torch.randn(9, DIM)
    if not head.clusters:
        with pytest.raises(NotImplementedError):
            head.predict(z)
        return
    probabilities = head.predict(z)
    assert probabilities.shape == (9, NUM_CLUSTERS)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(9))
    torch.testing.assert_close(head.predict(z[4:6]), probabilities[4:6])


@pytest.mark.parametrize("name", HEADS)
def test_all_state_is_in_the_state_dict(name):
    """A head of the same constructor with the same state_dict is the same head: nothing hides
    outside.
    """
    head = make(name)
    trainer_of(head).fit()
    other = make(name)
    other.load_state_dict(head.state_dict())
    assert digest_state({"head": other.state_dict()}) == digest_state({"head": head.state_dict()})
    outputs, again = outputs_of(head.eval(), grad=False), outputs_of(other.eval(), grad=False)
    for number, output in outputs.items():
        for mine, theirs in zip(output.logits, again[number].logits, strict=True):
            assert torch.equal(mine, theirs)
    sizes = {buffer: tuple(value.shape) for buffer, value in make(name).named_buffers()}
    assert sizes == {buffer: tuple(value.shape) for buffer, value in head.named_buffers()}, (
        "buffers keep their shape"
    )
    assert set(head.sharded_buffers) | set(head.training_buffers) <= set(sizes)


@pytest.mark.parametrize("name", HEADS)
def test_buffers_for_training_alone_do_not_reach_the_teacher(name):
    head = make(name)
    trainer = trainer_of(head, ema=0.9, epochs=1)
    trainer.prepare()
    assert trainer.stepper.teacher is not None
    before = {
        buffer: trainer.stepper.teacher.head.get_buffer(buffer).clone()
        for buffer in head.training_buffers
    }
    trainer.fit()
    for buffer, value in before.items():
        assert torch.equal(trainer.stepper.teacher.head.get_buffer(buffer), value)


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize(
    "settings", [{}, {"ema": 0.9}, {"micro_batches": 2}, {"views": "workers", "num_workers": 0}]
)
def test_every_head_trains_in_every_way(name, settings):
    head = make(name)
    trainer = trainer_of(head, **settings)
    before = copy.deepcopy(head.state_dict())
    trainer.fit()
    assert trainer.step == trainer.num_steps
    assert any(not torch.equal(value, before[key]) for key, value in head.state_dict().items())
    assert all(torch.isfinite(parameter).all() for parameter in trainer.network.parameters())


@pytest.mark.parametrize("name", HEADS)
def test_a_head_knows_nothing_of_the_house_above_it(name):
    import ast
    from pathlib import Path

    import deepclust.heads

    above = {
        "trainer",
        "recipe",
        "cli",
        "config",
        "loggers",
        "data",
        "runtime",
        "training",
        "model",
        "clustering",
        "collection",
        "features",
        "predict",
        "report",
        "eval",
    }
    for path in Path(deepclust.heads.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deepclust."):
                assert node.module.split(".")[1] not in above, f"{path}: {node.module}"
