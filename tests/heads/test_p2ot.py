"""P2OT and SP2OT: their memory, ramp and graph, against closed forms; two ranks are one; a stop
changes nothing.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from sklearn.metrics.pairwise import rbf_kernel
from torch import Tensor

from deepclust.config.load import load
from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.features import from_features
from deepclust.data.views.transform import build_views
from deepclust.heads.base import Bank, Batch, Output, Progress
from deepclust.heads.p2ot import P2OT, p2ot_loss
from deepclust.heads.sp2ot import SP2OT
from deepclust.ops import partial_transport
from deepclust.runtime.checkpoint import digest_state
from deepclust.runtime.distributed import World
from deepclust.training.trainer import Stopped, Trainer
from tests.ranks import run_ranks

DIM, K, N = 6, 3, 40
HEADS: dict[str, type[P2OT]] = {"p2ot": P2OT, "sp2ot": SP2OT}


def make(name: str = "p2ot", **settings: Any) -> P2OT:
    torch.manual_seed(0)
    if name == "sp2ot":
        settings.setdefault("num_neighbors", 4)
    return HEADS[name](DIM, K, N, **{"memory_size": 24, "num_heads": 2, **settings})


def rows(seed: int = 0, count: int = N) -> Tensor:
    """Features of three groups of very different size."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.tensor([0] * 26 + [1] * 9 + [2] * 5)[:count]
    return 2 * torch.eye(DIM)[group] + 0.4 * torch.randn(count, DIM, generator=generator)


def at(step: int, num_steps: int = 10) -> Progress:
    return Progress(step, num_steps, step * 2 // num_steps, 2, 0, 2 * N)


def see(head: P2OT, index: Tensor, step: int = 1) -> tuple[dict[int, Output], Any]:
    """Outputs of two views of these samples, and their targets."""
    outputs = {view: head(rows(view)[index], view) for view in (0, 1)}
    with torch.no_grad():
        return outputs, head.targets(
            {n: out.detach() for n, out in outputs.items()}, Batch(index, at(step))
        )


def trainer(name: str, world: World | None = None, **settings: Any) -> Trainer:
    data = from_features(rows()).train
    views = build_views(
        {"views": {"clean": [], "weak": [{"feature_noise": {"std": 0.2}}]}}, data, ["clean", "weak"]
    )
    torch.manual_seed(1)
    body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(DIM, DIM))
    made = TrainerSettings(epochs=2, batch_size=14, precision="float32", channels_last=False)
    optim = OptimSettings(name="sgd", lr=0.2, weight_decay=0.0)
    return Trainer(
        body, make(name, **settings), data, views, settings=made, optim=optim, world=world
    )


# --- losses and plans


def test_the_loss_is_the_swapped_cross_entropy_with_rows_as_they_are() -> None:
    first, second = torch.randn(2, 5, K, dtype=torch.float64)
    plans = torch.rand(2, 5, K, dtype=torch.float64) / 4
    expected = sum(
        -(q * (x - x.logsumexp(1, True))).sum() / 5
        for x, q in ((first, plans[1]), (second, plans[0]))
    )
    torch.testing.assert_close(p2ot_loss(first, second, plans[0], plans[1]), expected)
    torch.testing.assert_close(p2ot_loss(first, second, plans[0] / 2, plans[1] / 2), expected / 2)


def test_plans_are_those_of_the_batch_alone_while_there_is_no_memory() -> None:
    head, index = make(), torch.arange(12)
    outputs, targets = see(head, index)
    for view, name in enumerate(("first", "second")):
        for number, logits in enumerate(outputs[view].logits):
            expected = partial_transport(logits.detach(), mass=head.mass(at(1)), tol=1e-9)
            torch.testing.assert_close(targets[name][:, number], expected.plan, atol=2e-5, rtol=0)
    assert (head.memory_index == -1).all(), (
        "a memory is filled by a bank, not by what happens to come"
    )


