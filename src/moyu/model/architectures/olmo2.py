"""OLMo 2 and 3: norms behind each part of a layer, and on q and k as a whole; OLMo 3 has windows, on which no scaling acts."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import LAYER, Architecture, windows
from moyu.model.architectures.rope import rope
from moyu.model.gguf.metadata import Metadata

NAMES = {name: part for name, part in LAYER.items() if name not in ("attn_norm", "ffn_norm")} | {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def _config(told: Metadata) -> dict[str, Any]:
    turning, sliding = rope(told), windows(told, 4)
    if sliding["sliding_window"] is None:
        return {"model_type": "olmo2", "rope_parameters": turning}
    local = {"rope_type": "default", "rope_theta": told.number("rope.freq_base_swa", turning["rope_theta"])}
    return {
        "model_type": "olmo3",
        "rope_parameters": {"full_attention": turning, "sliding_attention": local},
        **sliding,
    }


OLMO2 = Architecture("olmo2", _config, NAMES)
