"""Parts of records: kinds of numbers, and objects inside records."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

ROUNDING = 1e-6  # a float32 mean can fall outside [0, 1] by at most this


def _settle(value: Any) -> Any:
    if isinstance(value, float) and -ROUNDING <= value <= 1 + ROUNDING:
        return min(max(value, 0.0), 1.0)
    return value


Fraction = Annotated[float, Field(ge=0, le=1), BeforeValidator(_settle)]
Positive = Annotated[float, Field(gt=0)]
Natural = Annotated[float, Field(ge=0)]  # nats, bits, bytes: never negative
Perplexity = Annotated[float, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Amount = Annotated[int, Field(ge=1)]
Interval = Annotated[list[float], Field(min_length=2, max_length=2)]
Verdict = Literal["HOLDS", "FAILS", "INCONCLUSIVE"]


class Strict(BaseModel):
    """Unknown fields are refused, values cannot be changed, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Protocol(Strict):
    """How quality was scored."""

    prompt: Count = Field(description="P: positions below it are dense, the rest sparse and scored")
    window: Amount = Field(description="T: tokens of a window")
    table: Literal["main", "token"] = Field(description="`main`: prompt dense, for every method; `token`: prompt = 0")


class KvBytes(Strict):
    """Keys and values at one length of context."""

    context: Count = Field(description="tokens in the cache; may exceed the model's own limit")
    bytes: Count = Field(description="bytes of keys and values that a decode step reads then, batch 1")


class Search(Strict):
    """How what skipping may cost became a plan: the one that skips the most within it on the validation text."""

    max_ppl_increase: Positive | None = Field(default=None, description="allowed rise of perplexity; 0.01 is 1 %")
    ppl_increase: float | None = Field(default=None, description="rise of perplexity on the text that decided")
    max_kl: Positive | None = Field(default=None, description="allowed KL from the dense model, in nats a token")
    kl: float | None = Field(default=None, description="KL on the text that decided")
    corpus: dict[str, Any] = Field(description="fingerprint of the text that decided, which is not the one reported on")


class LayerNeed(Strict):
    """Over-activation of one layer."""

    layer: Count = Field(description="from 0")
    neurons: Amount = Field(description="neurons of its FFN")
    needed_mean: Fraction = Field(description="fraction of neurons needed for CETT 0.2, mean over tokens")
    needed_p95: Fraction = Field(description="the same, 95th percentile over tokens")
    exact_zero_share: Fraction = Field(description="share of activations that are exactly zero")


class PositionNeed(Strict):
    """Over-activation at a range of positions."""

    position_bucket: Count = Field(description="first position of the range")
    needed_mean: Fraction = Field(description="fraction of neurons needed for CETT 0.2, mean over layers and tokens")


class Correction(Strict):
    """How the dense model corrected a text that a plan, or the text before it, drafted."""

    rule: Literal["lossless", "sirius"] = Field(description="the rule by which drafts are accepted")
    drafts: Count | None = Field(
        default=None, description="drafted tokens per check by the dense model; null: as many as pay"
    )
    from_text: int | None = Field(default=None, ge=0, description="drafts that the text so far gave")
    from_plan: int | None = Field(
        default=None, ge=0, description="drafts that steps under the plan gave, without one those by first bits"
    )
    temperature: float = Field(ge=0, description="temperature of sampling; 0 is greedy")
    acceptance: Fraction = Field(description="accepted fraction of the checked drafts")
    tokens_per_pass: float = Field(ge=0, description="new tokens per dense pass")
    margin: float | None = Field(
        default=None, description="gap between the two largest dense scores at the first token that differs"
    )


class Condition(Strict):
    """One condition of a claim."""

    name: str = Field(min_length=1, description="name of the condition")
    meaning: str = Field(description="meaning of the number")
    rule: str = Field(description="the rule, stated before the study ran")
    verdict: Verdict = Field(description="verdict by the rule")
    value: float | None = Field(default=None, description="the estimate")
    interval: Interval | None = Field(default=None, description="its 95 % interval")
    units: Count | None = Field(default=None, description="independent units, usually documents")
    power: Fraction | None = Field(default=None, description="power to see the smallest effect of interest")


class Control(Strict):
    """A check of the instrument itself."""

    name: str = Field(min_length=1, description="name of the control")
    meaning: str = Field(description="meaning of the number")
    rule: str = Field(description="the limit, stated before the study ran")
    value: float | None = Field(default=None, description="the measured number")
    passed: bool = Field(description="if false, the study is inconclusive")
