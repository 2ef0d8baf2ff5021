"""Qwen3-MoE: routed experts whose weights of a token sum to one, and norms on heads."""

from __future__ import annotations

from moyu.model.architectures.base import EXPERTS, GATE_AND_UP, LAYER, Architecture, routed
from moyu.model.architectures.rope import rope

QWEN3MOE = Architecture(
    "qwen3moe",
    lambda told: {"model_type": "qwen3_moe", "rope_parameters": rope(told), "norm_topk_prob": True, **routed(told)},
    LAYER | EXPERTS,
    made=GATE_AND_UP,
)
