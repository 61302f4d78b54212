"""SwAV against its equations in float64, its queue against a plain list, and micro batches against
one batch.
"""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.views.transform import build_views
from deepclust.errors import Advice, UserError
from deepclust.heads import Output
from deepclust.heads.base import Bank, Batch, Progress
from deepclust.heads.common.prototypes import Prototypes
from deepclust.heads.common.queue import FeatureQueue
from deepclust.heads.swav import SwAV, power_law, swapped_prediction_loss
from deepclust.training.trainer import Trainer
from tests.toys import toy_backbone, toy_images

VIEWS = {
    "clean": [],
    "global": [{"random_affine": {"degrees": 15}}],
    "local": {"size": 0.75, "ops": [{"random_resized_crop": {"scale": [0.4, 0.7]}}]},
}


def progress(step: int = 0, epoch: int = 0, num_images: int = 400) -> Progress:
    return Progress(step, 100, epoch, 4, 0, num_images)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1)


def head(**settings) -> SwAV:
    torch.manual_seed(0)
    return SwAV(
        16, 4, **{"num_prototypes": [6, 9], "hidden_dim": 12, "embedding_dim": 8, **settings}
    )


def loss_by_hand(codes, logits):
    """SwAV, equations 2 and 6, crop by crop, sample by sample, in float64."""
    total = 0.0
    for assigned, code in enumerate(codes):
        others = [each for crop, each in enumerate(logits) if crop != assigned]
        for each in others:
            for q, s in zip(code.double(), each.double()):
                p = s.exp() / s.exp().sum()
                total += -float((q * p.log()).sum()) / (len(codes) * len(others) * len(code))
    return total


def codes_by_hand(scores, epsilon, num_iters, marginal=None):
    """The balanced assignment in the linear domain in float64: columns, then rows, ending on rows
    that sum to 1.
    """
    q = (scores.double() / epsilon).exp()
    q = q / q.sum()
    marginal = (
        torch.full((q.shape[1],), 1 / q.shape[1]).double()
        if marginal is None
        else marginal.double()
    )
    for _ in range(num_iters):
        q = q / q.sum(0) * marginal
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)


@pytest.mark.parametrize(("assigned", "crops"), [(2, 2), (2, 6), (3, 3), (1, 4)])
def test_the_loss_is_the_papers_equation(assigned, crops):
    torch.manual_seed(0)
    logits = [3 * torch.randn(5, 7) for _ in range(crops)]
    codes = [torch.randn(5, 7).softmax(1) for _ in range(assigned)]
    assert float(swapped_prediction_loss(codes, logits)) == pytest.approx(
        loss_by_hand(codes, logits), rel=1e-5
    )


def test_closed_forms_of_the_loss():
    """Equal scores give ln K whatever the codes; sure and right predictions give 0; no gradient
    reaches the codes.
    """
    codes = [F.one_hot(torch.arange(7), 7).float()] * 2
    assert float(swapped_prediction_loss(codes, [torch.zeros(7, 7)] * 4)) == pytest.approx(
        math.log(7), rel=1e-6
    )
    assert float(swapped_prediction_loss(codes, [200 * torch.eye(7)] * 4)) == pytest.approx(
        0, abs=1e-6
    )


