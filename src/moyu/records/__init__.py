"""Records: one JSON object a line, validated when made, when written and when read."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from moyu.errors import UserError
from moyu.measure.environment import machine
from moyu.records.stamping import stamped
from moyu.weights.files import atomic_write_bytes

FILE = "records.jsonl"  # beside a plan: what was measured of it
ROUNDING = 1e-6  # float32 means leave [0, 1] by less than this


def _settle(value: Any) -> Any:
    if isinstance(value, float) and -ROUNDING <= value <= 1 + ROUNDING:
        return min(max(value, 0.0), 1.0)
    return value


Fraction = Annotated[float, Field(ge=0, le=1), BeforeValidator(_settle)]
Positive = Annotated[float, Field(gt=0)]
Natural = Annotated[float, Field(ge=0)]  # nats, bits, bytes: never negative
Perplexity = Annotated[float, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Protocol(_Model):
    """How quality was scored."""

    prompt: Count = Field(description="P: positions below it are dense, the rest sparse and scored")
    window: Annotated[int, Field(ge=1)] = Field(description="T: tokens of a window")
    table: Literal["main", "token"] = Field(description="`main`: prompt dense, for every method; `token`: prompt = 0")


class Stamped(_Model):
    """What every record carries."""

    commit: str | None = Field(default=None, description="git hash of the checkout the package ran from")
    dirty: bool | None = Field(default=None, description="whether the package's files differed from that commit")
    versions: dict[str, str] = Field(description="moyu, torch, transformers, python")
    device: str = Field(min_length=1, description="processor or accelerator")
    threads: Annotated[int, Field(ge=1)] = Field(description="threads of torch")
    dtype: str | None = Field(default=None, description="type of the weights")
    seed: int | None = Field(default=None, description="seed of everything random")
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$", description="ISO 8601, UTC")
    notes: list[str] = Field(default=[], description="what a reader of the numbers must know")


class ModelRecord(Stamped):
    """A record about one model."""

    model: str = Field(min_length=1, description="name, or path, of the model")
    weights: Literal["trained", "random"] = Field(description="random weights have a speed and no quality")
    weight_format: str | None = Field(
        default=None,
        description="how linears are kept: `q8_0`, `q4_0`, or null: as numbers of `dtype`, which is what they compute in",
    )
    protocol: Protocol | None = Field(default=None, description="how quality was scored, see below")
    corpus: dict[str, Any] | None = Field(default=None, description="fingerprint of the text")


class KvBytes(_Model):
    """Keys and values at one length of context."""

    context: Count = Field(description="tokens in the cache; may exceed what the model was made for")
    bytes: Count = Field(description="bytes of keys and values that a decode step then reads, batch 1")


class Search(_Model):
    """How a budget became a sparsity target: the most that kept it on the validation part."""

    max_ppl_increase: Positive = Field(description="rise of perplexity allowed, 0.01 is 1 %")
    ppl_increase: float = Field(description="rise reached, on the text that decided")
    corpus: dict[str, Any] = Field(description="fingerprint of the text that decided, another one than is reported on")


class MethodRecord(ModelRecord):
    """A record about one method on one model."""

    method: str = Field(min_length=1, description="name in the registry; `dense` where nothing is skipped")
    family: str | None = Field(default=None, description="family of the method")
    granularity: str | None = Field(default=None, description="what one mask serves: token, sequence, static")
    plan: str | None = Field(default=None, description="hash of the plan")
    simulated: bool = Field(description="true: units were masked; false: their bytes were not read")
    target_sparsity: Fraction | None = Field(default=None, description="fraction of units to skip, as asked")
    target_byte_fraction: Fraction | None = Field(default=None, description="byte fraction, as asked")
    realized_sparsity: Fraction | None = Field(default=None, description="fraction of units skipped, as measured")
    byte_fraction: Positive | None = Field(
        default=None, description="bytes a step reads over the dense model's; above 1: more added than skipped"
    )
    ideal_byte_fraction: Positive | None = Field(
        default=None, description="the same for a method without a skipping kernel"
    )
    kv_policy: str | None = Field(
        default=None, min_length=1, description="`full`: every key and value is kept and read"
    )
    kv_bytes: list[KvBytes] = Field(default=[], description="bytes of the KV cache, apart from the weights', see below")

    @model_validator(mode="after")
    def _cache(self) -> Self:
        contexts, sizes = [k.context for k in self.kv_bytes], [k.bytes for k in self.kv_bytes]
        if contexts != sorted(set(contexts)) or sizes != sorted(sizes):
            raise ValueError("kv_bytes must list growing contexts, whose bytes do not shrink")
        if self.kv_policy not in (None, "full") and not self.kv_bytes:
            raise ValueError(f"kv_bytes is missing: KV policy {self.kv_policy!r} reads others than the full cache's")
        return self


class Environment(Stamped):
    """The machine and the command of a run."""

    kind: Literal["environment"]
    platform: str = Field(description="operating system and architecture")
    cores: Annotated[int, Field(ge=1)] = Field(description="cores the process may use")
    command: str | None = Field(default=None, description="command line that made the records")


class LayerNeed(_Model):
    """Over-activation of one layer."""

    layer: Count = Field(description="from 0")
    neurons: Annotated[int, Field(ge=1)] = Field(description="neurons of its FFN")
    needed_mean: Fraction = Field(description="fraction of neurons needed for CETT 0.2, mean over tokens")
    needed_p95: Fraction = Field(description="the same, 95th percentile over tokens")
    exact_zero_share: Fraction = Field(description="share of activations that are exactly zero")


class PositionNeed(_Model):
    """Over-activation at a range of positions."""

    position_bucket: Count = Field(description="first position of the range")
    needed_mean: Fraction = Field(description="fraction of neurons needed for CETT 0.2, mean over layers and tokens")


class Profile(ModelRecord):
    """Over-activation of the dense model."""

    kind: Literal["profile"]
    layers: list[LayerNeed] = Field(description="one a layer, see below")
    token_curve: list[PositionNeed] = Field(default=[], description="one a range of positions, see below")


class Quality(MethodRecord):
    """Quality of one plan on held-out text."""

    kind: Literal["quality"]
    status: str | None = Field(
        default=None, pattern=r"^n/a \(.+\)$", description="`n/a (floor 0.82)` instead of numbers"
    )
    tokens: Annotated[int, Field(ge=1)] | None = Field(default=None, description="scored tokens")
    ppl_dense: Perplexity | None = Field(default=None, description="perplexity a token of the dense model")
    ppl: Perplexity | None = Field(default=None, description="perplexity a token with skipping")
    bits_per_byte_dense: Natural | None = Field(default=None, description="bits a byte of text, dense")
    bits_per_byte: Natural | None = Field(default=None, description="bits a byte of text, with skipping")
    kl: Natural | None = Field(default=None, description="KL(dense || sparse), nats a token")
    top1_agreement: Fraction | None = Field(
        default=None, description="scored tokens with the same most likely next token"
    )
    ppl_unquantised: Perplexity | None = Field(
        default=None, description="`ppl_dense` before the weights were quantised"
    )
    kl_quantising: Natural | None = Field(
        default=None,
        description="KL(dense before quantising || dense), nats a token: the loss of quantising; `kl` is that of skipping",
    )
    ppl_random: Perplexity | None = Field(default=None, description="matched random: same sites, same counts")
    kl_random: Natural | None = Field(default=None, description="KL of the matched random")
    ppl_oracle: Perplexity | None = Field(default=None, description="matched oracle: same sites, same counts")
    kl_oracle: Natural | None = Field(default=None, description="KL of the matched oracle")
    sparsity_by_layer: list[Fraction] = Field(default=[], description="realized sparsity of each layer")
    floor: Natural | None = Field(default=None, description="least byte fraction the method can reach on this model")
    compensation: bool | str = Field(
        default=False, description="what gives back a part of what is skipped: a bias, a centre"
    )
    search: Search | None = Field(
        default=None, description="how the target was found where a budget was asked for, see below"
    )

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.weights == "random":
            raise ValueError("weights are random: no quality is recorded for them")
        numbers = ("tokens", "ppl_dense", "ppl", "kl", "top1_agreement", "realized_sparsity")
        given = [n for n in numbers if getattr(self, n) is not None]
        if self.status is None and len(given) < len(numbers):
            raise ValueError(f"{', '.join(n for n in numbers if n not in given)} missing, and no status says why")
        if self.status is not None and given:
            raise ValueError(f"status {self.status!r} and {', '.join(given)} exclude each other")
        return self


class Speed(MethodRecord):
    """Decoding speed of one plan beside the dense model, timed in one process."""

    kind: Literal["speed"]
    context: str = Field(min_length=1, description="`model itself`, or the name of a shape")
    tok_s: Positive = Field(description="tokens a second with skipping")
    tok_s_dense: Positive = Field(description="tokens a second of the dense baseline")
    tok_s_kernels: Positive | None = Field(
        default=None, description="tokens a second of dense on MOYU's kernels, same run"
    )
    speedup: Positive = Field(description="tok_s / tok_s_dense")
    speedup_limit: Positive = Field(description="by bytes: 1 / byte_fraction")
    gb_s: Positive = Field(description="weight bytes read a second, 10^9")
    gb_s_dense: Positive | None = Field(default=None, description="the same for dense")
    read_ceiling_gb_s: Positive = Field(description="best measured streaming read")
    ceiling_share: Positive = Field(description="gb_s / read_ceiling_gb_s; above 1 the weights came from a cache")
    step_bytes: Positive | None = Field(default=None, description="bytes of weights that a token reads")
    peak_bytes: Count | None = Field(default=None, description="peak memory of the process")
    prompt_tokens: Count | None = Field(default=None, description="tokens of the prompt")
    first_token_s: Positive | None = Field(default=None, description="seconds to the first new token after it")
    first_token_s_dense: Positive | None = Field(default=None, description="the same for dense")
    p20: Positive = Field(description="seconds a token, 20th percentile")
    p50: Positive = Field(description="the median")
    p80: Positive = Field(description="80th percentile")
    backend: str = Field(min_length=1, description="back end of the kernels, instruction set, threads")
    batch: Annotated[int, Field(ge=1)] = Field(default=1, description="sequences decoded at once")
    layers: Annotated[int, Field(ge=1)] | None = Field(default=None, description="layers of the timed model")
    dense_baseline: str = Field(min_length=1, description="what dense is")

    @model_validator(mode="after")
    def _measured(self) -> Self:
        if self.simulated:
            raise ValueError("a masked run reads every byte: simulated must be false in a speed record")
        if abs(self.speedup * self.tok_s_dense / self.tok_s - 1) > 0.01:
            raise ValueError(
                f"speedup {self.speedup:.3g} is not tok_s / tok_s_dense = {self.tok_s / self.tok_s_dense:.3g}"
            )
        if not self.p20 <= self.p50 <= self.p80:
            raise ValueError(f"p20 {self.p20:.3g}, p50 {self.p50:.3g} and p80 {self.p80:.3g} are not in order")
        return self


class Correction(_Model):
    """The dense model's part in a text that a plan drafted."""

    rule: Literal["lossless", "sirius"] = Field(description="which drafts stay")
    drafts: Count = Field(description="tokens that are drafted before dense looks at them")
    temperature: float = Field(ge=0, description="0 is greedy")
    acceptance: Fraction = Field(description="accepted of the drafts that were looked at")
    tokens_per_pass: float = Field(ge=0, description="new tokens a dense pass")
    margin: float | None = Field(
        default=None, description="at the first token that differs from dense: its two largest logits apart"
    )


