"""Decoding of GGUF files as they are: llama.cpp and MOYU on the same file, one process, steps alternating.

    LLAMA_CPP_LIB_PATH=... .venv/bin/python benchmarks/cpu/files.py FILE.gguf ... [--threads N] [--skip 0.5]

Prints, of each file: tokens/s of llama.cpp, of MOYU dense and of MOYU with a share of the neurons skipped (GRIFFIN), the time of a
prompt of 512 tokens in both, and the read ceiling in between.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from llama_cpp_loop import LlamaCpp
from run import PROMPT, measure

from moyu import methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.cache import KvCache
from moyu.measure.windows import Windows
from moyu.model.gguf.loading import load_model
from moyu.model.gguf.reader import read

LONG = 512  # tokens of the prompt that is timed


def stepper(applied: Applied, prompt: torch.Tensor) -> Any:
    """From a token to its logits, after the prompt, on MOYU's own cache."""
    model: Any = applied.model
    cache = KvCache(model.config.get_text_config(decoder=True))

    def forward(ids: torch.Tensor) -> torch.Tensor:
        with applied.prompt(PROMPT):
            return model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits

    forward(prompt)
    return lambda token: forward(torch.tensor([[token]]))


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--skip", type=float, default=0.5, help="share of the neurons that GRIFFIN skips")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for path in options.files:
        models = [load_model(read(path)) for _ in range(2)]  # one a layout
        words = models[0].config.get_text_config(decoder=True).vocab_size
        generator = torch.Generator().manual_seed(0)
        prompt, long = (torch.randint(3, words, (1, n), generator=generator) for n in (PROMPT, LONG))
        plan = calibrate(
            models[1], methods.method("griffin"), Windows(prompt, 8), sparsity=options.skip, name=path.stem
        )
        engine = LlamaCpp(path, options.threads)
        engine.step(prompt[0].tolist())
        with Applied(models[0], None) as dense, Applied(models[1], plan, check=False) as sparse:
            ways = {
                "llama.cpp": lambda token: engine.step([token]),  # noqa: B023
                "moyu dense": stepper(dense, prompt),
                f"moyu {options.skip:.0%} skipped": stepper(sparse, prompt),
            }
            seconds, ceiling = measure(ways)
            median = {name: statistics.median(values) for name, values in seconds.items()}
            steps = dense.traces.summary(), sparse.traces.summary()
            prompts: dict[str, list[float]] = {"llama.cpp": [], "moyu dense": []}
            for _ in range(3):
                engine.reset()
                start = time.perf_counter()
                engine.step(long[0].tolist())
                prompts["llama.cpp"].append(time.perf_counter() - start)
                start = time.perf_counter()
                cache = KvCache(models[0].config.get_text_config(decoder=True))
                with dense.prompt(LONG):
                    models[0](input_ids=long, past_key_values=cache, logits_to_keep=1)
                prompts["moyu dense"].append(time.perf_counter() - start)
        engine.close()
        size = path.stat().st_size / 1e6
        print(
            f"\n{path.name}, {size:.0f} MB, {options.threads} threads, read ceiling {ceiling:.1f} GB/s, steps {steps}"
        )
        for name, t in median.items():
            print(f"{name:20s} {1 / t:7.1f} tokens/s {t * 1e3:7.1f} ms  {median['llama.cpp'] / t:5.2f} x llama.cpp")
        for name, values in prompts.items():
            print(f"{name:20s} prompt of {LONG}: {min(values):6.2f} s")


if __name__ == "__main__":
    main()
