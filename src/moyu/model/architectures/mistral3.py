"""Mistral Small 3.1 and later, and Ministral 3, which scales its queries in positions beyond the context of its first training."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import LAYER, Architecture
from moyu.model.architectures.rope import rope
from moyu.model.gguf.metadata import Metadata


def _config(told: Metadata) -> dict[str, Any]:
    turning, growth = rope(told), told.number("attention.temperature_scale", 0.0, zero=True)
    if not growth:
        return {"model_type": "mistral", "rope_parameters": turning, "sliding_window": None}
    length = told.integer("rope.scaling.original_context_length", told.integer("context_length"))
    turning |= {"llama_4_scaling_beta": growth, "original_max_position_embeddings": length}
    return {"model_type": "ministral3", "rope_parameters": turning, "sliding_window": None}


MISTRAL3 = Architecture("mistral3", _config, LAYER, paired=True)
