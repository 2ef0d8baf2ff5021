"""What the cores allow: the kernels on weights that stay in the last-level cache, for 1 to 8 rows.

    .venv/bin/python benchmarks/kernels/bound.py

Where a rate here is below the read ceiling of the memory (printed beside it), instructions bound the kernel and not bytes. Rates
count the bytes of weights that at least one row keeps. bf16, d = 2048, 512 neurons (6 MB) or 1536 columns or rows (6 MB).
"""

import statistics
import time

import torch

from moyu import kernels
from moyu.measure.environment import last_level_cache, read_buffer

D, F, ROUNDS = 2048, 512, 200


def main() -> None:
    """A line an operator and a kept share."""
    torch.manual_seed(0)
    storage = torch.randn(F, 3, D).bfloat16()
    gate, up, down = storage[:, 0], storage[:, 1], storage[:, 2].t()
    weight, turned = torch.randn(3 * F, D).bfloat16(), torch.randn(D, 3 * F).bfloat16().t()  # both (1536, 2048)
    print(
        f"memory: {kernels.ReadCeiling(read_buffer(last_level_cache())).sample(9).gb_s:.0f} GB/s; {kernels.describe()}"
    )
    for kept in (1.0, 0.5):
        for name in ("neurons", "columns", "rows"):
            rates = []
            for rows in (1, 2, 4, 8):
                x = torch.randn(rows, D).bfloat16()
                mask = torch.rand(rows, F if name == "neurons" else D) < kept
                calls = {
                    "neurons": lambda x=x, m=mask: kernels.neurons(x, gate, up, down, m, act="silu"),
                    "columns": lambda x=x, m=mask: kernels.columns(x, turned, m),
                    "rows": lambda x=x: kernels.rows(x, weight),
                }
                union = 1.0 if name == "rows" else float(mask.any(0).float().mean())
                rates.append(union * weight.nbytes / _seconds(calls[name]) / 1e9)
            if kept == 1.0 or name != "rows":
                print(
                    f"{name}, kept {kept}: " + ", ".join(f"{r:.0f}" for r in rates) + " GB/s at 1, 2, 4, 8 rows",
                    flush=True,
                )


def _seconds(call) -> float:
    found = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


if __name__ == "__main__":
    main()
