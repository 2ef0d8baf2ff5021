"""What a GGUF file's metadata and tensors are called in transformers: configurations, names, and what llama.cpp changed."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, PretrainedConfig

from moyu.errors import UserError
from moyu.model.gguf.reader import File

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
GEMMA_LAYER = LAYER | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
ROPE_FACTORS = "rope_freqs.weight"
# Llama 3's scaling as its models have it; a file keeps only the divisors of the frequencies that come of it.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LARGEST = 1 << 31
_IN_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")
_AT_TOP = re.compile(r"(\w+)\.(weight|bias)")


@dataclass(frozen=True)
class Architecture:
    """One architecture of llama.cpp."""

    config: Callable[[Metadata], dict[str, Any]]  # what is not the same for all
    layer: Mapping[str, str]
    paired: bool = False  # rows of q and k: pairs of one rotation side by side, where transformers has two halves
    norms_from: float = 0.0  # what llama.cpp adds to the weights of norms


class Metadata:
    """The metadata of one architecture's file: typed, and complaints name the key."""

    def __init__(self, file: File) -> None:
        """UserError where the file does not say its architecture."""
        self.file = file
        self.architecture = self._typed("general.architecture", str)

    def refuse(self, reason: str, remedy: str = "convert the model again with a current llama.cpp") -> UserError:
        """What is wrong with the file as a whole."""
        return UserError(f"{self.file.path}: {reason}", remedy)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """A count of the architecture, in least .. 2^31. UserError where it is missing or none."""
        value = self._typed(f"{self.architecture}.{key}", int, default)
        if not least <= value < LARGEST:
            raise self.refuse(f"{self.architecture}.{key} is {value}, not in {least} .. {LARGEST - 1}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number of the architecture."""
        value = float(self._typed(f"{self.architecture}.{key}", (float, int), default))
        if not 0 < value < float("inf"):
            raise self.refuse(f"{self.architecture}.{key} is {value}, no positive number")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A word of the architecture."""
        return self._typed(f"{self.architecture}.{key}", str, default)

    def token(self, name: str) -> int | None:
        """The id of a special token, in the vocabulary; None where the file names none."""
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.file.metadata:
            return None
        value = self._typed(key, int)
        if not 0 <= value < self.vocabulary:
            raise self.refuse(f"{key} is {value}, in a vocabulary of {self.vocabulary}")
        return value

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor."""
        return tensor in self.file.tensors

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding."""
        if not self.has("token_embd.weight"):
            raise self.refuse("there is no tensor token_embd.weight")
        return self.file.tensors["token_embd.weight"].shape[0]

    def _typed(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.file.metadata.get(key, default)
        if value is None:
            raise self.refuse(f"the metadata lacks {key}")
        if isinstance(value, np.ndarray):
            raise self.refuse(f"{key} differs between layers, which MOYU does not take")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.refuse(f"{key} is {value!r:.40}, of the wrong type")
        return value


def configuration(file: File) -> PretrainedConfig:
    """The model's configuration. UserError for an architecture that is not taken and for metadata that make no model."""
    told = Metadata(file)
    if told.architecture not in ARCHITECTURES:
        raise told.refuse(
            f"the architecture is {told.architecture!r}, MOYU takes {', '.join(ARCHITECTURES)}",
            "give the model as a folder of transformers' instead",
        )
    if told.file.metadata.get("split.count", 1) not in (0, 1):
        raise told.refuse("this is a part of a model", "join the parts: `llama-gguf-split --merge FIRST.gguf OUT.gguf`")
    if told.integer("expert_count", 0, least=0):
        raise told.refuse(
            "networks of routed experts are not taken", "give the model as a folder of transformers' instead"
        )
    layers = told.integer("block_count")
    found = {int(m[1]) for name in file.tensors if (m := _IN_LAYER.fullmatch(name))}
    if len(found) != layers or max(found) != layers - 1:
        raise told.refuse(f"{told.architecture}.block_count is {layers}, and there are tensors of {len(found)} layers")
    width, heads = told.integer("embedding_length"), told.integer("attention.head_count")
    head_dim = told.integer("attention.key_length", max(width // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if told.integer(key, head_dim) != head_dim:
            raise told.refuse(f"{told.architecture}.{key} is {told.integer(key)}, and heads are {head_dim} wide")
    if head_dim % 2:
        raise told.refuse(f"heads are {head_dim} wide, and rotations come in pairs")
    ends = {told.token(name) for name in ("eos", "eot")} - {None}
    common = {
        "vocab_size": told.vocabulary,
        "hidden_size": width,
        "intermediate_size": told.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": told.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": told.integer("context_length"),
        "rms_norm_eps": told.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not told.has("output.weight"),
        "bos_token_id": told.token("bos"),
        "eos_token_id": sorted(ends) if len(ends) > 1 else next(iter(ends), None),  # pyright: ignore[reportArgumentType]
        "pad_token_id": told.token("padding"),
    }
    try:
        return AutoConfig.for_model(**common | ARCHITECTURES[told.architecture].config(told))
    except UserError:
        raise
    except Exception as error:  # transformers' own checks of a configuration have no common class
        line = " ".join(str(error).split())
        raise told.refuse(f"the metadata make no model of transformers ({line})") from error


def target(architecture: Architecture, name: str) -> str | None:
    """The parameter of transformers that a tensor of the file is; None where there is none."""
    if match := _IN_LAYER.fullmatch(name):
        part = architecture.layer.get(match[2])
        return part and f"model.layers.{match[1]}.{part}.{match[3]}"
    if match := _AT_TOP.fullmatch(name):
        part = TOP.get(match[1])
        return part and f"{part}.{match[2]}"
    return None


def _rope(told: Metadata, base: float = 10000.0) -> dict[str, Any]:
    """Parameters of the rotary embedding, scaling included."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": told.number("rope.freq_base", base)}
    scaling = told.text("rope.scaling.type", "none")
    if told.has(ROPE_FACTORS):
        return rope | _llama3(told, rope["rope_theta"])
    if scaling == "none":
        return rope
    if scaling not in ("linear", "yarn"):
        raise told.refuse(f"scaling of rotary embeddings is {scaling!r}, MOYU takes linear, yarn and Llama 3's")
    rope |= {"rope_type": scaling, "factor": told.number("rope.scaling.factor")}
    if scaling == "yarn":
        rope["original_max_position_embeddings"] = told.integer("rope.scaling.original_context_length")
    return rope


def _llama3(told: Metadata, base: float) -> dict[str, Any]:
    """Llama 3's scaling from the divisors of the frequencies; UserError where they are another's."""
    entry = told.file.tensors[ROPE_FACTORS]
    if entry.kind != "F32" or len(entry.shape) != 1:
        raise told.refuse(f"{ROPE_FACTORS} is {entry.kind} of shape {entry.shape}, not a row of F32")
    divisors = told.file.values(ROPE_FACTORS).double()
    half, factor = len(divisors), float(divisors.max())
    frequencies = base ** -(torch.arange(half, dtype=torch.float64) / half)
    low, high, length = LLAMA3.values()
    turns = length * frequencies / (2 * torch.pi)  # in the context that the model was first trained on
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    if not torch.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4, atol=0):
        raise told.refuse(f"{ROPE_FACTORS} is not Llama 3's scaling, the only one by divisors that MOYU takes")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3}


def _llama(told: Metadata) -> dict[str, Any]:
    biased = {"attention_bias": told.has("blk.0.attn_q.bias"), "mlp_bias": told.has("blk.0.ffn_up.bias")}
    return {"model_type": "llama", "rope_parameters": _rope(told), **biased}


def _qwen2(told: Metadata) -> dict[str, Any]:
    return {"model_type": "qwen2", "rope_parameters": _rope(told)}


def _qwen3(told: Metadata) -> dict[str, Any]:
    return {"model_type": "qwen3", "rope_parameters": _rope(told)}


def _gemma2(told: Metadata) -> dict[str, Any]:
    # The largest of the family, which alone has 46 layers, divides by the width over the heads, not by a head's width.
    by_width = told.integer("block_count") == 46
    width, heads = told.integer("embedding_length"), told.integer("attention.head_count")
    return {
        "model_type": "gemma2",
        "rope_parameters": _rope(told),
        "sliding_window": told.integer("attention.sliding_window"),
        "attn_logit_softcapping": told.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": told.number("final_logit_softcapping", 30.0),
        "query_pre_attn_scalar": width // heads if by_width else told.integer("attention.key_length", width // heads),
    }


ARCHITECTURES = {
    "llama": Architecture(_llama, LAYER, paired=True),
    "qwen2": Architecture(_qwen2, LAYER),
    "qwen3": Architecture(_qwen3, LAYER),
    "gemma2": Architecture(_gemma2, GEMMA_LAYER, norms_from=1.0),
}
