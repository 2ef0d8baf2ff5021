"""Gemma 2: norms before and after each part of a layer, soft caps on scores and logits."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import LAYER, Architecture, rope
from moyu.model.gguf.metadata import Metadata

NAMES = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _config(told: Metadata) -> dict[str, Any]:
    # Scores are divided by the root of a head's width; in the 27B model, the only one of 46 layers, by that of width / heads.
    by_width = told.integer("block_count") == 46
    width, heads = told.integer("embedding_length"), told.integer("attention.head_count")
    return {
        "model_type": "gemma2",
        "rope_parameters": rope(told),
        "sliding_window": told.integer("attention.sliding_window"),
        "attn_logit_softcapping": told.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": told.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": width // heads if by_width else told.integer("attention.key_length", width // heads),
    }


GEMMA2 = Architecture("gemma2", _config, NAMES, norms_from=1.0)
