"""MOYU: decode with a language model without reading the weights that the next token does not need."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moyu.calibration.applying import apply
    from moyu.calibration.walk import calibrate
    from moyu.engine.applied import Applied
    from moyu.engine.generate import generate
    from moyu.errors import UserError
    from moyu.integrations.transformers import MoyuConfig
    from moyu.measure.environment import VERSION as __version__
    from moyu.measure.evaluation import evaluate
    from moyu.measure.windows import Windows
    from moyu.methods import method
    from moyu.model.loading import load
    from moyu.plan import Plan

__all__ = [
    "Applied",
    "MoyuConfig",
    "Plan",
    "UserError",
    "Windows",
    "__version__",
    "apply",
    "calibrate",
    "evaluate",
    "generate",
    "load",
    "method",
]

_HOMES = {
    "Applied": "engine.applied",
    "MoyuConfig": "integrations.transformers",
    "Plan": "plan",
    "UserError": "errors",
    "Windows": "measure.windows",
    "apply": "calibration.applying",
    "calibrate": "calibration.walk",
    "evaluate": "measure.evaluation",
    "generate": "engine.generate",
    "load": "model.loading",
    "method": "methods",
}


def __dir__() -> list[str]:
    """The public names, whether they were used yet or not."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    """Import a public name on first use: torch and transformers take seconds, `moyu --help` should not."""
    if name == "__version__":  # the packages' metadata, which a typo need not wait for
        return importlib.import_module("moyu.measure.environment").VERSION
    if name not in _HOMES:
        raise AttributeError(f"module 'moyu' has no attribute {name!r}")
    return getattr(importlib.import_module(f"moyu.{_HOMES[name]}"), name)
