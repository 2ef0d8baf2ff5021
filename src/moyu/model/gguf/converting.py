"""From a model and tokenizer of transformers to a GGUF file with the same weights: Llama, Qwen2, Qwen3 and what is built like them.

What MOYU's reader makes of a GGUF file is the measure: the tokenizer is written with the kind of word splitting under which the
reader gives the checkpoint's own tokens.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moyu.errors import UserError
from moyu.model.architectures import ARCHITECTURES
from moyu.model.architectures.base import LAYER, TOP
from moyu.model.gguf.loading import in_pairs
from moyu.model.gguf.reader import DTYPES, Entry, File
from moyu.model.gguf.splits import PRES
from moyu.model.gguf.tokenizer import CONTROL, NORMAL, USER, tokenizer_of
from moyu.model.gguf.writing import Writer

CONVERTED = ("llama", "qwen2", "qwen3")  # model types of transformers, and llama.cpp's names of the same architectures
ELSEWHERE = "convert it with llama.cpp's `convert_hf_to_gguf.py` and give the GGUF file"
BYTE_TOKEN = 6  # the type of SentencePiece's tokens of single bytes
PROBES = (
    "The year 2024 had 366 days; it's 12,345.67 \u20ac, isn't it?  I'LL  say so.\n\n\tdef f(x_1):\n        return x_1 + 1  # a\n",
    "na\u00efve \u4e2d\u6587\u5b57 \u0440\u0443\u0441\u0441\u043a\u0438\u0439 \u0639\u0631\u0628 \U0001f600\U0001f680 e\u0301"
    " ...!!! (a)[b]{c}\r\n \r\n  x",
)
_TYPES = {dtype: name for name, dtype in DTYPES.items()}


def convert(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, name: str, texts: Sequence[str] = ()
) -> Path:
    """Write the file, weights in the type that they have. texts: the tokenizers are compared on them, beside texts of ours.

    Raises UserError for a model or a tokenizer that is not understood.
    """
    config = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    if config.model_type not in CONVERTED or rope.get("rope_type", "default") != "default" or window:
        raise UserError(
            f"{name!r} is a {config.model_type!r} model with rotary embeddings {rope.get('rope_type', 'default')!r} and a window of "
            f"{window}; MOYU writes GGUF files of {', '.join(CONVERTED)} with plain ones and no window",
            ELSEWHERE,
        )
    metadata = _numbers(config, rope, name)
    metadata |= _words(tokenizer, metadata, [*PROBES, *texts], name)
    tensors = _tensors(model, metadata["general.architecture"])
    with Writer(path, metadata, {key: (tuple(t.shape), _TYPES[t.dtype]) for key, t in tensors.items()}) as file:
        for key, tensor in tensors.items():
            file.put(key, tensor)
    return path


def _numbers(config: Any, rope: dict[str, Any], name: str) -> dict[str, Any]:
    kind = config.model_type
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    own = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": width,
        "attention.value_length": width,
        "rope.dimension_count": width,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
    }
    return {"general.architecture": kind, "general.type": "model", "general.name": name} | {
        f"{kind}.{key}": value for key, value in own.items()
    }


def _tensors(model: PreTrainedModel, kind: str) -> dict[str, Tensor]:
    """The parameters by llama.cpp's names; vectors in 32 bits."""
    parts, config, found = {to: name for name, to in LAYER.items()}, model.config, {}
    top = {to: name for name, to in TOP.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for parameter, tensor in model.named_parameters():
        stem, _, end = parameter.rpartition(".")
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", stem)
        part = parts.get(match[2]) if match else top.get(stem)
        if part is None:
            raise UserError(f"a {kind} model has no parameter {parameter!r} that a GGUF file can hold", ELSEWHERE)
        value = tensor.detach()
        if ARCHITECTURES[kind].paired and part in heads:
            value = in_pairs(value, heads[part])
        found[f"blk.{match[1]}.{part}.{end}" if match else f"{part}.{end}"] = (
            value if value.dim() > 1 else value.float()
        )
    return found


def _words(
    tokenizer: PreTrainedTokenizerBase, numbers: dict[str, Any], texts: Sequence[str], name: str
) -> dict[str, Any]:
    """The entries of the tokenizer under which MOYU's reader gives its tokens."""
    whole = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {"model": {}}  # pyright: ignore
    model = whole["model"]
    if model.get("type") != "BPE":
        raise UserError(f"the tokenizer of {name!r} is no byte-pair encoding of `tokenizers`", ELSEWHERE)
    entries = _entries(tokenizer, whole, int(next(v for k, v in numbers.items() if k.endswith("vocab_size"))))
    table = Entry("token_embd.weight", (len(entries["tokens"]), 1), "F32", 0, 0)  # the reader counts its rows
    wanted = [_ids(tokenizer, text) for text in texts]
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    tries = [{"model": "gpt2", "pre": pre, "merges": merges} for pre in _distinct()]
    if model.get("byte_fallback"):
        ranks = {merge.replace(" ", ""): -float(rank) for rank, merge in reversed(list(enumerate(merges)))}
        scores = np.array([ranks.get(word, -1e6) for word in entries["tokens"]], np.float32)
        tries = [{"model": "llama", "scores": scores, "add_space_prefix": prefix} for prefix in (True, False)]
    for tried in tries:
        found = {f"tokenizer.ggml.{key}": value for key, value in (entries | tried).items()}
        template = getattr(tokenizer, "chat_template", None)
        if isinstance(template, str):
            found["tokenizer.chat_template"] = template
        made = tokenizer_of(File(Path(name), numbers | found, {table.name: table}, ()))
        if all(_ids(made, text) == ids for text, ids in zip(texts, wanted, strict=True)):
            return found
    raise UserError(f"no kind of tokenizer that MOYU knows gives the tokens of {name!r}", ELSEWHERE)


def _entries(tokenizer: PreTrainedTokenizerBase, whole: dict[str, Any], count: int) -> dict[str, Any]:
    """Tokens, their types and the special ones; ids without a token get a name of their own."""
    words = dict(whole["model"]["vocab"])
    added = {entry["content"]: entry for entry in whole["added_tokens"]}
    words |= {word: entry["id"] for word, entry in added.items()}
    tokens, types = [f"[UNUSED_{i}]" for i in range(count)], np.full(count, USER, np.int32)
    for word, i in words.items():
        tokens[i] = word
        single = bool(re.fullmatch(r"<0x[0-9A-F]{2}>", word)) and whole["model"].get("byte_fallback")
        types[i] = NORMAL if word not in added else CONTROL if added[word]["special"] else USER
        types[i] = BYTE_TOKEN if single else types[i]
    used = set(words.values())
    types[[i for i in range(count) if i not in used]] = 5  # "unused"
    named = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id}
    named |= {"padding": tokenizer.pad_token_id, "unknown": tokenizer.unk_token_id}
    begins = bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
    special = {f"{key}_token_id": value for key, value in named.items() if value is not None}
    return {"tokens": tokens, "token_type": types, "add_bos_token": begins} | special


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def _distinct() -> list[str]:
    """One name for each kind of word splitting."""
    first: dict[Any, str] = {}
    for name, pre in PRES.items():
        first.setdefault((pre.splits, pre.whole_words), name)
    return list(first.values())
