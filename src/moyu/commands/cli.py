"""The command line: one sub-command a stage. Parses, calls one function, prints."""

from __future__ import annotations

import errno
import json
import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moyu.errors import UserError

if TYPE_CHECKING:
    from moyu.commands.pipeline import Settings, Stage
    from moyu.records import Record

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Decode with a language model without reading the weights that the next token does not need.",
)

Model = Annotated[str, typer.Argument(help="zoo name, local folder, GGUF file or hub id")]
Methods = Annotated[
    list[str] | None, typer.Option("--method", "-m", help="a method of `moyu methods`; may be repeated")
]
Sparsity = Annotated[float | None, typer.Option(help="fraction of units to skip, in [0, 1)")]
Bytes = Annotated[float | None, typer.Option("--bytes", help="byte fraction to reach instead, in (0, 1]")]
Knobs = Annotated[list[str] | None, typer.Option("--knob", help="a method's knob, NAME=VALUE; may be repeated")]
Text = Annotated[
    Path | None,
    typer.Option(help="text: its first half calibrates, the third quarter decides a search, the last quarter tests"),
]
Prompt = Annotated[str | None, typer.Option(help="text to generate after")]
Window = Annotated[int, typer.Option(help="tokens of a window")]
Boundary = Annotated[
    int, typer.Option("--prompt-tokens", help="P: positions before it are dense, the rest sparse and scored")
]
Bias = Annotated[bool, typer.Option(help="add the closed-form bias correction")]
Centre = Annotated[bool, typer.Option(help="let masks of input channels act around the best centre of each site")]
LearnBias = Annotated[int, typer.Option(help="steps that train a bias for every site; 0 for none")]
Seed = Annotated[int, typer.Option(help="seed of everything random")]
Device = Annotated[str, typer.Option(help="where the model runs: cpu, cuda, cuda:1, ...")]
BackendName = Annotated[str, typer.Option("--backend", help="auto, reference, cpu or gpu")]
DenseLayers = Annotated[
    str | None, typer.Option("--dense-layers", help="layers to leave dense, e.g. 0,1,-1 (-1 is the last)")
]
Weights = Annotated[
    str | None, typer.Option("--weights", help="bf16, q8_0 or q4_0; default: as the checkpoint has them")
]
Json = Annotated[bool, typer.Option("--json", help="print records, and nothing else, on stdout")]
Out = Annotated[Path, typer.Option("--out", help="folder for what is written")]
RUNS = Path("runs")
STOPPED = 130  # exit code after Ctrl-C, 128 + SIGINT


def _settings(
    methods: list[str] | None = None,
    sparsity: float | None = None,
    bytes_: float | None = None,
    knobs: list[str] | None = None,
    dense_layers: str | None = None,
    **rest: Any,
) -> Settings:
    from moyu.commands.pipeline import Settings, default_methods

    try:
        layers = tuple(int(part) for part in (dense_layers or "").split(",") if part.strip())
    except ValueError:
        raise UserError(f"--dense-layers {dense_layers!r} is no list of layers", "write numbers, e.g. 0,1,-1") from None
    parsed = {}
    for knob in knobs or []:
        name, sign, value = knob.partition("=")
        if not sign:
            raise UserError(f"--knob {knob!r} has no value", "write NAME=VALUE, e.g. tau=0.2")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    methods = methods or list(default_methods(rest.get("boundary", Settings.boundary)))
    settings = Settings(methods=methods, sparsity=sparsity, bytes=bytes_, knobs=parsed, dense_layers=layers, **rest)
    settings.check()
    return settings


