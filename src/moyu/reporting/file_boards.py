"""The scoreboard of a quantised file: methods at equal bytes beside the files that one would use in their place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from moyu.records import Cell, Comparison, Record
from moyu.reporting import claims
from moyu.reporting.beside_files import front, of_files
from moyu.reporting.charts import Canvas, Linear, Log
from moyu.reporting.columns import NONE, number, percent
from moyu.reporting.tables import ScoreTable, kl_of, place

WIDTH, HEIGHT = 860.0, 480.0
LEAST = 1e-6  # nats, below which a plan is the file for all that can be seen
HEAD = [
    "row",
    "asked",
    "MB a step",
    "of the file",
    "bits a weight",
    "KL",
    "95 %",
    "perplexity",
    "top-1",
    "against files",
]


@dataclass(frozen=True)
class FileBoard:
    """One file on one text: itself, the files beside it, and the methods' cells."""

    source: Comparison
    files: list[Comparison]
    cells: list[Cell]

    @property
    def fractions(self) -> list[float]:
        """The byte fractions that were asked for, the largest first."""
        return sorted({c.target_byte_fraction for c in self.cells if c.target_byte_fraction}, reverse=True)

    def bits(self, step_bytes: float) -> float | None:
        """Bits a weight of a step that reads so many bytes; None where no cell says how many weights there are."""
        known = next((c for c in self.cells if c.step_bytes and c.bits_per_weight), None)
        return None if known is None else step_bytes * (known.bits_per_weight or 0) / (known.step_bytes or 1)

    def file_kl(self, step_bytes: float) -> float | None:
        """KL that files of so many bytes have."""
        return of_files([self.source, *self.files], step_bytes)


def boards(rows: Iterable[Record]) -> list[FileBoard]:
    """The boards of quantised files among the records."""
    rows = list(rows)
    found = []
    for source in (r for r in rows if isinstance(r, Comparison) and r.what == "source"):
        place = (source.model, source.corpus)
        cells = [r for r in rows if isinstance(r, Cell) and (r.model, r.corpus) == place]
        files = [r for r in rows if isinstance(r, Comparison) and r.what == "file" and (r.model, r.corpus) == place]
        if cells:
            found.append(FileBoard(source, files, cells))
    return found


def tables(rows: Iterable[Record]) -> list[ScoreTable]:
    """All tables of these boards."""
    found = []
    for board in boards(rows):
        found += [_at_bytes(board), _claims(board), _all(board)]
    return [table for table in found if table.lines]


def _about(board: FileBoard) -> str:
    one, protocol = board.source, board.source.protocol
    assert protocol is not None
    name = (one.corpus or {}).get("file") or "the Python code that comes with MOYU"
    return (
        f"{one.documents} documents of {name}, {protocol.window} tokens of each, those from {protocol.prompt} on scored. The file: "
        f"{one.step_bytes / 1e6:.1f} MB a step, {number(board.bits(one.step_bytes))} bits a weight, perplexity {number(one.ppl)}."
    )


def _at_bytes(board: FileBoard) -> ScoreTable:
    """KL of every method at each byte fraction."""
    asked, lines = board.fractions, []
    for name in sorted(dict.fromkeys(c.method for c in board.cells), key=lambda n: _rank(board, n)):
        mine = [c for c in board.cells if c.method == name]
        by_target = {c.target_byte_fraction: c for c in mine}
        native = by_target.get(None)
        if native is not None:
            shown = [kl_of(native) if native.kl is None else f"{kl_of(native)} at {native.byte_fraction:.2f}"]
            shown += [NONE] * (len(asked) - 1)
        else:
            shown = [kl_of(by_target[t]) if t in by_target else "not run" for t in asked]
        last = next((c for c in reversed(mine) if place(c) is not None), None)
        lines.append([name, *shown, NONE if last is None else percent(place(last))])
    files = [board.file_kl(t * board.source.step_bytes) for t in asked]
    if any(f is not None for f in files):
        lines.insert(0, ["**a file of these bytes**", *(NONE if f is None else number(f, 2) for f in files), NONE])
    return ScoreTable(
        f"{board.source.model}, at equal bytes",
        "KL from the file itself, nats a token, with its 95 % interval over documents. Columns: the fraction of the file's bytes that a "
        f"step reads. {_about(board)} A file of these bytes: on the line between the best files of more and of fewer bytes, the "
        "logarithm of KL taken as linear. Place: between matched random (0 %) and matched oracle (100 %) on a log scale, at the fewest "
        "bytes reached.",
        ["method", *(f"{t:.2f}" for t in asked), "place"],
        lines,
    )


def _rank(board: FileBoard, name: str) -> tuple[float, ...]:
    """Sort key: the number of targets that a method reaches, then its KL at the largest."""
    found = {c.target_byte_fraction: c.kl for c in board.cells if c.method == name and c.kl is not None}
    return tuple(found.get(t, math.inf) for t in board.fractions)


