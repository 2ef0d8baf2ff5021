"""The straight way from a model to a report; every stage is also a command of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from moyu import kernels, methods, records
from moyu.calibration import allocation, compensation, in_loop
from moyu.calibration.budget import Reader, plan_for_bytes, solve, ways
from moyu.calibration.profiling import Profile, profile
from moyu.calibration.walk import calibrate
from moyu.engine import speculation
from moyu.engine.applied import Applied
from moyu.engine.speculation import Correction, Speculation
from moyu.errors import OutOfReach, UserError
from moyu.kernels import Asked
from moyu.measure import accounting, text
from moyu.measure.benchmark import Comparison, compare
from moyu.measure.environment import device_name
from moyu.measure.evaluation import Quality, evaluate, predict, score
from moyu.measure.foresight import foresight
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.model import dissect, loading
from moyu.model.anatomy import Anatomy
from moyu.model.loading import Loaded
from moyu.model.quantised import weight_format
from moyu.plan import Plan, digests, fingerprint
from moyu.records import Record
from moyu.weights import QUANTISED

DEFAULT_METHODS = ("cett", "cats", "teal", "estimate", "griffin", "tda", "popularity")
DEFAULT_SPARSITY = 0.5
REFERENCE_BYTES = 512 << 20
PROMPT_TEXT = "def read_config(path):\n"


def default_methods(boundary: int) -> tuple[str, ...]:
    """The methods of a run that names none; without a dense prompt those that need none."""
    return tuple(m for m in DEFAULT_METHODS if boundary or methods.method_class(m).granularity != "sequence")


Stage = Callable[[str, int, int], None]  # (name of the stage, done, all)


def quiet(name: str, done: int, total: int) -> None:
    """A progress display that shows nothing."""


@dataclass(frozen=True)
class Settings:
    """What a run was asked for."""

    methods: Sequence[str] = DEFAULT_METHODS
    knobs: Mapping[str, Any] = field(default_factory=dict)
    sparsity: float | None = None
    bytes: float | None = None
    bias: bool = False
    centre: bool = False
    learn_bias: int = 0  # steps
    allocation: str = "uniform"  # of `allocation.ALLOCATIONS`
    text: Path | None = None
    prompt: str | None = None
    window: int = 256
    boundary: int = 128
    calibration: int = 16
    test: int = 32
    new_tokens: int = 48
    seed: int = 0
    backend: Asked = "auto"
    device: str = "cpu"
    dense_layers: tuple[int, ...] = ()  # left alone; -1 is the last
    weights: str | None = None  # of models.WEIGHTS; None: as the checkpoint has them

    def target(self) -> float:
        """The sparsity asked for."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def check(self) -> None:
        """Refuse what cannot be run, before anything is loaded."""
        loading.check_weights(self.weights)
        if self.sparsity is not None and self.bytes is not None:
            raise UserError("both a sparsity and a byte fraction are given", "give one of --sparsity and --bytes")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity must be in [0, 1), not {self.sparsity}", "0.5 skips half of the units")
        if self.bytes is not None and not 0 < self.bytes <= 1:
            raise UserError(f"byte fraction must be in (0, 1], not {self.bytes}", "0.6 reads 60 % of the dense bytes")
        allocation.check(self.allocation)
        if self.learn_bias < 0:
            raise UserError(f"--learn-bias must not be negative, not {self.learn_bias}", "100 steps, for example")
        if not 0 <= self.boundary < self.window - 1:
            raise UserError(
                f"a prompt of {self.boundary} tokens leaves nothing to score in windows of {self.window}",
                "use --prompt-tokens smaller than --window by at least 2",
            )
        for name in self.methods:
            if methods.method_class(name).granularity == "sequence" and self.boundary == 0:
                raise UserError(f"method {name!r} decides from the prompt", "use --prompt-tokens of at least 1")


