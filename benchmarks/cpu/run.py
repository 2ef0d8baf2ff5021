"""Decoding on a CPU, one process, variants alternating, the same random weights in all of them.

    .venv/bin/python benchmarks/cpu/run.py [--shape llama-3.2-1b] [--layers N] [--weights bf16,q8_0,q4_0] [--out RECORDS.jsonl]

Variants: transformers' eager loop, the same compiled (16 bits alone), llama.cpp, ik_llama.cpp (--ik), MOYU dense, MOYU with a share of
neurons (GRIFFIN), of all projections' columns (TEAL) or of the further bits of weights (levels) skipped, for each type of weights one
after another. First a numeric check: llama.cpp, transformers and MOYU must agree on the logits.
"""

from __future__ import annotations

import argparse
import copy
import random
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from gguf_file import quantised, write
from ik_llama_loop import IkLlamaCpp
from llama_cpp_loop import LlamaCpp
from torch import nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from moyu import kernels, methods, records
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.measure import accounting
from moyu.measure.environment import last_level_cache, read_buffer
from moyu.measure.windows import Windows
from moyu.model import dissect, loading
from moyu.model.gguf.loading import load_model
from moyu.model.gguf.reader import read
from moyu.plan import Plan

PROMPT, TURNS = 32, 24
BLOCKS = (
    "q4_0", "q4_1", "q8_0", "q5_0", "q5_1", "q2_k", "q3_k_m", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "iq4_nl", "iq4_xs",
)  # fmt: skip
DTYPES = {"bf16": "bfloat16"} | {kind: kind for kind in BLOCKS}  # what records call them
# From a token to its logits: all get the same tokens, and none has to choose one. Or to the seconds that it took, by a clock of its own.
Step = Callable[[int], object]


class Bench:
    """The weights in the three layouts that the variants read, and the loops over them.

    Every variant stays ready from beginning to end, so that single steps can alternate: a shared machine's memory changes
    its rate from second to second.
    """

    def __init__(self, shape: str, weights: str, model: PreTrainedModel, path: Path) -> None:
        """A plan a variant for a model of random weights of `shape`, which is in the file as well."""
        self.shape, self.weights, self.model, self.path = shape, weights, model, path
        self.anatomy = dissect.dissect(self.model)
        self.layers, self.whole = len(self.anatomy.layers), loading.SHAPES[shape]().num_hidden_layers
        self.bytes = accounting.dense_step_bytes(self.model, self.anatomy)
        generator = torch.Generator().manual_seed(0)
        self.prompt = torch.randint(3, self.model.config.vocab_size, (1, PROMPT), generator=generator)
        self.plans: dict[str, Plan | None] = {"moyu dense": None}
        wanted = [("griffin", "neurons", s) for s in (0.3, 0.5, 0.7)] + [("teal", "columns", s) for s in (0.3, 0.5)]
        if all(p.blocks is not None and p.blocks.format.splits for b in self.anatomy.blocks for p in b.pieces.values()):
            wanted += [("levels", "bits", s) for s in (0.5, 0.8, 0.9)]
        for name, kind, share in wanted:
            self.plans[f"moyu {share:.0%} {kind}"] = self.plan(name, share)
        # A copy a layout, of the layers only: only levels lay out the head as well. Blocks say their order beside the memory
        # that they are in, so that there is a copy a variant.
        same = {id(t): t for name, t in tensors(self.model) if ".layers." not in name}
        layouts = {name: name.split()[-1] if weights == "bf16" else name for name in self.plans}
        laid_out = {
            layout: self.model
            if layout.endswith("dense")
            else copy.deepcopy(self.model, {} if layout.endswith("bits") else dict(same))
            for layout in dict.fromkeys(layouts.values())
        }
        self.applied = {name: Applied(shared(laid_out[layouts[name]]), plan) for name, plan in self.plans.items()}

    def plan(self, name: str, share: float) -> Plan:
        """A method that skips `share` of its units."""
        ids = self.prompt.roll(5, 1)
        return calibrate(
            self.model, methods.method(name), Windows(ids, 8), sparsity=share, name=self.shape, anatomy=self.anatomy
        )

    def step_bytes(self, name: str) -> float:
        """Bytes of weights that a step reads: the dense step's less what is skipped, as the kernels count it."""
        return self.bytes - self._counted("moyu dense") + self._counted(name) if name in self.plans else self.bytes

    def _counted(self, name: str, steps: int = 4) -> float:
        step = self.moyu(name)
        with kernels.count_bytes() as counted:
            for token in range(3, 3 + steps):
                step(token)
        return counted.total / steps

    def eager(self) -> Step:
        """transformers' own loop."""
        return self._loop(self.model, DynamicCache(config=self.model.config))

    def compiled(self) -> Step:
        """The same compiled by inductor, with a static cache."""
        cache = StaticCache(config=self.model.config, max_cache_len=PROMPT + 3 * TURNS + 8)
        return self._loop(self.model, cache, torch.compile(self.model, dynamic=False))

    def moyu(self, name: str) -> Step:
        """The same loop with a plan applied."""
        applied = self.applied[name]

        def call(*args: Any, **kwargs: Any) -> Any:
            with applied.prompt(PROMPT):
                return applied.model(*args, **kwargs)

        return self._loop(call, DynamicCache(config=self.model.config))

    def batched(self, name: str, size: int) -> Callable[[], None]:
        """A greedy step of `size` sequences with different prompts, or with one where the variant says "one mask"."""
        applied = self.applied[name.removesuffix(", one mask")]
        ids = torch.randint(
            3, self.model.config.vocab_size, (size, PROMPT), generator=torch.Generator().manual_seed(size)
        )
        ids = ids[:1].expand(size, -1) if name.endswith("one mask") else ids
        cache = DynamicCache(config=self.model.config)

        def forward(ids: torch.Tensor) -> torch.Tensor:
            with applied.prompt(PROMPT):
                return applied.model(ids, past_key_values=cache).logits[:, -1:].argmax(-1)

        token = [forward(ids)]

        def step() -> None:
            token[0] = forward(token[0])

        return step

    def llama_cpp(self, engine: LlamaCpp) -> Step:
        """llama.cpp on the same weights."""
        engine.reset()
        engine.step(self.prompt[0].tolist())
        return lambda token: engine.step([token])

    def ik_llama_cpp(self, engine: IkLlamaCpp) -> Step:
        """ik_llama.cpp on the same weights; by its own clock, without the pipe to its process."""
        engine.reset()
        engine.step(self.prompt[0].tolist())
        return lambda token: engine.step([token])[1]

    def _loop(self, model: Callable, cache: DynamicCache | StaticCache, decode: Callable | None = None) -> Step:
        decode = model if decode is None else decode

        def step(token: int) -> torch.Tensor:
            return decode(torch.tensor([[token]]), past_key_values=cache, use_cache=True).logits

        model(self.prompt, past_key_values=cache, use_cache=True)
        return step


def tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers: blocks are buffers."""
    return chain(model.named_parameters(), model.named_buffers())


def shared(model: nn.Module) -> nn.Module:
    """Another model on the same memory."""
    return copy.deepcopy(model, {id(t): t for _, t in tensors(model)})


def prepare(shape: str, layers: int | None, weights: str, path: Path) -> Bench:
    """Random weights, written to a GGUF file that llama.cpp reads; blocks are read back from it, bit for bit."""
    model = loading.random_model(shape, layers=layers)
    if weights == "bf16":
        write(model, path, "BF16")
        return Bench(shape, weights, model, path)
    if not path.exists():
        whole = write(model, path.with_suffix(".f16.gguf"), "F16")
        quantised(whole, path, weights, pure=not weights.endswith("_m"))
        whole.unlink()
    del model
    return Bench(shape, weights, load_model(read(path)), path)


def check(bench: Bench, engine: LlamaCpp, tokens: int = 24) -> None:
    """The same logits from all three, on forced tokens; greedy choices equal wherever they are not near-ties."""
    model, ids, applied = bench.model, bench.prompt, bench.applied["moyu dense"]
    engine.reset()
    cache, own = DynamicCache(config=model.config), DynamicCache(config=model.config)
    worst, ties = {"llama.cpp": 0.0, "moyu": 0.0}, 0
    with applied.prompt(PROMPT):
        for _ in range(tokens):
            eager = model(ids, past_key_values=cache).logits[0, -1].float()
            others = {
                "llama.cpp": torch.from_numpy(engine.step(ids[0].tolist()).copy()),
                "moyu": applied.model(ids, past_key_values=own).logits[0, -1].float(),
            }
            for name, logits in others.items():
                error = logits - eager
                worst[name] = max(worst[name], float(error.norm() / eager.norm()))
                if int(logits.argmax()) != int(eager.argmax()):
                    ties += 1
                    gap = float(eager.max() - eager[logits.argmax()])
                    assert gap < 2 * float(error.abs().max()), (
                        f"{name} chooses a token that is {gap:.3g} worse: no near-tie"
                    )
            ids = eager.argmax().view(1, 1)
    errors = ", ".join(f"{name} {error:.4f}" for name, error in worst.items())
    print(
        f"check, {tokens} forced tokens: error beside the logits of the model's own forward {errors}; {ties} near-ties decided otherwise"
    )
    # On blocks both round their activations to 8 bits, which the model's own forward does not: 6 % of these logits.
    assert max(worst.values()) < (0.05 if bench.weights == "bf16" else 0.1), "these are not the same model"


def measure(variants: dict[str, Step]) -> tuple[dict[str, list[float]], float]:
    """Seconds of single steps, and the read ceiling in between: the best loop's median, in GB/s.

    A turn is all variants in a random order, each for a step that is not timed, while the threads of the one before it
    still spin, and then two that are.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    ceiling, order = kernels.ReadCeiling(read_buffer(last_level_cache())), random.Random(0)
    for turn in range(TURNS + 1):
        ceiling.sample()
        for name in order.sample(list(variants), len(variants)):
            for step in range(3):
                start = time.perf_counter()
                given = variants[name](3 + 3 * turn + step)
                if turn and step:
                    seconds[name].append(given if isinstance(given, float) else time.perf_counter() - start)
    return seconds, ceiling.gb_s


