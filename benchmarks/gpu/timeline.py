"""Where the time of a compiled decode step goes on one NVIDIA GPU: each kernel's share, the rest of the GPU's time, and the host's.

    python3 benchmarks/gpu/timeline.py [--shape llama-3-8b] [--layers 8] [--variants dense "neurons 50%" "columns 50%"]

`busy` is the time in kernels, `step` the time between steps with the GPU never waiting for a result, `host` what the host needs
to launch one: where `step` is no more than `host`, the host is the bound, and where it is more than `busy`, gaps between kernels.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from pathlib import Path

import run as shared
import torch
from torch.profiler import ProfilerActivity, profile

STEPS = 10


@torch.no_grad()
def main() -> None:
    """A table a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=["dense", "neurons 50%", "columns 50%"])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    run = shared.Run(options)
    model, ids, twins = shared.variants(run, options.shape, options.variants, layers=options.layers)
    for name, twin in twins.items():
        step = shared.compiled(run, twin, model, ids)
        rates = run.seconds({name: step}, rounds=5, repeat=8)
        start = time.perf_counter()
        for _ in range(STEPS):
            step()
        host = (time.perf_counter() - start) / STEPS
        if run.dry:
            continue
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(STEPS):
                step()
            torch.cuda.synchronize()
        kernels: dict[str, list[float]] = defaultdict(list)
        for event in seen.events():
            if event.device_type == torch.autograd.DeviceType.CUDA:
                kernels[event.name].append(event.device_time)
        busy = sum(map(sum, kernels.values())) / STEPS
        run.row(part="profile", shape=options.shape, layers=options.layers, variant=name,
                busy_us=busy, step_us=rates[name] * 1e6, host_us=host * 1e6,
                kernels=sum(map(len, kernels.values())) // STEPS)  # fmt: skip
        for kernel, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:14]:
            print(
                f"  {sum(times) / STEPS:8.1f} us  {len(times) / STEPS:6.1f} x {sum(times) / len(times):7.2f}  {kernel[:90]}"
            )


if __name__ == "__main__":
    main()