class Generation(MethodRecord):
    """Text after one prompt, and dense text beside it where dense ran too."""

    kind: Literal["generation"]
    prompt: str = Field(description="text before the new tokens")
    dense_text: str | None = Field(
        default=None, description="new text of the dense model; null where dense did not run"
    )
    sparse_text: str = Field(description="new text with skipping")
    dense_tokens: list[str] | None = Field(default=None, description="one string a token")
    sparse_tokens: list[str] = Field(description="one string a token")
    first_difference: Count | None = Field(default=None, description="index of the first token that differs")
    new_tokens: Count = Field(description="length of the sparse text")
    first_token_s_dense: Positive | None = Field(default=None, description="seconds to the first new token, dense")
    first_token_s: Positive | None = Field(default=None, description="the same with the plan applied")
    tok_s_dense: Positive | None = Field(default=None, description="tokens a second after the first, dense")
    tok_s: Positive | None = Field(default=None, description="the same with the plan applied; one run, not a benchmark")
    correction: Correction | None = Field(
        default=None, description="where dense corrected what the plan drafted, see below"
    )

    @model_validator(mode="after")
    def _trained(self) -> Self:
        if self.weights == "random":
            raise ValueError("weights are random: no text is recorded for them")
        return self


class Kernel(Stamped):
    """Read rate of one kernel."""

    kind: Literal["kernel"]
    op: str = Field(min_length=1, description="name of the operator")
    shape: list[int] = Field(description="of its weights")
    kept: Fraction = Field(description="fraction of units read")
    gb_s: Positive = Field(description="weight bytes read a second, 10^9")
    read_ceiling_gb_s: Positive = Field(description="best measured streaming read")
    share: Positive = Field(description="gb_s / read_ceiling_gb_s")
    backend: str | None = Field(default=None, description="back end, instruction set, threads")


