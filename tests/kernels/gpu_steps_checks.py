"""Compiled steps on a GPU, captured as graphs, against general ones: the tests of tests/test_compiled.py run without a compiler.

PYTHONPATH=src python tests/kernels/gpu_steps_checks.py
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from moyu import methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.generate import generate, join, new_cache, read, step
from moyu.measure.windows import Windows
from moyu.model import loading
from tiny import build, tokens

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = (None, "teal", "was", "cats", "countdown", "griffin", "static-norm")
TOLERANCE = 1e-4  # float32; decisions on the edge of a threshold are not met, for the prompts are not the calibration's
STEPS = 5


def fresh(*shape, seed):
    return (61 + tokens(*shape, seed=seed, vocabulary=66)).to(DEVICE)


@torch.no_grad()
def logits(applied, prompts):
    cache = new_cache(applied)
    for row in prompts:
        own = new_cache(applied)
        read(applied, own, row[None])
        join(cache, own)
    given = fresh(STEPS, len(prompts), seed=7)
    return torch.stack([step(applied, cache, given[t]) for t in range(STEPS)])


def compare(model, plan, what):
    for batch in (1, 3):
        prompts = [fresh(5 + 2 * n, seed=n) for n in range(batch)]
        with Applied(model, plan) as applied:
            compiled = logits(applied, prompts)
            trace = applied.traces.summary()
            settings = {"max_new_tokens": 8, "eos_token_id": None, "do_sample": False}
            text = torch.stack(list(generate(applied, prompts, **settings)))
            applied.native = None
            general = logits(applied, prompts)
            other = torch.stack(list(generate(applied, prompts, **settings)))
        error = float((compiled - general).abs().max() / general.abs().max())
        print(f"{what} of {batch}: {trace}, {error:.1e} apart", file=sys.stderr, flush=True)
        assert trace == ("compiled" if DEVICE == "cuda" else "native")
        assert error <= TOLERANCE and torch.equal(text, other), what


def check_families():
    for name in METHODS:
        model, plan = build("sharp", torch.float32).to(DEVICE), None
        if name is not None:
            windows = Windows(tokens(6, 40, vocabulary=64).to(DEVICE), 20)
            plan = calibrate(model, methods.method(name), windows, sparsity=0.5, name="tiny")
        compare(model, plan, name or "dense")


def check_weights_in_blocks():
    for kind in ("q8_0", "q4_0"):
        model = build("llama", torch.float32).to(DEVICE)
        loading.quantise_model(model, kind)
        compare(model, None, kind)


def main() -> None:
    """Every check, by name."""
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            check()
            print(name, flush=True)


if __name__ == "__main__":
    main()
