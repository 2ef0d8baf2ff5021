"""`moyu methods`: the registry as a table."""

from __future__ import annotations

import json
import sys

from moyu.commands.options import Json

WIDEST = 1000  # characters of a line that goes into a file or a pipe: a method is one line there, for grep


def list_methods(as_json: Json = False) -> None:
    """List every method: what it needs, its knobs and its paper."""
    from moyu import methods

    rows = methods.table()
    if as_json:
        for row in rows:
            print(json.dumps(row))
        return
    from rich.console import Console
    from rich.table import Table

    screen = sys.stdout.isatty()
    columns = ("method", "family", "granularity", "exact", "calibration", "knobs", "source")
    table = Table(*columns) if screen else Table(*columns, box=None, padding=(0, 2, 0, 0))
    for row in rows:
        knobs = ", ".join(f"{k}={v}" for k, v in row["knobs"].items()) or "-"
        exact, needs = ("yes" if row[k] else "no" for k in ("exact", "needs_calibration"))
        table.add_row(row["method"], row["family"], row["granularity"], exact, needs, knobs, row["paper"])
    Console(width=None if screen else WIDEST).print(table)
