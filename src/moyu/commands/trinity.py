"""`moyu trinity`: the scoreboard."""

from __future__ import annotations

from typing import Annotated

import typer

from moyu.commands import words
from moyu.commands.options import RUNS, BackendName, Device, Json, Out, Seed, parse_fractions, refuse_unused
from moyu.commands.output import check_writable, progress, show


def trinity(
    typed: typer.Context,
    models: Annotated[
        str, typer.Option(help="Zoo names, folders or hub ids, with commas between them.")
    ] = "swiglu,relu,gelu",
    methods: Annotated[
        str | None, typer.Option(help="Methods, with commas; `quantise` rounds all weights. Default: all.")
    ] = None,
    bytes_: Annotated[
        str, typer.Option("--bytes", help="Fractions of the dense bytes, in (0, 1), with commas.")
    ] = "0.75,0.6,0.5",
    documents: Annotated[int, typer.Option(help="Documents of held-out text, a window each.", min=2)] = 24,
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
    """Compare all methods at equal bytes: quality, speed and where they apply, quantising beside. Run it again to go on."""
    if quick:
        refuse_unused(typed, "documents", because="--quick takes 6", remedy="leave out one of them")
    if not speed:
        refuse_unused(typed, "backend", because="of what is timed, and --no-speed times nothing", remedy="leave it out")
    from moyu.model import machine

    kernels = machine.backend_of(backend)
    machine.check(device, kernels)
    fractions = parse_fractions(bytes_)
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