@dataclass(frozen=True)
class Quantising:
    """What quantising alone costs, nothing skipped."""

    ppl_unquantised: float
    kl_quantising: float

    @property
    def note(self) -> str:
        """For readers of a table, whose columns are of skipping alone."""
        return (
            f"quantising its weights costs {self.kl_quantising:.2g} nats a token (perplexity {self.ppl_unquantised:.3g} before); "
            "the tables say what skipping costs on top"
        )

    @classmethod
    def measure(cls, model: Any, kind: str, windows: Windows) -> Quantising:
        """Quantise a model in place, and hold it against what it was before on the first of the windows.

        Their log-probabilities take REFERENCE_BYTES at most: some thousand tokens of a large vocabulary.
        """
        scored = windows.tokens.shape[1] - windows.prompt - 1
        count = max(1, REFERENCE_BYTES // (4 * scored * dissect.text_config(model).vocab_size))
        seen = dataclasses.replace(windows, tokens=windows.tokens[:count])
        before = predict(model, seen)
        loading.quantise_model(model, kind)
        found, own = score(before, predict(model, seen), seen), score(before, before, seen)
        return cls(own.perplexity, max(0.0, float(found.kl.mean())))


def open_model(name: str, weights: str | None, device: str = "cpu") -> Loaded:
    """A model as loaded, or in bfloat16 where that is asked for; blocks come later, once its text is known."""
    return loading.load(name, dtype="bfloat16" if weights == "bf16" else "auto", device=device)


def _left_dense(anatomy: Anatomy, plan: Plan | None = None) -> dict[str, list[str]]:
    """What records say about the parts of a model that are dense under a plan."""
    asked = () if plan is None else plan.calibration.get("dense_layers", ())
    gaps = [*anatomy.gaps, *(f"layer {n}: left dense as asked" for n in asked if n not in anatomy.dense_layers)]
    notes = [f"left dense: {gap}" for gap in gaps]
    if kinds := anatomy.foreign:
        notes.append(f"weights are {kinds}: units are masked, and no kernel saves their bytes")
    return {"notes": notes} if notes else {}


@dataclass
class Context:
    """A loaded model with its text, ready for the stages."""

    loaded: Loaded
    anatomy: Anatomy
    split: text.Split
    settings: Settings
    quantising: Quantising | None = None

    @classmethod
    def open(cls, name: str, settings: Settings, stage: Stage = quiet) -> Context:
        """Load a model and its text."""
        settings.check()
        stage("load", 0, 1)
        loaded = open_model(name, settings.weights, settings.device)
        length = settings.window
        split = text.windows_for(
            loaded,
            settings.text,
            length=length,
            prompt=settings.boundary,
            calibration=settings.calibration,
            test=settings.test,
            seed=settings.seed,
        )
        quantising = None
        if settings.weights in QUANTISED:
            quantising = Quantising.measure(loaded.model, settings.weights, split.test)
        anatomy = dissect.dissect(loaded.model, settings.dense_layers)
        stage("load", 1, 1)
        return cls(loaded, anatomy, split, settings, quantising)

    def common(self, plan: Plan | None = None, **fields: Any) -> dict[str, Any]:
        """Fields that every record about this model carries."""
        base = {
            "model": self.loaded.name,
            "weights": "trained",
            "weight_format": weight_format(self.loaded.model),
            "seed": self.settings.seed,
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "device": device_name(self.loaded.model.device),
            "protocol": {
                "prompt": self.settings.boundary,
                "window": self.settings.window,
                "table": "main" if self.settings.boundary else "token",
            },
        }
        base |= _left_dense(self.anatomy, plan)
        if self.quantising is not None:
            base["notes"] = [*base.get("notes", []), self.quantising.note]
        if plan is not None:
            base |= of_plan(plan)
        return base | fields

    def bytes_read(self, fraction: float) -> dict[str, float]:
        """A byte fraction as a record's field: only ideal where weights are quantised and no kernel reads them."""
        return {"ideal_byte_fraction" if self.anatomy.foreign else "byte_fraction": fraction}

    @cached_property
    def kv_bytes(self) -> list[dict[str, int]]:
        """Bytes of the full KV cache that a step reads, by context."""
        return accounting.kv_bytes(self.loaded.model)

    def without_prompt(self) -> Context:
        """The same test text at P = 0, every position sparse and scored: about as many tokens, so fewer windows."""
        tokens, length = self.split.test.tokens, self.settings.window
        count = max(1, round(len(tokens) * (length - self.settings.boundary - 1) / (length - 1)))
        test = dataclasses.replace(self.split.test, tokens=tokens[:count], prompt=0)
        return dataclasses.replace(
            self,
            split=dataclasses.replace(self.split, test=test),
            settings=dataclasses.replace(self.settings, boundary=0),
        )

    def method(self, name: str) -> Method:
        """A method with the knobs that it has."""
        legal = {f for f in methods.method_class(name).__dataclass_fields__}  # pyright: ignore[reportAttributeAccessIssue]
        unknown = [k for k in self.settings.knobs if not any(k in _knobs(m) for m in self.settings.methods)]
        if unknown:
            return methods.method(name, **{unknown[0]: None})  # raises with the nearest knob
        return methods.method(name, **{k: v for k, v in self.settings.knobs.items() if k in legal})

    def applicable(self, names: Sequence[str]) -> tuple[list[str], list[str]]:
        """Methods that have a site in this model, and those that have none."""
        able = [n for n in names if any(self.method(n).sites(b) for b in self.anatomy.all_blocks())]
        return able, [n for n in names if n not in able]

    def plan(
        self, name: str, sparsity: float | None = None, progress: Callable[[int, int], None] | None = None
    ) -> Plan:
        """Calibrate one method, at `sparsity` or for what the settings ask; OutOfReach below the method's floor."""
        method, byte_fraction = self.method(name), self.settings.bytes
        model, windows, allocated = self.loaded.model, self.split.calibration, self.settings.allocation
        options: dict[str, Any] = {
            "name": self.loaded.name,
            "revision": self.loaded.revision,
            "bias": self.settings.bias,
            "centre": self.settings.centre,
            "seed": self.settings.seed,
        }
        reader = Reader(model, self.anatomy)
        if sparsity is None and byte_fraction is not None and allocated == "uniform":
            found = ways(reader, method, windows, progress, **options)
            plan = plan_for_bytes(found, self.split, byte_fraction, progress=progress)
        else:
            if sparsity is None and byte_fraction is not None:
                sparsity = solve(reader, method, windows, byte_fraction)
            options |= {"sparsity": self.settings.target() if sparsity is None else sparsity}
            options |= {"anatomy": self.anatomy, "progress": progress}
            if allocated == "uniform":
                plan = calibrate(model, method, windows, **options)
            else:
                plan = allocation.calibrate_allocated(
                    model, method, windows, self.split.validation, allocation=allocated, **options
                )
        if not self.settings.learn_bias:
            return plan
        windows, steps = self.split.calibration, self.settings.learn_bias
        return compensation.learn(self.loaded.model, plan, windows, steps=steps, anatomy=self.anatomy)

    def quality(self, plan: Plan, *, matched: bool = True) -> Quality:
        """Evaluate a plan on the test windows."""
        windows = self.split.test
        return evaluate(
            self.loaded.model,
            plan,
            windows,
            matched=matched,
            anatomy=self.anatomy,
            text_bytes=text.scored_bytes(self.loaded.tokenizer, windows.tokens, windows.prompt),
        )

    def use_profile(self, folder: Path) -> None:
        """Calibrate on the windows of a saved profile."""
        self.split = dataclasses.replace(self.split, calibration=Profile.load(folder).windows)

    def profile(self) -> Profile:
        """Sketch the model's activations on the calibration windows."""
        return profile(self.loaded.model, self.split.calibration, anatomy=self.anatomy)


def _knobs(name: str) -> set[str]:
    return set(methods.method_class(name).__dataclass_fields__)  # pyright: ignore[reportAttributeAccessIssue]


def of_plan(plan: Plan) -> dict[str, Any]:
    """Fields of a record that name the method and its plan."""
    method = plan.method
    return {
        "method": method.name,
        "family": method.family,
        "granularity": method.granularity,
        "plan": plan.hash,
        "target_sparsity": plan.target_sparsity,
        "kv_policy": plan.kv_policy,
        **({} if plan.kv_policy == "full" else {"kv_bytes": plan.calibration["kv_bytes"]}),
    }


def quality_record(context: Context, plan: Plan, quality: Quality) -> Record:
    """One row of the quality table."""
    kl = float(quality.method.kl.mean())
    extra: dict[str, Any] = {}
    for kind in ("random", "oracle"):
        scores = getattr(quality, kind)
        if scores is not None:
            extra |= {f"ppl_{kind}": scores.perplexity, f"kl_{kind}": max(0.0, float(scores.kl.mean()))}
    return records.stamp(
        kind="quality",
        **({"kv_bytes": context.kv_bytes} | context.common(plan)),
        simulated=True,
        realized_sparsity=quality.realized_sparsity,
        **context.bytes_read(quality.byte_fraction),
        corpus=dict(context.split.test.source),
        tokens=quality.tokens,
        ppl_dense=quality.dense.perplexity,
        ppl=quality.method.perplexity,
        bits_per_byte_dense=quality.bits_per_byte(quality.dense),
        bits_per_byte=quality.bits_per_byte(quality.method),
        kl=max(0.0, kl),
        top1_agreement=float(quality.method.agree.float().mean()),
        sparsity_by_layer=quality.sparsity_by_layer,
        floor=quality.floor,
        **({} if context.quantising is None else dataclasses.asdict(context.quantising)),
        compensation=plan.compensation or False,
        target_byte_fraction=context.settings.bytes,
        search=plan.calibration.get("search"),
        **extra,
    )


def out_of_reach_record(context: Context, name: str, floor: float) -> Record:
    """A row for a method whose floor is above the byte target."""
    method = context.method(name)
    return records.stamp(
        kind="quality",
        **context.common(),
        method=method.name,
        family=method.family,
        granularity=method.granularity,
        simulated=True,
        floor=floor,
        target_byte_fraction=context.settings.bytes,
        kv_policy="full",
        kv_bytes=context.kv_bytes,
        status=f"n/a (floor {floor:.2f})",
    )


def profile_record(context: Context, result: Profile) -> Record:
    """Over-activation of the dense model."""
    return records.stamp(
        kind="profile",
        **context.common(),
        corpus=dict(result.windows.source),
        layers=[
            {
                "layer": p.layer,
                "neurons": p.neurons,
                "needed_mean": float(p.needed.mean()),
                "needed_p95": float(p.needed.quantile(0.95)),
                "exact_zero_share": p.exact_zero_share,
            }
            for p in result.layers
        ],
        token_curve=[{"position_bucket": p, "needed_mean": n} for p, n in result.needed_by_position()],
    )


def speed_records(
    comparison: Comparison,
    plans: Mapping[str, Plan],
    base: Mapping[str, Any],
    *,
    context_name: str,
    layers: int,
    backend: str,
) -> list[Record]:
    """A row a variant."""
    eager, native, out = comparison.eager, comparison.variants["dense"], []
    for name, timing in comparison.variants.items():
        out.append(
            records.stamp(
                kind="speed",
                **{**base, **(of_plan(plans[name]) if name in plans else {"method": "dense", "kv_policy": "full"})},
                simulated=False,
                realized_sparsity=timing.realized_sparsity,
                byte_fraction=timing.byte_fraction,
                context=context_name,
                layers=layers,
                tok_s=timing.tokens_per_second,
                tok_s_dense=eager.tokens_per_second,
                tok_s_kernels=native.tokens_per_second,
                speedup=timing.tokens_per_second / eager.tokens_per_second,
                speedup_limit=1 / timing.byte_fraction,
                gb_s=timing.gb_s,
                gb_s_dense=eager.gb_s,
                read_ceiling_gb_s=comparison.read_ceiling_gb_s,
                ceiling_share=timing.gb_s / comparison.read_ceiling_gb_s,
                step_bytes=timing.step_bytes,
                peak_bytes=comparison.peak_bytes,
                prompt_tokens=comparison.prompt_tokens,
                first_token_s=statistics.median(timing.first),
                first_token_s_dense=statistics.median(eager.first),
                p20=timing.quantile(0.2),
                p50=timing.quantile(0.5),
                p80=timing.quantile(0.8),
                backend=backend,
                batch=1,
                dense_baseline="transformers eager",
            )
        )
    return out


def _backend(asked: Asked) -> str:
    """What ran: back end, instruction set, threads."""
    with kernels.use(asked):
        return kernels.describe()


class _Clock(BaseStreamer):
    """When generate() handed on the prompt, and then each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


@dataclass(frozen=True)
class Written:
    """New text after a prompt, and how long it took."""

    ids: list[int]
    tokens: list[str]  # one string an id
    text: str
    first_token_s: float  # seconds to the first new token: prefill
    tok_s: float | None  # new tokens a second after the first; None for a single token


@torch.no_grad()
def generate(context: Context, plan: Plan | None, prompt: str, new_tokens: int) -> Written:
    """Greedy text after a prompt, dense where there is no plan. UserError for a prompt without a token."""
    tokenizer, model = context.loaded.tokenizer, context.loaded.model
    encoded = tokenizer(prompt, return_tensors="pt")
    ids: Tensor = encoded["input_ids"]  # pyright: ignore[reportAssignmentType]
    if ids.shape[1] == 0:
        raise UserError("the prompt has no token", "give some text to --prompt")
    clock = _Clock()
    options: dict[str, Any] = {
        "max_new_tokens": new_tokens,
        "do_sample": False,
        "pad_token_id": tokenizer.pad_token_id or 0,
        "streamer": clock,
    }
    manager = contextlib.nullcontext()
    if plan is not None:
        manager = Applied(model, plan, backend=context.settings.backend, anatomy=context.anatomy)
    with manager:
        out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # pyright: ignore[reportCallIssue]
    fresh: list[int] = out[0, ids.shape[1] :].tolist()
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    return Written(
        ids=fresh,
        tokens=[str(tokenizer.decode([t])) for t in fresh],
        text=str(tokenizer.decode(fresh)),
        first_token_s=first - start,
        tok_s=(len(fresh) - 1) / (last - first) if len(fresh) > 1 else None,
    )


def correction_for(
    lossless: bool, sirius: float | None, drafts: int, temperature: float, plan: Path | None
) -> Correction | None:
    """What the options of `moyu generate` ask for; UserError for what they cannot mean."""
    if not lossless and sirius is None:
        if temperature:
            raise UserError("--temperature is of --lossless and --sirius", "plain generation is greedy")
        return None
    if lossless and sirius is not None:
        raise UserError("both --lossless and --sirius are given", "give one of them")
    if plan is None:
        raise UserError("no plan to draft with", "`moyu calibrate` makes one; then --plan runs/plans/METHOD")
    if sirius is not None and not 0 <= sirius <= 1:
        raise UserError(f"--sirius is a likelihood in [0, 1], not {sirius}", "the paper's is 0.1")
    return Correction("lossless" if lossless else "sirius", drafts, temperature, sirius or 0.0)


def corrected(
    context: Context, plan: Plan, prompt: str, new_tokens: int, correction: Correction
) -> tuple[Written, Speculation]:
    """Text after a prompt that `plan` drafts and the dense model corrects."""
    tokenizer: Any = context.loaded.tokenizer
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    ends = getattr(context.loaded.model.generation_config, "eos_token_id", None)
    with Applied(context.loaded.model, plan, backend=context.settings.backend, anatomy=context.anatomy) as applied:
        made = speculation.speculate(
            applied,
            ids,
            new_tokens,
            drafts=correction.drafts,
            temperature=correction.temperature,
            rule=correction.decide,
            ends=[] if ends is None else ends if isinstance(ends, list) else [ends],
            seed=context.settings.seed,
        )
    tokens = [str(tokenizer.decode([t])) for t in made.tokens]
    return Written(made.tokens, tokens, str(tokenizer.decode(made.tokens)), made.first_token_s, made.tok_s), made


def generation_record(
    context: Context, plan: Plan | None, prompt: str, dense: Written, correction: Correction | None = None
) -> Record:
    """Dense and sparse text side by side; without a plan the method is `dense`, and both are the same."""
    made = None
    if plan is None:
        sparse = dense
    elif correction is None:
        sparse = generate(context, plan, prompt, context.settings.new_tokens)
    else:
        sparse, made = corrected(context, plan, prompt, context.settings.new_tokens, correction)
    pairs = zip(dense.ids, sparse.ids, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
    if first is None and len(dense.ids) != len(sparse.ids):
        first = min(len(dense.ids), len(sparse.ids))
    about = {"method": "dense", "kv_policy": "full"} if plan is None else of_plan(plan)
    return records.stamp(
        kind="generation",
        **(context.common(plan, protocol=None) | about),
        simulated=False,
        prompt=prompt,
        dense_text=dense.text,
        sparse_text=sparse.text,
        dense_tokens=dense.tokens,
        sparse_tokens=sparse.tokens,
        first_difference=first,
        new_tokens=len(sparse.ids),
        first_token_s_dense=dense.first_token_s,
        first_token_s=sparse.first_token_s,
        tok_s_dense=dense.tok_s,
        tok_s=sparse.tok_s,
        correction=None
        if made is None or correction is None
        else {
            "rule": correction.rule,
            "drafts": correction.drafts,
            "temperature": correction.temperature,
            "acceptance": made.acceptance,
            "tokens_per_pass": made.tokens_per_pass,
            "margin": None if first is None or first >= len(made.margins) else made.margins[first],
        },
    )


def bench_model(context: Context, plans: Mapping[str, Plan], *, tokens: int = 24, stage: Stage = quiet) -> list[Record]:
    """Time the model itself."""
    comparison = compare(
        context.loaded.model,
        dict(plans),
        prompt=context.split.test.tokens[:1, :32],
        tokens=tokens,
        backend=context.settings.backend,
        anatomy=context.anatomy,
        progress=lambda done, total: stage("benchmark", done, total),
    )
    return speed_records(
        comparison,
        plans,
        context.common(kv_bytes=context.kv_bytes),
        context_name="model itself",
        layers=len(context.anatomy.layers),
        backend=_backend(context.settings.backend),
    )


@torch.no_grad()
def bench_shape(
    shape: str,
    targets: Mapping[str, float],
    *,
    byte_fraction: float | None = None,
    with_knobs: Mapping[str, Method] | None = None,
    keep: Path | None = None,
    layers: int | None = None,
    tokens: int = 8,
    rounds: int = 2,
    dtype: torch.dtype = torch.bfloat16,
    weights: str | None = None,
    backend: Asked = "auto",
    seed: int = 0,
    stage: Stage = quiet,
) -> list[Record]:
    """Time a random-weight model of a published shape at given sparsities (method name -> fraction skipped).

    byte_fraction: skip so much that a step reads just this instead; methods whose floor is higher are left out.
    with_knobs: the methods by name, where their knobs are not the defaults.
    keep: a folder of these plans alone; those that take training are left there and found again.
    """
    total = len(targets) + 1
    stage(f"random {shape}", 0, total)
    model = loading.random_model(shape, layers=layers, dtype=dtype, seed=seed)
    if weights in QUANTISED:
        loading.quantise_model(model, weights)
    anatomy = dissect.dissect(model)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, model.config.vocab_size, (1, 24), generator=generator)
    plans, windows, reader = {}, Windows(ids, 8), Reader(model, anatomy)
    for done, (name, target) in enumerate(targets.items()):
        method = (with_knobs or {}).get(name) or methods.method(name)

        def planned(method: Method = method, target: float = target) -> Plan:
            if byte_fraction is not None and method.divides:
                found = ways(reader, method, windows, name=shape, seed=seed)
                return plan_for_bytes(found, text.Split(windows, windows, windows), byte_fraction)
            if byte_fraction is not None:
                target = solve(reader, method, windows, byte_fraction)
            return calibrate(model, method, windows, sparsity=target, name=shape, seed=seed, anatomy=anatomy)

        with contextlib.suppress(OutOfReach):
            plans[name] = planned() if keep is None or not method.trains else _kept(keep / name, method, planned)
        stage(f"random {shape}", done + 1, total)
    comparison = compare(
        model,
        plans,
        prompt=ids[:, :16],
        tokens=tokens,
        rounds=rounds,
        backend=backend,
        anatomy=anatomy,
        progress=lambda done, whole: stage(f"time random {shape}", done, whole),
    )
    depth = len(anatomy.layers)
    full = loading.SHAPES[shape]().num_hidden_layers
    base = {
        "model": shape if depth == full else f"{shape} ({depth} of {full} layers)",
        "weights": "random",
        "weight_format": weight_format(model),
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "kv_bytes": accounting.kv_bytes(model),
        **_left_dense(anatomy),
    }
    return speed_records(comparison, plans, base, context_name=shape, layers=depth, backend=_backend(backend))


def _kept(folder: Path, method: Method, make: Callable[[], Plan]) -> Plan:
    """The plan of this method in a folder, or a new one, saved there."""
    if (folder / "plan.json").exists():
        with contextlib.suppress(UserError):
            found = Plan.load(folder)
            if found.method == method:
                return found
    plan = make()
    plan.save(folder)
    return plan


def largest_sparsity(context: Context, name: str, max_increase: float, stage: Stage = quiet, steps: int = 7) -> Plan:
    """The most that can be skipped while perplexity rises by at most `max_increase` (0.01 = 1 %).

    Bisection on the sparsity target, decided on the validation windows: the test windows then report on a plan that
    they did not choose. The plan says what decided, under "search" of its calibration.
    """
    validation = context.split.validation
    low, high, best = 0.0, 1.0, None
    for step in range(steps):
        target = (low + high) / 2
        plan = context.plan(name, sparsity=target)
        quality = evaluate(context.loaded.model, plan, validation, matched=False, anatomy=context.anatomy)
        rise = quality.method.perplexity / quality.dense.perplexity - 1
        if rise <= max_increase:
            low, best = target, (plan, rise)
        else:
            high = target
        stage(f"search {name}", step + 1, steps)
    if best is None:
        raise UserError(
            f"{name} exceeds a perplexity increase of {max_increase:.1%} even at sparsity {high:.3f}",
            "allow a larger increase",
        )
    plan, rise = best
    search = {"max_ppl_increase": max_increase, "ppl_increase": rise, "corpus": dict(validation.source)}
    return dataclasses.replace(plan, calibration={**plan.calibration, "search": search})


def fit(name: str, settings: Settings, shifted: Path | None, out: Path, stage: Stage = quiet) -> list[dict[str, Any]]:
    """Train the router of the one method of `settings`, save its plan, and grade it on held-out and on shifted text."""
    (method,) = settings.methods
    if not methods.method_class(method).trains:
        able = [n for n in methods.names() if methods.method_class(n).trains]
        raise UserError(f"method {method!r} trains no router", f"`moyu calibrate` plans it; routers: {', '.join(able)}")
    context = Context.open(name, settings, stage)
    plan = _fitted(context, method, out, stage)
    texts = {"held-out": context.split.test}
    if shifted is not None:
        texts["shifted"] = Context.open(name, dataclasses.replace(settings, text=shifted), stage).split.test
    rows = []
    for kind, windows in texts.items():
        stage(f"grade on {kind} text", 0, 1)
        grades = foresight(context.loaded.model, plan, windows, anatomy=context.anatomy)
        rows += [{"text": kind, "layer": layer, **dataclasses.asdict(own)} for layer, own in grades.items()]
        stage(f"grade on {kind} text", 1, 1)
    return rows


def _fitted(context: Context, method: str, out: Path, stage: Stage) -> Plan:
    """The plan in `out` where the same training made it, or a new one, saved there."""
    model, anatomy, settings = context.loaded.model, context.anatomy, context.settings
    own, windows = context.method(method), context.split.calibration
    made_from = {
        "method": [method, own.knobs(), settings.sparsity, settings.bytes, settings.allocation],
        "compensation": [settings.bias, settings.centre, settings.learn_bias],
        "model": [fingerprint(model), digests(anatomy, (s for b in anatomy.all_blocks() for s in own.sites(b)))],
        "text": [hashlib.sha256(windows.tokens.numpy().tobytes()).hexdigest(), windows.prompt, settings.seed],
    }
    key = hashlib.sha256(json.dumps(made_from, sort_keys=True).encode()).hexdigest()[:16]
    if (out / "plan.json").exists():
        with contextlib.suppress(UserError):
            found = Plan.load(out)
            if found.calibration.get("fit") == key:
                return found
    plan = context.plan(method, progress=lambda done, whole: stage(f"train {method}", done, whole))
    plan = dataclasses.replace(plan, calibration={**plan.calibration, "fit": key})
    plan.save(out)
    return plan


def tune(name: str, settings: Settings, out: Path, stage: Stage = quiet) -> dict[str, Any]:
    """Train a router in the loop together with the feed-forward weights; writes a checkpoint, and its plan in `out/plan`."""
    (method,) = settings.methods
    if not methods.method_class(method).joint:
        able = [n for n in methods.names() if methods.method_class(n).joint]
        raise UserError(f"method {method!r} does not train in the loop", f"these do: {', '.join(able)}")
    context = Context.open(name, settings, stage)
    model, windows = context.loaded.model, context.split.calibration
    before = context.plan(method, progress=lambda done, whole: stage(f"train {method}", done, whole))
    frozen = context.quality(before, matched=False)
    plan = in_loop.train(
        model,
        before,
        windows,
        before.target_sparsity or 0.0,
        steps=before.method.knobs()["steps"],
        tune=True,
        anatomy=context.anatomy,
        progress=lambda done, whole: stage("tune weights", done, whole),
    )
    about = {**plan.model, "name": str(out), "digests": digests(context.anatomy, plan.sites())}
    plan = dataclasses.replace(plan, model=about)
    model.save_pretrained(out)  # pyright: ignore[reportCallIssue]
    context.loaded.tokenizer.save_pretrained(out)
    plan.save(out / "plan")
    tuned = context.quality(plan, matched=False)
    return {
        "checkpoint": str(out),
        "plan": plan.hash,
        "realized_sparsity": tuned.realized_sparsity,
        "ppl_dense": frozen.dense.perplexity,
        "ppl_before_tuning": frozen.method.perplexity,
        "ppl": tuned.method.perplexity,
        "ppl_tuned_dense": tuned.dense.perplexity,
    }


def run(
    name: str,
    settings: Settings,
    out: Path,
    *,
    shape: str | None = "llama-3.2-1b",
    shape_layers: int = 8,
    command: str | None = None,
    stage: Stage = quiet,
) -> list[Record]:
    """Everything: load, profile, calibrate, evaluate, generate, benchmark, report. Writes into `out`."""
    check_writable(out)
    context = Context.open(name, settings, stage)
    names, without = context.applicable(settings.methods)
    if not names:
        raise UserError(f"none of {', '.join(settings.methods)} has anything to skip in {name!r}", "see `moyu methods`")
    rows: list[Record] = [
        records.stamp(
            kind="environment", command=command, notes=[f"{n}: nothing to skip in this model" for n in without]
        )
    ]
    stage("profile", 0, 1)
    result = context.profile()
    result.save(out / "profile")
    rows.append(profile_record(context, result))
    stage("profile", 1, 1)
    plans: dict[str, Plan] = {}
    for done, each in enumerate(names):
        stage("calibrate", done, len(names))
        try:
            plans[each] = context.plan(each)
        except UserError as error:
            if "out of reach" not in error.problem:
                raise
            rows.append(
                out_of_reach_record(
                    context, each, accounting.floor(context.loaded.model, context.anatomy, context.method(each))
                )
            )
            continue
        plans[each].save(out / "plans" / each)
    stage("calibrate", len(names), len(names))
    realized = {}
    for done, (each, plan) in enumerate(plans.items()):
        stage("evaluate", done, len(plans))
        quality = context.quality(plan)
        realized[each] = min(max(quality.realized_sparsity, 0.0), 0.99)
        rows.append(quality_record(context, plan, quality))
        records.write(out / "plans" / each / records.FILE, rows[-1:])
    stage("evaluate", len(plans), len(plans))
    if settings.boundary > 0:
        rows += token_table(context, [p for p in plans.values() if p.method.granularity == "token"], stage)
    prompt = settings.prompt or _default_prompt(context)
    dense = generate(context, None, prompt, settings.new_tokens)
    for done, plan in enumerate(plans.values()):
        stage("generate", done, len(plans))
        rows.append(generation_record(context, plan, prompt, dense))
    stage("generate", len(plans), len(plans))
    rows += bench_model(context, plans, stage=stage)
    if shape is not None:
        able = {n: s for n, s in realized.items() if methods.method_class(n).solves_target}
        rows += bench_shape(
            shape,
            able,
            with_knobs={n: plan.method for n, plan in plans.items()},
            layers=shape_layers,
            weights=settings.weights,
            backend=settings.backend,
            seed=settings.seed,
            stage=stage,
        )
    stage("report", 0, 1)
    records.write(out / "records.jsonl", rows)
    from moyu.reporting import write_report

    write_report(rows, out / "report.html")
    stage("report", 1, 1)
    return rows


def token_table(context: Context, plans: Sequence[Plan], stage: Stage = quiet) -> list[Record]:
    """The second quality table: the same plans of token-level methods with no dense prompt."""
    bare, rows = context.without_prompt(), []
    for done, plan in enumerate(plans):
        stage("evaluate without a prompt", done, len(plans))
        rows.append(quality_record(bare, plan, bare.quality(plan)))
    if plans:
        stage("evaluate without a prompt", len(plans), len(plans))
    return rows


def _default_prompt(context: Context) -> str:
    """A prompt in the model's own language: the start of a held-out window."""
    if context.loaded.embedded and context.settings.text is None:
        return PROMPT_TEXT
    tokens = context.split.test.tokens[0, :32]
    return str(context.loaded.tokenizer.decode(tokens, skip_special_tokens=True))


def check_writable(out: Path) -> None:
    """Refuse an output folder that cannot be written, before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {str(out)!r} ({error.strerror})", "choose another folder with --out") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write to {str(out)!r}", "choose another folder with --out")


def check_shape(shape: str) -> None:
    """Refuse an unknown shape before any work is done."""
    if shape != "none" and shape not in loading.SHAPES:
        near = difflib.get_close_matches(shape, loading.SHAPES, n=1, cutoff=0.2) or [next(iter(loading.SHAPES))]
        raise UserError(f"unknown shape {shape!r}", f"did you mean {near[0]!r}? There are {', '.join(loading.SHAPES)}")


def parse_share(text_: str) -> float:
    """ "1%" or "0.01" as 0.01; UserError for anything that is no share above 0."""
    try:
        value = float(text_.removesuffix("%")) / (100 if text_.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 10:
        raise UserError(f"{text_!r} is no share", "write 1% or 0.01")
    return value


def describe(name: str) -> dict[str, Any]:
    """What MOYU finds in a model: `moyu info`."""
    loaded = loading.load(name)
    anatomy = dissect.dissect(loaded.model)
    blocks = list(anatomy.all_blocks())
    networks = [b for b in blocks if b.has_ffn]
    first = networks[0]
    floors = {}
    for each in methods.names():
        method = methods.method(each)
        able = any(method.sites(b) for b in blocks)
        floors[each] = accounting.floor(loaded.model, anatomy, method) if able else None
    return {
        "model": name,
        "type": type(loaded.model).__name__,
        "parameters": accounting.count_weights(loaded.model),
        "layers": len(anatomy.layers),
        "feed-forward": f"{'gated' if first.gated else 'plain'}, {first.act or 'by its own module'}, {first.neurons} neurons, "
        f"proved in {len(networks)} blocks",
        "attention": anatomy.attention(),
        "left dense": anatomy.gaps or "nothing",
        "kernels": f"none for {kinds}: units are masked" if (kinds := anatomy.foreign) else _backend("auto"),
        "bytes a token": round(accounting.dense_step_bytes(loaded.model, anatomy)),
        "floors": floors,
    }


def generate_command(
    name: str,
    plan_folder: Path | None,
    prompt: str | None,
    new_tokens: int,
    backend: Asked,
    correction: Correction | None = None,
    seed: int = 0,
    weights: str | None = None,
) -> Record:
    """Text after a prompt under a plan, dense beside it; dense alone where there is no plan."""
    settings = Settings(new_tokens=new_tokens, backend=backend, seed=seed, weights=weights)
    loading.check_weights(weights)
    loaded = open_model(name, weights)
    if weights in QUANTISED:
        loading.quantise_model(loaded.model, weights)
    plan = None if plan_folder is None else Plan.load(plan_folder)
    nothing = Windows(torch.zeros(1, 2, dtype=torch.long), 1)
    context = Context(loaded, dissect.dissect(loaded.model), text.Split(nothing, nothing, nothing), settings)
    prompt = PROMPT_TEXT if prompt is None else prompt
    return generation_record(context, plan, prompt, generate(context, None, prompt, new_tokens), correction)
