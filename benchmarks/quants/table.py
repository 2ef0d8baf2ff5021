"""The table and the figure of the records: `python -m benchmarks.quants.table RECORDS.jsonl [FIGURE.svg]`."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

from moyu import records
from moyu.records import Comparison
from moyu.reporting.beside_files import front, of_files
from moyu.reporting.charts import Canvas, Linear, Log
from moyu.reporting.columns import NONE, number
from moyu.reporting.scoreboard import standalone

WIDTH, HEIGHT = 860.0, 480.0
LEAST = 1e-5  # nats, below which a row is the source for all that can be seen
MARKS = "dots: files, blue with an importance matrix; diamonds: plans, red; grey: their random and oracle choices; line: best files"
HEAD = (
    "row",
    "importance",
    "MB a step",
    "of the source",
    "bits a weight",
    "KL",
    "95 %",
    "perplexity",
    "top-1",
    "files",
)


def groups(rows: Sequence[records.Record]) -> list[list[Comparison]]:
    """Rows of one source on one text, most bytes first."""
    found: dict[tuple[str, str], list[Comparison]] = {}
    for r in rows:
        if isinstance(r, Comparison):
            found.setdefault((r.source_sha256, str(r.corpus)), []).append(r)
    return [sorted(own, key=lambda r: (-r.step_bytes, r.kl)) for own in found.values()]


def markdown(rows: Sequence[records.Record]) -> str:
    """One table a source and text."""
    return "\n".join(_table(own) for own in groups(rows))


def _table(rows: Sequence[Comparison]) -> str:
    one = rows[0]
    protocol, corpus = one.protocol, one.corpus or {}
    source = next((r.step_bytes for r in rows if r.what == "source"), None)
    assert protocol is not None
    text = (
        f"**{one.model}** (SHA-256 {one.source_sha256[:16]}), {corpus.get('file')}: {one.documents} documents, {protocol.window} tokens of "
        f"each, those from {protocol.prompt} on scored."
    )
    best = front(rows)
    lines = [text, "", "| " + " | ".join(HEAD) + " |", "|---" * len(HEAD) + "|"]
    for r in rows:
        files = "front" if r in best else NONE
        if r.what == "plan" and (there := of_files(rows, r.step_bytes)) is not None:
            files = f"{number(there)}, {there / r.kl:.2g} ×" if r.kl else number(there)
        cells = [
            r.row if r.choice == "own" else f"{r.row}, matched {r.choice}",
            "yes" if r.importance else NONE,
            f"{r.step_bytes / 1e6:.1f}",
            NONE if source is None else f"{r.step_bytes / source:.3f}",
            "–" if r.bits_per_weight is None else f"{r.bits_per_weight:.2f}",
            number(r.kl),
            f"{number(r.kl_interval[0])} to {number(r.kl_interval[1])}",
            f"{r.ppl:.2f}",
            f"{r.top1_agreement:.1%}",
            files,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def figure(rows: Sequence[records.Record]) -> str:
    """KL over bytes a step, a panel a source and text."""
    found = groups(rows)
    canvas = Canvas(WIDTH, HEIGHT * max(1, len(found)), "KL over bytes a step, one panel a source file and text")
    for index, own in enumerate(found):
        _panel(canvas, own, HEIGHT * index)
    return str(standalone(canvas))


def _panel(canvas: Canvas, rows: Sequence[Comparison], top: float) -> None:
    shown = [r for r in rows if r.kl >= LEAST]
    levels = [r.kl for r in shown] or [LEAST]
    low, high = 10 ** math.floor(math.log10(min(levels))), 10 ** math.ceil(math.log10(max(levels)))
    sizes = [r.step_bytes / 1e6 for r in shown] or [1.0]
    x = Linear(min(sizes) * 0.97, max(sizes) * 1.03, 60.0, WIDTH - 90)
    y = Log(low, max(high, low * 10), top + HEIGHT - 40, top + 50)
    for v in y.ticks():
        canvas.line(60.0, y(v), WIDTH - 90, y(v))
        canvas.text(54.0, y(v) + 4, f"{v:g}", "end")
    for v in x.ticks(8):
        canvas.text(x(v), top + HEIGHT - 22, f"{v:g}", "middle")
    one = rows[0]
    about = f"{one.model}, {(one.corpus or {}).get('file')}: KL from the source file, nats a token, over MB a step"
    canvas.text(60.0, top + 18, about, style="title")
    canvas.text(60.0, top + 34, MARKS)
    canvas.path([(x(r.step_bytes / 1e6), y(r.kl)) for r in front(rows) if r.kl >= LEAST], "front")
    named: dict[str, tuple[float, float]] = {}
    for r in sorted(shown, key=lambda r: (r.what, r.choice == "own", r.kl)):
        at = x(r.step_bytes / 1e6), y(r.kl)
        name = r.row if r.choice == "own" else f"{r.row}, {r.choice}"
        hint = f"{name}{', importance' if r.importance else ''}: KL {number(r.kl)} at {r.step_bytes / 1e6:.1f} MB"
        style = "rounding" if r.what == "plan" and r.choice == "own" else "own" if r.importance else "other"
        (canvas.diamond if r.what == "plan" else canvas.dot)(*at, style, 3.5, hint)
        if r.choice == "own":
            named.setdefault(name, at)
    for name, at in named.items():
        canvas.label(*at, name, 7.0)


def main() -> None:
    """Print the table; draw."""
    rows = records.read(Path(sys.argv[1]))
    print(markdown(rows))
    if len(sys.argv) > 2:
        Path(sys.argv[2]).write_text(figure(rows) + "\n")


if __name__ == "__main__":
    main()
