"""One answer of a request: tokens become text, up to a stop sequence, with their probabilities where those are asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from moyu.engine.generate import Draw
from moyu.model.prompts import BROKEN, Pieces

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Likely:
    """A token with its log-probability under the model, before temperature and other settings of the draw."""

    token: str
    logprob: float

    @property
    def bytes(self) -> list[int] | None:
        """Its text in UTF-8; None for a part of a character."""
        return None if BROKEN in self.token else list(self.token.encode())


@dataclass(frozen=True)
class Event:
    """A token of an answer was drawn."""

    index: int  # of the answer in its request
    text: str  # what it adds to the text; often nothing, where a character or a stop sequence may go on
    chosen: Likely | None = None
    top: tuple[Likely, ...] = ()
    finish: Finish | None = None


@dataclass(frozen=True)
class Failed:
    """A request cannot be finished."""

    error: Exception


@dataclass(eq=False)
class Answer:
    """Draws the tokens of one answer and makes text of them."""

    index: int
    draw_one: Draw
    tokenizer: Any
    prompt: Sequence[int]
    ends: frozenset[int]  # tokens that end a text
    stop: Sequence[str] = ()
    logprobs: int | None = None  # so many of the likeliest tokens beside the drawn one; None: no probabilities
    fresh: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def __post_init__(self) -> None:
        self.held = ""  # text that may be the beginning of a stop sequence
        self.pieces = Pieces(self.tokenizer, list(self.prompt[-8:]), self._hold, special=False)

    def draw(self, logits: Tensor) -> tuple[Tensor, Event]:
        """The next token (1,) from logits (1, V), and what is to be told of it."""
        tokens, ended = self.draw_one(logits)
        token = int(tokens)
        self.fresh.append(token)
        if token not in self.ends:
            self.pieces.take(token)
        if ended:
            self.finish = "stop" if token in self.ends else "length"
            self.pieces.end()
        at = min((p for p in map(self.held.find, self.stop) if p >= 0), default=None)
        if at is not None:
            text, self.finish = self.held[:at], "stop"
        else:
            size = 0 if self.finish is not None else max((_overlap(self.held, s) for s in self.stop), default=0)
            text = self.held[: len(self.held) - size]
            self.held = self.held[len(text) :]
        chosen, top = (None, ()) if self.logprobs is None else self._likely(logits[0], token, self.logprobs)
        return tokens, Event(self.index, text, chosen, top, self.finish)

    def _hold(self, piece: str) -> None:
        self.held += piece

    def _likely(self, logits: Tensor, token: int, count: int) -> tuple[Likely, tuple[Likely, ...]]:
        """The drawn token and the `count` likeliest ones, from logits (V,)."""
        chances = logits.float().log_softmax(-1)
        values, ids = chances.topk(count)
        top = zip(ids.tolist(), values.tolist(), strict=True)
        return self._named(token, float(chances[token])), tuple(self._named(i, v) for i, v in top)

    def _named(self, token: int, logprob: float) -> Likely:
        return Likely(self.tokenizer.decode([token]), logprob)


def _overlap(text: str, stop: str) -> int:
    """Characters at the end of `text` with which `stop` begins; `stop` itself is not in it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
