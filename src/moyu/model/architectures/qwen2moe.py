"""Qwen1.5-MoE and Qwen2-MoE: routed experts beside one that every token takes."""

from __future__ import annotations

from typing import Any

from moyu.model.architectures.base import EXPERTS, GATE_AND_UP, LAYER, Architecture, routed
from moyu.model.architectures.rope import rope
from moyu.model.gguf.metadata import Metadata

NAMES = LAYER | EXPERTS | {
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    "ffn_gate_shexp": "mlp.shared_expert.gate_proj",
    "ffn_up_shexp": "mlp.shared_expert.up_proj",
    "ffn_down_shexp": "mlp.shared_expert.down_proj",
}  # fmt: skip


def _config(told: Metadata) -> dict[str, Any]:
    experts = routed(told)
    shared = told.integer("expert_shared_feed_forward_length", told.integer("feed_forward_length", 1))
    return {
        "model_type": "qwen2_moe",
        "rope_parameters": rope(told),
        "shared_expert_intermediate_size": shared,
        "norm_topk_prob": False,
        **experts,
    }


QWEN2MOE = Architecture("qwen2moe", _config, NAMES, made=GATE_AND_UP)
