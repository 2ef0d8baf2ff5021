"""Decoding speed of plans as records: of a model itself, and of random weights of a published shape."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from moyu import kernels, methods
from moyu.calibration.budget import Reader, plan_for_bytes, solve, ways
from moyu.calibration.context import Context
from moyu.calibration.settings import Stage, quiet
from moyu.calibration.walk import calibrate
from moyu.errors import OutOfReach, UserError
from moyu.files import key_of
from moyu.kernels import BackendName
from moyu.measure import accounting
from moyu.measure.benchmark import Comparison, compare
from moyu.measure.text import Split
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.model import dissect, loading
from moyu.plan import Plan
from moyu.records import Protocol, Record, Speed
from moyu.records.about import AboutModel, about_model, about_plan
from moyu.weights import QUANTISED

ROUNDS = 2  # variants alternate this often
DEFINITION = 1  # of a plan for random weights that is kept: one more wherever what it is made from changes


def bench_model(
    context: Context,
    plans: Mapping[str, Plan],
    *,
    tokens: int = 24,
    rounds: int = ROUNDS,
    strict: bool = False,
    stage: Stage = quiet,
) -> list[Record]:
    """Time the model itself, dense and under each plan. strict: UserError where a step is not the fastest there is."""
    model, backend = context.loaded.model, context.settings.backend
    comparison = compare(
        model,
        dict(plans),
        prompt=context.split.test.tokens[:1, :32].to(model.device),
        tokens=tokens,
        rounds=rounds,
        backend=backend,
        strict=strict,
        anatomy=context.anatomy,
        progress=lambda done, total: stage("benchmark", done, total),
    )
    return speed_records(
        comparison,
        plans,
        context.about(),
        kv_bytes=context.kv_bytes,
        context="model itself",
        layers=len(context.anatomy.layers),
        backend=what_runs(backend, model.device),
        protocol=context.protocol,
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
    rounds: int = ROUNDS,
    dtype: torch.dtype = torch.bfloat16,
    weights: str | None = None,
    backend: BackendName = "auto",
    strict: bool = False,
    device: str = "cpu",
    seed: int = 0,
    stage: Stage = quiet,
) -> list[Record]:
    """Time a random-weight model of a published shape at given sparsities (method name -> fraction skipped).

    byte_fraction: skip so much that a step reads just this instead; methods whose floor is higher are left out.
    with_knobs: the methods by name, where their knobs are not the defaults.
    keep: a folder; plans that take training are left there and found again by what they were made from.
    """
    total = len(targets) + 1
    stage(f"random {shape}", 0, total)
    model = loading.random_model(shape, layers=layers, dtype=dtype, seed=seed, device=device)
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
                return plan_for_bytes(found, Split(windows, windows, windows), byte_fraction)
            if byte_fraction is not None:
                target = solve(reader, method, windows, byte_fraction)
            return calibrate(model, method, windows, sparsity=target, name=shape, seed=seed, anatomy=anatomy)

        key = key_of(
            weights=[shape, layers, str(dtype), weights, seed],  # random ones, which follow from these
            text=windows.digest,
            settings=[name, method.knobs(), byte_fraction, target],
            definition=DEFINITION,
        )
        with contextlib.suppress(OutOfReach):
            if keep is None or not method.trains:
                plans[name] = planned()
            else:
                plans[name] = kept_plan(keep / f"{name}-{key}", key, planned)
        stage(f"random {shape}", done + 1, total)
    comparison = compare(
        model,
        plans,
        prompt=ids[:, :16].to(model.device),
        tokens=tokens,
        rounds=rounds,
        backend=backend,
        strict=strict,
        anatomy=anatomy,
        progress=lambda done, whole: stage(f"time random {shape}", done, whole),
    )
    depth, full = len(anatomy.layers), loading.SHAPES[shape]().num_hidden_layers
    name = shape if depth == full else f"{shape} ({depth} of {full} layers)"
    return speed_records(
        comparison,
        plans,
        about_model(name, model, anatomy, weights="random", seed=seed),
        kv_bytes=accounting.kv_bytes(model),
        context=shape,
        layers=depth,
        backend=what_runs(backend, model.device),
    )


def kept_plan(folder: Path, key: str, make: Callable[[], Plan]) -> Plan:
    """The plan in a folder where it was made from what `key` stands for (`files.key_of`), or a new one, saved there."""
    with contextlib.suppress(UserError):
        found = Plan.load(folder)
        if found.calibration.get("made_from") == key:
            return found
    plan = make()
    plan = dataclasses.replace(plan, calibration={**plan.calibration, "made_from": key})
    plan.save(folder)
    return plan


def what_runs(asked: BackendName, device: torch.device | str = "cpu") -> str:
    """What kernels run where this back end is asked for: back end, instruction set, threads."""
    with kernels.use(asked):
        return kernels.describe(device)


def speed_records(
    comparison: Comparison,
    plans: Mapping[str, Plan],
    about: AboutModel,
    *,
    kv_bytes: list[dict[str, int]],
    context: str,
    layers: int,
    backend: str,
    protocol: Protocol | None = None,
) -> list[Record]:
    """A record a variant. context: `model itself`, or the name of a shape."""
    eager, native = comparison.eager, comparison.variants["dense"]
    return [
        Speed(
            kind="speed",
            **about,
            **about_plan(plans.get(name), kv_bytes),
            protocol=protocol,
            simulated=False,
            realized_sparsity=timing.realized_sparsity,
            byte_fraction=timing.byte_fraction,
            context=context,
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
            step=timing.step,
            batch=1,
            dense_baseline="transformers eager",
        )
        for name, timing in comparison.variants.items()
    ]
