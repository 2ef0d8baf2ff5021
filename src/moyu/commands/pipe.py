"""The straight way from a model to a report: load, profile, calibrate, evaluate, generate, time, report. Imports torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from moyu import methods, records
from moyu.calibration.context import Context
from moyu.calibration.settings import Settings, Stage, quiet
from moyu.calibration.speed import bench_model, bench_shape
from moyu.commands.generate import PROMPT
from moyu.commands.rows import out_of_reach_record, profile_record, quality_record
from moyu.commands.writing import generation_record, write
from moyu.errors import OutOfReach, UserError
from moyu.measure import accounting
from moyu.measure.environment import machine
from moyu.model.prompts import check_length, prompt_ids, written
from moyu.plan import Plan
from moyu.records import Record
from moyu.records.stamping import stamped
from moyu.reporting import write_report

MOST = 0.99  # sparsity at which a shape is timed, at most


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
    """All stages, whose records, plans and report go into `out`. shape: random weights to time as well, None for none."""
    context = Context.open(name, settings, stage)
    prompt = written(settings.prompt or default_prompt(context))
    ids = prompt_ids(context.loaded, prompt)
    check_length(context.loaded, ids, settings.new_tokens, option=False)
    able, without = context.applicable(settings.methods)
    if not able:
        raise UserError(f"none of {', '.join(settings.methods)} has anything to skip in {name!r}", "see `moyu methods`")
    notes = [f"{n}: nothing to skip in this model" for n in without if not methods.method_class(n).quantised_only]
    rows: list[Record] = [
        records.Environment(kind="environment", **stamped(notes=notes), **machine(), command=command),
        _profiled(context, out, stage),
    ]
    plans, refused = _planned(context, able, out, stage)
    qualities = _evaluated(context, plans, out, stage)
    rows += [*refused, *qualities.values()]
    if settings.boundary > 0:
        rows += without_prompt(context, [p for p in plans.values() if p.method.granularity == "token"], stage)
    rows += _generated(context, list(plans.values()), prompt, ids, stage)
    rows += bench_model(context, plans, strict=settings.strict, stage=stage)
    if shape is not None:
        skipped = {n: min(max(row.realized_sparsity or 0.0, 0.0), MOST) for n, row in qualities.items()}
        rows += bench_shape(
            shape,
            {n: share for n, share in skipped.items() if methods.method_class(n).solves_target},
            with_knobs={n: plan.method for n, plan in plans.items()},
            layers=shape_layers,
            weights=settings.weights,
            backend=settings.backend,
            strict=settings.strict,
            device=settings.device,
            seed=settings.seed,
            stage=stage,
        )
    stage("report", 0, 1)
    records.write(out / records.FILE, rows)
    write_report(rows, out / "report.html")
    stage("report", 1, 1)
    return rows


def _profiled(context: Context, out: Path, stage: Stage) -> Record:
    stage("profile", 0, 1)
    found = context.profile()
    found.save(out / "profile")
    stage("profile", 1, 1)
    return profile_record(context, found)


def _planned(
    context: Context, names: Sequence[str], out: Path, stage: Stage
) -> tuple[dict[str, Plan], list[records.Quality]]:
    """A plan a method, saved, and the records of methods that cannot read as little as was asked for."""
    plans, refused = {}, []
    for done, name in enumerate(names):
        about = f"calibrate {name} ({done + 1} of {len(names)} methods)"
        try:
            plans[name] = context.plan(name, progress=partial(stage, about))
        except OutOfReach:
            floor = accounting.floor(context.loaded.model, context.anatomy, context.method(name))
            refused.append(out_of_reach_record(context, name, floor))
            continue
        plans[name].save(out / "plans" / name)
    context.chains.clear()  # hidden states of all layers, which nothing reads from here on
    return plans, refused


def _evaluated(context: Context, plans: Mapping[str, Plan], out: Path, stage: Stage) -> dict[str, records.Quality]:
    """The quality of each plan, written beside it too."""
    qualities = context.qualities(plans, progress=partial(stage, "evaluate"))
    found = {name: quality_record(context, plans[name], quality) for name, quality in qualities.items()}
    for name, record in found.items():
        records.write(out / "plans" / name / records.FILE, [record])
    return found


def without_prompt(context: Context, plans: Sequence[Plan], stage: Stage = quiet) -> list[Record]:
    """The second quality table: the same plans of token-level methods with no dense prompt."""
    if not plans:
        return []
    bare, named = context.without_prompt(), {plan.hash: plan for plan in plans}
    qualities = bare.qualities(named, progress=partial(stage, "evaluate without a prompt"))
    return [quality_record(bare, named[key], quality) for key, quality in qualities.items()]


def _generated(context: Context, plans: Sequence[Plan], prompt: str, ids: Tensor, stage: Stage) -> list[Record]:
    """Text after the prompt under each plan, dense beside it."""
    settings, loaded, anatomy = context.settings, context.loaded, context.anatomy
    rows: list[Record] = []
    dense = write(loaded, anatomy, None, ids, settings.new_tokens)
    for done, plan in enumerate(plans):
        stage("generate", done, len(plans))
        sparse = write(
            loaded, anatomy, plan, ids, settings.new_tokens, backend=settings.backend, strict=settings.strict
        )
        rows.append(generation_record(context.about(plan), plan, prompt, sparse, dense))
    stage("generate", len(plans), len(plans))
    return rows


def default_prompt(context: Context) -> str:
    """A prompt in the model's own language: the start of a held-out window."""
    if context.loaded.embedded and context.settings.text is None:
        return PROMPT
    tokens = context.split.test.tokens[0, :32]
    return str(context.loaded.tokenizer.decode(tokens, skip_special_tokens=True))
