"""Counter-based random numbers: a published reference, distributions, independence, and no global
state.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from deepclust.data.random import (
    Stream,
    normals,
    random_bits,
    sample_keys,
    seed_for,
    stream_key,
    uniforms,
)

POSITIONS = torch.arange(4000)


def keys(seed: int = 0, stage: int = 0, pass_index: int = 0, slot: int = 0) -> torch.Tensor:
    return sample_keys(seed, stage, pass_index, POSITIONS, slot)


def test_bits_are_those_of_splitmix64():
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    bits = random_bits(torch.tensor([1234567]), 5)[0].numpy().view(np.uint64)
    assert bits.tolist() == published


def test_uniforms_are_uniform_over_keys_and_over_counters():
    drawn = uniforms(keys(), 8)
    assert drawn.dtype == torch.float32
    assert drawn.min() >= 0 and drawn.max() < 1
    for column in drawn.T:
        assert stats.kstest(column.numpy(), "uniform").pvalue > 1e-4
    assert stats.kstest(uniforms(torch.tensor([5]), 5000)[0].numpy(), "uniform").pvalue > 1e-4


def test_normals_are_normal():
    drawn = normals(keys(), 3)
    assert torch.isfinite(drawn).all()
    for column in drawn.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-4


def test_neighbouring_purposes_are_uncorrelated():
    columns = [uniforms(keys(), 2)]
    columns += [uniforms(keys(**{name: 1}), 1) for name in ("seed", "stage", "pass_index", "slot")]
    columns += [uniforms(keys(), 1, stream=1), uniforms(keys().roll(1), 1)]
    correlation = np.corrcoef(torch.cat(columns, dim=1).T.numpy()) - np.eye(8)
    assert np.abs(correlation).max() < 4.5 / np.sqrt(len(POSITIONS))


@pytest.mark.parametrize("name", ["seed", "stage", "pass_index", "slot"])
def test_every_part_changes_every_key(name: str):
    assert not (keys() == keys(**{name: 1})).any()
    assert not (keys() == keys(**{name: -1})).any()


def test_parts_do_not_stand_for_each_other():
    assert not torch.equal(keys(stage=1), keys(pass_index=1))
    assert not torch.equal(keys(seed=3, slot=1), keys(seed=1, slot=3))


def test_keys_of_many_samples_differ():
    many = torch.cat(
        [sample_keys(0, 0, p, torch.arange(50_000), slot) for p in range(3) for slot in range(2)]
    )
    assert len(many.unique()) == len(many)


def test_a_number_depends_on_its_own_key_and_counter_only():
    whole = uniforms(keys(), 6)
    order = torch.randperm(len(POSITIONS), generator=torch.Generator().manual_seed(0))
    assert torch.equal(uniforms(keys()[order], 6), whole[order])
    assert torch.equal(uniforms(keys()[10:20], 3), whole[10:20, :3])
    assert torch.equal(sample_keys(0, 0, 0, POSITIONS[7:9], 0), keys()[7:9])


def test_the_global_generator_stays_untouched():
    before = torch.get_rng_state()
    uniforms(keys(), 4), normals(keys(), 4)
    assert torch.equal(before, torch.get_rng_state())


def test_any_integer_is_a_seed():
    for seed in (-1, 2**63, 2**64 - 1, 2**80):
        assert uniforms(sample_keys(seed, 0, 0, POSITIONS[:2], 0), 1).shape == (2, 1)


def test_streams_have_the_values_that_earlier_runs_drew_from():
    values = {"ORDER": -1, "TRAINING": -2, "NETWORK": -3, "BANK": -4, "PARTNER": 7}
    assert {stream.name: int(stream) for stream in Stream} == values


def test_a_streams_key_is_that_of_position_0_and_its_seed_has_no_sign():
    for stream in Stream:
        for seed, stage, number in ((0, 0, 0), (5, 1, 2), (2**32 - 1, 3, -9)):
            key = stream_key(seed, stage, number, stream)
            assert key == int(sample_keys(seed, stage, number, POSITIONS[:1], int(stream))[0])
            assert 0 <= seed_for(seed, stage, number, stream) < 2**63
            assert (seed_for(seed, stage, number, stream) - key) % 2**63 == 0
