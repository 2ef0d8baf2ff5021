"""llama.cpp through its C interface: one token in, one row of logits out."""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np


class LlamaCpp:
    """A model file in a context of its own; the memory of keys and values is 16-bit, as in the other variants."""

    def __init__(self, path: Path, threads: int, context: int = 1024) -> None:
        """Load and map the file. Raises RuntimeError where llama.cpp refuses it."""
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = context
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(self.model, parameters)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))

    def reset(self) -> None:
        """Forget every token."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)

    def step(self, tokens: list[int]) -> np.ndarray:
        """The logits (V,) after these tokens."""
        ids = (llama_cpp.llama_token * len(tokens))(*tokens)
        if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama_decode failed")
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), (self.words,))

    def close(self) -> None:
        """Free the memory."""
        llama_cpp.llama_free(self.context)
        llama_cpp.llama_model_free(self.model)
