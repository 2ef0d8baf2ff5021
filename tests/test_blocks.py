"""Formats: values of Q8_0 and Q4_0 are llama.cpp's bit for bit, and the order of memory does not change them."""

import copy

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st

from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear
from moyu.weights import FORMATS, QUANTISED, held, named
from moyu.weights.grouped import GROUP

TYPES = {"q8_0": gguf.GGMLQuantizationType.Q8_0, "q4_0": gguf.GGMLQuantizationType.Q4_0}
SIZES = st.floats(-9, 4)


@st.composite
def weights(draw):
    """Weights (q, n) of several sizes, with zeros, ties, and what bfloat16 can hold."""
    q, blocks = draw(st.integers(1, 70)), draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(q, blocks * GROUP, generator=generator) * 10 ** draw(SIZES)
    match draw(st.sampled_from(["float", "bfloat16", "ties", "zeros"])):
        case "bfloat16":
            weight = weight.bfloat16().float()
        case "ties":
            weight = torch.randint(-3, 4, weight.shape, generator=generator).float()
        case "zeros":
            weight[:, :GROUP] = 0
    return weight


@pytest.mark.parametrize("kind", QUANTISED)
@given(weight=weights())
def test_values_and_bytes_are_those_of_the_format(kind, weight):
    with np.errstate(all="ignore"):
        file = torch.from_numpy(quantize(weight.numpy(), TYPES[kind]))
    blocks = named(kind).store(weight)
    read = named(kind).read(file, blocks.shape)
    assert all(torch.equal(a, b) for a, b in zip(read.tensors, blocks.tensors, strict=True))
    assert np.array_equal(dequantize(file.numpy(), TYPES[kind]), blocks.values().numpy())
    assert blocks.nbytes == blocks.row_bytes * len(weight) == file.nbytes
    assert blocks.shape == tuple(weight.shape)


@pytest.mark.parametrize("kind", QUANTISED)
@given(weight=weights())
def test_another_order_holds_the_same_values(kind, weight):
    blocks = named(kind).store(weight)
    columns = blocks.laid_out("columns")
    assert columns.shape == blocks.shape and all(t.is_contiguous() for t in columns.tensors)
    assert torch.equal(columns.values(), blocks.values())
    back = columns.laid_out("rows")
    assert all(torch.equal(a, b) for a, b in zip(back.tensors, blocks.tensors, strict=True))


@pytest.mark.parametrize("kind", QUANTISED)
def test_odd_widths_are_filled_up_with_zeros(kind):
    weight = torch.randn(5, 40)
    blocks = named(kind).store(weight)
    filled = named(kind).store(torch.nn.functional.pad(weight, (0, 24)))
    assert blocks.shape == (5, 40) and blocks.nbytes == filled.nbytes
    assert torch.equal(blocks.values(), filled.values()[:, :40])
    columns = blocks.laid_out("columns")
    assert columns.shape == (5, 40)
    assert torch.equal(columns.values(), blocks.values())
    assert torch.equal(columns.laid_out("rows").tensors[0], blocks.tensors[0])
    row, column = torch.arange(5).repeat_interleave(40), torch.arange(40).repeat(5)
    for order in (blocks, columns):
        assert torch.equal(order.at(row, column), blocks.values().flatten())


@pytest.mark.parametrize("kind", QUANTISED)
def test_modules_compute_with_the_values_and_survive_casts(kind):
    blocks, bias = named(kind).store(torch.randn(48, 64)), torch.randn(48)
    linear, embedding = QuantisedLinear(blocks, bias), QuantisedEmbedding(blocks)
    x, ids = torch.randn(2, 5, 64), torch.tensor([[1, 47], [0, 1]])
    assert torch.equal(linear(x), torch.nn.functional.linear(x, blocks.values(), bias))
    assert torch.equal(embedding(ids), blocks.values()[ids])
    linear.store(blocks.laid_out("columns"))
    assert torch.equal(linear(x), torch.nn.functional.linear(x, blocks.values(), bias))
    twin = copy.deepcopy(linear).to(torch.bfloat16)
    assert twin.weight.dtype == twin(x.bfloat16()).dtype == torch.bfloat16
    assert torch.equal(twin.to(torch.float32).weight, blocks.values())


@pytest.mark.parametrize("name", [n for n in FORMATS if n in QUANTISED or FORMATS[n].group == 1])
def test_every_format_keeps_its_contract(name):
    weight = torch.randn(33, 70)
    stored = FORMATS[name].store(weight)
    whole = stored.values()
    assert whole.shape == stored.shape == (33, 70) and stored.nbytes == 33 * stored.row_bytes
    columns = stored.laid_out("columns")
    groups = -(-70 // stored.format.group)
    assert columns.nbytes == 70 * columns.column_bytes + groups * columns.scale_bytes
    assert torch.equal(columns.values(), whole) and torch.equal(columns.laid_out("rows").values(), whole)
    index = torch.tensor([0, 7, 32])
    assert torch.equal(stored.pieces(index), whole[index]) and torch.equal(columns.pieces(index), whole[:, index].t())
    assert torch.equal(stored.at(index, index), whole[index, index]) and torch.equal(
        columns.at(index, index), whole[index, index]
    )
    assert (whole - weight).abs().max() <= weight.abs().max() * 2.0 ** (
        1 - stored.format.bits if stored.format.bits <= 8 else -8
    )


@pytest.mark.parametrize("bits", [8, 4])
def test_packed_formats_round_along_the_pieces_that_are_read(bits):
    weight, steps = torch.randn(64, 96, generator=torch.Generator().manual_seed(0)), 127 if bits == 8 else 8
    weight[3, 32:64] = 0
    for order, pieces in (("rows", weight), ("columns", weight.t())):
        stored = named(f"packed{bits}").store(weight, order)  # pyright: ignore[reportCallIssue]
        assert stored.shape == (64, 96) and stored.nbytes == len(pieces) * (
            stored.row_bytes if order == "rows" else stored.column_bytes
        )
        values = stored.values() if order == "rows" else stored.values().t()
        error = (values - pieces).abs().unflatten(1, (-1, 32)).amax(-1)
        largest = pieces.abs().unflatten(1, (-1, 32)).amax(-1)
        # 4 bits reach 8 steps to one side and 7 to the other: the far end of the short side is a whole step off
        assert (error <= largest / steps * (0.51 if bits == 8 else 1.01)).all()
        index = torch.tensor([0, 3, 63])
        assert torch.equal(stored.pieces(index), values[index])
        with pytest.raises(ValueError, match="store the weight anew"):
            stored.laid_out("columns" if order == "rows" else "rows")
    with pytest.raises(ValueError, match="multiple of 32"):
        named(f"packed{bits}").store(torch.ones(2, 40))


def test_unknown_formats_and_types_are_refused_by_name():
    with pytest.raises(ValueError, match="'q8_1'; the nearest is 'q8_0'"):
        named("q8_1")
    with pytest.raises(TypeError, match=r"torch\.int32, which is no plain format"):
        held(torch.ones(2, 2, dtype=torch.int32), "rows")
    with pytest.raises(ValueError, match="GGUF files have no packed8"):
        named("packed8").read(torch.zeros(1, 34, dtype=torch.uint8), (1, 32))
