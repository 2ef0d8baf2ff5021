"""The main tables in the terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from moyu.records import Record
from moyu.reporting import columns
from moyu.reporting.columns import Column
from moyu.reporting.groups import Group, Tasks, quality_groups, speed_groups, task_groups, without_prompt


def tables(records: Iterable[Record]) -> list[Table]:
    """The main quality tables, then one speed table per timed model, for terminals of 100 columns and more.

    Quality without a dense prompt is shown only if there is no other quality table.
    """
    rows = list(records)
    groups = quality_groups(rows)
    shown = [g for g in groups if not without_prompt(g.rows[0])] or groups
    quality = [_table(g, columns.QUALITY) for g in shown]
    return quality + [_tasks(g) for g in task_groups(rows)] + [_table(g, columns.SPEED) for g in speed_groups(rows)]


def _tasks(group: Tasks) -> Table:
    table = _framed(group)
    for head in ("task", "metric"):
        table.add_column(head, no_wrap=True)
    for head in ("documents", "dense", *group.methods):
        table.add_column(head, justify="right")
    for line in group.lines:
        table.add_row(*(Text(cell) for cell in line))
    return table


def _table(group: Group, candidates: Sequence[Column]) -> Table:
    chosen = columns.used([c for c in candidates if c.short], group.rows)
    table = _framed(group)
    table.add_column("method", no_wrap=True)
    for column in chosen:
        table.add_column(column.short, justify="right")
    for row in group.rows:
        status = getattr(row, "status", None)
        cells = [c.text(row) for c in chosen]
        if status:
            cells[-1] = status
        table.add_row(Text(columns.label(row)), *(Text(c) for c in cells))
    return table


def _framed(group: Group | Tasks) -> Table:
    """An empty table with its title and caption."""
    table = Table(
        title=Text(group.title),
        caption=Text(group.caption),
        box=box.SIMPLE_HEAD,
        title_justify="left",
        padding=(0, 1, 0, 0),
        show_edge=False,
    )
    table.title_style, table.caption_style, table.caption_justify = "bold", "dim", "left"
    return table
