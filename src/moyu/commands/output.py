"""What commands show and where they write: progress on stderr, records on stdout, folders that can be written."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from moyu.errors import UserError
from moyu.records import Record

WIDTH = 140  # of tables that go into a file or a pipe


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A display on stderr that names the stage and the time left; plain lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

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
    with Progress(*columns, console=console) as display:
        tasks: dict[str, TaskID] = {}

        def stage(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = display.add_task(name, total=total)
            display.update(tasks[name], completed=done, total=total)

        yield stage


def show(rows: Sequence[Record], as_json: bool) -> None:
    """Print records: as JSON lines, or as tables with what must be known before the numbers are used."""
    if as_json:
        for row in rows:
            print(row.model_dump_json())
        return
    from rich.console import Console

    from moyu.reporting import tables
    from moyu.reporting.summary import notes, steps, warnings

    console = Console(width=None if sys.stdout.isatty() else WIDTH, soft_wrap=False)
    for table in tables(rows):
        console.print(table)
    for who, step in steps(rows):
        console.print(f"decode step: {step} ({who})", markup=False, highlight=False)
    for warning in warnings(rows):
        console.print(f"! {warning}", markup=False, highlight=False)
    for subject, note in notes(rows):
        console.print(f"! {subject}: {note}", markup=False, highlight=False)


def check_writable(out: Path) -> None:
    """Refuse an output folder that cannot be written, before any work is done."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {str(out)!r} ({error.strerror})", "choose another folder with --out") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"cannot write to {str(out)!r}", "choose another folder with --out")
