"""A GGUF file with the weights of a Llama or Qwen2 model in memory: every matrix in one type, vectors as F32.

The file and its blocks are made by llama.cpp's own package, so that what MOYU reads from it is held to another writer.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor, nn

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(model: nn.Module, path: Path, kind: str = "BF16") -> Path:
    """Write the model's weights, and no tokenizer: token ids go in and logits come out.

    kind: of all matrices, the embedding and the head included: F16, BF16, Q8_0, Q4_0.
    """
    config, stored = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, parameter in model.named_parameters():
        stem, _, end = name.rpartition(".")
        if stem.startswith("model.layers."):
            _, _, layer, part = stem.split(".", 3)
            role, target = NAMES[part], f"blk.{layer}.{NAMES[part]}.{end}"
        else:
            role, target = NAMES[stem], f"{NAMES[stem]}.{end}"
        tensor = parameter.detach()
        if role in heads and config.model_type == "llama":
            tensor = interleaved(tensor, heads[role])
        if tensor.dim() == 1:
            writer.add_tensor(target, tensor.float().numpy())
        else:
            writer.add_tensor(target, raw(tensor, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(
    source: Path,
    path: Path,
    kind: str,
    *,
    pure: bool = False,
    head: str | None = None,
    importance: Mapping[str, np.ndarray] | None = None,
    threads: int = 0,
) -> Path:
    """The file `source` as llama.cpp's own quantiser makes it; blocks of the source are requantised from their values.

    kind: llama.cpp's name of a file, `q4_k_m`. pure: every matrix in that type, in place of llama.cpp's mixture of types.
    head: the type of the embedding and the head, in place of the mixture's.
    importance: E[x^2] of the inputs (n,) float32, by tensor. threads: 0 is all. Raises RuntimeError with llama.cpp's words.
    """
    import llama_cpp

    said: list[str] = []
    listen = llama_cpp.llama_log_callback(lambda level, text, data: said.append(text.decode(errors="replace")))
    llama_cpp.llama_log_set(listen, ctypes.c_void_p(0))
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    settings.pure, settings.nthread, settings.allow_requantize = pure, threads, True
    if head is not None:
        settings.token_embedding_type = settings.output_tensor_type = gguf.GGMLQuantizationType[head]
    entry = llama_cpp.llama_model_imatrix_data
    values = {name: np.ascontiguousarray(value, np.float32) for name, value in (importance or {}).items()}
    rows = [
        entry(name.encode(), value.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), value.size)
        for name, value in values.items()
    ]
    if rows:
        settings.imatrix = (entry * (len(rows) + 1))(*rows, entry())  # llama.cpp stops at the one without a name
    failed = llama_cpp.llama_model_quantize(str(source).encode(), str(path).encode(), ctypes.byref(settings))
    llama_cpp.llama_log_set(_silence(), ctypes.c_void_p(0))
    if failed:
        raise RuntimeError(f"llama.cpp does not make {kind} of {source}: {''.join(said[-3:]).strip()}")
    return path


@functools.cache
def _silence() -> Any:
    """A listener that hears nothing, which must live as long as llama.cpp may talk."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda *_: None)


def raw(weight: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A matrix (q, n) as the file has it, (q, bytes of a row) uint8."""
    dtype = {"F16": torch.float16, "BF16": torch.bfloat16}.get(kind.name)
    if dtype is not None:
        return weight.to(dtype).contiguous().view(torch.uint8).numpy().reshape(len(weight), -1)
    parts = [gguf.quants.quantize(part.float().numpy(), kind) for part in weight.split(1024)]
    return np.concatenate(parts)


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k in llama.cpp's order for Llama: pairs of one rotation side by side, not in two halves."""
    rows = weight.shape[0] // heads
    return weight.reshape(heads, 2, rows // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
