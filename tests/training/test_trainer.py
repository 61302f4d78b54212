"""The loop against the contract of a head: what toy heads need, none of which has a line in the
trainer.
"""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch

from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.sampler import Plan
from deepclust.errors import UserError
from deepclust.heads import BankSpec, Refresh, View
from deepclust.runtime.checkpoint import digest_state
from deepclust.training.trainer import Hooks, Stopped, Trainer
from tests.toys import (
    TOYS,
    CrossHeads,
    Pairwise,
    Plain,
    Relabelling,
    toy_backbone,
    toy_images,
    toy_transforms,
)

IMAGES = toy_images()
TRANSFORMS = toy_transforms(IMAGES)


def make(head, *, norm=False, hooks=None, optim=None, **settings):
    settings = {
        "epochs": 2,
        "batch_size": 16,
        "precision": "float32",
        "log_every_steps": 1,
        **settings,
    }
    return Trainer(
        toy_backbone(norm),
        head,
        IMAGES,
        TRANSFORMS,
        settings=TrainerSettings(**settings),
        optim=optim or OptimSettings(),
        hooks=hooks,
    )


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("ema", [None, 0.9])
def test_every_toy_head_trains_without_a_line_in_the_trainer(kind, ema):
    torch.manual_seed(0)
    seen = []
    trainer = make(
        kind(), ema=ema, hooks=Hooks(log=lambda metrics, progress: seen.append(metrics["loss"]))
    )
    before = copy.deepcopy(trainer.network.state_dict())
    trainer.fit()
    assert len(seen) == trainer.num_steps == 8
    assert all(value == value for value in seen)
    moved = {
        name
        for name, value in trainer.network.named_parameters()
        if not torch.equal(value, before[name])
    }
    assert {"head.layer.weight", "backbone.body.0.weight"} <= moved


def test_a_pass_visits_every_sample_once_in_batches_that_differ_by_at_most_one():
    for size, ranks in ((16, 1), (16, 3), (59, 1), (60, 1), (7, 2)):
        plan = Plan.draw(60, size, 0, 0, 0, None)
        parts = [
            plan.positions(batch, rank, ranks)
            for batch in range(plan.num_batches)
            for rank in range(ranks)
        ]
        assert torch.equal(torch.cat(parts), torch.arange(60))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1 + (ranks > 1)
        assert max(map(len, parts)) <= size
        assert sorted(plan.order.tolist()) == list(range(60))
    first, second = (Plan.draw(60, 16, 0, 0, number, None).order for number in (0, 1))
    assert not torch.equal(first, second)


def test_micro_batches_give_the_gradient_of_the_macro_batch():
    """Same targets, same gradient to rounding, for a network without batch statistics."""
    grads = []
    for micro in (1, 3, 16):
        torch.manual_seed(1)
        trainer = make(
            Plain(),
            micro_batches=micro,
            optim=OptimSettings(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0),
        )
        start = copy.deepcopy(trainer.network.state_dict())
        trainer.network.train()
        batch = next(trainer.batches())
        trainer.train_step(batch, trainer.progress())
        grads.append(
            {name: start[name] - value for name, value in trainer.network.named_parameters()}
        )
    for other in grads[1:]:
        for name, value in grads[0].items():
            torch.testing.assert_close(other[name], value, atol=1e-6, rtol=1e-4)


def test_a_bank_of_features_leaves_the_head_alone(monkeypatch):
    trainer = make(Plain())
    expected = trainer.network.outputs(
        {0: TRANSFORMS["clean"].batch(IMAGES.images, torch.zeros(60).long())}
    )[0].z
    monkeypatch.setattr(trainer.head, "forward", lambda *_: pytest.fail("the head was asked"))
    torch.testing.assert_close(trainer.bank(BankSpec()).features, expected.detach())


def test_step_per_micro_takes_a_step_on_each_micro_batch():
    steps = []
    trainer = make(Plain(), micro_batches=4, optim=OptimSettings(step_per="micro"))
    original = trainer.stepper.optimizer.step
    trainer.stepper.optimizer.step = lambda *args, **kwargs: (
        steps.append(1),
        original(*args, **kwargs),
    )[1]
    trainer.fit()
    assert len(steps) == 4 * trainer.num_steps


