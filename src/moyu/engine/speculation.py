"""Generation that the dense model corrects: the sparse model drafts, the dense one verifies; same weights, same KV cache.

Lossless mode is speculative sampling (arXiv 2211.17192) with a model that drafts for itself: a drafted token is accepted with
probability min(1, p / q), p dense and q sparse, and in place of the first refused one a token is drawn from the positive part
of p - q. The text is distributed as the dense model's; greedy text is the dense model's, up to near-ties between kernels.
Sirius (arXiv 2409.03856) is the same loop with another rule: what dense finds likelier than a threshold stays. It is not
lossless. Either way every position that stays has the dense model's keys and values, and both models' logits pass through
the processors that `generate` applies at that position.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.cache_utils import DynamicLayer

from moyu.engine.cache import KvCache
from moyu.engine.generate import Draw, read, step
from moyu.engine.memory import memory_of
from moyu.engine.session import Session
from moyu.errors import UserError

# (drafted (D,), sparse (D, V), dense (D + 1, V), dense likelihoods of the drafted (D,), generator)
# -> (accepted tokens, the distribution (V,) of the token after them). Distributions are those that tokens are drawn from;
# likelihoods the model's own.
Rule = Callable[[Tensor, Tensor, Tensor, Tensor, torch.Generator | None], tuple[int, Tensor]]
COUNTING = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)  # a call is a token


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
    drafted: Tensor, sparse: Tensor, dense: Tensor, likelihoods: Tensor, generator: torch.Generator | None
) -> tuple[int, Tensor]:
    """The rule of speculative sampling: drafted (D,), q (D, V), p (D + 1, V) -> (accepted, distribution of the next)."""
    chances = acceptance(dense[:-1], sparse).gather(1, drafted[:, None])[:, 0]
    refused = (torch.rand(len(drafted), generator=generator, dtype=chances.dtype) >= chances).nonzero()
    accepted = int(refused[0]) if len(refused) else len(drafted)
    return accepted, dense[accepted] if accepted == len(drafted) else remainder(dense[accepted], sparse[accepted])


def sirius(threshold: float = 0.1) -> Rule:
    """Sirius' rule: text is kept up to the first token that dense finds less likely than `threshold`, in [0, 1]."""

    def rule(
        drafted: Tensor, sparse: Tensor, dense: Tensor, likelihoods: Tensor, generator: torch.Generator | None
    ) -> tuple[int, Tensor]:
        accepted = first_unlikely(likelihoods, threshold)
        return accepted, dense[accepted]

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

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of a generation that say how a token is drawn."""
        return {"do_sample": True, "temperature": self.temperature} if self.temperature else {"do_sample": False}


@dataclass
class Speculation:
    """What a generation has written so far, and what it took."""

    tokens: list[int] = field(default_factory=list)  # new ones
    margins: list[float] = field(default_factory=list)  # of each: how far the two largest dense scores are apart
    drafted: int = 0  # sparse steps
    accepted: int = 0  # of them
    judged: int = 0  # drafts that were looked at: a refusal ends its round
    passes: int = 0  # dense verifications, the prompt's pass apart
    draft_s: float = 0.0  # seconds
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
    session: Session,
    ids: Tensor,
    *,
    drafts: int = 4,
    rule: Rule = lossless,
    strict: bool = False,
    seed: int | None = None,
    out: Speculation | None = None,
    **settings: Any,
) -> Iterator[Tensor]:
    """Yield the tokens after `ids` (1, T), each (1,) int64: `drafts` sparse steps, then one dense pass over them, and again.

    session: the model with a plan. rule: `lossless`, or `sirius(threshold)`. seed, strict, settings: as of `generate`.
    out: notes what the text took. A sequence-level method keeps the prompt's masks. Raises UserError for a batch, an empty
    prompt, no drafts, settings that need each token's scores once and in order, and for a cache that cannot go back.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise UserError(f"drafting takes one prompt at a time, not ids of shape {tuple(ids.shape)}", "call it a row")
    if drafts < 1:
        raise UserError(f"{drafts} drafts", "draft at least 1 token")
    if session.controller is not None:
        raise UserError(
            f"{session.method_name!r} runs dense again by its own rule, which verification replaces",
            "draft with 'griffin', for example",
        )
    core: Any = session.model
    draw = Draw(core, list(ids), seed, settings)
    if any(isinstance(processor, COUNTING) for processor in draw.processors):
        raise UserError(
            "guidance and SynthID watermarks cannot take a drafted token back", "generate without correction"
        )
    cache = KvCache(core.config.get_text_config(decoder=True))
    _check_cache(cache, draw.criteria.max_length)
    out = Speculation() if out is None else out
    while True:
        start, written = time.perf_counter(), draw.ids.shape[1]
        _go_back(cache, written - 1)  # the last token is not read yet; nor is the prompt before the first round
        past = int(cache.get_seq_length())
        ahead, sparse = _draft(session, cache, draw, drafts if past else 0)
        if strict:
            session.traces.require_fastest()
        middle, drafted = time.perf_counter(), ahead.ids[0, written:]
        logits = _verify(session, cache, ahead.ids, past)[-1 - len(drafted) :]
        scores = torch.cat([draw.scores(ahead.ids[:, : written + i], row[None]) for i, row in enumerate(logits)])
        dense = draw.distribution(scores)
        likelihoods = logits[:-1].double().cpu().softmax(-1).gather(1, drafted[:, None])[:, 0]
        accepted, following = rule(drafted, torch.cat([dense[:0], *sparse]), dense, likelihoods, draw.generator)
        fresh = torch.cat([drafted[:accepted], draw.pick(following[None])])
        if past:
            out.draft_s += middle - start
            out.verify_s += time.perf_counter() - middle
            out.drafted += len(drafted)
            out.accepted += accepted
            out.judged += min(accepted + 1, len(drafted))
            out.passes += 1
        for token, own in zip(fresh.split(1), scores.split(1), strict=False):
            token, ended = draw.take(token, own)
            best = own[0].topk(2).values
            out.tokens.append(int(token))
            out.margins.append(float(best[0] - best[1]))
            yield token
            if ended:  # drafts and a token behind the end are dropped
                return


