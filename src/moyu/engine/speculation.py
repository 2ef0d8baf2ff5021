"""Generation that the dense model corrects: the sparse model drafts, the dense one verifies; same weights, same KV cache.

Lossless mode is speculative sampling (arXiv 2211.17192) with a model that drafts for itself: a drafted token is accepted with
probability min(1, p / q), p dense and q sparse, and in place of the first refused one a token is drawn from the positive part
of p - q. The text is distributed as the dense model's; greedy text is the dense model's, up to near-ties between kernels.
Sirius (arXiv 2409.03856) is the same loop with another rule: what dense finds likelier than a threshold stays. It is not
lossless. Either way every position that stays has the dense model's keys and values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from moyu.engine.applied import Applied
from moyu.engine.memory import memory_of
from moyu.errors import UserError

# (drafted (D,), sparse (D, V), dense (D + 1, V), dense likelihoods of the drafted (D,), generator)
# -> (accepted tokens, the token after them). Distributions are those that tokens are drawn from; likelihoods the model's own.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator], tuple[int, int]]


def acceptance(dense: Tensor, sparse: Tensor) -> Tensor:
    """min(1, p / q) for every token: probabilities p, q (..., V) -> (..., V); 1 where q is 0, which is never drawn."""
    return torch.where(sparse > 0, dense / sparse, 1.0).clamp(max=1.0)


def remainder(dense: Tensor, sparse: Tensor) -> Tensor:
    """The distribution of a token that replaces a refused one: (p - q)+ over its sum, (..., V); p where p = q."""
    rest = (dense - sparse).clamp(min=0)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, dense)


def first_unlikely(likelihoods: Tensor, threshold: float) -> int:
    """Sirius' trigger: the index of the first of D tokens whose dense likelihood is below `threshold`; D where none is."""
    below = (likelihoods < threshold).nonzero()
    return int(below[0]) if len(below) else len(likelihoods)


def lossless(
    drafted: Tensor, sparse: Tensor, dense: Tensor, likelihoods: Tensor, generator: torch.Generator
) -> tuple[int, int]:
    """The rule of speculative sampling: drafted (D,), q (D, V), p (D + 1, V) -> (accepted, next token)."""
    chances = acceptance(dense[:-1], sparse).gather(1, drafted[:, None])[:, 0]
    refused = (torch.rand(len(drafted), generator=generator, dtype=chances.dtype) >= chances).nonzero()
    accepted = int(refused[0]) if len(refused) else len(drafted)
    following = dense[accepted] if accepted == len(drafted) else remainder(dense[accepted], sparse[accepted])
    return accepted, _draw(following, generator)


def sirius(threshold: float = 0.1) -> Rule:
    """Sirius' rule: text is kept up to the first token that dense finds less likely than `threshold`, in [0, 1]."""

    def rule(
        drafted: Tensor, sparse: Tensor, dense: Tensor, likelihoods: Tensor, generator: torch.Generator
    ) -> tuple[int, int]:
        accepted = first_unlikely(likelihoods, threshold)
        return accepted, _draw(dense[accepted], generator)

    return rule


def expected_speedup(accepted: float, drafts: int, step_cost: float, verify_cost: float) -> float:
    """Tokens a dense step's time: (1 - b^(D + 1)) / (1 - b) / (D c + v), for an acceptance b taken independent.

    `step_cost` c and `verify_cost` v are times of a sparse step and of a verification, in dense steps.
    """
    tokens = drafts + 1 if accepted == 1 else (1 - accepted ** (drafts + 1)) / (1 - accepted)
    return tokens / (drafts * step_cost + verify_cost)


def best_drafts(accepted: float, step_cost: float, verify_cost: float, most: int = 16) -> int:
    """The draft length of 1 to `most` with the largest expected speed-up; first of equals."""
    return max(range(1, most + 1), key=lambda d: expected_speedup(accepted, d, step_cost, verify_cost))


