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

from moyu import accounting, kernels, surgery
from moyu.applied import Applied
from moyu.choosers import Counter
from moyu.errors import UserError
from moyu.kernels import Backend
from moyu.plan import Plan
from moyu.surgery import Anatomy


@dataclass
class Timing:
    """Seconds of single decode steps, and what a step read."""

    seconds: list[float] = field(default_factory=list)
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
    """Dense and skipping variants timed in one run."""

    dense: Timing
    variants: dict[str, Timing]
    read_ceiling_gb_s: float
    peak_bytes: int
    rounds: int
    tokens: int


@torch.no_grad()
def compare(
    model: nn.Module,
    plans: dict[str, Plan],
    *,
    prompt: Tensor,
    tokens: int = 16,
    rounds: int = 2,
    backend: Backend = "auto",
    anatomy: Anatomy | None = None,
    read_ceiling: float | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Time `tokens` greedy steps after `prompt` (B, P), dense before every variant, `rounds` times.

    Dense is transformers' eager loop on the same weights. Raises UserError for an empty prompt or no tokens.
    """
    if prompt.shape[1] < 1 or tokens < 2:
        raise UserError("nothing to time", "use a prompt of at least 1 token and at least 2 new tokens")
    anatomy = anatomy or surgery.dissect(model)
    total = accounting.dense_step_bytes(model, anatomy)
    dense = Timing(step_bytes=total)
    variants = {name: Timing() for name in plans}
    ceiling = kernels.read_ceiling() if read_ceiling is None else read_ceiling
    done, steps = 0, rounds * max(1, len(plans))
    for _ in range(rounds):
        if not plans:
            dense.seconds += _steps(model, prompt, tokens)
        for name, plan in plans.items():
            dense.seconds += _steps(model, prompt, tokens)
            with Applied(model, plan, backend=backend, anatomy=anatomy, check=False) as applied:
                with applied.prompt(prompt.shape[1]):
                    variants[name].seconds += _steps(model, prompt, tokens)
                    if not variants[name].step_bytes:
                        _count(applied, model, prompt, variants[name], total, plan)
            done += 1
            if progress:
                progress(done, steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Comparison(dense, variants, ceiling, peak, rounds, tokens)


def _steps(model: nn.Module, prompt: Tensor, tokens: int) -> list[float]:
    """Seconds of each greedy decode step; the first, which warms up, is left out."""
    output = model(input_ids=prompt, use_cache=True)
    cache = output.past_key_values
    token = output.logits[:, -1:].argmax(-1)
    seconds = []
    for _ in range(tokens + 1):
        start = time.perf_counter()
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def _count(applied: Applied, model: nn.Module, prompt: Tensor, timing: Timing, total: float, plan: Plan) -> None:
    """What a step skips, counted on a few untimed steps."""
    steps = 4
    output: Any = model(input_ids=prompt, use_cache=True)
    cache, token = output.past_key_values, output.logits[:, -1:].argmax(-1)
    counter = Counter(len(prompt), prompt.shape[1] + steps + 1)
    with applied.watched(chooser=counter):
        for _ in range(steps):
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
            token = output.logits[:, -1:].argmax(-1)
    added = accounting.added_bytes(plan.method, plan.parts.values())
    timing.step_bytes = total - counter.skipped_bytes / (steps * len(prompt)) + added
    timing.byte_fraction = timing.step_bytes / total
    timing.realized_sparsity = counter.sparsity
    timing.sparsity_by_layer = counter.sparsity_by_layer
