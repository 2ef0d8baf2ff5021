"""Generation that the dense model corrects: drafts come from sparse steps, from first bits, or from the text so far.

Dense verifies them together.
Same weights, same KV cache. Where the step is native, verifying a few tokens reads the weights once. Every position that stays has
the dense model's keys and values, and both models' logits pass through the processors that `generate` applies at that position.
Lossless text is distributed as the dense model's; greedy text is the dense model's, up to near-ties between kernels.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor
from transformers.cache_utils import DynamicLayer

from moyu.engine import steps
from moyu.engine.cache import KvCache
from moyu.engine.generate import Draw, new_cache, prefill, read, step
from moyu.engine.memory import memory_of
from moyu.engine.session import Session
from moyu.engine.speculation.lookup import Lookup, Match
from moyu.engine.speculation.pace import MOST, Pace
from moyu.engine.speculation.rules import Rule, Source, lossless
from moyu.engine.trace import Trace
from moyu.errors import UserError

COUNTING = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)  # a call is a token


@dataclass
class Speculation:
    """What a generation has written so far, and what it took."""

    keep_margins: bool = False
    tokens: list[int] = field(default_factory=list)  # new ones
    margins: list[float] = field(
        default_factory=list
    )  # of each, if asked: how far the two largest dense scores are apart
    drafted: int = 0  # steps of a plan, or of first bits
    found: int = 0  # drafts that the text gave
    accepted: int = 0  # of both
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


@dataclass
class _Drafts:
    """Tokens that a round proposes, (D,) int64, and the distributions (1, V) that they were drawn from; the text's have none."""

    tokens: Tensor
    distributions: list[Tensor] = field(default_factory=list)
    match: Match | None = None  # of the text, whether it drafts or not

    @property
    def kind(self) -> Any:
        return ("text", self.match.size) if self.match is not None and not self.distributions else "weights"


@torch.no_grad()
def speculate(
    session: Session,
    ids: Tensor,
    *,
    drafts: int | None = None,
    source: Source = "both",
    rule: Rule = lossless,
    strict: bool = False,
    seed: int | None = None,
    cache: KvCache | None = None,
    out: Speculation | None = None,
    **settings: Any,
) -> Iterator[Tensor]:
    """Yield the tokens after `ids` (1, T), each (1,) int64: some drafts, then one dense step over them, and again.

    drafts: so many a round, or None: as many as pay, by the costs that are measured on the way; none where none pay.
    source: "plan" drafts by sparse steps, "text" takes what followed the same tokens before, "both" what promises more. Without a plan
    the first bits of the weights take its place, where they lie apart (`Session.parted`). rule: `lossless`, or `sirius(threshold)` of
    a plan's drafts. seed, strict, cache, settings: as of `generate`.
    out: notes what the text took. A sequence-level method keeps the prompt's masks. Raises UserError for a batch, an empty
    prompt, no drafts, no plan where only a plan may draft, settings that need each token's scores once and in order, and for a
    cache that cannot go back.
    """
    if ids.dim() != 2 or ids.shape[0] != 1 or ids.shape[1] < 1:
        raise UserError(f"drafting takes one prompt at a time, not ids of shape {tuple(ids.shape)}", "call it a row")
    if drafts is not None and drafts < 1:
        raise UserError(f"{drafts} drafts", "draft at least 1 token")
    if session.plan is None and not session.parted and source == "plan":
        raise UserError("no plan to draft with", "make one with `moyu calibrate`, or let the text draft")
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
    cache, device = new_cache(session) if cache is None else cache, next(core.parameters()).device
    _check_cache(cache, draw.criteria.max_length)
    out = Speculation() if out is None else out
    writer = _Writer(session, cache, draw, Pace(), drafts, source)
    found = _Drafts(ids.new_empty(0, device="cpu"))
    logits = prefill(session, cache, list(ids.to(device)))
    while True:
        start = time.perf_counter()
        accepted, fresh, scores = _judged(draw, found, logits, rule)
        if out.passes:
            out.accepted += accepted
            judged = min(accepted + 1, len(found.tokens))
            out.judged += judged
            writer.learn(found, accepted, judged, fresh)
        for token, own in zip(fresh.split(1), scores, strict=False):
            token, ended = draw.take(token, own[None])
            out.tokens.append(int(token))
            if out.keep_margins:
                best = own.topk(2).values
                out.margins.append(float(best[0] - best[1]))
            out.verify_s += time.perf_counter() - start if out.passes else 0.0
            yield token
            start = time.perf_counter()
            if ended:  # drafts and a token behind the end are dropped
                return _go_back(cache, draw.ids.shape[1] - 1)
            writer.wrote(int(token))
        _go_back(cache, draw.ids.shape[1] - 1)  # the last token is not read yet
        found = writer.draft()
        if strict:
            session.traces.require_fastest()
        middle = time.perf_counter()
        past = int(cache.get_seq_length()) - len(found.distributions)
        _go_back(cache, past)
        logits = _verify(session, cache, torch.cat([draw.ids[0, -1:], found.tokens])[None].to(device))
        end = time.perf_counter()
        writer.measure(found, middle - start, end - middle)
        out.draft_s += middle - start
        out.verify_s += end - middle
        out.drafted += len(found.distributions)
        out.found += len(found.tokens) - len(found.distributions)
        out.passes += 1


