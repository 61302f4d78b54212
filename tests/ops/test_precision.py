"""Mixed precision is what a device does natively, not what torch says it can emulate."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from deepclust.cli import main
from deepclust.data.views.transform import ViewTransform
from deepclust.features.encoder import Encoder, precision_of
from deepclust.ops import precision
from deepclust.ops.precision import autocast_dtype

CUDA = torch.device("cuda", 0)


def pretend_gpu(
    patch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str | None = None
) -> None:
    """A GPU of NVIDIA, or of AMD with an architecture; as torch does, it is said to do bfloat16 in
    any case.
    """
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 1)
    patch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    patch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    patch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(gcnArchName=arch)
    )
    patch.setattr(torch.version, "hip", None if arch is None else "7.0")


@pytest.mark.parametrize(
    ("capability", "native"),
    [
        ((6, 1), False),
        ((7, 0), False),
        ((7, 5), False),
        ((8, 0), True),
        ((8, 6), True),
        ((9, 0), True),
        ((12, 0), True),
    ],
)
def test_bfloat16_begins_with_capability_8(
    capability: tuple[int, int],
    native: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pretend_gpu(monkeypatch, capability)
    expected = torch.bfloat16 if native else torch.float16
    assert autocast_dtype("auto", CUDA) is expected
    assert autocast_dtype("auto", torch.device("cuda")) is expected
    view = ViewTransform([], 8, (0.5,), (0.5,))
    encoder = Encoder("some", nn.Identity(), 4, 1, 8, view, {}, device=CUDA)
    assert precision_of(encoder) == str(expected).removeprefix("torch.")
    main(["doctor"])
    words = (
        "native" if native else "not native on Some GPU: float16 with scaled losses is used there"
    )
    assert any(
        line.split(maxsplit=2)[1:] == ["bfloat16", words]
        for line in capsys.readouterr().out.splitlines()
    )


@pytest.mark.parametrize(
    ("arch", "capability", "native"),
    [
        ("gfx906:sramecc-:xnack-", (9, 0), False),
        ("gfx1030", (10, 3), False),
        ("gfx908:sramecc+:xnack-", (9, 0), True),
        ("gfx90a:sramecc+:xnack-", (9, 0), True),
        ("gfx942:sramecc+:xnack-", (9, 4), True),
        ("gfx1100", (11, 0), True),
    ],
)
def test_amd_is_asked_for_its_architecture(
    arch: str, capability: tuple[int, int], native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An MI50 has capability 9.0, as an H100, and no bfloat16 products."""
    pretend_gpu(monkeypatch, capability, arch)
    assert autocast_dtype("auto", CUDA) is (torch.bfloat16 if native else torch.float16)


def test_what_is_asked_for_is_taken_and_processors_fall_back_to_float32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pretend_gpu(monkeypatch, (7, 5))
    assert autocast_dtype("bfloat16", CUDA) is torch.bfloat16
    assert autocast_dtype("float32", CUDA) is None
    for fast in (True, False):
        monkeypatch.setattr("deepclust.ops.precision.cpu_has_fast_bfloat16", lambda fast=fast: fast)
        assert precision.autocast_dtype("auto", torch.device("cpu")) is (
            torch.bfloat16 if fast else None
        )
    assert autocast_dtype("auto", torch.device("mps")) is None
