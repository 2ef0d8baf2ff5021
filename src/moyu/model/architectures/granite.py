"""Granite 3: a Llama with factors on embeddings, scores, what a layer adds, and logits."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import LAYER, Architecture
from moyu.model.architectures.rope import rope
from moyu.model.gguf.metadata import Metadata


def _config(told: Metadata) -> dict[str, Any]:
    if not told.flag("rope.scaling.finetuned", True):
        raise told.refuse("the model is without rotary embeddings (rope.scaling.finetuned is false)")
    width, heads = told.integer("embedding_length"), told.integer("attention.head_count")
    usual = told.integer("attention.key_length", width // heads) ** -0.5
    return {
        "model_type": "granite",
        "rope_parameters": rope(told),
        "attention_bias": told.has("blk.0.attn_q.bias"),
        "mlp_bias": told.has("blk.0.ffn_up.bias"),
        "attention_multiplier": told.number("attention.scale", 0.0, zero=True) or usual,
        "embedding_multiplier": told.number("embedding_scale", 0.0, zero=True) or 1.0,
        "residual_multiplier": told.number("residual_scale", 0.0, zero=True) or 1.0,
        "logits_scaling": told.number("logit_scale"),
    }


GRANITE = Architecture("granite", _config, LAYER, paired=True)
