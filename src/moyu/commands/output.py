"""What commands show and where they write: progress on stderr, records on stdout, folders that can be written."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from moyu.errors import UserError

if TYPE_CHECKING:  # pydantic takes a quarter of a second, which `moyu -h` should not
    from moyu.records import Record

EVERY = 10.0  # seconds between two lines of progress about one stage
WIDTH = 140  # of tables that go into a file or a pipe


@contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A display on stderr: the stage, how much of it is done, and the time left; plain lines where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
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


class _Lines:
    """Progress as lines: one where a stage begins, and one every EVERY seconds with its count and the time left."""

    def __init__(self) -> None:
        self.began: dict[str, tuple[float, int]] = {}  # of each stage: when, and what was done by then
        self.said = 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        """A stage has done so much of all that it does."""
        now = time.monotonic()
        if name not in self.began or done < self.began[name][1]:  # or begins again
            if name not in self.began:
                self._say(name, now)
            self.began[name] = (now, done)
            return
        start, before = self.began[name]
        if done > before and done < total and now - self.said >= EVERY:
            left = (now - start) / (done - before) * (total - done)
            self._say(f"{name}, {done} of {total}, {left:.0f} s left", now)
        elif done == total and now - start >= EVERY:
            self._say(f"{name}, all {total} after {now - start:.0f} s", now)
            self.began[name] = (now, done)  # a stage may end more than once

    def _say(self, words: str, now: float) -> None:
        self.said = now
        print(f"moyu: {words}", file=sys.stderr, flush=True)


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
