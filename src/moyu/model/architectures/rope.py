"""Rotary embeddings of GGUF files: their base, and the scalings that stretch a model's context."""

from __future__ import annotations

import math
from typing import Any

import torch

from moyu.model.gguf.metadata import Metadata

DIVISORS, LONG, SHORT = "rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"
TENSORS = (DIVISORS, LONG, SHORT)  # of the file: they are in the configuration, not in the model
# Llama 3's scaling of rotary embeddings. A file keeps only the divisors of the frequencies that follow from it.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def rope(told: Metadata, base: float = 10000.0) -> dict[str, Any]:
    """The parameters of the rotary embedding, scaling included. Raises UserError for a scaling that is not supported.

    base: of the frequencies, for a file that does not say.
    """
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": told.number("rope.freq_base", base)}
    kind = told.text("rope.scaling.type", "linear")
    factor = told.number("rope.scaling.factor", told.number("rope.scale_linear", 0.0, zero=True), zero=True) or 1.0
    length = told.integer("rope.scaling.original_context_length", told.integer("context_length"))
    attention = told.number("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn", "longrope"):
        raise told.refuse(
            f"the scaling of rotary embeddings is {kind!r}; MOYU supports linear, yarn, longrope and Llama 3's"
        )
    stretched = kind in ("linear", "yarn") and factor != 1
    if told.has(LONG) or told.has(SHORT) or kind == "longrope":
        scaled = _longrope(told, length, attention)
    elif told.has(DIVISORS):
        scaled = _llama3(told, found["rope_theta"])
    elif stretched:
        stretched = False
        scaled = {"rope_type": kind, "factor": factor}
        if kind == "yarn":
            scaled |= {"original_max_position_embeddings": length} | _yarn(told, factor, attention)
    else:
        scaled = {}
    if stretched:
        raise told.refuse(f"rotary embeddings are scaled twice, by {kind} and by divisors")
    if attention != 1 and "attention_factor" not in scaled:
        raise told.refuse(
            f"{told.architecture}.rope.scaling.attn_factor is {attention}, which only yarn and longrope have"
        )
    return found | scaled


def partial(told: Metadata, head_dim: int) -> dict[str, float]:
    """The fraction of a head's width that is rotated, where that is not all."""
    turned = told.integer("rope.dimension_count", head_dim)
    fraction = turned / head_dim
    while int(head_dim * fraction) < turned:  # transformers rounds the product down
        fraction = math.nextafter(fraction, 2)
    return {} if turned == head_dim else {"partial_rotary_factor": fraction}


def _yarn(told: Metadata, factor: float, attention: float) -> dict[str, float]:
    def scale(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1 if factor > 1 else 1.0

    if told.number("rope.scaling.yarn_ext_factor", 1.0) != 1:
        raise told.refuse(f"{told.architecture}.rope.scaling.yarn_ext_factor is not 1")
    multiplier = told.number("rope.scaling.yarn_log_multiplier", 0.0, zero=True)
    usual = scale(1) / scale(multiplier) if multiplier else scale(1)
    return {
        "attention_factor": attention * told.number("rope.scaling.yarn_attn_factor", usual),
        "beta_fast": told.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": told.number("rope.scaling.yarn_beta_slow", 1.0),
    }


def _longrope(told: Metadata, length: int, attention: float) -> dict[str, Any]:
    """Divisors for contexts up to `length` and for longer ones."""
    for name in (LONG, SHORT):
        if not told.has(name):
            raise told.refuse(f"the scaling of rotary embeddings is longrope, but there is no tensor {name}")
    return {
        "rope_type": "longrope",
        "factor": told.integer("context_length") / length,
        "long_factor": _row(told, LONG).tolist(),
        "short_factor": _row(told, SHORT).tolist(),
        "original_max_position_embeddings": length,
        "attention_factor": attention,
    }


def _llama3(told: Metadata, base: float) -> dict[str, Any]:
    """Llama 3's scaling, recovered from the divisors of the frequencies. Raises UserError for divisors of another scaling."""
    divisors = _row(told, DIVISORS).double()
    half, factor = len(divisors), float(divisors.max())
    frequencies = base ** -(torch.arange(half, dtype=torch.float64) / half)
    low, high, length = LLAMA3.values()
    turns = length * frequencies / (2 * torch.pi)  # in the context length of the first training
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4, atol=0):
        raise told.refuse(f"{DIVISORS} is not Llama 3's scaling, the only one by divisors that MOYU supports")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _row(told: Metadata, name: str) -> torch.Tensor:
    entry = told.file.tensors[name]
    if entry.kind != "F32" or len(entry.shape) != 1:
        raise told.refuse(f"{name} is {entry.kind} of shape {entry.shape}, not one row of F32")
    return told.file.values(name)