def test_targets_come_from_the_teacher_and_see_no_gradient():
    seen = []

    class Watching(Plain):
        views = (View("strong", used_for="loss"), View("clean", used_for="targets"))

        def targets(self, outputs, batch):
            seen.append((sorted(outputs), outputs[1].z.requires_grad, outputs[1].z))
            return super().targets(outputs, batch)

        def loss(self, outputs, targets, batch):
            assert sorted(outputs) == [0] and not targets["codes"].requires_grad
            return super().loss(outputs, targets, batch)

    trainer = make(Watching(), ema=0.5, epochs=1)
    trainer.prepare()
    batch = next(trainer.batches())
    trainer.train_step(batch, trainer.progress())
    trainer.stepper.teacher.backbone.body[4].bias.data.add_(100.0)
    trainer.train_step(batch, trainer.progress())
    assert [numbers for numbers, _, _ in seen] == [[1], [1]]
    assert not any(grad for _, grad, _ in seen)
    assert (seen[1][2] - seen[0][2]).mean() > 50


def test_sub_heads_of_a_teacher_are_scored_with_the_students_training_buffers():
    class Mining(CrossHeads):
        training_buffers = ("table",)

        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.zeros(2))

        def after_step(self, outputs, batch):
            self.table.copy_(torch.tensor([3.0, 2.0]))

        def score(self, bank):
            return self.table + (0 if self is trainer.stepper.teacher.head else 9)

    trainer = make(Mining(), ema=0.9, epochs=1)
    trainer.fit()
    assert int(trainer.eval_network.head.best) == int(trainer.head.best) == 1
    assert torch.equal(trainer.eval_network.head.table, torch.zeros(2)), "they are lent, not given"


def test_teacher_is_the_moving_average_of_the_student():
    trainer = make(Plain(), ema=0.9, epochs=1)
    trainer.prepare()
    expected = {name: value.clone() for name, value in trainer.network.named_parameters()}
    passes = trainer.batches()
    for step, batch in enumerate(passes):
        trainer.train_step(batch, trainer.progress())
        trainer.step += 1
        decay = min(0.9, (1 + step) / (10 + step))
        for name, value in trainer.network.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * value.detach()
    for name, value in trainer.stepper.teacher.named_parameters():
        torch.testing.assert_close(value, expected[name])


def test_order_partners_and_reset_reach_the_right_places():
    """An order becomes the pass that follows, partners the second view; reset drops the optimiser's
    state.
    """
    visits = []

    class Watching(Relabelling):
        def loss(self, outputs, targets, batch):
            visits.append(batch.index.clone())
            return super().loss(outputs, targets, batch)

    trainer = make(Watching(), epochs=2)
    sources = []
    original = trainer.loader.batches

    def watched(samples):
        samples = list(samples)
        sources.extend(each.sources for each in samples)
        return original(samples)

    trainer.loader.batches = watched
    trainer.fit()
    labels = trainer.head.labels
    last_pass = torch.cat(visits[4:])
    assert torch.equal(last_pass, torch.argsort(labels, stable=True).roll(7))
    for source in sources:
        assert torch.equal(source[1], (source[0] - 1) % 60)
    weight = trainer.head.get_parameter("layer.weight")
    assert int(trainer.stepper.optimizer.state[weight]["step"]) == 4 < trainer.num_steps
    assert (
        int(trainer.stepper.optimizer.state[trainer.network.backbone.body[0].weight]["step"])
        == trainer.num_steps
    )


