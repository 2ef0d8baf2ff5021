"""`moyu calibrate`: plans of methods for a model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moyu.commands import words
from moyu.commands.options import (
    RUNS,
    BackendName,
    Bias,
    Boundary,
    Bytes,
    Centre,
    DenseLayers,
    Device,
    Json,
    Knobs,
    LearnBias,
    MaxIncrease,
    MaxKl,
    Methods,
    Model,
    Out,
    Seed,
    Sparsity,
    Text,
    Weights,
    Window,
    parse_knobs,
    parse_layers,
    parse_share,
)
from moyu.commands.output import check_writable, progress, show
from moyu.errors import UserError


def calibrate(
    model: Model = "swiglu",
    method: Methods = None,
    sparsity: Sparsity = None,
    bytes_: Bytes = None,
    max_ppl_increase: MaxIncrease = None,
    max_kl: MaxKl = None,
    knob: Knobs = None,
    text: Text = None,
    profile: Annotated[
        Path | None, typer.Option(help="A folder that `moyu profile` wrote: calibrate on its text.")
    ] = None,
    out: Out = RUNS / "plans",
    window: Window = 256,
    prompt_tokens: Boundary = 128,
    bias: Bias = False,
    centre: Centre = False,
    learn_bias: LearnBias = 0,
    allocation: Annotated[
        str,
        typer.Option(
            help="How sites divide the sparsity (token-level methods): uniform, greedy, search or fisher. The better of it and "
            "uniform is taken.",
            callback=words.allocation,
            autocompletion=lambda: list(words.ALLOCATIONS),
        ),
    ] = "uniform",
    dense_layers: DenseLayers = None,
    weights: Weights = None,
    device: Device = "cpu",
    backend: BackendName = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make a plan of each method for a model, in a folder of its own; `generate`, `eval` and Python apply it."""
    from moyu.calibration.settings import Settings, default_methods
    from moyu.model import machine

    settings = Settings(
        methods=method or default_methods(prompt_tokens),
        knobs=parse_knobs(knob),
        sparsity=sparsity,
        bytes=bytes_,
        bias=bias,
        centre=centre,
        learn_bias=learn_bias,
        allocation=allocation,
        text=text,
        window=window,
        boundary=prompt_tokens,
        seed=seed,
        backend=machine.backend_of(backend),
        device=device,
        dense_layers=parse_layers(dense_layers),
        weights=weights,
    )
    settings.check()
    given = {"--sparsity": sparsity, "--bytes": bytes_, "--max-ppl-increase": max_ppl_increase, "--max-kl": max_kl}
    told = [name for name, value in given.items() if value is not None]
    if len(told) > 1:
        raise UserError(f"{' and '.join(told)} are given, and each says how much to skip", "give one of them")
    from moyu import kernels, records
    from moyu.calibration.context import Context
    from moyu.calibration.largest import Allowed, largest
    from moyu.commands.rows import quality_record

    allowed = None if max_kl is None else Allowed("kl", max_kl)
    if max_ppl_increase is not None:
        allowed = Allowed("ppl_increase", parse_share(max_ppl_increase))
    check_writable(out)
    rows = []
    with progress() as stage, kernels.use(settings.backend):
        context = Context.open(model, settings, stage)
        if profile is not None:
            context.use_profile(profile)
        names = method or context.applicable(settings.methods)[0]
        for done, name in enumerate(names):
            which = f"{name} ({done + 1} of {len(names)} methods)"
            if allowed is None:
                plan = context.plan(name, progress=partial(stage, f"calibrate {which}"))
            else:
                plan = largest(context, name, allowed, stage)
            plan.save(out / name)
            quality = context.quality(plan, matched=False, progress=partial(stage, f"evaluate {which}"))
            rows.append(quality_record(context, plan, quality))
            records.write(out / name / records.FILE, rows[-1:])
    show(rows, as_json)
    if not as_json:
        print(f"plans    {out}")
