"""Gemma, the first."""

from __future__ import annotations

from moyu.model.architectures.base import LAYER, Architecture
from moyu.model.architectures.rope import rope

GEMMA = Architecture(
    "gemma", lambda told: {"model_type": "gemma", "rope_parameters": rope(told)}, LAYER, norms_from=1.0
)
