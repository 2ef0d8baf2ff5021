"""Launches that overlap: one may begin while the one before it ends (programmatic dependent launch).

Such a launch reads what nobody is about to write, weights, and waits before it reads or writes anything else.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from moyu.kernels.gpu.common import INTERPRETED

EARLY = {} if INTERPRETED else {"launch_pdl": True}  # of a launch that calls `wait_for_last`
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
