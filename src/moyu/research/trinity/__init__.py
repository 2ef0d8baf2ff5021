"""The scoreboard: every method on every model at equal bytes; of a quantised file, beside other files.

A cell is one record in a file of its own, written whole or not at all: a run that stops goes on where it was. There is one window a
document, and intervals are over documents.
"""

from __future__ import annotations

from pathlib import Path

from moyu import records
from moyu.calibration.context import Context
from moyu.calibration.settings import Stage, quiet
from moyu.model.named import gguf_file
from moyu.model.quantised import weight_format
from moyu.research.trinity.asked import Asked
from moyu.research.trinity.board import Board
from moyu.research.trinity.competitors import Competitor, assigned
from moyu.research.trinity.of_file import FileBoard
from moyu.research.trinity.plain import PlainBoard
from moyu.research.trinity.timing import timed

__all__ = ["Asked", "Board", "FileBoard", "PlainBoard", "run", "timed"]


def run(asked: Asked, out: Path, stage: Stage = quiet) -> list[records.Record]:
    """Fill in the cells that `out` lacks, then time; all records, in the order of the tables."""
    asked.check()
    beside = assigned(asked.models, asked.competitors)
    out.mkdir(parents=True, exist_ok=True)
    rows: list[records.Record] = []
    for model in asked.models:
        rows += board_of(model, asked, out, stage, beside[model]).fill()
    if asked.speed and any(isinstance(r, records.Cell) and r.step_bytes is None for r in rows):
        rows += timed(asked, out, rows, stage)
    return rows


def board_of(model: str, asked: Asked, out: Path, stage: Stage, competitors: list[Competitor]) -> Board:
    """The board of a model in 16 bits, or of a quantised file."""
    if gguf_file(model) is None:
        return PlainBoard(asked, model, out, stage)
    context = Context.open(model, asked.settings(), stage)
    if weight_format(context.loaded.model) is None:
        return PlainBoard(asked, model, out, stage, context)
    return FileBoard(asked, model, out, stage, context, competitors)