def test_a_stop_inside_a_refresh_leaves_the_state_before_it():
    class Failing(Relabelling):
        def refresh(self, bank):
            super().refresh(bank)
            if self.memory.abs().sum() > 0:
                raise KeyboardInterrupt
            return Refresh(reset=("layer.weight",))

    saved = []
    hooks = Hooks(
        save=lambda state, progress: saved.append(copy.deepcopy(state)), save_every_steps=4
    )
    trainer = make(Failing(), hooks=hooks)
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 4
    assert digest_state(trainer.state_dict()) == digest_state(saved[-1])


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_a_bank_pass_changes_nothing(mode):
    trainer = make(Plain(), norm=True)
    trainer.network.train()
    before, rng = digest_state(trainer.state_dict()), torch.get_rng_state()
    bank = trainer.bank(BankSpec(mode=mode))
    assert torch.equal(bank.index, torch.arange(60)) and bank.features.shape == (60, 16)
    assert digest_state(trainer.state_dict()) == before and torch.equal(torch.get_rng_state(), rng)
    assert trainer.network.training
    part = trainer.bank(BankSpec(num_samples=10))
    assert len(part.index) == 10 and part.num_samples == 60
    torch.testing.assert_close(part.features, trainer.bank(BankSpec()).features[part.index])


def test_each_bank_pass_draws_its_views_anew_and_repeatably():
    trainer = make(Plain())
    first, again = (trainer.bank(BankSpec(mode="train", view="strong")).features for _ in range(2))
    trainer.step = 1
    assert torch.equal(first, again) and not torch.equal(
        first, trainer.bank(BankSpec("train", "strong")).features
    )


def test_evaluation_does_not_change_training():
    digests = []
    for looks in (False, True):
        hooks = Hooks()
        trainer = make(Plain(), norm=True, hooks=hooks)
        if looks:
            hooks.log = lambda metrics, progress, trainer=trainer: trainer.features()
        trainer.fit()
        digests.append(digest_state(trainer.state_dict()))
    assert digests[0] == digests[1]


@pytest.mark.parametrize("kind", TOYS)
@pytest.mark.parametrize("stop", [1, 4, 6])
def test_a_resumed_run_is_the_run_that_was_not_stopped(kind, stop):
    torch.manual_seed(0)
    whole = make(kind(), norm=True, ema=0.9)
    whole.fit()
    torch.manual_seed(0)
    saved = []
    hooks = Hooks(save=lambda state, progress: saved.append(copy.deepcopy(state)))
    broken = make(kind(), norm=True, ema=0.9, hooks=hooks)
    hooks.stop_requested = lambda: broken.step == stop
    with pytest.raises(Stopped):
        broken.fit()
    torch.manual_seed(99)
    resumed = make(kind(), norm=True, ema=0.9)
    resumed.load_state_dict(saved[-1])
    resumed.fit()
    assert digest_state(resumed.state_dict()) == digest_state(whole.state_dict())


@pytest.mark.parametrize("part", ["backbone", "head", "optimizer", "sampler", "teacher"])
def test_every_part_of_the_state_is_needed(part):
    """The proof that the test above can fail: with one part left as drawn, the resumed run is
    another one.
    """
    torch.manual_seed(0)
    whole = make(Relabelling(), norm=True, ema=0.9)
    saved = []
    whole.hooks.save = lambda state, progress: saved.append(copy.deepcopy(state))
    whole.hooks.save_every_steps = 3
    whole.fit()
    torch.manual_seed(99)
    resumed = make(Relabelling(), norm=True, ema=0.9)
    resumed.stepper.start_teacher()
    state = saved[0]
    own = resumed.state_dict()
    state[part] = {**own[part], "step": 3} if part == "sampler" else own[part]
    resumed.load_state_dict(state)
    resumed.fit()
    assert digest_state(resumed.state_dict()) != digest_state(whole.state_dict())


def test_the_best_sub_head_is_chosen_by_its_score():
    trainer = make(CrossHeads(), ema=0.9)
    trainer.fit()
    assert int(trainer.head.best) == int(trainer.eval_network.head.best) == 1


