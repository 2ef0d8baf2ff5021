"""A decode step from token ids to logits in one piece, where embedding, final norm and head are plain as well.

What is left in Python is to check that nobody has touched the model, and to make the output: the modules around the layers
(their masks, angles and outputs) cost 2 % of a step of 50 ms, and more of a shorter one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from moyu.engine.cache import KvCache
from moyu.engine.choosers import Known
from moyu.engine.memory import SequenceMemory, cache_field, cache_of, memory_of
from moyu.engine.rows import rows_at, rows_of
from moyu.engine.session import AUTOCAST, Pass, Session, autocasts
from moyu.engine.steps.run import DecodeRun, Reads
from moyu.engine.steps.way import NotCompiled, Run
from moyu.methods.values import NOTHING

# What a decode step may be called with; anything else takes the general path.
_KNOWN = {
    "input_ids",
    "past_key_values",
    "cache",
    "attention_mask",
    "position_ids",
    "use_cache",
    "return_dict",
    "logits_to_keep",
}
MOST_TOKENS = 32  # of one native call, kMostRows of kernels.h
_ASKS = ("output_attentions", "output_hidden_states")


def whole_step(session: Session, args: tuple, kwargs: dict[str, Any]) -> tuple[Any | None, str | None]:
    """The model's output for a decode step in one piece, native or compiled; or None and why the step is not one."""
    run = session.native
    if run is None:
        return None, session.general_because
    ids, cache = args[0] if args else kwargs.get("input_ids"), cache_of(kwargs)
    because = _because(session, run, ids, cache, len(args), kwargs)
    if because is not None or run.ends is None or cache is None or ids is None:
        return None, because
    memory, past = memory_of(cache), int(cache.get_seq_length())
    if isinstance(cache, KvCache) and cache.ragged:
        given = None, cache.lengths
    else:
        given = _given(ids, past, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    if given is None:
        return None, "its attention mask or its positions are not those of one more token"
    if not run.can_append(cache, len(ids), run.dtype):
        return None, "its cache is not one that the step can append to"
    if not run.untouched():
        return None, "a module of the model was hooked, replaced or patched after the plan was applied"
    masks = _known_masks(session, run, memory, len(ids), past, ids.device)
    allowed, positions = given
    rows = None
    if session.chooser is not None:
        if isinstance(cache, KvCache) and cache.ragged:
            rows = rows_at(cache.lengths, 0, ids.device)
        else:
            rows = rows_of((len(ids), 1), kwargs.get("attention_mask"), past, past, ids.device)
    try:
        logits = run.logits(cache, ids, masks, allowed, positions, rows)
    except NotCompiled as error:
        session.native.detach()
        session.native, session.general_because = None, str(error)
        return None, session.general_because
    memory.seen = past + 1
    session.traces.note(run.trace)
    session.traces.sparse_rows += len(ids)
    output = run.ends.output
    return output(logits=logits, **{cache_field(output): cache}), None


def dense_step(session: Session, cache: Cache, ids: Tensor, reads: Reads = "all") -> Tensor | None:
    """Logits (B, T, V) of the next tokens of every sequence, ids (B, T) int64, in one native call; None where there is none.

    Nothing is skipped, whatever the plan. Keys and values join the cache, which is MOYU's own; what is known of the prompt stays.
    B * T is at most `MOST_TOKENS`. reads: "first bits" reads those alone of weights that are parted.
    """
    run = session.native
    if (
        not isinstance(run, DecodeRun)
        or run.ends is None
        or not isinstance(cache, KvCache)
        or ids.numel() > MOST_TOKENS
        or ids.device.type != "cpu"
        or session.observer is not None
        or session.chooser is not None
        or torch.is_grad_enabled()
        or autocasts(session.model)
        or not run.can_append(cache, len(ids), run.dtype)
        or not run.untouched()
    ):
        return None
    logits = run.dense_logits(cache, ids, reads)
    memory_of(cache).seen = int(cache.get_seq_length())
    session.traces.note(run.trace)
    return logits


def _because(
    session: Session, run: Run, ids: Any, cache: Cache | None, positional: int, kwargs: dict[str, Any]
) -> str | None:
    """Why a call is not a decode step that goes from token ids to logits in one piece; None: it is one."""
    if run.ends is None:
        return "its embedding, final norm or head is not plain"
    if session.observer is not None or not isinstance(session.chooser, Known | None) or session.controller is not None:
        return "somebody watches or decides"
    if torch.is_grad_enabled():
        return "gradients are on"
    if torch.compiler.is_compiling():
        return "torch.compile is tracing"
    if autocasts(session.model):
        return AUTOCAST
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] != 1 or ids.dtype != torch.int64:
        return "the call brings no single token of every row"
    if len(ids) > run.most:
        return f"a batch of {len(ids)} rows is more than {run.most}"
    if cache is None or not hasattr(cache, "_moyu_memory"):
        return "no prompt came before"
    unknown = set(kwargs) - _KNOWN
    if positional > 1 or unknown:
        return f"the call has arguments of its own: {', '.join(sorted(unknown)) or 'by position'}"
    if kwargs.get("use_cache") is False or kwargs.get("return_dict") is False:
        return "the call asks for another output"
    if not isinstance(kwargs.get("logits_to_keep", 0), int):
        return "the call asks for chosen logits"
    if any(getattr(session.model.config, name, False) for name in _ASKS):
        return "the model's config asks for attentions or hidden states"
    memory, past = memory_of(cache), int(cache.get_seq_length())
    boundary = session.begin(memory, past, 1)
    lengths = cache.lengths if isinstance(cache, KvCache) and cache.ragged else torch.tensor(past)
    if boundary is None or bool((lengths < boundary).any()):
        return "the token belongs to the prompt"
    if memory.owner != session.owner or memory.seen != past:
        return "the cache holds columns that this plan has not seen"
    return None


def _given(
    ids: Tensor, past: int, mask: Tensor | None, positions: Tensor | None
) -> tuple[Tensor | None, Tensor | None] | None:
    """Which positions may be attended to, None = all, and the rows' own positions, None = `past`; None = the general way."""
    if mask is not None:
        if not isinstance(mask, Tensor) or mask.shape != (len(ids), past + 1) or not bool(mask[:, -1].all()):
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


def _known_masks(
    session: Session, run: Run, memory: SequenceMemory, batch: int, past: int, device: torch.device
) -> list[Tensor | None]:
    """Masks that are known before the step, (B, n), one a layer; None where a mask is chosen in the step."""
    masks: list[Tensor | None] = []
    state: Pass | None = None
    for site in (layer.sequence_site for layer in run.layers):
        mask = None
        if site is not None:
            static = site.method.granularity == "static"
            mask = site.static_mask if static else memory.masks.get(site.site.key)
            if mask is None:
                if state is None:
                    state = session.new_pass(rows_at(torch.full((batch,), past), 0, device), memory)
                mask = site.decide(NOTHING, state.rows, state)
            mask = mask.expand(batch, -1)
        masks.append(mask)
    return masks
