"""The GPU kernels and whole decode steps on one NVIDIA GPU, variants alternating, random weights.

    python3 benchmarks/gpu/run.py --out RESULTS.jsonl [--part checks kernels packed stored steps] [--shapes llama-3-8b ...] [--dry-run]

`checks` runs the checks of tests/kernels compiled, and 1 to 16 rows of the 8B widths beside float32 products. `kernels` times
the feed-forward network of the widths of Llama-3.2-1B, 3-8B and 70B as one CUDA graph over several layers, beside the copy
rate: dense by torch, skipped by a mask a row (`kept`), and cut to what one mask keeps (`cut`, dense products by torch).
`packed` does the same with 8- and 4-bit weights, `stored` times products and whole steps with formats of GGUF files, also with
further bits of a fifth of the inputs (`levels`). `steps`
times decode steps: transformers' eager loop, dense compiled (the baseline: torch.compile, reduce-overhead, static cache), and
MOYU's as the commands take them: the general step, the compiled one with nothing skipped (`joined`: one product for linears
that share an input) and skipping; `loop_ms` is a token of `moyu.generate`, `ready_s` the time from applying a plan to the end
of its first step. Each row is written as soon as it is measured.
`--dry-run` goes through all of it on a CPU with tiny widths, the kernels interpreted.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
if "--dry-run" in sys.argv:
    os.environ["TRITON_INTERPRET"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from moyu import kernels, methods
from moyu.calibration.walk import calibrate
from moyu.engine.applied import Applied
from moyu.engine.generate import generate, join, new_cache, read, step
from moyu.kernels.backend import levels_read
from moyu.measure.windows import Windows
from moyu.model import loading
from moyu.plan import Plan
from moyu.weights import QUANTISED, Stored, named
from moyu.weights.grouped import Grouped

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = {"llama-3.2-1b": (2048, 8192, 8), "llama-3-8b": (4096, 14336, 4), "llama-3-70b": (8192, 28672, 2)}
KEPT = (1.0, 0.7, 0.5, 0.35, 0.2)
BATCHES = (1, 2, 4, 8, 16)
PROMPT, LENGTH = 64, 256


class Run:
    """Options, the rows measured, and the timing of the device."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Nothing runs yet."""
        self.dry, self.out = options.dry_run, options.out
        self.device = "cpu" if self.dry else "cuda"
        self.dtype = torch.float32 if self.dry else torch.bfloat16

    def row(self, **fields: object) -> None:
        """Print and append a row."""
        fields |= {"device": "interpreter" if self.dry else torch.cuda.get_device_name(), "torch": torch.__version__}
        print(json.dumps(fields), flush=True)
        if self.out:
            with self.out.open("a") as file:
                file.write(json.dumps(fields) + "\n")

    def graph(self, call: Callable[[], object]) -> Callable[[], object]:
        """`call` captured as a CUDA graph, kernels chosen and compiled before."""
        call()
        if self.dry:
            return call
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            call()
        return lambda held=call: captured.replay()  # the graph reads the call's tensors: they must live as long

    def seconds(self, calls: dict[str, Callable[[], object]], rounds: int = 15, repeat: int = 4) -> dict[str, float]:
        """Median seconds of each, in turn, `repeat` runs a turn."""
        rounds, repeat = (1, 1) if self.dry else (rounds, repeat)
        found: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds + 1):
            for name, call in calls.items():
                found[name].append(self._once(call, repeat))
        return {name: statistics.median(s[1:]) for name, s in found.items()}

    def _once(self, call: Callable[[], object], repeat: int) -> float:
        if self.dry:
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeat):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeat


