"""Read rate of the neuron kernel on random kept sets, beside the measured read ceiling; one process, variants alternating.

    .venv/bin/python benchmarks/kernels/run.py [OUT.jsonl]

bf16, batch 1, 8 layers of 3 x 2048 x 8192 weights (805 MB, far beyond any cache; other widths keep the size), 16 kept sets a
fraction, neuron-major layout. Rates count the bytes that must be read: kept neurons x 3 x d x 2. `kernel` is the compiled
function, which a decode step calls; `operator` adds torch's dispatch and MOYU's checks, once a call. The ceiling is the best
of several native read loops. Every rate, the ceiling's too, is a median of single runs over the same rounds.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from moyu import kernels, records
from moyu.kernels import cpu

LAYERS, SETS, ROUNDS = 8, 16, 41
KEPT = (1.0, 0.7, 0.5, 0.3)
WIDTHS = (2048, 1024, 4096, 8192)
SILU = cpu.activation_code("silu")


def main() -> None:
    """Measure, print a row a fraction, and write kernel records."""
    out = [record for d in WIDTHS for record in measure(d, 8192 * 2048 // d)]
    if len(sys.argv) > 1:
        records.write(Path(sys.argv[1]), out)


def measure(d: int, f: int) -> list[dict]:
    """Kernel records of one width."""
    torch.manual_seed(0)
    storages = [cpu.empty_weights(f, 3, d, dtype=torch.bfloat16).normal_(0, 0.02) for _ in range(LAYERS)]
    views = [(s[:, 0], s[:, 1], s[:, 2].t()) for s in storages]
    x, y = torch.randn(1, d, dtype=torch.bfloat16), torch.empty(1, d, dtype=torch.bfloat16)
    masks = {k: [(torch.rand(f).argsort() < int(f * k))[None] for _ in range(SETS)] for k in KEPT}
    code, threads, native = cpu.dtype_code(x.dtype), torch.get_num_threads(), cpu.extension().neurons

    def arguments(storage: torch.Tensor, mask: torch.Tensor) -> tuple[int, ...]:
        gate, row = storage.data_ptr(), d * 2
        weights = (gate, 3 * d, gate + row, 3 * d, gate + 2 * row, 3 * d)
        return (
            code,
            SILU,
            threads,
            1,
            d,
            f,
            d,
            x.data_ptr(),
            d,
            *weights,
            mask.data_ptr(),
            f,
            0,
            0,
            0,
            0,
            0,
            y.data_ptr(),
        )

    ready = {k: [[arguments(s, m) for m in masks[k]] for s in storages] for k in KEPT}
    kernel: dict[float, list[float]] = {k: [] for k in KEPT}
    operator: dict[float, list[float]] = {k: [] for k in KEPT}
    reads = kernels.ReadCeiling()
    for turn in range(ROUNDS):
        reads.sample()
        for k in KEPT:
            picks = [(turn * LAYERS + layer) % SETS for layer in range(LAYERS)]
            start = time.perf_counter()
            for layer, pick in enumerate(picks):
                native(*ready[k][layer][pick])
            kernel[k].append(time.perf_counter() - start)
            start = time.perf_counter()
            for layer, pick in enumerate(picks):
                kernels.neurons(x, *views[layer], masks[k][pick], act="silu")
            operator[k].append(time.perf_counter() - start)
    ceiling, highest = reads.gb_s, reads.best_gb_s
    print(f"d={d}, f={f}: read ceiling {ceiling:.1f} GB/s median, {highest:.1f} best; {kernels.describe()}")
    out = []
    for k in KEPT:
        needed = LAYERS * int(f * k) * 3 * d * 2
        rate, through_torch = (needed / statistics.median(s[k]) / 1e9 for s in (kernel, operator))
        best = needed / min(kernel[k]) / 1e9
        print(
            f"  kept {k:.1f}: kernel {rate:.1f} GB/s ({rate / ceiling:.0%} of the median ceiling), best {best:.1f} "
            f"({best / highest:.0%} of the best); operator {through_torch:.1f} ({through_torch / ceiling:.0%})",
            flush=True,
        )
        out.append(
            records.stamp(
                kind="kernel", op="neurons", dtype="bfloat16", shape=[LAYERS, f, 3, d], kept=k, gb_s=rate,
                read_ceiling_gb_s=ceiling, share=rate / ceiling, backend=kernels.describe(), seed=0,
            )
        )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