@dataclass(frozen=True)
class Correction:
    """How dense corrects drafts: `rule` "lossless", or "sirius" with its `threshold`."""

    rule: str
    drafts: int
    temperature: float = 0.0
    threshold: float = 0.1

    @property
    def decide(self) -> Rule:
        """The rule itself."""
        return lossless if self.rule == "lossless" else sirius(self.threshold)


@dataclass
class Speculation:
    """What a generation wrote and what it took."""

    tokens: list[int] = field(default_factory=list)  # new ones
    margins: list[float] = field(
        default_factory=list
    )  # of each: the two largest dense logits apart, near-ties are small
    drafted: int = 0  # sparse steps
    accepted: int = 0  # of them
    judged: int = 0  # drafts that were looked at: a refusal ends its round
    passes: int = 0  # dense verifications, the prompt's pass apart
    first_token_s: float = 0.0  # seconds of the prompt's pass
    draft_s: float = 0.0
    verify_s: float = 0.0

    @property
    def acceptance(self) -> float:
        """Accepted of the drafts that were looked at."""
        return self.accepted / max(1, self.judged)

    @property
    def tokens_per_pass(self) -> float:
        """New tokens a dense pass, the first token (the prompt's) apart."""
        return (len(self.tokens) - 1) / max(1, self.passes)

    @property
    def tok_s(self) -> float | None:
        """New tokens a second after the first; None for a single token."""
        return (len(self.tokens) - 1) / (self.draft_s + self.verify_s) if len(self.tokens) > 1 else None

    def byte_fraction(self, sparse: float) -> float:
        """Bytes of the N - 1 tokens after the first over those of as many dense steps; `sparse` is a sparse step's fraction.

        A verification reads the weights once, whatever it verifies.
        """
        return (self.drafted * sparse + self.passes) / max(1, len(self.tokens) - 1)


@torch.no_grad()
def speculate(
    applied: Applied,
    ids: Tensor,
    new_tokens: int,
    *,
    drafts: int = 4,
    temperature: float = 0.0,
    rule: Rule = lossless,
    ends: Sequence[int] = (),
    seed: int = 0,
) -> Speculation:
    """Write `new_tokens` after `ids` (1, T): `drafts` sparse steps, then one dense pass over them, until it is done.

    applied: the model with a plan. temperature 0 is greedy. rule: `lossless`, or `sirius(threshold)`. Stops behind a token
    of `ends`. A sequence-level method keeps the prompt's masks. Raises UserError for a batch, an empty prompt, no drafts,
    and for a cache that cannot go back.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise UserError(f"drafting takes one prompt at a time, not ids of shape {tuple(ids.shape)}", "call it a row")
    if drafts < 1 or new_tokens < 1 or temperature < 0:
        raise UserError(
            f"{drafts} drafts, {new_tokens} new tokens, temperature {temperature}",
            "at least 1 draft, 1 token, and a temperature of 0 (greedy) or more",
        )
    if applied.controller is not None:
        raise UserError(
            f"{applied.method_name!r} runs dense again by its own rule, which verification replaces",
            "draft with 'griffin', for example",
        )
    model: Any = applied.model
    generator = torch.Generator().manual_seed(seed)
    out = Speculation()
    start = time.perf_counter()
    with applied.prompt(ids.shape[1]):
        first = model(input_ids=ids, use_cache=True)
    cache = first.past_key_values
    _check_cache(cache, ids.shape[1] + new_tokens + drafts)
    token = _draw(_probabilities(first.logits[0, -1:], temperature)[0], generator)
    _keep(out, [token], first.logits[0, -1:])
    out.first_token_s = time.perf_counter() - start
    while len(out.tokens) < new_tokens and token not in ends:
        length = int(cache.get_seq_length())
        count = min(drafts, new_tokens - len(out.tokens))
        start = time.perf_counter()
        drafted, sparse = _draft(applied, cache, token, count, temperature, generator)
        middle = time.perf_counter()
        logits = _verify(applied, cache, [token, *drafted.tolist()], length)
        dense = _probabilities(logits, temperature)
        likelihoods = logits[:-1].double().cpu().softmax(-1).gather(1, drafted[:, None])[:, 0]
        accepted, token = rule(drafted, sparse, dense, likelihoods, generator)
        fresh = [*drafted[:accepted].tolist(), token]
        stop = next((i for i, t in enumerate(fresh) if t in ends), len(fresh) - 1)
        fresh = fresh[: min(stop + 1, new_tokens - len(out.tokens))]
        token = fresh[-1]
        _keep(out, fresh, logits)
        _go_back(cache, length + len(fresh))
        out.draft_s += middle - start
        out.verify_s += time.perf_counter() - middle
        out.drafted += count
        out.accepted += accepted
        out.judged += min(accepted + 1, count)
        out.passes += 1
    return out


def _draft(
    applied: Applied, cache: Any, token: int, count: int, temperature: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`count` sparse steps: the tokens drawn (count,) and the distributions that they were drawn from (count, V)."""
    length, tokens, made = int(cache.get_seq_length()), [token], []
    device = next(applied.model.parameters()).device
    with applied.prompt(length):
        for _ in range(count):
            step: Any = applied.model(
                input_ids=torch.tensor([[tokens[-1]]], device=device), past_key_values=cache, use_cache=True
            )
            made.append(_probabilities(step.logits[0, -1:], temperature)[0])
            tokens.append(_draw(made[-1], generator))
    return torch.tensor(tokens[1:]), torch.stack(made)


