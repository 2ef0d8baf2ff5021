"""Bytes that one decode step reads: the measure by which methods are compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from moyu.engine.memory import cache_of
from moyu.methods.base import Method
from moyu.methods.heads import KvPolicy
from moyu.methods.values import Site
from moyu.model.anatomy import Anatomy, stored_bytes
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear
from moyu.plan import Plan

KV_CONTEXTS = (0, 2048, 8192)


def dense_step_bytes(model: nn.Module, anatomy: Anatomy) -> float:
    """Bytes of parameters that one dense decode step reads at batch 1, context excluded.

    All linears, norms and biases; only the experts that a token is routed to; the head once even if tied; one row of each
    embedding.
    """
    tables = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    top = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    head = None if isinstance(top, QuantisedLinear) else getattr(top, "weight", None)
    share = {id(p): e.share for e in anatomy.experts for p in e.module.parameters()}
    total = 0.0
    for parameter in model.parameters():
        size = stored_bytes(parameter)
        if id(parameter) in tables and parameter is not head:
            continue
        total += size * share.get(id(parameter), 1.0)
    for module in model.modules():
        if isinstance(module, QuantisedLinear):
            total += module.blocks.nbytes
        elif isinstance(module, QuantisedEmbedding):
            total += module.blocks.nbytes / module.num_embeddings
    return total + sum(t.shape[1] * t.element_size() for t in tables.values())


def count_weights(model: nn.Module) -> int:
    """Parameters of a model, quantised ones included; tied ones count once."""
    kept = {
        m.blocks.tensors[0].data_ptr(): m
        for m in model.modules()
        if isinstance(m, QuantisedLinear | QuantisedEmbedding)
    }
    return sum(p.numel() for p in model.parameters()) + sum(math.prod(m.blocks.shape) for m in kept.values())


def bits_per_weight(model: nn.Module, anatomy: Anatomy, read: float) -> float:
    """Bits of each weight of a dense step that a step which reads so many bytes reads, the plan's own bytes included."""
    kept = {
        m.blocks.tensors[0].data_ptr(): m.blocks
        for m in model.modules()
        if isinstance(m, QuantisedLinear | QuantisedEmbedding)
    }
    stored = sum(map(stored_bytes, model.parameters())) + sum(blocks.nbytes for blocks in kept.values())
    return 8 * stored / count_weights(model) * read / dense_step_bytes(model, anatomy)


def step_weights(model: nn.Module, anatomy: Anatomy) -> float:
    """Weights that a token is multiplied with: those of the blocks, of the experts that it is routed to, and of the head."""
    share = shares(anatomy)
    head = model.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    shape = () if head is None else head.shape if isinstance(head, QuantisedLinear) else head.weight.shape
    return math.prod(shape) * (head is not None) + sum(
        math.prod(piece.shape) * share.get((block.layer, block.expert), 1.0)
        for block in anatomy.all_blocks()
        for piece in block.pieces.values()
    )


def added_bytes(plan: Plan, anatomy: Anatomy) -> float:
    """Bytes that a step reads of the plan itself: biases, bases, low-rank parts, thresholds, scores.

    Only the experts that a token is routed to count.
    """
    share = shares(anatomy)
    return sum(
        (params.extra_bytes() + plan.method_of(site).score_bytes(site, params))
        * share.get((site.layer, site.expert), 1.0)
        for site, params in plan.parts.values()
    )


def floor(model: nn.Module, anatomy: Anatomy, method: Method) -> float:
    """The least byte fraction of a method: every unit of every site is skipped."""
    sites = [s for b in anatomy.places() for s in method.sites(b)]
    total = dense_step_bytes(model, anatomy)
    return (total - skippable_bytes(model, anatomy, sites)) / total


def block_bytes(model: nn.Module, anatomy: Anatomy) -> float:
    """Bytes of all linears of the blocks; an expert counts by the fraction of experts that a token is routed to."""
    share = shares(anatomy)
    return sum(
        piece.nbytes * share.get((block.layer, block.expert), 1.0)
        for block in anatomy.all_blocks()
        for piece in block.pieces.values()
    )


def skippable_bytes(model: nn.Module, anatomy: Anatomy, sites: Iterable[Site]) -> float:
    """Bytes of all units of the sites; an expert counts by the fraction of experts that a token is routed to."""
    share = shares(anatomy)
    return sum(s.units * s.unit_bytes * share.get((s.layer, s.expert), 1.0) for s in sites)


def shares(anatomy: Anatomy) -> dict[tuple[int, int | None], float]:
    """For each routed expert, the fraction of its layer's experts that a token is routed to."""
    return {(b.layer, b.expert): e.share for e in anatomy.experts for b in e.blocks}


@torch.no_grad()
def kv_bytes(
    model: nn.Module, policy: KvPolicy = "full", use: Mapping[int, Tensor] | None = None
) -> list[dict[str, int]]:
    """Bytes of keys and values that a decode step reads after each of `KV_CONTEXTS` tokens, batch 1, by the KV policy.

    Measured on the cache of one token. A layer with a sliding window of W tokens reads at most W - 1. States of recurrent
    layers do not grow and are not counted.
    use: for each layer, how often each unit of heads is kept, (units,); the whole context comes from steps under the plan. A
    step then reads the cache of the heads that it keeps. With the policy `hole` this is only the tokens at which the head was
    kept (as if a head's uses were independent), else all tokens. `recompute` also reads, at most, one input per missing key
    and value.
    """
    ids = torch.ones(1, 1, dtype=torch.long, device=next(model.parameters()).device)
    cache = cache_of(model(input_ids=ids, use_cache=True))
    layers = () if cache is None else cache.layers
    width = model.config.get_text_config(decoder=True).hidden_size  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
    found = []
    for context in KV_CONTEXTS:
        size = 0.0
        for index, layer in enumerate(layers):
            if not isinstance(layer, DynamicLayer):
                continue
            held = min(context, layer.sliding_window - 1) if isinstance(layer, DynamicSlidingWindowLayer) else context
            each, share = layer.keys.nbytes + layer.values.nbytes, (use or {}).get(index)  # pyright: ignore[reportOptionalMemberAccess]
            if policy == "full" or share is None:
                size += held * each
                continue
            size += held * each * float((share * share if policy == "hole" else share).mean())
            if policy == "recompute" and held:
                size += float((1 - share)[share > 0].sum()) * width * layer.keys.element_size()  # pyright: ignore[reportOptionalMemberAccess]
        found.append({"context": context, "bytes": round(size)})
    return found
