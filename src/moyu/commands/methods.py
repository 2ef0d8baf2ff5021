"""`moyu methods`: the registry as a table."""

from __future__ import annotations

import json

from moyu.commands.options import Json


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

    table = Table("method", "family", "granularity", "exact", "calibration", "knobs", "source")
    for row in rows:
        knobs = ", ".join(f"{k}={v}" for k, v in row["knobs"].items()) or "-"
        exact, needs = ("yes" if row[k] else "no" for k in ("exact", "needs_calibration"))
        table.add_row(row["method"], row["family"], row["granularity"], exact, needs, knobs, row["paper"])
    Console().print(table)
