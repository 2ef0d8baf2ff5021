"""Draw the records of run.py: speed over llama.cpp's for each shape and type of weights, beside what the bytes allow.

.venv/bin/python benchmarks/cpu/plot.py RECORDS.jsonl OUT.svg
"""

from __future__ import annotations

import sys
from itertools import groupby
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from moyu import records
from moyu.model import loading

PANELS = 3  # side by side
TYPES = {"bfloat16": "bf16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
COLOURS = {"transformers": "#9aa0a6", "llama.cpp": "#b8860b", "moyu": "#1f6feb"}


def main() -> None:
    """A panel a shape and type of weights."""
    rows = [r for r in records.read(Path(sys.argv[1])) if isinstance(r, records.Speed)]
    shapes = [list(group) for _, group in groupby(rows, lambda r: (r.context, r.dtype))]
    plt.rcParams.update({"svg.hashsalt": "moyu", "font.size": 9})
    lines = -(-len(shapes) // PANELS)
    figure, panels = plt.subplots(
        lines,
        min(len(shapes), PANELS),
        figsize=(4.6 * min(len(shapes), PANELS), 3.6 * lines),
        squeeze=False,
        layout="constrained",
    )
    for panel in panels.flat[len(shapes) :]:
        panel.axis("off")
    for panel, shape in zip(panels.flat, shapes, strict=False):
        rival = next(r for r in shape if r.backend == "llama.cpp")
        native = next(r for r in shape if r.backend.startswith("moyu dense"))
        for place, r in enumerate(shape):
            ratio = end = r.tok_s / rival.tok_s
            panel.barh(place, ratio, color=COLOURS[r.backend.split()[0]], height=0.7)
            if r.backend.startswith("moyu") and r is not native:
                limit = r.speedup_limit * native.tok_s / rival.tok_s
                end = max(ratio, limit)
                panel.plot([limit, limit], [place - 0.4, place + 0.4], color="black", linewidth=1.4)
            panel.text(end + 0.04, place, f"{ratio:.2f}× · {r.tok_s:.1f}/s", va="center")
        panel.set_yticks(range(len(shape)), [r.backend.split(":")[0].replace("moyu", "MOYU") for r in shape])
        panel.invert_yaxis()
        panel.axvline(1, color="#b8860b", linestyle=":", linewidth=1)
        panel.set_xlim(0, 3)
        panel.set_xlabel("tokens a second over llama.cpp's")
        depth, kind = loading.SHAPES[shape[0].context]().num_hidden_layers, TYPES[rival.dtype]
        panel.set_title(
            f"{shape[0].context}, {shape[0].layers} of {depth} layers, {kind}\nread ceiling {rival.read_ceiling_gb_s:.0f} GB/s"
        )
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[2], metadata={"Date": None})


if __name__ == "__main__":
    main()