class Condition(_Model):
    """One condition of a claim."""

    name: str = Field(min_length=1, description="of the condition")
    meaning: str = Field(description="of the number")
    rule: str = Field(description="stated before the study ran")
    verdict: Literal["HOLDS", "FAILS", "INCONCLUSIVE"] = Field(description="by the rule")
    value: float | None = Field(default=None, description="estimate")
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(default=None, description="95 %")
    units: Count | None = Field(default=None, description="independent units, usually documents")
    power: Fraction | None = Field(default=None, description="to see the smallest effect of interest")


class Control(_Model):
    """What had to be true of the instrument."""

    name: str = Field(min_length=1, description="of the control")
    meaning: str = Field(description="of the number")
    rule: str = Field(description="limit, stated before the study ran")
    value: float | None = Field(default=None, description="as measured")
    passed: bool = Field(description="where false, the study is inconclusive")


class Study(Stamped):
    """Verdict on one claim."""

    kind: Literal["study"]
    name: str = Field(min_length=1, description="of the claim")
    verdict: Literal["HOLDS", "FAILS", "INCONCLUSIVE"] = Field(description="of the study")
    effect: float | None = Field(default=None, description="size of the effect, in the study's unit")
    interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="of the effect, 95 %"
    )
    model: str | None = Field(default=None, description="model that was studied")
    claim: str = Field(default="", description="in one sentence")
    prediction: str = Field(default="", description="what must be seen if it is true")
    refutation: str = Field(default="", description="what would refute it")
    quick: bool = Field(default=False, description="a smoke test, too small for its verdict to count")
    conditions: list[Condition] = Field(default=[], description="the first gives effect and interval, see below")
    controls: list[Control] = Field(default=[], description="see below")
    nulls: dict[str, float] = Field(default={}, description="what chance, popularity or an untrained model reach")
    details: dict[str, Any] = Field(default={}, description="secondary numbers and the series of figures")
    seconds: Natural | None = Field(default=None, description="that it took, parts kept from before not counted")