@contextmanager
def _progress() -> Iterator[Stage]:
    """A display on stderr that names the stage and the time left; plain lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        seen: set[str] = set()

        def line(name: str, done: int, total: int) -> None:
            if name not in seen:
                seen.add(name)
                print(f"moyu: {name}", file=sys.stderr, flush=True)

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def stage(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)

        yield stage


def _print(rows: list[Record], as_json: bool) -> None:
    if as_json:
        for row in rows:
            print(row.model_dump_json())
        return
    from rich.console import Console

    from moyu.reporting import tables
    from moyu.reporting.summary import notes, warnings

    wide = 140 if not sys.stdout.isatty() else None
    console = Console(width=wide, soft_wrap=False)
    for table in tables(rows):
        console.print(table)
    for warning in warnings(rows):
        console.print(f"! {warning}", markup=False, highlight=False)
    for subject, note in notes(rows):
        console.print(f"! {subject}: {note}", markup=False, highlight=False)


@app.command()
def run(
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
        str, typer.Option(help="random-weight shape to time as well; `none` for no such timing")
    ] = "llama-3.2-1b",
    shape_layers: Annotated[int, typer.Option(help="layers of that shape")] = 8,
    weights: Weights = None,
    backend: BackendName = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Everything: profile, calibrate, evaluate, generate, benchmark; writes records, plans and a report."""
    settings = _settings(
        method, sparsity, bytes_, knob, text=text, prompt=prompt, window=window, boundary=prompt_tokens, bias=bias,
        centre=centre, learn_bias=learn_bias, seed=seed, backend=backend, dense_layers=dense_layers, weights=weights,
    )  # fmt: skip
    from moyu.commands import pipeline

    pipeline.check_shape(shape)
    with _progress() as stage:
        rows = pipeline.run(
            model,
            settings,
            out,
            shape=None if shape == "none" else shape,
            shape_layers=shape_layers,
            command=shlex.join(["moyu", *sys.argv[1:]]),
            stage=stage,
        )
    _print(rows, as_json)
    if not as_json:
        print(f"\nreport   {out / 'report.html'}\nrecords  {out / 'records.jsonl'}\nplans    {out / 'plans'}")


@app.command(name="methods")
def list_methods(as_json: Json = False) -> None:
    """Every method, with what it reads, skips and needs."""
    from moyu import methods

    rows = methods.table()
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("method", "family", "granularity", "exact", "calibration", "knobs", "source")
    for row in rows:
        knobs = ", ".join(f"{k}={v}" for k, v in row["knobs"].items()) or "-"
        exact, needs = ("yes" if row[k] else "no" for k in ("exact", "needs_calibration"))
        table.add_row(row["method"], row["family"], row["granularity"], exact, needs, knobs, row["paper"])
    Console().print(table)


@app.command()
def info(model: Model = "swiglu", as_json: Json = False) -> None:
    """What MOYU finds in a model, and what each method could skip."""
    from moyu.commands import pipeline

    facts = pipeline.describe(model)
    if as_json:
        print(json.dumps(facts))
        return
    for name, value in facts.items():
        if name != "floors":
            lines = value if isinstance(value, list) else [value]
            print("\n".join(f"{'' if n else name:16s} {line}" for n, line in enumerate(lines)))
    print("least byte fraction a method can reach:")
    for name, value in facts["floors"].items():
        print(f"  {name:14s} {'nothing to skip' if value is None else f'{value:.2f}'}")


