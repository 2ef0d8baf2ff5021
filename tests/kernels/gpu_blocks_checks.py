"""Products by rows with weights in formats of GGUF files against loops in float64. On a GPU, or on the CPU with TRITON_INTERPRET=1:

PYTHONPATH=src TRITON_INTERPRET=1 python tests/kernels/gpu_blocks_checks.py
"""

import itertools
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import DTYPES, TOLERANCE, linear_truth, make_mask, one_candidate
from raw_weights import extreme, weight_of

from moyu import kernels
from moyu.kernels import gpu
from moyu.kernels.gpu import blocks, planes
from moyu.kernels.gpu.common import KINDS
from moyu.weights import FORMATS, Stored

DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
CASES = tuple(itertools.product(KINDS, DTYPES, (1, 3, 16)))


def there(weight):
    return Stored(weight.format, weight.order, tuple(t.to(DEVICE) for t in weight.tensors), weight.shape)


def product(x, weight, mask=None, bias=None):
    moved = [None if t is None else t.to(DEVICE) for t in (x, mask, bias)]
    with kernels.use("gpu"):
        return kernels.rows(moved[0], there(weight), moved[1], bias=moved[2]).cpu()


def assert_right(y, x, weight, mask, bias):
    """Of 16 bits and several rows the values are rounded to x's type first: as much again as the output's rounding."""
    truth, size = linear_truth(x, weight.values().double(), mask, bias, "rows")
    most = TOLERANCE[x.dtype] * (2 if x.dtype != torch.float32 and len(x) > 1 else 1)
    assert ((y.double() - truth).abs() <= most * size + 1e-12).all(), float(((y - truth).abs() / size).max())


def check_rows_of_every_kind():
    for name, dtype, n in CASES:
        generator = torch.Generator().manual_seed(n)
        weight = weight_of(name, 70, 512, seed=n)
        x = torch.randn(n, 512, generator=generator).to(dtype)
        bias = torch.randn(70, generator=generator).to(dtype)
        for mask in (None, make_mask(n, 70, 0.5, generator), make_mask(n, 70, 0.0)):
            assert_right(product(x, weight, mask, bias), x, weight, mask, bias)


def check_codes_at_their_ends():
    for name, byte in itertools.product(KINDS, (0, 127, 128, 255)):
        weight = extreme(name, 3, 2, byte)
        x = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(byte))
        assert_right(product(x[:1], weight), x[:1], weight, None, None)
        assert_right(product(x, weight), x, weight, None, None)


def check_widths_that_fill_no_group():
    for name, rows in itertools.product(("q8_0", "q4_0"), (1, 3)):
        generator = torch.Generator().manual_seed(rows)
        weight = FORMATS[name].store(torch.randn(17, 45, generator=generator))
        x = torch.randn(rows, 45, generator=generator)
        assert_right(product(x, weight), x, weight, None, None)


def check_outputs_that_no_row_keeps_are_not_read_and_bits_repeat():
    weight = weight_of("q8_0", 40, 64)
    mask = make_mask(1, 40, 0.5, torch.Generator().manual_seed(0))
    weight.tensors[1][~mask[0]] = torch.nan
    x = torch.randn(1, 64, generator=torch.Generator().manual_seed(1))
    first = product(x, weight, mask)
    assert torch.isfinite(first).all() and all(torch.equal(first, product(x, weight, mask)) for _ in range(3))


def check_bytes_and_what_is_not_served():
    weight, x = weight_of("q4_k", 8, 256), torch.randn(1, 256)
    with kernels.count_bytes() as counted:
        product(x, weight, torch.tensor([[True, False] * 4]))
    assert counted.total == 4 * weight.row_bytes
    with pytest.raises(RuntimeError, match="no kernels for rows of weights in q5_k"):
        product(x, weight_of("q5_k", 8, 256))


def levels(x, weight, mask, bias=None):
    moved = [None if t is None else t.to(DEVICE) for t in (x, mask, bias)]
    with kernels.use("gpu"):
        return kernels.levels(moved[0], there(weight), moved[1], bias=moved[2]).cpu()


