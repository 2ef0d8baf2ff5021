"""Everything around the values: errors, byte counts, the choice of a back end, the operators' registration."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from kernel_cases import DTYPES, FORMS, make_mask, make_neurons

from moyu import kernels
from moyu.kernels import operators
from moyu.weights.q4_0 import Q4_0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [1, 3, 9])
def test_counted_bytes_of_neurons_equal_the_formula(backend, n, form, dtype):
    for density in (0.0, 0.2, 1.0):
        case = make_neurons(n, 40, 60, 24, dtype=dtype, form=form, density=density, layout="separate")
        parts = (case.gate is not None) + (case.up is not None)
        kept = int(case.mask.any(0).sum())
        with kernels.count_bytes() as counter:
            case.run()
        assert counter.total == (kept * (parts * 40 + 24 + parts) + 24) * dtype.itemsize
        assert counter.by_op == {"neurons": counter.total}


def test_counted_bytes_of_rows_and_columns_equal_the_formula(backend):
    x, weight, bias = torch.randn(3, 40), torch.randn(50, 40), torch.randn(50)
    mask = make_mask(3, 50, 0.3)
    kept = int(mask.any(0).sum())
    with kernels.count_bytes() as counter:
        kernels.rows(x, weight)
        assert counter.total == 50 * 40 * 4
        kernels.rows(x, weight, mask, bias=bias)
        assert counter.total == 50 * 40 * 4 + kept * 41 * 4
    assert set(counter.by_op) == {"rows"}
    mask = make_mask(3, 40, 0.3)
    kept = int(mask.any(0).sum())
    with kernels.count_bytes() as counter:
        kernels.columns(x, weight.T.contiguous().T, mask, bias=bias)
    assert counter.by_op == {"columns": (kept * 50 + 50) * 4}


def test_counters_nest_and_keep_to_their_thread(backend):
    x, weight = torch.randn(1, 8), torch.randn(4, 8)
    with kernels.count_bytes() as outer:
        thread = threading.Thread(target=lambda: kernels.rows(x, weight))
        thread.start()
        thread.join()
        with kernels.count_bytes() as inner:
            kernels.rows(x, weight)
    assert (outer.total, inner.total) == (0, 128)


def flat(case):
    """The arguments of a call of `neurons` as the operator takes them."""
    weights = [
        operators.opened("neurons", n, case[n], "columns" if n == "down" else "rows") for n in ("gate", "up", "down")
    ]
    rest = ("mask", "act", "gate_bias", "up_bias", "down_bias", "given")
    return (
        case["x"],
        *(list(part) if isinstance(part, tuple) else part for w in weights for part in w),
        *map(case.get, rest),
    )


def change(**changes):
    return lambda case: vars(case) | {k: v(getattr(case, k)) if callable(v) else v for k, v in changes.items()}


BAD_CALLS = [
    (change(act="sillu"), ValueError, "'sillu'; the nearest is 'silu'"),
    (change(x=lambda x: x[0]), ValueError, "x has shape .* two dimensions"),
    (change(x=lambda x: x.int()), TypeError, "x is torch.int32"),
    (change(gate=lambda g: g[:-1]), ValueError, r"gate has shape \(9, 8\), expected \(10, 8\)"),
    (change(up=lambda u: u[:, 1:]), ValueError, r"up has shape \(10, 7\), expected \(10, 8\)"),
    (change(up=lambda u: u.double()), TypeError, "up is torch.float64, x is torch.float32"),
    (change(gate=lambda g: g.T.contiguous().T), ValueError, "gate has strides .* lay the weight out again"),
    (change(down=lambda w: w.contiguous()), ValueError, "down has strides .*dimension 0 must have stride 1"),
    (change(gate=None, up=None, gate_bias=None, up_bias=None), ValueError, "neither gate nor up"),
    (change(gate=None), ValueError, "gate_bias without gate"),
    (change(up=None, up_bias=None), ValueError, "gate alone"),
    (change(given=torch.ones(2, 10)), ValueError, "leave that one out"),
    (change(mask=lambda m: m.float()), TypeError, "mask is torch.float32, expected torch.bool"),
    (change(mask=lambda m: m[:1]), ValueError, r"mask has shape \(1, 10\), expected \(2, 10\)"),
    (change(mask=lambda m: m.to("meta")), TypeError, "mask is on meta"),
    (change(down_bias=lambda b: b[:-1]), ValueError, r"down_bias has shape \(7,\), expected \(8,\)"),
    (change(up_bias=lambda b: torch.cat([b, b])[::2]), ValueError, r"up_bias has strides \(2,\)"),
    (change(gate_bias=lambda b: b.half()), TypeError, "gate_bias is torch.float16"),
    (change(up=None, up_bias=None, given=torch.ones(2, 9)), ValueError, r"given has shape \(2, 9\)"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), BAD_CALLS, ids=[c[2][:30] for c in BAD_CALLS])
def test_bad_neurons_raise(backend, arguments, error, message):
    bad = arguments(make_neurons(2, 8, 10))
    with pytest.raises(error, match=message):
        kernels.neurons(**bad)
    with pytest.raises(error, match=message):  # the operator itself is checked as well
        torch.ops.moyu.neurons(*flat(bad))


def test_bad_rows_and_columns_raise(backend):
    x, weight = torch.randn(2, 8), torch.randn(5, 8)
    by_input = weight.T.contiguous().T
    rows_mask, columns_mask = torch.ones(2, 5, dtype=torch.bool), torch.ones(2, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="rows: weight has strides"):
        kernels.rows(x, by_input)
    with pytest.raises(ValueError, match="columns: weight has strides"):
        kernels.columns(x, weight, columns_mask)
    with pytest.raises(ValueError, match=r"rows: weight has shape \(5, 7\)"):
        kernels.rows(x, weight[:, 1:])
    with pytest.raises(ValueError, match="rows: mask has shape"):
        kernels.rows(x, weight, columns_mask)
    with pytest.raises(ValueError, match="columns: mask has shape"):
        kernels.columns(x, by_input, rows_mask)
    with pytest.raises(ValueError, match="columns: bias has shape"):
        kernels.columns(x, by_input, columns_mask, bias=torch.ones(8))
    with pytest.raises(TypeError, match=r"rows: bias is torch\.float64"):
        kernels.rows(x, weight, bias=torch.ones(5, dtype=torch.float64))


def test_asked_means_obeyed():
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match=r"gpu back end was asked for but is not available: .*'moyu-llm\[gpu\]'"):
            kernels.use("gpu").__enter__()
    with pytest.raises(ValueError, match="'cqu'; the nearest is 'cpu'"):
        kernels.require("cqu")
    with kernels.use("reference"):
        assert kernels.describe().startswith("reference: reference (torch")


def test_use_holds_for_its_thread_only():
    seen = []
    with kernels.use("reference"):
        thread = threading.Thread(target=lambda: seen.append(kernels.describe()))
        thread.start()
        thread.join()
        with kernels.use("auto"):
            assert kernels.describe() == seen[0]
        assert kernels.describe().startswith("reference:")
    assert seen[0].startswith("auto:") and kernels.describe() == seen[0]


def test_cpu_refuses_what_it_does_not_have(needs_cpu):
    x, weight = torch.randn(1, 8, dtype=torch.float64), torch.randn(4, 8, dtype=torch.float64)
    kernels.rows(x, weight)  # auto takes the reference
    with kernels.use("cpu"), pytest.raises(RuntimeError, match="cannot serve this call: it has float32, bfloat16"):
        kernels.rows(x, weight)


def run_python(program, **environment):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)} | environment
    return subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)


def test_without_the_extension_the_reference_serves():
    program = """