@pytest.mark.parametrize(
    ("settings", "mass"), [({"kl_weight": math.inf}, None), ({"mass_start": 1.0}, 1.0)]
)
def test_variants_hard_and_unbalanced(settings: dict[str, float], mass: float | None) -> None:
    head = make(**settings, num_heads=1)
    outputs, targets = see(head, torch.arange(N))
    plan = targets["first"][:, 0]
    if mass is None:
        share = head.mass(at(1))
        torch.testing.assert_close(plan.sum(0), torch.full((K,), N * share / K), rtol=1e-4, atol=0)
    else:
        torch.testing.assert_close(plan.sum(1), torch.ones(N))
        assert plan.sum(0).max() > 1.05 * N / K, "sizes may differ"
    losses = head.loss(outputs, targets, Batch(torch.arange(N), at(1)))
    assert float(losses["used"]) == pytest.approx(float(losses["mass"]), rel=1e-5)


def test_the_ramps() -> None:
    expected = {0: 0.106064, 250: 0.154049, 500: 0.357854, 750: 0.758454, 1000: 1.0}
    for step, share in expected.items():
        assert make().mass(at(step, 1000)) == pytest.approx(share, abs=1e-6)
        assert make(mass_shape="linear").mass(at(step, 1000)) == pytest.approx(
            0.1 + 0.9 * step / 1000
        )


# --- memory


def bank(index: Tensor, seed: int = 3) -> Bank:
    return Bank(rows(seed)[index], index, N)


def test_the_memory_holds_each_sample_once_with_its_last_logits() -> None:
    head = make()
    with torch.no_grad():
        head.refresh(bank(torch.arange(24)))
    assert head.memory_index.tolist() == list(range(24))
    index = torch.tensor([30, 3, 31, 7])
    outputs, targets = see(head, index)
    kept = [n for n in range(24) if n not in (3, 7)][:20]
    assert head.memory_index.tolist() == [30, 3, 31, 7, *kept], (
        "newest first, what is over is forgotten"
    )
    second = torch.stack(outputs[1].logits, 1).detach()
    torch.testing.assert_close(head.memory[:4], second)
    old = torch.stack(head.layer(rows(3)[torch.tensor(kept)]), 1).detach()
    torch.testing.assert_close(head.memory[4:], old)
    problem = torch.cat([second[:, 1], old[:, 1]])
    plan = partial_transport(problem, mass=head.mass(at(1)), tol=1e-9).plan[:4]
    torch.testing.assert_close(targets["second"][:, 1], plan, atol=2e-5, rtol=0)


def test_a_batch_larger_than_the_memory_and_no_memory_at_all() -> None:
    head = make(memory_size=5)
    with torch.no_grad():
        head.refresh(bank(torch.arange(5)))
    see(head, torch.arange(20, 32))
    assert head.memory_index.tolist() == list(range(20, 25))
    alone = make(memory_size=0)
    assert alone.bank_due(at(0)) is None
    assert see(alone, torch.arange(8))[1]["first"].shape == (8, 2, K)


def test_banks_are_due_when_the_memory_begins() -> None:
    for epoch, due in ((0, [0]), (1, [5])):
        head = make(memory_epoch=epoch)
        assert [step for step in range(10) if head.bank_due(at(step))] == due
    spec = make().bank_due(at(0))
    assert spec is not None and spec.num_samples == 24 and spec.view == "weak"
    semantic = make("sp2ot", memory_epoch=1)
    assert [step for step in range(10) if semantic.bank_due(at(step))] == [0, 5]


def test_sub_heads_are_compared_by_their_loss_over_the_share_used() -> None:
    head, expected = make(), torch.zeros(2)
    for step in (5, 6, 7):
        outputs, targets = see(head, torch.arange(step, step + 9), step)
        for number in (0, 1):
            pair = (outputs[0].logits[number], outputs[1].logits[number])
            plans = (targets["first"][:, number], targets["second"][:, number])
            expected[number] += float(p2ot_loss(*pair, *plans).detach()) / head.mass(at(step)) / 3
    torch.testing.assert_close(head.score(bank(torch.arange(N))).float(), expected)
    see(head, torch.arange(9), 0)
    assert head.pass_loss[-1] == 1, "a new pass begins anew"


# --- the graph of SP2OT


