"""Quality under a protocol: positions before P are dense, positions from P on are sparse and scored."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moyu.engine.applied import Applied
from moyu.engine.choosers import Counter, Matched
from moyu.errors import UserError
from moyu.measure import accounting
from moyu.measure.windows import Windows
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.plan import Plan


@dataclass(frozen=True)
class Scores:
    """One value per scored token, (B, T - P - 1), float32."""

    nll: Tensor  # nats
    kl: Tensor  # KL(dense || sparse), nats
    agree: Tensor  # bool, the same most likely token

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood."""
        return math.exp(min(float(self.nll.double().mean()), 700.0))


@dataclass(frozen=True)
class Quality:
    """The quality of a plan on held-out windows. Units are masked, not skipped; every scored position is sparse."""

    dense: Scores
    method: Scores
    random: Scores | None
    oracle: Scores | None
    realized_sparsity: float
    sparsity_by_layer: list[float]
    byte_fraction: float
    floor: float
    tokens: int
    text_bytes: int | None  # bytes of the scored tokens

    def bits_per_byte(self, scores: Scores) -> float | None:
        """Bits per byte of text under one of this object's scores; None if the bytes are unknown."""
        return None if not self.text_bytes else bits_per_byte(float(scores.nll.double().sum()), self.text_bytes)


def bits_per_byte(nats: float, text_bytes: int) -> float:
    """Bits per byte: the summed negative log-likelihood of tokens over the bytes of the same tokens."""
    return nats / math.log(2) / text_bytes


@torch.no_grad()
def evaluate(model: nn.Module, plan: Plan, windows: Windows, **options: Any) -> Quality:
    """Evaluate one plan; options are those of `evaluate_all`."""
    return evaluate_all(model, {plan.method.name: plan}, windows, **options)[plan.method.name]


@torch.no_grad()
def evaluate_all(
    model: nn.Module,
    plans: Mapping[str, Plan],
    windows: Windows,
    *,
    matched: bool | int = True,
    batch: int = 16,
    anatomy: Anatomy | None = None,
    text_bytes: int | None = None,
    reference: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Quality]:
    """Evaluate plans on windows (B, T) with boundary P = windows.prompt. The dense model runs once for all of them.

    text_bytes: bytes of the scored tokens (`moyu.measure.text.scored_bytes`), for bits per byte.
    reference: log-probabilities (B, T - P - 1, V) to compare with (`predict`), if not those of this model run dense.
    matched: also run the matched random and the matched oracle (same sites, same counts per site and row); a number: on so
    many windows, the first ones.
    Raises UserError for a sequence-level method with P = 0 and for windows without a scored position.
    """
    for plan in plans.values():
        if plan.method.granularity == "sequence" and windows.prompt < 1:
            raise UserError(f"method {plan.method.name!r} decides from the prompt", "use a protocol with prompt >= 1")
    if windows.tokens.shape[1] - windows.prompt < 2:
        raise UserError("no position is scored", f"use windows longer than {windows.prompt + 1} tokens")
    anatomy = anatomy or dissect.dissect(model)
    several = len(windows.tokens) if matched is True else int(matched)
    batches = windows.tokens.split(batch)
    found = {name: _Found() for name in plans}
    if progress:
        progress(0, len(batches) * len(plans))
    for index, tokens in enumerate(batches):
        first = index * batch
        dense = _log_probs(model, tokens, windows.prompt) if reference is None else reference[first : first + batch]
        own = _score(dense, dense, tokens[:, windows.prompt + 1 :])
        for done, (name, plan) in enumerate(plans.items()):
            with Applied(model, plan, engine="mask", anatomy=anatomy, check=index == 0) as applied:
                found[name].parts["dense"].append(own)
                found[name].add(applied, tokens, windows.prompt, dense, max(0, several - first))
            if progress:
                progress(index * len(plans) + done + 1, len(batches) * len(plans))
    positions = len(windows.tokens) * (windows.tokens.shape[1] - windows.prompt)
    return {name: own.quality(model, plans[name], anatomy, positions, text_bytes) for name, own in found.items()}


@torch.no_grad()
def read_fraction(model: nn.Module, plan: Plan, windows: Windows, anatomy: Anatomy, batch: int = 16) -> float:
    """The byte fraction that `evaluate` finds, from one pass: no dense run, and no log-probabilities."""
    total, skipped = accounting.dense_step_bytes(model, anatomy), 0.0
    with Applied(model, plan, engine="mask", anatomy=anatomy, check=False) as applied:
        for tokens in windows.tokens.split(batch):
            counter = Counter(*tokens.shape)
            with applied.prompt(windows.prompt), applied.watched(chooser=counter):
                _logits(applied.model, tokens, windows.prompt)
            skipped += counter.skipped_bytes
    positions = len(windows.tokens) * (windows.tokens.shape[1] - windows.prompt)
    return (total - skipped / positions + accounting.added_bytes(plan, anatomy)) / total


