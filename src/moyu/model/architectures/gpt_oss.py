"""gpt-oss: routed experts with biases and a clamped gate, sinks in the attention, every other layer with a window."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moyu.model.architectures.base import LAYER, Architecture, Made, windows
from moyu.model.architectures.rope import rope
from moyu.model.gguf.metadata import Metadata

NAMES = {name: part for name, part in LAYER.items() if name.startswith("attn")} | {
    "attn_sinks.weight": "self_attn.sinks",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.router",
    "ffn_down_exps.bias": "mlp.experts.down_proj_bias",
}


def _in_turn(gate: Tensor, up: Tensor) -> Tensor:
    """Outputs of gate and up in turn, from (E, f, ...) to (E, 2f, ...)."""
    return torch.stack([gate, up], 2).flatten(1, 2)


MADE = {
    # transformers keeps inputs before outputs here
    "mlp.experts.gate_up_proj": Made(
        ("ffn_gate_exps.weight", "ffn_up_exps.weight"), lambda gate, up: _in_turn(gate, up).transpose(1, 2)
    ),
    "mlp.experts.gate_up_proj_bias": Made(("ffn_gate_exps.bias", "ffn_up_exps.bias"), _in_turn),
    "mlp.experts.down_proj": Made(("ffn_down_exps.weight",), lambda down: down.transpose(1, 2)),
}


def _config(told: Metadata) -> dict[str, Any]:
    scaling = rope(told)
    if scaling["rope_type"] == "yarn":
        scaling["truncate"] = False  # as the model was trained; files do not say
    return {
        "model_type": "gpt_oss",
        "rope_parameters": scaling,
        "intermediate_size": told.integer("expert_feed_forward_length"),
        "num_local_experts": told.integer("expert_count"),
        "num_experts_per_tok": told.integer("expert_used_count"),
        **windows(told, 2),
    }


GPT_OSS = Architecture("gpt-oss", _config, NAMES, made=MADE)