def _claims(board: FileBoard) -> ScoreTable:
    """The table of claims."""
    return ScoreTable(
        f"{board.source.model}, what the cells show",
        "Numbers of cells in which the 95 % interval of a paired difference over documents lies on the claim's side of 0 (shown), on "
        "both sides (open) or on the other side (refuted), by KL, order and routers by log-perplexity. The next larger file: of "
        "those that no other file beats in both bytes and KL and that read at least as many bytes as the plan, the one with the fewest.",
        ["claim", "shown", "open", "refuted", "refuted by (difference in nats per token)"],
        claims.lines(board.cells, [board.source, *board.files]),
    )


def _all(board: FileBoard) -> ScoreTable:
    """Every row that was measured, by its bytes."""
    best, source, lines = front(board.files), board.source, list[tuple[float, list[str]]]()
    for r in (source, *board.files):
        mark = "the file itself" if r is source else "front" if r in best else NONE
        own = [r.row, NONE, *_figures(board, r), mark]
        lines.append((r.step_bytes, own))
    for c in board.cells:
        if c.kl is None or c.step_bytes is None:
            continue
        there = board.file_kl(c.step_bytes)
        mark = (
            NONE if there is None else number(there, 2) if c.kl < LEAST else f"{number(there, 2)}, {there / c.kl:.2g} ×"
        )
        asked = NONE if c.target_byte_fraction is None else f"{c.target_byte_fraction:.2f}"
        lines.append((c.step_bytes, [f"`{c.method}`", asked, *_figures(board, c), mark]))
    return ScoreTable(
        f"{source.model}, every row",
        "Most bytes first. Against files: the KL of files of these bytes, and how many times the plan's that is (above 1 the plan is "
        "better).",
        HEAD,
        [line for _, line in sorted(lines, key=lambda pair: -pair[0])],
    )


def _figures(board: FileBoard, r: Cell | Comparison) -> list[str]:
    """The numbers that a file and a method have in common."""
    size, (low, high) = r.step_bytes or 0.0, r.kl_interval or (0.0, 0.0)
    return [
        f"{size / 1e6:.1f}",
        f"{size / board.source.step_bytes:.3f}",
        number(board.bits(size)),
        number(r.kl, 2),
        f"{number(low, 2)} to {number(high, 2)}",
        number(r.ppl),
        percent(r.top1_agreement),
    ]


def draw(canvas: Canvas, board: FileBoard, top: float) -> None:
    """KL over bits a weight: files and their front, methods; the references are left out."""
    files = [(board.bits(r.step_bytes) or 0.0, r.kl, r.row) for r in board.files if r.kl >= LEAST]
    cells = [
        (c.bits_per_weight or 0.0, c.kl or 0.0, c.method, c.family)
        for c in board.cells
        if (c.kl or 0) >= LEAST and c.family != "reference"
    ]
    marks = [(x, y) for x, y, *_ in (*files, *cells)]
    if not marks:
        return
    low, high = (
        10.0 ** edge(math.log10(pick(y for _, y in marks))) for edge, pick in ((math.floor, min), (math.ceil, max))
    )
    x = Linear(min(m[0] for m in marks) * 0.97, max(m[0] for m in marks) * 1.03, 60.0, WIDTH - 90)
    y = Log(low, max(high, low * 10), top + HEIGHT - 40, top + 50)
    for v in y.ticks():
        canvas.line(60.0, y(v), WIDTH - 90, y(v))
        canvas.text(54.0, y(v) + 4, f"{v:g}", "end")
    for v in x.ticks(8):
        canvas.text(x(v), top + HEIGHT - 22, f"{v:g}", "middle")
    canvas.text(
        60.0, top + 18, f"{board.source.model}: KL from the file, nats a token, by bits read a weight", style="title"
    )
    canvas.text(60.0, top + 34, "red: files, their front a line; blue: MOYU's own methods; grey: other methods")
    canvas.path([(x(board.bits(r.step_bytes) or 0.0), y(r.kl)) for r in front(board.files) if r.kl >= LEAST], "front")
    for bits, kl, row in files:
        canvas.dot(x(bits), y(kl), "rounding", 3.5, f"{row}: KL {number(kl)} at {bits:.2f} bits")
    named: set[str] = set()
    for bits, kl, name, family in cells:
        canvas.diamond(
            x(bits), y(kl), "own" if family == "own" else "other", 3.5, f"{name}: KL {number(kl)} at {bits:.2f} bits"
        )
        if name not in named:
            named.add(name)
            canvas.label(x(bits), y(kl), name, 7.0)
    for bits, kl, row in files:
        canvas.label(x(bits), y(kl), row, 7.0)
