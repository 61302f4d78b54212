"""Random numbers that depend only on what they are drawn for: no state, no global generator.

A sample's key is a hash of (seed, stage, pass, position in the pass, view slot); its uniforms are a
hash of key and counter. So augmentations do not depend on loader workers, ranks or the cut into
batches, and a resumed run draws the same ones. The hash is splitmix64 (Steele, Lea, Flood: Fast
Splittable Pseudorandom Number Generators, OOPSLA 2014) in int64 tensors, whose products wrap around
as unsigned ones do.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch
from torch import Tensor

# splitmix64's constants: the odd integer next to 2^64 divided by the golden ratio, which spaces the
# counter's values evenly, then the multipliers and shifts of its finaliser (Stafford's variant 13).
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)
_MASK = (1 << 64) - 1

# A float32 holds 24 bits exactly, so multiples of 2^-24 are the finest uniform grid in [0, 1).
_UNIT = 2.0**-24


class Stream(IntEnum):
    """Names for the random numbers that are no parameters of a view, one for each purpose.

    Negative ones take the place of the view slot in `sample_keys`, where views are 0, 1, 2, ...;
    the positive one separates draws of the same sample key, where parameters are stream 0. The
    values decide which numbers are drawn: another value changes the result of every run.
    """

    # Seed of the permutation in which a pass visits the samples, and of a bank's random sub-sample.
    ORDER = -1
    # Seed of torch's global generator at the start of a stage's training, one for each rank.
    TRAINING = -2
    # Seed of torch's global generator before a stage's network is built, so of its initial weights.
    NETWORK = -3
    # Seed of the random views that a bank of features is computed from.
    BANK = -4
    # Which of a sample's partners (mined neighbours, say) a view shows.
    PARTNER = 7


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as `value`."""
    value &= _MASK
    if value >> 63:
        return value - (1 << 64)
    return value


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
    """(B,) int64 random keys, one for each sample, on the device of `positions`.

    seed: any integer; its lowest 64 bits count.
    stage: number of the stage in the recipe.
    pass_index: number of the pass over the samples.
    positions: (B,) int64 positions of the samples in the pass's order over all ranks.
    slot: number of the view, or a `Stream`.
    """
    state = 0
    for part in (seed, stage, pass_index, slot):
        # 1 + part, because the mix of 0 is 0: seed 0 and stage 0 would leave the state where it is
        state = _mix_int(state + _GAMMA * (1 + (part & _MASK)))
    return _mix(positions.to(torch.int64) * _signed(_GAMMA) + _signed(state))


def stream_key(seed: int, stage: int, number: int, stream: Stream) -> int:
    """The one key, a signed 64-bit integer, of a stream that is not drawn from sample by sample.

    seed, stage: as for `sample_keys`.
    number: what tells draws of the stream apart within a stage, such as the pass, step or rank.
    stream: what the key is for.
    """
    return int(sample_keys(seed, stage, number, torch.zeros(1, dtype=torch.int64), stream))


def seed_for(seed: int, stage: int, number: int, stream: Stream) -> int:
    """`stream_key` as a seed of torch's generators: an integer from 0 to 2^63 - 1.

    seed, stage, number, stream: as for `stream_key`.
    """
    # torch remaps negative seeds, so the sign bit is dropped before it sees them
    return stream_key(seed, stage, number, stream) % 2**63


def random_bits(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """(B, count) int64 of 64 random bits: outputs 1..count of splitmix64 seeded with each key.

    keys: (B,) int64.
    count: numbers for each key; more of them begin with the same ones.
    stream: numbers of different streams of a key are independent.
    """
    counter = torch.arange(1, count + 1, device=keys.device) * _signed(_GAMMA)
    # stream 0 leaves the keys as they are: plain splitmix64, as published test values have it
    if stream:
        keys = _mix(keys ^ _signed(_mix_int(_GAMMA * stream)))
    return _mix(keys[:, None] + counter)


def uniforms(keys: Tensor, count: int, stream: int = 0) -> Tensor:
    """(B, count) float32 uniforms in [0, 1), multiples of 2^-24.

    keys, count, stream: as for `random_bits`.
    """
    # the highest 24 of 64 bits: shifted by 40, then the copies of the sign bit are masked away
    return ((random_bits(keys, count, stream) >> 40) & 0xFFFFFF).to(torch.float32) * _UNIT


def normals(keys: Tensor, count: int) -> Tensor:
    """(B, count) float32 standard normal numbers from (B,) int64 keys.

    Box and Muller's transform (1958): two uniforms for each, of which one gives the radius and one
    the angle.
    """
    first, second = uniforms(keys, 2 * count).chunk(2, dim=1)
    # log1p(-u) is log of a number in (0, 1], which is finite; log(u) is not where u = 0
    return torch.sqrt(-2 * torch.log1p(-first)) * torch.cos(2 * math.pi * second)
