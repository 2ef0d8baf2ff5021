"""`moyu doctor`: what this machine can do, and what would make it slow."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from moyu.commands.options import Json

EXTRAS = {  # of pyproject.toml: what each brings
    "serve": ("fastapi", "prometheus_client", "uvicorn"),
    "eval": ("lm_eval",),
    "gpu": ("triton",),
    "studies": ("statsmodels",),
}
INTEGERS = (
    "avx512bf16",
    "avx512vnni",
    "avxvnni",
)  # the instruction sets that multiply and add integers in one instruction
SAMPLES = 3  # of each loop that reads memory
SMALL = 4e9  # bytes of free memory below which most models do not fit
BUSY = 0.5  # processes a core that wait or run
PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
GROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Machine:
    """What was found. Bytes, and GB/s of 10^9 bytes."""

    processor: str
    platform: str
    cores: int  # that this process may use
    quota: float | None  # cores that its control group grants; None: no limit
    load: float  # processes that run or wait
    memory: float | None
    free: float | None
    huge_pages: bool
    threads: int  # of torch and the kernels
    kernels: str | None  # the instruction set that the kernels chose; None: there are none
    sets: tuple[str, ...]  # that this processor and this build have, best first
    no_kernels: str | None  # why there are none, and the remedy
    reads: float  # GB/s
    gpus: tuple[str, ...]
    no_gpu: str | None  # why the GPU kernels do not run, and the remedy
    versions: Mapping[str, str]
    extras: Mapping[str, bool]


@dataclass(frozen=True)
class Finding:
    """Something that will be slow: what, why, and what to do."""

    what: str
    why: str
    remedy: str


def doctor(as_json: Json = False) -> None:
    """Show what this machine has, how fast its memory can be read, and what will be slow, with the remedy. Takes seconds."""
    found = examine()
    slow = findings(found)
    if as_json:
        print(json.dumps({**dataclasses.asdict(found), "slow": [dataclasses.asdict(f) for f in slow]}))
        return
    for name, value in lines(found).items():
        print(f"{name:10s} {value}")
    print("\nNothing here will be slow without need." if not slow else "\nWhat will be slow:")
    for each in slow:
        print(f"- {each.what}: {each.why}.\n  {each.remedy}")
    print("\n`moyu info MODEL` says the same of a model: its formats, and whether its decode steps are native.")


def examine() -> Machine:
    """Look at the machine and time its memory."""
    import torch

    from moyu.kernels import cpu, gpu
    from moyu.measure import environment

    memory, free = _memory()
    no_kernels = cpu.unavailable()
    machine = environment.machine()
    return Machine(
        processor=environment.environment()["device"],
        platform=machine["platform"],
        cores=machine["cores"],
        quota=_quota(),
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0,
        memory=memory,
        free=free,
        huge_pages="[never]" not in _read(PAGES),
        threads=torch.get_num_threads(),
        kernels=None if no_kernels else cpu.extension().isa(),
        sets=() if no_kernels else tuple(cpu.extension().isas()),
        no_kernels=no_kernels,
        reads=_reads(free),
        gpus=tuple(torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())),
        no_gpu=gpu.unavailable(),
        versions=environment.environment()["versions"],
        extras={name: all(map(importlib.util.find_spec, packages)) for name, packages in EXTRAS.items()},
    )


def lines(found: Machine) -> dict[str, str]:
    """The machine in words, by heading."""
    others = [name for name in found.sets if name != found.kernels]
    quota = "" if found.quota is None else f", {found.quota:g} granted"
    missing = [name for name, there in found.extras.items() if not there]
    return {
        "processor": f"{found.processor}; {found.platform}; {found.cores} cores{quota}",
        "memory": f"{_gb(found.memory)}, {_gb(found.free)} free",
        "reads": f"{found.reads:.1f} GB/s with {found.threads} threads: a model that reads 1 GB a token writes "
        f"{found.reads:.0f} tokens a second at most",
        "kernels": "none"
        if found.kernels is None
        else found.kernels + (f" (of {', '.join(others)} too)" if others else ""),
        "threads": f"{found.threads}",
        "GPU": _gpus(found),
        "versions": ", ".join(f"{name} {version}" for name, version in found.versions.items()),
        "extras": f"{', '.join(n for n, there in found.extras.items() if there) or 'none'}"
        + (f"; not installed: {', '.join(missing)} (pip install 'moyu-llm[{missing[0]}]')" if missing else ""),
    }


def findings(found: Machine) -> Sequence[Finding]:
    """What will be slow on such a machine, worst first."""
    slow = []
    room = min(found.cores, math.ceil(found.quota or found.cores))

    def add(what: str, why: str, remedy: str) -> None:
        slow.append(Finding(what, why, remedy))

    if found.no_kernels is not None:
        problem, _, remedy = found.no_kernels.rpartition("; ")
        add("Everything", f"the C++ kernels are missing, so that plain torch decodes ({problem})", f"Remedy: {remedy}.")
    elif found.kernels != found.sets[0]:
        add("Everything", f"MOYU_ISA asks for {found.kernels}, and {found.sets[0]} is here", "Remedy: unset MOYU_ISA.")
    elif found.kernels == "portable":
        add(
            "Everything",
            "the processor has no AVX2, so that loops without vectors decode",
            "Remedy: another processor.",
        )
    elif found.kernels not in INTEGERS:
        add(
            "GGUF files and --weights q8_0 or q4_0",
            f"{found.kernels} has no instruction that multiplies and adds integers (VNNI)",
            "Where the memory is fast, 16-bit weights may gain more from skipping: compare with `moyu bench`.",
        )
    if found.threads > room:
        add(
            "Everything",
            f"{found.threads} threads share {room} cores and wait for each other",
            f"Remedy: OMP_NUM_THREADS={room}.",
        )
    elif found.threads * 2 < room:
        add("Everything", f"{found.threads} threads on {room} cores", f"Remedy: OMP_NUM_THREADS={room}, or unset it.")
    if found.load > found.cores * (1 + BUSY):
        add(
            "Every measurement",
            f"{found.load:.1f} processes run on {found.cores} cores, so that speeds here are too low",
            "Remedy: wait until the machine is quiet.",
        )
    if found.free is not None and found.free < SMALL:
        add(
            "Models that do not fit",
            f"{_gb(found.free)} of memory are free, and what does not fit is read from disk",
            "Remedy: a smaller model or file, or `--weights q4_0`.",
        )
    if not found.huge_pages:
        add(
            "Scattered reads, by 5 to 10 %",
            "the system grants no huge pages",
            f"Remedy: as root, echo madvise > {PAGES}.",
        )
    if found.gpus and found.no_gpu is not None:
        why = f"decode steps do not compile there ({found.no_gpu.rpartition('; ')[0]})"
        add("--device cuda", why, "Remedy: pip install 'moyu-llm[gpu]'.")
    return slow


def _gpus(found: Machine) -> str:
    """Names, and whether decode steps compile there."""
    if not found.gpus:
        return "none that torch sees"
    steps = "decode steps compile" if found.no_gpu is None else "decode steps do not compile"
    return f"{', '.join(found.gpus)}; {steps}"


def _gb(size: float | None) -> str:
    return "unknown" if size is None else f"{size / 1e9:.1f} GB"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _quota() -> float | None:
    """Cores that the control group of this process grants."""
    granted, _, period = _read(GROUP / "cpu.max").partition(" ")
    return int(granted) / int(period) if granted.isdigit() and period.isdigit() and int(period) else None


def _memory() -> tuple[float | None, float | None]:
    """Bytes of memory, and those that are free: the machine's, or the control group's where it grants less."""
    told = {
        name: value.split()
        for name, _, value in (line.partition(":") for line in _read(Path("/proc/meminfo")).splitlines())
    }
    memory, free = (float(told[n][0]) * 1024 if n in told else None for n in ("MemTotal", "MemAvailable"))
    limit, used = _read(GROUP / "memory.max"), _read(GROUP / "memory.current")
    if memory is not None and free is not None and limit.isdigit() and used.isdigit():
        memory, free = min(memory, float(limit)), min(free, max(0.0, float(limit) - float(used)))
    return memory, free


def _reads(free: float | None) -> float:
    """GB/s at which memory can be read here, of a buffer that the caches do not hold, where there is room for one."""
    from moyu.kernels import ReadCeiling
    from moyu.measure.environment import last_level_cache, read_buffer

    size = read_buffer(last_level_cache())
    if free is not None:
        size = max(1 << 20, min(size, int(free) // 4))
    return ReadCeiling(size).sample(SAMPLES).best_gb_s
