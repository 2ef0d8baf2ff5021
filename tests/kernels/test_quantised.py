"""Products with quantised weights, on each back end, against sums of integers."""

import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, FORMS, TOLERANCE, examples, make_mask
from raw_weights import extreme, weight_of
from torch import Tensor

from moyu import kernels
from moyu.weights import IN_FILES, QUANTISED, Stored, named
from moyu.weights.grouped import GROUP, Grouped

each_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(20))
widths = st.sampled_from([1, 20, 32, 64, 96, 100, 128, 224, 256, 288, 300, 544])
heights = st.sampled_from([1, 3, 4, 7, 31, 32, 33, 63, 64, 65, 100, 128, 200])
densities = st.sampled_from([0.0, 0.1, 0.5, 1.0])
EDGE = 1e-3  # of an integer's step: values so close to the middle of two may be rounded to either


def draw(generator, *shape, dtype=torch.float32):
    """Values whose blocks differ in size."""
    return (torch.randn(*shape, generator=generator) * torch.rand(shape[0], 1, generator=generator) * 3).to(dtype)


def make(generator, kind: str, q: int, n: int) -> Stored:
    """A weight (q, n), n up to whole blocks where MOYU does not quantise to the format."""
    if kind in QUANTISED:
        return named(kind).store(draw(generator, q, n))
    block = named(kind).block
    return weight_of(kind, q, -(-n // block) * block, seed=int(torch.randint(1 << 30, (), generator=generator)))


def integers(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x (N, n) as integers (N, n) int64, the scale of each, and by how much the output may move where a value is on an edge."""
    padded = torch.nn.functional.pad(x.float(), (0, -x.shape[1] % GROUP)).unflatten(1, (-1, GROUP))
    most = padded.abs().amax(2, keepdim=True)
    moved = padded * torch.where(most == 0, 0, most.new_tensor(127.0) / most)
    edge = ((moved - moved.floor() - 0.5).abs() < EDGE).double()
    scale = (most / 127).expand_as(padded)
    return tuple(t.flatten(1)[:, : x.shape[1]] for t in (moved.round().long(), scale.double(), edge))  # pyright: ignore


def product(x: Tensor, weight: Stored) -> tuple[Tensor, Tensor, Tensor]:
    """x @ W.T of rounded x, in float64; the magnitude added up; what edges may move."""
    (xi, xs, edge), weight = integers(x), weight.laid_out("rows")
    values = weight.values(torch.float64)
    form = weight.format
    assert isinstance(form, Grouped)
    scale, offset = (None if t is None else t.double().abs() for t in form._scales(weight))
    # Kernels add codes that are not yet levels, and offsets apart: both are as large as the sums may get on the way.
    size = scale * (32 if form.table is None else 128) if offset is None else scale * 32 + offset
    size = values.abs() + size.repeat_interleave(GROUP // form.halves, 1)[:, : weight.shape[1]]
    x = xi * xs
    return x @ values.T, x.abs() @ size.T, (edge * xs) @ values.abs().T


def assert_close(y: Tensor, truth: tuple[Tensor, Tensor, Tensor]) -> None:
    expected, size, slack = truth
    assert y.shape == expected.shape and torch.isfinite(y).all() and y.is_contiguous()
    tolerance = (TOLERANCE[y.dtype] if y.dtype != torch.float32 else 2e-6) * size.clamp_min(1e-30)
    over = ((y.double() - expected).abs() - slack) / (tolerance + torch.finfo(y.dtype).tiny)
    assert over.numel() == 0 or over.max() <= 1, f"{over.max().item():.3g} of the tolerance"


def plus(truth, bias):
    return truth if bias is None else (truth[0] + bias.double(), truth[1] + bias.double().abs(), truth[2])


def touched(mask: Tensor) -> int:
    """Groups of 32 that any row keeps something of."""
    kept = torch.nn.functional.pad(mask.any(0), (0, -mask.shape[1] % GROUP))
    return int(kept.unflatten(0, (-1, GROUP)).any(1).sum())


def spread(weight: Stored, pad: int) -> Stored:
    """The same weight with a gap behind each row of memory."""

    def apart(tensor):
        return torch.cat([tensor, tensor.new_zeros(len(tensor), 16 * pad)], 1)[:, : tensor.shape[1]]

    return Stored(weight.format, weight.order, tuple(map(apart, weight.tensors)), weight.shape)


@pytest.mark.parametrize("kind", IN_FILES)
@each_backend
@given(
    n=st.integers(1, 9), width=widths, q=heights, dtype=st.sampled_from(DTYPES), pad=st.sampled_from([0, 1]),
    density=st.one_of(st.none(), densities), biased=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_rows_and_columns_are_sums_of_integers(backend, kind, n, width, q, dtype, pad, density, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = make(generator, kind, q, width)
    width = weight.shape[1]
    x = draw(generator, n, width, dtype=dtype)
    bias = torch.randn(q, generator=generator).to(dtype) if biased else None
    mask = None if density is None else make_mask(n, q, density, generator)
    kept = q if mask is None else int(mask.any(0).sum())
    with kernels.count_bytes() as counter:
        y = kernels.rows(x, spread(weight, pad), mask, bias=bias)
    each = weight.nbytes // q + (bias.element_size() if biased else 0)  # pyright: ignore
    assert counter.total == kept * each
    truth = plus(product(x, weight), bias)
    assert_close(y, truth if mask is None else tuple(torch.where(mask, t, 0) for t in truth))
    if mask is not None:
        assert (y[~mask] == 0).all()

    columns = spread(weight.laid_out("columns"), pad)
    mask = make_mask(n, width, 1.0 if density is None else density, generator)
    with kernels.count_bytes() as counter:
        y = kernels.columns(x, columns, mask, bias=bias)
    assert_close(y, plus(product(torch.where(mask, x, 0), weight), bias))
    groups = touched(mask)
    size = int(mask.any(0).sum()) * columns.column_bytes + groups * columns.scale_bytes
    assert counter.total == size + (bias.nbytes if biased else 0)  # pyright: ignore


@pytest.mark.parametrize("kind", IN_FILES)
@pytest.mark.parametrize("outputs", [2048, 2145, 4200])
@pytest.mark.parametrize("kept", [5, 12, 13, 20, 32])
def test_columns_of_more_outputs_than_a_tile(backend, kind, outputs, kept):
    """Kept columns of a group are taken 8 to 12 at a time, over 2048 outputs at a time."""
    generator = torch.Generator().manual_seed(kept)
    weight = make(generator, kind, outputs, 96)
    x = draw(generator, 2, weight.shape[1])
    mask = (torch.arange(x.shape[1]) % GROUP < kept).expand(2, -1).contiguous()
    y = kernels.columns(x, weight.laid_out("columns"), mask)
    assert_close(y, product(torch.where(mask, x, 0), weight))


@pytest.mark.parametrize("kind", IN_FILES)
@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("byte", [0, 0x80, 255])
def test_the_largest_sum_of_a_group_fits(backend, kind, sign, byte):
    """32 columns of the least or the largest code times 127: with 4 bits -32512, nearly all that 16 bits hold."""
    weight = extreme(kind, 128, 1, byte)
    x = torch.full((1, weight.shape[1]), sign)
    y = kernels.columns(x, weight.laid_out("columns"), torch.ones(x.shape, dtype=torch.bool))
    assert_close(y, product(x, weight))
    assert_close(kernels.rows(x, weight), product(x, weight))


def test_values_between_two_integers_go_where_the_reference_says(backend):
    """Half to even after x times 127 / max |x| in fp32, on every back end. With a reciprocal in between one in twelve of these differs."""
    generator = torch.Generator().manual_seed(0)
    largest = torch.rand(64, 1, generator=generator) + 0.5
    x = torch.cat([largest, largest * (2 * torch.arange(31) + 1) / 254], 1)  # (64, 32)
    whole, scale, _ = integers(x)
    y = kernels.rows(x, named("q8_0").store(torch.eye(GROUP)))
    unit = float(named("q8_0").store(torch.eye(1, GROUP)).values()[0, 0])
    assert torch.equal((y.double() / scale / unit).round().long(), whole)


@pytest.mark.parametrize("kind", IN_FILES)
@each_backend
@given(
    n=st.integers(1, 9), d=widths, f=st.sampled_from([9, 32, 64, 96, 320, 344]), form=st.sampled_from(FORMS),
    dtype=st.sampled_from(DTYPES), density=densities, biased=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_neurons_are_sums_of_integers(backend, kind, n, d, f, form, dtype, density, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    d, f = (size if kind in QUANTISED else -(-size // named(kind).block) * named(kind).block for size in (d, f))
    gate, up = (make(generator, kind, f, d) for _ in range(2))
    down = make(generator, kind, d, f).laid_out("columns")
    x, mask = draw(generator, n, d, dtype=dtype) * d**-0.5, make_mask(n, f, density, generator)
    given_ = draw(generator, n, f, dtype=dtype) if form.endswith("given") else None
    has_gate, has_up = form in ("gated", "gate_given"), form != "gate_given"
    biases = [torch.randn(k, generator=generator).to(dtype) if biased else None for k in (f, f, d)]
    act = kernels.activation("silu")
    g, u = (plus(product(x, w), b)[0] for w, b in zip((gate, up), biases, strict=False))
    value = act(g) if has_gate else act(u) if form == "plain" else u
    value = value * u if form == "gated" else value if given_ is None else value * given_.double()
    with kernels.count_bytes() as counter:
        y = kernels.neurons(
            x, gate if has_gate else None, up if has_up else None, down, mask, act="silu",
            gate_bias=biases[0] if has_gate else None, up_bias=biases[1] if has_up else None, down_bias=biases[2],
            given=given_,
        )  # fmt: skip
    expected, size, slack = plus(product(torch.where(mask, value, 0).float(), down), biases[2])
    # The values are float32 here and there: where two orders of sums differ, a block's largest value and so all move.
    assert_close(y, (expected, size * 10, slack))
    kept, groups = int(mask.any(0).sum()), touched(mask)
    parts = has_gate + has_up
    size = kept * (parts * gate.nbytes // f + down.column_bytes) + groups * down.scale_bytes
    extra = (kept * parts + d) * x.element_size() if biased else 0
    assert counter.total == size + extra


@pytest.mark.parametrize("kind", IN_FILES)
@pytest.mark.parametrize("q", [1, 33, 96, 200])
def test_dequantised_in_every_bit(needs_cpu, kind, q):
    weight = make(torch.Generator().manual_seed(q), kind, q, 320)
    with kernels.use("cpu"):
        for stored in (weight, weight.laid_out("columns"), spread(weight, 1)):
            for dtype in DTYPES:
                assert torch.equal(kernels.values(stored, dtype), weight.values(dtype))


@pytest.mark.parametrize("kind", IN_FILES)
def test_many_rows_and_threads_agree_with_one(needs_cpu, kind):
    generator = torch.Generator().manual_seed(3)
    weight, x = make(generator, kind, 320, 512), draw(generator, 70, 512)
    mask = make_mask(70, 512, 0.5, generator)
    threads = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            with kernels.use("cpu"):
                assert_close(kernels.rows(x, weight), product(x, weight))
                y = kernels.columns(x, weight.laid_out("columns"), mask)
                assert_close(y, product(torch.where(mask, x, 0), weight))
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_refused():
    weight, x = named("q8_0").store(torch.randn(8, 64)), torch.randn(1, 64)
    with pytest.raises(ValueError, match="lies by rows"):
        kernels.columns(x, weight, torch.ones(1, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="shape"):
        kernels.rows(torch.randn(1, 32), weight)
    down = named("q8_0").store(torch.randn(64, 32)).laid_out("columns")
    with pytest.raises(TypeError, match="quantise all"):
        kernels.neurons(x, None, torch.randn(32, 64), down, torch.ones(1, 32, dtype=torch.bool), act="silu")


@pytest.mark.slow
@pytest.mark.skipif("MOYU_ISA" in __import__("os").environ, reason="this is what the test sets")
def test_each_instruction_set(needs_cpu):
    """The others that this machine has, in processes of their own: the choice is made at import."""
    for isa in kernels.cpu.extension().isas()[1:]:
        code = (
            "import sys, torch; sys.path.insert(0, sys.argv[1]); import test_quantised as t; from moyu import kernels\n"
            "for kind in t.IN_FILES:\n"
            "    for q, width in ((33, 96), (200, 288)):\n"
            "        g = torch.Generator().manual_seed(1)\n"
            "        w = t.make(g, kind, q, width); x = t.draw(g, 3, w.shape[1])\n"
            "        mask = t.make_mask(*x.shape, 0.5, g)\n"
            "        t.assert_close(kernels.rows(x, w), t.product(x, w))\n"
            "        y = kernels.columns(x, w.laid_out('columns'), mask)\n"
            "        t.assert_close(y, t.product(torch.where(mask, x, 0), w))\n"
            "print(kernels.describe())"
        )
        import os

        folder = os.path.dirname(__file__)
        env = {**os.environ, "MOYU_ISA": isa}
        done = subprocess.run(
            [sys.executable, "-c", code, folder], env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert isa in done.stdout
