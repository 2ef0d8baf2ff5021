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
    random, oracle, kl = cell.kl_random, cell.kl_oracle, cell.kl
    same = len(cell.by_document.get("kl_random", ()))  # of a file's board the references are of the first documents
    if 0 < same < len(cell.by_document["kl"]):
        kl = math.fsum(cell.by_document["kl"][:same]) / same
    if not kl or not random or not oracle or random <= oracle:
        return None
    return math.log(random / kl) / math.log(random / oracle)


def kl_of(cell: Cell) -> str:
    """A KL with its interval, or why there is none."""
    if cell.kl is None:
        return cell.status or NONE
    low, high = cell.kl_interval or (cell.kl, cell.kl)
    return f"{number(cell.kl, 2)} [{number(low, 2)}, {number(high, 2)}]"
