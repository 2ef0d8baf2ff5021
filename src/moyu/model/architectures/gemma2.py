"""Gemma 2: norms before and after each part of a layer, soft caps on scores and logits, every other layer with a window."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import LAYER, Architecture, windows
from moyu.model.architectures.rope import rope
from moyu.model.gguf.metadata import Metadata

NAMES = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def score_divisor(told: Metadata, largest: int) -> int:
    """Scores are divided by the root of this: a head's width, or width / heads in the model of `largest` layers."""
    width, heads = told.integer("embedding_length"), told.integer("attention.head_count")
    own = told.integer("attention.key_length", width // heads)
    return width // heads if told.integer("block_count") == largest else own


def _config(told: Metadata) -> dict[str, Any]:
    return {
        "model_type": "gemma2",
        "rope_parameters": rope(told),
        "attn_logit_softcapping": told.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": told.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": score_divisor(told, 46),
        **windows(told, 2, 4096),
    }


GEMMA2 = Architecture("gemma2", _config, NAMES, norms_from=1.0)
