"""`moyu pack`: a model of 16 bits as a GGUF file of few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moyu.commands import words
from moyu.commands.options import Json, Model, Seed, Text, Window
from moyu.commands.output import progress


def pack(
    model: Model = "swiglu",
    out: Annotated[Path, typer.Option("--out", help="The GGUF file to write.")] = Path("packed.gguf"),
    bits: Annotated[
        float | None,
        typer.Option(
            help="Bits a weight, scales included, of the matrices that are packed: each gets the type that its error on the "
            "text is worth. Default: 5.",
            min=2.5,
            max=8.5,
        ),
    ] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="Instead of --bits: one type for all matrices, e.g. q4_k. Rows that 256 does not divide get a type of 32: Q4_1 for Q4_K.",
            callback=words.packed,
            autocompletion=lambda: list(words.PACKED),
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            help="With --type: another type for the head and the embedding.",
            callback=words.packed,
            autocompletion=lambda: list(words.PACKED),
        ),
    ] = None,
    text: Text = None,
    windows: Annotated[int, typer.Option(help="Windows of text to fit the weights to.", min=1)] = 64,
    window: Window = 256,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Quantise a model of 16 or 32 bits to a GGUF file, fitted to a text; `generate`, `calibrate`, `eval` and llama.cpp read it.

    Weights are rounded one input after another with the error fed back to later inputs, and then moved to where the error of each
    linear's outputs on the text is least. The text's first half is used.
    """
    from moyu.packing.files import make

    with progress() as stage:
        made = make(
            model,
            out,
            bits=bits,
            kind=kind,
            head=head,
            text=text,
            windows=windows,
            window=window,
            seed=seed,
            stage=stage,
        )
    if as_json:
        import json

        print(json.dumps(made))
        return
    for name, value in made.items():
        print(f"{name:8s} {value}")
