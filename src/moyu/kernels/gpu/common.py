"""What the Triton kernels share: whether they can run here, activations, counters, outputs."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

_REMEDY = "pip install 'moyu-llm[gpu]', on a machine with an NVIDIA GPU"
_HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
MAX_ROWS = 16  # of a call; the reference serves more
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = {"q8_0": 0, "q4_0": 1, "q4_k": 2, "q6_k": 3}  # formats of GGUF files whose rows `blocks` reads
ACTS = {
    "identity": 0, "relu": 1, "relu2": 2, "silu": 3, "gelu": 4, "gelu_tanh": 5, "gelu_new": 5, "gelu_pytorch_tanh": 5,
    "quick_gelu": 6,
}  # fmt: skip


def unavailable() -> str | None:
    """Why this back end cannot be used here, with the remedy; None = it can."""
    if not _HAS_TRITON:
        return f"Triton is not installed; {_REMEDY}"
    if not INTERPRETED and not torch.cuda.is_available():
        return f"no GPU is visible to torch; {_REMEDY}"
    return None


def unsupported(x: Tensor) -> str | None:
    """Why it cannot serve tensors of x's device, dtype and rows; None = it can."""
    if x.device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"the tensors are on {x.device}"
    if x.dtype not in DTYPES:
        return f"it has no kernels for {x.dtype}"
    if len(x) > MAX_ROWS:
        return f"it takes at most {MAX_ROWS} rows, not {len(x)}"
    return None


def inner(activation: Tensor) -> Tensor:
    """Activations and masks (not weights) are copied where their rows are not contiguous."""
    return activation if activation.stride(1) == 1 else activation.contiguous()


def output(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Where a kernel writes (N, width). The interpreter cuts bfloat16 instead of rounding it: there torch rounds."""
    return torch.empty(len(x), width, dtype=torch.float32 if INTERPRETED else dtype, device=x.device)


def tile_rows(x: Tensor) -> int:
    """1: products on the ordinary units; 16: on the tensor cores, the smallest tile they take."""
    return 1 if len(x) == 1 else 16


@cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a device; of the interpreter 2, so that programs take turns."""
    return 2 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


all_tickets: dict[torch.device, Tensor] = {}


def tickets(device: torch.device) -> Tensor:
    """Counters of programs that have arrived, zero between calls: calls on one device must not overlap."""
    if device not in all_tickets:
        all_tickets[device] = torch.zeros(4096, dtype=torch.int32, device=device)
    return all_tickets[device]


class Pieces(NamedTuple):
    """A packed weight as its contiguous pieces, rows or columns: m of them with n values each."""

    data: Tensor  # (m, n) int8, or (m, n / 2) uint8
    scales: Tensor  # (m, n / 32) float16
    bits: int
    shape: tuple[int, int]  # (m, n)
