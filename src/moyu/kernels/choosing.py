"""Which back end computes: the list of them, what was asked for, and the bytes that they read."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from moyu.kernels import cpu
from moyu.kernels.backend import Backend, Read
from moyu.kernels.cpu import Cpu
from moyu.kernels.gpu import Gpu
from moyu.kernels.reference import Reference
from moyu.weights import Format
from moyu.weights.plain import BFLOAT16, held

BackendName = Literal["auto", "reference", "cpu", "gpu"]

# The one list of back ends, by name. `auto` takes the first that can be used here and supports the call.
BACKENDS: dict[str, Backend] = {backend.name: backend for backend in (Cpu(), Gpu(), Reference())}

_asked: ContextVar[str] = ContextVar("moyu_backend", default="auto")
_counter: ContextVar[ByteCounter | None] = ContextVar("moyu_byte_counter", default=None)


def available() -> dict[str, str | None]:
    """Each back end's name -> None where it can be used here, else the reason and the remedy."""
    return {name: backend.why_not() for name, backend in BACKENDS.items()}


def require(backend: str) -> None:
    """Raise ValueError for an unknown name, RuntimeError with the remedy for a back end that cannot be used here."""
    if backend == "auto":
        return
    if backend not in BACKENDS:
        near = difflib.get_close_matches(str(backend), ["auto", *BACKENDS], 1, 0.0)[0]
        raise ValueError(f"unknown back end {backend!r}; the nearest is {near!r}, of auto, {', '.join(BACKENDS)}")
    reason = BACKENDS[backend].why_not()
    if reason is not None:
        raise RuntimeError(f"The {backend} back end was asked for but is not available: {reason}")


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Run the kernels inside on this back end. Holds for this thread (or task) only; a new thread starts on auto.

    Raises what ``require`` raises; calls inside raise RuntimeError for tensors that the back end cannot serve.
    """
    require(backend)
    token = _asked.set(backend)
    try:
        yield
    finally:
        _asked.reset(token)


def choose(op: str, format: Format, x: Tensor) -> Backend:
    """The back end for a call. RuntimeError where one was asked for that cannot serve it."""
    asked = _asked.get()
    if asked != "auto":
        reason = BACKENDS[asked].supports(op, format, x)
        if reason is None:
            return BACKENDS[asked]
        raise RuntimeError(
            f"The {asked} back end was asked for but cannot serve this call: {reason}; use('auto') would"
        )
    for backend in BACKENDS.values():
        if backend.supports(op, format, x) is not None:
            continue
        reason = backend.why_not()
        if reason is None:
            return backend
        if isinstance(backend, Cpu) and cpu.forced():
            raise RuntimeError(f"The cpu kernels were configured but are not available: {reason}")
    raise RuntimeError(f"no back end computes {op} of weights in {format.name} for {x.dtype} on {x.device}")


def serves(x: Tensor, format: Format | None = None) -> bool:
    """Whether a call with x, on plain weights or on weights in a format, would run on kernels rather than on the reference."""
    return not isinstance(choose("rows", format or held(x, "rows").format, x), Reference)


def describe(device: torch.device | str = "cpu") -> str:
    """What runs now for bfloat16 on a device, for example ``auto: cpu (avx512, 2 threads)``; for records."""
    asked = _asked.get()
    backend = choose("rows", BFLOAT16, torch.empty(0, 0, dtype=torch.bfloat16, device=device))
    on_cpu = torch.device(device).type == "cpu"
    reason = cpu.unavailable() if backend.name != "cpu" and asked == "auto" and on_cpu else None
    return f"{asked}: {backend.name} ({backend.details()})" + (f"; not cpu: {reason}" if reason else "")


@dataclass
class ByteCounter:
    """Bytes of weights and biases that the kernels read: a piece once for all the rows that share one reading of it."""

    by_op: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return sum(self.by_op.values())


@contextlib.contextmanager
def count_bytes() -> Iterator[ByteCounter]:
    """Count what the kernels inside read, as the back end itself adds it up; this thread only. The innermost counts."""
    counter = ByteCounter()
    token = _counter.set(counter)
    try:
        yield counter
    finally:
        _counter.reset(token)


def count(op: str, read: Read) -> None:
    """Tell the counter of this thread, if there is one, that `op` has read so many bytes, or what it takes to find out."""
    counter = _counter.get()
    if counter is not None:
        counter.by_op[op] = counter.by_op.get(op, 0) + (read if isinstance(read, int) else read())
