"""GGUF files piece by piece, sound or not: the format, written by hand."""

from __future__ import annotations

import json
import resource
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moyu import UserError
from moyu.model.gguf.reader import NUMBERS

UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 4, 6, 7, 8, 9, 10
NUMBER_OF = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 8, "BF16": 30}
OURS = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


@contextmanager
def little_memory(more: int = 2 << 30) -> Iterator[None]:
    """The process may take so much address space beside what it has: a file that claims much must not get it."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def outcome(action: Callable[[], Any]) -> tuple[Any, str]:
    """What an action gives, or what a user is told instead."""
    try:
        return action(), ""
    except UserError as error:
        return None, str(error)


def text(value: str | bytes) -> bytes:
    """A string of the format."""
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def typed(value: Any) -> bytes:
    """A value of metadata, its type before it."""
    match value:
        case bool():
            return struct.pack("<I?", BOOL, value)
        case int():
            return struct.pack("<II", UINT32, value)
        case float():
            return struct.pack("<If", FLOAT32, value)
        case str():
            return struct.pack("<I", STRING) + text(value)
        case np.ndarray():
            kind = next(k for k, name in NUMBERS.items() if np.dtype(name) == value.dtype)
            return struct.pack("<IIQ", ARRAY, kind, value.size) + value.tobytes()
        case _:
            return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(text(item) for item in value)


def description(name: str, shape: Iterable[int], kind: int, offset: int) -> bytes:
    """A tensor's, its shape as torch has it."""
    turned = tuple(shape)[::-1]
    return text(name) + struct.pack(f"<I{len(turned)}QIQ", len(turned), *turned, kind, offset)


def head(tensors: int, pairs: int, magic: bytes = b"GGUF", version: int = 3) -> bytes:
    """What a file begins with."""
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def file_of(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...], bytes]]) -> bytes:
    """A sound file: metadata by key, and of each tensor its type, its shape as torch has it, and its bytes."""
    alignment = metadata.get("general.alignment", 32)
    pairs = b"".join(text(key) + typed(value) for key, value in metadata.items())
    described, data = b"", b""
    for name, (kind, shape, content) in tensors.items():
        described += description(name, shape, NUMBER_OF[kind], len(data))
        data += content + bytes(-len(content) % alignment)
    front = head(len(tensors), len(metadata)) + pairs + described
    return front + bytes(-len(front) % alignment) + data


def stored(values: Tensor, kind: str) -> bytes:
    """A tensor of 16 or 32 bits as the file has it."""
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    return values.detach().to(dtype).contiguous().flatten().view(torch.uint8).numpy().tobytes()


def name_of(parameter: str) -> str:
    """What llama.cpp calls a parameter of a Llama, a Qwen2 or a Qwen3."""
    stem, _, end = parameter.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, part = stem.split(".", 3)
        return f"blk.{layer}.{OURS[part]}.{end}"
    return f"{OURS[stem]}.{end}"


def as_stored(model: torch.nn.Module, parameter: str) -> Tensor:
    """A parameter in llama.cpp's order of rows: for a Llama, pairs of one rotation side by side in q and k."""
    config, value = model.config, dict(model.named_parameters())[parameter].detach()
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(parameter.split(".")[-2])
    if heads is None or config.model_type != "llama":
        return value
    rows = [h * config.head_dim + half * (config.head_dim // 2) + i
            for h in range(heads) for i in range(config.head_dim // 2) for half in range(2)]  # fmt: skip
    return value[rows]


def metadata_of(model: torch.nn.Module, tokenizer: Any = None) -> dict[str, Any]:
    """What llama.cpp's converter says of a Llama, a Qwen2 or a Qwen3, and of a byte-level tokenizer."""
    config = model.config
    kind = config.model_type
    rest = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_dim if hasattr(config, "head_dim") else None,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    said = {"general.architecture": kind} | {f"{kind}.{k}": v for k, v in rest.items() if v is not None}
    if tokenizer is None:
        return said
    words = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    special = set(tokenizer.all_special_ids)
    return said | {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": [word for word, _ in words],
        "tokenizer.ggml.token_type": np.array([3 if i in special else 1 for _, i in words], "<i4"),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in merges],
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.add_bos_token": True,
    }
