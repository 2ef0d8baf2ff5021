"""Pack a model: every matrix of a GGUF file of plain numbers into a type of integers, fitted to a calibration text.

For each linear, with its inputs x in the model as it was and y in the packed one: H = E[y y'] and, so that later linears take back what
earlier ones lost, the weight to round is the one that gives most nearly W x from y, W E[x y'] H^-1. It is rounded with feedback, then
everything moves downhill (`feedback`, `descent`).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moyu.errors import UserError
from moyu.measure.windows import Windows
from moyu.model.architectures import ARCHITECTURES
from moyu.model.gguf.configuration import target
from moyu.model.gguf.loading import in_pairs, load_model
from moyu.model.gguf.metadata import Metadata
from moyu.model.gguf.reader import DTYPES, File
from moyu.model.gguf.writing import Writer, nbytes
from moyu.packing import descent, feedback
from moyu.packing.grid import Grid
from moyu.packing.streams import Streams, in_rows
from moyu.weights import FORMATS
from moyu.weights.grouped import Grouped

Stage = Callable[[str, int, int], None]
# How far second moments of different inputs are drawn to 0: those of a short text are half chance. On the embedded swiglu (Q4_0, head
# whole, 1,024 and 8,192 tokens) KL is .031 and .017 without, .0120 and .0116 with; rounding weight by weight has .0186.
SHRINK = 0.3
DAMPING = 0.01  # of the mean second moment, added to all
SWEEPS = 3
HEAD, TABLE = "output.weight", "token_embd.weight"
# The types that are made, and what a matrix gets whose rows are no multiple of 256.
NARROW = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q4_1", "q5_k": "q5_1", "q6_k": "q8_0"}
TYPES = (*NARROW, "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")


@dataclass(frozen=True)
class Error:
    """What packing a matrix cost: its type, and the error of its outputs on the text over their size."""

    kind: str
    lost: float | None  # None: it was rounded without a text


def kind_of(kind: str, inputs: int) -> str | None:
    """The type that a matrix of so many inputs can have in place of `kind`; None: no type of integers."""
    if inputs % 256 and kind in NARROW:
        kind = NARROW[kind]
    return None if inputs % 32 else kind


def kinds(file: File, kind: str, head: str | None = None) -> dict[str, str]:
    """A type for each matrix of a file: `kind`, and `head` for the head and the embedding."""
    found = {}
    for name, entry in file.tensors.items():
        if len(entry.shape) < 2 or not name.endswith(".weight") or "norm" in name or "ffn_gate_inp" in name:
            continue
        own = kind_of(head or kind if name in (HEAD, TABLE) else kind, entry.shape[-1])
        if own is not None:
            found[name] = own
    return found


def weight_bytes(file: File, chosen: Mapping[str, str]) -> tuple[int, int]:
    """Bytes and numbers of the matrices that are packed."""
    shapes = {name: file.tensors[name].shape for name in chosen}
    return sum(nbytes(shapes[name], kind.upper()) for name, kind in chosen.items()), sum(map(prod, shapes.values()))


def linears_of(file: File, model: Any) -> dict[str, nn.Linear]:
    """The linear that holds each matrix, by the name of its tensor; of a tied head, by that of the embedding."""
    architecture, modules = ARCHITECTURES[Metadata(file).architecture], dict(model.named_modules())
    found = {}
    for name in file.tensors:
        module = modules.get((target(architecture, name) or "").removesuffix(".weight"))
        if isinstance(module, nn.Linear):
            found[name] = module
    if HEAD not in found and TABLE in file.tensors:
        found[TABLE] = model.get_output_embeddings()
    return found


@torch.no_grad()
def pack(
    file: File, out: Path, chosen: Mapping[str, str], windows: Windows, stage: Stage | None = None
) -> dict[str, Error]:
    """Write the packed file. chosen: a type for each matrix to pack (`kinds`); all else is copied. Raises UserError."""
    say = stage or (lambda *_: None)
    require_whole(file)
    model: Any = load_model(file, torch.float32)
    named = {id(module): name for name, module in linears_of(file, model).items() if name in chosen}
    heads = _paired(file, model)
    errors: dict[str, Error] = {}
    shapes = {name: (e.shape, chosen.get(name, e.kind).upper()) for name, e in file.tensors.items()}
    with (
        Writer(out, dict(file.metadata) | {"general.quantization_version": 2}, shapes) as written,
        one_thread() as pool,
    ):

        def keep(name: str, module: nn.Linear, seen: Tensor | None, met: Tensor | None) -> None:
            weight, blocks, errors[name] = rounded(module.weight, chosen[name], seen, met, pool)
            module.weight.data.copy_(weight)
            written.put(name, in_pairs(blocks, heads[name]) if name in heads else blocks)

        streams = Streams(model, windows.tokens)
        for index in range(len(streams.layers)):
            say("pack layers", index, len(streams.layers))
            for modules, met in streams.stages(index):
                asked = [m for m in modules if id(m) in named]
                seen = streams.packed_input(index, modules[0]) if asked else met
                moments = _moments(met, seen)
                for module in asked:
                    keep(named[id(module)], module, *moments)
            streams.advance(index)
        say("pack layers", len(streams.layers), len(streams.layers))
        head = model.get_output_embeddings()
        if id(head) in named and named[id(head)] not in errors:
            keep(named[id(head)], head, *_moments(*streams.head_inputs(head)))
        for name in file.tensors:
            if name in errors:
                continue
            values = file.values(name)
            if name not in chosen:
                written.put(name, values)
                continue
            values = values.float().flatten(0, -2)  # what no linear holds: an embedding, routed experts
            written.put(name, rounded(values, chosen[name], None, None, pool)[1])
            errors[name] = Error(chosen[name], None)
    return errors


def rounded(
    weight: Tensor, kind: str, second: Tensor | None, cross: Tensor | None, pool: ThreadPoolExecutor | None = None
) -> tuple[Tensor, Tensor, Error]:
    """A weight (q, n) in a type: its values (q, n), its blocks (q, bytes) uint8, and what was lost.

    second: H = E[y y'] (n, n) float32 of the inputs that it will have; cross: E[x y'] of those that it was made for, None: the same.
    Without `second` each weight is rounded alone.
    """
    form = FORMATS[kind]
    assert isinstance(form, Grouped)
    grid, weight = Grid(form), weight.detach().float()
    values = torch.empty_like(weight)
    blocks = torch.empty(len(weight), form.block_bytes * weight.shape[1] // form.block, dtype=torch.uint8)
    upper = aim = None
    if second is not None:
        second = steadied(second)
        upper = feedback.factor(second)
        if cross is not None:
            aim = weight @ torch.linalg.solve(second.double(), steadied(cross).double().t()).t().float()
    aim = weight if aim is None else aim

    def part(rows: slice) -> None:
        here = aim[rows].t().contiguous()
        place = feedback.place(here, grid, upper)
        if second is not None:
            for _ in range(SWEEPS):
                descent.sweep(place, here, second)
        blocks[rows] = place.blocks()
        values[rows] = form.read(blocks[rows], (len(blocks[rows]), weight.shape[1])).values()

    pieces = list(in_rows(*weight.shape))
    if pool is not None and len(pieces) == 1 and len(weight) >= 128:
        middle = len(weight) // 2
        pieces = [slice(0, middle), slice(middle, len(weight))]
    list(pool.map(part, pieces) if pool else map(part, pieces))
    lost = None
    if second is not None:
        change = weight - values
        lost = float((change @ second * change).sum() / (weight @ second * weight).sum().clamp(min=1e-30))
    return values, blocks, Error(kind, lost)


def steadied(moments: Tensor) -> Tensor:
    """Second moments (n, n) of a text, fit to be trusted: shrunk, and positive definite."""
    own = moments.diagonal()
    return moments * (1 - SHRINK) + torch.diag(SHRINK * own + (DAMPING * float(own.mean()) or 1.0))


@contextlib.contextmanager
def one_thread() -> Iterator[ThreadPoolExecutor]:
    """A pool for rounding, whose many small sums run on one thread each: shared by several, they would wait for one another."""
    before = torch.get_num_threads()
    with ThreadPoolExecutor(
        max(1, min(before, os.cpu_count() or 1)), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        try:
            yield pool
        finally:
            torch.set_num_threads(before)


def _moments(met: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    return seen.t() @ seen / len(seen), met.t() @ seen / len(seen)


def _paired(file: File, model: Any) -> dict[str, int]:
    """The heads of those matrices whose rows llama.cpp orders in its own way."""
    if not ARCHITECTURES[Metadata(file).architecture].paired:
        return {}
    counts = {"attn_q": model.config.num_attention_heads, "attn_k": model.config.num_key_value_heads}
    return {n: c for n in file.tensors for part, c in counts.items() if n.endswith(f".{part}.weight")}


def require_whole(file: File) -> None:
    """Refuse a file that is quantised already: its values are on another grid."""
    blocks = sorted({e.kind for e in file.tensors.values() if e.kind not in DTYPES})
    if blocks:
        raise UserError(
            f"{file.path} is quantised already ({', '.join(blocks)})", "pack the model of 16 bits that it was made from"
        )
