"""Parted weights: the very values when all bits are read, and products that read further bits of chosen outputs only."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raw_weights import extreme, weight_of

from moyu import kernels
from moyu.kernels.backend import words_read
from moyu.weights import FORMATS, IN_FILES

PARTED = [name for name in IN_FILES if FORMATS[name].splits_rows]


@pytest.mark.parametrize("name", PARTED)
@pytest.mark.parametrize(("q", "blocks"), [(64, 1), (5, 2), (70, 3)])
def test_parted_weights_hold_the_same_values_in_every_bit(name, q, blocks):
    weight = weight_of(name, q, blocks * FORMATS[name].block)
    parted = weight.laid_out("parted")
    assert torch.equal(parted.values(), weight.values())
    assert parted.nbytes == weight.nbytes
    for order in ("rows", "columns", "planes"):
        back = parted.laid_out(order)
        assert all(torch.equal(a, b) for a, b in zip(back.tensors, weight.laid_out(order).tensors, strict=True))
    index = torch.tensor([q - 1, 0, 3])
    assert torch.equal(parted.pieces(index), weight.values()[index])
    assert torch.equal(parted.at(index, torch.tensor([0, 31, 7])), weight.at(index, torch.tensor([0, 31, 7])))
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(parted.first_values(dtype), weight.laid_out("planes").first_values(dtype))
        assert torch.equal(kernels.first_values(parted, dtype), parted.first_values(dtype))
        assert torch.equal(kernels.values(parted, dtype), weight.values(dtype))


@pytest.mark.parametrize("name", [name for name in IN_FILES if name not in PARTED])
def test_formats_of_tables_and_of_few_bits_cannot_be_parted(name):
    with pytest.raises(ValueError, match="cannot be parted"):
        weight_of(name, 4, FORMATS[name].block).laid_out("parted")


@pytest.mark.parametrize("name", PARTED)
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    q=st.integers(1, 200),
    blocks=st.integers(1, 3),
    rows=st.integers(1, 11),
    share=st.sampled_from([0.0, 0.1, 0.7, 1.0]),
)
def test_the_product_is_the_reference(needs_cpu, name, q, blocks, rows, share):
    n = blocks * FORMATS[name].block
    generator = torch.Generator().manual_seed(q)
    weight = weight_of(name, q, n, seed=q).laid_out("parted")
    x, bias = torch.randn(rows, n, generator=generator), torch.randn(q, generator=generator)
    mask = torch.rand(rows, q, generator=generator) < share
    found = {}
    for backend in ("reference", "cpu"):
        with kernels.use(backend), kernels.count_bytes() as counter:
            found[backend] = kernels.words(x, weight, mask, bias=bias), counter.total
    (expected, read), (y, own) = found["reference"], found["cpu"]
    assert own == read == words_read(weight, mask) + bias.nbytes
    # sums of floats in another order
    assert float((y - expected).abs().max()) <= 4e-6 * float(expected.abs().max()) * max(1, n // 256)
    if rows > 1:  # a row does not see the others
        with kernels.use("cpu"):
            alone = kernels.words(x[:1], weight, mask[:1], bias=bias)
        assert torch.equal(alone, y[:1])


@pytest.mark.parametrize("name", PARTED)
@pytest.mark.parametrize(("q", "blocks"), [(1, 1), (70, 3), (64, 9)])
def test_all_bits_of_all_outputs_give_what_rows_give_in_every_bit(needs_cpu, name, q, blocks):
    n = blocks * FORMATS[name].block
    weight = weight_of(name, q, n)
    generator = torch.Generator().manual_seed(q)
    bias = torch.randn(q, generator=generator)
    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 17):
        x = torch.randn(rows, n, generator=generator)
        with kernels.use("cpu"), kernels.count_bytes() as counter:
            y = kernels.words(x, weight.laid_out("parted"), bias=bias)
            read = counter.total
            expected = kernels.rows(x, weight, bias=bias)
            alone = torch.cat([kernels.words(row[None], weight.laid_out("parted"), bias=bias) for row in x])
        assert torch.equal(y, expected) and torch.equal(y, alone)
        assert read == words_read(weight.laid_out("parted"), None) + bias.nbytes
        with kernels.use("reference"):
            assert torch.allclose(kernels.words(x, weight.laid_out("parted"), bias=bias), y, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", PARTED)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_sums_of_extreme_codes_fit(needs_cpu, name, byte):
    weight = extreme(name, 64, 1, byte).laid_out("parted")
    x = torch.full((2, weight.shape[1]), 3.0)
    x[1] = -3.0
    for share in (0, 1):
        mask = torch.full((2, 64), bool(share))
        with kernels.use("reference"):
            expected = kernels.words(x, weight, mask)
        with kernels.use("cpu"):
            y = kernels.words(x, weight, mask)
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-3 * float(expected.abs().max()) + 1e-6)


def test_another_order_is_refused():
    weight = weight_of("q8_0", 64, 64)
    with pytest.raises(ValueError, match="lies by rows, and `parted` are read"):
        kernels.words(torch.ones(1, 64), weight, torch.ones(1, 64, dtype=torch.bool))
