"""A decode step from token ids to logits as one native call, where embedding, final norm and head are plain as well.

What is left in Python is to check that nobody has touched the model, and to make the output: the modules around the layers
(their masks, angles and outputs) cost 2 % of a step of 50 ms, and more of a shorter one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moyu import kernels
from moyu.engine import runtime
from moyu.engine.steps.layers import Norm, native_linear
from moyu.kernels import cpu
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear
from moyu.weights import Stored

if TYPE_CHECKING:
    from moyu.engine.runtime import SequenceMemory
    from moyu.engine.steps.run import DecodeRun

# What a decode step may be called with; anything else takes the general path.
_KNOWN = {
    "input_ids",
    "past_key_values",
    "attention_mask",
    "position_ids",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}
_ASKS = ("output_attentions", "output_hidden_states")
FIRST = 512  # positions of the first table of angles


class Angles:
    """cos and sin of a rotary embedding by position, as its own module computes them, as far as positions have come."""

    def __init__(self, module: nn.Module) -> None:
        """The module's angles must depend on nothing but the position."""
        self.module = module
        self._made: tuple[tuple, Tensor, Tensor] | None = None  # of what, cos, sin

    def at(self, positions: int | Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin, (1, width) of one position or (B, width) of B, float32 but rounded as a model of `dtype` has them."""
        furthest = int(positions if isinstance(positions, int) else positions.max())
        key = (dtype, *(b.data_ptr() for b in vars(self.module)["_buffers"].values() if b is not None))
        made = self._made
        if made is None or made[0] != key or len(made[1]) <= furthest:
            count = max(FIRST, 1 << furthest.bit_length())
            tables = self.module(torch.empty(1, 1, 1, dtype=dtype), torch.arange(count)[None])
            cos, sin = (table[0].float().contiguous() for table in tables)
            made = self._made = (key, cos, sin)
        index = slice(positions, positions + 1) if isinstance(positions, int) else positions
        return made[1][index], made[2][index]


@dataclass(eq=False)
class Ends:
    """What comes before and after the layers."""

    embedding: nn.Embedding | QuantisedEmbedding
    norm: Norm
    head: nn.Linear | QuantisedLinear
    angles: Angles | None
    output: type  # of the model's own forward

    def native(self) -> Any:
        """The ends as the extension takes them; pointers are those of the live parameters."""
        ends = cpu.extension().Ends()
        ends.embedding, ends.norm = native_linear(_held(self.embedding), None), self.norm.native()
        ends.head = native_linear(_held(self.head), self.head.bias)
        return ends


def _held(module: nn.Module) -> Tensor | Stored:
    return module.blocks if isinstance(module, QuantisedEmbedding | QuantisedLinear) else module.weight  # pyright: ignore


def whole_step(run: DecodeRun, args: tuple, kwargs: dict[str, Any]) -> Any | None:
    """The model's output for a decode step, or None where it must go the general way. Call with gradients off."""
    applied, ends, cache = run.applied, run.ends, kwargs.get("past_key_values")
    ids, memory = args[0] if args else kwargs.get("input_ids"), getattr(cache, "_moyu_memory", None)
    if (
        ends is None
        or cache is None
        or len(args) > 1
        or not _KNOWN.issuperset(kwargs)
        or ids is None
        or memory is None
        or ids.dim() != 2
        or ids.shape[1] != 1
        or len(ids) > runtime.MAX_SKIPPING_ROWS
        or ids.dtype != torch.int64
        or kwargs.get("use_cache") is False
        or kwargs.get("return_dict") is False
        or not isinstance(kwargs.get("logits_to_keep", 0), int)
        or any(getattr(applied.model.config, name, False) for name in _ASKS)
        or torch.compiler.is_compiling()
    ):
        return None
    past = int(cache.get_seq_length())
    boundary = runtime.prompt_end(applied, memory)
    if memory.owner != applied.owner or memory.seen != past or boundary is None or past < boundary:
        return None
    given = _given(ids, past, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    masks = None if given is None else _frozen_masks(run, memory, len(ids))
    if given is None or masks is None or not run.can_append(cache, len(ids), run.dtype) or not run.untouched():
        return None
    allowed, positions = given
    angles = None if ends.angles is None else ends.angles.at(past if positions is None else positions, run.dtype)
    logits = torch.empty((len(ids), 1, ends.head.out_features), dtype=run.dtype)
    kernels.count("decode", run.launch(cache, masks, angles, allowed, ids=ids.contiguous(), logits=logits))
    memory.prompt, memory.seen = boundary, past + 1
    return ends.output(logits=logits, past_key_values=cache)


def _given(
    ids: Tensor, past: int, mask: Tensor | None, positions: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """Which positions may be attended to, None = all, and the rows' own positions, None = `past`; None = the general way."""
    if mask is not None:
        if mask.dim() != 2 or mask.shape != (len(ids), past + 1) or not bool(mask[:, -1].all()):
            return None
        mask = None if bool(mask.all()) else mask.bool().to(torch.uint8).contiguous()
    if positions is not None:
        if positions.dim() != 2 or positions.shape[1] != 1 or len(positions) not in (1, len(ids)):
            return None
        positions = positions[:, 0]
        if bool((positions == past).all()):
            positions = None
        elif len(positions) != len(ids):
            positions = positions.expand(len(ids))
    return mask, positions


def _frozen_masks(run: DecodeRun, memory: SequenceMemory, batch: int) -> list[Tensor | None] | None:
    """Masks that earlier steps have left, one a layer; None where a mask is yet to be chosen."""
    masks: list[Tensor | None] = []
    for site in run.sequence_sites:
        mask = None
        if site is not None:
            static = site.method.granularity == "static"
            mask = site.static_mask if static else memory.masks.get(site.site.key)
            if mask is None or (not static and len(mask) != batch):
                return None
            mask = mask.expand(batch, -1)
        masks.append(mask)
    return masks
