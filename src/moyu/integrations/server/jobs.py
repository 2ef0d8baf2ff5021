"""From a request's body to requests of the engine, and from what the engine tells to an answer or its parts."""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moyu.engine.generate import Draw
from moyu.errors import UserError
from moyu.integrations.server import replies
from moyu.integrations.server.answers import Answer, Event, Failed
from moyu.integrations.server.engine import Engine, Request
from moyu.integrations.server.schema import Asked, Chat, Completion
from moyu.model.loading import Loaded
from moyu.model.prompts import as_chat, prompt_ids, require_known

DENSE = ":dense"  # behind the model's name: without the plan


class NoSuchModel(UserError):
    """A name that is none of the server's models."""

    status, code = 404, "model_not_found"


class TooLong(UserError):
    """A prompt and its answer do not fit into the context."""

    status, code = 400, "context_length_exceeded"


@dataclass(frozen=True)
class Limits:
    """What a request may ask for."""

    context: int  # tokens of prompt and answer
    new_tokens: int  # of an answer
    sequences: int  # prompts times n of a request
    body: int = 1 << 20  # bytes
    patience: float = 10.0  # seconds for a body to arrive
    seconds: float = 600.0  # for an answer to be finished


@dataclass(frozen=True)
class Model:
    """The model that is served, and its names."""

    loaded: Loaded
    name: str
    planned: bool  # under a plan: then it is there without it, too
    created: int = field(default_factory=lambda: int(time.time()))
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the tokenizer's encoding

    @property
    def names(self) -> list[str]:
        """The first is taken where a request names none."""
        return [self.name, self.name + DENSE] if self.planned else [self.name]

    def dense(self, name: str | None) -> bool:
        """Whether a request of this name is dense although there is a plan. Raises NoSuchModel."""
        if name is not None and name not in self.names:
            raise NoSuchModel(f"no model {name!r:.100}", f"it is one of {', '.join(self.names)}")
        return self.planned and name == self.name + DENSE

    def prompts(self, body: Chat | Completion) -> list[Tensor]:
        """Ids (T,) of every prompt of a body."""
        with self.lock:
            if isinstance(body, Chat):
                text = as_chat(
                    self.loaded, [m.said() for m in body.messages], "use /v1/completions, which continues a text"
                )
                return [prompt_ids(self.loaded, text)[0]]
            return [
                prompt_ids(self.loaded, p)[0] if isinstance(p, str) else require_known(self.loaded, torch.tensor(p))
                for p in body.prompts
            ]


