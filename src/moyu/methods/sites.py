"""The sites of a block by shape: columns of linears, rows behind a gate, neurons, heads.

Each function gives the masks that fit a block, and () where the block has not what they need.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from moyu.methods.heads import KV_POLICIES, KvPolicy
from moyu.methods.values import READS, Site, Tap
from moyu.model.anatomy import Block


def whole_lines(size: int) -> int:
    """Bytes of a piece that skipping saves for sure: whole 64-byte lines."""
    return size if size % 64 == 0 else max(0, (size - 63) // 64 * 64)


def _row_bytes(block: Block, name: str) -> int:
    return whole_lines(block.pieces[name].row_bytes)


def _column_bytes(block: Block, name: str) -> int:
    return whole_lines(block.pieces[name].column_bytes)


def _has_columns(block: Block, name: str) -> bool:
    return name in block.pieces and block.pieces[name].has_columns


def column_site(block: Block, reads: Tap, *linears: str) -> Site:
    """Skip columns (input channels) of the linears that take one input: one mask for all of them."""
    width = block.pieces[linears[0]].shape[1]
    size = sum(_column_bytes(block, n) for n in linears)
    return Site(block.layer, reads, "columns", linears, width, size, block.expert)


def projection_sites(block: Block) -> tuple[Site, ...]:
    """A mask of input channels for every linear."""
    return tuple(column_site(block, tap, name) for name, tap in READS.items() if _has_columns(block, name))


def level_sites(block: Block) -> tuple[Site, ...]:
    """A mask of input channels for every linear whose weight can lie in planes; what is skipped are further bits."""
    found = []
    for name, tap in READS.items():
        stored = block.pieces[name].blocks if name in block.pieces else None
        if stored is not None and stored.format.splits:
            size = whole_lines(stored.format.plane_bytes(stored.shape[0])[1])
            site = Site(block.layer, tap, "columns", (name,), stored.shape[1], size, block.expert, further=True)
            found.append(site)
    return tuple(found)


def word_sites(block: Block) -> tuple[Site, ...]:
    """A mask of words (entries of the vocabulary) for a head that can be parted; what is skipped are further bits of its rows.

    What decides is the product with the first bits, (N, vocabulary). Few words are kept, so skipping one saves every byte.
    """
    stored = block.pieces["head"].blocks if "head" in block.pieces else None
    if stored is None or not stored.format.splits_rows:
        return ()
    words, n = stored.shape
    size = stored.format.part_bytes(n)[1]
    return (Site(block.layer, "words", "words", ("head",), words, size, block.expert, further=True),)


def input_sites(block: Block) -> tuple[Site, ...]:
    """A mask of input channels for every input: q, k and v share one, gate and up share one."""
    shared: dict[Tap, list[str]] = {}
    for name, tap in READS.items():
        if _has_columns(block, name):
            shared.setdefault(tap, []).append(name)
    return tuple(column_site(block, tap, *names) for tap, names in shared.items())


def down_sites(block: Block) -> tuple[Site, ...]:
    """A mask of neurons, decided from their own values: columns of down."""
    return (column_site(block, "mid", "down"),) if block.has_ffn else ()


def row_sites(block: Block, reads: Literal["gate", "up"]) -> tuple[Site, ...]:
    """Decide on gate (or up), computed densely; skip rows of the other and columns of down. For gated networks."""
    if not (block.gated and block.has_ffn):
        return ()
    other = "up" if reads == "gate" else "gate"
    size = _row_bytes(block, other) + _column_bytes(block, "down")
    return (Site(block.layer, reads, "rows", (other, "down"), block.neurons, size, block.expert),)


def neuron_sites(block: Block, reads: Literal["mlp_in", "mid"], reads_layer: int | None = None) -> tuple[Site, ...]:
    """Skip whole neurons: rows of gate and up, columns of down. "mid" is the prompt's, not the current token's.

    reads_layer: the layer whose activation decides, the block's own unless given.
    """
    if not block.has_ffn:
        return ()
    rows = [n for n in ("gate", "up") if n in block.pieces]
    size = sum(_row_bytes(block, n) for n in rows) + _column_bytes(block, "down")
    linears = (*rows, "down")
    return (Site(block.layer, reads, "neurons", linears, block.neurons, size, block.expert, reads_layer, block.act),)


def grouped(site: Site, count: int) -> Site:
    """The same neurons in `count` groups that are skipped whole; `SiteParams.blocks` says which neuron is in which."""
    return dataclasses.replace(site, units=count, unit_bytes=site.unit_bytes * site.units // count)


def head_sites(block: Block, *, groups: bool = False, kv: KvPolicy = "full") -> tuple[Site, ...]:
    """Skip whole heads: their rows of the query's linear where those are known, columns of o, and what the KV policy leaves out.

    The first linear's input decides. groups: a unit is the query heads that share keys and values; always so where keys or
    values are left out. Nothing where there is one unit, or where k and v that a policy needs are no linears of their own.
    """
    left_out, pieces = KV_POLICIES[kv], block.pieces
    units = block.kv_heads if groups or left_out else block.heads
    if units < 2 or (left_out and not {"q", "k", "v"} <= set(pieces)):
        return ()
    readers = [n for n in ("q_a", "q_b") if n in pieces] or ["q" if "q" in pieces else "qkv"]
    held = whole_lines(pieces["o"].column_bytes * pieces["o"].shape[1] // units)
    held += sum(whole_lines(pieces[n].row_bytes * pieces[n].shape[0] // units) for n in left_out)
    if block.head_rows is not None:
        held += whole_lines(block.head_rows.numel() // units * pieces[readers[-1]].row_bytes)
    return (Site(block.layer, "attn_in", "heads", (*readers, *left_out, "o"), units, held, block.expert),)