class _Writer:
    """Decides what drafts a round has, and makes them."""

    def __init__(
        self, session: Session, cache: KvCache, draw: Draw, pace: Pace, drafts: int | None, source: Source
    ) -> None:
        self.session, self.cache, self.draw, self.pace, self.drafts = session, cache, draw, pace, drafts
        self.weights = (session.plan is not None or session.parted) and source != "text"
        self.text = None if source == "plan" else Lookup(draw.ids[0].tolist())

    def draft(self) -> _Drafts:
        """What this round proposes: as many drafts as pay, of the source that promises more; none where none pay."""
        left = (
            int(self.draw.criteria.max_length) - self.draw.ids.shape[1] - 1
        )  # behind these one token is written anyway
        match = None if self.text is None else self.text.find()
        best, count, kind = 1.0, 0, ""
        if self.text is not None and match is not None:
            best, count = self._count(("text", match.size), left)
            kind = "text"
        if self.weights and (self.drafts is None or not count):
            gain, own = self._count("weights", left)
            if gain > best or not count:
                count, kind = own, "weights"
        if not count:
            return _Drafts(self.draw.ids.new_empty(0), match=match)
        if kind == "text" and self.text is not None and match is not None:
            return _Drafts(torch.tensor(self.text.following(match, count)), match=match)
        return _sparse(self.session, self.cache, self.draw, count, match)

    def _count(self, kind: Any, left: int) -> tuple[float, int]:
        if self.drafts is not None:
            return 1.0, min(self.drafts, left)
        return self.pace.expected(kind, min(left, MOST["weights" if kind == "weights" else "text"]))

    def learn(self, found: _Drafts, accepted: int, judged: int, fresh: Tensor) -> None:
        """How the last round's drafts did; what the text would have given is known even where it was not asked."""
        self.pace.judged(found.kind, accepted, judged, len(fresh))
        if self.text is not None and found.match is not None and (found.distributions or not len(found.tokens)):
            told = self.text.following(found.match, 1)[0] == int(fresh[0])
            self.pace.share(("text", found.match.size)).note(int(told), 1)

    def wrote(self, token: int) -> None:
        """The text goes on."""
        if self.text is not None:
            self.text.append(token)

    def measure(self, found: _Drafts, draft_s: float, verify_s: float) -> None:
        """What the drafts and the dense step over them took."""
        if found.distributions:
            self.pace.drafted(draft_s / len(found.distributions))
        self.pace.took(len(found.tokens) + 1, verify_s)


def _sparse(session: Session, cache: KvCache, draw: Draw, most: int, match: Match | None) -> _Drafts:
    """Up to `most` steps of a plan, or of first bits: what they drew, and from which distributions."""
    ahead, made = copy.copy(draw), []
    device = next(session.model.parameters()).device
    written = draw.ids.shape[1]
    with session.prompt(int(cache.get_seq_length())):
        while len(made) < most and bool(ahead.unfinished.any()):
            last = ahead.ids[:, -1].to(device)
            logits = step(session, cache, last) if session.plan is not None else _first_bits(session, cache, last)
            scores = ahead.scores(ahead.ids, logits)
            made.append(ahead.distribution(scores))
            ahead.take(ahead.pick(made[-1]), scores)
    return _Drafts(ahead.ids[0, written:], made, match)


def _first_bits(session: Session, cache: KvCache, tokens: Tensor) -> Tensor:
    """Logits (1, V) behind the tokens (1,), by the first bits of the weights."""
    logits = steps.dense_step(session, cache, tokens[:, None], reads="first bits")
    return read(session, cache, tokens[:, None])[:, -1] if logits is None else logits[:, -1]


def _judged(draw: Draw, found: _Drafts, logits: Tensor, rule: Rule) -> tuple[int, Tensor, Tensor]:
    """From dense logits (D + 1, V): how many drafts stay, the tokens (M,) that are written, and scores (D + 1, V)."""
    drafted, ids = found.tokens, torch.cat([draw.ids[0], found.tokens])[None]
    written = draw.ids.shape[1]
    if draw.processors:
        scores = torch.cat([draw.scores(ids[:, : written + i], row[None]) for i, row in enumerate(logits)])
    else:
        scores = draw.scores(ids, logits)
    if rule is lossless and not draw.sample:  # a distribution of one token: what dense draws stays, nothing else does
        best = scores.argmax(-1)
        wrong = (best[:-1] != drafted).nonzero()
        accepted = int(wrong[0]) if len(wrong) else len(drafted)
        return accepted, best[: accepted + 1], scores
    dense = draw.distribution(scores)
    drawn = torch.cat([dense[:0], *found.distributions])
    if not found.distributions:  # the text's: it could have given nothing else
        drawn = torch.zeros_like(dense[:-1]).scatter_(-1, drafted[:, None], 1.0)
    likelihoods = logits[:-1].double().cpu().softmax(-1).gather(1, drafted[:, None])[:, 0]
    accepted, following = rule(drafted, drawn, dense, likelihoods, draw.generator)
    return accepted, torch.cat([drafted[:accepted], draw.pick(following[None])]), scores


def _verify(session: Session, cache: KvCache, ids: Tensor) -> Tensor:
    """Dense logits (T, V) of the next tokens (1, T); their keys and values join the cache.

    What a sequence-level method knows of the prompt stays what it was: refused drafts must not enter it.
    """
    logits = steps.dense_step(session, cache, ids)
    if logits is None:
        memory = memory_of(cache)
        known = dict(memory.sites), dict(memory.masks), memory.dense_until
        logits = read(session, cache, ids)
        memory.sites, memory.masks, memory.dense_until = known
        session.traces.note(Trace("general", session.general_because or "no native step verifies here"))
    return logits[0]


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
