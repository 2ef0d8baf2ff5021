"""`moyu run`: everything, from a model to a report."""

from __future__ import annotations

import shlex
import sys
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
    Methods,
    Model,
    Out,
    Prompt,
    Seed,
    Sparsity,
    Strict,
    Text,
    Weights,
    Window,
    parse_knobs,
    parse_layers,
    refuse_unused,
)
from moyu.commands.output import check_writable, progress, show


def run(
    typed: typer.Context,
    model: Model = "swiglu",
    method: Methods = None,
    sparsity: Sparsity = None,
    bytes_: Bytes = None,
    knob: Knobs = None,
    text: Text = None,
    prompt: Prompt = None,
    out: Out = RUNS / "latest",
    window: Window = 256,
    prompt_tokens: Boundary = 128,
    bias: Bias = False,
    centre: Centre = False,
    learn_bias: LearnBias = 0,
    dense_layers: DenseLayers = None,
    shape: Annotated[
        str,
        typer.Option(
            help="Time random weights of this published shape as well. none: do not.",
            callback=words.shape_or_none,
            autocompletion=lambda: [*words.SHAPES, "none"],
        ),
    ] = "llama-3.2-1b",
    shape_layers: Annotated[int, typer.Option(help="Layers of that shape.", min=1)] = 8,
    weights: Weights = None,
    device: Device = "cpu",
    backend: BackendName = "auto",
    strict: Strict = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Do everything: profile, calibrate, evaluate, generate and time a model, and write a report of it."""
    if shape == "none":
        refuse_unused(typed, "shape_layers", because="no shape is timed", remedy="leave it out, or name a --shape")
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
        text=text,
        prompt=prompt,
        window=window,
        boundary=prompt_tokens,
        seed=seed,
        backend=machine.backend_of(backend),
        strict=strict,
        device=device,
        dense_layers=parse_layers(dense_layers),
        weights=weights,
    )
    settings.check()
    from moyu.commands import pipe

    check_writable(out)
    with progress() as stage:
        rows = pipe.run(
            model,
            settings,
            out,
            shape=None if shape == "none" else shape,
            shape_layers=shape_layers,
            command=shlex.join(["moyu", *sys.argv[1:]]),
            stage=stage,
        )
    show(rows, as_json)
    if not as_json:
        print(f"\nreport   {out / 'report.html'}\nrecords  {out / 'records.jsonl'}\nplans    {out / 'plans'}")