def checks(run: Run) -> None:
    """The test cases compiled, then large ones."""
    for name in ("gpu_checks", "gpu_packed_checks", "gpu_blocks_checks", *(() if run.dry else ("gpu_steps_checks",))):
        script = [sys.executable, ROOT / f"tests/kernels/{name}.py"]
        done = subprocess.run(script, check=False, capture_output=True, text=True)
        print(done.stdout, done.stderr[-3000:])
        run.row(part="checks", passed=done.returncode == 0, names=done.stdout.split())
    d, f = (64, 96) if run.dry else WIDTHS["llama-3-8b"][:2]
    generator = torch.Generator(run.device).manual_seed(0)
    storage = torch.randn(f, 3, d, generator=generator, device=run.device).mul_(d**-0.5).to(run.dtype)
    gate, up, down = storage[:, 0], storage[:, 1], storage[:, 2].t()
    for batch in BATCHES:
        x = torch.randn(batch, d, generator=generator, device=run.device).to(run.dtype)
        mask = torch.rand(batch, f, generator=generator, device=run.device) < 0.5
        with kernels.use("gpu"):
            y = kernels.neurons(x, gate, up, down, mask, act="silu")
            again = kernels.neurons(x, gate, up, down, mask, act="silu")
        wide = x.float()
        mid = F.silu(wide @ gate.float().t()) * (wide @ up.float().t()) * mask
        expected, size = mid @ down.float().t(), mid.abs() @ down.float().t().abs()
        error = float(((y.float() - expected).abs() / size).max())
        run.row(part="checks", batch=batch, error=error, same_bits=torch.equal(y, again), passed=error < 2**-8)


def ceiling(run: Run) -> float:
    """Bytes a second of a large copy (read and written) or a large read, the better one."""
    size = (1 << 16) if run.dry else (1 << 31)
    a = torch.empty(size, dtype=torch.bfloat16, device=run.device).fill_(1)
    b = torch.empty_like(a)
    times = run.seconds({"copy": lambda: b.copy_(a), "read": lambda: a.view(torch.int32).amax()})
    rates = {"copy": 2 * a.nbytes / times["copy"], "read": a.nbytes / times["read"]}
    run.row(part="ceiling", copy_gb_s=rates["copy"] / 1e9, read_gb_s=rates["read"] / 1e9)
    return max(rates.values())


def random_mask(run: Run, batch: int, f: int, kept: float) -> Tensor:
    """(batch, f) bool: each row keeps the same number of neurons, a multiple of 64 as `frozen` makes it."""
    count = min(f, max(64, round(kept * f / 64) * 64))
    order = torch.rand(batch, f, device=run.device).argsort(1)
    return order < count


def dense_networks(x: Tensor, weights: list[tuple[Tensor, ...]]) -> None:
    """Feed-forward networks by torch."""
    for gate, up, down in weights:
        F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


def skipping_networks(x: Tensor, weights: list[tuple[Tensor, ...]], masks: list[Tensor]) -> None:
    """The same with neurons skipped."""
    with kernels.use("gpu"):
        for (gate, up, down), mask in zip(weights, masks, strict=True):
            kernels.neurons(x, gate, up, down, mask, act="silu")


def cut_networks(x: Tensor, weights: list[tuple[Tensor, Tensor]]) -> None:
    """The same with the kept neurons only: gate and up one product."""
    for first, down in weights:
        gate, up = F.linear(x, first).chunk(2, -1)
        F.linear(F.silu(gate) * up, down)


def packed_networks(x: Tensor, weights: list[tuple], masks: list[Tensor]) -> None:
    """The same with packed weights."""
    for packed, mask in zip(weights, masks, strict=True):
        kernels.neurons(x, *packed, mask, act="silu")


def products(x: Tensor, weights: list[Tensor]) -> None:
    """Products by torch."""
    for weight in weights:
        F.linear(x, weight)


def stored_products(x: Tensor, weights: list[Stored]) -> None:
    """Products with weights in a format."""
    for weight in weights:
        kernels.rows(x, weight)


def skipping_products(x: Tensor, turned: list[Tensor], thresholds: Tensor) -> None:
    """The same with columns skipped."""
    with kernels.use("gpu"):
        for weight in turned:
            kernels.columns_above(x, weight.t(), thresholds)


