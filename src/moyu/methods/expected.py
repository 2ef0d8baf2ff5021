"""What a site of a plan must be on a block of a model: one of the method's own sites there, with tensors of its shapes."""

from __future__ import annotations

import dataclasses

from moyu.methods.base import Method
from moyu.methods.selection import Soft, Threshold, TopK
from moyu.methods.shapes import check_all
from moyu.methods.values import Site, SiteParams
from moyu.model.anatomy import Block


def sizes(site: Site, block: Block) -> dict[str, int]:
    """The letters that shapes are written in.

    units: what a score ranks. n: numbers of the activation that decides. width: numbers that the mask has for a row.
    outputs: of the linears that a plan's bias is added to, together. q: outputs of one linear of columns.
    """
    first, last = block.pieces[site.linears[0]], block.pieces[site.linears[-1]]
    found = {"units": site.units, "q": first.shape[0], "outputs": last.shape[0]}
    match site.skips:
        case "columns":
            outputs = sum(block.pieces[name].shape[0] for name in site.linears)
            return {**found, "n": first.shape[1], "width": first.shape[1], "outputs": outputs}
        case "heads":
            return {**found, "n": first.shape[1], "width": site.units}
        case "words":
            return {**found, "n": site.units, "width": site.units}
    reads = block.pieces["up"].shape[1] if site.reads == "mlp_in" else block.neurons
    return {**found, "n": reads, "width": block.neurons}


def check_site(method: Method, own: Site | None, site: Site, params: SiteParams, block: Block) -> None:
    """Refuse a site that is not the method's `own` on this block, and tensors that it does not read there (ValueError)."""
    # Bytes of a unit follow the type of the weights, and a plan serves copies of a model in several types.
    if own is None or dataclasses.replace(own, unit_bytes=site.unit_bytes) != site:
        raise ValueError(f"method {method.name!r} has no such site here")
    given = sizes(site, block)
    expected = SiteParams.shapes(site.skips)
    buffers = {f"buffer.{name}": shape for name, shape in method.shapes(site, block).items()}
    needed = set(buffers) | ({"blocks"} if site.units != given["width"] else set())
    needed |= {name for name in ("outer", "inner") if params.low_rank is not None}
    check_all(params.tensors(), expected | buffers, needed, given)
    if params.low_rank is not None and len({block.pieces[name].shape[0] for name in site.linears}) > 1:
        raise ValueError("one low-rank path serves linears of different widths")


def check_rule(site: Site, params: SiteParams) -> None:
    """Refuse a rule that no score can meet (ValueError): a threshold that is no number, more units than there are."""
    match params.rule:
        case Threshold(value) if not value < float("inf"):  # written so that nan is refused
            raise ValueError(f"the threshold is {value}")
        case TopK(k) if not 0 <= k <= site.units:
            raise ValueError(f"it keeps {k} of {site.units} units")
        case Soft():
            raise ValueError("a plan cannot have soft masks")
