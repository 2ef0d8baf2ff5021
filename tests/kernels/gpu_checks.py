"""What the Triton kernels compute, against loops in float64. On a GPU, or on the CPU with TRITON_INTERPRET=1:

PYTHONPATH=src TRITON_INTERPRET=1 python tests/kernels/gpu_checks.py
"""

import itertools
import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
from kernel_cases import DTYPES, FORMS, assert_close, linear_truth, make_mask, make_neurons, one_candidate

from moyu import kernels
from moyu.kernels import gpu
from moyu.kernels.gpu import common, many, single

DEVICE = "cpu" if gpu.INTERPRETED else "cuda"
BATCHES = (1, 2, 5, 16)
SIZES = ((1, 1), (33, 70), (64, 32)) if gpu.INTERPRETED else ((33, 70),)  # each is compiled anew


def there(case):
    """The same call on the device; a transposed weight stays transposed."""
    return replace(case, **{k: v.to(DEVICE) for k, v in vars(case).items() if isinstance(v, torch.Tensor)})


def check_neurons():
    for n, dtype, form in itertools.product(BATCHES, DTYPES, FORMS):
        for density, layout in ((0.0, "separate"), (0.4, "neuron_major"), (1.0, "padded")):
            case = make_neurons(n, 40, 50, dtype=dtype, form=form, density=density, layout=layout, seed=n)
            assert_close(there(case).run().cpu(), case.truth())


def check_activations():
    for act in kernels.ACTIVATIONS:
        case = make_neurons(1, 33, 20, act=act)
        assert_close(there(case).run().cpu(), case.truth())


def check_rows_and_columns():
    for n, dtype, (size, q) in itertools.product(BATCHES, DTYPES, SIZES):
        generator = torch.Generator().manual_seed(n)
        x = torch.randn(n, size, generator=generator).to(dtype)
        weight = torch.randn(q, size + 3, generator=generator).to(dtype)[:, :size]
        turned = torch.randn(size, q, generator=generator).to(dtype).t()
        for bias in (None, torch.randn(q, generator=generator).to(dtype)):
            own = None if bias is None else bias.to(DEVICE)
            for density in (None, 0.0, 0.5, 1.0):
                mask = None if density is None else make_mask(n, q, density, generator)
                y = kernels.rows(x.to(DEVICE), weight.to(DEVICE), None if mask is None else mask.to(DEVICE), bias=own)
                assert_close(y.cpu(), linear_truth(x, weight, mask, bias, "rows"))
            mask = make_mask(n, size, 0.5, generator)
            y = kernels.columns(x.to(DEVICE), turned.to(DEVICE), mask.to(DEVICE), bias=own)
            assert_close(y.cpu(), linear_truth(x, turned, mask, bias, "columns"))


def check_thresholds():
    """One weight of two projections that share an input, each with a threshold of its own."""
    for n, dtype in itertools.product((1, 3), DTYPES):
        generator = torch.Generator().manual_seed(n)
        x, turned = (torch.randn(*s, generator=generator).to(dtype) for s in ((n, 70), (70, 512)))
        thresholds = torch.tensor([0.3, 1.0]).repeat_interleave(256)
        y = kernels.columns_above(x.to(DEVICE), turned.t().to(DEVICE), thresholds.to(DEVICE)).cpu()
        for part, threshold in ((slice(0, 256), 0.3), (slice(256, 512), 1.0)):
            mask = x.abs() > torch.tensor(threshold, dtype=dtype)
            assert_close(y[:, part].contiguous(), linear_truth(x, turned.t()[part], mask, None, "columns"))


def check_repeats():
    """Two runs give the same bits, and the counters of programs are left as they were found."""
    case = there(make_neurons(3, 64, 90, dtype=torch.bfloat16))
    first = case.run()
    assert all(torch.equal(first, case.run()) for _ in range(3))
    assert not any(t.any() for t in common.all_tickets.values())


def check_skipped_pieces_are_not_loaded():
    for n in (1, 3):
        case = make_neurons(n, 40, 50, layout="separate")
        skipped = ~case.mask.any(0)
        assert case.gate is not None and case.up is not None and skipped.any()
        for weight in (case.gate, case.up, case.down.t()):
            weight[skipped] = torch.nan
        assert_close(there(case).run().cpu(), case.truth())


def check_bytes():
    case = make_neurons(2, 40, 50, dtype=torch.bfloat16)
    with kernels.count_bytes() as counted:
        there(case).run()
    with kernels.use("reference"), kernels.count_bytes() as expected:
        case.run()
    assert counted.total == expected.total > 0


def check_a_corrupted_kernel_fails():
    case, kept = there(make_neurons(2, 40, 50)), many.combine
    truth = make_neurons(2, 40, 50).truth()
    many.combine = lambda v, w, mask, *rest: kept(v, w, mask.roll(1, 1), *rest)
    try:
        assert_close(case.run().cpu(), truth)
    except AssertionError:
        return
    finally:
        many.combine = kept
    raise AssertionError("a corrupted kernel passes")


def main() -> None:
    """Every check, by name, with one configuration of each kernel: which one is fastest is not looked for here."""
    one_candidate(many, single)
    with kernels.use("gpu"):
        for name, check in list(globals().items()):
            if name.startswith("check_"):
                check()
                print(name, flush=True)


if __name__ == "__main__":
    main()
