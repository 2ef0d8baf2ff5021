"""Blocks: values are llama.cpp's bit for bit, and the order of memory does not change them."""

import copy

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear
from moyu.weights.blocks import BLOCK, KINDS, block_bytes, quantise

TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
SIZES = st.floats(-9, 4)


@st.composite
def weights(draw):
    """Weights (q, n) of several sizes, with zeros, ties, and what bfloat16 can hold."""
    q, blocks = draw(st.integers(1, 70)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(q, blocks * BLOCK, generator=generator) * 10 ** draw(SIZES)
    match draw(st.sampled_from(["float", "bfloat16", "ties", "zeros"])):
        case "bfloat16":
            weight = weight.bfloat16().float()
        case "ties":
            weight = torch.randint(-3, 4, weight.shape, generator=generator).float()
        case "zeros":
            weight[:, :BLOCK] = 0
    return weight


@pytest.mark.parametrize("kind", KINDS)
@given(weight=weights())
def test_values_and_bytes_are_those_of_the_format(kind, weight):
    with np.errstate(all="ignore"):
        file = torch.from_numpy(quantize(weight.numpy(), TYPES[kind]))
    blocks = quantise(weight, kind)
    raw = file.unflatten(1, (weight.shape[1] // BLOCK, -1))  # (q, n / 32, 34 or 18): scale, then quants
    assert torch.equal(raw[..., :2].contiguous().view(torch.float16)[..., 0], blocks.scales)
    assert torch.equal(raw[..., 2:].flatten(1).contiguous().view(blocks.quants.dtype), blocks.quants)
    assert np.array_equal(dequantize(file.numpy(), TYPES[kind]), blocks.dequantise().numpy())
    assert blocks.nbytes == block_bytes(kind, weight.numel()) == file.nbytes
    assert blocks.shape == tuple(weight.shape)


@pytest.mark.parametrize("kind", KINDS)
@given(weight=weights())
def test_another_order_holds_the_same_values(kind, weight):
    blocks = quantise(weight, kind)
    columns = blocks.in_order("columns")
    assert columns.shape == blocks.shape and columns.quants.is_contiguous() and columns.scales.is_contiguous()
    assert torch.equal(columns.dequantise(), blocks.dequantise())
    back = columns.in_order("rows")
    assert torch.equal(back.quants, blocks.quants) and torch.equal(back.scales, blocks.scales)


@pytest.mark.parametrize("kind", KINDS)
def test_odd_widths_are_filled_up_with_zeros(kind):
    weight = torch.randn(5, 40)
    blocks = quantise(weight, kind)
    filled = quantise(torch.nn.functional.pad(weight, (0, 24)), kind)
    assert blocks.shape == (5, 40) and blocks.nbytes == filled.nbytes
    assert torch.equal(blocks.dequantise(), filled.dequantise()[:, :40])
    columns = blocks.in_order("columns")
    assert columns.shape == (5, 40)
    assert torch.equal(columns.dequantise(), blocks.dequantise())
    assert torch.equal(columns.in_order("rows").quants, blocks.quants)
    row, column = torch.arange(5).repeat_interleave(40), torch.arange(40).repeat(5)
    for order in (blocks, columns):
        assert torch.equal(order.at(row, column), blocks.dequantise().flatten())


@pytest.mark.parametrize("kind", KINDS)
def test_modules_compute_with_the_values_and_survive_casts(kind):
    blocks, bias = quantise(torch.randn(48, 64), kind), torch.randn(48)
    linear, embedding = QuantisedLinear(blocks, bias), QuantisedEmbedding(blocks)
    x, ids = torch.randn(2, 5, 64), torch.tensor([[1, 47], [0, 1]])
    assert torch.equal(linear(x), torch.nn.functional.linear(x, blocks.dequantise(), bias))
    assert torch.equal(embedding(ids), blocks.dequantise()[ids])
    linear.store(blocks.in_order("columns"))
    assert torch.equal(linear(x), torch.nn.functional.linear(x, blocks.dequantise(), bias))
    twin = copy.deepcopy(linear).to(torch.bfloat16)
    assert twin.weight.dtype == twin(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(twin.to(torch.float32).weight, blocks.dequantise())
