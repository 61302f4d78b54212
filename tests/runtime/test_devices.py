"""Which device is chosen, on pretended machines: Macs, GPUs under torchrun, one GPU per rank,
shared GPUs.
"""

from __future__ import annotations

import os
import threading
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from deepclust.cli import main
from deepclust.errors import UserError
from deepclust.runtime import devices, distributed
from deepclust.runtime.devices import choose_device, refuse_shared_gpu
from tests.training.test_run_ranks import free_port


def pretend_gpus(patch: pytest.MonkeyPatch, count: int, name: str = "a") -> None:
    """A machine on which this process sees `count` GPUs with UUIDs of their own."""

    def use(device: torch.device) -> None:
        if device.type == "cuda" and (device.index or 0) >= count:
            raise RuntimeError("CUDA error: invalid device ordinal\nmore")

    def facts(device: torch.device) -> SimpleNamespace:
        return SimpleNamespace(uuid=f"{name}-{device.index}")

    patch.setattr(torch.cuda, "is_available", lambda: count > 0)
    patch.setattr(torch.cuda, "device_count", lambda: count)
    patch.setattr(torch.cuda, "current_device", lambda: 0)
    patch.setattr(torch.cuda, "get_device_properties", facts)
    patch.setattr(torch.version, "cuda", "13.0")
    patch.setattr(devices, "_use", use)


def under_torchrun(patch: pytest.MonkeyPatch, local_rank: int, ranks: int, nodes: int = 1) -> None:
    values = {
        "RANK": local_rank,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": ranks,
        "WORLD_SIZE": ranks * nodes,
    }
    for name, value in values.items():
        patch.setenv(name, str(value))


# --- Macs


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)


@pytest.mark.usefixtures("mac")
def test_auto_is_the_cpu_on_a_mac(capsys: pytest.CaptureFixture[str]) -> None:
    assert choose_device("auto") == torch.device("cpu")
    assert distributed.start("auto").device == torch.device("cpu")
    main(["doctor"])
    assert "Apple's GPU is not used, for it has no float64" in capsys.readouterr().out


@pytest.mark.usefixtures("mac")
def test_mps_is_refused_with_what_it_lacks(
    tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        UserError, match=r"trainer.device=mps:0 is not supported: .*float64.*use cpu"
    ):
        choose_device("mps:0")
    with pytest.raises(UserError, match=r"^--device mps is not supported"):
        choose_device("mps", "--device ")
    assert main(["train", "data=digits", "trainer.device=mps", f"run.dir={tmp_path / 'run'}"]) == 2
    assert "trainer.device=mps is not supported" in capsys.readouterr().err


# --- GPUs