def kernel_rates(run: Run, shapes: list[str]) -> None:
    """Networks of several layers in one graph, their weights beyond the cache."""
    best = ceiling(run)
    for shape in shapes:
        d, f, layers = (64, 96, 2) if run.dry else WIDTHS[shape]
        made = [torch.randn(f, 3, d, device=run.device).mul_(d**-0.5).to(run.dtype) for _ in range(layers)]
        weights = [(s[:, 0], s[:, 1], s[:, 2].t()) for s in made]
        dense = [tuple(w.contiguous() for w in ws) for ws in weights]
        for batch in BATCHES if shape == "llama-3-8b" else (1,):
            x = torch.randn(batch, d, device=run.device).to(run.dtype)

            calls: dict[str, Callable] = {"dense": run.graph(partial(dense_networks, x, dense))}
            unions = {"dense": 1.0}
            for kept in KEPT if batch == 1 else (0.5, 0.2):
                masks = [random_mask(run, batch, f, kept) for _ in weights]

                calls[f"kept {kept}"] = run.graph(partial(skipping_networks, x, weights, masks))
                unions[f"kept {kept}"] = statistics.mean(float(m.any(0).float().mean()) for m in masks)
                chosen = [m[0].nonzero()[:, 0] for m in masks]
                smaller = [
                    (torch.cat([gate[k], up[k]]), down[:, k].contiguous())
                    for (gate, up, down), k in zip(dense, chosen, strict=True)
                ]
                calls[f"cut {kept}"] = run.graph(partial(cut_networks, x, smaller))
                unions[f"cut {kept}"] = statistics.mean(float(m[0].float().mean()) for m in masks)
            for name, seconds in run.seconds(calls).items():
                needed = unions[name] * layers * 3 * d * f * made[0].itemsize
                run.row(
                    part="kernels", op="neurons", shape=shape, batch=batch, variant=name, us_a_layer=seconds / layers * 1e6,
                    union=unions[name], gb_s=needed / seconds / 1e9, share=needed / seconds / best,
                )  # fmt: skip
        if shape == "llama-3-8b":
            column_rates(run, d, f, layers, best)
        del made, weights, dense
        gc.collect()


def packed_rates(run: Run, shapes: list[str]) -> None:
    """One row, 8- and 4-bit weights, beside 16-bit dense products; checked against float32 products of what they stand for."""
    best = ceiling(run)
    for shape in shapes:
        d, f, layers = (64, 96, 2) if run.dry else WIDTHS[shape]
        x = torch.randn(1, d, device=run.device).to(run.dtype)
        for bits in (8, 4):
            made = [
                tuple(
                    named(f"packed{bits}").store(torch.randn(size, device=run.device) * d**-0.5, order)
                    for size, order in (((f, d), "rows"), ((f, d), "rows"), ((d, f), "columns"))
                )
                for _ in range(2 * layers)
            ]
            gate, up, down = (p.values() for p in made[0])
            calls, sizes, errors = {}, {}, {}
            for kept in (1.0, 0.5, 0.2):
                masks = [random_mask(run, 1, f, kept) for _ in made]
                name = f"{bits} bits, kept {kept}"
                mid = F.silu(x.float() @ gate.t()) * (x.float() @ up.t()) * masks[0]
                error = kernels.neurons(x, *made[0], masks[0], act="silu").float() - mid @ down.t()
                errors[name] = float((error.abs() / (mid.abs() @ down.abs().t())).max())
                sizes[name] = sum(int(m.sum()) for m in masks) * sum(
                    p.row_bytes if p.order == "rows" else p.column_bytes for p in made[0]
                )
                calls[name] = run.graph(partial(packed_networks, x, made, masks))
            for name, seconds in run.seconds(calls).items():
                run.row(
                    part="packed", op="neurons", shape=shape, batch=1, variant=name, us_a_layer=seconds / len(made) * 1e6,
                    gb_s=sizes[name] / seconds / 1e9, share=sizes[name] / seconds / best, error=errors[name],
                )  # fmt: skip
            del made, calls
            gc.collect()


