"""`moyu bench`: decoding speed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moyu.commands import words
from moyu.commands.options import BackendName, Device, Json, Methods, Seed, Sparsity, Strict, Weights, refuse_unused
from moyu.commands.output import progress, show
from moyu.errors import UserError

FILE_METHODS = ("teal", "cats", "griffin")  # of a model, where none is named: one that skips columns, rows and neurons
FILE_WINDOWS = 2  # of text that calibrate them: enough to know how fast a method is, not how good
SHAPE_METHODS = ("cats", "teal", "griffin", "popularity")  # of random weights, where none is named


def bench(
    typed: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A zoo name, a local folder, a GGUF file or a hub id; or use --shape.",
            callback=words.model,
            autocompletion=words.complete_models,
        ),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(
            help="Random weights of a published shape, e.g. llama-3.2-1b: speed, no quality.",
            callback=words.shape,
            autocompletion=lambda: list(words.SHAPES),
        ),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Cut the shape to this many layers.", min=1)] = None,
    method: Methods = None,
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="A folder with a plan for MODEL. Repeat it for several.", callback=words.plan_list),
    ] = None,
    sparsity: Sparsity = None,
    tokens: Annotated[int, typer.Option(help="Tokens that are decoded in a round.", min=2)] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds. Dense and the methods alternate in each.", min=1)] = 3,
    weights: Weights = None,
    device: Device = "cpu",
    backend: BackendName = "auto",
    strict: Strict = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time decoding, dense and skipping in turn in one process, beside the rate at which memory can be read.

    Of a MODEL: its plans that --plan names, or each --method, else teal, cats and griffin. Methods are calibrated on two windows
    of text, which is enough to time them; `moyu calibrate` makes plans to use.
    """
    if (model is None) == (shape is None):
        raise UserError("say what to time", "give MODEL or --shape, not both")
    if plan and (shape is not None or method):
        raise UserError("--plan is of a MODEL, and in place of --method", "give one of them")
    if layers is not None and shape is None:
        raise UserError("--layers is of --shape", "a model is timed with all its layers")
    if plan:
        refuse_unused(typed, "sparsity", because="--plan says what is skipped", remedy="leave out one of them")
    from moyu.calibration.settings import Settings
    from moyu.model import machine

    settings = Settings(
        methods=method or (FILE_METHODS if shape is None else SHAPE_METHODS),
        calibration=FILE_WINDOWS,
        test=FILE_WINDOWS,
        sparsity=sparsity,
        seed=seed,
        backend=machine.backend_of(backend),
        device=device,
        weights=weights,
    )
    settings.check()
    from moyu.calibration.context import Context
    from moyu.calibration.speed import bench_model, bench_shape
    from moyu.measure.benchmark import check_positions
    from moyu.plan import Plan

    with progress() as stage:
        if model is None:
            assert shape is not None
            rows = bench_shape(
                shape,
                dict.fromkeys(settings.methods, settings.target()),
                layers=layers,
                tokens=tokens,
                rounds=rounds,
                weights=weights,
                backend=settings.backend,
                strict=strict,
                device=device,
                seed=seed,
                stage=stage,
            )
        else:
            context = Context.open(model, settings, stage)
            check_positions(context.loaded.model, 1, tokens)
            own = context.loaded.plan
            folders = plan or ([] if own is None or method else [own])
            if folders:
                because, remedy = "the checkpoint's own plan says what is skipped", "name a --method for another plan"
                refuse_unused(typed, "sparsity", because=because, remedy=remedy)
            plans = {}
            for given in map(Plan.load, folders):
                given.check(context.loaded.model, context.anatomy)
                plans[given.method.name if given.method.name not in plans else f"{given.method.name} {given.hash}"] = (
                    given
                )
            for name in () if folders else method or context.applicable(settings.methods)[0]:
                plans[name] = context.plan(name, progress=partial(stage, f"calibrate {name}"))
            rows = bench_model(context, plans, tokens=tokens, rounds=rounds, strict=strict, stage=stage)
    show(rows, as_json)
