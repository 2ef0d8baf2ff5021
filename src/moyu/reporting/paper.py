"""The report's section on the paper: verdicts, the paper's two figures redrawn, and how sparsity emerges in training."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from moyu.records import Study
from moyu.reporting.charts import Canvas, Linear, Log
from moyu.reporting.figures import BOTTOM, COLOURS, LEFT, RIGHT, TOP, WIDTH, Figure, axes, said

TALL = 250.0
LEVELS = 10  # of a heat map
BOX = 64.0  # width of a part of the network in Figure 1
SELECTOR = {
    "TDA": 220.0,
    "RODA": 100.0,
    "RIDA": 160.0,
    "sRIDA": 40.0,
}  # behind the gate, before it, in it, at the input
FED = {"PAR": "parallel", "SEQ-KV": "one by one with a cache", "SEQ-ISO": "each alone"}


@dataclass(frozen=True)
class Paper:
    """The content of the section."""

    line: str
    verdicts: list[Study]
    figures: list[Figure]
    domains: Mapping[str, Any] | None  # names of domains and bits per byte, from the study of the texts


def section(rows: Sequence[Study]) -> Paper | None:
    """The section of these records; None without records."""
    if not rows:
        return None
    figures: list[Figure | None] = []
    for row in rows:
        match row.name:
            case "figure1":
                figures.append(taxonomy(row))
            case "figure2":
                figures += heat_maps(row)
            case "over_activation":
                figures.append(losses(row))
            case "root_cause":
                figures += emergence(row)
            case "decay":
                figures.append(fading(row))
    texts = next((r.details for r in rows if r.name == "texts" and "bits" in r.details), None)
    return Paper(headline(rows), list(rows), [f for f in figures if f is not None], texts)


def headline(rows: Sequence[Study]) -> str:
    """The claims that hold, fail and stay open, with counts and names."""
    parts = []
    for verdict, verb in (("HOLDS", "hold"), ("FAILS", "fail"), ("INCONCLUSIVE", "stay open")):
        found: dict[str, list[str]] = {}
        for row in rows:
            if row.verdict == verdict:
                found.setdefault(row.name, []).extend([row.model] if row.model else [])
        names = [name + (f" ({', '.join(models)})" if models else "") for name, models in found.items()]
        count = sum(row.verdict == verdict for row in rows)
        parts.append(f"{count} {verb}" + (f": {', '.join(names)}" if names else ""))
    return "; ".join(parts) + "."


def taxonomy(row: Study) -> Figure | None:
    """Figure 1, one panel per kind, as methods declared themselves when the study ran."""
    panels = row.details.get("panels", [])
    return kinds_drawing(panels) if panels else None


def kinds_drawing(panels: Sequence[Mapping[str, Any]]) -> Figure:
    """Figure 1 with these panels."""
    tall = 176.0
    canvas = Canvas(
        WIDTH, tall * len(panels), said("Kinds of dynamic activation", [(p["kind"], p["selector"]) for p in panels])
    )
    for index, panel in enumerate(panels):
        top = index * tall
        canvas.text(0.0, top + 16, f"{panel['kind']}: {panel['name']}")
        at = SELECTOR[panel["kind"]]
        boxes = ((8.0, "input"), (128.0, "gate, up"), (248.0, "down"), (368.0, "output"))
        for x, text in boxes:
            canvas.rect(x, top + 56, BOX, 26.0, "cell", 0.15)
            canvas.text(x + 32, top + 73, text, "middle")
        for x in (72.0, 192.0, 312.0):
            canvas.line(x, top + 69, x + 56, top + 69, "reference")
        canvas.line(at, top + 34, at, top + (56 if any(x <= at <= x + BOX for x, _ in boxes) else 67), "mark")
        canvas.diamond(at, top + 34, "solid c1", 7.0, panel["selector"])
        canvas.text(at + 14, top + 38, panel["selector"], style="axis")
        facts = [
            f"trained: {panel['trained']}",
            f"decides once a {', '.join(panel['granularity']) or '-'}; skips {', '.join(panel['skips']) or '-'}",
            *textwrap.wrap(f"members: {', '.join(panel['members']) or 'none in the registry'}", 62),
        ]
        for line, text in enumerate(facts):
            canvas.text(8.0, top + 100 + 15 * line, text, style="axis")
    return Figure(
        "Figure 1: the kinds of dynamic activation", "◆ where the selector sits. Drawn from the registry.", canvas.svg()
    )


def heat_maps(row: Study) -> list[Figure | None]:
    """Figure 2: tokens x neurons, one image per sampling and feeding, with its flocking."""
    maps, measures = row.details.get("heat maps", {}), row.details.get("measures", {})
    layer = row.details.get("layer of the heat maps")
    out: list[Figure | None] = []
    for sampling in (s for s in ("sentence", "uniform") if s in maps):
        for arm, lines in maps[sampling].items():
            flock = measures[sampling][arm]["flocking"]
            name = f"{'A sentence' if sampling == 'sentence' else 'Random tokens'}, {FED.get(arm, arm)}"
            out.append(
                Figure(
                    f"Figure 2, {row.model}: {name}",
                    f"Layer {layer}; tokens downwards, neurons across, each row over its largest. Flocking {flock:.3f} (mean over "
                    "layers and texts).",
                    heat(lines, f"{name}: flocking {flock:.3f}"),
                )
            )
    return out


def heat(lines: Sequence[str], description: str) -> Markup:
    """A heat map from digits 0 to 9. Neighbouring cells of one level are drawn as one shape."""
    tall = 4.0
    canvas = Canvas(WIDTH, tall * len(lines), description)
    wide = WIDTH / max(len(line) for line in lines)
    pieces: dict[int, list[str]] = {}
    for y, line in enumerate(lines):
        x = 0
        while x < len(line):
            end = x
            while end < len(line) and line[end] == line[x]:
                end += 1
            if line[x] != "0":
                left, right = x * wide, end * wide
                piece = f"M{left:.1f} {y * tall:.0f}H{right:.1f}v{tall:.0f}H{left:.1f}z"
                pieces.setdefault(int(line[x]), []).append(piece)
            x = end
    for level, path in sorted(pieces.items()):
        canvas.parts.append(
            Markup('<path class="cell" fill-opacity="{}" d="{}"/>').format(f"{level / (LEVELS - 1):.2f}", "".join(path))
        )
    return canvas.svg()


def losses(row: Study) -> Figure | None:
    """Loss over dense against the fraction of neurons kept."""
    curves, kept = row.details.get("loss over dense", {}), row.details.get("kept", [])
    series = {name: [(k, v) for k, v in zip(kept, values, strict=True)] for name, values in curves.items()}
    return _curves(
        f"Loss against neurons kept, {row.model}",
        "Loss over dense's if every layer keeps this fraction: each token's best neurons (dynamic), the most used (static), random ones.",
        series,
        "fraction of neurons kept",
        "loss over dense",
        named_at=len(kept) // 4,  # the curves meet at the end
    )


def fading(row: Study) -> Figure | None:
    """Overlap of a prompt's set with the sets of later tokens."""
    series = {
        who: list(enumerate(row.details[f"kappa_J {who} by distance"]))
        for who in ("own", "other")
        if f"kappa_J {who} by distance" in row.details
    }
    return _curves(
        f"A prompt's set and later tokens, {row.model}",
        "Chance-corrected overlap with each later token's set, for the text's own prompt and for another prompt.",
        series,
        "tokens behind the prompt",
        "kappa_J",
    )


