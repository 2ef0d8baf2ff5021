"""MOYU: decode with a language model without reading the weights that the next token does not need."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moyu.applied import Applied, apply
    from moyu.calibration import Windows, calibrate
    from moyu.errors import UserError
    from moyu.evaluation import evaluate
    from moyu.integrations.transformers import MoyuConfig
    from moyu.methods import method
    from moyu.models import load
    from moyu.plan import Plan

__all__ = ["Applied", "MoyuConfig", "Plan", "UserError", "Windows", "apply", "calibrate", "evaluate", "load", "method"]

_HOMES = {
    "Applied": "applied",
    "MoyuConfig": "integrations.transformers",
    "Plan": "plan",
    "UserError": "errors",
    "Windows": "calibration",
    "apply": "applied",
    "calibrate": "calibration",
    "evaluate": "evaluation",
    "load": "models",
    "method": "methods",
}

try:
    __version__ = version("moyu-llm")
except PackageNotFoundError:  # running from a source tree that was never installed
    __version__ = "0+source"


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch and transformers take seconds, `moyu --help` should not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'moyu' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moyu.{_HOMES[name]}"), name)
