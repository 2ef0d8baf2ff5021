"""A conversation with a model: its history, and a cache that is read on from where the last answer ended."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from typing import Any

from moyu import kernels
from moyu.engine.applied import Applied
from moyu.engine.generate import generate, new_cache
from moyu.engine.speculation import Speculation, speculate
from moyu.errors import UserError
from moyu.kernels import BackendName
from moyu.measure import accounting
from moyu.model.dissect import dissect
from moyu.model.loading import Loaded
from moyu.model.prompts import Pieces, Show, as_chat, context_of, prompt_ids
from moyu.plan import Plan

REMEDY = "`moyu generate --raw` continues a text; to chat, take a model that was trained to (its name often ends in Instruct)"


class Conversation(AbstractContextManager):
    """Answers one thing said after another, under a plan that can be changed between them."""

    def __init__(
        self,
        loaded: Loaded,
        plan: Plan | None,
        system: str | None,
        new_tokens: int,
        settings: dict[str, Any],
        *,
        lossless: bool = False,
        backend: BackendName = "auto",
        seed: int = 0,
    ) -> None:
        """settings: of the generation config. lossless: dense checks what the conversation so far, and the plan or the first bits, draft.

        Raises UserError for a model without a chat template.
        """
        self.loaded, self.new_tokens, self.settings, self.seed = loaded, new_tokens, settings, seed
        self.backend: BackendName = backend
        self.lossless = lossless
        self.first = [] if system is None else [{"role": "system", "content": system}]
        as_chat(loaded, [*self.first, {"role": "user", "content": "x"}], REMEDY)
        self.anatomy = dissect(loaded.model)
        self.session = self._applied(plan)
        self.reset()

    def _applied(self, plan: Plan | None) -> Applied:
        return Applied(self.loaded.model, plan, backend=self.backend, anatomy=self.anatomy, first_bits=self.lossless)

    def __exit__(self, *exc: object) -> None:
        """The model is as before."""
        self.session.restore()

    @property
    def named(self) -> str:
        """The plan in words."""
        plan = self.session.plan
        name = "dense" if plan is None else f"{plan.method.name} ({plan.hash})"
        return f"{name}, lossless" if self.lossless else name

    def reset(self) -> None:
        """Forget what was said."""
        self.history = list(self.first)
        self._forget()

    def take(self, plan: Plan | None) -> None:
        """Go on under another plan, None: dense. Raises UserError, and keeps the one that was there, where it does not fit."""
        before = self.session
        before.restore()
        try:
            self.session = self._applied(plan)
        except UserError:
            self.session = self._applied(before.plan)
            raise
        self._forget()

    def say(self, text: str, show: Show) -> str:
        """Answer, showing pieces of text as they come; what the answer took, in a line. Ctrl-C ends the answer."""
        asked = [*self.history, {"role": "user", "content": text}]
        ids = prompt_ids(self.loaded, as_chat(self.loaded, asked, REMEDY))[0]
        limit = context_of(self.loaded.model) or len(ids) + self.new_tokens
        if len(ids) >= limit:
            raise UserError(
                f"the conversation has {len(ids)} tokens, and the model reads {limit}", "/reset begins a new one"
            )
        prompt = ids.tolist()
        if not (len(self.held) < len(prompt) and prompt[: len(self.held)] == self.held):
            self._forget()
        kept, answer, fresh, times = len(self.held), list[str](), list[int](), list[float]()

        def written(piece: str) -> None:
            answer.append(piece)
            show(piece)

        pieces = Pieces(self.loaded.tokenizer, prompt[-8:], written, special=False)
        settings = {**self.settings, "max_new_tokens": min(self.new_tokens, limit - len(ids))}
        settings |= {"seed": self.seed + len(self.history), "cache": self.cache}
        drafts = Speculation() if self.lossless else None
        if drafts is None:
            stream = generate(self.session, [ids], **settings)
        else:
            stream = speculate(self.session, ids[None], out=drafts, **settings)
        native, prefill = self.session.traces.of("native"), 0
        try:
            with kernels.count_bytes() as counter:
                for tokens in stream:
                    prefill = prefill if fresh else counter.total
                    times.append(time.perf_counter())
                    fresh.append(int(tokens))
                    pieces.take(fresh[-1])
            self.held = prompt + fresh[:-1]
        except BaseException as stop:
            self._forget()  # whatever the cache holds now
            if not isinstance(stop, KeyboardInterrupt):
                raise
        pieces.end()
        self.history = [*asked, {"role": "assistant", "content": "".join(answer)}]
        steps = len(fresh) - 1
        # Other steps have products that count nothing.
        passes = steps if drafts is None else drafts.passes + drafts.drafted
        counted = steps > 0 and passes == self.session.traces.of("native") - native
        return "; ".join(
            [
                f"{len(prompt) - kept} of {len(prompt)} tokens of the conversation read, {len(fresh)} written",
                f"{steps / (times[-1] - times[0]):.1f} tokens/s" if steps > 0 else "no second token",
                *([self._bits((counter.total - prefill) / steps)] if counted else []),
                *([f"{drafts.tokens_per_pass:.1f} tokens a dense step"] if drafts is not None and steps > 0 else []),
                self.named,
            ]
        )

    def _bits(self, read: float) -> str:
        return f"{accounting.bits_per_weight(self.loaded.model, self.anatomy, read):.2f} bits a weight"

    def _forget(self) -> None:
        """An empty cache."""
        self.cache, self.held = new_cache(self.session), list[int]()