def test_the_graph_is_a_gaussian_kernel_cut_to_the_nearest() -> None:
    head = make("sp2ot", num_neighbors=4, bandwidth=0.5)
    assert isinstance(head, SP2OT)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        head.refresh(Bank(rows()[order], order, N))
    kernel = torch.from_numpy(
        rbf_kernel(rows().double(), gamma=1 / (2 * 0.5**2 * DIM))
    ).fill_diagonal_(0)
    values, columns = kernel.topk(4, dim=1)
    expected = torch.zeros_like(kernel).scatter_(1, columns, values)
    torch.testing.assert_close(
        head.among(torch.arange(N)).to_dense().double(), expected, atol=1e-5, rtol=0
    )
    some = torch.tensor([5, 39, 0, 12, 13, 2])
    torch.testing.assert_close(
        head.among(some).to_dense().double(), expected[some][:, some], atol=1e-5, rtol=0
    )
    assert (head.memory_index >= 0).all() and head.memory_index.unique().numel() == 24


def test_neighbours_pull_each_other_into_one_cluster_and_a_small_problem_does_not_collapse() -> (
    None
):
    plain, semantic = make(num_heads=1), make("sp2ot", num_heads=1, num_neighbors=8)
    with torch.no_grad():
        semantic.refresh(bank(torch.arange(N), 0))
    _, alone = see(plain, torch.arange(N), 5)
    _, pulled = see(semantic, torch.arange(N), 5)
    group = torch.tensor([0] * 26 + [1] * 9 + [2] * 5)

    def spread(plan: Tensor) -> float:
        parts = plan / plan.sum(1, keepdim=True).clamp_min(1e-12)
        return sum(float(parts[group == g].var(0).sum()) for g in range(3))

    assert spread(pulled["first"][:, 0]) < spread(alone["first"][:, 0])
    assert len(pulled["first"][:, 0].argmax(1).unique()) == K
    last = semantic.solve(torch.randn(N, K), torch.arange(N), 1.0, None)
    assert last.mass == pytest.approx(1.0), "at full mass the term has decayed to nothing"


# --- ranks and stops


def train_some(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    import torch.distributed as dist

    world = World(rank, size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    found = {}
    for name in HEADS:
        made = trainer(name, world)
        made.fit()
        found[name] = {key: value.detach() for key, value in made.network.state_dict().items()}
    return found


def test_two_ranks_with_unequal_rows_are_one() -> None:
    """40 samples in batches of 13 and 14, so 6 and 7 on two ranks, the memory of 24 filled from
    both; two passes.
    """
    alone = train_some(0, 1)
    for found in run_ranks(train_some, 2):
        for name, state in alone.items():
            for key, value in state.items():
                torch.testing.assert_close(found[name][key], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_a_stop_changes_not_a_bit(name: str) -> None:
    whole, part = trainer(name), trainer(name)
    whole.fit()
    states = []
    part.hooks.stop_requested = lambda: part.step == 4
    part.hooks.save = lambda state, progress: states.append(state)
    with pytest.raises(Stopped):
        part.fit()
    again = trainer(name)
    again.load_state_dict(states[0])
    assert again.step == 4 and bool(again.head.get_buffer("log_scale").any())
    again.fit()
    ends = [digest_state({"network": made.network.state_dict()}) for made in (again, whole)]
    assert ends[0] == ends[1]


# --- presets


def test_the_papers_presets_train_the_last_block_alone() -> None:
    from deepclust.backbones import timm_backbone

    for name in (
        "p2ot_cifar100_lt",
        "p2ot_imagenet_r",
        "p2ot_inature100",
        "p2ot_inature500",
        "p2ot_inature1000",
    ):
        preset = load([f"experiment={name}"])
        stage = preset.stages["main"]
        assert (stage.trainer.batch_size, stage.trainer.epochs, stage.optim.lr) == (512, 50, 5e-4)
        assert stage.head["num_heads"] == (2 if name == "p2ot_cifar100_lt" else 1)
    freeze = load(["experiment=p2ot_cifar100_lt"]).backbone["freeze"]
    backbone = timm_backbone(3, name="vit_tiny_patch16_224", freeze=freeze)
    trained = {
        name.split(".norm")[0] for name, p in backbone.body.named_parameters() if p.requires_grad
    }
    assert trained and all(name.startswith("blocks.11") for name in trained)
