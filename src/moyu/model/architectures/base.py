"""An architecture of GGUF files: its configuration in transformers, and the names of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Made:
    """A parameter that is made of several tensors of a layer."""

    of: tuple[str, ...]  # names in the file, for instance "ffn_gate_exps.weight"
    how: Callable[..., Tensor]  # of those tensors, in that order


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp."""

    name: str  # `general.architecture` in the file
    config: Callable[[Metadata], dict[str, Any]]  # transformers' configuration, without the entries that all share
    layer: Mapping[str, str]  # names within a layer: of modules, or with ".weight" or ".bias" behind it of a parameter
    paired: bool = (
        False  # llama.cpp stores rows of q and k as rotation pairs side by side; transformers wants two halves
    )
    norms_from: float = 0.0  # llama.cpp adds this to the weights of norms
    made: Mapping[str, Made] = field(default_factory=dict)  # parameters of a layer by transformers' name
    partial: bool = False  # a part of a head may be without rotation


# Routed experts, whose weights are stacked: (E, outputs, inputs).
EXPERTS = {
    "ffn_gate_inp.weight": "mlp.gate.weight",
    "ffn_gate_up_exps.weight": "mlp.experts.gate_up_proj",
    "ffn_down_exps.weight": "mlp.experts.down_proj",
}
GATE_AND_UP = {
    "mlp.experts.gate_up_proj": Made(
        ("ffn_gate_exps.weight", "ffn_up_exps.weight"), lambda gate, up: torch.cat([gate, up], 1)
    ),
}


def routed(told: Metadata) -> dict[str, int]:
    """How many experts there are, how many a token takes, and their width."""
    count, used = told.integer("expert_count"), told.integer("expert_used_count")
    width = told.integer("expert_feed_forward_length", max(told.integer("feed_forward_length", used) // used, 1))
    return {"num_experts": count, "num_experts_per_tok": used, "moe_intermediate_size": width}


def windows(told: Metadata, every: int, default: int = 0) -> dict[str, Any]:
    """The sliding window, and the layers that have it: all but each `every`-th, unless the file says otherwise.

    default: the window of a file that does not say. Without a window all layers see everything.
    """
    layers = told.integer("block_count")
    size = told.integer("attention.sliding_window", default, least=0)
    sliding = told.flags("attention.sliding_window_pattern", layers)
    if not isinstance(sliding, list):
        step = every if sliding is None else sliding
        sliding = [step == 0 or i % step < step - 1 for i in range(layers)]
    kinds = ["sliding_attention" if each and size else "full_attention" for each in sliding]
    return {"sliding_window": size or None, "layer_types": kinds}