@app.command()
def profile(
    model: Model = "swiglu",
    text: Text = None,
    out: Out = RUNS / "profile",
    window: Window = 256,
    prompt_tokens: Boundary = 128,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """What a model activates on a text; the profile is what `calibrate --profile` reads."""
    from moyu.commands import pipeline

    settings = _settings(text=text, window=window, boundary=prompt_tokens, seed=seed)
    pipeline.check_writable(out)
    with _progress() as stage:
        context = pipeline.Context.open(model, settings, stage)
        result = context.profile()
    result.save(out)
    row = pipeline.profile_record(context, result)
    if as_json:
        print(row.model_dump_json())
        return
    for layer in result.layers:
        mean, high = float(layer.needed.mean()), float(layer.needed.quantile(0.95))
        zero = f", {layer.exact_zero_share:.0%} exactly zero" if layer.exact_zero_share > 0.001 else ""
        print(
            f"layer {layer.layer:3d}: {mean:.0%} of {layer.neurons} neurons needed for CETT 0.2 (95th percentile {high:.0%}){zero}"
        )
    print(f"profile  {out}")


@app.command()
def calibrate(
    model: Model = "swiglu",
    method: Methods = None,
    sparsity: Sparsity = None,
    bytes_: Bytes = None,
    max_ppl_increase: Annotated[
        str | None, typer.Option(help="skip as much as this rise of perplexity allows, e.g. 1%")
    ] = None,
    knob: Knobs = None,
    text: Text = None,
    profile: Annotated[
        Path | None, typer.Option(help="a folder that `moyu profile` wrote: calibrate on its windows")
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
            help="how sites divide the sparsity (token-level methods): uniform, greedy, search or fisher; the better of it "
            "and uniform is taken"
        ),
    ] = "uniform",
    dense_layers: DenseLayers = None,
    weights: Weights = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Make plans: one folder a method."""
    from moyu import records as store
    from moyu.commands import pipeline

    settings = _settings(
        method, sparsity, bytes_, knob, text=text, window=window, boundary=prompt_tokens, bias=bias, centre=centre,
        learn_bias=learn_bias, seed=seed, allocation=allocation, dense_layers=dense_layers, device=device, weights=weights,
    )  # fmt: skip
    budget = None if max_ppl_increase is None else pipeline.parse_share(max_ppl_increase)
    pipeline.check_writable(out)
    rows = []
    with _progress() as stage:
        context = pipeline.Context.open(model, settings, stage)
        if profile is not None:
            context.use_profile(profile)
        names = method or [n for n in settings.methods if n in context.applicable(settings.methods)[0]]
        for done, name in enumerate(names):
            stage("calibrate", done, len(names))
            plan = context.plan(name) if budget is None else pipeline.largest_sparsity(context, name, budget, stage)
            plan.save(out / name)
            rows.append(pipeline.quality_record(context, plan, context.quality(plan, matched=False)))
            store.write(out / name / store.FILE, rows[-1:])
        stage("calibrate", len(names), len(names))
    _print(rows, as_json)
    if not as_json:
        print(f"plans    {out}")


@app.command()
def fit(
    method: Annotated[str, typer.Argument(help="a method of `moyu methods` that trains a router")],
    model: Model = "swiglu",
    sparsity: Sparsity = None,
    knob: Knobs = None,
    text: Text = None,
    shifted: Annotated[Path | None, typer.Option(help="text of another kind, to grade the router on as well")] = None,
    windows: Annotated[int, typer.Option(help="windows of text to train on")] = 64,
    tune: Annotated[
        Path | None, typer.Option(help="tune the weights as well (lte): a folder for the checkpoint and its plan")
    ] = None,
    out: Out = RUNS / "plans",
    window: Window = 256,
    prompt_tokens: Boundary = 128,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a method's router on a frozen model, make its plan, and grade it on text that it has not seen.

    A plan that the same training has already made is taken as it is.
    """
    from moyu.commands import pipeline

    settings = _settings(
        [method], sparsity, None, knob, text=text, window=window, boundary=prompt_tokens, seed=seed, calibration=windows
    )
    pipeline.check_writable(tune or out)
    if tune is not None:
        with _progress() as stage:
            row = pipeline.tune(model, settings, tune, stage)
        print(json.dumps(row) if as_json else "\n".join(f"{k:18s} {v}" for k, v in row.items()))
        return
    with _progress() as stage:
        grades = pipeline.fit(model, settings, shifted, out / method, stage)
    for row in grades:
        if as_json:
            print(json.dumps(row))
        else:
            print(
                f"{row['text']:9s} layer {row['layer']:3d}: recall {row['recall']:.0%}, AUROC {row['auroc']:.2f}, "
                f"{row['captured']:.0%} of the output's mass captured ({row['ideal']:.0%} possible)"
            )
    if not as_json:
        print(f"plan     {out / method}")


@app.command()
def generate(
    model: Model = "swiglu",
    plan: Annotated[Path | None, typer.Option(help="a plan's folder; without one the model runs dense")] = None,
    prompt: Prompt = None,
    new_tokens: Annotated[int, typer.Option(help="tokens to generate")] = 64,
    lossless: Annotated[
        bool, typer.Option("--lossless", help="the plan drafts, the dense model verifies: its text, sooner or later")
    ] = False,
    sirius: Annotated[
        float | None, typer.Option(help="let dense correct what it finds less likely than this, e.g. 0.1; not lossless")
    ] = None,
    draft_length: Annotated[int, typer.Option(help="tokens that are drafted before dense looks at them")] = 4,
    temperature: Annotated[float, typer.Option(help="of --lossless and --sirius; 0 is greedy")] = 0.0,
    weights: Weights = None,
    seed: Seed = 0,
    backend: BackendName = "auto",
    as_json: Json = False,
) -> None:
    """Generate text, under a plan, dense, or drafted by the plan and corrected by dense; how fast is said on stderr."""
    from moyu.commands import pipeline
    from moyu.reporting.summary import generated

    if new_tokens < 1:
        raise UserError(f"--new-tokens must be at least 1, not {new_tokens}", "64 is the default")
    correction = pipeline.correction_for(lossless, sirius, draft_length, temperature, plan)
    row: Any = pipeline.generate_command(model, plan, prompt, new_tokens, backend, correction, seed, weights)  # pyright: ignore
    if as_json:
        print(row.model_dump_json())
        return
    print(row.prompt + row.sparse_text)
    for line in generated(row):
        print(f"moyu: {line}", file=sys.stderr)


@app.command(name="eval")
def evaluate(
    model: Model = "swiglu",
    plan: Annotated[list[Path] | None, typer.Option(help="a plan's folder; may be repeated")] = None,
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
        typer.Option(help="comma-separated tasks of lm-eval instead of held-out text, e.g. python_next_line"),
    ] = None,
    task_folder: Annotated[Path | None, typer.Option(help="a folder with YAML tasks of your own")] = None,
    limit: Annotated[int | None, typer.Option(help="documents of each task, at most")] = None,
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Quality against dense on held-out text, with the matched random and the matched oracle; or on tasks of lm-eval."""
    from moyu.commands import pipeline
    from moyu.plan import Plan

    settings = _settings(
        method, sparsity, bytes_, knob, text=text, window=window, boundary=prompt_tokens, bias=bias, centre=centre,
        learn_bias=learn_bias, seed=seed, dense_layers=dense_layers, device=device, weights=weights,
    )  # fmt: skip
    loaded = [Plan.load(p) for p in plan or []]
    if limit is not None and limit < 1:
        raise UserError(f"--limit must be at least 1, not {limit}", "leave it out for all documents")
    if tasks is None and (task_folder is not None or limit is not None):
        raise UserError("--task-folder and --limit are of --tasks", "name tasks, e.g. --tasks python_next_line")
    with _progress() as stage:
        context = pipeline.Context.open(model, settings, stage)
        names = [] if loaded else (method or context.applicable(settings.methods)[0])
        if tasks is not None:
            from moyu.integrations import lm_eval

            asked = [name.strip() for name in tasks.split(",") if name.strip()]
            found = lm_eval.find_tasks(asked, task_folder)
            plans = [*loaded, *(context.plan(name) for name in names)]
            _print(lm_eval.compare(context, plans, found, limit=limit, stage=stage), as_json)
            return
        rows = []
        for done, item in enumerate([*loaded, *names]):
            stage("evaluate", done, len(loaded) + len(names))
            made = context.plan(item) if isinstance(item, str) else item
            rows.append(pipeline.quality_record(context, made, context.quality(made)))
        stage("evaluate", len(rows), len(rows))
    _print(rows, as_json)


@app.command()
def bench(
    model: Annotated[
        str | None, typer.Argument(help="zoo name, local folder, GGUF file or hub id; or use --shape")
    ] = None,
    shape: Annotated[str | None, typer.Option(help="random weights of a published shape, e.g. llama-3.2-1b")] = None,
    layers: Annotated[int | None, typer.Option(help="cut the shape to so many layers")] = None,
    method: Methods = None,
    sparsity: Sparsity = 0.5,
    tokens: Annotated[int, typer.Option(help="decode steps a round")] = 16,
    rounds: Annotated[int, typer.Option(help="rounds, variants alternating")] = 3,
    weights: Weights = None,
    backend: BackendName = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Decoding speed, dense and skipping alternating in one run, beside the measured read ceiling."""
    from moyu.commands import pipeline

    settings = _settings(method, sparsity, backend=backend, seed=seed, weights=weights)
    if (model is None) == (shape is None):
        raise UserError("say what to time", "give MODEL or --shape, not both")
    with _progress() as stage:
        if shape is not None:
            pipeline.check_shape(shape)
            names = method or ["cats", "teal", "griffin", "popularity"]
            targets = {n: settings.target() for n in names}
            rows = pipeline.bench_shape(
                shape,
                targets,
                layers=layers,
                tokens=tokens,
                rounds=rounds,
                weights=weights,
                backend=settings.backend,
                seed=seed,
                stage=stage,
            )
        else:
            context = pipeline.Context.open(model or "", settings, stage)
            names = method or context.applicable(settings.methods)[0]
            rows = pipeline.bench_model(context, {n: context.plan(n) for n in names}, tokens=tokens, stage=stage)
    _print(rows, as_json)


@app.command()
def coverage(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="a model type of transformers; may be repeated")
    ] = None,
    out: Out = RUNS / "coverage",
    page: Annotated[Path | None, typer.Option(help="the page to write; default: beside the records")] = None,
    jobs: Annotated[int, typer.Option(help="types at a time")] = 2,
    again: Annotated[bool, typer.Option("--again", help="examine types again whose record is there")] = False,
    as_json: Json = False,
) -> None:
    """Which causal LMs of the installed transformers MOYU takes: each built tiny and checked; resumable."""
    from moyu.commands.pipeline import check_writable
    from moyu.research import coverage as examination

    check_writable(out)
    with _progress() as stage:
        rows = examination.run(only or [], out / "coverage.jsonl", jobs=jobs, again=again, stage=stage)
    target = page or out / "coverage.md"
    examination.write_page(rows, target)
    if as_json:
        _print(list(rows), True)
        return
    for row in rows:
        if not row.taken:
            print(f"{row.status or '':14s} {row.architecture:26s} {row.reason}")
    print(f"{examination.verdict(rows)}\npage     {target}\nrecords  {out / 'coverage.jsonl'}")


