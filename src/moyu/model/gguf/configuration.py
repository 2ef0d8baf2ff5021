"""From a GGUF file's metadata and tensor names to a configuration and parameter names of transformers."""

from __future__ import annotations

import re

from transformers import AutoConfig, PretrainedConfig

from moyu.errors import UserError
from moyu.model.architectures import ARCHITECTURES
from moyu.model.architectures.base import TOP, Architecture
from moyu.model.gguf.metadata import Metadata
from moyu.model.gguf.reader import File

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
    if told.file.metadata.get("split.count", 1) not in (0, 1):
        raise told.refuse(
            "the file is one part of a model", "join the parts: `llama-gguf-split --merge FIRST.gguf OUT.gguf`"
        )
    if told.integer("expert_count", 0, least=0):
        raise told.refuse("networks of routed experts are not supported", FOLDER)
    layers = told.integer("block_count")
    found = {int(m[1]) for name in file.tensors if (m := _IN_LAYER.fullmatch(name))}
    if len(found) != layers or max(found) != layers - 1:
        raise told.refuse(
            f"{told.architecture}.block_count is {layers}, but the file has tensors of {len(found)} layers"
        )
    width, heads = told.integer("embedding_length"), told.integer("attention.head_count")
    head_dim = told.integer("attention.key_length", max(width // heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if told.integer(key, head_dim) != head_dim:
            raise told.refuse(f"{told.architecture}.{key} is {told.integer(key)}, but heads are {head_dim} wide")
    if head_dim % 2:
        raise told.refuse(f"heads are {head_dim} wide; rotary embeddings need an even width")
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
    except Exception as error:  # transformers' checks of a configuration raise many classes
        line = " ".join(str(error).split())
        raise told.refuse(f"transformers makes no model of the metadata ({line})") from error


def target(architecture: Architecture, name: str) -> str | None:
    """transformers' name of the parameter that a tensor of the file holds; None if there is none."""
    if match := _IN_LAYER.fullmatch(name):
        part = architecture.layer.get(match[2])
        return part and f"model.layers.{match[1]}.{part}.{match[3]}"
    if match := _AT_TOP.fullmatch(name):
        part = TOP.get(match[1])
        return part and f"{part}.{match[2]}"
    return None
