"""Heads that learn from neighbours on frozen features: losses against float64, what they find,
ranks, stops.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from deepclust.config.build import build
from deepclust.config.load import load
from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.features import from_features
from deepclust.data.views.transform import build_views
from deepclust.eval import clustering_scores
from deepclust.heads.base import Bank, Batch, Head, Output, Progress
from deepclust.heads.neighbor_prototypes import NeighborPrototypes
from deepclust.heads.temi import TEMI, Perceptrons, temi_loss
from deepclust.ops import sinkhorn
from deepclust.runtime.checkpoint import digest_state
from deepclust.runtime.distributed import World
from deepclust.training.trainer import Stopped, Trainer
from tests.ranks import run_ranks

DIM, K, N = 6, 3, 41
GROUP = torch.tensor([0] * 23 + [1] * 11 + [2] * 7)
HEADS: dict[str, dict[str, Any]] = {
    "temi": {
        "num_heads": 3,
        "num_neighbors": 4,
        "hidden_dim": 16,
        "bottleneck_dim": 8,
        "standardize": True,
    },
    "prototypes": {"num_heads": 2, "num_neighbors": 4, "init": ["kmeans", "spectral"]},
}


def rows(group: Tensor = GROUP) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return 2 * torch.eye(DIM)[group] + 0.4 * torch.randn(N, DIM, generator=generator)


def make(name: str, **settings: Any) -> Head:
    torch.manual_seed(0)
    node = {
        **load([f"head={name}", "recipe=single"]).stages["main"].head,
        **HEADS[name],
        **settings,
    }
    return build(node, dim=DIM, num_clusters=K, num_samples=N)


def trainer(
    name: str,
    world: World | None = None,
    *,
    frozen: bool = False,
    features: Tensor | None = None,
    optim: OptimSettings | None = None,
    **settings: Any,
) -> Trainer:
    data, head = from_features(rows() if features is None else features).train, make(name)
    views = build_views(
        load(["augment=features"]).stages["pretext"].augment, data, ["clean", "strong"]
    )
    torch.manual_seed(1)
    layers = [torch.nn.Flatten()] if frozen else [torch.nn.Flatten(), torch.nn.Linear(DIM, DIM)]
    made = TrainerSettings(
        **{
            "epochs": 2,
            "batch_size": 14,
            "precision": "float32",
            "channels_last": False,
            **settings,
        }
    )
    optim = optim or OptimSettings(name="sgd", lr=0.2, weight_decay=0.0)
    return Trainer(
        torch.nn.Sequential(*layers), head, data, views, settings=made, optim=optim, world=world
    )


def batch(index: Tensor, step: int = 1) -> Batch:
    return Batch(index, Progress(step, 10, step // 5, 2, 0, 2 * N))


# --- TEMI


def temi_by_hand(
    students: list[Tensor], teachers: list[Tensor], prior: Tensor, beta: float
) -> Tensor:
    """The equation, sample by sample and head by head, on probabilities in float64."""
    num, heads, _ = students[0].shape
    losses = torch.zeros(num, heads, dtype=torch.float64)
    for i in range(num):
        weight = (
            sum(float((teachers[0][i, h] * teachers[1][i, h]).sum()) for h in range(heads)) / heads
        )
        for h in range(heads):
            for mine, other in ((0, 1), (1, 0)):
                ratio = ((students[mine][i, h] * teachers[other][i, h]) ** beta / prior[h]).sum()
                losses[i, h] -= 0.5 * weight * ratio.log()
    return losses


@pytest.mark.parametrize("beta", [0.6, 1.0])
def test_the_loss_of_temi_is_its_equation(beta: float) -> None:
    generator = torch.Generator().manual_seed(3)
    students, teachers = (
        [
            (3 * torch.randn(5, 4, K, generator=generator, dtype=torch.float64)).softmax(2)
            for _ in range(2)
        ]
        for _ in range(2)
    )
    prior = torch.rand(4, K, generator=generator, dtype=torch.float64)
    prior /= prior.sum(1, keepdim=True)
    expected = temi_by_hand(students, teachers, prior, beta)
    logs = [[p.log() for p in each] for each in (students, teachers)]
    losses, alike = temi_loss(*logs, prior, beta=beta)
    torch.testing.assert_close(losses, expected)
    plain, _ = temi_loss(*logs, prior, beta=beta, weighted=False)
    torch.testing.assert_close(losses, plain * alike[:, None])
    single, _ = temi_loss(*[[p.float() for p in each] for each in logs], prior.float(), beta=beta)
    torch.testing.assert_close(single.double(), expected, atol=1e-5, rtol=1e-5)


def test_certain_and_agreed_pairs_of_equal_clusters_have_the_lowest_loss_ln_k() -> None:
    """Of one-hot pairs that agree, sum_c (p_s p_t)^beta / p_c = K at p_c = 1 / K."""
    logs = [torch.eye(K).clamp_min(1e-30).log()[:, None]] * 2
    losses, alike = temi_loss(logs, logs, torch.full((1, K), 1 / K))
    torch.testing.assert_close(losses, torch.full((K, 1), -float(torch.tensor(float(K)).log())))
    torch.testing.assert_close(alike, torch.ones(K))


def test_the_nets_of_sub_heads_are_independent() -> None:
    torch.manual_seed(0)
    layers, z = Perceptrons(DIM, 5, 4, K, 3), torch.randn(7, DIM)
    everyone = layers(z)
    assert everyone.shape == (3, 7, K) and everyone.abs().max() <= 1 + 1e-6
    for head in range(3):
        torch.testing.assert_close(layers(z, slice(head, head + 1))[0], everyone[head])
        first = torch.nn.functional.linear(
            z, *(p.unflatten(0, (3, 5))[head] for p in layers.first.parameters())
        )
        narrow = torch.nn.functional.gelu(first) @ layers.second[head].T + layers.bias[head]
        cosines = torch.cosine_similarity(narrow[:, None], layers.last[head][None], dim=2)
        torch.testing.assert_close(cosines, everyone[head])


def test_the_prior_follows_the_teacher_and_sub_heads_are_compared_over_a_pass() -> None:
    head = make("temi", standardize=False, teacher_temperature=0.2)
    assert isinstance(head, TEMI)
    prior, expected = torch.full((3, K), 1 / K), torch.zeros(3, dtype=torch.float64)
    for step in (5, 6):
        index = torch.arange(step, step + 9)
        with torch.no_grad():
            outputs = {view: head(rows()[index + view], view) for view in (0, 1)}
            targets = head.targets(outputs, batch(index, step))
        q = [
            torch.stack([(each / 2).softmax(1) for each in outputs[view].logits], 1)
            for view in (0, 1)
        ]
        prior = 0.9 * prior + 0.1 * (q[0].mean(0) + q[1].mean(0)) / 2
        torch.testing.assert_close(head.prior, prior)
        torch.testing.assert_close(targets["first"].exp(), q[0])
        logs = [each.log() for each in q]
        expected += temi_loss(logs, logs, prior)[0].mean(0).double() / 2
    torch.testing.assert_close(
        head.score(Bank(rows(), torch.arange(N), N)), expected, atol=1e-6, rtol=1e-5
    )


def test_neighbours_and_moments_of_features() -> None:
    head = make("temi")
    assert isinstance(head, TEMI)
    asked = head.refresh(Bank(rows(), torch.arange(N), N))
    assert asked.partners is not None and asked.partners.shape == (N, 4)
    assert not (asked.partners == torch.arange(N)[:, None]).any(), "no image is its own partner"
    x = rows().double()
    torch.testing.assert_close(head.shift.double(), x.mean(0), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(head.scale.double(), x.std(0, correction=0), atol=1e-6, rtol=1e-5)
    trained = trainer("temi")
    trained.fit()
    assert trained.stepper.decay == 0.996 and trained.stepper.teacher is not None
    assert torch.equal(
        trained.eval_network.head.get_buffer("scale"), trained.head.get_buffer("scale")
    )


# --- prototypes


def see(head: Head, index: Tensor) -> tuple[dict[int, Output], Any]:
    with torch.no_grad():
        outputs = {view: head(rows()[index], view) for view in (0, 1)}
        return outputs, head.targets(outputs, batch(index))


@pytest.mark.parametrize("balance", [0.0, 0.5, 1.0])
def test_codes_have_the_shares_of_the_start(balance: float) -> None:
    head = make("prototypes", balance=balance, num_iters=200, init="kmeans", num_heads=1)
    assert isinstance(head, NeighborPrototypes) and head.needs_prototypes
    head.init_prototypes(Bank(rows(), torch.arange(N), N))
    start = head.layer(rows())[0].argmax(1)
    assert clustering_scores(start, GROUP)["acc"] == 1
    shares = balance / K + (1 - balance) * start.bincount(minlength=K) / N
    torch.testing.assert_close(head.shares[0], shares)
    outputs, targets = see(head, torch.arange(N))
    torch.testing.assert_close(targets["codes0"][:, 0].sum(0), N * shares, atol=0.05, rtol=0)
    cosines = (
        torch.nn.functional.normalize(rows(), dim=1)
        @ torch.nn.functional.normalize(head.layer.weight, dim=1).T
    )
    codes = sinkhorn(cosines.detach(), epsilon=0.025, num_iters=200, column_marginal=shares)
    torch.testing.assert_close(targets["codes0"][:, 0], codes, atol=1e-4, rtol=0)
    p = [outputs[view].logits[0].log_softmax(1) for view in (0, 1)]
    expected = -(codes * p[0]).sum(1).mean() / 2 - (codes * p[1]).sum(1).mean() / 2
    torch.testing.assert_close(
        head.loss(outputs, targets, batch(torch.arange(N)))["loss"], expected, atol=1e-4, rtol=0
    )


def test_the_sub_head_whose_clusters_neighbours_share_is_chosen() -> None:
    head = make("prototypes", num_heads=2, init="random")
    assert isinstance(head, NeighborPrototypes) and not head.needs_prototypes
    head.refresh(Bank(rows(), torch.arange(N), N))
    with torch.no_grad():
        head.layer.set_prototypes(1, torch.eye(DIM)[:K])
    scores = head.score(Bank(rows(), torch.arange(N), N))
    assert int(scores.argmin()) == 1 and float(scores[1]) < 0.05


@pytest.mark.parametrize(("name", "group"), [("prototypes", GROUP), ("temi", torch.arange(N) % K)])
def test_they_find_plain_clusters(name: str, group: Tensor) -> None:
    """Where pairs agree, TEMI's loss is minus the entropy of cluster sizes: it would have them
    equal.
    """
    optim = OptimSettings(name="adamw", lr=5e-3, weight_decay=0.0)
    made = trainer(name, frozen=True, features=rows(group), optim=optim, epochs=20)
    made.fit()
    found = made.eval_network.head.predict(rows(group)).argmax(1)
    assert clustering_scores(found, group)["acc"] > 0.95


# --- ranks, stops, precision


def train_some(rank: int, size: int) -> dict[str, dict[str, Tensor]]:
    import torch.distributed as dist

    world = World(rank, size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    found = {}
    for name in HEADS:
        made = trainer(name, world)
        made.fit()
        state = {key: value.detach() for key, value in made.network.state_dict().items()}
        found[name] = {
            **state,
            **{f"teacher.{key}": value for key, value in made.eval_network.state_dict().items()},
        }
    return found


def test_two_ranks_with_unequal_rows_are_one() -> None:
    alone = train_some(0, 1)
    for found in run_ranks(train_some, 2):
        for name, state in alone.items():
            for key, value in state.items():
                torch.testing.assert_close(
                    found[name][key], value, atol=2e-5, rtol=1e-4, msg=f"{name}: {key}"
                )


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
    again.fit()
    assert digest_state(again.state_dict()) == digest_state(whole.state_dict())


@pytest.mark.parametrize("name", HEADS)
def test_bfloat16_features_train_as_well(name: str) -> None:
    made = trainer(name, precision="bfloat16", epochs=1)
    made.fit()
    assert all(torch.isfinite(parameter).all() for parameter in made.network.parameters())
    assert all(logits.dtype == torch.float32 for logits in made.head(rows(), 0).logits)
