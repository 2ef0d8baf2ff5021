"""Llama 2 and 3, and the many models that are built like them."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import LAYER, Architecture, rope
from moyu.model.gguf.metadata import Metadata


def _config(told: Metadata) -> dict[str, Any]:
    biased = {"attention_bias": told.has("blk.0.attn_q.bias"), "mlp_bias": told.has("blk.0.ffn_up.bias")}
    return {"model_type": "llama", "rope_parameters": rope(told), **biased}


LLAMA = Architecture("llama", _config, LAYER, paired=True)