class Cell(MethodRecord):
    """One cell of the scoreboard: a method on a model, at a byte fraction or at a sparsity."""

    kind: Literal["cell"]
    status: str | None = Field(
        default=None, pattern=r"^n/a \(.+\)$", description="`n/a (floor 0.82)` instead of numbers"
    )
    quick: bool = Field(default=False, description="a smoke test, too small to be read")
    weight_bits: Positive = Field(description="bits a weight of a block takes, its share of a scale included")
    byte_fraction_16: Positive | None = Field(
        default=None,
        description="bytes a step reads over those of the dense model in 16 bits; `byte_fraction`: in these bits",
    )
    floor: Natural | None = Field(default=None, description="least byte fraction the method can reach, in these bits")
    knobs: dict[str, Any] = Field(default={}, description="settings of the method, chosen on the validation part")
    site_knobs: dict[str, int] = Field(default={}, description="how many sites have which settings of their own")
    documents: Count | None = Field(default=None, description="documents of held-out text, a window each")
    tokens: Annotated[int, Field(ge=1)] | None = Field(default=None, description="scored tokens")
    ppl_dense: Perplexity | None = Field(default=None, description="perplexity a token of the dense model in 16 bits")
    ppl: Perplexity | None = Field(default=None, description="perplexity a token")
    kl: Natural | None = Field(default=None, description="KL(dense in 16 bits || this), nats a token")
    kl_interval: Annotated[list[float], Field(min_length=2, max_length=2)] | None = Field(
        default=None, description="95 %, over documents"
    )
    top1_agreement: Fraction | None = Field(
        default=None, description="scored tokens with the same most likely next token"
    )
    ppl_unquantised: Perplexity | None = Field(
        default=None, description="`ppl_dense` before the weights were quantised"
    )
    kl_quantising: Natural | None = Field(
        default=None,
        description="KL(dense before quantising || dense), nats a token: the loss of quantising; `kl` is that of skipping",
    )
    kl_random: Natural | None = Field(default=None, description="KL of the matched random")
    kl_oracle: Natural | None = Field(default=None, description="KL of the matched oracle")
    by_document: dict[str, list[float]] = Field(
        default={}, description="means of each document, for paired intervals: kl, nll, and those of random and oracle"
    )
    fit_s: Natural | None = Field(default=None, description="seconds that calibrating and training took")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        numbers = ("documents", "tokens", "ppl_dense", "ppl", "kl", "byte_fraction", "byte_fraction_16")
        given = [n for n in numbers if getattr(self, n) is not None]
        if self.status is None and len(given) < len(numbers):
            raise ValueError(f"{', '.join(n for n in numbers if n not in given)} missing, and no status says why")
        if self.status is not None and given:
            raise ValueError(f"status {self.status!r} and {', '.join(given)} exclude each other")
        return self


