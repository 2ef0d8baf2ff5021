"""`moyu bench`: decoding speed."""

from __future__ import annotations

from typing import Annotated

import typer

from moyu.commands.options import BackendName, Device, Json, Methods, Seed, Sparsity, Strict, Weights
from moyu.commands.output import progress, show
from moyu.errors import UserError

SHAPE_METHODS = ("cats", "teal", "griffin", "popularity")  # of random weights, where none is named


def bench(
    model: Annotated[
        str | None, typer.Argument(help="A zoo name, a local folder, a GGUF file or a hub id; or use --shape.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights of a published shape, e.g. llama-3.2-1b: speed, no quality.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Cut the shape to this many layers.")] = None,
    method: Methods = None,
    sparsity: Sparsity = 0.5,
    tokens: Annotated[int, typer.Option(help="Tokens that are decoded in a round.")] = 16,
    rounds: Annotated[int, typer.Option(help="Rounds. Dense and the methods alternate in each.")] = 3,
    weights: Weights = None,
    device: Device = "cpu",
    backend: BackendName = "auto",
    strict: Strict = False,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Time decoding, dense and skipping in turn in one process, beside the rate at which memory can be read."""
    if (model is None) == (shape is None):
        raise UserError("say what to time", "give MODEL or --shape, not both")
    if layers is not None and shape is None:
        raise UserError("--layers is of --shape", "a model is timed with all its layers")
    from moyu.calibration.settings import Settings, default_methods
    from moyu.model import machine

    settings = Settings(
        methods=method or (default_methods(Settings.boundary) if shape is None else SHAPE_METHODS),
        sparsity=sparsity,
        seed=seed,
        backend=machine.backend_of(backend),
        device=device,
        weights=weights,
    )
    settings.check()
    from moyu.calibration.context import Context
    from moyu.calibration.speed import bench_model, bench_shape
    from moyu.model import loading
    from moyu.plan import Plan

    with progress() as stage:
        if model is None:
            assert shape is not None
            loading.check_shape(shape)
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
            own = context.loaded.plan
            if own is not None and not method:
                plan = Plan.load(own)
                plan.check(context.loaded.model, context.anatomy)
                plans = {plan.method.name: plan}
            else:
                plans = {name: context.plan(name) for name in method or context.applicable(settings.methods)[0]}
            rows = bench_model(context, plans, tokens=tokens, rounds=rounds, strict=strict, stage=stage)
    show(rows, as_json)
