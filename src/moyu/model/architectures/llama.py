"""Llama 2 and 3 and the many models that are built like them: Mistral, with its window, and Mixtral, with its experts, too."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import EXPERTS, GATE_AND_UP, LAYER, Architecture
from moyu.model.architectures.rope import rope
from moyu.model.gguf.metadata import Metadata


def _config(told: Metadata) -> dict[str, Any]:
    biased = {"attention_bias": told.has("blk.0.attn_q.bias"), "mlp_bias": told.has("blk.0.ffn_up.bias")}
    shared = {"rope_parameters": rope(told)}
    window = told.integer("attention.sliding_window", 0, least=0) or None
    if experts := told.integer("expert_count", 0, least=0):
        used = told.integer("expert_used_count")
        shared |= {"sliding_window": window, "num_local_experts": experts, "num_experts_per_tok": used}
        return {"model_type": "mixtral", **shared}
    if window is not None:
        return {"model_type": "mistral", "sliding_window": window, **shared}
    return {"model_type": "llama", **shared, **biased}


LLAMA = Architecture("llama", _config, LAYER | EXPERTS, paired=True, made=GATE_AND_UP)
