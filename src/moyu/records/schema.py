"""The kinds of records: their fields, and the rules that tie fields together."""

from __future__ import annotations

from typing import Any, Literal, Self, get_args

from pydantic import BaseModel, Field, model_validator

from moyu.records.parts import (
    Amount,
    Condition,
    Control,
    Correction,
    Count,
    Fraction,
    Interval,
    KvBytes,
    LayerNeed,
    Natural,
    Perplexity,
    PositionNeed,
    Positive,
    Protocol,
    Search,
    Strict,
    Verdict,
)  # fmt: skip


def written(value: Any) -> Any:
    """A value with its words as UTF-8 has them: in a C locale, paths and prompts come as single bytes, which no file can hold."""
    if isinstance(value, str) and not value.isascii():
        return value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if isinstance(value, dict):
        return {key: written(own) for key, own in value.items()}
    return [written(own) for own in value] if isinstance(value, list) else value


class Stamped(Strict):
    """Fields of every record."""

    commit: str | None = Field(default=None, description="git hash of the checkout that the package ran from")
    dirty: bool | None = Field(default=None, description="whether the package's files differed from that commit")
    versions: dict[str, str] = Field(description="moyu, torch, transformers, python")
    device: str = Field(min_length=1, description="processor or accelerator")
    threads: Amount = Field(description="threads of torch")
    dtype: str | None = Field(default=None, description="type of the weights")
    seed: int | None = Field(default=None, description="seed of everything random")
    date: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)$", description="ISO 8601, UTC")
    notes: list[str] = Field(default=[], description="caveats for the reader of the numbers")
    made_from: str | None = Field(
        default=None,
        description="of a result that is kept: digest of the weights, the text, the settings and the version of the definition; "
        "it is found again by this alone",
    )

    @model_validator(mode="before")
    @classmethod
    def _words(cls, values: Any) -> Any:
        return written(values)


class ModelRecord(Stamped):
    """A record about one model."""

    model: str = Field(min_length=1, description="name, or path, of the model")
    weights: Literal["trained", "random"] = Field(description="random weights have a speed and no quality")
    weight_format: str | None = Field(
        default=None,
        description="how linears are stored: `q8_0`, `q4_0`, or null for numbers of type `dtype`; they compute in `dtype`",
    )
    protocol: Protocol | None = Field(default=None, description="how quality was scored, see below")
    corpus: dict[str, Any] | None = Field(default=None, description="fingerprint of the text")


