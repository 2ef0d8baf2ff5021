"""What the kernels compute, on each back end, against loops in float64."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import DTYPES, FORMS, assert_close, examples, linear_truth, make_mask, make_neurons

from moyu import kernels
from moyu.weights import held

each_backend = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=examples(40))
sizes = st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 100, 130])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("act", kernels.ACTIVATIONS)
def test_neurons_of_every_form_activation_and_dtype(backend, act, form, dtype):
    for n, density in ((1, 0.4), (3, 0.6)):
        case = make_neurons(n, 48, 40, dtype=dtype, form=form, act=act, density=density)
        assert_close(case.run(), case.truth())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["neuron_major", "separate", "padded"])
@pytest.mark.parametrize("n", [1, 3, 9])
def test_neurons_of_every_layout_and_density(backend, n, layout, dtype):
    for density in (0.0, 0.3, 1.0):
        for biases in (False, True):
            case = make_neurons(n, 64, 90, dtype=dtype, layout=layout, density=density, biases=biases)
            assert_close(case.run(), case.truth())


@each_backend
@given(
    n=st.integers(1, 9), d=sizes, f=sizes, d_out=sizes, dtype=st.sampled_from(DTYPES), form=st.sampled_from(FORMS),
    layout=st.sampled_from(["neuron_major", "separate", "padded"]), density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_neurons_of_any_size(backend, n, d, f, d_out, dtype, form, layout, density, seed):
    case = make_neurons(n, d, f, d_out, dtype, form, layout=layout, density=density, seed=seed)
    assert_close(case.run(), case.truth())


@each_backend
@given(
    n=st.integers(1, 9), size=sizes, q=sizes, dtype=st.sampled_from(DTYPES), pad=st.sampled_from([0, 3]),
    density=st.sampled_from([None, 0.0, 0.1, 0.5, 1.0]), biased=st.booleans(), seed=st.integers(0, 1000),
)  # fmt: skip
def test_rows_and_columns_of_any_size(backend, n, size, q, dtype, pad, density, biased, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, size, generator=generator).to(dtype)
    weight = torch.randn(q, size + pad, generator=generator).to(dtype)[:, :size]
    bias = torch.randn(q, generator=generator).to(dtype) if biased else None
    mask = None if density is None else make_mask(n, q, density, generator)
    y = kernels.rows(x, weight, mask, bias=bias)
    assert_close(y, linear_truth(x, weight, mask, bias, "rows"))
    if mask is not None:
        assert (y[~mask] == 0).all()

    weight = torch.randn(size, q + pad, generator=generator).to(dtype)[:, :q].T
    mask = make_mask(n, size, 1.0 if density is None else density, generator)
    assert_close(kernels.columns(x, weight, mask, bias=bias), linear_truth(x, weight, mask, bias, "columns"))


@pytest.mark.parametrize("n", [31, 32, 33, 70])
def test_many_rows_are_taken_in_blocks(backend, n):
    case = make_neurons(n, 40, 50, dtype=torch.bfloat16)
    assert_close(case.run(), case.truth())
    x, weight, mask = torch.randn(n, 40), torch.randn(50, 40), make_mask(n, 50, 0.5)
    assert_close(kernels.rows(x, weight, mask), linear_truth(x, weight, mask, None, "rows"))
    weight, mask = torch.randn(40, 50).T, make_mask(n, 40, 0.5)
    assert_close(kernels.columns(x, weight, mask), linear_truth(x, weight, mask, None, "columns"))


def test_large_enough_for_every_thread(backend):
    case = make_neurons(2, 512, 1000, dtype=torch.bfloat16)
    assert_close(case.run(), case.truth())


def test_float64_is_the_references(backend):
    if backend == "reference":
        case = make_neurons(3, 20, 30, dtype=torch.float64)
        assert_close(case.run(), case.truth())


def test_no_rows_and_no_neurons(backend):
    assert make_neurons(0, 8, 4).run().shape == (0, 8)
    case = make_neurons(2, 8, 0)
    assert torch.equal(case.run(), case.down_bias.expand(2, -1))
    assert kernels.rows(torch.zeros(0, 8), torch.zeros(3, 8)).shape == (0, 3)
    assert kernels.columns(torch.ones(2, 0), torch.zeros(0, 3).T, torch.ones(2, 0, dtype=torch.bool)).eq(0).all()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_poison_in_skipped_pieces_stays_out(backend, dtype, poison):
    case = make_neurons(3, 40, 60, dtype=dtype)
    case.mask[1, :5] = True
    case.mask[0, :5] = case.mask[2, :5] = False  # pieces that row 1 alone keeps
    expected = case.truth()
    skipped = ~case.mask.any(0)
    for tensor, index in ((case.gate, skipped), (case.up, skipped), (case.gate_bias, skipped), (case.up_bias, skipped)):
        tensor[index] = poison
    case.down[:, skipped] = poison
    assert_close(case.run(), expected)
    for tensor in (case.gate, case.up, case.down.T):
        tensor[:5] = poison
    assert not torch.isfinite(case.run()[1]).all()  # what a row keeps it gets

    x, weight, mask = torch.randn(2, 40).to(dtype), torch.randn(50, 40).to(dtype), make_mask(2, 50, 0.5)
    expected = linear_truth(x, weight, mask, None, "rows")
    weight[~mask.any(0)] = poison
    assert_close(kernels.rows(x, weight, mask), expected)
    own = mask[1] & ~mask[0]
    weight[own] = poison
    assert (kernels.rows(x, weight, mask)[0, own] == 0).all()

    weight, mask = torch.randn(40, 50).to(dtype).T, make_mask(2, 40, 0.5)
    expected = linear_truth(x, weight, mask, None, "columns")
    weight[:, ~mask.any(0)] = poison
    x[~mask] = poison
    assert_close(kernels.columns(x, weight, mask), expected)


def test_nan_in_the_input_is_not_hidden(backend):
    for act in kernels.ACTIVATIONS:
        case = make_neurons(2, 8, 20, act=act, density=1.0)
        case.x[1, 3] = float("nan")
        y = case.run()
        assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all()


def test_activations_at_the_ends(backend):
    """Large arguments overflow the exponentials inside: the limits must come out, not NaN."""
    one = torch.ones(1, 1)
    for name in kernels.ACTIVATIONS:
        for z in (-1e4, -200.0, -90.0, -20.0, -1.0, -0.0, 1e-20, 0.5, 20.0, 90.0, 1e4):
            y = kernels.neurons(one * z, None, one, one, one.bool(), act=name)
            expected = kernels.activation(name)(torch.tensor(z, dtype=torch.float64))
            assert torch.isclose(y[0, 0].double(), expected, rtol=1e-5, atol=2e-6), (name, z, y, expected)


def test_rounding_to_16_bits_is_to_nearest_even(backend):
    values = torch.randn(4096, 1) * 10.0 ** torch.randint(-9, 6, (4096, 1))
    for dtype in (torch.bfloat16, torch.float16):
        # two fp32-exact terms whose sum needs rounding
        pair = torch.cat([values, values * 2**-9], 1).to(dtype)
        expected = (pair[:, :1].float() + pair[:, 1:].float()).to(dtype)
        assert torch.equal(kernels.rows(torch.ones(1, 2, dtype=dtype), pair), expected.T)


def test_inputs_may_be_strided_and_weights_unaligned(backend):
    case = make_neurons(3, 40, 60)
    wide = torch.randn(3, 80)
    wide[:, ::2] = case.x
    assert_close(type(case)(**vars(case) | {"x": wide[:, ::2], "mask": case.mask.T.contiguous().T}).run(), case.truth())
    weight = torch.randn(30 * 41 + 1)[1:].view(30, 41)
    x = torch.randn(1, 41)
    assert_close(kernels.rows(x, weight), linear_truth(x, weight, None, None, "rows"))


def test_one_mask_row_may_be_expanded_and_parameters_given(backend):
    case = make_neurons(4, 40, 60)
    shared = type(case)(**vars(case) | {"mask": case.mask[:1].expand(4, -1)})
    assert_close(shared.run(), shared.truth())
    weight, x = torch.nn.Parameter(torch.randn(7, 40)), torch.randn(1, 40)
    with torch.no_grad():
        assert_close(kernels.rows(x, weight), linear_truth(x, weight.detach(), None, None, "rows"))


def test_the_same_call_gives_the_same_bits(backend):
    case = make_neurons(3, 300, 700, dtype=torch.bfloat16)
    first = case.run()
    assert all(torch.equal(first, case.run()) for _ in range(10))


def test_several_python_threads_at_once(backend):
    cases = [make_neurons(1 + i % 3, 256, 400, dtype=torch.bfloat16, seed=i) for i in range(4)]
    expected = [case.run() for case in cases]
    wrong = []

    def work(i):
        with kernels.use(backend):
            for _ in range(30):
                if not torch.equal(cases[i].run(), expected[i]):
                    wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


ISA_PROGRAM = """
import sys
import torch
sys.path.insert(0, sys.argv[2])
from kernel_cases import DTYPES, FORMS, assert_close, linear_truth, make_mask, make_neurons
from moyu import kernels
assert kernels.cpu._cpu.isa() == sys.argv[1], kernels.describe()
torch.manual_seed(0)
def flushes(dtype):  # AVX512-BF16 takes subnormal numbers as 0
    return dtype == torch.bfloat16 and sys.argv[1] == "avx512bf16"