def batches(bench: Bench, sizes: tuple[int, ...] = (1, 2, 4, 8)) -> None:
    """Print decode steps of several sequences: every row its own mask, and one mask for all (all rows one prompt)."""
    names = ("moyu dense", "moyu 50% neurons", "moyu 50% neurons, one mask", "moyu 50% columns")
    pays: dict[str, list[int]] = {name: [] for name in names[1:]}
    for size in sizes:
        steps = {name: bench.batched(name, size) for name in names}
        seconds: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(TURNS // 2):
            for name in names[turn % 4 :] + names[: turn % 4]:
                for _ in range(2):
                    start = time.perf_counter()
                    steps[name]()
                    seconds[name].append(time.perf_counter() - start)
        median = {name: statistics.median(s[2:]) for name, s in seconds.items()}
        print(f"batch {size}, dense on MOYU's kernels {median[names[0]] * 1e3:.1f} ms; times as fast:", end="")
        for name in names[1:]:
            gain = median[names[0]] / median[name]
            pays[name] += [size] if gain > 1 else []
            print(f" {name.removeprefix('moyu ')} {gain:.2f}", end=";" if name != names[-1] else "\n")
    for name, good in pays.items():
        print(
            f"{name.removeprefix('moyu ')}: pays at batch {', '.join(map(str, good)) or 'none'} of {', '.join(map(str, sizes))}"
        )


def prefill(bench: Bench, rounds: int, tokens: int = 512) -> None:
    """Print the time of a prompt of `tokens` tokens, by transformers and with a plan applied; a first round is not counted."""
    ids = torch.randint(3, bench.model.config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(1))
    seconds: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        for name in ("transformers", "moyu dense", "moyu 50% neurons", "moyu 50% columns"):
            start = time.perf_counter()
            if name == "transformers":
                bench.model(ids, logits_to_keep=1)
            else:
                with bench.applied[name].prompt(tokens):
                    bench.applied[name].model(ids, logits_to_keep=1)
            seconds.setdefault(name, []).append(time.perf_counter() - start)
    base = statistics.median(seconds["transformers"][1:])
    for name, values in seconds.items():
        median = statistics.median(values[1:])
        print(f"prefill of {tokens} tokens, {name}: {median:.3f} s ({median / base - 1:+.1%})")


@torch.no_grad()
def main() -> None:
    """Check, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="llama-3.2-1b", choices=list(loading.SHAPES))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--weights", default="bf16", help=f"comma-separated: {', '.join(DTYPES)}")
    parser.add_argument(
        "--files", type=Path, help="folder that keeps the GGUF files of blocks; writing them takes a minute each"
    )
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out: it compiles for a minute or two"
    )
    parser.add_argument(
        "--prefill", type=int, nargs="?", const=5, metavar="ROUNDS",
        help="time prefill as well; a round of 512 tokens takes minutes where torch has no fast 16-bit products",
    )  # fmt: skip
    parser.add_argument("--batches", action="store_true", help="time several sequences at once as well")
    parser.add_argument(
        "--ik", action="store_true", help="time ik_llama.cpp too (IK_LLAMA_CPP_LIB_PATH), plain and repacked"
    )
    parser.add_argument("--threads", default=str(torch.get_num_threads()), help="comma-separated, one after another")
    parser.add_argument("--out", type=Path, help="records to write; those of other shapes in it stay")
    options = parser.parse_args()
    threads = [int(n) for n in options.threads.split(",")]
    for weights in options.weights.split(","):
        with tempfile.TemporaryDirectory() as folder:
            name = f"{options.shape}-{options.layers or 'all'}-{weights}.gguf"
            bench = prepare(options.shape, options.layers, weights, (options.files or Path(folder)) / name)
            for count in threads:
                torch.set_num_threads(count)
                engine = LlamaCpp(bench.path, count)
                if count == threads[0]:
                    check(
                        bench, engine, tokens=24 if weights == "bf16" else 4
                    )  # transformers' steps dequantise every weight
                variants: dict[str, Step] = {}
                if weights == "bf16":
                    variants["transformers eager"] = bench.eager()
                if weights == "bf16" and not options.no_compile:
                    variants["transformers compiled"] = bench.compiled()
                variants["llama.cpp"] = bench.llama_cpp(engine)
                others = {}
                if options.ik:
                    others["ik_llama.cpp"] = IkLlamaCpp(bench.path, count)
                    others["ik_llama.cpp repacked"] = IkLlamaCpp(bench.path, count, repack=True)
                variants |= {name: bench.ik_llama_cpp(other) for name, other in others.items()}
                variants |= {name: bench.moyu(name) for name in bench.plans}
                seconds, ceiling = measure(variants)
                for each in (engine, *others.values()):
                    each.close()
                report(bench, seconds, ceiling, options.out)
        if options.prefill and weights == "bf16":
            prefill(bench, options.prefill)
        if options.batches and weights == "bf16":
            batches(bench)
        del bench, variants  # the next type's weights need the room


def report(bench: Bench, seconds: dict[str, list[float]], ceiling: float, out: Path | None) -> None:
    """A row a variant, and records."""
    median = {name: statistics.median(s) for name, s in seconds.items()}
    baseline = next(iter(seconds))  # transformers' eager loop, or llama.cpp
    rows, eager, native = [], median[baseline], median["moyu dense"]
    depth, threads = f"{bench.layers} of {bench.whole} layers", torch.get_num_threads()
    print(
        f"\n{bench.shape}, {depth}, {bench.weights}, random weights, {threads} threads, read ceiling {ceiling:.1f} GB/s (median)"
    )
    print("                          tok/s     ms     MB   GB/s share  x first x llama.cpp x dense  limit")
    for name, values in seconds.items():
        plan, t = bench.plans.get(name), median[name]
        size = bench.step_bytes(name)
        rate = size / t / 1e9
        cuts = statistics.quantiles(values, n=10, method="inclusive")
        print(
            f"{name:24s} {1 / t:6.1f} {t * 1e3:6.1f} {size / 1e6:6.0f} {rate:6.1f} {rate / ceiling:5.0%} {eager / t:8.2f} "
            f"{median['llama.cpp'] / t:11.2f} {native / t:7.2f} {bench.bytes / size:6.2f}"
        )
        rows.append(
            records.stamp(
                kind="speed", model=bench.shape, weights="random", dtype=DTYPES[bench.weights], seed=0, simulated=False, kv_policy="full",
                method="dense" if plan is None else plan.method.name, family=None if plan is None else plan.method.family,
                target_sparsity=None if plan is None else float(name.split()[1].rstrip("%")) / 100,
                context=bench.shape, layers=bench.layers, tok_s=1 / t, tok_s_dense=1 / eager, speedup=eager / t,
                speedup_limit=bench.bytes / size, byte_fraction=size / bench.bytes, step_bytes=size, tok_s_kernels=1 / native, gb_s=rate,
                gb_s_dense=bench.bytes / eager / 1e9, read_ceiling_gb_s=ceiling, ceiling_share=rate / ceiling,
                peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, p20=cuts[1], p50=t, p80=cuts[7],
                backend=f"{name}: {kernels.describe()}" if name.startswith("moyu") else name, batch=1, dense_baseline=baseline,
            )
        )  # fmt: skip
    if out is not None:
        others = records.read(out) if out.exists() else []
        same = (bench.shape, DTYPES[bench.weights], threads)
        records.write(out, [r for r in others if (r.context, r.dtype, r.threads) != same] + rows)


if __name__ == "__main__":
    main()
