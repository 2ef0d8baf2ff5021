"""SmolLM3: a Llama whose every fourth layer is without rotary embeddings."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import LAYER, Architecture
from moyu.model.architectures.rope import rope
from moyu.model.gguf.metadata import Metadata


def _config(told: Metadata) -> dict[str, Any]:
    turned = [int((i + 1) % 4 != 0) for i in range(told.integer("block_count"))]
    return {
        "model_type": "smollm3",
        "rope_parameters": rope(told),
        "no_rope_layers": turned,
        "attention_bias": told.has("blk.0.attn_q.bias"),
    }


SMOLLM3 = Architecture("smollm3", _config, LAYER, paired=True)