def _draft(session: Session, cache: KvCache, draw: Draw, most: int) -> tuple[Draw, list[Tensor]]:
    """Up to `most` sparse steps: a copy of `draw` with the tokens drawn, and the distributions (1, V) they were drawn from."""
    ahead, made = copy.copy(draw), []
    device = next(session.model.parameters()).device
    with session.prompt(int(cache.get_seq_length())):
        while len(made) < most and bool(ahead.unfinished.any()):
            scores = ahead.scores(ahead.ids, step(session, cache, ahead.ids[:, -1].to(device)))
            made.append(ahead.distribution(scores))
            ahead.take(ahead.pick(made[-1]), scores)
    return ahead, made


def _verify(session: Session, cache: KvCache, ids: Tensor, past: int) -> Tensor:
    """Dense logits of the ids (1, T) behind `past` verified ones, (T - past, V); their keys and values replace the drafts'.

    What a sequence-level method knows of the prompt stays what it was: refused drafts must not enter it.
    """
    _go_back(cache, past)
    memory = memory_of(cache)
    known = dict(memory.sites), dict(memory.masks), memory.dense_until
    logits = read(session, cache, ids[:, past:].to(next(session.model.parameters()).device))[0]
    if past:
        memory.sites, memory.masks, memory.dense_until = known
    return logits


def _go_back(cache: KvCache, length: int) -> None:
    """Forget what came after `length` tokens."""
    held = int(cache.get_seq_length())
    if held > length:
        cache.crop(length - held)


def _check_cache(cache: KvCache, length: int) -> None:
    if any(not isinstance(own, DynamicLayer) for own in cache.layers):
        raise UserError("this model's cache cannot go back to an earlier token", "generate without correction")
    windows = [own.sliding_window for own in cache.layers if hasattr(type(own), "is_sliding") and own.is_sliding]
    if windows and length >= min(windows):
        raise UserError(
            f"{length} tokens pass the sliding window of {min(windows)}, behind which the cache cannot go back",
            "write fewer tokens, or generate without correction",
        )