CoverageStatus = Literal["taken", "partly", "dense", "no network", "does not build", "fails"]


class Coverage(Stamped):
    """Whether an architecture is taken."""

    kind: Literal["coverage"]
    architecture: str = Field(min_length=1, description="model type in transformers")
    taken: bool = Field(description="whether MOYU takes it")
    reason: str = Field(default="", description="why not, or what was checked")
    status: CoverageStatus | None = Field(
        default=None, description="`no network`: none in it; `partly`: some of its networks"
    )
    class_name: str | None = Field(default=None, description="class that was built")
    networks: str | None = Field(
        default=None, description="kinds of feed-forward networks that were proved, with their numbers"
    )
    attention: str | None = Field(
        default=None, description="kinds of attention that were proved, with their numbers and heads"
    )
    checks: list[str] = Field(default=[], description="kernel shapes that were checked, and generation")
    left: list[str] = Field(default=[], description="parameters of feed-forward networks, by their names, left dense")
    gaps: list[str] = Field(default=[], description="layers left dense and why")
    seconds: Natural | None = Field(default=None, description="that it took")


class Task(MethodRecord):
    """A metric of a task of lm-evaluation-harness under one plan, dense beside it on the same documents."""

    kind: Literal["task"]
    asked: str = Field(min_length=1, description="task, group or tag that was asked for; what is skipped is its mean")
    task: str = Field(min_length=1, description="task, or group, that the metric is of")
    metric: str = Field(min_length=1, description="name, and the filter of answers where there is one")
    higher_is_better: bool | None = Field(default=None, description="as the task says")
    samples: Annotated[int, Field(ge=1)] = Field(description="documents")
    shots: Count | None = Field(default=None, description="examples before each")
    sparse_positions: Annotated[int, Field(ge=1)] = Field(
        description="positions of all tasks asked for at which units were skipped; a dense run has none"
    )
    value: float = Field(description="of the metric, under the plan")
    stderr: Natural | None = Field(default=None, description="its standard error over documents")
    value_dense: float = Field(description="of the metric, dense")
    stderr_dense: Natural | None = Field(default=None, description="its standard error over documents")
    difference_stderr: Natural | None = Field(
        default=None, description="standard error of value - value_dense, by pairs of the same document"
    )
    harness: str = Field(min_length=1, description="lm-eval and its version")

    @model_validator(mode="after")
    def _trained(self) -> Self:
        if self.weights == "random":
            raise ValueError("weights are random: no task is recorded for them")
        return self


KINDS = (Environment, Profile, Quality, Speed, Generation, Kernel, Study, Cell, Task, Coverage)
Record = Environment | Profile | Quality | Speed | Generation | Kernel | Study | Cell | Task | Coverage


@cache
def _adapter() -> TypeAdapter[Any]:
    return TypeAdapter(Annotated[Record, Field(discriminator="kind")])


def stamp(**fields: Any) -> Record:
    """A record of these fields and what every record carries; ValueError names the field that is wrong."""
    base = dict(stamped())
    if fields.get("kind") == "environment":
        base |= machine()
    return validate(base | fields)


def validate(fields: Any) -> Record:
    """A record from plain values; ValueError like ``quality.kl must be >= 0, not -1.0``."""
    try:
        return _adapter().validate_python(fields)
    except ValidationError as error:
        raise ValueError("; ".join(_problem(e) for e in error.errors())) from None


def _problem(error: Any) -> str:
    place = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).removeprefix(".")
    value, context, legal = error["input"], error.get("ctx", {}), [_kind(k) for k in KINDS]
    for bound, sign in (("ge", ">="), ("gt", ">"), ("le", "<="), ("lt", "<")):
        if bound in context:
            return f"{place} must be {sign} {context[bound]:g}, not {value!r}"
    match error["type"]:
        case "missing":
            return f"{place} is missing"
        case "extra_forbidden":
            return f"{place} is not a field of this record"
        case "value_error":
            return f"{place}: {context['error']}"
        case "union_tag_not_found":
            return f"kind is missing, one of {', '.join(legal)}"
        case "union_tag_invalid":
            near = get_close_matches(context["tag"], legal, n=1, cutoff=0.3)
            return f"kind {context['tag']!r} is unknown" + (
                f", did you mean {near[0]!r}?" if near else f", one of {', '.join(legal)}"
            )
    return f"{place or 'record'}: {error['msg'][:1].lower()}{error['msg'][1:]}, not {value!r}"


