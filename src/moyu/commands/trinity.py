"""`moyu trinity`: the scoreboard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moyu.commands import words
from moyu.commands.options import RUNS, BackendName, Device, Json, Out, Seed, Text, parse_fractions, refuse_unused
from moyu.commands.output import check_writable, progress, show


def trinity(
    typed: typer.Context,
    models: Annotated[
        str, typer.Option(help="Zoo names, folders, GGUF files or hub ids, with commas between them.")
    ] = "swiglu,relu,gelu",
    text: Text = None,
    competitors: Annotated[
        str | None,
        typer.Option(help="GGUF files of the same models, with commas: rows beside the methods on a quantised file."),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(help="Methods, with commas; `quantise` rounds the weights of a 16-bit model. Default: all."),
    ] = None,
    bytes_: Annotated[
        str | None,
        typer.Option(
            "--bytes",
            help="Fractions of the dense bytes, in (0, 1), with commas. Default: 0.75,0.6,0.5, of a quantised file 0.85,0.7,0.55.",
        ),
    ] = None,
    documents: Annotated[
        int | None,
        typer.Option(help="Documents of held-out text, a window each. Default: 24, of a quantised file 12.", min=2),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Only try whether all runs: few methods, little text.")
    ] = False,
    speed: Annotated[bool, typer.Option(help="Time the methods on random weights as well.")] = True,
    out: Out = RUNS / "trinity",
    device: Device = "cpu",
    backend: BackendName = "auto",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Compare all methods at equal bytes: quality, speed and where they apply, quantising beside. Run it again to go on.

    On a quantised GGUF file methods act on its own weights, are held against the file itself, and stand beside the files of --competitors.
    """
    if quick:
        refuse_unused(typed, "documents", because="--quick takes 6", remedy="leave out one of them")
    if not speed:
        refuse_unused(typed, "backend", because="of what is timed, and --no-speed times nothing", remedy="leave it out")
    from moyu.model import machine

    kernels = machine.backend_of(backend)
    machine.check(device, kernels)
    fractions = () if bytes_ is None else parse_fractions(bytes_)
    words.model_list(models.split(","))
    from moyu.reporting import scoreboard, write_scoreboard
    from moyu.research import trinity as board

    asked = board.Asked(
        models=models.split(","),
        methods=() if methods is None else methods.split(","),
        bytes=fractions,
        quick=quick,
        documents=documents,
        seed=seed,
        speed=speed,
        device=device,
        backend=kernels,
        text=text,
        competitors=[Path(name) for name in (competitors or "").split(",") if name],
    )
    asked.check()
    check_writable(out)
    with progress() as stage:
        rows = board.run(asked, out, stage)
    write_scoreboard(rows, out)
    if as_json:
        show(rows, True)
        return
    print(scoreboard.markdown(rows))
    print(f"\nrecords  {out / 'records.jsonl'}\nreport   {out / 'report.html'}\nplot     {out / 'trinity.svg'}")
