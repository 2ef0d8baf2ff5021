"""Qwen2 and Qwen2.5."""

from __future__ import annotations

from moyu.model.architectures.base import LAYER, Architecture
from moyu.model.architectures.rope import rope

QWEN2 = Architecture("qwen2", lambda told: {"model_type": "qwen2", "rope_parameters": rope(told)}, LAYER)
