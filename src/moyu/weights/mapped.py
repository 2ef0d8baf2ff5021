"""Memory that a mapped file need not hold any longer."""

from __future__ import annotations

import ctypes
import mmap

import numpy as np
from torch import Tensor

# Bits of an entry of /proc/self/pagemap, see proc(5).
PRESENT, SWAPPED, OF_A_FILE = (np.uint64(1 << bit) for bit in (63, 62, 61))


def let_go(tensor: Tensor) -> None:
    """Unmap a contiguous CPU tensor's pages from this process where they are an unchanged part of a file.

    `from_pretrained` maps safetensors: a weight that has been copied into another layout would otherwise stay resident
    twice. Values do not change: whoever reads the tensor again reads the file. Does nothing elsewhere than on Linux.
    """
    advice = getattr(mmap, "MADV_DONTNEED", None)
    if advice is None or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return
    page = mmap.PAGESIZE
    first, last = -(-tensor.data_ptr() // page), (tensor.data_ptr() + tensor.nbytes) // page
    if first < last and _all_of_a_file(first, last):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(first * page), ctypes.c_size_t((last - first) * page), advice)


def _all_of_a_file(first: int, last: int) -> bool:
    """Whether no page of these has contents of its own: written to, a page of a private mapping is no longer the file's."""
    try:
        with open("/proc/self/pagemap", "rb") as file:
            file.seek(first * 8)
            entries = np.frombuffer(file.read((last - first) * 8), dtype=np.uint64)
    except OSError:
        return False
    kind = entries & (PRESENT | SWAPPED | OF_A_FILE)
    return len(entries) == last - first and bool(np.isin(kind, [np.uint64(0), OF_A_FILE, PRESENT | OF_A_FILE]).all())