def emergence(row: Study) -> list[Figure | None]:
    """Sparsity in training, one curve per activation function."""
    steps, names = row.details.get("steps", []), row.details.get("series", [])
    arm = f", {row.details.get('main arm')}"
    curves = {k.removesuffix(arm): v for k, v in row.details.get("curves", {}).items() if k.endswith(arm)}
    what = {
        "exact zeros": ("Exact zeros in training", "Share of neuron values that are exactly 0, mean over layers and seeds."),
        "near zero": ("Neurons not needed, in training", "Share of neurons that a token can drop at CETT 0.2, mean over layers and seeds."),
        "force": ("The force in training", "G summed over a layer's neurons: nats per token saved by removing them, to first order."),
    }  # fmt: skip
    out = []
    for series, (title, caption) in what.items():
        if series in names:
            at = names.index(series)
            points = {n: [(s + 1, v) for s, v in zip(steps, c[at], strict=True)] for n, c in curves.items()}
            out.append(_curves(title, caption, points, "step + 1", series, log=True))
    return out


def _curves(
    title: str,
    caption: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    x_title: str,
    y_title: str,
    *,
    log: bool = False,
    named_at: int = -1,
) -> Figure | None:
    """One curve per name. named_at: the point at which a curve is labelled."""
    points = [p for line in series.values() for p in line]
    if not points:
        return None
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    canvas = Canvas(WIDTH, TALL, said(title, [(n, f"{p[0][1]:.3g} to {p[-1][1]:.3g}") for n, p in series.items()]))
    right = WIDTH - RIGHT - 60
    x = Log(min(xs), max(xs), LEFT, right) if log else Linear(min(xs), max(xs), LEFT, right)
    low, high = min(0.0, *ys), max(ys)
    y = Linear(low, high + 0.05 * (high - low), TALL - BOTTOM, TOP)
    across = [(v, f"{v:g}") for v in x.ticks()]
    axes(canvas, x, across, x_title, y, [(v, f"{v:.3g}") for v in y.ticks(5)], y_title)
    colours = {name: i % COLOURS for i, name in enumerate(series)}
    for name, line in series.items():
        canvas.path([(x(a), y(b)) for a, b in line], f"curve c{colours[name]}")
    for name, line in sorted(series.items(), key=lambda item: item[1][named_at][1]):
        place, value = line[named_at]
        canvas.dot(x(place), y(value), f"solid c{colours[name]}", 3.0, f"{name}: {value:.3g}")
        canvas.label(x(place), y(value), name)
    return Figure(title, caption, canvas.svg())
