"""What tables of scoreboards have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moyu.records import Cell
from moyu.reporting.columns import NONE, number


@dataclass(frozen=True)
class ScoreTable:
    """A table: title, caption, head and lines."""

    title: str
    caption: str
    head: list[str]
    lines: list[list[str]]


def place(cell: Cell) -> float | None:
    """The place of a method's KL between its matched random (0) and its matched oracle (1), on a log scale."""
    if not cell.kl or not cell.kl_random or not cell.kl_oracle or cell.kl_random <= cell.kl_oracle:
        return None
    return math.log(cell.kl_random / cell.kl) / math.log(cell.kl_random / cell.kl_oracle)


def kl_of(cell: Cell) -> str:
    """A KL with its interval, or why there is none."""
    if cell.kl is None:
        return cell.status or NONE
    low, high = cell.kl_interval or (cell.kl, cell.kl)
    return f"{number(cell.kl, 2)} [{number(low, 2)}, {number(high, 2)}]"
