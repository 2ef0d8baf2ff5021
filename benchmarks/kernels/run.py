"""Read rate of the neuron kernel on random kept sets, beside the measured read ceiling; one process, variants alternating.

    .venv/bin/python benchmarks/kernels/run.py [OUT.jsonl] [--weights bf16,q8_0,q4_0] [--widths 2048,1024,4096,8192]

Batch 1, 8 layers of 3 x 2048 x 8192 weights (805 MB in bf16, 428 in Q8_0, 226 in Q4_0, beyond any cache; other widths keep the
size), 16 kept sets a fraction, neuron-major layout. Rates count the bytes that must be read: kept neurons x 3 x d x 2 in bf16; in
blocks also the scales, which a group of 32 of down's columns shares. `kernel` is the compiled function, which a decode step calls;
`operator` adds torch's dispatch and MOYU's checks, once a call. The ceiling is the best of several native read loops. Every
rate, the ceiling's too, is a median of single runs over the same rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from moyu import kernels, records
from moyu.kernels import cpu
from moyu.kernels.backend import Neurons
from moyu.measure.environment import last_level_cache, read_buffer
from moyu.model import anatomy, layout, quantised
from moyu.weights import held, named

LAYERS, SETS, ROUNDS = 8, 16, 41
KEPT = (1.0, 0.7, 0.5, 0.3)
DTYPES = {"bf16": "bfloat16"}  # what records call them; blocks by their own name


def main() -> None:
    """Measure, print a row a fraction, and write kernel records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--weights", default="bf16")
    parser.add_argument("--widths", default="2048,1024,4096,8192")
    options = parser.parse_args()
    asked = [(kind, int(d)) for kind in options.weights.split(",") for d in options.widths.split(",")]
    out = [record for kind, d in asked for record in measure(kind, d, 8192 * 2048 // d)]
    if options.out:
        kept = records.read(options.out) if options.out.exists() else []
        new = {(r.dtype, r.shape[-1]) for r in out}
        records.write(options.out, [r for r in kept if (r.dtype, r.shape[-1]) not in new] + out)


def weights(kind: str, d: int, f: int) -> tuple:
    """Random gate (f, d), up (f, d) and down (d, f), laid out neuron by neuron."""
    if kind == "bf16":
        storage = cpu.empty_weights(f, 3, d, dtype=torch.bfloat16).normal_(0, 0.02)
        return held(storage[:, 0], "rows"), held(storage[:, 1], "rows"), held(storage[:, 2].t(), "columns")
    shapes = [(f, d), (f, d), (d, f)]
    modules = [
        quantised.QuantisedLinear(named(kind).store(torch.randn(s) * 0.02), None, torch.bfloat16) for s in shapes
    ]
    layout.lay_out([anatomy.Piece(m) for m in modules], ["row", "row", "column"])
    return tuple(m.blocks for m in modules)


def measure(kind: str, d: int, f: int) -> list[records.Record]:
    """Kernel records of one width."""
    torch.manual_seed(0)
    layers = [weights(kind, d, f) for _ in range(LAYERS)]
    x, y = torch.randn(1, d, dtype=torch.bfloat16), torch.empty(1, d, dtype=torch.bfloat16)
    masks = {k: [(torch.rand(f).argsort() < int(f * k))[None] for _ in range(SETS)] for k in KEPT}
    native = cpu.extension().neurons
    ready = {
        k: [[cpu.native_neurons(Neurons(x, *layer, m, "silu"), y) for m in masks[k]] for layer in layers] for k in KEPT
    }
    kernel: dict[float, list[float]] = {k: [] for k in KEPT}  # GB/s
    operator: dict[float, list[float]] = {k: [] for k in KEPT}
    reads = kernels.ReadCeiling(read_buffer(last_level_cache()))
    for turn in range(ROUNDS):
        reads.sample()
        for k in KEPT:
            picks = [(turn * LAYERS + layer) % SETS for layer in range(LAYERS)]
            start = time.perf_counter()
            needed = sum(native(ready[k][layer][pick]) for layer, pick in enumerate(picks))
            kernel[k].append(needed / (time.perf_counter() - start) / 1e9)
            start = time.perf_counter()
            for layer, pick in enumerate(picks):
                kernels.neurons(x, *layers[layer], masks[k][pick], act="silu")
            operator[k].append(needed / (time.perf_counter() - start) / 1e9)
    ceiling, highest = reads.gb_s, reads.best_gb_s
    print(f"{kind}, d={d}, f={f}: read ceiling {ceiling:.1f} GB/s median, {highest:.1f} best; {kernels.describe()}")
    out = []
    for k in KEPT:
        rate, through_torch, best = statistics.median(kernel[k]), statistics.median(operator[k]), max(kernel[k])
        print(
            f"  kept {k:.1f}: kernel {rate:.1f} GB/s ({rate / ceiling:.0%} of the median ceiling), best {best:.1f} "
            f"({best / highest:.0%} of the best); operator {through_torch:.1f} ({through_torch / ceiling:.0%})",
            flush=True,
        )
        out.append(
            records.stamp(
                kind="kernel", op="neurons", dtype=DTYPES.get(kind, kind), shape=[LAYERS, f, 3, d], kept=k, gb_s=rate,
                read_ceiling_gb_s=ceiling, share=rate / ceiling, backend=kernels.describe(), seed=0,
            )
        )  # fmt: skip
    return out


if __name__ == "__main__":
    main()
