"""`moyu study`: the paper's claims as experiments."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from moyu.commands import words
from moyu.commands.options import RUNS, BackendName, Device, Json, Out, Seed, refuse_unused
from moyu.commands.output import check_writable, progress


def study(
    typed: typer.Context,
    names: Annotated[
        list[str] | None, typer.Argument(help="Studies of --list. Default: all that train no model.")
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option("--model", help="A zoo name, folder or hub id. Repeat it for several.", callback=words.model_list),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only try whether all runs: too little text for verdicts that count.")
    ] = False,
    listed: Annotated[
        bool, typer.Option("--list", help="Run nothing: list claims, predictions and what refutes them.")
    ] = False,
    again: Annotated[bool, typer.Option("--again", help="Analyse finished studies again.")] = False,
    out: Out = RUNS / "studies",
    device: Device = "cpu",
    backend: BackendName = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Test the paper's claims: experiments that can fail, judged by rules stated before. Run it again to go on."""
    from moyu import kernels
    from moyu.model import machine

    machine.check(device, machine.backend_of(backend))
    from moyu.research import studies
    from moyu.research.studies import running

    if names and all(studies.study(name).needs == "nothing" for name in names):
        because = f"no model is loaded for {', '.join(names)}"
        refuse_unused(typed, "model", "device", "backend", because=because, remedy="leave it out")
    if listed:
        others = ("model", "quick", "again", "out", "device", "backend", "seed", "as_json")
        refuse_unused(typed, *others, because="--list runs nothing", remedy="leave out one of them")
        for name in names or studies.names():
            print(running.statement(studies.study(name)))
        return
    check_writable(out)
    with progress() as stage, kernels.use(backend):
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