import sys
sys.modules["moyu.kernels._cpu"] = None  # an import of it fails
import torch
from moyu import kernels
assert "make setup" in kernels.available()["cpu"]
assert kernels.describe().startswith("auto: reference (torch") and "not cpu: " in kernels.describe()
assert kernels.rows(torch.ones(1, 4), torch.ones(2, 4)).tolist() == [[4.0, 4.0]]
assert kernels.ReadCeiling(4 << 20).sample().gb_s > 0.1
try:
    kernels.use("cpu").__enter__()
except RuntimeError as error:
    assert "make setup" in str(error)
else:
    raise AssertionError("no error")
"""
    done = run_python(program)
    assert done.returncode == 0, done.stderr


def test_an_instruction_set_that_is_not_there_is_refused(needs_cpu):
    program = """
import torch
from moyu import kernels
assert "MOYU_ISA=sse9" in kernels.available()["cpu"]
try:
    kernels.rows(torch.ones(1, 4), torch.ones(2, 4))
except RuntimeError as error:
    assert "unset it or set it to one of" in str(error)
else:
    raise AssertionError("no error")
"""
    done = run_python(program, MOYU_ISA="sse9")
    assert done.returncode == 0, done.stderr


def test_operators_are_registered_as_torch_wants_them(backend):
    case = make_neurons(2, 8, 10, form="up_given")
    torch.library.opcheck(torch.ops.moyu.neurons.default, flat(vars(case)))
    case = make_neurons(2, 8, 10)
    torch.library.opcheck(torch.ops.moyu.neurons.default, flat(vars(case)))
    x, weight = torch.randn(2, 8), torch.randn(5, 8)
    plain = ([weight], "float32", [5, 8])
    torch.library.opcheck(torch.ops.moyu.rows.default, (x, *plain))
    torch.library.opcheck(torch.ops.moyu.rows.default, (x, *plain, make_mask(2, 5, 0.5), torch.ones(5)))
    turned = ([weight.T.contiguous().T], "float32", [5, 8])
    torch.library.opcheck(torch.ops.moyu.columns.default, (x, *turned, make_mask(2, 8, 0.5)))
    stored = Q4_0.store(weight)
    for op, w, mask in (
        (torch.ops.moyu.rows, stored, None),
        (torch.ops.moyu.columns, stored.laid_out("columns"), make_mask(2, 8, 0.5)),
    ):
        torch.library.opcheck(op.default, (x, list(w.tensors), "q4_0", [5, 8], mask, torch.ones(5)))
    parts = {n: Q4_0.store(getattr(case, n)) for n in ("gate", "up")}
    parts["down"] = Q4_0.store(case.down).laid_out("columns")
    quantised = flat(vars(case) | parts)
    torch.library.opcheck(torch.ops.moyu.neurons.default, quantised)


def test_fake_tensors_are_checked_too():
    with torch._subclasses.FakeTensorMode():
        y = kernels.rows(torch.empty(3, 8, dtype=torch.bfloat16), torch.empty(5, 8, dtype=torch.bfloat16))
        assert y.shape == (3, 5) and y.dtype == torch.bfloat16
        with pytest.raises(ValueError, match="rows: weight has strides"):
            kernels.rows(torch.empty(3, 8), torch.empty(8, 5).T)


def test_the_activations_of_the_extension_are_the_references(needs_cpu):
    aliases = {"gelu_new", "gelu_pytorch_tanh"}
    assert set(kernels.cpu._cpu.activations) | aliases == set(kernels.ACTIVATIONS)


def test_read_ceiling(needs_cpu):
    ceiling = kernels.ReadCeiling(4 << 20).sample(3)
    assert 0.1 < ceiling.gb_s <= ceiling.best_gb_s
    with pytest.raises(ValueError, match="bytes >= 1048576"):
        kernels.ReadCeiling(0)
