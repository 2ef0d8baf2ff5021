"""What the server answers, in OpenAI's form."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from moyu.integrations.server.answers import Event, Finish, Likely


class Details(BaseModel):
    """An error."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class Problem(BaseModel):
    """The body of a refusal."""

    error: Details


class Usage(BaseModel):
    """Tokens of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ModelCard(BaseModel):
    """A model that can be asked."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "moyu"


class Models(BaseModel):
    """All of them."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class TokenChance(BaseModel):
    """A token and how likely the model finds it."""

    token: str
    logprob: float
    bytes: list[int] | None = None


class TokenChances(TokenChance):
    """The drawn token, and the likeliest ones."""

    top_logprobs: list[TokenChance]


class ChatChances(BaseModel):
    """One entry a token."""

    content: list[TokenChances]


class TextChances(BaseModel):
    """One entry a token, as text completions have it."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class Said(BaseModel):
    """A message, or what a chunk adds to one."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: Said
    logprobs: ChatChances | None = None
    finish_reason: Finish


class ChatDelta(BaseModel):
    """A part of one answer."""

    index: int
    delta: Said
    logprobs: ChatChances | None = None
    finish_reason: Finish | None = None


class TextChoice(BaseModel):
    """One continuation, or a part of it."""

    index: int
    text: str
    logprobs: TextChances | None = None
    finish_reason: Finish | None = None


class Reply(BaseModel):
    """What all answers have."""

    id: str
    created: int
    model: str
    usage: Usage | None = None


class ChatReply(Reply):
    """A whole answer of /v1/chat/completions."""

    object: Literal["chat.completion"] = "chat.completion"
    choices: list[ChatChoice]


class ChatChunk(Reply):
    """A part of one."""

    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    choices: list[ChatDelta]


class TextReply(Reply):
    """An answer of /v1/completions, or a part of it."""

    object: Literal["text_completion"] = "text_completion"
    choices: list[TextChoice]


def chat_chances(events: list[Event]) -> ChatChances | None:
    """Of the tokens of these events; None where none were asked for."""
    told = [(e.chosen, e.top) for e in events if e.chosen is not None]
    if not told:
        return None
    return ChatChances(
        content=[TokenChances(**_chance(c), top_logprobs=[TokenChance(**_chance(t)) for t in top]) for c, top in told]
    )


def _chance(likely: Likely) -> dict:
    return {"token": likely.token, "logprob": likely.logprob, "bytes": likely.bytes}


def text_chances(events: list[Event], offset: int) -> TextChances | None:
    """Of the tokens of these events, whose text begins `offset` characters behind the prompt."""
    told = [e for e in events if e.chosen is not None]
    if not told:
        return None
    offsets = []
    for event in events:
        offsets.append(offset)
        offset += len(event.text)
    return TextChances(
        tokens=[e.chosen.token for e in told if e.chosen is not None],
        token_logprobs=[e.chosen.logprob for e in told if e.chosen is not None],
        top_logprobs=[{t.token: t.logprob for t in e.top} for e in told],
        text_offset=offsets,
    )
