"""Whole neurons of one row on one NVIDIA GPU: in one pass, in two kernels, and with 8- and 4-bit weights.

    python3 benchmarks/gpu/one_row.py --out RESULTS.jsonl [--shapes llama-3-8b ...] [--minutes 3] [--dry-run]

Each variant is checked against float32 products on fresh data, then timed as one CUDA graph over several layers beside the
copy and read rates, variants alternating. Kept sets are random. `--verbose` adds what each candidate configuration took.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import run as shared
import torch
import torch.nn.functional as F
from torch import Tensor

from moyu import kernels
from moyu.kernels import gpu, gpu_packed, gpu_packed_programs, gpu_single


def main() -> None:
    """Shape by shape until the minutes are over."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=list(shared.WIDTHS))
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--verbose", action="store_true")
    options = parser.parse_args()
    run, stop = shared.Run(options), time.monotonic() + 60 * options.minutes
    best = shared.ceiling(run)
    for shape in options.shapes:
        for measure in (one_pass, packed):
            if time.monotonic() < stop:
                measure(run, shape, best, options.verbose)
        if time.monotonic() < stop:
            shared.column_rates(run, *((64, 96, 2) if run.dry else shared.WIDTHS[shape]), best)


def one_pass(run: shared.Run, shape: str, best: float, verbose: bool) -> None:
    """One pass and two kernels at each kept fraction."""
    d, f, layers = (64, 96, 2) if run.dry else shared.WIDTHS[shape]
    storages = [torch.randn(f, 3, d, device=run.device).mul_(d**-0.5).to(run.dtype) for _ in range(layers)]
    weights = [(s[:, 0], s[:, 1], s[:, 2].t()) for s in storages]
    x = torch.randn(1, d, device=run.device).to(run.dtype)
    for kept in shared.KEPT:
        masks = [torch.rand(1, f, device=run.device) < kept for _ in weights]

        def two(masks: list[Tensor] = masks) -> list[Tensor]:
            return [
                gpu.neurons(x, *w, m, "silu", None, None, None, None)[0] for w, m in zip(weights, masks, strict=True)
            ]

        def one(masks: list[Tensor] = masks) -> list[Tensor]:
            return [
                gpu_single.neurons(x, *w, m, "silu", None, None, None, None)
                for w, m in zip(weights, masks, strict=True)
            ]

        wide = [(w.float() for w in ws) for ws in weights[:1]]
        error = _error(one()[0], x, *next(iter(wide)), masks[0])
        again = all(torch.equal(a, b) for a, b in zip(one(), one(), strict=True))
        needed = sum(int(m.sum()) for m in masks) * 3 * d * storages[0].itemsize
        _report(
            run, shape, kept, {"two kernels": two, "one pass": one}, needed, layers, best, error=error, same_bits=again
        )
    if verbose and not run.dry:
        for kernel in (gpu_single._values, gpu_single._sum, gpu._project, gpu._combine):
            print(
                kernel.base_fn.__name__,
                *(f"{c}: {t}" for c, t in getattr(kernel, "configs_timings", {}).items()),
                sep="\n  ",
            )


def packed(run: shared.Run, shape: str, best: float, verbose: bool) -> None:
    """8 and 4 bits."""
    d, f, layers = (64, 96, 2) if run.dry else shared.WIDTHS[shape]
    x = torch.randn(1, d, device=run.device).to(run.dtype)
    for bits in (8, 4):
        made = [
            [gpu_packed.pack(torch.randn(f, d, device=run.device) * d**-0.5, bits) for _ in range(3)]
            for _ in range(2 * layers)
        ]
        for kept in (1.0, 0.5, 0.2):
            masks = [torch.rand(1, f, device=run.device) < kept for _ in made]

            def call(made: list = made, masks: list[Tensor] = masks) -> list[Tensor]:
                return [gpu_packed.neurons(x, *w, m, act="silu") for w, m in zip(made, masks, strict=True)]

            gate, up, down = (gpu_packed.unpack(p) for p in made[0])
            error = _error(call()[0], x, gate, up, down.t(), masks[0])
            needed = sum(int(m.sum()) for m in masks) * sum(p.row_bytes for p in made[0])
            _report(run, shape, kept, {f"{bits} bits": call}, needed, len(made), best, error=error)
        if verbose and not run.dry:
            for kernel in (gpu_packed_programs._project, gpu_packed_programs._combine):
                print(kernel.base_fn.__name__, *(f"{c}: {t}" for c, t in kernel.configs_timings.items()), sep="\n  ")
        del made


def _error(y: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, mask: Tensor) -> float:
    """The largest error relative to the magnitudes that were added up."""
    mid = F.silu(x.float() @ gate.t()) * (x.float() @ up.t()) * mask
    size = (mid.abs() @ down.t().abs()).clamp_min(1e-30)
    return float(((y.float() - mid @ down.t()).abs() / size).max())


def _report(
    run: shared.Run,
    shape: str,
    kept: float,
    calls: dict[str, Callable],
    needed: int,
    layers: int,
    best: float,
    **more: object,
) -> None:
    with kernels.use("gpu"):
        found = run.seconds({name: run.graph(call) for name, call in calls.items()})
    for name, seconds in found.items():
        run.row(
            part="one_row", op="neurons", shape=shape, variant=name, kept=kept, us_a_layer=seconds / layers * 1e6,
            gb_s=needed / seconds / 1e9, share=needed / seconds / best, **more,
        )  # fmt: skip


if __name__ == "__main__":
    main()
