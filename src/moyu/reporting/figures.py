"""The figures of the report. Each is None without records."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from moyu.records import Profile, Quality, Speed
from moyu.reporting.charts import CHARACTER, Canvas, Linear, Log
from moyu.reporting.columns import fixed, gain, label, number, percent, times
from moyu.reporting.summary import KL_CLOSE

WIDTH = 440.0
LEFT, RIGHT, TOP, BOTTOM = 50.0, 14.0, 26.0, 42.0
COLOURS = 8

Colours = Mapping[str, int]  # method -> class c0 .. c7


@dataclass(frozen=True)
class Figure:
    """An image with title and caption."""

    title: str
    caption: str
    svg: Markup


def colours(methods: Sequence[str]) -> dict[str, int]:
    """A colour for each method, in order of appearance."""
    return {m: i % COLOURS for i, m in enumerate(dict.fromkeys(methods))}


def quality(rows: Sequence[Quality], palette: Colours) -> Figure | None:
    """KL against byte fraction, one point per record; matched random and oracle are hollow."""
    rows = [r for r in rows if r.kl is not None and (r.byte_fraction or r.ideal_byte_fraction)]
    levels = [v for r in rows for v in (r.kl, r.kl_random, r.kl_oracle) if v]
    if not levels:
        return None
    lowest, highest = max(min(levels), 1e-5), max(*levels, 2e-5, KL_CLOSE)
    bytes_read = [_bytes(r) for r in rows]
    left = min(math.floor(min(bytes_read) * 20) / 20 - 0.02, 0.9)
    spoken = [(label(r), f"{number(r.kl)} at {fixed(_bytes(r))}") for r in rows]
    canvas = Canvas(WIDTH, 330.0, said("KL per token against byte fraction", spoken))
    x = Linear(left, max(1.0, *bytes_read) + 0.005, LEFT, WIDTH - RIGHT)
    y = Log(10 ** math.floor(math.log10(lowest)), 10 ** math.ceil(math.log10(highest)), 330.0 - BOTTOM, TOP)
    axes(
        canvas,
        x,
        [(v, f"{v:.2f}") for v in x.ticks(6)],
        "fraction of the dense model's bytes read",
        y,
        [(v, f"{v:g}") for v in y.ticks()],
        "KL, nats per token",
    )
    canvas.line(LEFT, y(KL_CLOSE), WIDTH - RIGHT, y(KL_CLOSE), "reference")
    _sweeps(canvas, rows, x, y, palette)
    for r in rows:
        colour, at = f"c{palette[r.method]}", x(_bytes(r))
        reach = [y(v) for v in (r.kl, r.kl_random, r.kl_oracle) if v is not None]
        canvas.line(at, min(reach), at, max(reach), f"stem {colour}")
        if r.kl_random is not None:
            canvas.dot(
                at, y(r.kl_random), f"hollow {colour}", hint=f"matched random of {label(r)}: {number(r.kl_random)}"
            )
        if r.kl_oracle is not None:
            canvas.diamond(
                at, y(r.kl_oracle), f"hollow {colour}", hint=f"matched oracle of {label(r)}: {number(r.kl_oracle)}"
            )
    for r in rows:
        canvas.dot(
            x(_bytes(r)),
            y(r.kl or 0.0),
            f"solid c{palette[r.method]}",
            5.5,
            f"{label(r)}: KL {number(r.kl)} at {fixed(_bytes(r))}",
        )
    first = {label(r): r for r in sorted(rows, key=_bytes, reverse=True)}  # a sweep gets one label, at its left end
    for r in first.values():
        canvas.label(x(_bytes(r)), y(r.kl or 0.0), label(r))
    return Figure(
        "Quality against bytes read",
        f"● method, ○ its matched random, ◇ its matched oracle. Lower and further left is better. Dashed: {KL_CLOSE}.",
        canvas.svg(),
    )


def _bytes(r: Quality) -> float:
    return r.byte_fraction or r.ideal_byte_fraction or 1.0


def _sweeps(canvas: Canvas, rows: Sequence[Quality], x: Linear, y: Log, palette: Colours) -> None:
    """A line through the rows of a method with several targets."""
    for name in dict.fromkeys(label(r) for r in rows):
        same = sorted((r for r in rows if label(r) == name), key=_bytes)
        if len(same) > 1:
            canvas.path([(x(_bytes(r)), y(r.kl or 0.0)) for r in same], f"sweep c{palette[same[0].method]}")


def layers(rows: Sequence[Quality]) -> Figure | None:
    """Realised sparsity, method by layer."""
    rows = [r for r in rows if r.sparsity_by_layer]
    if not rows:
        return None
    shares = [r.sparsity_by_layer for r in rows]
    count = max(len(s) for s in shares)
    names = [label(r) + (f" {percent(r.target_sparsity)}" if _repeated(rows, r) else "") for r in rows]
    left = min(150.0, max(len(n) for n in names) * CHARACTER + 14)
    wide, tall = (WIDTH - left - 4) / count, 30.0
    ranges = [(n, f"{percent(min(s))} to {percent(max(s))}") for n, s in zip(names, shares, strict=True)]
    canvas = Canvas(WIDTH, TOP + tall * len(rows) + 24, said("Realised sparsity by layer", ranges))
    canvas.text(left, TOP - 10, "layer", style="axis")
    every = math.ceil(count * 18 / (WIDTH - left))
    for i, (name, by_layer) in enumerate(zip(names, shares, strict=True)):
        top = TOP + i * tall
        canvas.text(left - 8, top + tall / 2 + 4, name, "end")
        for j, share in enumerate(by_layer):
            hint = f"{name}, layer {j}: {percent(share)}"
            canvas.rect(left + j * wide, top + 1, wide - 2, tall - 3, "cell", 0.06 + 0.5 * share, hint)
            if wide >= 26:
                canvas.text(left + j * wide + wide / 2 - 1, top + tall / 2 + 4, f"{share * 100:.0f}", "middle")
    for j in range(0, count, every):
        canvas.text(left + j * wide + wide / 2, TOP + tall * len(rows) + 14, str(j), "middle", "axis")
    return Figure(
        "Realised sparsity by layer",
        "Percent of a layer's units skipped, mean over scored tokens. A stronger colour is more.",
        canvas.svg(),
    )


def _repeated(rows: Sequence[Quality], r: Quality) -> bool:
    return sum(label(o) == label(r) for o in rows) > 1


def needed_by_layer(profile: Profile) -> Figure | None:
    """Neurons that a token needs, by layer."""
    if not profile.layers:
        return None
    first, last = profile.layers[0].layer, profile.layers[-1].layer
    spoken = [(f"layer {p.layer}", percent(p.needed_mean)) for p in profile.layers]
    canvas = Canvas(WIDTH, 250.0, said("Fraction of neurons needed for CETT 0.2 by layer", spoken))
    x, y = Linear(first - 0.3, last + 0.3, LEFT, WIDTH - RIGHT), Linear(0.0, 1.0, 250.0 - BOTTOM, TOP)
    steps = sorted({round(v) for v in x.ticks(9)} & {p.layer for p in profile.layers})
    axes(canvas, x, [(float(v), str(v)) for v in steps], "layer", y, [(v, f"{v:.0%}") for v in y.ticks(5)], "neurons")
    mean = [(x(p.layer), y(p.needed_mean)) for p in profile.layers]
    tail = [(x(p.layer), y(p.needed_p95)) for p in profile.layers]
    canvas.path(tail, "thin c0")
    canvas.path(mean, "curve c0")
    for (a, b), p in zip(mean, profile.layers, strict=True):
        canvas.dot(a, b, "solid c0", 3.5, f"layer {p.layer}: {percent(p.needed_mean)}")
    caption = "Bold: mean over tokens; thin: 95th percentile."
    if max(p.exact_zero_share for p in profile.layers) > 0.001:
        canvas.path([(x(p.layer), y(1 - p.exact_zero_share)) for p in profile.layers], "reference c1")
        caption += " Dashed: neurons that are not exactly zero."
    return Figure("Neurons needed for CETT 0.2, by layer", caption, canvas.svg())


def needed_by_position(profile: Profile) -> Figure | None:
    """Neurons that a token needs, by position in the window."""
    curve = profile.token_curve
    if len(curve) < 2:
        return None
    spoken = [(f"from {p.position_bucket}", percent(p.needed_mean)) for p in curve]
    canvas = Canvas(WIDTH, 250.0, said("Fraction of neurons needed for CETT 0.2 by token position", spoken))
    x = Linear(0.0, float(curve[-1].position_bucket), LEFT + 6, WIDTH - RIGHT - 8)
    y = Linear(0.0, 1.0, 250.0 - BOTTOM, TOP)
    axes(
        canvas,
        x,
        [(v, f"{v:g}") for v in x.ticks(6)],
        "position in the window (start of its range)",
        y,
        [(v, f"{v:.0%}") for v in y.ticks(5)],
        "neurons",
    )
    points = [(x(p.position_bucket), y(p.needed_mean)) for p in curve]
    canvas.path(points, "curve c0")
    for (a, b), p in zip(points, curve, strict=True):
        canvas.dot(a, b, "solid c0", 3.5, f"from position {p.position_bucket}: {percent(p.needed_mean)}")
    return Figure("Neurons needed for CETT 0.2, by position", "Mean over layers and tokens.", canvas.svg())


def read_rate(rows: Sequence[Speed]) -> Figure:
    """Weight bytes read per second, beside the read ceiling."""
    ceiling = max(r.read_ceiling_gb_s for r in rows)
    dense = next((r.gb_s_dense for r in rows if r.gb_s_dense is not None), None)
    bars = [(label(r), "bar", r.gb_s, number(r.gb_s), r.read_ceiling_gb_s)
            for r in rows if r.method != "dense" or r.tok_s_kernels is not None]  # fmt: skip
    if dense is not None:
        bars = [("dense", "bar dense", dense, number(dense), ceiling), *bars]
    svg = _bars(bars, "GB of weights per second", "Weight reading in GB/s beside the read ceiling")
    return Figure(
        "Weight reading against the read ceiling", "Bar: GB/s reached. Mark: the best streaming read measured.", svg
    )


def speedup(rows: Sequence[Speed]) -> Figure | None:
    """Speed-up beside its limit by bytes."""
    if all(r.method == "dense" for r in rows):
        return None
    bars = [
        (label(r), "bar dense" if r.method == "dense" else "bar", r.speedup, times(r.speedup),
         r.speedup_limit * r.speedup / gain(r))
        for r in rows if r.method != "dense" or r.tok_s_kernels is not None
    ]  # fmt: skip
    svg = _bars(bars, "times the dense speed", "Speed-up beside its limit by bytes", one=True)
    return Figure(
        "Speed-up against its limit by bytes",
        "Bar: measured. Mark: limit by bytes. Dashed: as fast as dense.",
        svg,
    )


def _bars(
    bars: Sequence[tuple[str, str, float, str, float]], unit: str, description: str, *, one: bool = False
) -> Markup:
    """Horizontal bars. Each has a name, colour, value, the value as text, and a mark to compare with."""
    left = min(150.0, max(len(b[0]) for b in bars) * CHARACTER + 14)
    tall, top = 30.0, 8.0
    bottom = top + tall * len(bars)
    spoken = [(name, f"{text} of {number(mark)}") for name, _, _, text, mark in bars]
    canvas = Canvas(WIDTH, bottom + 40, said(description, spoken))
    x = Linear(0.0, max([1.0, *(max(b[2], b[4]) for b in bars)]) * 1.02, left, WIDTH - RIGHT)
    for v in x.ticks(6):
        canvas.line(x(v), top, x(v), bottom)
        canvas.text(x(v), bottom + 15, f"{v:g}", "middle", "axis")
    canvas.text((left + WIDTH - RIGHT) / 2, bottom + 33, unit, "middle", "axis")
    for i, (name, colour, value, text, mark) in enumerate(bars):
        y = top + i * tall
        canvas.text(left - 8, y + tall / 2 + 4, name, "end")
        canvas.rect(left, y + 6, x(value) - left, tall - 12, colour, hint=f"{name}: {text}")
        if one:
            canvas.line(x(1.0), y, x(1.0), y + tall, "reference")
        canvas.line(x(mark), y + 3, x(mark), y + tall - 3, "mark")
        if x(value) - left > len(text) * CHARACTER + 12:
            canvas.text(x(value) - 6, y + tall / 2 + 4, text, "end", "inside")
        else:
            clear = x(mark) if 0 <= x(mark) - x(value) < len(text) * CHARACTER + 12 else x(value)  # clear of the mark
            canvas.text(clear + 6, y + tall / 2 + 4, text)
    return canvas.svg()


def said(what: str, values: Sequence[tuple[str, str]]) -> str:
    """The description of a figure for screen readers."""
    return f"{what}: {'; '.join(f'{name} {value}' for name, value in values)}"


def axes(
    canvas: Canvas,
    x: Linear | Log,
    x_ticks: Sequence[tuple[float, str]],
    x_title: str,
    y: Linear | Log,
    y_ticks: Sequence[tuple[float, str]],
    y_title: str,
) -> None:
    """Grid, tick labels and titles."""
    for value, text in y_ticks:
        canvas.line(LEFT, y(value), WIDTH - RIGHT, y(value))
        canvas.text(LEFT - 7, y(value) + 4, text, "end", "axis")
    for value, text in x_ticks:
        canvas.line(x(value), y.start, x(value), y.start + 4)
        canvas.text(x(value), y.start + 17, text, "middle", "axis")
    canvas.text((LEFT + WIDTH - RIGHT) / 2, y.start + 36, x_title, "middle", "axis")
    canvas.text(4.0, TOP - 12, y_title, "start", "axis")
