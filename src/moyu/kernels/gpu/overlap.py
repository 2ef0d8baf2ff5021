"""Launches that overlap: one may begin while the one before it ends (programmatic dependent launch).

Such a launch waits before it reads or writes anything, so that what overlaps is its own start.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moyu.kernels.gpu.common import INTERPRETED

CAN = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)  # Hopper and later
EARLY = {"launch_pdl": True} if CAN else {}  # of a launch that calls `wait_for_last`
OVERLAPPED = tl.constexpr(bool(EARLY))


@triton.jit
def begin_next():
    """Lets the next launch begin."""
    if OVERLAPPED:
        gdc_launch_dependents()


@triton.jit
def wait_for_last():
    """Waits until the launch before is over."""
    if OVERLAPPED:
        gdc_wait()
