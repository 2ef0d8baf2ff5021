"""Qwen3: a norm on each head of q and k."""

from __future__ import annotations

from moyu.model.architectures.base import LAYER, Architecture
from moyu.model.architectures.rope import rope

QWEN3 = Architecture("qwen3", lambda told: {"model_type": "qwen3", "rope_parameters": rope(told)}, LAYER)