class _Found:
    """What the batches of one plan gave so far."""

    def __init__(self) -> None:
        self.counters: list[Counter] = []
        self.parts: dict[str, list[Scores]] = {"dense": [], "method": [], "random": [], "oracle": []}

    def add(self, applied: Applied, tokens: Tensor, prompt: int, dense: Tensor, matched: int) -> None:
        """Run a batch of windows; the matched references on at most `matched` of them."""
        targets = tokens[:, prompt + 1 :]
        counter = Counter(*tokens.shape)
        self.counters.append(counter)
        runs: dict[str, Any] = {"method": (counter, len(tokens))}
        if matched and applied.plan is not None:
            kind = applied.plan.method.granularity
            runs |= {name: (Matched(counter, name, kind), matched) for name in ("random", "oracle")}
        for name, (chooser, count) in runs.items():
            with applied.prompt(prompt), applied.watched(chooser=chooser):
                log_probs = _log_probs(applied.model, tokens[:count], prompt)
            self.parts[name].append(_score(dense[:count], log_probs, targets[:count]))

    def quality(
        self, model: nn.Module, plan: Plan, anatomy: Anatomy, positions: int, text_bytes: int | None
    ) -> Quality:
        """All batches together, of which `positions` were sparse."""
        total = accounting.dense_step_bytes(model, anatomy)
        skipped = sum(c.skipped_bytes for c in self.counters) / positions
        added = accounting.added_bytes(plan, anatomy)
        merged = {name: _merge(p) if p else None for name, p in self.parts.items()}
        assert merged["dense"] is not None and merged["method"] is not None
        sizes = [len(c.kept[next(iter(c.kept))]) for c in self.counters]
        return Quality(
            dense=merged["dense"],
            method=merged["method"],
            random=merged["random"],
            oracle=merged["oracle"],
            realized_sparsity=sum(c.sparsity * n for c, n in zip(self.counters, sizes, strict=True)) / sum(sizes),
            sparsity_by_layer=torch.tensor([c.sparsity_by_layer for c in self.counters]).mean(0).tolist(),
            byte_fraction=(total - skipped + added) / total,
            floor=accounting.floor(model, anatomy, plan.method),
            tokens=merged["method"].nll.numel(),
            text_bytes=text_bytes,
        )


@torch.no_grad()
def predict(model: nn.Module, windows: Windows, batch: int = 16) -> Tensor:
    """Log-probabilities (B, T - P - 1, V) of a dense model at the scored tokens."""
    return torch.cat([_log_probs(model, tokens, windows.prompt) for tokens in windows.tokens.split(batch)])


def score(reference: Tensor, log_probs: Tensor, windows: Windows) -> Scores:
    """Scores of one model's log-probabilities against a reference; both come from `predict`."""
    return _score(reference, log_probs, windows.tokens[:, windows.prompt + 1 :])


def _log_probs(model: nn.Module, tokens: Tensor, prompt: int) -> Tensor:
    """(B, T - P - 1, V) log-probabilities, on the CPU, that positions P .. T - 2 give to their next token."""
    logits = _logits(model, tokens, prompt)[:, :-1]
    if not bool((logits.amax(-1) < torch.inf).all()):  # NaN too
        raise UserError(
            "logits are not finite, so no text can be scored by them",
            "load the model in another type, or make its plan again",
        )
    logits = logits.float()
    for window in logits:
        window.copy_(window.log_softmax(-1))
    return logits.cpu()


def _logits(model: nn.Module, tokens: Tensor, prompt: int) -> Tensor:
    """(B, T - P, V) at positions from P on."""
    tokens = tokens.to(next(model.parameters()).device)
    # The head of a large vocabulary takes as long as all layers: it reads the scored positions alone where it can.
    few = {"logits_to_keep": tokens.shape[1] - prompt} if dissect.keeps_logits(model) else {}
    return model(input_ids=tokens, use_cache=False, **few).logits[:, prompt - tokens.shape[1] :]


def _score(reference: Tensor, log_probs: Tensor, targets: Tensor) -> Scores:
    """Window after window: what a window of a large vocabulary takes is some 100 MB."""
    each = zip(reference, log_probs, targets, strict=True)
    return _merge([_score_one(*(t[None] for t in window)) for window in each])


def _score_one(reference: Tensor, log_probs: Tensor, targets: Tensor) -> Scores:
    kl = (reference.exp() * (reference - log_probs)).sum(-1)
    nll = -log_probs.gather(-1, targets[..., None]).squeeze(-1)
    return Scores(nll, kl, reference.argmax(-1) == log_probs.argmax(-1))


def _merge(parts: list[Scores]) -> Scores:
    return Scores(*(torch.cat([getattr(p, n) for p in parts]) for n in ("nll", "kl", "agree")))