@app.command()
def report(
    records: Annotated[Path, typer.Argument(help="a records.jsonl")] = RUNS / "latest" / "records.jsonl",
    out: Annotated[Path | None, typer.Option("--out", help="the page to write; default: beside the records")] = None,
    as_json: Json = False,
) -> None:
    """Draw the report of a records file again."""
    from moyu import records as store
    from moyu.commands import pipeline
    from moyu.reporting import write_report

    rows = store.read(records)
    page = out or records.parent / "report.html"
    pipeline.check_writable(page.parent)
    write_report(rows, page)
    if as_json:
        _print(rows, True)
    else:
        print(f"report   {page}")


@app.command()
def study(
    names: Annotated[list[str] | None, typer.Argument(help="studies of --list; default: all that do not train")] = None,
    model: Annotated[list[str] | None, typer.Option("--model", help="zoo name, folder or hub id; may repeat")] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="a smoke test of all: too small for verdicts that count")
    ] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="claims, predictions and what refutes them; runs nothing")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="analyse what is finished again")] = False,
    out: Out = RUNS / "studies",
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The paper's claims as experiments that can fail; resumable, the verdict computed by a rule stated before."""
    from moyu.commands import pipeline
    from moyu.research import studies
    from moyu.research.studies import running

    if listed:
        for name in names or studies.names():
            print(running.statement(studies.study(name)))
        return
    pipeline.check_writable(out)
    with _progress() as stage:
        rows = running.run(
            names or [],
            model or [],
            out,
            quick=quick,
            seed=seed,
            again=again,
            device=device,
            announce=lambda item, on: print(running.statement(item), file=sys.stderr),
            progress=stage,
        )
    for row in rows:
        print(row.model_dump_json() if as_json else running.summary(row))
    if not as_json:
        print(f"\n{running.verdict_line(rows)}\nrecords  {out / 'studies.jsonl'}")


