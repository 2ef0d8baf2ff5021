"""Rounding weights: levels, nested bits, bytes, and that the model gets its own weights back."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moyu.measure import accounting
from moyu.measure.storage import Storage, stored
from moyu.methods.estimate import first_bits
from moyu.model import dissect, loading
from moyu.weights.few_bits import GROUP, dequantize, quantize, rounded


def test_levels_and_step_of_a_group_by_hand():
    weight = torch.tensor([[-3.0, -1.0, 1.0, 3.0] * 8])  # the four levels of two bits, with a step of 2
    codes, scales = quantize(weight, 2)
    assert codes[0, :4].tolist() == [0, 1, 2, 3]
    assert scales.tolist() == [[2.0]]
    assert torch.equal(dequantize(codes, scales, 2), weight)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 8), st.integers(1, 80), st.integers(0, 1000))
def test_error_is_within_half_a_step_or_the_range(bits, width, seed):
    weight = torch.randn(3, width, generator=torch.Generator().manual_seed(seed))
    codes, scales = quantize(weight, bits)
    assert codes.shape == weight.shape and int(codes.max()) < 2**bits
    steps = scales.repeat_interleave(GROUP, 1)[:, :width]
    error = (dequantize(codes, scales, bits) - weight).abs()
    inside = weight.abs() <= steps * 2 ** (bits - 1)
    assert (error[inside] <= steps[inside] / 2 * 1.001).all()


def test_error_falls_with_bits_and_beats_the_plain_range():
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    errors = [float((rounded(weight, b) - weight).square().mean()) for b in (2, 3, 4, 5, 6, 8)]
    assert all(a > 3 * b for a, b in itertools.pairwise(errors))
    assert 0.10 < errors[0] < 0.14  # the best four levels of a normal leave 0.118


def test_first_bits_are_the_top_of_the_codes():
    weight = rounded(torch.randn(16, 64, generator=torch.Generator().manual_seed(1)), 4)
    whole, _ = quantize(weight, 4)
    codes, scales = first_bits(weight, 4, 2)
    assert torch.equal(codes, whole >> 2)
    error = [float((dequantize(codes, scales * s, 2, 64) - weight).square().sum()) for s in (0.97, 1, 1.03)]
    assert error[1] < min(error[0], error[2])


@pytest.mark.parametrize("name", ["swiglu", "relu"])
def test_weights_are_rounded_inside_and_their_own_outside(name):
    model = loading.load(name).model
    anatomy = dissect.dissect(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with stored(model, anatomy, Storage(2)):
        down = anatomy.blocks[0].pieces["down"].weight
        groups = down.t()[:, :GROUP]  # a group lies along a column of down
        assert all(len(set(row.tolist())) <= 4 for row in groups[:8])
        with pytest.raises(RuntimeError), stored(model, anatomy, Storage(3)):
            raise RuntimeError
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_step_bytes_by_hand():
    model = loading.load("swiglu").model
    anatomy = dissect.dissect(model)
    blocks = 6 * (4 * 256 * 256 + 3 * 688 * 256)
    head, norms, row = 4096 * 256, 13 * 256, 256
    assert accounting.block_bytes(model, anatomy) == 4 * blocks
    assert Storage().step_bytes(model, anatomy) == 2 * (blocks + head + norms + row)
    assert Storage(4).step_bytes(model, anatomy) == blocks * 4.5 / 8 + head * 8.5 / 8 + 2 * (norms + row)
    with pytest.raises(ValueError, match="16 or in 1"):
        Storage(12)
