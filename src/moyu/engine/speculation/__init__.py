"""Lossless decoding and Sirius: drafts, rules, and how many drafts pay."""

from moyu.engine.speculation.loop import Speculation, speculate
from moyu.engine.speculation.pace import best_drafts, expected_speedup
from moyu.engine.speculation.rules import (
    Correction,
    Rule,
    Source,
    acceptance,
    first_unlikely,
    lossless,
    remainder,
    sirius,
)

__all__ = [
    "Correction",
    "Rule",
    "Source",
    "Speculation",
    "acceptance",
    "best_drafts",
    "expected_speedup",
    "first_unlikely",
    "lossless",
    "remainder",
    "sirius",
    "speculate",
]