@pytest.mark.parametrize("marginal", ["uniform", 0.7, [0.1, 0.2, 0.3, 0.1, 0.1, 0.2]])
def test_codes_are_balanced_by_any_column_marginal(marginal):
    model = head(num_prototypes=[6], marginal=marginal, epsilon=0.1, num_iters=4)
    embeddings = [unit(20, 8, seed=seed) for seed in (1, 2)]
    targets = model.targets(
        {n: Output(e, e) for n, e in enumerate(embeddings)}, Batch(torch.arange(20), progress())
    )
    shares = {"uniform": torch.full((6,), 1 / 6)}.get(str(marginal))
    if shares is None:
        shares = power_law(6, marginal) if isinstance(marginal, float) else torch.tensor(marginal)
    for crop, embedding in enumerate(embeddings):
        scores = embedding @ model.prototypes.sets[0].detach().T
        expected = codes_by_hand(scores, 0.1, 4, shares)
        torch.testing.assert_close(targets[f"codes{crop}"].double(), expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(targets[f"codes{crop}"].mean(0), shares, atol=0.05, rtol=0)
    ratio = power_law(6, 2.0)
    torch.testing.assert_close(ratio[0] / ratio[2], torch.tensor(9.0))


def test_a_full_queue_joins_the_balance_with_todays_prototypes():
    model, batches = (
        head(queue_length=24, queue_from=0.25),
        [[unit(8, 8, seed=10 * b + c) for c in (0, 1)] for b in range(6)],
    )
    for number, embeddings in enumerate(batches):
        outputs = {crop: Output(e, e) for crop, e in enumerate(embeddings)}
        with torch.no_grad():
            for each in model.prototypes.sets:
                each.copy_(unit(*each.shape, seed=100 + number))
        targets = model.targets(
            outputs, Batch(torch.arange(8), progress(number, epoch=0 if number < 1 else 1))
        )
        stored = batches[max(1, number - 3) : number] if number >= 4 else []
        for crop in (0, 1):
            together = torch.cat([*(batch[crop] for batch in stored), embeddings[crop]])
            expected = [
                codes_by_hand(together @ p.detach().T, 0.05, 3)[-8:] for p in model.prototypes.sets
            ]
            torch.testing.assert_close(
                targets[f"codes{crop}"].double(), torch.cat(expected, 1), atol=1e-4, rtol=1e-3
            )
    assert int(model.queue.count) == 40, "nothing is stored before its share of training"


def test_the_queue_holds_the_last_rows_whatever_the_batches():
    queue, plain = FeatureQueue(2, 10, 3), [[], []]
    for number, size in enumerate((4, 3, 7, 12, 1, 0, 9)):
        features = [torch.randn(size, 3), torch.randn(size, 3)]
        queue.push(features)
        plain = [[*kept, *new][-10:] for kept, new in zip(plain, features)]
        assert queue.full == (number >= 2)
        for plane in (0, 1):
            held = queue.rows[plane][queue.serial.argsort()][-len(plain[plane]) :]
            assert torch.equal(held, torch.stack(plain[plane]))
            assert len(queue.held(plane)) == len(plain[plane])


def test_prototypes_have_length_one_in_each_forward_and_the_bare_gradient():
    prototypes, x = Prototypes(8, [5], 0.5), unit(7, 8)
    prototypes.sets[0].data.mul_(torch.linspace(0.5, 2, 5)[:, None])
    expected = F.normalize(prototypes.sets[0].detach(), dim=1)
    with torch.no_grad():
        torch.testing.assert_close(prototypes(x)[0], x @ expected.T / 0.5)
    assert not torch.allclose(prototypes.sets[0].detach(), expected), "a pass changes nothing"
    prototypes(x)[0][:, 2].sum().backward()
    torch.testing.assert_close(prototypes.sets[0].detach(), expected)
    torch.testing.assert_close(prototypes.sets[0].grad[2], x.sum(0) / 0.5)
    before = prototypes.sets[0].detach().clone()
    prototypes(x)
    assert torch.equal(before, prototypes.sets[0].detach()), "twice changes nothing more"


def trainer(model, *, images=None, optim=None, backbone=None, world=None, **settings) -> Trainer:
    images = images or toy_images()
    transforms = build_views({"size": None, "views": VIEWS}, images, list(VIEWS))
    settings = {
        "epochs": 2,
        "batch_size": 20,
        "precision": "float32",
        "log_every_steps": 1,
        **settings,
    }
    made = TrainerSettings(**settings)
    return Trainer(
        backbone or toy_backbone(),
        model,
        images,
        transforms,
        settings=made,
        optim=optim or OptimSettings(),
        world=world,
    )


def test_prototypes_are_frozen_for_the_first_steps_decay_included():
    model = head(freeze_steps=2)
    run = trainer(model, optim=OptimSettings(name="sgd", lr=0.1, weight_decay=0.1))
    seen = [model.prototypes.sets[0].detach().clone()]
    batches = run.batches()
    for _ in range(3):
        run.train_step(next(batches), run.progress())
        run.step += 1
        seen.append(model.prototypes.sets[0].detach().clone())
    torch.testing.assert_close(seen[0], seen[2], atol=1e-6, rtol=0)
    assert not torch.allclose(seen[2], seen[3], atol=1e-4)


def test_codes_are_hard_for_the_first_steps():
    model, x = head(hard_steps=3), unit(20, 8)
    codes = [
        model.targets({0: Output(x, x), 1: Output(x, x)}, Batch(torch.arange(20), progress(step)))[
            "codes0"
        ]
        for step in (2, 3)
    ]
    assert torch.equal(codes[0].unique(), torch.tensor([0.0, 1.0])) and len(codes[1].unique()) > 2
    assert torch.equal(codes[0][:, :6].argmax(1), codes[1][:, :6].argmax(1))


def test_eight_micro_batches_of_32_give_the_codes_and_the_gradient_of_one_batch_of_256():
    """`step_per=macro`, a network without batch statistics, the queue in use."""
    images, found = toy_images(512), []
    for micro in (1, 8):
        model = head(num_prototypes=[20], batch_norm=False, queue_length=256, num_local=1)
        model.queue.push([unit(256, 8, seed=seed) for seed in (5, 6)])
        optim = OptimSettings(
            name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant"
        )
        body = toy_backbone(seed=3)
        body.body[4] = torch.nn.LazyLinear(16)
        torch.manual_seed(4)
        body.body[3] = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(4), torch.nn.Flatten())
        body(torch.zeros(1, 1, 8, 8))
        run = trainer(
            model, images=images, optim=optim, backbone=body, batch_size=256, micro_batches=micro
        )
        codes, original = [], model.targets
        model.targets = lambda *given, made=codes, first=original: (
            made.append(first(*given)) or made[-1]
        )
        before = {name: value.detach().clone() for name, value in run.network.named_parameters()}
        run.train_step(next(run.batches()), run.progress())
        moved = {
            name: before[name] - value.detach() for name, value in run.network.named_parameters()
        }
        found.append((codes[0], moved, model.queue.rows.clone()))
    (codes, moved, queue), (micro_codes, micro_moved, micro_queue) = found
    assert codes["codes0"].shape == (256, 20)
    for name in codes:
        torch.testing.assert_close(micro_codes[name], codes[name], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(micro_queue, queue, atol=1e-6, rtol=0)
    assert max(float(value.abs().max()) for value in moved.values()) > 1e-3
    for name in moved:
        torch.testing.assert_close(micro_moved[name], moved[name], atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("engine", ["device", "workers"])
def test_crops_of_one_size_go_through_the_backbone_together(engine):
    from deepclust.backbones import small_convnet

    model = SwAV(32, 4, num_prototypes=[4], num_global=2, num_local=3)
    assert [view.augment for view in model.views] == ["global"] * 2 + ["local"] * 3
    assert [view.used_for for view in model.views] == ["both"] * 2 + ["loss"] * 3
    run = trainer(model, backbone=small_convnet(1, 8, width=8), views=engine, num_workers=0)
    shapes, calls = [], []
    run.network.backbone.register_forward_pre_hook(
        lambda _, given: shapes.append(tuple(given[0].shape))
    )
    for name, transform in run.transforms.items():
        first = transform.batch
        transform.batch = lambda *given, name=name, first=first: calls.append(name) or first(*given)
    run.train_step(next(run.batches()), run.progress())
    assert shapes == [(40, 1, 8, 8), (60, 1, 6, 6)]
    assert calls == (["global", "local"] if engine == "device" else [])


def test_a_worker_reads_an_image_once_for_all_its_crops():
    reads = []

    class Counting(type(toy_images())):
        def read(self, row):
            reads.append(row)
            return super().read(row)

    images = toy_images(20)
    images.__class__ = Counting
    run = trainer(head(num_local=2), images=images, views="workers", num_workers=0)
    next(run.batches())
    assert sorted(reads) == list(range(20))


def test_larger_sets_are_grouped_into_clusters_and_the_tightest_set_is_chosen():
    """Nine prototypes in four bundles become four clusters: the sum of their probabilities, one to
    one with bundles.
    """
    model = head(num_prototypes=[4, 9]).eval()
    bundles = torch.tensor([0, 0, 0, 1, 1, 2, 2, 3, 3])
    axes = torch.eye(8)[:4]
    near = F.normalize(axes[bundles] + 0.05 * torch.randn(9, 8), dim=1)
    with torch.no_grad():
        model.prototypes.sets[1].copy_(near)
        model.projector = torch.nn.Linear(16, 8, bias=False)
        model.projector.weight.copy_(torch.eye(8, 16))
    z = F.normalize(axes.repeat(10, 1) + 0.05 * torch.randn(40, 8), dim=1)
    z = torch.cat([z, torch.zeros(40, 8)], dim=1)
    assert model.bank_due(Progress(5, 5, 1, 1, 0, 100, final=True)).of == "z"
    asked = model.refresh(Bank(z, torch.arange(40), 40))
    assert asked.reset == ("groups1",)
    pairs = set(zip(model.groups1.tolist(), bundles.tolist()))
    assert len(pairs) == 4 and torch.equal(model.groups0, torch.arange(4))
    scores = model.score(Bank(z, torch.arange(40), 40))
    assert scores.argmin() == 1
    model.best.fill_(1)
    probabilities = model.predict(z)
    assert probabilities.shape == (40, 4)
    torch.testing.assert_close(probabilities.sum(1), torch.ones(40))
    assert len(set(zip(probabilities.argmax(1).tolist(), [0, 1, 2, 3] * 10))) == 4
    assert head(num_prototypes=[4]).bank_due(Progress(5, 5, 1, 1, 0, 100, final=True)) is None


def test_the_teacher_gets_the_groups_too():
    run = trainer(head(), ema=0.9)
    run.fit()
    assert torch.equal(run.stepper.teacher.head.groups1, run.head.groups1)
    assert not torch.equal(run.head.groups1, torch.arange(9) % 4)


def test_a_pretexts_projector_is_taken_over_where_it_fits():
    from deepclust.heads.simclr import SimCLR

    torch.manual_seed(5)
    pretext, model = SimCLR(16, hidden_dim=12, embedding_dim=8), head()
    model.init_from(pretext)
    assert torch.equal(model.projector[0].weight, pretext.projector[0].weight)
    model.init_from(SimCLR(16, hidden_dim=13, embedding_dim=8))
    assert torch.equal(model.projector[0].weight, pretext.projector[0].weight)


@pytest.mark.parametrize(
    "settings", [{"precision": "bfloat16"}, {"ema": 0.9}, {"ema": 0.9, "micro_batches": 3}]
)
def test_codes_and_queue_are_sound_under_autocast_and_with_a_teacher(settings):
    model = head(queue_length=50, freeze_steps=2)
    trainer(model, **settings).fit()
    held = model.queue.held(0)
    assert len(held) == 50 and held.dtype == torch.float32
    torch.testing.assert_close(held.norm(dim=1), torch.ones(50))


# ------------------------------------------------------------------------------------------- wo


def test_fewer_images_than_prototypes_are_refused_and_too_few_rows_are_told():
    with pytest.raises(UserError, match=r"num_prototypes=\[6, 100\].*60 images.*\[4\]"):
        trainer(head(num_prototypes=[6, 100])).fit()
    with pytest.warns(
        Advice, match=r"20 images and a queue of 0.*over 50 prototypes.*queue_length=100"
    ):
        trainer(head(num_prototypes=[50]), epochs=1).fit()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Advice)
        trainer(head(num_prototypes=[50], queue_length=40), epochs=1).fit()


def test_features_that_are_not_of_length_one_are_refused_in_words():
    for embedding in (3 * unit(8, 8), torch.full((8, 8), math.nan)):
        with pytest.raises(UserError, match=r"length one.*Normalise"):
            head().targets(
                {n: Output(embedding, embedding) for n in (0, 1)},
                Batch(torch.arange(8), progress(1)),
            )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"marginal": [0.5, 0.5]}, "6 shares"),
        ({"num_global": 1}, "at least two crops"),
        ({"num_prototypes": []}, "at least one number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        head(**settings)


def test_a_collapsed_loss_is_the_logarithm_that_the_alarm_knows():
    """All images alike: the loss is ln K of the sets, and it is logged beside it."""
    model = head()
    same = unit(1, 16).repeat(12, 1).requires_grad_()
    model.eval()
    with torch.no_grad():
        for each in model.prototypes.sets:
            each.copy_(each[:1].expand_as(each))
    outputs = {crop: model(same, crop) for crop in (0, 1)}
    targets = model.targets(
        {n: o.detach() for n, o in outputs.items()}, Batch(torch.arange(12), progress(1))
    )
    figures = model.loss(outputs, targets, Batch(torch.arange(12), progress(1)))
    expected = (math.log(6) + math.log(9)) / 2
    for name in ("cross_entropy", "ln_k", "entropy"):
        assert float(figures[name].detach()) == pytest.approx(expected, rel=1e-4), name


# ------------------------------------------------------------------------------------------- st


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_run_that_goes_on_ends_the_same(stop):
    """Queue, prototypes and groups are in the state; stops inside an epoch and between two."""
    settings = {"epochs": 3, "ema": 0.9}
    whole = trainer(head(queue_length=30, num_local=1), backbone=_convnet(), **settings)
    whole.fit()
    first = trainer(
        head(queue_length=30, num_local=1), backbone=_convnet(), max_steps=stop, **settings
    )
    first.fit()
    state = copy.deepcopy(first.state_dict())
    second = trainer(head(queue_length=30, num_local=1), backbone=_convnet(), **settings)
    second.load_state_dict(state)
    second.fit()
    for mine, theirs in (
        (second.network, whole.network),
        (second.eval_network, whole.eval_network),
    ):
        for name, value in theirs.state_dict().items():
            assert torch.equal(value, mine.state_dict()[name]), name


def _convnet():
    from deepclust.backbones import small_convnet

    torch.manual_seed(7)
    return small_convnet(1, 8, width=4)
