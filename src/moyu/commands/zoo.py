"""`moyu zoo`: the models that come with MOYU, and how to make them again."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from moyu.commands import words
from moyu.commands.options import RUNS, Json, Seed, refuse_unused
from moyu.commands.output import check_writable
from moyu.errors import UserError


def zoo(context: typer.Context, as_json: Json = False) -> None:
    """List the small models that come with MOYU; `moyu zoo train` makes one again."""
    if context.invoked_subcommand is not None:
        refuse_unused(context, "as_json", because="it is of the list of models", remedy="leave it out")
        return
    from moyu.model import zoo as models

    for name in models.names():
        facts = models.describe(name)
        if as_json:
            print(json.dumps({k: v for k, v in facts.items() if k != "loss"}))
            continue
        bits = facts["bits_per_byte"]
        print(
            f"{name:8s} {facts['parameters'] / 1e6:.1f} M parameters, {facts['tokens'] / 1e6:.0f} M tokens; bits a byte on "
            f"held-out text {bits['held_out']:.2f} (random initialisation {bits['random_initialisation']:.2f}, "
            f"shuffled words {bits['shuffled_text']:.2f})"
        )


def train(
    name: Annotated[str, typer.Argument(help="swiglu, relu or gelu.", callback=words.embedded)],
    data: Annotated[Path, typer.Option(help="The folder of the token files. They are made where it has none.")] = RUNS
    / "zoo-data",
    out: Annotated[Path | None, typer.Option(help="The folder for the model.")] = None,
    size: Annotated[str, typer.Option(help="6m, like the models that come with MOYU, or 100m.")] = "6m",
    tokens: Annotated[int | None, typer.Option(help="Tokens to train on. Default: the size's.", min=1)] = None,
    watch: Annotated[bool, typer.Option(help="Log sparsity and the sign statistic on the way.")] = False,
    minutes: Annotated[
        float | None, typer.Option(help="Stop after so many minutes. Run it again to go on.", min=0)
    ] = None,
    seed: Seed = 0,
) -> None:
    """Train one of the models that come with MOYU again, from nothing, on the CPU. Run it again to go on."""
    from moyu.model import zoo as models
    from moyu.research import training

    models.path(name)
    if size not in training.SIZES:
        raise UserError(f"no size {size!r}", f"the sizes are {', '.join(training.SIZES)}")
    target = out or RUNS / "zoo" / (name if size == training.SHIPPED else f"{name}-{size}")
    check_writable(target)
    check_writable(data)
    if not training.prepared(data, size):
        print("reading the corpus and training the tokenizer (some minutes)", file=sys.stderr)
        training.prepare(data, size)
    done = training.train(name, data, target, size=size, tokens=tokens, minutes=minutes, seed=seed, watched=watch)
    print(f"{'finished' if done else 'stopped by --minutes; run again to go on'}: {target}")