def random_weight(run: Run, kind: str, q: int, n: int) -> Stored:
    """A weight (q, n) of random codes by rows; its scales are finite."""
    form = named(kind)
    assert isinstance(form, Grouped)
    tensors = []
    for size, dtype in form.tensors_of((q, n), "rows"):
        if dtype == torch.float16:
            tensors.append((torch.randn(size, device=run.device) * 0.01).half())
        else:
            tensors.append(torch.randint(0, 256, size, dtype=torch.uint8, device=run.device).view(dtype))
    if len(form.fields) > 1:  # the float16 fields come first
        count = sum(c for dtype, c in form.fields if dtype == torch.float16) * (n // form.block)
        tensors[1][:, : 2 * count] = (torch.randn(q, count, device=run.device) * 0.001).half().view(torch.uint8)
    return Stored(form, "rows", tuple(tensors), (q, n))


def levels_products(x: Tensor, weights: list[Stored], mask: Tensor) -> None:
    """Products with further bits of chosen inputs."""
    for weight in weights:
        kernels.levels(x, weight, mask)


def stored_rates(run: Run, d: int, f: int, layers: int, kinds: list[str], best: float) -> None:
    """Products with weights in formats of GGUF files beside bfloat16's and the copy rate, and with the further bits of a part."""
    for kind in kinds:
        for q, n in ((2 * f, d), (f, d), (d, f), (d, d)):
            count = max(2, min(24, layers * 8 * f * d // (q * n)))
            made = [random_weight(run, kind, q, n) for _ in range(count)]
            planes = [w.laid_out("planes") for w in made[:2]]
            planes = [
                Stored(p.format, p.order, tuple(t.clone() for t in p.tensors), p.shape)
                for p in (planes * count)[:count]
            ]
            plain = [
                torch.randn(q, n, device=run.device).mul_(n**-0.5).to(run.dtype) for _ in range(max(2, count // 2))
            ]
            for batch in (1, 4) if (q, n) == (f, d) else (1,):
                x = torch.randn(batch, n, device=run.device).to(run.dtype)
                calls = {
                    "bfloat16": run.graph(partial(products, x, plain)),
                    "rows": run.graph(partial(stored_products, x, made)),
                }
                counts, sizes = (
                    {"bfloat16": len(plain), "rows": count},
                    {"bfloat16": plain[0].nbytes, "rows": made[0].nbytes},
                )
                for kept in (0.5, 0.2) if batch == 1 else ():
                    mask, name = torch.rand(batch, n, device=run.device) < kept, f"levels {kept}"
                    calls[name], counts[name] = run.graph(partial(levels_products, x, planes, mask)), count
                    sizes[name] = levels_read(planes[0], mask)
                whole = made[0].values().float()
                wide, size = x.float() @ whole.t(), x.float().abs() @ whole.abs().t()
                error = float(((kernels.rows(x, made[0]).float() - wide).abs() / size).max())
                same = torch.equal(kernels.rows(x, made[0]), kernels.rows(x, made[0]))
                found = {name: t / counts[name] for name, t in run.seconds(calls).items()}
                for name, seconds in found.items():
                    run.row(
                        part="stored", op="product", kind=kind, shape=[q, n], batch=batch, variant=name, us=seconds * 1e6,
                        gb_s=sizes[name] / seconds / 1e9, share=sizes[name] / seconds / best, against_rows=found["rows"] / seconds,
                        against_bfloat16=found["bfloat16"] / seconds, error=error if name == "rows" else None, same_bits=same,
                    )  # fmt: skip
                del calls, whole, wide, size
            del made, planes, plain
            gc.collect()


@torch.no_grad()
def stored(run: Run, shapes: list[str], kinds: list[str], levels: list[str]) -> None:
    """Weights in formats of GGUF files: products, and whole steps beside the compiled step of the same shape in bfloat16."""
    best = ceiling(run)
    for shape in shapes:
        stored_rates(run, *((256, 512, 2) if run.dry else WIDTHS[shape]), kinds, best)
    for shape in shapes:
        known = "tiny" if run.dry else shape
        model = loading.random_model(known, dtype=run.dtype, device=run.device)
        ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(
            run.device
        )
        dense = Transformers(run, model, ids, compiled=True)
        formats, models = [*(k for k in kinds if k in QUANTISED), "bfloat16"], {}
        for kind, method in (*((k, None) for k in formats), *((k, "levels") for k in levels if k in formats)):
            if kind not in models:
                models[kind] = loading.random_model(known, dtype=run.dtype, device=run.device)
                if kind in QUANTISED:
                    loading.quantise_model(models[kind], kind)
            plan = None
            if method:
                plan = calibrate(
                    models[kind], methods.method(method), Windows(ids, PROMPT // 2), sparsity=0.8, name=shape
                )
            start = time.perf_counter()
            with Moyu(run, models[kind], plan, ids, general=False) as own:
                ready = time.perf_counter() - start
                dense.begin(), own.begin()
                found = run.seconds({"dense": dense, "own": own}, rounds=8, repeat=8)
                run.row(
                    part="stored", op="step", kind=kind, method=method, shape=shape, batch=1, ms=found["own"] * 1e3,
                    dense_ms=found["dense"] * 1e3, against_dense=found["dense"] / found["own"], loop_ms=own.loop() * 1e3,
                    ready_s=ready, trace=own.trace, because=own.session.general_because,
                )  # fmt: skip


def column_rates(run: Run, d: int, f: int, layers: int, best: float) -> None:
    """The column kernel on the widths of each projection."""
    for q, n in ((d + d // 2, d), (d, d), (2 * f, d), (d, f)):
        turned = [torch.randn(n, q, device=run.device).mul_(n**-0.5).to(run.dtype) for _ in range(layers)]
        plain = [t.t().contiguous() for t in turned]
        x = torch.randn(1, n, device=run.device).to(run.dtype)

        calls: dict[str, Callable] = {"dense": run.graph(partial(products, x, plain))}
        for kept in (1.0, 0.5, 0.3):
            level = float(x.abs().float().quantile(1 - kept)) if kept < 1 else -1.0
            thresholds = torch.full((q,), level, device=run.device)

            calls[f"kept {kept}"] = run.graph(partial(skipping_products, x, turned, thresholds))
        for name, seconds in run.seconds(calls).items():
            kept = 1.0 if name == "dense" else float(name.split()[1])
            needed = kept * layers * n * q * turned[0].itemsize
            run.row(
                part="kernels", op="columns", shape=[n, q], batch=1, variant=name, us_a_layer=seconds / layers * 1e6,
                gb_s=needed / seconds / 1e9, share=needed / seconds / best,
            )  # fmt: skip


@torch.no_grad()
def steps(run: Run, shapes: list[str], batches: list[int], shares: list[float], chosen: list[str] | None) -> None:
    """Whole decode steps: transformers' own on one model, MOYU's on another of the same weights."""
    for shape in shapes:
        known = "tiny" if run.dry else shape
        model, other = (loading.random_model(known, dtype=run.dtype, device=run.device) for _ in range(2))
        ids = torch.randint(3, model.config.vocab_size, (1, PROMPT), generator=torch.Generator().manual_seed(0))
        ids, plans = ids.to(run.device), dict[str, Plan | None]({"general": None, "joined": None})
        for name, method, sparsity in (
            *((f"neurons {share:.0%}", "griffin", share) for share in shares),
            ("columns 50%", "teal", 0.5),
        ):
            if chosen is not None and name not in chosen:
                continue
            windows = Windows(ids, PROMPT // 2)
            plans[name] = calibrate(other, methods.method(method), windows, sparsity=sparsity, name=shape)
        for batch in batches:
            rows = ids.expand(batch, -1)
            dense, eager = Transformers(run, model, rows, compiled=True), 1.0
            for name in (
                n for n in ("eager", *plans) if chosen is None or n in chosen
            ):  # each row is written before the next variant compiles
                start = time.perf_counter()
                with contextlib.ExitStack() as opened:
                    if name == "eager":
                        own: Transformers | Moyu = Transformers(run, model, rows, compiled=False)
                    else:
                        own = opened.enter_context(Moyu(run, other, plans[name], rows, general=name == "general"))
                    ready = time.perf_counter() - start
                    dense.begin(), own.begin()
                    found = run.seconds({"dense": dense, name: own}, rounds=8, repeat=8)
                    loop = own.loop() if isinstance(own, Moyu) else None
                gain = found["dense"] / found[name]
                eager = 1 / gain if name == "eager" else eager
                run.row(
                    part="steps", shape=shape, batch=batch, variant=name, ms=found[name] * 1e3, tok_s=batch / found[name],
                    dense_ms=found["dense"] * 1e3,
                    against_dense=gain, against_eager=gain * eager, ready_s=ready,
                    loop_ms=None if loop is None else loop * 1e3, trace=own.trace,
                )  # fmt: skip
            del dense, own
            torch.compiler.reset()
            gc.collect()
        del model, other


class Transformers:
    """transformers' own step after a prompt, always of the same token: its loop, or compiled with a static cache."""

    trace = None

    def __init__(self, run: Run, model: nn.Module, ids: Tensor, *, compiled: bool) -> None:
        """Compiles at the first calls, which happen here."""
        self.model, self.ids, self.token = model, ids, ids[:, :1].clone()
        self.step, self.static = model, None
        if compiled:
            self.static = StaticCache(config=model.config, max_cache_len=LENGTH)
            how = {"backend": "eager"} if run.dry else {"mode": "reduce-overhead"}
            self.step = torch.compile(model, fullgraph=True, **how)
        self.begin()
        for _ in range(1 if run.dry else 4):
            self()

    def begin(self) -> None:
        """Go back to the end of the prompt: a static cache has room for one timing only."""
        self.cache = DynamicCache(config=self.model.config) if self.static is None else self.static
        self.cache.reset()
        self.model(self.ids, past_key_values=self.cache)

    def __call__(self) -> Tensor:
        """The next token."""
        return self.step(self.token, past_key_values=self.cache, use_cache=True).logits[:, -1:].argmax(-1)


class Moyu(contextlib.AbstractContextManager):
    """MOYU's step after a prompt, as every command takes it; general: the step that takes any model and method."""

    def __init__(self, run: Run, model: nn.Module, plan: Plan | None, ids: Tensor, *, general: bool) -> None:
        """Compiles and captures at the first call, which happens here."""
        self.run, self.ids, self.token = run, ids, ids[:, 0].clone()
        self.session = Applied(model, plan)
        if general:
            self.session.native = None
        self.begin()
        self()

    def __exit__(self, *exc: object) -> None:
        """The model is as before."""
        self.session.restore()

    def begin(self) -> None:
        """Go back to the end of the prompt."""
        self.cache = new_cache(self.session)
        self.cache.expected = LENGTH
        for row in self.ids:
            own = new_cache(self.session)
            read(self.session, own, row[None], last=True)
            join(self.cache, own)

    def __call__(self) -> Tensor:
        """The next token of every row."""
        return step(self.session, self.cache, self.token).argmax(-1)

    def loop(self) -> float:
        """Seconds a token of `moyu.generate`, greedy, from the second token on."""
        count, times = 8 if self.run.dry else 128, []
        for _ in generate(self.session, self.ids, max_new_tokens=count, do_sample=False, eos_token_id=None):
            times.append(time.perf_counter())
        return (times[-1] - times[1]) / (count - 2)

    @property
    def trace(self) -> str:
        """Which implementation ran."""
        return self.session.traces.summary()


def main() -> None:
    """Parts in order, each by itself."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", default=["checks", "kernels", "packed", "stored", "steps"])
    parser.add_argument("--shapes", nargs="+", default=list(WIDTHS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
    parser.add_argument("--shares", nargs="+", type=float, default=[0.3, 0.5, 0.65, 0.8], help="neurons skipped")
    parser.add_argument(
        "--variants", nargs="+", help='of steps: eager, general, joined, "neurons 50%%", "columns 50%%"'
    )
    parser.add_argument("--kinds", nargs="+", default=["q8_0", "q4_0", "q4_k", "q6_k"], help="formats of `stored`")
    parser.add_argument(
        "--levels", nargs="*", default=["q8_0"], help="formats whose steps `stored` also times with levels"
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    run = Run(options)
    if "checks" in options.part:
        checks(run)
    if "kernels" in options.part:
        kernel_rates(run, options.shapes)
    if "packed" in options.part:
        packed_rates(run, [s for s in options.shapes if s == "llama-3-8b"])
    if "stored" in options.part:
        stored(run, [s for s in options.shapes if s in loading.SHAPES], options.kinds, options.levels)
    if "steps" in options.part:
        shapes = [s for s in options.shapes if s in loading.SHAPES]
        steps(run, shapes, options.batches, options.shares, options.variants)


if __name__ == "__main__":
    main()
