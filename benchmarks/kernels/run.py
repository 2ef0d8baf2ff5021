"""Read rate of the neuron kernel on random kept sets, beside the measured read ceiling; one process, variants alternating.

    .venv/bin/python benchmarks/kernels/run.py [OUT.jsonl]

bf16, d=2048, f=8192, batch 1, 8 layers (805 MB, far beyond any cache), 16 kept sets a fraction, neuron-major layout.
Rates count the bytes that must be read: kept neurons x 3 x d x 2.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from moyu import kernels, records

D, F, LAYERS, SETS, ROUNDS = 2048, 8192, 8, 16, 15
KEPT = (1.0, 0.7, 0.5, 0.3)


def main() -> None:
    """Measure, print a row a fraction, and write kernel records."""
    torch.manual_seed(0)
    storages = [kernels.cpu.empty_weights(F, 3, D, dtype=torch.bfloat16).normal_(0, 0.02) for _ in range(LAYERS)]
    x = torch.randn(1, D, dtype=torch.bfloat16)
    masks = {k: [(torch.rand(F).argsort() < int(F * k))[None] for _ in range(SETS)] for k in KEPT}
    seconds: dict[float, list[float]] = {k: [] for k in KEPT}
    ceilings = []
    for turn in range(ROUNDS):
        ceilings.append(kernels.read_ceiling(repeats=2))
        for k in KEPT:
            start = time.perf_counter()
            for layer, storage in enumerate(storages):
                mask = masks[k][(turn * LAYERS + layer) % SETS]
                kernels.neurons(x, storage[:, 0], storage[:, 1], storage[:, 2].t(), mask, act="silu")
            seconds[k].append(time.perf_counter() - start)
    ceiling = max(ceilings)
    print(f"read ceiling {ceiling:.1f} GB/s best, {statistics.median(ceilings):.1f} median; {kernels.describe()}")
    out = []
    for k in KEPT:
        needed = LAYERS * int(F * k) * 3 * D * 2
        best, median = (needed / s / 1e9 for s in (min(seconds[k]), statistics.median(seconds[k])))
        print(
            f"kept {k:.1f}: {best:.1f} GB/s best ({best / ceiling:.0%} of the best ceiling), {median:.1f} median "
            f"({median / statistics.median(ceilings):.0%} of the median ceiling)"
        )
        out.append(
            records.stamp(
                kind="kernel", op="neurons", dtype="bfloat16", shape=[LAYERS, F, 3, D], kept=k, gb_s=median,
                read_ceiling_gb_s=statistics.median(ceilings), share=median / statistics.median(ceilings),
                backend=kernels.describe(), seed=0,
            )
        )  # fmt: skip
    if len(sys.argv) > 1:
        records.write(Path(sys.argv[1]), out)


if __name__ == "__main__":
    main()
