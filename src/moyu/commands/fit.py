"""`moyu fit`: the router of a method, trained."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from moyu import methods
from moyu.commands import words
from moyu.commands.options import (
    RUNS,
    BackendName,
    Boundary,
    Device,
    Json,
    Knobs,
    Model,
    Out,
    Seed,
    Sparsity,
    Text,
    Window,
    parse_knobs,
    refuse_unused,
)
from moyu.commands.output import check_writable, progress


def fit(
    typed: typer.Context,
    method: Annotated[
        str,
        typer.Argument(
            help="A method of `moyu methods` that trains a router.",
            callback=words.method,
            autocompletion=methods.names,
        ),
    ],
    model: Model = "swiglu",
    sparsity: Sparsity = None,
    knob: Knobs = None,
    text: Text = None,
    shifted: Annotated[Path | None, typer.Option(help="Text of another kind: grade the router on it as well.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of text to train on.", min=1)] = 64,
    tune: Annotated[
        Path | None, typer.Option(help="Tune the weights as well (lte): the folder for the checkpoint and its plan.")
    ] = None,
    out: Out = RUNS / "plans",
    window: Window = 256,
    prompt_tokens: Boundary = 128,
    device: Device = "cpu",
    backend: BackendName = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a method's router on a frozen model, save its plan, and grade it on text that it has not seen.

    A plan that the same training has already made is taken as it is.
    """
    if tune is not None:
        refuse_unused(
            typed, "shifted", "out", because="--tune is the folder, and grades nothing", remedy="leave it out"
        )
    from moyu import kernels
    from moyu.calibration.settings import Settings
    from moyu.model import machine

    settings = Settings(
        methods=[method],
        knobs=parse_knobs(knob),
        sparsity=sparsity,
        text=text,
        window=window,
        boundary=prompt_tokens,
        calibration=windows,
        seed=seed,
        backend=machine.backend_of(backend),
        device=device,
    )
    settings.check()
    from moyu.calibration import fitting

    check_writable(tune or out)
    if tune is not None:
        with progress() as stage, kernels.use(settings.backend):
            row = dataclasses.asdict(fitting.tune(model, settings, tune, stage))
        print(json.dumps(row) if as_json else "\n".join(f"{k:18s} {v}" for k, v in row.items()))
        return
    with progress() as stage, kernels.use(settings.backend):
        rows = fitting.fit(model, settings, shifted, out / method, stage)
    for row in rows:
        if as_json:
            print(json.dumps({"text": row.text, "layer": row.layer, **dataclasses.asdict(row.grade)}))
        else:
            own = row.grade
            print(
                f"{row.text:9s} layer {row.layer:3d}: recall {own.recall:.0%}, AUROC {own.auroc:.2f}, "
                f"{own.captured:.0%} of the output's mass captured ({own.ideal:.0%} possible)"
            )
    if not as_json:
        print(f"plan     {out / method}")
