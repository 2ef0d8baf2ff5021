"""Draw the rows of run.py: decode steps over the compiled dense one's, and the network's time beside what the copy rate allows.

.venv/bin/python benchmarks/gpu/plot.py RESULTS.jsonl OUT.svg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt


def main() -> None:
    """A panel a shape of steps, then one of the network."""
    rows = [json.loads(line) for line in Path(sys.argv[1]).read_text().splitlines()]
    steps = [r for r in rows if r["part"] == "steps" and r["batch"] == 1 and r["variant"] != "eager"]
    shapes = list(dict.fromkeys(r["shape"] for r in steps))
    plt.rcParams.update({"svg.hashsalt": "moyu", "font.size": 9})
    figure, panels = plt.subplots(1, len(shapes) + 1, figsize=(4.3 * (len(shapes) + 1), 3.3), layout="constrained")
    for panel, shape in zip(panels, shapes, strict=False):
        own = [r for r in steps if r["shape"] == shape]
        for place, r in enumerate(own):
            colour = "#9aa0a6" if r["variant"] == "dense" else "#1f6feb"
            panel.barh(place, r["against_dense"], color=colour, height=0.7)
            panel.text(r["against_dense"] + 0.03, place, f"{r['against_dense']:.2f}× · {r['tok_s']:.0f}/s", va="center")
        names = {"dense": "transformers, compiled", "joined": "MOYU, nothing skipped"}
        panel.set_yticks(range(len(own)), [names.get(r["variant"], f"MOYU {r['variant']} skipped") for r in own])
        panel.invert_yaxis()
        panel.set_xlim(0, 2.3)
        panel.axvline(1, color="#9aa0a6", linestyle=":", linewidth=1)
        panel.set_xlabel("decode steps a second over compiled dense")
        panel.set_title(f"{shape}, batch 1, bf16")
    network(panels[-1], rows)
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(sys.argv[2], metadata={"Date": None})


def network(panel: plt.Axes, rows: list[dict]) -> None:
    """Time of one feed-forward network of the 8B widths, a mask a row, by kept fraction and weights."""
    own = [r for r in rows if r.get("shape") == "llama-3-8b" and r.get("op") == "neurons" and r["batch"] == 1]
    lines = {
        "16 bits": [r for r in own if r["part"] == "kernels" and r["variant"].startswith("kept")],
        "8 bits": [r for r in own if r["variant"].startswith("8 bits")],
        "4 bits": [r for r in own if r["variant"].startswith("4 bits")],
    }
    copy = next(r["copy_gb_s"] for r in rows if r["part"] == "ceiling")
    for (name, found), colour in zip(lines.items(), ("#1f6feb", "#b8860b", "#2e8b57"), strict=True):
        kept = [float(r["variant"].rsplit(" ", 1)[1]) for r in found]
        panel.plot(kept, [r["us_a_layer"] for r in found], marker="o", color=colour, label=name)
        panel.plot(kept, [r["gb_s"] * r["us_a_layer"] / copy for r in found], color=colour, linestyle=":", linewidth=1)
    panel.axhline(
        next(r["us_a_layer"] for r in own if r["variant"] == "dense"), color="#9aa0a6", label="dense by torch, 16 bits"
    )
    panel.set_ylim(0, 220)
    panel.set_xlabel("kept neurons (dotted: copy rate)")
    panel.set_ylabel("µs a layer")
    panel.set_title("one network of llama-3-8b, one row")
    panel.legend(frameon=False, loc="upper left")


if __name__ == "__main__":
    main()
