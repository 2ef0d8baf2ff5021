"""What `levels` gives on a real model, beside the files that one would use in its place: the README's table and picture."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from markupsafe import Markup

from moyu.records import Comparison, Record
from moyu.reporting.charts import Canvas, Linear
from moyu.reporting.columns import number

ROOM = 0.95  # files down to this share of the smallest plan's bytes are shown
WIDTH, ROW, TOP, NAMES, VALUES = 720.0, 24.0, 54.0, 260.0, 70.0
STYLE = Markup(
    "<style>.beside text{font:13px sans-serif;fill:#1f2328}.beside .title{font-weight:bold}.beside .small{fill:#59636e}"
    ".beside .file{fill:#a8b1bb}.beside .plan{fill:#0969da}.beside .bold{font-weight:bold}</style>"
)


def front(rows: Sequence[Comparison]) -> list[Comparison]:
    """The files that no other file beats in both bytes and KL, fewest bytes first."""
    found: list[Comparison] = []
    for r in sorted((r for r in rows if r.what == "file"), key=lambda r: (r.step_bytes, r.kl)):
        if not found or r.kl < found[-1].kl:
            found.append(r)
    return found


def of_files(rows: Sequence[Comparison], size: float) -> float | None:
    """KL of files of so many bytes; None where no file is so small.

    Between two neighbours of the front its logarithm is taken as linear; without a lossy one above, it is that of the best file below.
    """
    best = front(rows)
    below = [r for r in best if r.step_bytes <= size]
    above = next((r for r in best if r.step_bytes > size and r.kl > 0), None)
    if not below or above is None or not below[-1].kl:
        return below[-1].kl if below else None
    a, b = below[-1], above
    share = (size - a.step_bytes) / (b.step_bytes - a.step_bytes)
    return math.exp((1 - share) * math.log(a.kl) + share * math.log(b.kl))


def shown(rows: Sequence[Record]) -> list[Comparison]:
    """The source file, its plans of `levels`, and the best files from its size down to theirs; most bytes first.

    Raises ValueError where no source has such a plan.
    """
    compared = [r for r in rows if isinstance(r, Comparison)]
    for source in (r for r in compared if r.what == "source"):
        own = [r for r in compared if r.source_sha256 == source.source_sha256 and r.corpus == source.corpus]
        plans = [r for r in own if r.what == "plan" and r.choice == "own" and re.fullmatch(r"levels \.\d\d", r.row)]
        if plans:
            least = ROOM * min(r.step_bytes for r in plans)
            files = [r for r in front(own) if least <= r.step_bytes < source.step_bytes]
            return sorted([source, *plans, *files], key=lambda r: (-r.step_bytes, r.kl))
    raise ValueError("the records have no plan of `levels` beside a source file")


def markdown(rows: Sequence[Record]) -> str:
    """The table."""
    found = shown(rows)
    size = found[0].step_bytes
    lines = ["| | MB a token | of the file | KL | perplexity | same next token |", "|---|---|---|---|---|---|"]
    for r in found:
        name = f"**`{r.row}`**" if r.what == "plan" else "the file itself" if r.what == "source" else r.row
        cells = [name, f"{r.step_bytes / 1e6:.1f}", f"{r.step_bytes / size:.0%}"]
        cells += ["0" if r.what == "source" else number(r.kl, 2), f"{r.ppl:.1f}", f"{r.top1_agreement:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def picture(rows: Sequence[Record]) -> str:
    """The same as bars of KL, as an SVG file."""
    source, *others = shown(rows)
    height = TOP + ROW * len(others) + 12
    canvas = Canvas(WIDTH, height, "KL from the source file of levels and of smaller files, by bytes read for a token")
    x = Linear(0.0, max(r.kl for r in others), NAMES, WIDTH - VALUES)
    canvas.text(12.0, 20.0, f"How far from {source.model}? Shorter is better", style="title")
    canvas.text(NAMES - 12, 40.0, "MB read a token", "end", style="small")
    canvas.text(NAMES, 40.0, f"KL from the file itself ({source.step_bytes / 1e6:.1f} MB), nats a token", style="small")
    for index, r in enumerate(others):
        base, own = TOP + ROW * index + 15, r.what == "plan"
        canvas.text(12.0, base, f"{'MOYU ' if own else ''}{r.row}", style="bold" if own else "")
        canvas.text(NAMES - 12, base, f"{r.step_bytes / 1e6:.1f}", "end", style="bold" if own else "")
        canvas.rect(NAMES, base - 12, x(r.kl) - NAMES, 16.0, "plan" if own else "file")
        canvas.text(x(r.kl) + 8, base, number(r.kl, 2), style="bold" if own else "")
    svg = str(canvas.svg())
    start = svg.index(">") + 1
    size = f'width="{WIDTH:.0f}" height="{height:.0f}" '
    head = svg[:start].replace(
        "<svg ", f'<svg class="beside" xmlns="http://www.w3.org/2000/svg" {size}style="background:#fff" '
    )
    return head + str(STYLE) + svg[start:]
