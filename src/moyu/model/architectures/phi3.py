"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another, and rotary embeddings stretched by longrope."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import LAYER, Architecture
from moyu.model.architectures.rope import partial, rope
from moyu.model.gguf.metadata import Metadata

NAMES = {name: part for name, part in LAYER.items() if name not in ("attn_q", "attn_k", "attn_v", "ffn_gate")} | {
    "attn_qkv": "self_attn.qkv_proj",
    "ffn_up": "mlp.gate_up_proj",
}


def _config(told: Metadata) -> dict[str, Any]:
    width, heads = told.integer("embedding_length"), told.integer("attention.head_count")
    turning = rope(told)
    length = turning.get("original_max_position_embeddings", told.integer("context_length"))
    return {
        "model_type": "phi3",
        "rope_parameters": turning | partial(told, told.integer("attention.key_length", width // heads)),
        "original_max_position_embeddings": length,
        "sliding_window": told.integer("attention.sliding_window", 0, least=0) or None,
    }


PHI3 = Architecture("phi3", _config, NAMES, partial=True)
