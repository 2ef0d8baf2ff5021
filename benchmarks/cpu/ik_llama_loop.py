"""ik_llama.cpp in a process of its own, because its libraries have llama.cpp's names: one token in, the next one out.

    IK_LLAMA_CPP_LIB_PATH=.../libllama.so python benchmarks/cpu/ik_llama_loop.py FILE.gguf THREADS [repack]

It answers each line of tokens (a JSON list; an empty one forgets everything) with `[next token, seconds]`. repack: lay weights out in its
run-time order, which it offers for CPUs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


class IkLlamaCpp:
    """A model file in ik_llama.cpp. `step` returns the next token and what the step took inside, in seconds."""

    def __init__(self, path: Path, threads: int, *, repack: bool = False) -> None:
        """Raises RuntimeError where it does not start."""
        command = [sys.executable, __file__, str(path), str(threads), *(["repack"] if repack else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self._answer()

    def reset(self) -> None:
        """Forget every token."""
        self.step([])

    def step(self, tokens: list[int]) -> tuple[int, float]:
        """The token after these, and seconds."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(tokens) + "\n")
        self.process.stdin.flush()
        token, seconds = self._answer()
        return int(token), float(seconds)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.wait()

    def _answer(self) -> list[float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("ik_llama.cpp ended: its library is missing, or it does not load the file")
        return json.loads(line)


def serve(path: str, threads: int, repack: bool) -> None:
    """Answer lines of stdin until it ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the library prints is no answer
    import numpy as np
    from ik_llama_cpp import _ctypes_api as api

    api.llama_backend_init()
    of_model = api.llama_model_default_params()
    of_model.repack_tensors = repack
    of_model.use_mmap = not repack
    model = api.llama_model_load_from_file(path.encode(), of_model)
    if not model:
        raise SystemExit(f"ik_llama.cpp does not load {path}")
    of_context = api.llama_context_default_params()
    of_context.n_ctx = of_context.n_batch = 1024
    of_context.n_threads = of_context.n_threads_batch = threads
    context = api.llama_init_from_model(model, of_context)
    words = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def answer(token: int, seconds: float) -> None:
        answers.write(json.dumps([token, seconds]) + "\n")
        answers.flush()

    answer(0, 0.0)
    held = 0
    for line in sys.stdin:
        tokens = json.loads(line)
        if not tokens:
            api.llama_kv_cache_clear(context)
            held = 0
            answer(0, 0.0)
            continue
        start = time.perf_counter()
        batch = api.llama_batch_init(len(tokens), 0, 1)
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, held + i, 1
            batch.seq_id[i][0], batch.logits[i] = 0, i == len(tokens) - 1
        if api.llama_decode(context, batch):
            raise SystemExit("llama_decode failed")
        logits = np.ctypeslib.as_array(api.llama_get_logits_ith(context, len(tokens) - 1), (words,))
        token = int(logits.argmax())
        answer(token, time.perf_counter() - start)
        api.llama_batch_free(batch)
        held += len(tokens)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), "repack" in sys.argv[3:])
