"""Two ranks are one run: the same gradient as one rank, every image once, and stops and kills made
good.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from deepclust.backbones import Backbone
from deepclust.config.settings import OptimSettings, TrainerSettings
from deepclust.data.views.transform import build_views
from deepclust.heads import BankSpec, Head
from deepclust.runtime import checkpoint
from deepclust.runtime.distributed import World
from deepclust.training.trainer import Trainer
from tests.ranks import run_ranks
from tests.runs import outcome, pixels, small_data, small_run, status, stop_at, words
from tests.toys import toy_backbone, toy_images

ROOT = Path(__file__).parents[2]
VIEWS = {
    "clean": [],
    "strong": [{"random_affine": {"degrees": 15}}],
    "simclr": [{"pixel_noise": {"std": 0.1}}],
}

# ------------------------------------------------------------------------------------------- gr


def make_head(name: str, num_samples: int) -> Head:
    """A head without batch statistics, the same on every rank."""
    from deepclust.heads.scan import SCAN
    from deepclust.heads.selflabel import SelfLabel
    from deepclust.heads.simclr import SimCLR

    torch.manual_seed(1)
    if name == "simclr":
        return SimCLR(16, hidden_dim=12, embedding_dim=8, batch_norm=False)
    if name == "scan":
        return SCAN(16, 4, num_samples, num_neighbors=3, num_heads=2)
    return SelfLabel(16, 4, threshold=0.25)


def one_step(world: World, name: str, micro: int) -> dict[str, torch.Tensor]:
    """What one SGD step of rate 1 moves: the gradient; and the bank's rows, on every rank the same."""
    images = toy_images(21)
    transforms = build_views({"size": None, "views": VIEWS}, images, ["clean", "strong", "simclr"])
    settings = TrainerSettings(epochs=1, batch_size=21, micro_batches=micro, precision="float32")
    optim = OptimSettings(name="sgd", lr=1.0, momentum=0.0, weight_decay=0.0, schedule="constant")
    backbone: Backbone = toy_backbone()
    trainer = Trainer(
        backbone,
        make_head(name, 21),
        images,
        transforms,
        settings=settings,
        optim=optim,
        world=world,
    )
    before = {key: value.clone() for key, value in trainer.network.named_parameters()}
    trainer.prepare()
    trainer.refresh(trainer.progress())
    trainer.train_step(next(trainer.batches()), trainer.progress())
    moved = {key: before[key] - value.detach() for key, value in trainer.network.named_parameters()}
    features, rows = trainer.features()
    bank = trainer.bank(BankSpec())
    partners = trainer.sampler.partners
    return {
        **moved,
        "features": features,
        "rows": rows,
        "bank rows": bank.index,
        **({} if partners is None else {"partners": partners}),
    }


def steps(rank: int, size: int) -> dict[str, dict[str, torch.Tensor]]:
    import torch.distributed as dist

    world = World(rank, size, torch.device("cpu"), dist.group.WORLD if size > 1 else None)
    cases = [("simclr", 1), ("scan", 1), ("selflabel", 1), ("selflabel", 3)]
    return {f"{name}, {micro}": one_step(world, name, micro) for name, micro in cases}


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_the_gradient_of_several_ranks_is_that_of_one(size):
    """21 rows do not divide by 2: ranks hold unequal numbers. No batch statistics, so that nothing
    else differs.
    """
    alone = steps(0, 1)
    together = run_ranks(steps, size)
    assert sorted(
        row for result in together for row in result["scan, 1"]["bank rows"].tolist()
    ) == list(range(21))
    for case, expected in alone.items():
        assert (
            max(
                float(value.detach().abs().max())
                for key, value in expected.items()
                if "weight" in key
            )
            > 1e-4
        ), case
        for result in together:
            for key, value in expected.items():
                if key != "bank rows":
                    torch.testing.assert_close(
                        result[case][key], value, atol=1e-5, rtol=1e-5, msg=f"{case}: {key}"
                    )
        for result in together[1:]:
            assert all(
                torch.equal(result[case][key], together[0][case][key])
                for key in expected
                if key != "bank rows"
            )


# ------------------------------------------------------------------------------------------- wh

