"""`moyu report`: the page of a records file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from moyu.commands.options import RUNS, Json
from moyu.commands.output import check_writable, show


def report(
    records: Annotated[Path, typer.Argument(help="A records.jsonl that another command wrote.")] = RUNS
    / "latest"
    / "records.jsonl",
    out: Annotated[Path | None, typer.Option("--out", help="The page to write. Default: beside the records.")] = None,
    as_json: Json = False,
) -> None:
    """Write the HTML report of a records file again."""
    from moyu.records import read
    from moyu.reporting import write_report

    rows = read(records)
    page = out or records.parent / "report.html"
    check_writable(page.parent)
    write_report(rows, page)
    if as_json:
        show(rows, True)
    else:
        print(f"report   {page}")
