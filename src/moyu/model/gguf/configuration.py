"""From a GGUF file's metadata and tensor names to a configuration and parameter names of transformers."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from transformers import AutoConfig, PretrainedConfig

from moyu.errors import UserError, line_of
from moyu.model.architectures import ARCHITECTURES
from moyu.model.architectures.base import TOP, Architecture
from moyu.model.gguf.metadata import Metadata
from moyu.model.gguf.reader import File
from moyu.model.gguf.special import ends, token

# Entries of an architecture that change no number: always (none are listed), or where they have one of these values.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "vocab_size": (), "rope.scaling.finetuned": (), "tensor_data_layout": (),
    "attention.causal": (True,), "attention.clamp_kqv": (0,), "attention.max_alibi_bias": (0,), "attention.scale": (0,),
    "attention.sliding_window": (0,), "attn_logit_softcapping": (0,), "final_logit_softcapping": (0,), "embedding_scale": (0, 1),
    "residual_scale": (0, 1), "logit_scale": (0, 1), "expert_count": (0,), "expert_used_count": (0,), "expert_shared_count": (0,),
    "expert_weights_scale": (0, 1), "expert_group_count": (0, 1), "expert_group_used_count": (0, 1),
    "leading_dense_block_count": (0,), "nextn_predict_layers": (0,), "pooling_type": (0,), "rope.scaling.alpha": (0,),
    "use_parallel_residual": (False,),
}  # fmt: skip
FOLDER = "give the model as a folder in transformers' format instead"
_IN_LAYER = re.compile(r"blk\.(0|[1-9]\d{0,5})\.(\w+)\.(weight|bias)")
_AT_TOP = re.compile(r"(\w+)\.(weight|bias)")


def configuration(file: File) -> PretrainedConfig:
    """The model's configuration. Raises UserError for an unknown architecture and for metadata that do not make a model."""
    told = Metadata(file)
    if told.architecture not in ARCHITECTURES:
        raise told.refuse(
            f"the architecture is {told.architecture!r}; MOYU supports {', '.join(ARCHITECTURES)}",
            FOLDER,
        )
    layers = told.integer("block_count")
    found = {int(m[1]) for name in file.tensors if (m := _IN_LAYER.fullmatch(name))}
    if len(found) != layers or max(found) != layers - 1:
        raise told.refuse(
            f"{told.architecture}.block_count is {layers}, but the file has tensors of {len(found)} layers"
        )
    width, heads = told.integer("embedding_length"), told.integer("attention.head_count")
    head_dim = told.integer("attention.key_length", max(width // heads, 1))
    architecture = ARCHITECTURES[told.architecture]
    if told.integer("attention.value_length", head_dim) != head_dim:
        raise told.refuse(f"keys are {head_dim} wide, but values {told.integer('attention.value_length')}")
    turned = told.integer("rope.dimension_count", head_dim)
    if turned > head_dim or (turned < head_dim and not architecture.partial):
        raise told.refuse(f"{told.architecture}.rope.dimension_count is {turned}, but heads are {head_dim} wide")
    if turned % 2:
        raise told.refuse(f"heads are rotated over a width of {turned}; rotary embeddings need an even one")
    ending = ends(told)
    common = {
        "vocab_size": told.vocabulary,
        "hidden_size": width,
        "intermediate_size": _feed_forward(told),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": told.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": told.integer("context_length"),
        "rms_norm_eps": told.number("attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": not told.has("output.weight"),
        "bos_token_id": token(told, "bos"),
        "eos_token_id": ending if len(ending) > 1 else next(iter(ending), None),
        "pad_token_id": token(told, "padding"),
    }
    try:
        made = AutoConfig.for_model(**common | architecture.config(told))
    except UserError:
        raise
    except Exception as error:  # transformers' checks of a configuration raise many classes
        raise told.refuse(f"transformers makes no model of the metadata ({line_of(error)})") from error
    for key, value in told.unread().items():
        harmless = NEUTRAL.get(key)
        if harmless is None or (harmless and not any(np.array_equal(value, each) for each in harmless)):
            raise told.refuse(f"{told.architecture}.{key} is {value!r:.40}, which MOYU does not understand", FOLDER)
    return made


def _feed_forward(told: Metadata) -> int:
    """The width of feed-forward networks; in models of experts alone files may lack it."""
    routed = told.integer("expert_feed_forward_length", 0, least=0)
    return told.integer("feed_forward_length", routed or None)


def target(architecture: Architecture, name: str) -> str | None:
    """transformers' name of the parameter that a tensor of the file holds; None if there is none."""
    if match := _IN_LAYER.fullmatch(name):
        place = f"model.layers.{match[1]}"
        if whole := architecture.layer.get(f"{match[2]}.{match[3]}"):
            return f"{place}.{whole}"
        part = architecture.layer.get(match[2])
        return part and f"{place}.{part}.{match[3]}"
    if match := _AT_TOP.fullmatch(name):
        part = TOP.get(match[1])
        return part and f"{part}.{match[2]}"
    return None