with kernels.use("cpu"):
    for dtype in DTYPES:
        for n in (1, 2, 3, 9):
            for d in (1, 7, 15, 16, 17, 31, 33, 64, 100, 130):
                for form in FORMS:
                    case = make_neurons(n, d, 33, dtype=dtype, form=form)
                    assert_close(case.run(), case.truth())
                x, w, mask = torch.randn(n, d).to(dtype), torch.randn(29, d).to(dtype), make_mask(n, 29, 0.5)
                assert_close(kernels.rows(x, w, mask), linear_truth(x, w, mask, None, "rows"))
                w, mask = torch.randn(29, d).to(dtype), make_mask(n, 29, 0.5)
                x = torch.randn(n, 29).to(dtype)
                assert_close(kernels.columns(x, w.T, mask), linear_truth(x, w.T, mask, None, "columns"))
        bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16)
        if dtype != torch.float32:
            every = bits.view(dtype)
            every = every[torch.isfinite(every)][:, None]
            exact = torch.where(every.abs() < torch.finfo(dtype).tiny, every * 0, every) if flushes(dtype) else every
            assert torch.equal(kernels.rows(torch.ones(1, 1, dtype=dtype), every), exact.T)
"""


@pytest.mark.parametrize("isa", ["avx512bf16", "avx512", "avx2", "portable"])
def test_each_instruction_set(needs_cpu, isa):
    if isa not in kernels.cpu._cpu.isas():
        pytest.skip(f"this CPU or build has no {isa}")
    environment = os.environ | {"MOYU_ISA": isa, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    program = [sys.executable, "-c", ISA_PROGRAM, isa, os.path.dirname(__file__)]
    done = subprocess.run(program, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_corrupted_kernel_is_caught(backend, monkeypatch):
    """One neuron in 300 dropped, one row of weights off by one, one bias forgotten: the comparison must see each."""
    module = kernels.BACKENDS[backend]
    case = make_neurons(2, 64, 300, dtype=torch.bfloat16, density=1.0)
    whole = module.neurons

    def drop_one(call):
        mask = call.mask.clone()
        mask[0, 123] = False
        return whole(call._replace(mask=mask))

    def shift_up(call):
        return whole(call._replace(up=held(call.up.tensors[0].roll(1, 0), "rows")))

    def forget_bias(call):
        return whole(call._replace(down_bias=None))

    for corrupted in (drop_one, shift_up, forget_bias):
        monkeypatch.setattr(module, "neurons", corrupted)
        with pytest.raises(AssertionError, match="relative error"):
            assert_close(case.run(), case.truth())
    monkeypatch.undo()
    assert_close(case.run(), case.truth())