@dataclass(eq=False)
class Job:
    """A body's requests, and the events that they have told so far."""

    body: Chat | Completion
    model: str
    requests: list[Request]
    events: asyncio.Queue[Event | Failed]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def prepare(cls, model: Model, body: Chat | Completion, limits: Limits, loop: asyncio.AbstractEventLoop) -> Job:
        """Check a body and make its prompts. Raises UserError."""
        dense = model.dense(body.model)
        events: asyncio.Queue[Event | Failed] = asyncio.Queue()

        def tell(event: Event | Failed) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        prompts = model.prompts(body)
        if len(prompts) * body.n > limits.sequences:
            raise UserError(
                f"{len(prompts)} prompts with n = {body.n} are more than {limits.sequences} sequences",
                "send several requests",
            )
        requests = [
            Request(prompt.cpu(), _answers(model, body, limits, prompt.cpu(), k * body.n), tell, dense)
            for k, prompt in enumerate(prompts)
        ]
        return cls(body, body.model or model.name, requests, events)

    def cancel(self, engine: Engine) -> None:
        """Let what is unfinished leave."""
        unfinished = [r for r in self.requests if any(answer.finish is None for answer in r.answers)]
        for request in unfinished:
            engine.cancel(request)
        engine.metrics.cancelled.inc(bool(unfinished))

    @property
    def answers(self) -> list[Answer]:
        """Of all prompts, in order."""
        return [answer for request in self.requests for answer in request.answers]

    @property
    def usage(self) -> replies.Usage:
        """Tokens so far."""
        read, written = sum(len(r.prompt) for r in self.requests), sum(len(a.fresh) for a in self.answers)
        return replies.Usage(prompt_tokens=read, completion_tokens=written, total_tokens=read + written)

    async def told(self) -> AsyncIterator[Event]:
        """Events until every answer has ended. Raises what an answer failed with."""
        left = len(self.answers)
        while left:
            event = await self.events.get()
            if isinstance(event, Failed):
                raise event.error
            left -= event.finish is not None
            yield event

    async def finish(self) -> list[list[Event]]:
        """The events of every answer."""
        found: list[list[Event]] = [[] for _ in self.answers]
        async for event in self.told():
            found[event.index].append(event)
        return found

    def reply(self, events: list[list[Event]]) -> replies.ChatReply | replies.TextReply:
        """The whole answer."""
        texts = ["".join(e.text for e in each) for each in events]
        if isinstance(self.body, Chat):
            choices = [
                replies.ChatChoice(
                    index=n,
                    message=replies.Said(role="assistant", content=text),
                    logprobs=replies.chat_chances(each),
                    finish_reason=each[-1].finish or "stop",
                )
                for n, (text, each) in enumerate(zip(texts, events, strict=True))
            ]
            return replies.ChatReply(**self._head(), choices=choices, usage=self.usage)
        choices = [
            replies.TextChoice(
                index=n, text=text, logprobs=replies.text_chances(each, 0), finish_reason=each[-1].finish
            )
            for n, (text, each) in enumerate(zip(texts, events, strict=True))
        ]
        return replies.TextReply(**self._head(), choices=choices, usage=self.usage)

    async def chunks(self) -> AsyncIterator[replies.ChatChunk | replies.TextReply]:
        """The answer in parts, as it is written."""
        head, chat = self._head(), isinstance(self.body, Chat)
        offsets = [0] * len(self.answers)
        if chat:
            first = [
                replies.ChatDelta(index=a.index, delta=replies.Said(role="assistant", content="")) for a in self.answers
            ]
            yield replies.ChatChunk(**head, choices=first)
        async for event in self.told():
            if not event.text and event.chosen is None and event.finish is None:
                continue
            if chat:
                delta = replies.ChatDelta(
                    index=event.index,
                    delta=replies.Said(content=event.text),
                    logprobs=replies.chat_chances([event]),
                    finish_reason=event.finish,
                )
                yield replies.ChatChunk(**head, choices=[delta])
            else:
                part = replies.TextChoice(
                    index=event.index,
                    text=event.text,
                    logprobs=replies.text_chances([event], offsets[event.index]),
                    finish_reason=event.finish,
                )
                offsets[event.index] += len(event.text)
                yield replies.TextReply(**head, choices=[part])
        if self.body.stream_options is not None and self.body.stream_options.include_usage:
            kind = replies.ChatChunk if chat else replies.TextReply
            yield kind(**head, choices=[], usage=self.usage)

    def _head(self) -> dict:
        kind = "chatcmpl" if isinstance(self.body, Chat) else "cmpl"
        return {"id": f"{kind}-{self.id}", "created": self.created, "model": self.model}


def _answers(model: Model, body: Asked, limits: Limits, prompt: Tensor, first: int) -> list[Answer]:
    """What is to be written behind a prompt (T,): n answers, numbered from `first`. Raises UserError."""
    room = limits.context - len(prompt)
    if room < 1:
        raise TooLong(f"the prompt has {len(prompt)} tokens, and the context {limits.context}", "send a shorter one")
    asked = body.max_tokens or min(room, limits.new_tokens, body.usual or room)
    if asked > room:
        raise TooLong(
            f"{len(prompt)} tokens of prompt and {asked} new ones are more than the context of {limits.context}",
            f"set max_tokens to {room} or less",
        )
    if asked > limits.new_tokens:
        raise UserError(f"max_tokens is {asked}", f"this server writes at most {limits.new_tokens}")
    core, tokenizer = model.loaded.model, model.loaded.tokenizer
    ends = core.generation_config.eos_token_id  # pyright: ignore[reportOptionalMemberAccess]
    ends = frozenset() if ends is None or body.ignore_eos else frozenset([ends] if isinstance(ends, int) else ends)
    made = []
    for n in range(body.n):
        seed = None if body.seed is None else (body.seed + n) % 2**63
        draw = Draw(core, [prompt], seed, {**body.settings, "max_new_tokens": asked})
        made.append(Answer(first + n, draw, tokenizer, prompt.tolist(), ends, body.stops, body.likely))
    return made
