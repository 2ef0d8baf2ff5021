"""The embedded models: small, trained, and equal in all but the activation function.

`swiglu` is a Llama; `relu` and `gelu` are one OPT configuration with two activation functions. All three were trained on the
same Python sources with the same number of tokens, seed and schedule. They give every command a real model to run on.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from moyu.errors import check_one_of
from moyu.model.zoo import corpus

__all__ = ["corpus", "describe", "names", "path"]

_MODELS = Path(__file__).parent / "models"


def names() -> tuple[str, ...]:
    """The names of the embedded models."""
    return ("swiglu", "relu", "gelu")


def path(name: str) -> Path:
    """The folder of an embedded model. Raises UserError, with the nearest name, for an unknown one."""
    check_one_of("zoo model is", name, names())
    return _MODELS / name


def describe(name: str) -> dict[str, Any]:
    """The model's training.json: how it was trained, and its bits per byte."""
    return json.loads((path(name) / "training.json").read_text())
