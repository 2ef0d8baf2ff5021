"""Gemma 3 (text): Gemma 2's norms, norms on heads, and five layers with a window and a base of their own before each that sees all."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import Architecture, windows
from moyu.model.architectures.gemma2 import NAMES, score_divisor
from moyu.model.architectures.rope import rope
from moyu.model.gguf.metadata import Metadata


def _config(told: Metadata) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": told.number("rope.freq_base_swa", 10000.0)}
    cap = told.number("final_logit_softcapping", 0.0, zero=True)
    return {
        "model_type": "gemma3_text",
        "rope_parameters": {"full_attention": rope(told), "sliding_attention": local},
        "final_logit_softcapping": cap or None,
        "query_pre_attn_scalar": score_divisor(told, 62),
        **windows(told, 6),
    }


GEMMA3 = Architecture("gemma3", _config, NAMES, norms_from=1.0)