def _line(record: Record) -> bytes:
    plain = record.model_dump(mode="python")
    validate(plain)  # a record made around the checks does not reach a file
    return json.dumps({"kind": plain.pop("kind"), **plain}, ensure_ascii=False, allow_nan=False).encode() + b"\n"


def write(path: Path, records: Iterable[Record]) -> None:
    """Write all records, or leave the old file as it was: ValueError for a wrong record, OSError from the disk."""
    atomic_write_bytes(path, b"".join(_line(r) for r in records))


def append(path: Path, record: Record) -> None:
    """Add one whole line, synced to disk. UserError where the last line is truncated; an OSError leaves no part."""
    line = _line(record)
    with open(path, "ab+", buffering=0) as file:
        before = file.seek(0, os.SEEK_END)
        if before:
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                read(path)  # raises where the last line is not whole
                line = b"\n" + line
        try:
            if file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise


def read(path: Path) -> list[Record]:
    """All records of a file; UserError like ``records.jsonl:12: quality.kl must be >= 0, not -1.0``."""
    return list(_parse(path))


def _parse(path: Path) -> Iterator[Record]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"no records in {str(path)!r} ({error.strerror})", "`moyu run` writes them") from error
    lines = data.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path.name}:{number}"
        try:
            plain = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                raise UserError(f"{where}: the last line is truncated", "delete it, or run again") from error
            raise UserError(f"{where}: not JSON ({error})", "delete the line, or run again") from error
        try:
            yield validate(plain)
        except ValueError as error:
            raise UserError(f"{where}: {error}", "fields are in docs/records.md") from error


def schema_markdown() -> str:
    """The fields of every kind, as the tables of docs/records.md."""
    shared = [
        ("Every record", Stamped),
        ("A record about a model", ModelRecord),
        ("A record about a method", MethodRecord),
    ]
    kinds = [(f"`{_kind(k)}`", k) for k in KINDS]
    parts = [
        ("`protocol`", Protocol),
        ("`kv_bytes` of a record about a method", KvBytes),
        ("`search` of `quality`", Search),
        ("`correction` of `generation`", Correction),
        ("`layers` of `profile`", LayerNeed),
        ("`token_curve` of `profile`", PositionNeed),
        ("`conditions` of `study`", Condition),
        ("`controls` of `study`", Control),
    ]
    return "\n".join(_section(title, model) for title, model in shared + kinds + parts)


def _kind(model: type[BaseModel]) -> str:
    return model.model_json_schema()["properties"]["kind"]["const"]


def _section(title: str, model: type[BaseModel]) -> str:
    """A heading, what the fields come on top of, and a row for each field of the model itself."""
    schema = model.model_json_schema()
    base = {ModelRecord: "a record about a model", MethodRecord: "a record about a method", Stamped: "every record"}
    above = next((f" The fields of {base[b]}, and:" for b in model.__mro__[1:] if b in base), "")
    lines = [
        f"### {title}",
        "",
        f"{schema['description']}{above}",
        "",
        "| field | type | | meaning |",
        "|---|---|---|---|",
    ]
    for name in model.__annotations__:
        if name in schema["properties"] and name != "kind":
            entry = schema["properties"][name]
            meaning = entry.get("description", "").replace("|", "\\|")
            need = "required" if name in schema.get("required", ()) else ""
            lines.append(f"| `{name}` | {_type(entry)} | {need} | {meaning} |")
    return "\n".join([*lines, ""])


def _type(entry: Mapping[str, Any]) -> str:
    """A JSON schema's type in words."""
    if "anyOf" in entry:
        return " or ".join(_type(e) for e in entry["anyOf"])
    if "enum" in entry:
        return " or ".join(f"`{v}`" for v in entry["enum"])
    if "$ref" in entry:
        return "object"
    if entry["type"] == "array":
        return f"list of {_type(entry['items'])}"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    return " ".join([entry["type"], *(f"{sign} {entry[key]:g}" for key, sign in bounds.items() if key in entry)])