def test_one_process_takes_the_gpu_that_torch_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    pretend_gpus(monkeypatch, 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert choose_device("auto") == choose_device("cuda") == torch.device("cuda", 1)
    assert choose_device("cuda:0") == torch.device("cuda", 0)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(
        UserError, match=r"trainer.device=cuda:2 is not available here \(CUDA error: invalid device"
    ):
        choose_device("cuda:2")
    with pytest.raises(
        UserError, match=r"trainer.device=warp is no device .*use auto, cuda or cpu"
    ):
        choose_device("warp")


@pytest.mark.parametrize("name", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("visible", "local_rank", "ranks", "expected"),
    [(4, 3, 4, 3), (4, 1, 2, 1), (1, 3, 4, 0), (2, 3, 4, 1)],
)
def test_ranks_take_their_own_gpu(
    name: str,
    visible: int,
    local_rank: int,
    ranks: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A launcher that shows each rank its own GPUs alone leaves fewer of them than there are ranks."""
    pretend_gpus(monkeypatch, visible)
    under_torchrun(monkeypatch, local_rank, ranks)
    assert choose_device(name) == torch.device("cuda", expected)


def test_one_index_for_all_ranks_of_a_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 2)
    under_torchrun(monkeypatch, 1, 2)
    with pytest.raises(
        UserError, match=r"trainer.device=cuda:0 would put all 2 ranks .* use trainer.device=cuda,"
    ):
        choose_device("cuda:0")
    under_torchrun(monkeypatch, 0, 1, nodes=2)
    assert choose_device("cuda:1") == torch.device("cuda", 1), "one rank per machine may have any"


# --- shared GPUs


def told(places: list[SimpleNamespace], patch: pytest.MonkeyPatch) -> list[str]:
    """What ranks on GPUs with these facts are told; cuda:n stands for rank n's."""
    patch.setattr(torch.cuda, "get_device_properties", lambda device: places[device.index])
    store, answers = dist.HashStore(), [""] * len(places)

    def ask(rank: int) -> None:
        try:
            refuse_shared_gpu(store, rank, len(places), torch.device("cuda", rank))
        except UserError as error:
            answers[rank] = str(error)

    threads = [threading.Thread(target=ask, args=(rank,)) for rank in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    return answers


def test_all_ranks_are_told_who_shares_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert told([SimpleNamespace(uuid=name) for name in "abc"], monkeypatch) == ["", "", ""]
    answers = told([SimpleNamespace(uuid=name) for name in "aba"], monkeypatch)
    assert len(set(answers)) == 1
    assert "ranks 0, 2 are on one GPU (UUID a)" in answers[0] and "--nproc-per-node" in answers[0]


def test_without_uuids_the_slot_tells_and_without_that_nobody_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)

    def amd(bus: int) -> SimpleNamespace:
        return SimpleNamespace(
            uuid="the same for all", pci_domain_id=0, pci_bus_id=bus, pci_device_id=0
        )

    assert told([amd(3), amd(4)], monkeypatch) == ["", ""]
    assert "ranks 0, 1 are on one GPU (PCI 0000:03:00 of" in told([amd(3), amd(3)], monkeypatch)[1]
    assert told([SimpleNamespace(), SimpleNamespace()], monkeypatch) == ["", ""]


def join(rank: int, ports: list[int]) -> None:
    """`start` on a rank that sees one GPU, at first the same as the other's, then another; gloo in
    NCCL's place.
    """
    torch.set_num_threads(1)
    used: list[torch.device] = []
    asked: dict[str, Any] = {}
    real = dist.init_process_group

    def init(backend: str, *, device_id: torch.device, **options: Any) -> None:
        asked.update(backend=backend, device_id=device_id, used=used[-1])
        real("gloo", **options)

    with pytest.MonkeyPatch.context() as patch:
        under_torchrun(patch, rank, 2)
        patch.setattr(torch.cuda, "set_device", used.append)
        patch.setattr(dist, "init_process_group", init)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ports[0]))
        pretend_gpus(patch, 1)
        with pytest.raises(UserError, match=r"ranks 0, 1 are on one GPU \(UUID a-0\)"):
            distributed.start("cuda", 60)
        assert not asked, "NCCL is not asked"
        os.environ.update(MASTER_PORT=str(ports[1]))
        pretend_gpus(patch, 1, "ab"[rank])
        world = distributed.start("cuda", 60)
        gpu = torch.device("cuda", 0)
        assert world.device == gpu and (world.rank, world.size) == (rank, 2)
        assert asked == {"backend": "nccl", "device_id": gpu, "used": gpu}
        total = torch.tensor([rank + 1])
        dist.all_reduce(total)
        assert int(total) == 3
        distributed.stop()


def test_ranks_that_see_one_gpu_each_join_if_these_differ() -> None:
    mp.start_processes(join, ([free_port(), free_port()],), nprocs=2, start_method="spawn")


def test_a_processor_joins_as_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    under_torchrun(monkeypatch, 1, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(
        dist,
        "init_process_group",
        lambda backend, **options: asked.update(options, backend=backend),
    )
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    assert distributed.start("auto", 7).device == torch.device("cpu")
    assert asked == {"backend": "gloo", "timeout": timedelta(seconds=7)}
