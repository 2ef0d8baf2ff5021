"""How numbers lie in memory: one file for each weight format, and the one list of them."""

from __future__ import annotations

import difflib

from moyu.weights.format import Format, Order, Stored
from moyu.weights.grouped import Grouped
from moyu.weights.iq4_nl import IQ4_NL
from moyu.weights.iq4_xs import IQ4_XS
from moyu.weights.mxfp4 import MXFP4
from moyu.weights.packed import PACKED4, PACKED8
from moyu.weights.plain import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, Plain, held
from moyu.weights.q2_k import Q2_K
from moyu.weights.q3_k import Q3_K
from moyu.weights.q4_0 import Q4_0
from moyu.weights.q4_1 import Q4_1
from moyu.weights.q4_k import Q4_K
from moyu.weights.q5_0 import Q5_0
from moyu.weights.q5_1 import Q5_1
from moyu.weights.q5_k import Q5_K
from moyu.weights.q6_k import Q6_K
from moyu.weights.q8_0 import Q8_0

__all__ = ["FORMATS", "IN_FILES", "QUANTISED", "Format", "Order", "Plain", "Stored", "held", "named"]

# The one list of formats, by name. A new one is a file beside these and a name here.
FORMATS: dict[str, Format] = {
    f.name: f
    for f in (
        *(FLOAT32, BFLOAT16, FLOAT16, FLOAT64),
        *(Q8_0, Q6_K, Q5_K, Q5_1, Q5_0, Q4_K, Q4_1, Q4_0, IQ4_NL, IQ4_XS, MXFP4, Q3_K, Q2_K),
        *(PACKED8, PACKED4),
    )
}
# Those of integers that a GGUF file may hold.
IN_FILES: tuple[str, ...] = tuple(name for name, f in FORMATS.items() if isinstance(f, Grouped))
# Of them those that a model can be quantised to when it is loaded.
QUANTISED: tuple[str, ...] = (Q8_0.name, Q4_0.name)


def named(name: str) -> Format:
    """The format of that name. Raises ValueError that gives the nearest one."""
    if name not in FORMATS:
        near = difflib.get_close_matches(str(name), FORMATS, 1, 0.0)[0]
        raise ValueError(f"unknown weight format {name!r}; the nearest is {near!r}, of {', '.join(FORMATS)}")
    return FORMATS[name]
