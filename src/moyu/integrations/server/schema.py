"""What clients send: OpenAI's chat and text completions, as far as they can be obeyed. Anything else is refused by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, field_validator, model_validator

MOST_STOPS, MOST_LIKELY, COLD = 4, 20, 0.01


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no text") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
Stop = Annotated[Text, StringConstraints(min_length=1, max_length=256)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Token = Annotated[int, Field(strict=True, ge=0, lt=2**31)]
Tokens = Annotated[list[Token], Field(min_length=1)]


class Strict(BaseModel):
    """Unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class StreamOptions(Strict):
    """include_usage: the last chunk has the counts of tokens."""

    include_usage: bool = False
    include_obfuscation: Literal[False] | None = None


class Asked(Strict):
    """What both kinds of completion share."""

    model: str | None = Field(None, description="A name of /v1/models; left out, the first.")
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1)
    temperature: float | None = Field(
        None, ge=0, le=2, description="0 is greedy. Left out: as the model's generation config has it."
    )
    top_p: float | None = Field(None, gt=0, le=1)
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    # Beyond OpenAI's, under vLLM's names.
    top_k: int | None = Field(None, ge=1)
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.1, le=10)
    ignore_eos: bool = False
    # What changes no answer is taken, and what would change it is refused, but at its neutral value.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None

    @field_validator("temperature")
    @classmethod
    def _warm(cls, value: float | None) -> float | None:
        if value is not None and 0 < value < COLD:  # scores divided by less overflow
            raise ValueError(f"it is 0, which is greedy, or at least {COLD}")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop sequences."""
        return () if self.stop is None else (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def settings(self) -> dict[str, Any]:
        """Of the generation config. No temperature and nothing else of sampling: the model's own."""
        asked = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
        }
        given = {name: value for name, value in asked.items() if value is not None}
        if self.temperature == 0:
            given = {**dict.fromkeys(asked), "do_sample": False}
        elif given:
            given = {"top_k": 0, **given, "do_sample": True}  # transformers' own default would be the likeliest 50
        if self.repetition_penalty is not None:
            given["repetition_penalty"] = self.repetition_penalty
        if self.ignore_eos:
            given["eos_token_id"] = None
        return given

    @property
    def likely(self) -> int | None:
        """How many of the likeliest tokens are told beside each one; None: no probabilities."""
        raise NotImplementedError

    @property
    def usual(self) -> int | None:
        """New tokens where max_tokens is left out; None: as many as fit."""
        return None


class Part(Strict):
    """A part of a message."""

    type: Literal["text"]
    text: Text


class Message(Strict):
    """What was said, and by whom."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[Part], Field(min_length=1)]
    name: str | None = None

    def said(self) -> dict[str, str]:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(Strict):
    """An answer of any form."""

    type: Literal["text"]


class Chat(Asked):
    """Body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY)
    response_format: TextFormat | None = None
    tools: Annotated[list[Any], Field(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    @model_validator(mode="after")
    def _agree(self) -> Chat:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs is of logprobs: true")
        if self.max_completion_tokens is not None:
            if self.max_tokens not in (None, self.max_completion_tokens):
                raise ValueError("max_tokens and max_completion_tokens differ")
            self.max_tokens = self.max_completion_tokens
        return self

    @property
    def likely(self) -> int | None:
        """How many of the likeliest tokens are told beside each one; None: no probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class Completion(Asked):
    """Body of POST /v1/completions."""

    prompt: Text | Tokens | Annotated[list[Text], Field(min_length=1)] | Annotated[list[Tokens], Field(min_length=1)]
    max_tokens: int | None = Field(None, ge=1, description="Left out: 16.")
    logprobs: int | None = Field(None, ge=0, le=MOST_LIKELY)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    @property
    def likely(self) -> int | None:
        """How many of the likeliest tokens are told beside each one; None: no probabilities."""
        return self.logprobs

    @property
    def usual(self) -> int | None:
        """New tokens where max_tokens is left out, as OpenAI has it."""
        return 16

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several."""
        given: Any = self.prompt
        return [given] if isinstance(given, str) or isinstance(given[0], int) else given
