"""Random numbers that are a pure function of what they are for: no state, no global generator.

A sample's key is a hash of (seed, stage, pass, position in the pass, view slot); its uniforms are a hash of key and
counter. So augmentations do not depend on loader workers, ranks or the cut into batches, and a resumed run draws the
same ones. The hash is splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, OOPSLA 2014) in
int64 tensors, whose products wrap as unsigned ones do.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MASK = (1 << 64) - 1
_UNIT = 2.0**-24


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value`."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_xor(z: Tensor, bits: int) -> Tensor:
    # int64 shifts copy the sign bit, so the copies are masked away
    return z ^ ((z >> bits) & ((1 << (64 - bits)) - 1))


def _mix(z: Tensor) -> Tensor:
    """splitmix64's finaliser of an int64 tensor, element by element."""
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS):
        z = _shift_xor(z, shift) * _signed(multiplier)
    return _shift_xor(z, _SHIFTS[2])


def _mix_int(z: int) -> int:
    """The same as `_mix` for one Python integer."""
    z &= _MASK
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS):
        z = ((z ^ (z >> shift)) * multiplier) & _MASK
    return z ^ (z >> _SHIFTS[2])


def sample_keys(seed: int, stage: int, pass_index: int, positions: Tensor, slot: int) -> Tensor:
    """One key per sample.

    positions: (B,) int64, places in the pass's global order. slot: number of the view.
    Returns (B,) int64 on the device of `positions`.
    """
    state = 0
    for part in (seed, stage, pass_index, slot):
        state = _mix_int(state + _GAMMA * (1 + (part & _MASK)))
    return _mix(positions.to(torch.int64) * _signed(_GAMMA) + _signed(state))


def random_bits(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """(B,) int64 keys to (B, count) int64 of 64 random bits: outputs 1..count of splitmix64 seeded with the key."""
    counter = torch.arange(1, count + 1, device=keys.device) * _signed(_GAMMA)
    if stream:
        keys = _mix(keys ^ _signed(_mix_int(_GAMMA * stream)))
    return _mix(keys[:, None] + counter)


def uniforms(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """(B,) int64 keys to (B, count) float32 in [0, 1), multiples of 2^-24. Streams of one key are independent."""
    return ((random_bits(keys, count, stream) >> 40) & 0xFFFFFF).to(torch.float32) * _UNIT


def normals(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """(B,) int64 keys to (B, count) float32 standard normals, by Box and Muller's transform of two uniforms each."""
    first, second = uniforms(keys, 2 * count, stream).chunk(2, dim=1)
    return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)
