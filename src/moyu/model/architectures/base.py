"""An architecture of GGUF files: its configuration in transformers, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moyu.model.gguf.metadata import Metadata

# llama.cpp's names of tensors -> transformers' names of modules, of a Llama and of most architectures after it.
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's scaling of rotary embeddings. A file keeps only the divisors of the frequencies that follow from it.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp."""

    name: str  # `general.architecture` in the file
    config: Callable[[Metadata], dict[str, Any]]  # transformers' configuration, without the entries that all share
    layer: Mapping[str, str]  # names within a layer
    paired: bool = (
        False  # llama.cpp stores rows of q and k as rotation pairs side by side; transformers wants two halves
    )
    norms_from: float = 0.0  # llama.cpp adds this to the weights of norms


def rope(told: Metadata, base: float = 10000.0) -> dict[str, Any]:
    """The parameters of the rotary embedding, scaling included. Raises UserError for a scaling that is not supported."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": told.number("rope.freq_base", base)}
    scaling = told.text("rope.scaling.type", "none")
    if told.has(ROPE_FACTORS):
        return found | _llama3(told, found["rope_theta"])
    if scaling == "none":
        return found
    if scaling not in ("linear", "yarn"):
        raise told.refuse(f"the scaling of rotary embeddings is {scaling!r}; MOYU supports linear, yarn and Llama 3's")
    found |= {"rope_type": scaling, "factor": told.number("rope.scaling.factor")}
    if scaling == "yarn":
        found["original_max_position_embeddings"] = told.integer("rope.scaling.original_context_length")
    return found


def _llama3(told: Metadata, base: float) -> dict[str, Any]:
    """Llama 3's scaling, recovered from the divisors of the frequencies. Raises UserError for divisors of another scaling."""
    entry = told.file.tensors[ROPE_FACTORS]
    if entry.kind != "F32" or len(entry.shape) != 1:
        raise told.refuse(f"{ROPE_FACTORS} is {entry.kind} of shape {entry.shape}, not one row of F32")
    divisors = told.file.values(ROPE_FACTORS).double()
    half, factor = len(divisors), float(divisors.max())
    frequencies = base ** -(torch.arange(half, dtype=torch.float64) / half)
    low, high, length = LLAMA3.values()
    turns = length * frequencies / (2 * torch.pi)  # in the context length of the first training
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4, atol=0):
        raise told.refuse(f"{ROPE_FACTORS} is not Llama 3's scaling, the only one by divisors that MOYU supports")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}
