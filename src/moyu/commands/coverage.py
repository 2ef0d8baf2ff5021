"""`moyu coverage`: which architectures are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moyu.commands.options import RUNS, Json, Out
from moyu.commands.output import check_writable, progress, show


def coverage(
    only: Annotated[
        list[str] | None, typer.Option("--only", help="A model type of transformers. Repeat it for several.")
    ] = None,
    out: Out = RUNS / "coverage",
    page: Annotated[Path | None, typer.Option(help="The page to write. Default: beside the records.")] = None,
    jobs: Annotated[int, typer.Option(help="Types at a time.", min=1)] = 2,
    again: Annotated[bool, typer.Option("--again", help="Examine types again that have a record.")] = False,
    as_json: Json = False,
) -> None:
    """Find out which language models of the installed transformers MOYU takes. Run it again to go on.

    Each type is built tiny, with random weights, and checked on the CPU.
    """
    from moyu.research import coverage as examination

    check_writable(out)
    with progress() as stage:
        rows = examination.run(only or [], out / "coverage.jsonl", jobs=jobs, again=again, stage=stage)
    target = page or out / "coverage.md"
    examination.write_page(rows, target)
    if as_json:
        show(list(rows), True)
        return
    for row in rows:
        if not row.taken:
            print(f"{row.status or '':14s} {row.architecture:26s} {row.reason}")
    print(f"{examination.verdict(rows)}\npage     {target}\nrecords  {out / 'coverage.jsonl'}")
