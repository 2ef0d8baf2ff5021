"""`moyu eval`: quality of plans against dense."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from moyu.commands import words
from moyu.commands.options import (
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
    Seed,
    Sparsity,
    Text,
    Weights,
    Window,
    parse_knobs,
    parse_layers,
    refuse_unused,
)
from moyu.commands.output import progress, show

# Options of plans that are made here.
MADE = ("method", "sparsity", "bytes_", "knob", "bias", "centre", "learn_bias", "dense_layers")


def evaluate(
    typed: typer.Context,
    model: Model = "swiglu",
    plan: Annotated[
        list[Path] | None,
        typer.Option(help="A folder that `moyu calibrate` wrote. Repeat it for several.", callback=words.plan_list),
    ] = None,
    method: Methods = None,
    sparsity: Sparsity = None,
    bytes_: Bytes = None,
    knob: Knobs = None,
    text: Text = None,
    window: Window = 256,
    prompt_tokens: Boundary = 128,
    bias: Bias = False,
    centre: Centre = False,
    learn_bias: LearnBias = 0,
    dense_layers: DenseLayers = None,
    weights: Weights = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of held-out text: these tasks of lm-eval, with commas, e.g. python_next_line."),
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="A folder with YAML tasks of your own.")] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task, at most.", min=1)] = None,
    device: Device = "cpu",
    backend: BackendName = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Measure what skipping costs: perplexity and KL against dense on held-out text, or tasks of lm-eval.

    Plans are read from folders with --plan, else made here for each --method. On text, each stands beside a random choice and
    the best choice of as many units.
    """
    if plan:
        refuse_unused(typed, *MADE, because="--plan says what is skipped", remedy="leave out one of them")
    if tasks is None:
        remedy = "name tasks, e.g. --tasks python_next_line"
        refuse_unused(typed, "task_folder", "limit", because="they are of --tasks", remedy=remedy)
    from moyu import kernels
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
        window=window,
        boundary=prompt_tokens,
        seed=seed,
        backend=machine.backend_of(backend),
        device=device,
        dense_layers=parse_layers(dense_layers),
        weights=weights,
    )
    settings.check()
    from moyu.calibration.context import Context
    from moyu.commands.rows import quality_record
    from moyu.plan import Plan

    loaded = [Plan.load(folder) for folder in plan or []]
    with progress() as stage, kernels.use(settings.backend):
        context = Context.open(model, settings, stage)
        if not loaded and not method and context.loaded.plan is not None:
            remedy = "name a --method for another plan"
            refuse_unused(typed, *MADE, because="the checkpoint's own plan says what is skipped", remedy=remedy)
            loaded = [Plan.load(context.loaded.plan)]
        names = [] if loaded else (method or context.applicable(settings.methods)[0])

        def plans() -> list[Plan]:
            made = [context.plan(name, progress=partial(stage, f"calibrate {name}")) for name in names]
            return [*loaded, *made]

        if tasks is not None:
            from moyu.integrations import lm_eval

            asked = [name.strip() for name in tasks.split(",") if name.strip()]
            found = lm_eval.find_tasks(asked, task_folder)
            show(lm_eval.compare(context, plans(), found, limit=limit, stage=stage), as_json)
            return
        named = {str(n): plan for n, plan in enumerate(plans())}
        qualities = context.qualities(named, progress=partial(stage, "evaluate"))
        rows = [quality_record(context, named[n], quality) for n, quality in qualities.items()]
    show(rows, as_json)