def assert_levels(x, weight, mask, bias=None):
    """All bits of the chosen inputs, the first bits of the others; x is not rounded."""
    planes = weight.laid_out("planes")
    whole, first, wide = planes.values().double(), planes.first_values().double(), x.double()
    truth = torch.where(mask, wide, 0) @ whole.t() + torch.where(mask, 0, wide) @ first.t()
    size = wide.abs() @ whole.abs().t()
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    y = levels(x, planes, mask, bias)
    assert ((y.double() - truth).abs() <= TOLERANCE[x.dtype] * size + 1e-12).all()
    assert torch.equal(y, levels(x, planes, mask, bias))


def check_levels_of_every_kind():
    for name, (dtype, rows, share) in itertools.product(
        KINDS, ((torch.float32, 2, 0.2), (torch.bfloat16, 1, 1.0), (torch.float16, 1, 0.0))
    ):
        generator = torch.Generator().manual_seed(rows)
        weight = weight_of(name, 128, 256, seed=rows)
        x, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, 256), (128,)))
        assert_levels(x, weight, make_mask(rows, 256, share, generator), bias)


def check_levels_of_widths_that_fill_no_group_or_tile():
    generator = torch.Generator().manual_seed(0)
    for outputs, inputs in ((64, 45), (70, 64)):
        weight = FORMATS["q8_0"].store(torch.randn(outputs, inputs, generator=generator))
        if outputs % 64 == 0:
            assert_levels(torch.randn(1, inputs, generator=generator), weight, make_mask(1, inputs, 0.5, generator))
        else:  # the reference serves it, which rounds x
            x, mask = torch.randn(1, inputs, generator=generator), make_mask(1, inputs, 0.5, generator)
            with kernels.use("reference"):
                assert torch.allclose(levels(x, weight.laid_out("planes"), mask),
                                      kernels.levels(x, weight.laid_out("planes"), mask))  # fmt: skip


def check_words_of_every_kind_that_can_be_parted():
    for name, (dtype, rows, share) in itertools.product(
        ("q8_0", "q6_k"), ((torch.float32, 2, 0.1), (torch.bfloat16, 1, 1.0), (torch.float16, 1, 0.0))
    ):
        generator = torch.Generator().manual_seed(rows)
        weight = weight_of(name, 70, 512, seed=rows).laid_out("parted")
        x, bias = (torch.randn(*size, generator=generator).to(dtype) for size in ((rows, 512), (70,)))
        mask, wide = make_mask(rows, 70, share, generator), x.double()
        with kernels.use("gpu"):
            y, again = (
                kernels.words(x.to(DEVICE), there(weight), mask.to(DEVICE), bias=bias.to(DEVICE)).cpu()
                for _ in range(2)
            )
            if bool(mask.all()):
                assert torch.equal(kernels.words(x.to(DEVICE), there(weight), bias=bias.to(DEVICE)).cpu(), y)
        truth = torch.where(mask, wide @ weight.values().double().t(), wide @ weight.first_values().double().t())
        size = wide.abs() @ weight.values().double().abs().t() + bias.double().abs()
        assert ((y.double() - truth - bias.double()).abs() <= TOLERANCE[dtype] * size + 1e-12).all()
        assert torch.equal(y, again)


def check_every_candidate():
    """On a GPU: the bits of one candidate are right in the other checks."""
    if gpu.INTERPRETED:
        return
    generator = torch.Generator().manual_seed(0)
    for kernel, candidates in CANDIDATES.items():
        for name, candidate in itertools.product(KINDS, candidates):
            kernel.configs[:], _ = [candidate], kernel.cache.clear()
            weight = weight_of(name, 192, 1024, seed=1)
            x = torch.randn(1, 1024, generator=generator).bfloat16()
            if kernel is blocks._one_row:
                assert_right(product(x, weight), x, weight, None, None)
            elif kernel is planes._levels:
                assert_levels(x, weight, make_mask(1, 1024, 0.2, generator))
            else:
                assert_right(product(x.expand(3, -1), weight), x.expand(3, -1), weight, None, None)
        kernel.configs[:] = candidates[:1]


CANDIDATES = {} if gpu.INTERPRETED else one_candidate(blocks, planes)


def main() -> None:
    """Every check, by name, or those that are named."""
    for name, check in list(globals().items()):
        if name.startswith("check_") and (not sys.argv[1:] or name in sys.argv[1:]):
            check()
            print(name, flush=True)


if __name__ == "__main__":
    main()
