"""SwAV and DeepCluster-v2 on two ranks are one rank: codes, queue, clusters, gradients, with
unequal rows.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from deepclust.config.settings import OptimSettings
from deepclust.heads.common.queue import FeatureQueue
from deepclust.runtime.distributed import World
from tests.heads import test_deepcluster_v2, test_swav
from tests.ranks import run_ranks
from tests.toys import toy_images


def train(rank: int, size: int, name: str) -> dict[str, torch.Tensor]:
    """Two epochs of two steps on 41 images, 20 or 21 rows a step: ranks hold 10 or 11."""
    world = World(rank, size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    if name == "swav":
        model = test_swav.head(batch_norm=False, queue_length=30, marginal=0.3)
    else:
        model = test_deepcluster_v2.head(41, batch_norm=False)
    codes, original = [], model.targets
    model.targets = lambda *given: codes.append(original(*given)) or codes[-1]
    optim = OptimSettings(name="sgd", lr=0.05, momentum=0.9, weight_decay=0.0)
    run = test_swav.trainer(model, images=toy_images(41), batch_size=21, optim=optim, world=world)
    run.fit()
    found = {
        key: value.detach() for key, value in run.network.state_dict().items() if "queue" not in key
    }
    for step, targets in enumerate(codes):
        found.update({f"rank part: {key} of step {step}": value for key, value in targets.items()})
    if name == "swav":
        found["rank part: queue"] = model.queue.held(1)
        found["rank part: places"] = model.queue.serial[model.queue.serial >= 0]
    return found


def both(rank: int, size: int) -> dict[str, dict[str, torch.Tensor]]:
    return {name: train(rank, size, name) for name in ("swav", "deepcluster_v2")}


def test_two_ranks_are_one():
    alone, together = both(0, 1), run_ranks(both, 2)
    for name, expected in alone.items():
        for key, value in expected.items():
            if key.startswith("rank part"):
                parts = torch.cat([result[name][key] for result in together])
                if key == "rank part: queue":
                    order = torch.cat(
                        [result[name]["rank part: places"] for result in together]
                    ).argsort()
                    parts, value = parts[order], value[expected["rank part: places"].argsort()]
                elif key == "rank part: places":
                    parts, value = parts.sort().values, value.sort().values
                torch.testing.assert_close(parts, value, atol=1e-4, rtol=1e-4, msg=f"{name}: {key}")
            else:
                for result in together:
                    torch.testing.assert_close(
                        result[name][key], value, atol=1e-4, rtol=1e-4, msg=f"{name}: {key}"
                    )
    assert len(alone["swav"]["rank part: queue"]) == 30
    assert len(together[0]["swav"]["rank part: queue"]) < 30


def queues(rank: int, size: int) -> dict[str, torch.Tensor]:
    """Batches that are spread over ranks very unequally, and one larger than the queue."""
    queue, generator = FeatureQueue(1, 12, 2), torch.Generator().manual_seed(0)
    group = dist.group.WORLD if size > 1 else None
    for total, first in ((5, 1), (3, 3), (20, 4), (4, 0), (1, 1)):
        rows = torch.randn(total, 2, generator=generator)
        queue.push([rows if size == 1 else rows[:first] if rank == 0 else rows[first:]], group)
    return {"rows": queue.held(0), "serial": queue.serial[queue.serial >= 0]}


def test_the_ranks_queues_make_up_the_queue_of_one():
    alone, together = queues(0, 1), run_ranks(queues, 2)
    serial, rows = (torch.cat([result[key] for result in together]) for key in ("serial", "rows"))
    assert torch.equal(serial.sort().values, alone["serial"].sort().values)
    assert torch.equal(rows[serial.argsort()], alone["rows"][alone["serial"].argsort()])
