"""Decoding speed: one process, variants alternating, against transformers' own loop and the measured read ceiling."""

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
from moyu.engine.choosers import Counter
from moyu.errors import UserError
from moyu.kernels import Asked
from moyu.measure import accounting
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.plan import Plan


@dataclass
class Timing:
    """Seconds of single decode steps, and what a step read."""

    seconds: list[float] = field(default_factory=list)
    first: list[float] = field(default_factory=list)  # seconds to the first token, prompt included
    realized_sparsity: float = 0.0
    byte_fraction: float = 1.0
    step_bytes: float = 0.0
    sparsity_by_layer: list[float] = field(default_factory=list)

    def quantile(self, share: float) -> float:
        """Seconds a token at a quantile in (0, 1)."""
        cuts = statistics.quantiles(self.seconds, n=100, method="inclusive")
        return cuts[round(share * 100) - 1]

    @property
    def tokens_per_second(self) -> float:
        """From the median step."""
        return 1.0 / self.quantile(0.5)

    @property
    def gb_s(self) -> float:
        """Gigabytes of weights a second, counted from what must be read."""
        return self.step_bytes / self.quantile(0.5) / 1e9


@dataclass(frozen=True)
class Comparison:
    """Variants timed in one run beside transformers' eager loop. The variant of no plan, "dense", runs on MOYU's kernels."""

    eager: Timing
    variants: dict[str, Timing]
    read_ceiling_gb_s: float
    peak_bytes: int
    prompt_tokens: int


@torch.no_grad()
def compare(
    model: nn.Module,
    plans: dict[str, Plan],
    *,
    prompt: Tensor,
    tokens: int = 16,
    rounds: int = 2,
    backend: Asked = "auto",
    anatomy: Anatomy | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Time `tokens` greedy steps after `prompt` (B, P): eager, dense, and a variant a plan, in turn, `rounds` times.

    All are the same weights in one process, with the read loops timed in between. Raises UserError for an empty prompt or
    no tokens.
    """
    if prompt.shape[1] < 1 or tokens < 2:
        raise UserError("nothing to time", "use a prompt of at least 1 token and at least 2 new tokens")
    anatomy = anatomy or dissect.dissect(model)
    total = accounting.dense_step_bytes(model, anatomy)
    eager, ceiling = Timing(step_bytes=total), kernels.ReadCeiling()
    wanted: dict[str, Plan | None] = {"dense": None, **plans}
    variants = {name: Timing() for name in wanted}
    for turn in range(rounds):
        _time(eager, model, prompt, tokens)
        for done, (name, plan) in enumerate(wanted.items(), turn * len(wanted) + 1):
            ceiling.sample()
            with Applied(model, plan, backend=backend, anatomy=anatomy, check=False) as applied:
                with applied.prompt(prompt.shape[1]):
                    _time(variants[name], model, prompt, tokens)
                    if not variants[name].step_bytes:
                        _count(applied, model, prompt, variants[name], total, plan)
            if progress:
                progress(done, rounds * len(wanted))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Comparison(eager, variants, ceiling.gb_s, peak, prompt.shape[1])


def _time(timing: Timing, model: nn.Module, prompt: Tensor, tokens: int) -> None:
    """Add the seconds of the prompt and of each greedy decode step; the first step, which warms up, is left out."""
    start = time.perf_counter()
    output = model(input_ids=prompt, use_cache=True)
    cache = output.past_key_values
    token = output.logits[:, -1:].argmax(-1)
    timing.first.append(time.perf_counter() - start)
    for step in range(tokens + 1):
        start = time.perf_counter()
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        if step:
            timing.seconds.append(time.perf_counter() - start)


def _count(applied: Applied, model: nn.Module, prompt: Tensor, timing: Timing, total: float, plan: Plan | None) -> None:
    """What a step skips, counted on a few untimed steps."""
    timing.step_bytes = total
    if plan is None:
        return
    steps = 4
    output: Any = model(input_ids=prompt, use_cache=True)
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    counter = Counter(len(prompt), prompt.shape[1] + steps + 1)
    with applied.watched(chooser=counter):
        for _ in range(steps):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
    added = accounting.added_bytes(plan, applied.anatomy)
    timing.step_bytes = total - counter.skipped_bytes / (steps * len(prompt)) + added
    timing.byte_fraction = timing.step_bytes / total
    timing.realized_sparsity = counter.sparsity
    timing.sparsity_by_layer = counter.sparsity_by_layer