def _verify(applied: Applied, cache: Any, tokens: list[int], length: int) -> Tensor:
    """Dense logits (len(tokens), V) of tokens that follow `length` verified ones; their keys and values replace the drafts'.

    What a sequence-level method knows stays what it knew: refused drafts must not enter it.
    """
    _go_back(cache, length)
    memory = memory_of(cache)
    known = dict(memory.sites), dict(memory.masks), memory.dense_until
    device = next(applied.model.parameters()).device
    with applied.prompt(length + len(tokens)):
        out: Any = applied.model(input_ids=torch.tensor([tokens], device=device), past_key_values=cache, use_cache=True)
    memory.sites, memory.masks, memory.dense_until = known
    return out.logits[0]


def _go_back(cache: Any, length: int) -> None:
    """Forget what came after `length` tokens."""
    held = int(cache.get_seq_length())
    if held > length:
        cache.crop(length - held)


def _check_cache(cache: Any, length: int) -> None:
    layers = getattr(cache, "layers", [None])
    if any(not isinstance(own, DynamicLayer) for own in layers):
        raise UserError("this model's cache cannot go back to an earlier token", "generate without correction")
    windows = [own.sliding_window for own in layers if hasattr(type(own), "is_sliding") and own.is_sliding]
    if windows and length >= min(windows):
        raise UserError(
            f"{length} tokens pass the sliding window of {min(windows)}, behind which the cache cannot go back",
            "write fewer tokens, or generate without correction",
        )


def _probabilities(logits: Tensor, temperature: float) -> Tensor:
    """(N, V) -> (N, V) float64 on the CPU; all on the largest where the temperature is 0."""
    logits = logits.double().cpu()
    if temperature == 0:
        return torch.zeros_like(logits).scatter_(1, logits.argmax(1, keepdim=True), 1.0)
    return (logits / temperature).softmax(-1)


def _draw(probabilities: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(probabilities, 1, generator=generator))


def _keep(out: Speculation, tokens: list[int], logits: Tensor) -> None:
    """Note new tokens, the i-th of which the i-th row of dense logits speaks about."""
    best = logits[: len(tokens)].float().topk(2).values
    out.tokens += tokens
    out.margins += (best[:, 0] - best[:, 1]).tolist()
