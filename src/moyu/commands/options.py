"""Options that several commands share, declared once, and what their words mean."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from moyu import methods
from moyu.commands import words
from moyu.errors import UserError

RUNS = Path("runs")  # what commands write goes below it

# ------------------------------------------------------------------------------------------------------ what words mean


def parse_layers(words: str | None) -> tuple[int, ...]:
    """ "0,1,-1" as numbers of layers; UserError for anything else."""
    try:
        return tuple(int(part) for part in (words or "").split(",") if part.strip())
    except ValueError:
        raise UserError(f"--dense-layers {words!r} is no list of layers", "write numbers, e.g. 0,1,-1") from None


def parse_knobs(words: Sequence[str] | None) -> dict[str, Any]:
    """["tau=0.2"] as {"tau": 0.2}: a value is JSON where it can be, else a word. UserError where one has no value."""
    parsed = {}
    for knob in words or []:
        name, sign, value = knob.partition("=")
        if not sign:
            raise UserError(f"--knob {knob!r} has no value", "write NAME=VALUE, e.g. tau=0.2")
        try:
            parsed[name] = json.loads(value)
        except ValueError:
            parsed[name] = value
    return parsed


def parse_share(words: str) -> float:
    """ "1%" or "0.01" as 0.01; UserError for anything that is no share above 0."""
    try:
        value = float(words.removesuffix("%")) / (100 if words.endswith("%") else 1)
    except ValueError:
        value = -1.0
    if not 0 < value < 10:
        raise UserError(f"{words!r} is no share", "write 1% or 0.01")
    return value


def parse_fractions(words: str) -> tuple[float, ...]:
    """ "0.75,0.6" as numbers; UserError for anything else."""
    try:
        return tuple(float(value) for value in words.split(","))
    except ValueError:
        raise UserError(f"--bytes {words!r} is no list of fractions", "write 0.75,0.6,0.5") from None


def _positive(number: float) -> None:
    if not 0 < number < 100:
        raise UserError(f"a KL of {number:g} is no budget", "write 0.02, for example")


def _checked(parse: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A callback that refuses what `parse` refuses, before torch is imported, and leaves the words as they are."""

    def check(words: Any) -> Any:
        if words is not None:
            parse(words)
        return words

    return check


def refuse_unused(typed: typer.Context, *names: str, because: str, remedy: str) -> None:
    """Refuse these parameters where the command line gives them, since the command would not use them."""
    told = [
        max(option.opts, key=len)
        for option in typed.command.params
        if option.name in names and typed.get_parameter_source(option.name).name == "COMMANDLINE"  # pyright: ignore
    ]
    if told:
        raise UserError(f"{' and '.join(told)} would do nothing ({because})", remedy)


# ------------------------------------------------------------------------------------------------------ model and text

Model = Annotated[
    str,
    typer.Argument(
        help="A zoo name (`moyu zoo`), a local folder, a GGUF file or a hub id.",
        callback=words.model,
        autocompletion=words.complete_models,
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        help="Keep the weights as bf16, q8_0 or q4_0. Default: as the checkpoint has them.",
        callback=words.weights,
        autocompletion=lambda: list(words.WEIGHTS),
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        help="A text file. Its first half calibrates, its third quarter decides searches, its last quarter tests. "
        "Default: Python code that comes with MOYU.",
        callback=words.text,
    ),
]
Prompt = Annotated[str | None, typer.Option(help="The text to continue.")]
Window = Annotated[int, typer.Option(help="Tokens in a window of text.", min=2)]
Boundary = Annotated[
    int,
    typer.Option(
        "--prompt-tokens", help="Tokens at the start of a window that run dense; the others skip and are scored.", min=0
    ),
]
Lossless = Annotated[
    bool,
    typer.Option(
        "--lossless",
        help="The text so far drafts, and the plan or the weights' first bits; the dense model checks: its text, faster where drafts pay.",
    ),
]
Strict = Annotated[
    bool, typer.Option("--strict", help="Stop with an error where a decode step is not the fastest that there is.")
]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, max=2**63 - 1)]

# ---------------------------------------------------------------------------------------------------- what is skipped

Methods = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        "-m",
        help="A method of `moyu methods`. Repeat it for several.",
        callback=words.method_list,
        autocompletion=methods.names,
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(help="Skip this fraction of the units, in [0, 1). Default: 0.5.", callback=words.sparsity),
]
Bytes = Annotated[
    float | None,
    typer.Option(
        "--bytes",
        help="Instead of --sparsity: read this fraction of the dense bytes, in (0, 1].",
        callback=words.byte_fraction,
    ),
]
Knobs = Annotated[
    list[str] | None,
    typer.Option(
        "--knob",
        help="Set a method's knob: NAME=VALUE. `moyu methods` lists them. Repeat it for several.",
        callback=_checked(parse_knobs),
    ),
]
Bias = Annotated[bool, typer.Option(help="Add the mean of what is skipped back as a bias (closed form).")]
Centre = Annotated[bool, typer.Option(help="Skip input channels around the best centre of each site, not around 0.")]
LearnBias = Annotated[int, typer.Option(help="Train a bias at every site for this many steps. 0: none.", min=0)]
DenseLayers = Annotated[
    str | None,
    typer.Option(
        "--dense-layers",
        help="Layers that skip nothing, for example 0,1,-1 (-1 is the last).",
        callback=_checked(parse_layers),
    ),
]

PlanFolder = Annotated[
    Path | None,
    typer.Option(
        "--plan", help="A folder that `moyu calibrate` wrote. Without one the model runs dense.", callback=words.plan
    ),
]

# ------------------------------------------------------------------------------------------------- where, and what out

Device = Annotated[
    str, typer.Option(help="Where the model runs: cpu, cuda, or cuda:1 for the second GPU.", callback=words.device)
]
BackendName = Annotated[
    str,
    typer.Option(
        "--backend",
        help="The kernels that decode: cpu, gpu, or reference (plain torch). auto takes the device's own where it can.",
        callback=words.backend,
        autocompletion=lambda: list(words.BACKENDS),
    ),
]
Out = Annotated[Path, typer.Option("--out", help="The folder to write into.")]
Json = Annotated[bool, typer.Option("--json", help="Print records as JSON lines on stdout, and nothing else.")]
MaxKl = Annotated[
    float | None,
    typer.Option(
        "--max-kl",
        help="Instead of --sparsity: skip as much as this KL from the dense model allows, in nats a token, e.g. 0.02.",
        min=0,
        callback=_checked(_positive),
    ),
]
MaxIncrease = Annotated[
    str | None,
    typer.Option(
        "--max-ppl-increase",
        help="Instead of --sparsity: skip as much as this rise of perplexity allows, e.g. 1%.",
        callback=_checked(parse_share),
    ),
]