TWO_RANKS = ("stages.selflabel.trainer.ema=0.9",)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def rank_runs(rank: int, folder: str, ports: list[int]) -> None:
    """On each of two ranks: a whole run; one stopped by rank 1 alone, in the second stage; the same
    again.
    """
    torch.set_num_threads(1)
    os.environ.update(WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1")
    codes = []
    for port, name, poll in zip(ports, ("whole", "run", "run", "run"), (None, 9, None, None)):
        os.environ["MASTER_PORT"] = str(port)
        with pytest.MonkeyPatch.context() as patch:
            if poll is not None and rank == 1:
                stop_at(patch, poll)
            codes.append(small_run(Path(folder) / name, *TWO_RANKS, data=small_data(41)))
    (Path(folder) / f"codes-{rank}.json").write_text(json.dumps(codes))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder in which `rank_runs` ran on two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    ports = [free_port() for _ in range(4)]
    mp.start_processes(rank_runs, (str(folder), ports), nprocs=2, start_method="spawn")
    return folder


def test_two_ranks_make_one_run_with_each_image_once(runs):
    with open(runs / "whole" / "clusters.csv", newline="") as file:
        assert [int(row["index"]) for row in csv.DictReader(file)] == list(range(41))
    rows = [
        json.loads(line) for line in (runs / "whole" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert json.loads((runs / "whole" / "env.json").read_text())["ranks"] == 2
    end = checkpoint.load(checkpoint.listing(runs / "whole" / "checkpoints")[-1])
    assert {"rank0", "rank1"} <= set(end.state)


def test_a_stop_that_one_rank_sees_is_made_good_by_both(runs):
    for rank in (0, 1):
        assert json.loads((runs / f"codes-{rank}.json").read_text()) == [0, 143, 0, 0]
    assert outcome(runs / "run") == outcome(runs / "whole")


def test_one_rank_goes_on_from_two_and_says_so(runs, tmp_path, monkeypatch):
    """Another number of ranks is allowed: sums are rounded differently, so figures agree but not to
    the last bit.
    """
    end = next(
        path
        for path in checkpoint.listing(runs / "whole" / "checkpoints")
        if path.parent.name == "00-pretext"
    )
    assert small_run(tmp_path / "run", *TWO_RANKS, f"resume={end}", data=small_data(41)) == 0
    assert (
        "It was saved by 2 process(es) and goes on with 1"
        in (tmp_path / "run" / "log.txt").read_text()
    )


# ------------------------------------------------------------------------------------------- to


class Torchrun:
    """`torchrun --nproc-per-node 2 train.py ...` in a process group of its own."""

    def __init__(self, folder: Path, *more: str) -> None:
        np.save(folder.parent / "images.npy", pixels(41))
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
        ]
        data = ["data=arrays", f"data.images={folder.parent}/images.npy"]
        command = [*launcher, str(ROOT / "train.py"), *words(folder, *TWO_RANKS, *more), *data]
        self.folder = folder
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def wait_for_steps(self, count: int) -> None:
        metrics = self.folder / "metrics.jsonl"
        while self.process.poll() is None and not (
            metrics.exists() and metrics.read_text().count("\n") >= count
        ):
            time.sleep(0.02)

    def ranks(self) -> list[int]:
        """Process ids of the ranks."""
        children = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        return [
            int(child)
            for child in children
            if "train.py" in Path(f"/proc/{child}/cmdline").read_text()
        ]

    def end(self) -> tuple[int, str]:
        _, said = self.process.communicate(timeout=900)
        return self.process.returncode, said


def alive(process: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


LONGER = "stages.pretext.trainer.epochs=60"


@pytest.mark.slow
def test_torchrun_is_stopped_and_killed_and_goes_on_bit_for_bit(tmp_path):
    """SIGTERM to the launcher, then SIGKILL of one rank, then to the end: the model of the run that
    was left alone.
    """
    assert Torchrun(tmp_path / "whole", LONGER).end()[0] == 0
    first = Torchrun(tmp_path / "run", LONGER)
    first.wait_for_steps(5)
    ranks, sent = first.ranks(), time.monotonic()
    assert len(ranks) == 2
    first.process.send_signal(signal.SIGTERM)
    first.end()
    assert time.monotonic() - sent < 30 and not any(map(alive, ranks))
    assert status(tmp_path / "run")["state"] == "preempted"
    saved = checkpoint.listing(tmp_path / "run" / "checkpoints")[-1]
    second = Torchrun(tmp_path / "run", LONGER)
    second.wait_for_steps(int(saved.name[5:]) + 20)
    ranks, sent = second.ranks(), time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    code, said = second.end()
    assert code == 1 and time.monotonic() - sent < 40 and not any(map(alive, ranks))
    assert "SIGKILL" in said or "-9" in said
    assert Torchrun(tmp_path / "run", LONGER).end()[0] == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.slow
def test_a_killed_launcher_leaves_no_rank_behind(tmp_path):
    job = Torchrun(tmp_path / "run", LONGER)
    job.wait_for_steps(5)
    ranks = job.ranks()
    os.kill(job.process.pid, signal.SIGKILL)
    job.process.wait()
    deadline = time.monotonic() + 10
    while any(map(alive, ranks)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(ranks) == 2 and not any(map(alive, ranks))


@pytest.mark.slow
def test_a_wrong_key_is_said_once_under_torchrun(tmp_path):
    code, said = Torchrun(tmp_path / "run", "stages.scan.optim.lrr=1").end()
    assert code != 0 and said.count("stages.scan.optim.lrr") == 1
    assert not (tmp_path / "run").exists()
