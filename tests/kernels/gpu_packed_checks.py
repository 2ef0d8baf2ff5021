"""Packed weights and single rows against loops in float64. On a GPU, or on the CPU with TRITON_INTERPRET=1:

PYTHONPATH=src TRITON_INTERPRET=1 python tests/kernels/gpu_packed_checks.py
"""

import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import DTYPES, FORMS, Neurons, assert_close, linear_truth, make_mask, make_neurons, one_candidate

from moyu import kernels
from moyu.kernels import gpu
from moyu.kernels.gpu import many, packed_many, packed_single, single
from moyu.weights import Stored, named

DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
CASES = tuple(itertools.product((8, 4), DTYPES, (1, 3, 16)))


def there(*tensors):
    return tuple(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in tensors)


def packed(*shape, bits, generator, order="rows"):
    """A weight (q, n) on the device, and as float64 what it stands for."""
    weight = named(f"packed{bits}").store(torch.randn(*shape, generator=generator), order)  # pyright: ignore[reportCallIssue]
    return Stored(weight.format, order, there(*weight.tensors), weight.shape), weight.values().double()


def check_packed_neurons():
    for bits, dtype, n in CASES:
        generator = torch.Generator().manual_seed(n)
        x, mask = torch.randn(n, 96, generator=generator).to(dtype), make_mask(n, 50, 0.5, generator)
        (gate, gate_), (up, up_) = (packed(50, 96, bits=bits, generator=generator) for _ in range(2))
        down, down_ = packed(96, 50, bits=bits, generator=generator, order="columns")
        y = kernels.neurons(*there(x), gate, up, down, *there(mask), act="silu").cpu()
        assert_close(y, Neurons(x, gate_, up_, down_, mask).truth())
        y = kernels.neurons(*there(x), None, up, down, *there(mask), act="relu2").cpu()
        assert_close(y, Neurons(x, None, up_, down_, mask, act="relu2").truth())


def check_packed_neurons_with_biases_and_given():
    """Products one after the other: in float32, so that rounding in between does not show."""
    for bits, n, form in itertools.product((8, 4), (1, 3), FORMS):
        generator = torch.Generator().manual_seed(n)
        case = make_neurons(n, 96, 50, form=form, layout="separate")
        gate, up = (None if w is None else packed(50, 96, bits=bits, generator=generator) for w in (case.gate, case.up))
        down, down_ = packed(96, 50, bits=bits, generator=generator, order="columns")
        own = {"gate": gate and gate[1].float(), "up": up and up[1].float(), "down": down_.float()}
        truth = Neurons(**vars(case) | own).truth()
        biases = {
            k: v.to(DEVICE)
            for k in ("gate_bias", "up_bias", "down_bias", "given")
            if (v := getattr(case, k)) is not None
        }
        weights = (gate and gate[0], up and up[0], down)
        y = kernels.neurons(*there(case.x), *weights, *there(case.mask), act=case.act, **biases)
        assert_close(y.cpu(), truth)


def check_packed_rows_and_columns():
    for bits, dtype, n in CASES:
        generator = torch.Generator().manual_seed(n)
        x, (weight, plain) = (
            torch.randn(n, 64, generator=generator).to(dtype),
            packed(70, 64, bits=bits, generator=generator),
        )
        bias = torch.randn(70, generator=generator).to(dtype)
        for mask in (None, make_mask(n, 70, 0.5, generator), make_mask(n, 70, 0.0)):
            y = kernels.rows(*there(x), weight, *there(mask), bias=there(bias)[0]).cpu()
            assert_close(y, linear_truth(x, plain, mask, bias, "rows"))
        x, mask, bias = torch.randn(n, 70, generator=generator).to(dtype), make_mask(n, 70, 0.5, generator), bias[:64]
        weight, plain = packed(64, 70, bits=bits, generator=generator, order="columns")
        y = kernels.columns(*there(x), weight, *there(mask), bias=there(bias)[0]).cpu()
        assert_close(y, linear_truth(x, plain, mask, bias, "columns"))


def check_neurons_of_one_row():
    kinds = ((0.0, "separate"), (0.4, "neuron_major"), (1.0, "padded"))
    for dtype, form, (density, layout) in itertools.product(DTYPES, FORMS, kinds):
        case = make_neurons(1, 40, 50, dtype=dtype, form=form, density=density, layout=layout)
        assert_close(one_row(case), case.truth())
    for act in kernels.ACTIVATIONS:
        case = make_neurons(1, 33, 20, 24, act=act, layout="separate")
        assert_close(one_row(case), case.truth())


def check_one_row_reads_no_skipped_neuron_and_repeats_its_bits():
    case = make_neurons(1, 40, 50, layout="separate", dtype=torch.bfloat16)
    for weight in (case.gate, case.up, case.down.t()):
        weight[~case.mask[0]] = torch.nan
    first = one_row(case)
    assert_close(first, case.truth())
    assert all(torch.equal(first, one_row(case)) for _ in range(3))


def check_columns_of_one_row():
    for dtype, (size, q), density in itertools.product(DTYPES, ((1, 1), (33, 70), (64, 32)), (0.0, 0.5, 1.0)):
        generator = torch.Generator().manual_seed(q)
        x, turned = (torch.randn(*s, generator=generator).to(dtype) for s in ((1, size), (size, q)))
        mask, bias = make_mask(1, size, density, generator), torch.randn(q, generator=generator).to(dtype)
        y = single.columns(*there(x), there(turned)[0].t(), *there(mask, bias))
        assert_close(y.cpu(), linear_truth(x, turned.t(), mask, bias, "columns"))
        least = float(x.abs().max()) * (1 - density)
        y = single.columns_above(*there(x), there(turned)[0].t(), torch.full((q,), least, device=DEVICE), None)
        mask = x.abs() > torch.tensor(least, dtype=dtype)
        assert_close(y.cpu(), linear_truth(x, turned.t(), mask, None, "columns"))


def one_row(case):
    weights = there(case.x, case.gate, case.up, case.down, case.mask)
    return single.neurons(*weights, case.act, *there(case.gate_bias, case.up_bias, case.down_bias, case.given)).cpu()


def main() -> None:
    """Every check, by name."""
    one_candidate(many, packed_many, packed_single, single)
    with kernels.use("gpu"):
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                check()
                print(name, flush=True)


if __name__ == "__main__":
    main()