def test_a_backbone_at_learning_rate_zero_keeps_weights_and_statistics():
    trainer = make(Plain(), norm=True, optim=OptimSettings(backbone_lr=0.0))
    before = copy.deepcopy(trainer.network.backbone.state_dict())
    trainer.fit()
    for name, value in trainer.network.backbone.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_loss_that_is_not_finite_ends_the_run_in_words():
    class Broken(Plain):
        def loss(self, outputs, targets, batch):
            return {"loss": outputs[0].z.sum() * float("nan")}

    with pytest.raises(UserError, match=r"loss became nan at step 1.*optim\.lr"):
        make(Broken()).fit()


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_batches_without_any_gradient_change_nothing(precision):
    """Nobody is confident at first: float16's scaler, too, must let such steps pass."""

    class Later(Plain):
        losses = 0

        def loss(self, outputs, targets, batch):
            self.losses += 1
            losses = super().loss(outputs, targets, batch)
            return losses if self.losses > 3 else {"loss": losses["loss"].detach()}

    trainer, seen = make(Later(), precision=precision, epochs=1), []
    trainer.hooks = Hooks(
        log=lambda *_: seen.append(trainer.network.head.layer.weight.detach().clone())
    )
    trainer.fit()
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[2], seen[3])


def test_frozen_parameters_get_no_update():
    class Frozen(Plain):
        def frozen(self, progress):
            return ("layer.weight",) if progress.step < 2 else ()

    trainer = make(Frozen(), epochs=1, max_steps=2)
    before = trainer.head.layer.weight.clone()
    trainer.fit()
    assert torch.equal(trainer.head.layer.weight, before)
    assert not torch.equal(trainer.head.layer.bias, torch.zeros(4))


def test_workers_and_device_visit_the_same_samples_in_the_same_order():
    visits = Counter()
    orders = []
    for engine, workers in (("device", 0), ("workers", 0), ("workers", 2)):
        index = []

        class Watching(Plain):
            def loss(self, outputs, targets, batch, index=index):
                index.append(batch.index.clone())
                return super().loss(outputs, targets, batch)

        torch.manual_seed(0)
        trainer = make(Watching(), epochs=1, views=engine, num_workers=workers)
        trainer.fit()
        orders.append(torch.cat(index))
        visits.update(orders[-1].tolist())
    assert torch.equal(orders[0], orders[1]) and torch.equal(orders[1], orders[2])
    assert set(visits.values()) == {3}


def test_views_of_workers_do_not_depend_on_their_number():
    pixels = []
    for workers in (0, 2):
        torch.manual_seed(0)
        trainer = make(Plain(), views="workers", num_workers=workers)
        pixels.append([batch.views[0] for batch in trainer.batches()])
    for first, second in zip(*pixels, strict=True):
        assert torch.equal(first, second)


def test_an_image_that_goes_bad_leaves_its_batch_smaller():
    images = toy_images()
    failures = []

    class Going(type(images)):
        def read(self, row):
            if row == 5:
                raise OSError("gone bad")
            return super().read(row)

    images.__class__ = Going
    hooks = Hooks(failure=lambda sample, reason: failures.append((sample, reason)))
    settings = TrainerSettings(
        epochs=1, batch_size=16, views="workers", num_workers=0, precision="float32"
    )
    trainer = Trainer(toy_backbone(), Plain(), images, TRANSFORMS, settings=settings, hooks=hooks)
    trainer.fit()
    assert failures == [(5, "gone bad")]
    assert trainer.step == trainer.num_steps


def test_the_references_moving_average_slows_the_student_and_pins_batch_statistics():
    """SCAN's code loads the average back after each step: steps (1 - ema) of the size, BatchNorm as
    at the start.
    """
    moves = []
    for mode, ema in (("teacher", None), ("reference", 0.9)):
        torch.manual_seed(1)
        optim = OptimSettings(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0)
        trainer = make(Pairwise(), norm=True, ema=ema, ema_mode=mode, optim=optim)
        trainer.prepare()
        start = copy.deepcopy(trainer.network.state_dict())
        trainer.train_step(next(trainer.batches()), trainer.progress())
        moves.append(
            {name: value - start[name] for name, value in trainer.network.state_dict().items()}
        )
    for name, value in moves[0].items():
        if "running" in name:
            assert value.abs().sum() > 0 and moves[1][name].abs().sum() == 0
        elif value.is_floating_point() and value.ndim > 1:
            torch.testing.assert_close(moves[1][name], 0.1 * value, atol=1e-7, rtol=1e-3)