@app.command()
def trinity(
    models: Annotated[str, typer.Option(help="comma-separated: zoo names, folders, hub ids")] = "swiglu,relu,gelu",
    methods: Annotated[
        str | None, typer.Option(help="comma-separated methods, `quantise` for rounding; default: all")
    ] = None,
    bytes_: Annotated[str, typer.Option("--bytes", help="comma-separated byte fractions, in (0, 1)")] = "0.75,0.6,0.5",
    documents: Annotated[int, typer.Option(help="documents of held-out text, a window each")] = 24,
    quick: Annotated[bool, typer.Option("--quick", help="a smoke test: few methods, little text")] = False,
    speed: Annotated[bool, typer.Option(help="time the methods on a random-weight shape as well")] = True,
    out: Out = RUNS / "trinity",
    device: Device = "cpu",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """The scoreboard: quality, speed and applicability of every method at equal bytes, quantising beside; resumable."""
    from moyu.commands import pipeline
    from moyu.reporting import scoreboard, write_scoreboard
    from moyu.research import trinity as board

    try:
        fractions = tuple(float(v) for v in bytes_.split(","))
    except ValueError:
        raise UserError(f"--bytes {bytes_!r} is no list of fractions", "write 0.75,0.6,0.5") from None
    asked = board.Asked(
        models=models.split(","), methods=() if methods is None else methods.split(","), bytes=fractions, quick=quick,
        documents=documents, seed=seed, speed=speed, device=device,
    )  # fmt: skip
    asked.check()
    pipeline.check_writable(out)
    with _progress() as stage:
        rows = board.run(asked, out, stage)
    write_scoreboard(rows, out)
    if as_json:
        _print(rows, True)
        return
    print(scoreboard.markdown(rows))
    print(f"\nrecords  {out / 'records.jsonl'}\nreport   {out / 'report.html'}\nplot     {out / 'trinity.svg'}")


zoo_app = typer.Typer(help="The embedded models, and how to make them again.", invoke_without_command=True)
app.add_typer(zoo_app, name="zoo")


@zoo_app.callback()
def zoo_list(context: typer.Context, as_json: Json = False) -> None:
    """The embedded models."""
    if context.invoked_subcommand is not None:
        return
    from moyu.model import zoo

    for name in zoo.names():
        facts = zoo.describe(name)
        if as_json:
            print(json.dumps({k: v for k, v in facts.items() if k != "loss"}))
            continue
        bits = facts["bits_per_byte"]
        print(
            f"{name:8s} {facts['parameters'] / 1e6:.1f} M parameters, {facts['tokens'] / 1e6:.0f} M tokens; bits a byte on "
            f"held-out text {bits['held_out']:.2f} (random initialisation {bits['random_initialisation']:.2f}, "
            f"shuffled words {bits['shuffled_text']:.2f})"
        )


@zoo_app.command(name="train")
def zoo_train(
    name: Annotated[str, typer.Argument(help="swiglu, relu or gelu")],
    data: Annotated[Path, typer.Option(help="folder for the token files; made where it has none")] = RUNS / "zoo-data",
    out: Annotated[Path | None, typer.Option(help="folder for the model")] = None,
    size: Annotated[str, typer.Option(help="6m, as the shipped models, or 100m")] = "6m",
    tokens: Annotated[int | None, typer.Option(help="training tokens; default: the size's")] = None,
    watch: Annotated[bool, typer.Option(help="log sparsity and the sign statistic on the way")] = False,
    minutes: Annotated[float | None, typer.Option(help="stop after so long; run again to go on")] = None,
    seed: Seed = 0,
) -> None:
    """Make an embedded model again, from nothing; resumable."""
    from moyu.commands.pipeline import check_writable
    from moyu.model import zoo
    from moyu.research import training

    zoo.path(name)
    if size not in training.SIZES:
        raise UserError(f"no size {size!r}", f"the sizes are {', '.join(training.SIZES)}")
    target = out or RUNS / "zoo" / (name if size == training.SHIPPED else f"{name}-{size}")
    check_writable(target)
    check_writable(data)
    if not (data / "meta.json").exists():
        print("reading the corpus and training the tokenizer (some minutes)", file=sys.stderr)
        training.prepare(data, size)
    done = training.train(name, data, target, size=size, tokens=tokens, minutes=minutes, seed=seed, watched=watch)
    print(f"{'finished' if done else 'stopped by --minutes; run again to go on'}: {target}")


def main() -> None:
    """The `moyu` command: a user's mistake is one line and exit code 2, Ctrl-C is 130."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = app(standalone_mode=False)  # typer returns 130 for Ctrl-C, older versions raise
    except UserError as error:
        _fail(str(error))
    except (KeyboardInterrupt, typer.Abort):
        code = STOPPED
    except OSError as error:
        where = f" {error.filename!r}" if error.filename else ""
        remedy = "free some disk, or choose another --out" if error.errno == errno.ENOSPC else "choose another --out"
        _fail(f"{error.strerror or error}{where}: {remedy}")
    except Exception as error:
        if not (type(error).__module__.startswith(("typer", "click")) and hasattr(error, "format_message")):
            raise
        message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
        if not message:  # no sub-command: the help is printed already
            sys.exit(2)
        _fail(f"{message.rstrip('.')}: see `moyu --help`")
    if code == STOPPED:
        print("moyu: stopped", file=sys.stderr)
    if code:
        sys.exit(code)


def _fail(message: str) -> None:
    print(f"moyu: error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
