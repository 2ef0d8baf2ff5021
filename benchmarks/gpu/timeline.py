"""Where the time of a compiled decode step goes on one NVIDIA GPU: each kernel's share, the rest of the GPU's time, and the host's.

    python3 benchmarks/gpu/timeline.py [--shape llama-3-8b] [--layers 8] [--variants dense griffin teal]

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

from moyu import methods
from moyu.calibration.walk import calibrate
from moyu.measure.windows import Windows
from moyu.model import loading

STEPS = 10


@torch.no_grad()
def main() -> None:
    """A table a variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3-8b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument(
        "--variants", nargs="+", default=["dense", "griffin", "teal"], help="dense, or methods at 50 %%"
    )
    parser.add_argument("--kind", help="a format of GGUF files that all linears are in")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    run, known = shared.Run(options), "tiny" if options.dry_run else options.shape
    model = loading.random_model(known, layers=options.layers, dtype=run.dtype, device=run.device)
    if options.kind:
        loading.quantise_model(model, options.kind)
    ids = torch.randint(3, model.config.vocab_size, (1, shared.PROMPT), generator=torch.Generator().manual_seed(0))
    ids = ids.to(run.device)
    for name in options.variants:
        plan = None
        if name != "dense":
            plan = calibrate(model, methods.method(name), Windows(ids, shared.PROMPT // 2), sparsity=0.5, name=known)
        with shared.Moyu(run, model, plan, ids, general=False) as step:
            step.begin()
            show(run, options, name, step)


def show(run: shared.Run, options: argparse.Namespace, name: str, step: shared.Moyu) -> None:
    """One variant's table."""
    rates = run.seconds({name: step}, rounds=5, repeat=8)
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    host = (time.perf_counter() - start) / STEPS
    if run.dry:
        return
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
    run.row(part="profile", shape=options.shape, layers=options.layers, variant=name, format=options.kind,
            busy_us=busy, step_us=rates[name] * 1e6, host_us=host * 1e6,
            kernels=sum(map(len, kernels.values())) // STEPS)  # fmt: skip
    for kernel, times in sorted(kernels.items(), key=lambda item: -sum(item[1]))[:14]:
        print(
            f"  {sum(times) / STEPS:8.1f} us  {len(times) / STEPS:6.1f} x {sum(times) / len(times):7.2f}  {kernel[:90]}"
        )


if __name__ == "__main__":
    main()
