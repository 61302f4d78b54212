"""MoCo: its loss against torch's, its queue as a queue, its teacher, ranks and resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.views.transform import build_views
from deepclust.errors import UserError
from deepclust.heads.base import Batch, Progress, Targets
from deepclust.heads.moco import MoCo, moco_loss
from deepclust.runtime.checkpoint import digest_state
from deepclust.runtime.distributed import World
from deepclust.training.trainer import Hooks, Stopped, Trainer
from tests.ranks import run_ranks
from tests.runs import outcome, small_run, stop_at
from tests.toys import toy_backbone, toy_images

VIEWS = {"clean": [], "simclr": [{"pixel_noise": {"std": 0.1}}]}


def unit(*shape: int) -> torch.Tensor:
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


def test_the_loss_is_cross_entropy_on_explicit_logits():
    torch.manual_seed(0)
    queries, keys, queue = 3 * torch.randn(5, 7, dtype=torch.float64), unit(5, 7), unit(11, 7)
    rows = []
    for query, key in zip(queries, keys):
        query = query / query.norm()
        rows.append(torch.stack([query @ key, *(query @ old for old in queue)]) / 0.07)
    wanted = F.cross_entropy(torch.stack(rows), torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(moco_loss(queries, keys, queue, temperature=0.07), wanted)


def test_closed_forms():
    """All vectors equal: ln(L + 1). Key equal, queue orthogonal: known too."""
    ones = F.normalize(torch.ones(4, 6), dim=1)
    assert float(moco_loss(ones, ones, ones)) == pytest.approx(math.log(5), rel=1e-6)
    eye = torch.eye(6)
    wanted = math.log(math.exp(2) + 3) - 2
    assert float(moco_loss(eye[:2], eye[:2], eye[3:], temperature=0.5)) == pytest.approx(
        wanted, rel=1e-6
    )


def batch_with(keys: torch.Tensor, **more: torch.Tensor) -> Batch:
    about = Batch(torch.arange(len(keys)), Progress(0, 10, 0, 1, 0, 100))
    about.targets = Targets(key1=keys, **more)
    return about


def test_the_queue_holds_the_newest_keys():
    torch.manual_seed(0)
    head = MoCo(4, embedding_dim=3, queue_size=10, symmetric=False)
    begun, pushed = head.queue.clone(), []
    torch.testing.assert_close(begun.norm(dim=1), torch.ones(10))
    for size in (4, 4, 4, 1, 7, 10, 13, 3):
        pushed.append(F.normalize(torch.randn(size, 3), dim=1))
        head.after_step({}, batch_with(pushed[-1]))
        newest = torch.cat([begun, *pushed])[-10:]
        assert {tuple(row) for row in head.queue.tolist()} == {
            tuple(row) for row in newest.tolist()
        }
    assert head.queue.shape == (10, 3)


def test_both_keys_of_a_symmetric_step_enter():
    head = MoCo(4, embedding_dim=3, queue_size=10)
    first, second = F.normalize(torch.randn(2, 3), dim=1), F.normalize(torch.randn(2, 3), dim=1)
    head.after_step({}, batch_with(second, key0=first))
    assert torch.equal(head.queue[:4], torch.cat([first, second]))


def test_each_view_may_have_a_queue_of_its_own():
    """MoCo v2+: queries of a view are held against earlier keys of the other view; the oldest of
    each fall out.
    """
    torch.manual_seed(0)
    head = MoCo(4, embedding_dim=3, queue_size=5, batch_norm=False, separate_queues=True)
    assert head.queue.shape == (2, 5, 3)
    torch.testing.assert_close(head.queue.norm(dim=2), torch.ones(2, 5))
    pushed = [[], []]
    for size in (2, 2, 7, 3):
        keys = [F.normalize(torch.randn(size, 3), dim=1) for _ in range(2)]
        for view in (0, 1):
            pushed[view].append(keys[view])
        head.after_step({}, batch_with(keys[1], key0=keys[0]))
    for view in (0, 1):
        newest = torch.cat(pushed[view])[-5:]
        assert {tuple(row) for row in head.queue[view].tolist()} == {
            tuple(row) for row in newest.tolist()
        }
    z = [torch.randn(6, 4) for _ in range(2)]
    outputs = {view: head(z[view], view) for view in (0, 1)}
    keys = {f"key{view}": F.normalize(torch.randn(6, 3), dim=1) for view in (0, 1)}
    found = head.loss(outputs, Targets(**keys), batch_with(keys["key1"]))["loss"]
    wanted = [
        moco_loss(
            outputs[query].embedding,
            keys[f"key{1 - query}"],
            head.queue[1 - query],
            temperature=0.2,
        )
        for query in (0, 1)
    ]
    torch.testing.assert_close(found, (wanted[0] + wanted[1]) / 2)
    with pytest.raises(ValueError, match="separate_queues=true"):
        MoCo(4, symmetric=False, separate_queues=True)


def make(head: MoCo, hooks: Hooks | None = None, world: World | None = None, **settings) -> Trainer:
    images = toy_images(42)
    views = build_views({"size": None, "views": VIEWS}, images, list(VIEWS))
    values = TrainerSettings(**{"epochs": 2, "batch_size": 21, "precision": "float32", **settings})
    optim = OptimSettings(name="sgd", lr=0.5, momentum=0.0, weight_decay=0.0, schedule="constant")
    return Trainer(
        toy_backbone(), head, images, views, settings=values, optim=optim, hooks=hooks, world=world
    )


def make_head(**more) -> MoCo:
    torch.manual_seed(1)
    return MoCo(16, hidden_dim=12, embedding_dim=8, queue_size=50, batch_norm=False, **more)


@pytest.mark.parametrize("symmetric", [True, False])
def test_keys_come_from_the_teacher_which_follows_without_being_asked_for(symmetric):
    trainer = make(make_head(symmetric=symmetric))
    trainer.prepare()
    stepper = trainer.stepper
    assert trainer.settings.ema is None and stepper.decay == 0.99 and stepper.teacher is not None
    with torch.no_grad():
        for parameter in stepper.teacher.parameters():
            parameter.mul_(-1.5)
    teacher = copy.deepcopy(stepper.teacher)
    batch = next(trainer.batches())
    trainer.train_step(batch, trainer.progress())
    with torch.no_grad():
        wanted = [
            F.normalize(teacher.outputs({1: view})[1].embedding, dim=1)
            for view in batch.views.values()
        ]
    keys = torch.cat(wanted if symmetric else wanted[1:])
    torch.testing.assert_close(trainer.head.queue[: len(keys)], keys)
    assert make(make_head(), ema=0.5).stepper.decay == 0.5
    with pytest.raises(
        UserError, match=r"trainer.ema_mode=reference: MoCo needs .* use ema_mode=teacher"
    ):
        make(make_head(), ema=0.9, ema_mode="reference")


def two_steps(rank: int, size: int) -> list[dict[str, torch.Tensor]]:
    import torch.distributed as dist

    world = World(rank, size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    states = []
    for more, micro in (
        ({}, 1),
        ({"symmetric": False}, 1),
        ({}, 3),
        ({"separate_queues": True}, 1),
    ):
        trainer = make(make_head(**more), world=world, max_steps=2, micro_batches=micro)
        trainer.fit()
        states.append(dict(trainer.network.state_dict()))
    return states


def test_two_ranks_are_one():
    """21 rows do not divide by 2; two steps, so that the second sees the first's keys in its queue."""
    alone, together = two_steps(0, 1), run_ranks(two_steps, 2)
    for case, wanted in enumerate(alone):
        for found in together:
            for key, value in wanted.items():
                torch.testing.assert_close(
                    found[case][key], value, atol=1e-5, rtol=1e-5, msg=f"{case}: {key}"
                )
        assert torch.equal(together[0][case]["head.queue"], together[1][case]["head.queue"])


def test_a_stopped_stage_goes_on_bit_for_bit_with_its_queue():
    whole, saved = make(make_head()), {}
    whole.fit()
    looks = iter(range(10))
    hooks = Hooks(
        save=lambda state, _: saved.update(copy.deepcopy(state)),
        stop_requested=lambda: next(looks) == 2,
    )
    with pytest.raises(Stopped):
        make(make_head(), hooks).fit()
    resumed = make(MoCo(16, hidden_dim=12, embedding_dim=8, queue_size=50, batch_norm=False))
    resumed.load_state_dict(saved)
    assert resumed.step == 3
    resumed.fit()
    assert digest_state(resumed.state_dict()) == digest_state(whole.state_dict())


def test_it_may_be_a_recipes_pretext_and_a_run_goes_on_exactly(tmp_path, monkeypatch):
    more = ("head@stages.pretext.head=moco", "stages.pretext.head.queue_size=50")
    assert small_run(tmp_path / "whole", *more) == 0
    stop_at(monkeypatch, 4)
    assert small_run(tmp_path / "stopped", *more) == 143
    monkeypatch.undo()
    assert small_run(tmp_path / "stopped", *more) == 0
    assert outcome(tmp_path / "stopped") == outcome(tmp_path / "whole")
