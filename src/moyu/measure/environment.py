"""Where a number comes from: code, versions and machine, determined once per process."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parent.parent
try:
    VERSION = version("moyu-llm")
except PackageNotFoundError:  # running from a source tree that was never installed
    VERSION = "0+source"


@cache
def environment() -> dict[str, Any]:
    """Commit and dirty flag (None outside a checkout), versions and device, for every record."""
    commit, dirty = checkout(PACKAGE)
    versions = {"moyu": VERSION, "python": platform.python_version()}
    for package in ("torch", "transformers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # vendored or patched out: leave it out rather than be wrong
            continue
    return {"commit": commit, "dirty": dirty, "versions": versions, "device": _processor()}


def last_level_cache(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Bytes of all the machine's last-level caches together; 0 where the system does not tell."""
    found: dict[tuple[int, str], int] = {}
    for index in root.glob("cpu[0-9]*/cache/index*"):
        try:
            level, size, shared = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
            found[int(level), shared] = int(size.rstrip("KMG")) << {"K": 10, "M": 20, "G": 30}.get(size[-1:], 0)
        except (OSError, ValueError):
            continue
    last = max((level for level, _ in found), default=0)
    return sum(size for (level, _), size in found.items() if level == last)


def read_buffer(cache: int) -> int:
    """Bytes of a buffer that a cache of so many bytes cannot hold: four times as many, and 256 MiB at least."""
    return max(256 << 20, 4 * cache)


def device_name(device: Any) -> str:
    """The name of a torch device in records: the accelerator's, or the processor's."""
    import torch

    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else environment()["device"]


def machine() -> dict[str, Any]:
    """The operating system and the cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)  # absent on macOS and Windows
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return {"platform": f"{platform.system()} {platform.machine()}", "cores": cores}


def checkout(folder: Path) -> tuple[str | None, bool | None]:
    """Hash of the commit that tracks `folder`, and whether files in it differ; (None, None) if git does not track it.

    A copy installed inside another repository is not tracked by it and gets no hash.
    """
    if not _git(folder, "ls-files", "."):
        return None, None
    commit, changes = _git(folder, "rev-parse", "HEAD"), _git(folder, "status", "--porcelain", "--", ".")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next((n for n in names if n), None) or platform.processor() or platform.machine() or "unknown"
