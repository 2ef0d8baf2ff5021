"""Decoding speed: one process, alternating variants, beside transformers' own loop and the measured read ceiling."""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moyu import kernels
from moyu.engine.applied import Applied
from moyu.engine.cache import KvCache
from moyu.engine.choosers import Counter
from moyu.engine.generate import new_cache
from moyu.engine.memory import cache_of, given_cache
from moyu.errors import UserError
from moyu.kernels import BackendName
from moyu.measure import accounting
from moyu.measure.environment import last_level_cache, read_buffer
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.model.prompts import context_of
from moyu.plan import Plan


@dataclass
class Timing:
    """Seconds of single decode steps, and the bytes that a step reads."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first token, prompt included
    realized_sparsity: float = 0.0
    byte_fraction: float = 1.0
    step_bytes: float = 0.0
    step: str | None = None  # which implementation of a decode step ran, and why not a faster one
    sparsity_by_layer: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Seconds per token at a quantile in (0, 1)."""
        cuts = statistics.quantiles(self.seconds, n=100, method="inclusive")
        return cuts[round(share * 100) - 1]

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of the median step."""
        return 1.0 / self.quantile(0.5)

    @property
    def gb_s(self) -> float:
        """Gigabytes of weights read per second, by the bytes that a step must read."""
        return self.step_bytes / self.quantile(0.5) / 1e9


@dataclass(frozen=True)
class Comparison:
    """Variants timed in one run beside transformers' eager loop. "dense" is the variant without a plan, on MOYU's kernels."""

    eager: Timing
    variants: dict[str, Timing]
    read_ceiling_gb_s: float
    peak_bytes: int
    prompt_tokens: int


def check_positions(model: nn.Module, prompt: int, tokens: int) -> None:
    """Refuse more tokens, behind a prompt of so many, than the model has positions for."""
    limit = context_of(model)
    if limit is not None and prompt + tokens > limit:
        raise UserError(
            f"{prompt} tokens of prompt and {tokens} new ones are more than the {limit} that the model reads",
            f"use --tokens {limit - prompt} or fewer",
        )


@torch.no_grad()
def compare(
    model: nn.Module,
    plans: dict[str, Plan],
    *,
    prompt: Tensor,
    tokens: int = 16,
    rounds: int = 2,
    backend: BackendName = "auto",
    strict: bool = False,
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Time `tokens` greedy steps after `prompt` (B, P): eager, dense and one variant per plan, in turn, `rounds` times.

    All use the same weights in one process, on the device of `prompt`; read loops are timed in between. Raises UserError for
    an empty prompt, for fewer than 2 tokens or more than the model has positions for, and under strict for a step that is not
    the fastest there is.
    """
    if prompt.shape[1] < 1 or tokens < 2:
        raise UserError("nothing to time", "use a prompt of at least 1 token and at least 2 new tokens")
    check_positions(model, prompt.shape[1], tokens)
    anatomy = anatomy or dissect.dissect(model)
    total = accounting.dense_step_bytes(model, anatomy)
    device = prompt.device
    on_cpu, size = device.type == "cpu", read_buffer(last_level_cache())
    eager, ceiling = Timing(step_bytes=total), kernels.ReadCeiling(size) if on_cpu else _Ceiling(device)
    wanted: dict[str, Plan | None] = {"dense": None, **plans}
    variants = {name: Timing() for name in wanted}
    for turn in range(rounds):
        _time(eager, model, prompt, tokens)
        for done, (name, plan) in enumerate(wanted.items(), turn * len(wanted) + 1):
            ceiling.sample()
            with Applied(model, plan, backend=backend, anatomy=anatomy, check=False) as applied:
                with applied.prompt(prompt.shape[1]):
                    _time(variants[name], model, prompt, tokens, new_cache(applied))
                    if not variants[name].step_bytes:
                        _count(applied, model, prompt, variants[name], total, plan)
                variants[name].step = applied.traces.summary()
                if strict:
                    applied.traces.require_fastest()
            if progress:
                progress(done, rounds * len(wanted))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    return Comparison(eager, variants, ceiling.gb_s, peak, prompt.shape[1])


def _now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class _Ceiling:
    """How fast an accelerator reads its memory: the sum of a buffer that no cache holds, timed in between."""

    def __init__(self, device: torch.device, bytes: int = 1 << 30) -> None:
        self._buffer, self._seconds = torch.ones(bytes // 4, device=device), []
        self._buffer.sum()  # loads the kernel

    def sample(self) -> None:
        start = _now(self._buffer.device)
        self._buffer.sum()
        self._seconds.append(_now(self._buffer.device) - start)

    @property
    def gb_s(self) -> float:
        """The median, in GB/s (10^9)."""
        return self._buffer.nbytes / statistics.median(self._seconds) / 1e9


def _time(timing: Timing, model: nn.Module, prompt: Tensor, tokens: int, own: KvCache | None = None) -> None:
    """Time the prompt and each greedy decode step. The first step is a warm-up and does not count.

    own: MOYU's cache, which a compiled step needs; None: what the model makes itself.
    """
    start = _now(prompt.device)
    given = {} if own is None else given_cache(model, own)
    if own is not None:
        own.expected = prompt.shape[1] + tokens + 1  # else a step in between would move to twice the room
    output = model(input_ids=prompt, use_cache=True, **given)
    cache = given or given_cache(model, cache_of(output))
    token = output.logits[:, -1:].argmax(-1)
    timing.first.append(_now(prompt.device) - start)
    for step in range(tokens + 1):
        start = _now(prompt.device)
        output = model(input_ids=token, use_cache=True, **cache)
        token = output.logits[:, -1:].argmax(-1)
        if step:
            timing.seconds.append(_now(prompt.device) - start)


def _count(applied: Applied, model: nn.Module, prompt: Tensor, timing: Timing, total: float, plan: Plan | None) -> None:
    """Count the bytes that a step skips, on 4 untimed steps."""
    timing.step_bytes = total
    if plan is None:
        return
    steps = 4
    cache = given_cache(model, new_cache(applied))
    output: Any = model(input_ids=prompt, use_cache=True, **cache)
    token = output.logits[:, -1:].argmax(-1)
    counter = Counter(len(prompt), prompt.shape[1] + steps + 1)
    with applied.watched(chooser=counter):
        for _ in range(steps):
            output = model(input_ids=token, use_cache=True, **cache)
            token = output.logits[:, -1:].argmax(-1)
    added = accounting.added_bytes(plan, applied.anatomy)
    timing.step_bytes = total - counter.skipped_bytes / (steps * len(prompt)) + added
    timing.byte_fraction = timing.step_bytes / total
    timing.realized_sparsity = counter.sparsity
    timing.sparsity_by_layer = counter.sparsity_by_layer
