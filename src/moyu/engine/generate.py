"""Tokens one after another: prefill, step, draw. The loop that the command line, speculation, timing and a server share."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from moyu.engine.applied import Applied
from moyu.engine.cache import KvCache
from moyu.engine.memory import given_cache, memory_of, remember
from moyu.engine.session import Session
from moyu.errors import UserError, line_of
from moyu.kernels import BackendName
from moyu.plan import Plan

CHUNK = (
    256  # tokens of a prompt that are read at once: a server steps other sequences in between, and its texts are these
)

NO_SCORES = torch.empty(1, 0)  # what criteria see where nothing but the largest logit was asked for
EXPECTED = 4096  # positions that a cache is told to expect at most: a limit of 100,000 tokens is seldom reached


@torch.no_grad()
def generate(
    model: nn.Module | Session,
    prompts: Tensor | Sequence[Tensor],
    plan: Plan | None = None,
    *,
    backend: BackendName = "auto",
    strict: bool = False,
    seed: int | None = None,
    cache: KvCache | None = None,
    **settings: Any,
) -> Iterator[Tensor]:
    """Yield the next token of every prompt, (B,) int64, until all have ended.

    model: a model, which runs under `plan` (None: dense, on MOYU's kernels), or one with a plan applied already.
    prompts: ids (B, T) of equal lengths, or a sequence of (T,) of any. settings: whatever the model's generation config has
    (max_new_tokens, do_sample, temperature, repetition_penalty, eos_token_id, ...); what is not given is the config's own.
    cache: what holds the first tokens of the prompt already, of one prompt; it is read on from there, and holds afterwards all
    but the last token. seed: of the draws; None takes torch's global generator. strict: refuse a step that is not the fastest.
    A sequence that has ended yields the pad token. The cache, and which implementation of a step ran, are the session's to tell
    (`Session.traces`).

    Raises UserError for an empty prompt, for settings that are no single draw a step (beams, assistants), for a plan or a back
    end beside an applied plan, and under strict.
    """
    rows = [row.reshape(-1) for row in prompts]
    if not rows or any(len(row) == 0 for row in rows):
        raise UserError("a prompt has no token", "give at least one token, for example the tokenizer's first")
    loaded = None if plan is not None else vars(model).get("moyu_applied")  # by `from_pretrained`, with its plan
    given = model if isinstance(model, Session) else loaded
    if given is not None and (plan is not None or backend not in ("auto", given.backend)):
        raise UserError(
            "a plan is applied already, and another plan or back end was asked for",
            "leave `plan` and `backend` out, or give the model itself after restore()",
        )
    manager = nullcontext(given) if given is not None else Applied(model, plan, backend=backend)  # pyright: ignore
    with manager as session:
        core: Any = session.model
        device = next(core.parameters()).device
        draw = Draw(core, rows, seed, settings)
        cache = new_cache(session) if cache is None else cache
        cache.expected = min(draw.longest, EXPECTED)
        logits = prefill(session, cache, [row.to(device) for row in rows])
        if draw.greedy and session.native is not None and session.native.waits_for_nobody:
            yield from _ahead(session, cache, draw, logits, strict)
            return
        while True:
            tokens, ended = draw(logits)
            yield tokens
            if ended:
                return
            logits = step(session, cache, tokens.to(device))
            if strict:
                session.traces.require_fastest()


def _ahead(session: Session, cache: KvCache, draw: Draw, logits: Tensor, strict: bool) -> Iterator[Tensor]:
    """The loop where a step is only begun by the host: the next step begins before the host reads the token it is of.

    So the device never waits for the host, which takes 1 ms between steps of 5 ms. The step behind the last token is undone.
    """
    ended = False
    while not ended:
        found = Found(*logits.max(-1))
        before, seen = cache.lengths, memory_of(cache).seen
        logits = step(session, cache, found.tokens)
        try:
            tokens, ended = draw.found(found)
            if strict:
                session.traces.require_fastest()
            if ended:
                cache.hold(before)
                memory_of(cache).seen = seen
            yield tokens
        except BaseException:  # whoever leaves here finds the cache as it was when the token was drawn
            cache.hold(before)
            memory_of(cache).seen = seen
            raise


class Found:
    """The likeliest tokens (B,), on their way to the host."""

    def __init__(self, largest: Tensor, tokens: Tensor) -> None:
        """largest: their logits (B,)."""
        self.tokens, self._copied = tokens, None
        both = torch.stack([tokens, (largest < torch.inf).long()])  # NaN is the largest of its row, and below nothing
        if both.is_cuda:
            self._host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self._host.copy_(both, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record()
        else:
            self._host = both

    def read(self) -> Tensor:
        """The tokens (B,) on the CPU, once they are there. Raises UserError where a logit is NaN or +infinity."""
        if self._copied is not None:
            self._copied.synchronize()
        _require(bool(self._host[1].all()))
        return self._host[0]


def prefill(session: Session, cache: KvCache, rows: list[Tensor]) -> Tensor:
    """Run densely what `cache` lacks of the prompts; logits (B, V) behind each. Prompts of different lengths run one by one."""
    if len({len(row) for row in rows}) == 1:
        while (done := int(cache.get_seq_length())) < len(rows[0]) - CHUNK:
            read(session, cache, torch.stack(rows)[:, done : done + CHUNK], last=True)
        return read(session, cache, torch.stack(rows)[:, done:], last=True)[:, -1]
    made = []
    for row in rows:
        own = new_cache(session)
        made.append(prefill(session, own, [row]))
        join(cache, own)
    return torch.cat(made)


def new_cache(session: Session) -> KvCache:
    """An empty cache for the session's model."""
    return KvCache(session.model.config.get_text_config(decoder=True))  # pyright: ignore


def read(session: Session, cache: KvCache, ids: Tensor, *, last: bool = False) -> Tensor:
    """Run ids (B, T) densely behind what `cache` holds; their logits (B, T, V), or (B, 1, V) of the last where that is enough."""
    kwargs: dict[str, Any] = {"input_ids": ids, "use_cache": True, **given_cache(session.model, cache)}
    if last and "logits_to_keep" in inspect.signature(session.model.forward).parameters:
        kwargs["logits_to_keep"] = 1
    with session.prompt(int(cache.get_seq_length()) + ids.shape[1]):
        out: Any = session.model(**kwargs)
    return out.logits


def join(cache: KvCache, other: KvCache) -> None:
    """Let the rows of `other` take part in the steps of `cache`, behind its own rows."""
    empty = not len(cache.lengths)
    memory = memory_of(other) if empty else memory_of(cache).joined(memory_of(other), cache.lengths, other.lengths)
    cache.join(other)
    remember(cache, memory)


def leave(cache: KvCache, keep: Tensor) -> None:
    """Let only the rows at `keep` (M,) int64 take part in the steps to come."""
    cache.batch_select_indices(keep)
    memory = memory_of(cache)
    memory.seen = min(memory.seen, int(cache.get_seq_length()))  # of the longest row, which may have left


def step(session: Session, cache: KvCache, tokens: Tensor) -> Tensor:
    """One decode step: the next token of every row, (B,) -> logits (B, V)."""
    kwargs: dict[str, Any] = {"input_ids": tokens[:, None], "use_cache": True, **given_cache(session.model, cache)}
    if cache.ragged:
        lengths = cache.lengths.to(tokens.device)
        kwargs["position_ids"] = lengths[:, None]
        kwargs["attention_mask"] = (
            torch.arange(int(lengths.max()) + 1, device=tokens.device) <= lengths[:, None]
        ).long()
    out: Any = session.model(**kwargs)
    return out.logits[:, -1]


class Draw:
    """Draws tokens as transformers does for the model's generation config: the same processors and stopping criteria."""

    def __init__(self, model: Any, prompts: list[Tensor], seed: int | None, settings: dict[str, Any]) -> None:
        """settings: of the generation config, in place of the model's own."""
        longest = max(map(len, prompts))
        try:
            config = _complete(model, settings, longest)
            pad = config.pad_token_id
            self.pad = 0 if pad is None else int(pad)
            self.ids = torch.stack(
                [torch.nn.functional.pad(p.cpu(), (longest - len(p), 0), value=self.pad) for p in prompts]
            )
            self.processors = model._get_logits_processor(
                generation_config=config,
                input_ids_seq_length=longest,
                encoder_input_ids=self.ids,
                prefix_allowed_tokens_fn=None,
                logits_processor=LogitsProcessorList(),
                device="cpu",
                model_kwargs={},
            )
            self.criteria = model._get_stopping_criteria(
                generation_config=config, stopping_criteria=StoppingCriteriaList()
            )
        except UserError:
            raise
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:  # of a setting of another type or size
            raise UserError(line_of(error), "see transformers.GenerationConfig") from error
        self.longest = int(config.max_length)  # tokens of a sequence in the end
        self.sample = bool(config.do_sample)
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)
        self.unfinished = torch.ones(len(prompts), dtype=torch.bool)

    def __call__(self, logits: Tensor) -> tuple[Tensor, bool]:
        """The next tokens (B,) from logits (B, V), and whether every sequence has ended."""
        if self.greedy:  # where they are: a vocabulary takes longer to copy than to search
            return self.found(Found(*logits.max(-1)))
        scores = self.scores(self.ids, logits)
        return self.take(self.pick(self.distribution(scores)) if self.sample else scores.argmax(-1), scores)

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken, whatever came before."""
        return not self.sample and not self.processors

    def found(self, found: Found) -> tuple[Tensor, bool]:
        """What `__call__` gives, of a greedy draw."""
        tokens = found.read()
        return self.take(tokens, NO_SCORES.expand(len(tokens), 0))

    def scores(self, ids: Tensor, logits: Tensor) -> Tensor:
        """What the processors make of logits (B, V) that follow ids (B, T); float32, on the CPU.

        Raises UserError for logits that are NaN or +infinity, of which no token can be drawn.
        """
        given = logits.to("cpu", torch.float32, copy=True)
        _require(bool((given.amax(-1) < torch.inf).all()))  # NaN is the largest of its row, and below nothing
        return self.processors(ids, given)

    def distribution(self, scores: Tensor) -> Tensor:
        """How likely each token is to be drawn, (B, V); all on the largest score where nothing is sampled."""
        if self.sample:
            return scores.softmax(-1)
        return torch.zeros_like(scores).scatter_(-1, scores.argmax(-1, keepdim=True), 1.0)

    def pick(self, chances: Tensor) -> Tensor:
        """Draw a token (B,) from each distribution (B, V)."""
        if self.sample:
            return torch.multinomial(chances, 1, generator=self.generator).squeeze(1)
        return chances.argmax(-1)

    def take(self, tokens: Tensor, scores: Tensor) -> tuple[Tensor, bool]:
        """Append tokens (B,), which follow scores (B, V): them, or the pad token, and whether every sequence has ended."""
        tokens = torch.where(self.unfinished, tokens, self.pad)
        self.ids = torch.cat([self.ids, tokens[:, None]], dim=1)
        self.unfinished = self.unfinished & ~self.criteria(self.ids, scores)
        return tokens, not bool(self.unfinished.any())


def _require(finite: bool) -> None:
    if not finite:
        raise UserError(
            "the model's logits are not finite",
            "load it in another type (dtype='float32'), or make its plan again with `moyu calibrate`",
        )


def _complete(model: Any, settings: dict[str, Any], longest: int) -> GenerationConfig:
    """The model's config with `settings`, transformers' defaults, special tokens as tensors, and a maximal length."""
    config = copy.deepcopy(model.generation_config)
    unknown = config.update(**settings)
    if unknown:
        raise UserError(f"{', '.join(unknown)}: no setting of a generation", "see transformers.GenerationConfig")
    if config.num_beams not in (None, 1) or config.num_return_sequences not in (None, 1) or config.penalty_alpha:
        raise UserError(
            "beams and several sequences a prompt are not drawn one token at a time",
            "use the model's own generate() with the plan applied",
        )
    limited = config.max_new_tokens is not None or config.max_length is not None
    config, _ = model._prepare_generation_config(config)
    config.update(**settings)  # again: a setting of None is not the model's own
    model._prepare_special_tokens(config, True, device="cpu")
    if config.max_new_tokens is not None:
        config.max_length = longest + config.max_new_tokens
    elif not limited:
        config.max_length = longest + 20  # transformers' own default
    if config.min_new_tokens is not None:
        config.min_length = longest + config.min_new_tokens
    return config
