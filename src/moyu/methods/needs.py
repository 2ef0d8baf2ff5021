"""What a site of a plan asks of a decode step, in the words of a step's `CAN`.

Beside the words of `SiteParams` ("bias", "basis", "centre", "low_rank", "units", "top_k", "soft") there are
  "columns by magnitude"        what is skipped, and how it is decided: by "magnitude", another "score", or "masks" that are made
                                before the step, once per sequence or for all text;
  "factors"                     a magnitude has factors;
  "remainder", "remainder without a kernel"   what is skipped gives something, from weights in few bits;
  "lookahead"                   another layer's activation decides;
  "further bits"                of what is skipped the first bits are read.
"""

from __future__ import annotations

from typing import get_args

from moyu.methods.base import Method
from moyu.methods.magnitude import Magnitude
from moyu.methods.values import PARAMS, Site, SiteParams, Skips

ANY = frozenset(f"{skips} by {how}" for skips in get_args(Skips) for how in ("magnitude", "score", "masks"))
ALL = ANY | PARAMS | {"factors", "remainder", "remainder without a kernel", "lookahead", "further bits"}


def needs(method: Method, site: Site, params: SiteParams) -> frozenset[str]:
    """All that a site asks of a step; a step takes it where this is a part of its `CAN`."""
    asked = set(params.needs())
    if site.source_layer != site.layer:
        asked.add("lookahead")
    if site.further:
        asked.add("further bits")
    if method.granularity != "token":
        asked -= {"top_k", "units"}  # the mask says what they led to
        return frozenset(asked | {f"{site.skips} by masks"})
    if not isinstance(method, Magnitude):
        return frozenset(asked | {f"{site.skips} by score"})
    rest = method.remainder(site, params)
    asked |= {f"{site.skips} by magnitude"} | (set() if rest is None else rest.needs())
    return frozenset(asked if method.factors(site, params) is None else asked | {"factors"})
