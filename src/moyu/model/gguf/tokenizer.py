"""The tokenizer of a GGUF file, made by transformers' own conversion."""

from __future__ import annotations

from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from moyu.model.gguf.metadata import Metadata
from moyu.model.gguf.reader import File

try:
    from transformers.integrations.gguf.gguf_tokenizer_mapping import convert_gguf_tokenizer
except ImportError:  # older versions of transformers
    from transformers.integrations.ggml import convert_gguf_tokenizer  # pyright: ignore[reportAttributeAccessIssue]

# Entries of `tokenizer.ggml.`: their names in transformers' conversion, and their types.
ENTRIES = {
    "model": ("tokenizer_type", str),
    "pre": ("pre_tokenizer_type", str),
    "tokens": ("tokens", list),
    "scores": ("scores", np.ndarray),
    "token_type": ("token_type", np.ndarray),
    "merges": ("merges", list),
    "precompiled_charsmap": ("precompiled_charsmap", np.ndarray),
    "add_space_prefix": ("add_prefix_space", bool),
}
SPECIAL = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
ANOTHER = "give the model as a folder in transformers' format, which has its own tokenizer"


def tokenizer_of(file: File) -> PreTrainedTokenizerBase:
    """Make the tokenizer. Raises UserError if the file has none, or one that transformers cannot convert."""
    told = Metadata(file)
    entries = {new: _entry(told, old, kind) for old, (new, kind) in ENTRIES.items()}
    entries = {name: value for name, value in entries.items() if value is not None}
    kind, tokens = entries.get("tokenizer_type"), entries.get("tokens")
    if not kind or not tokens or kind in ("none", "no_vocab"):
        raise told.refuse("there is no tokenizer in the file", ANOTHER)
    if len(tokens) > told.vocabulary:
        raise told.refuse(f"there are {len(tokens)} tokens for an embedding of {told.vocabulary} rows")
    if len(set(tokens)) != len(tokens):
        raise told.refuse("a token comes twice in tokenizer.ggml.tokens")
    for name in ("scores", "token_type"):
        if name in entries and len(entries[name]) != len(tokens):
            raise told.refuse(f"tokenizer.ggml.{name} has {len(entries[name])} values for {len(tokens)} tokens")
    for name, special in SPECIAL.items():
        index = told.token(special)
        if index is not None:
            entries[f"{name}_id"] = index
    special = {n: tokens[i] for n in SPECIAL if (i := entries.get(f"{n}_id")) is not None and i < len(tokens)}
    adds = {side: _entry(told, f"add_{side}_token", bool) for side in ("bos", "eos")}
    if adds["bos"] is None:
        adds["bos"] = kind == "llama"  # llama.cpp's rule for files without the entry
    template = file.metadata.get("tokenizer.chat_template")
    try:
        made, further = convert_gguf_tokenizer(told.architecture, entries)
        return PreTrainedTokenizerFast(
            tokenizer_object=made,
            add_bos_token=bool(adds["bos"]) and "bos_token" in special,
            add_eos_token=bool(adds["eos"]) and "eos_token" in special,
            chat_template=template if isinstance(template, str) else None,
            model_max_length=told.integer("context_length"),
            **further | special,
        )
    except Exception as error:  # the conversion raises many classes
        line = " ".join(str(error).split()) or type(error).__name__
        raise told.refuse(f"its tokenizer {kind!r} cannot be made ({line:.200})", ANOTHER) from error


def _entry(told: Metadata, name: str, kind: type) -> Any:
    value = told.file.metadata.get(f"tokenizer.ggml.{name}")
    if value is not None and not isinstance(value, kind):
        raise told.refuse(f"tokenizer.ggml.{name} is a {type(value).__name__}, not a {kind.__name__}")
    return value.tolist() if isinstance(value, np.ndarray) else value
