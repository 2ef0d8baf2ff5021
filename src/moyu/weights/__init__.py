"""How numbers lie in memory: one file for each weight format, and the one list of them."""

from __future__ import annotations

import difflib

from moyu.weights.format import Format, Order, Stored
from moyu.weights.grouped import Grouped
from moyu.weights.packed import PACKED4, PACKED8
from moyu.weights.plain import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Plain, held
from moyu.weights.q4_0 import Q4_0
from moyu.weights.q8_0 import Q8_0

__all__ = ["FORMATS", "QUANTISED", "Format", "Order", "Plain", "Stored", "held", "named"]

# The one list of formats, by name. A new one is a file beside these and a name here.
FORMATS: dict[str, Format] = {f.name: f for f in (FLOAT32, BFLOAT16, FLOAT16, FLOAT64, Q8_0, Q4_0, PACKED8, PACKED4)}
# Those that a model can be quantised to when it is loaded, or that a GGUF file may hold.
QUANTISED: tuple[str, ...] = tuple(name for name, f in FORMATS.items() if isinstance(f, Grouped))


def named(name: str) -> Format:
    """The format of that name. Raises ValueError that gives the nearest one."""
    if name not in FORMATS:
        near = difflib.get_close_matches(str(name), FORMATS, 1, 0.0)[0]
        raise ValueError(f"unknown weight format {name!r}; the nearest is {near!r}, of {', '.join(FORMATS)}")
    return FORMATS[name]
