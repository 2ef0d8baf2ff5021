"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from moyu.model.architectures.base import LAYER, Architecture, rope

QWEN2 = Architecture("qwen2", lambda told: {"model_type": "qwen2", "rope_parameters": rope(told)}, LAYER)
