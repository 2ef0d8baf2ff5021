"""Lossless decoding beside dense: tokens a second, acceptance, what a step of several tokens costs; variants in turn on every prompt.

    python benchmarks/lossless/lossless.py MODEL [--text FILE] [--plan FOLDER ...] [--prompts 20] [--tokens 64] [--threads N]

--text: a text, of which stretches of 200 tokens are prompts, or .jsonl with a field `prompt` or `question`. The text drafts alone,
and with the first bits of the weights where nearly all of them have 8 bits; each plan drafts with the text and alone. --weights q8_0:
the values of the file's weights, rounded to that format first. llama.cpp and ik_llama.cpp decode the same prompts where
`llama-cpp-python` and `ik-llama-cpp-python` are installed and MODEL is a file (PYTHONPATH=benchmarks/cpu). Greedy; texts are compared
token by token. Prints a table and, with --out, appends a JSON line.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moyu import kernels
from moyu.engine import steps
from moyu.engine.applied import Applied
from moyu.engine.generate import generate, new_cache, prefill
from moyu.engine.speculation import Speculation, speculate
from moyu.engine.steps.run import Reads
from moyu.model.loading import Loaded, load
from moyu.model.prompts import as_chat, prompt_ids
from moyu.model.quantised import QuantisedEmbedding, QuantisedLinear
from moyu.plan import Plan
from moyu.weights import named

STRETCH = 200  # tokens of a prompt
TOGETHER = (1, 2, 3, 4, 6, 8, 12, 16)  # tokens of a step


def prompts_of(loaded: Loaded, path: Path | None, count: int) -> list[Tensor]:
    """Ids (1, T) of some prompts."""
    if path is not None and path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()[:count]]
        texts = [r.get("prompt") or r["question"] for r in rows]
        if loaded.tokenizer.chat_template:
            texts = [as_chat(loaded, [{"role": "user", "content": t}], "") for t in texts]
        return [prompt_ids(loaded, t)[:, : 2 * STRETCH] for t in texts]
    text = Path(__file__).read_text() if path is None else path.read_text()
    ids = prompt_ids(loaded, text)[0]
    starts = torch.linspace(0, max(0, len(ids) - STRETCH), count).long().tolist()
    return [ids[None, s : s + STRETCH] for s in starts]


def requantised(model: nn.Module, name: str) -> None:
    """Give every quantised linear and table of a model another format."""
    made: dict[int, QuantisedLinear | QuantisedEmbedding] = {}  # by the memory of a weight, which a head may share
    for path, old in list(model.named_modules()):
        if not isinstance(old, QuantisedLinear | QuantisedEmbedding):
            continue
        key, dtype = old.blocks.tensors[0].data_ptr(), old.like.dtype
        stored = made[key].blocks if key in made else named(name).store(old.weight.float())
        new = QuantisedLinear(stored, old.bias, dtype) if isinstance(old, QuantisedLinear) else None
        new = new or QuantisedEmbedding(stored, dtype)
        for setting in ("scalar_embed_scale", "scale"):
            if hasattr(old, setting):
                setattr(new, setting, getattr(old, setting))
        if key in made:
            made[key].tie(new)
        made.setdefault(key, new)
        model.set_submodule(path, new)


def timed(stream: Any, clock: Callable[[], float] = time.perf_counter) -> tuple[list[int], float]:
    """Tokens, and how many a second after the first."""
    found, times = [], []
    for token in stream:
        found.append(int(token))
        times.append(clock())
    return found, (len(found) - 1) / (times[-1] - times[0])


def step_costs(
    session: Any, ids: Tensor, reads: Reads = "all", clock: Callable[[], float] = time.perf_counter
) -> dict[int, float]:
    """Median seconds of a dense step of so many tokens, in turn."""
    cache, found = new_cache(session), defaultdict(list)
    prefill(session, cache, list(ids))
    for _ in range(12):
        for count in TOGETHER:
            start = clock()
            steps.dense_step(session, cache, ids[:, :count], reads)
            found[count].append(clock() - start)
            cache.crop(-count)
    return {count: statistics.median(values[2:]) for count, values in found.items()}


def llama_cpp(path: Path, threads: int, tokens: int) -> Callable[[Tensor], tuple[list[int], float]] | None:
    """Greedy decoding by llama.cpp; None where it is not installed."""
    try:
        from llama_cpp_loop import LlamaCpp
    except ImportError:
        return None
    engine = LlamaCpp(path, threads)

    def write(ids: Tensor) -> tuple[list[int], float]:
        def stream() -> Any:
            engine.reset()
            token = int(engine.step(ids[0].tolist()).argmax())
            yield token
            for _ in range(tokens - 1):
                token = int(engine.step([token]).argmax())
                yield token

        return timed(stream())

    return write


def ik_llama_cpp(
    path: Path, threads: int, tokens: int, repack: bool
) -> Callable[[Tensor], tuple[list[int], float]] | None:
    """Greedy decoding by ik_llama.cpp; None where it is not installed."""
    from ik_llama_loop import IkLlamaCpp

    try:
        engine = IkLlamaCpp(path, threads, repack=repack)
    except RuntimeError as error:
        print(error)
        return None

    def write(ids: Tensor) -> tuple[list[int], float]:
        engine.reset()
        found, seconds = [engine.step(ids[0].tolist())[0]], 0.0
        for _ in range(tokens - 1):
            token, took = engine.step(found[-1:])
            found.append(token)
            seconds += took
        return found, (len(found) - 1) / seconds

    return write


@torch.no_grad()
def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--plan", type=Path, action="append", default=[])
    parser.add_argument("--weights", help="the format to round the weights to")
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="of one thread, where others use the machine")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    if asked.cpu_time and asked.threads != 1:
        parser.error("--cpu-time is of one thread: --threads 1")
    clock = time.process_time if asked.cpu_time else time.perf_counter
    torch.set_num_threads(asked.threads)
    options: dict[str, Any] = {"max_new_tokens": asked.tokens, "do_sample": False, "eos_token_id": None}
    options |= {"repetition_penalty": 1.0}  # as llama.cpp's loop here, which takes the largest logit

    def loaded() -> Loaded:
        one = load(asked.model)
        if asked.weights is not None:
            requantised(one.model, asked.weights)
        return one

    with ExitStack() as held:
        dense_model = loaded()
        prompts = prompts_of(dense_model, asked.text, asked.prompts)
        dense = held.enter_context(Applied(dense_model.model, None))
        plans = {p.name: held.enter_context(Applied(loaded().model, Plan.load(p))) for p in asked.plan}
        ceiling = kernels.ReadCeiling().sample(3)
        ways: dict[str, Callable[[Tensor, Speculation], Any]] = {
            "dense": lambda ids, out: generate(dense, ids, **options),
            "text": lambda ids, out: speculate(dense, ids, source="text", out=out, **options),
        }
        bits = None if plans else held.enter_context(Applied(loaded().model, None, first_bits=True))
        if bits is not None and bits.parted:
            ways["first bits"] = lambda ids, out: speculate(bits, ids, source="plan", out=out, **options)
            ways["first bits and text"] = lambda ids, out: speculate(bits, ids, out=out, **options)
        for name, session in plans.items():
            ways[f"{name}, uncorrected"] = lambda ids, out, s=session: generate(s, ids, **options)
            for source in ("plan", "both"):
                ways[f"{name}: {source}"] = lambda ids, out, s=session, source=source: speculate(
                    s, ids, source=source, out=out, **options
                )
        others = {}
        if asked.model.endswith(".gguf") and asked.weights is None and not asked.cpu_time:
            path, more = Path(asked.model), (asked.threads, asked.tokens)
            others = {"llama.cpp": llama_cpp(path, *more), "ik_llama.cpp": ik_llama_cpp(path, *more, repack=False)}
            others["ik_llama.cpp, repacked"] = ik_llama_cpp(path, *more, repack=True)
        rates, told, same = defaultdict(list), defaultdict(list), defaultdict(int)
        for number, ids in enumerate(prompts):
            texts = {}
            names = list(ways) if number % 2 == 0 else list(ways)[::-1]
            for name in names:
                out = Speculation()
                texts[name], rate = timed(ways[name](ids, out), clock)
                rates[name].append(rate)
                told[name].append(out)
            for name, write in others.items():
                if write is not None:
                    texts[name], rate = write(ids)
                    rates[name].append(rate)
            ceiling.sample()
            for name, text in texts.items():
                same[name] += text == texts["dense"]
        sessions: dict[str, tuple[Any, Reads]] = {"dense": (dense, "all")} | {n: (s, "all") for n, s in plans.items()}
        if bits is not None and bits.parted:
            sessions |= {"parted": (bits, "all"), "first bits": (bits, "first bits")}
        costs = {name: step_costs(session, prompts[0], reads, clock) for name, (session, reads) in sessions.items()}
    row = {
        "model": Path(asked.model).name,
        "text": None if asked.text is None else asked.text.name,
        "weights": asked.weights,
        "threads": asked.threads,
        "clock": "CPU time" if asked.cpu_time else "time",
        "prompts": len(prompts),
        "tokens": asked.tokens,
        "ceiling_gb_s": ceiling.gb_s,
        "ways": {},
        "step_s": costs,
    }
    print(f"{row['model']}, {row['text']}, {asked.threads} threads, read ceiling {ceiling.gb_s:.1f} GB/s\n")
    heads = ["way", "tokens/s", "over dense, median of prompts", "least", "accepted", "tokens a pass"]
    print("| " + " | ".join([*heads, "drafts of the text, of the plan", "same text"]) + " |")
    print("|---|---|---|---|---|---|---|---|")
    for name, found in rates.items():
        over = [a / b for a, b in zip(found, rates["dense"], strict=True)]
        outs = [o for o in told.get(name, ()) if o.passes]
        own: dict[str, Any] = {
            "tok_s": statistics.median(found),
            "over_dense": statistics.median(over),
            "least_over_dense": min(over),
            "same": same[name],
        }
        if outs:
            own |= {
                "accepted": sum(o.accepted for o in outs) / max(1, sum(o.judged for o in outs)),
                "tokens_per_pass": sum(len(o.tokens) - 1 for o in outs) / sum(o.passes for o in outs),
                "found": sum(o.found for o in outs) / len(outs),
                "drafted": sum(o.drafted for o in outs) / len(outs),
            }
        row["ways"][name] = own
        more = ["", "", ""]
        if outs:
            more = [
                f"{own['accepted']:.0%}",
                f"{own['tokens_per_pass']:.2f}",
                f"{own['found']:.0f}, {own['drafted']:.0f}",
            ]
        cells = [name, f"{own['tok_s']:.1f}", f"{own['over_dense']:.2f}", f"{own['least_over_dense']:.2f}", *more]
        print("| " + " | ".join([*cells, f"{own['same']} of {len(prompts)}"]) + " |")
    for name, found in costs.items():
        told_costs = ", ".join(f"{n}: {t / costs['dense'][1]:.2f}" for n, t in found.items())
        print(
            f"\n{name}: a step of one token {found[1] * 1e3:.1f} ms; of more tokens, in the time of a dense one: {told_costs}"
        )
    if asked.out is not None:
        with asked.out.open("a") as to:
            to.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
