"""Weights in planes: the very values when all bits are read, and products that read further bits for chosen inputs only."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import examples
from raw_weights import extreme, weight_of

from moyu import kernels
from moyu.kernels.backend import levels_read
from moyu.weights import FORMATS, IN_FILES
from moyu.weights.grouped import Grouped

SPLIT = [name for name in IN_FILES if FORMATS[name].splits]
WHOLE = [name for name in IN_FILES if not FORMATS[name].splits]


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize(("q", "blocks"), [(64, 1), (5, 2), (70, 3)])
def test_planes_hold_the_same_values_in_every_bit(name, q, blocks):
    weight = weight_of(name, q, blocks * FORMATS[name].block)
    planes = weight.laid_out("planes")
    assert torch.equal(planes.values(), weight.values())
    for order in ("rows", "columns"):
        back = planes.laid_out(order)
        assert all(torch.equal(a, b) for a, b in zip(back.tensors, weight.laid_out(order).tensors, strict=True))
    if q % 64 == 0:
        assert planes.nbytes == weight.laid_out("columns").nbytes
    index = torch.tensor([weight.shape[1] - 1, 0, 3])
    assert torch.equal(planes.pieces(index), weight.values().t()[index])
    assert torch.equal(planes.at(torch.tensor([0, q - 1, 0]), index), weight.at(torch.tensor([0, q - 1, 0]), index))


@pytest.mark.parametrize("name", SPLIT)
def test_first_bits_stand_for_the_middle_of_the_codes_that_share_them(name):
    form = FORMATS[name]
    assert isinstance(form, Grouped)
    weight = weight_of(name, 64, 2 * form.block)
    first, values = weight.laid_out("planes").first_values(), weight.values()
    # An error of a step or more would be a first bit that is wrong: (2^s - 1) / 2 steps are the most that further bits move.
    scale, _ = form._scales(weight)
    size = 32 // form.halves
    most = scale.abs().repeat_interleave(size, 1) * ((1 << {8: 4, 6: 2, 5: 2, 4: 2, 3: 1}[form.bits]) - 1) / 2
    assert bool(((values - first).abs() <= most * (1 + 1e-5) + 1e-6).all())
    assert float((values - first).abs().max()) > 0
    for dtype in (torch.float32, torch.bfloat16):
        expected = weight.laid_out("planes").first_values(dtype)
        for order in ("rows", "columns", "planes"):
            assert torch.equal(kernels.first_values(weight.laid_out(order), dtype), expected)
            assert torch.equal(kernels.values(weight.laid_out(order), dtype), weight.values(dtype))


@pytest.mark.parametrize("name", WHOLE)
def test_formats_of_tables_and_of_two_bits_have_no_planes(name):
    weight = weight_of(name, 4, FORMATS[name].block)
    with pytest.raises(ValueError, match="no planes"):
        weight.laid_out("planes")


@pytest.mark.parametrize("name", SPLIT)
@settings(max_examples=examples(12), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    q=st.integers(1, 200),
    blocks=st.integers(1, 3),
    rows=st.integers(1, 11),
    share=st.sampled_from([0.0, 0.2, 0.7, 1.0]),
)
def test_the_product_is_the_reference(needs_cpu, name, q, blocks, rows, share):
    n = blocks * FORMATS[name].block
    generator = torch.Generator().manual_seed(q)
    weight = weight_of(name, q, n, seed=q).laid_out("planes")
    x, bias = torch.randn(rows, n, generator=generator), torch.randn(q, generator=generator)
    mask = torch.rand(rows, n, generator=generator) < share
    found = {}
    for backend in ("reference", "cpu"):
        with kernels.use(backend), kernels.count_bytes() as counter:
            found[backend] = kernels.levels(x, weight, mask, bias=bias), counter.total
    (expected, read), (y, own) = found["reference"], found["cpu"]
    assert own == read == levels_read(weight, mask) + bias.nbytes
    # sums of floats in another order
    assert float((y - expected).abs().max()) <= 2e-6 * float(expected.abs().max()) * max(1, n // 256)
    if rows > 1:  # a row does not see the others
        with kernels.use("cpu"):
            alone = kernels.levels(x[:1], weight, mask[:1], bias=bias)
        assert torch.equal(alone, y[:1])


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize(("q", "blocks"), [(64, 1), (70, 3), (200, 2)])
def test_rows_that_choose_everything_are_what_each_is_alone_in_every_bit(needs_cpu, name, q, blocks):
    """Where all rows choose all inputs of a group, its codes are joined; beside a row that does not, they are not."""
    n = blocks * FORMATS[name].block
    weight, generator = weight_of(name, q, n, seed=q).laid_out("planes"), torch.Generator().manual_seed(q)
    bias = torch.randn(q, generator=generator)
    for rows in (1, 2, 3, 4, 5, 7, 8, 17):
        x = torch.randn(rows, n, generator=generator)
        every = torch.ones(rows, n, dtype=torch.bool)
        with kernels.use("cpu"):
            together = kernels.levels(x, weight, every, bias=bias)
            alone = [kernels.levels(x[i : i + 1], weight, every[i : i + 1], bias=bias) for i in range(rows)]
            other = every.clone()
            other[-1] = False
            beside = kernels.levels(x, weight, other, bias=bias)
        assert torch.equal(together, torch.cat(alone))
        assert torch.equal(together[:-1], beside[:-1])


@pytest.mark.parametrize("name", SPLIT)
@pytest.mark.parametrize("byte", [0x00, 0x7F, 0x80, 0xFF])
def test_sums_of_extreme_codes_fit(needs_cpu, name, byte):
    weight = extreme(name, 64, 1, byte)
    x = torch.full((2, weight.shape[1]), 3.0)
    x[1] = -3.0
    for share in (0, 1):
        mask = torch.full(x.shape, bool(share))
        with kernels.use("reference"):
            expected = kernels.levels(x, weight.laid_out("planes"), mask)
        with kernels.use("cpu"):
            y = kernels.levels(x, weight.laid_out("planes"), mask)
        assert torch.allclose(y, expected, rtol=1e-5, atol=1e-3 * float(expected.abs().max()) + 1e-6)


def test_another_order_is_refused():
    weight = weight_of("q8_0", 64, 64)
    with pytest.raises(ValueError, match="lies by rows, and `planes` are read"):
        kernels.levels(torch.ones(1, 64), weight, torch.ones(1, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="first bits"):
        weight.first_values()