class MethodRecord(ModelRecord):
    """A record about one method on one model."""

    method: str = Field(min_length=1, description="name in the registry; `dense` where nothing is skipped")
    family: str | None = Field(default=None, description="family of the method")
    granularity: str | None = Field(
        default=None, description="what shares one mask: `token`, `sequence`, or `static` (all text)"
    )
    plan: str | None = Field(default=None, description="hash of the plan")
    simulated: bool = Field(description="true: units were masked; false: units were skipped, and their bytes not read")
    target_sparsity: Fraction | None = Field(default=None, description="fraction of units to skip, as asked")
    target_byte_fraction: Fraction | None = Field(default=None, description="byte fraction, as asked")
    realized_sparsity: Fraction | None = Field(default=None, description="fraction of units skipped, as measured")
    byte_fraction: Positive | None = Field(
        default=None,
        description="bytes that a step reads over the dense model's; above 1 if a plan adds more bytes than it skips",
    )
    ideal_byte_fraction: Positive | None = Field(
        default=None, description="the byte fraction that a method without a skipping kernel would have with one"
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


def _refuse_random(record: MethodRecord, what: str) -> None:
    if record.weights == "random":
        raise ValueError(f"weights are random: no {what} is recorded for them")


def _check_numbers(record: Quality | Cell, names: tuple[str, ...]) -> None:
    """A record has all of these numbers, or a status that says why it has none."""
    status, given = record.status, [n for n in names if getattr(record, n) is not None]
    if status is None and len(given) < len(names):
        raise ValueError(f"{', '.join(n for n in names if n not in given)} missing, and no status says why")
    if status is not None and given:
        raise ValueError(f"status {status!r} and {', '.join(given)} exclude each other")


class Environment(Stamped):
    """The machine and the command of a run."""

    kind: Literal["environment"]
    platform: str = Field(description="operating system and architecture")
    cores: Amount = Field(description="cores the process may use")
    command: str | None = Field(default=None, description="command line that made the records")


class Profile(ModelRecord):
    """Over-activation of the dense model."""

    kind: Literal["profile"]
    layers: list[LayerNeed] = Field(description="one per layer, see below")
    token_curve: list[PositionNeed] = Field(default=[], description="one per range of positions, see below")


class Quality(MethodRecord):
    """Quality of one plan on held-out text."""

    kind: Literal["quality"]
    status: str | None = Field(
        default=None, pattern=r"^n/a \(.+\)$", description="`n/a (floor 0.82)` instead of numbers"
    )
    tokens: Amount | None = Field(default=None, description="scored tokens")
    ppl_dense: Perplexity | None = Field(default=None, description="perplexity per token of the dense model")
    ppl: Perplexity | None = Field(default=None, description="perplexity per token with skipping")
    bits_per_byte_dense: Natural | None = Field(default=None, description="bits per byte of text, dense")
    bits_per_byte: Natural | None = Field(default=None, description="bits per byte of text, with skipping")
    kl: Natural | None = Field(default=None, description="KL(dense || sparse), nats per token")
    top1_agreement: Fraction | None = Field(
        default=None, description="scored tokens with the same most likely next token"
    )
    ppl_unquantised: Perplexity | None = Field(
        default=None, description="`ppl_dense` before the weights were quantised"
    )
    kl_quantising: Natural | None = Field(
        default=None,
        description="KL(dense before quantising || dense), nats per token: the loss from quantising; `kl` is the loss from skipping",
    )
    ppl_random: Perplexity | None = Field(default=None, description="matched random: same sites, same counts")
    kl_random: Natural | None = Field(default=None, description="KL of the matched random")
    ppl_oracle: Perplexity | None = Field(default=None, description="matched oracle: same sites, same counts")
    kl_oracle: Natural | None = Field(default=None, description="KL of the matched oracle")
    sparsity_by_layer: list[Fraction] = Field(default=[], description="realized sparsity of each layer")
    floor: Natural | None = Field(default=None, description="least byte fraction the method can reach on this model")
    compensation: bool | str = Field(
        default=False, description="compensation for skipped units: a bias, a centre; false without"
    )
    search: Search | None = Field(default=None, description="how the target was found for a budget, see below")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        _refuse_random(self, "quality")
        _check_numbers(self, ("tokens", "ppl_dense", "ppl", "kl", "top1_agreement", "realized_sparsity"))
        return self


class Speed(MethodRecord):
    """Decoding speed of one plan beside the dense model, timed in one process."""

    kind: Literal["speed"]
    context: str = Field(min_length=1, description="`model itself`, or the name of a shape")
    tok_s: Positive = Field(description="tokens per second with skipping")
    tok_s_dense: Positive = Field(description="tokens per second of the dense baseline")
    tok_s_kernels: Positive | None = Field(
        default=None, description="tokens per second of the dense model on MOYU's kernels, in the same run"
    )
    speedup: Positive = Field(description="tok_s / tok_s_dense")
    speedup_limit: Positive = Field(description="the speed-up that the bytes allow: 1 / byte_fraction")
    gb_s: Positive = Field(description="gigabytes of weights read per second")
    gb_s_dense: Positive | None = Field(default=None, description="the same for dense")
    read_ceiling_gb_s: Positive = Field(description="best measured rate of streaming reads, gigabytes per second")
    ceiling_share: Positive = Field(description="gb_s / read_ceiling_gb_s; above 1 if weights came from a CPU cache")
    step_bytes: Positive | None = Field(default=None, description="bytes of weights read per token")
    peak_bytes: Count | None = Field(default=None, description="peak memory of the process")
    prompt_tokens: Count | None = Field(default=None, description="tokens of the prompt")
    first_token_s: Positive | None = Field(default=None, description="seconds from the prompt to the first new token")
    first_token_s_dense: Positive | None = Field(default=None, description="the same for dense")
    p20: Positive = Field(description="seconds per token, 20th percentile")
    p50: Positive = Field(description="the median")
    p80: Positive = Field(description="80th percentile")
    backend: str = Field(min_length=1, description="back end of the kernels, instruction set, threads")
    step: str | None = Field(
        default=None,
        description="implementation of a decode step that ran, and why not a faster one where there is one",
    )
    batch: Amount = Field(default=1, description="sequences decoded at once")
    layers: Amount | None = Field(default=None, description="layers of the timed model")
    dense_baseline: str = Field(min_length=1, description="the dense baseline")

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


class Generation(MethodRecord):
    """Text after one prompt, and the dense text where dense ran too."""

    kind: Literal["generation"]
    prompt: str = Field(description="text of the prompt")
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
    tok_s_dense: Positive | None = Field(default=None, description="tokens per second after the first, dense")
    tok_s: Positive | None = Field(default=None, description="the same with the plan applied; one run, not a benchmark")
    step: str | None = Field(
        default=None,
        description="implementation of a decode step that ran, and why not a faster one where there is one",
    )
    correction: Correction | None = Field(
        default=None, description="how the dense model corrected the plan's drafts, see below"
    )

    @model_validator(mode="after")
    def _trained(self) -> Self:
        _refuse_random(self, "text")
        return self


class Kernel(Stamped):
    """Read rate of one kernel."""

    kind: Literal["kernel"]
    op: str = Field(min_length=1, description="name of the operator")
    shape: list[int] = Field(description="shape of its weights")
    kept: Fraction = Field(description="fraction of units read")
    gb_s: Positive = Field(description="gigabytes of weights read per second")
    read_ceiling_gb_s: Positive = Field(description="best measured rate of streaming reads, gigabytes per second")
    share: Positive = Field(description="gb_s / read_ceiling_gb_s")
    backend: str | None = Field(default=None, description="back end, instruction set, threads")


class Study(Stamped):
    """The verdict on one claim."""

    kind: Literal["study"]
    name: str = Field(min_length=1, description="name of the claim")
    verdict: Verdict = Field(description="verdict of the study")
    effect: float | None = Field(default=None, description="size of the effect, in the study's unit")
    interval: Interval | None = Field(default=None, description="95 % interval of the effect")
    model: str | None = Field(default=None, description="model that was studied")
    claim: str = Field(default="", description="the claim in one sentence")
    prediction: str = Field(default="", description="the observation to expect if the claim is true")
    refutation: str = Field(default="", description="the observation that would refute it")
    quick: bool = Field(default=False, description="a smoke test, too small for its verdict to count")
    conditions: list[Condition] = Field(default=[], description="the first gives effect and interval, see below")
    controls: list[Control] = Field(default=[], description="see below")
    nulls: dict[str, float] = Field(default={}, description="values of chance, popularity or an untrained model")
    details: dict[str, Any] = Field(default={}, description="secondary numbers and the series of figures")
    seconds: Natural | None = Field(default=None, description="duration, without parts reused from earlier runs")


class Cell(MethodRecord):
    """One cell of the scoreboard: a method on a model, at a byte fraction or at a sparsity."""

    kind: Literal["cell"]
    status: str | None = Field(
        default=None, pattern=r"^n/a \(.+\)$", description="`n/a (floor 0.82)` instead of numbers"
    )
    quick: bool = Field(default=False, description="a smoke test, too small for its numbers to count")
    weight_bits: Positive = Field(description="bits per weight of a block, with its share of a scale")
    byte_fraction_16: Positive | None = Field(
        default=None,
        description="bytes that a step reads over the dense model's in 16 bits; `byte_fraction` is over the dense model's in `weight_bits`",
    )
    step_bytes: Positive | None = Field(default=None, description="of a quantised file: bytes that a step reads")
    bits_per_weight: Positive | None = Field(
        default=None,
        description="bits of `step_bytes` for each weight that a token is multiplied with, the head's included",
    )
    floor: Natural | None = Field(
        default=None, description="least byte fraction that the method can reach, in `weight_bits`"
    )
    knobs: dict[str, Any] = Field(default={}, description="settings of the method, chosen on the validation part")
    site_knobs: dict[str, int] = Field(default={}, description="number of sites by the settings of their own")
    documents: Count | None = Field(default=None, description="documents of held-out text, one window of each")
    tokens: Amount | None = Field(default=None, description="scored tokens")
    ppl_dense: Perplexity | None = Field(
        default=None, description="perplexity per token of the dense model in 16 bits, or of the file"
    )
    ppl: Perplexity | None = Field(default=None, description="perplexity per token")
    kl: Natural | None = Field(default=None, description="KL(dense in 16 bits, or the file || this), nats per token")
    kl_interval: Interval | None = Field(default=None, description="95 % interval over documents")
    top1_agreement: Fraction | None = Field(
        default=None, description="scored tokens with the same most likely next token"
    )
    ppl_unquantised: Perplexity | None = Field(
        default=None, description="`ppl_dense` before the weights were quantised"
    )
    kl_quantising: Natural | None = Field(
        default=None,
        description="KL(dense before quantising || dense), nats per token: the loss from quantising; `kl` is the loss from skipping",
    )
    kl_random: Natural | None = Field(default=None, description="KL of the matched random")
    kl_oracle: Natural | None = Field(default=None, description="KL of the matched oracle")
    by_document: dict[str, list[float]] = Field(
        default={}, description="means per document, for paired intervals: kl and nll, also of random and oracle"
    )
    fit_s: Natural | None = Field(default=None, description="seconds of calibration and training")

    @model_validator(mode="after")
    def _whole(self) -> Self:
        _check_numbers(self, ("documents", "tokens", "ppl_dense", "ppl", "kl", "byte_fraction", "byte_fraction_16"))
        return self


CoverageStatus = Literal["taken", "partly", "dense", "no network", "does not build", "fails"]


class Coverage(Stamped):
    """Whether MOYU supports an architecture."""

    kind: Literal["coverage"]
    architecture: str = Field(min_length=1, description="model type in transformers")
    taken: bool = Field(description="whether MOYU supports it")
    reason: str = Field(default="", description="the reason why not, or what was proved")
    status: CoverageStatus | None = Field(
        default=None, description="`no network`: it has none; `partly`: some of its networks are supported"
    )
    class_name: str | None = Field(default=None, description="class of the model that was checked")
    networks: str | None = Field(default=None, description="kinds of proved feed-forward networks, with their counts")
    attention: str | None = Field(default=None, description="kinds of proved attention, with their counts and heads")
    checks: list[str] = Field(default=[], description="kernel shapes that were checked, and generation")
    left: list[str] = Field(default=[], description="names of parameters of feed-forward networks that stay dense")
    gaps: list[str] = Field(default=[], description="layers that stay dense, with the reason")
    seconds: Natural | None = Field(default=None, description="duration of the check")


class Comparison(ModelRecord):
    """A file of quantised weights, or a plan, held against the file that it was made from (`benchmarks/quants`)."""

    kind: Literal["comparison"]
    row: str = Field(min_length=1, description="llama.cpp's type of the file, the plan's name, or `source`")
    what: Literal["source", "file", "plan"] = Field(description="`source`: the file that all others are held against")
    choice: Literal["own", "random", "oracle"] = Field(
        default="own", description="of a plan: its own choice of units, or the matched random or oracle's"
    )
    source_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", description="of the source file")
    file_sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$", description="of the file that was made")
    made_by: str | None = Field(default=None, description="what made the file, and its version")
    importance: str | None = Field(
        default=None, description="digest of the text that the importance matrix was measured on; null without one"
    )
    tensors: str = Field(description="types of the file's tensors, with their counts")
    plan: str | None = Field(default=None, description="hash of the plan")
    step_bytes: Positive = Field(
        description="bytes that a decode step reads: of a file as it stores them, of a plan as MOYU does"
    )
    step_bytes_moyu: Positive = Field(description="the same as MOYU stores them: scales of K types take a byte each")
    bits_per_weight: Positive | None = Field(
        default=None,
        description="bits of `step_bytes` that a weight of the blocks takes; null for a plan that leaves out bits of the head as well",
    )
    documents: Amount = Field(description="documents of held-out text, one window of each")
    tokens: Amount = Field(description="scored tokens")
    ppl_source: Perplexity = Field(description="perplexity per token of the source file")
    ppl: Perplexity = Field(description="perplexity per token")
    kl: Natural = Field(description="KL(source || this), nats per token")
    kl_interval: Interval = Field(description="95 % interval over documents")
    top1_agreement: Fraction = Field(description="scored tokens with the same most likely next token")
    by_document: dict[str, list[float]] = Field(description="means per document, for paired intervals: kl and nll")


class Task(MethodRecord):
    """A metric of a task of lm-evaluation-harness under one plan, and dense on the same documents."""

    kind: Literal["task"]
    asked: str = Field(min_length=1, description="task, group or tag that was asked for; sparsity is a mean over it")
    task: str = Field(min_length=1, description="task or group that the metric belongs to")
    metric: str = Field(min_length=1, description="name of the metric, with the filter of answers if there is one")
    higher_is_better: bool | None = Field(default=None, description="whether a larger value is better, by the task")
    samples: Amount = Field(description="documents")
    shots: Count | None = Field(default=None, description="examples before each document")
    sparse_positions: Amount = Field(
        description="positions at which units were skipped, over all tasks asked for (a dense run has none)"
    )
    value: float = Field(description="value of the metric under the plan")
    stderr: Natural | None = Field(default=None, description="its standard error over documents")
    value_dense: float = Field(description="value of the metric, dense")
    stderr_dense: Natural | None = Field(default=None, description="its standard error over documents")
    difference_stderr: Natural | None = Field(
        default=None, description="standard error of value - value_dense, paired by document"
    )
    harness: str = Field(min_length=1, description="lm-eval and its version")

    @model_validator(mode="after")
    def _trained(self) -> Self:
        _refuse_random(self, "task")
        return self


KINDS = (Environment, Profile, Quality, Speed, Generation, Kernel, Study, Cell, Comparison, Task, Coverage)
Record = Environment | Profile | Quality | Speed | Generation | Kernel | Study | Cell | Comparison | Task | Coverage


def kind_of(model: type[BaseModel]) -> str:
    """The name of a kind of records, as it stands in their field `kind`."""
    return get_args(model.model_fields["kind"].annotation)[0]
