"""The scoreboard as tables and a plot: quality at equal bytes and equal sparsity, speed, applicability, Pareto front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from markupsafe import Markup

from moyu import records
from moyu.records import Cell, Speed
from moyu.reporting import claims, file_boards
from moyu.reporting.charts import Canvas, Linear, Log
from moyu.reporting.columns import NONE, fixed, gain, number, percent, times
from moyu.reporting.tables import ScoreTable, kl_of, place

ROUNDING = "quantise"
OWN_ROUNDING = "(MOYU's own rounding)"  # of the row that is no method and no competitor
NOT_RUN = "not run"
GOOD, FAST = 0.98, 1.10  # perplexity kept and speed-up that count as applicable
WIDTH, HEIGHT = 860.0, 480.0
STYLE = Markup(
    "<style>.board text{font:11px sans-serif;fill:#444}.board .grid{stroke:#ddd}.board .leader{stroke:#bbb}"
    ".board .front{fill:none;stroke:#c33;stroke-width:1.5}.board .rounding{fill:#c33}.board .own{fill:#06c}"
    ".board .other{fill:#888}.board .title{font-weight:bold}</style>"
)


def tables(rows: Iterable[records.Record]) -> list[ScoreTable]:
    """All tables of the cells and timings among `rows`, those of quantised files first; none without cells."""
    rows = list(rows)
    of_files, cells = file_boards.tables(rows), _plain(rows)
    if not cells:
        return of_files
    found = []
    for model in dict.fromkeys(c.model for c in cells):
        own = [c for c in cells if c.model == model]
        found += [b for low in (False, True) if (b := _at_bytes(model, own, low))]
        found += [b] if (b := _at_sparsity(model, own)) else []
    return [*of_files, _trinity(cells, [r for r in rows if isinstance(r, Speed)]), *_claims(cells), *found]


def _plain(rows: Iterable[records.Record]) -> list[Cell]:
    """The cells of models in 16 bits."""
    return [r for r in rows if isinstance(r, Cell) and r.step_bytes is None and (r.corpus or {}).get("digest") is None]


def markdown(rows: Iterable[records.Record]) -> str:
    """The tables as Markdown."""
    return _text(tables(rows))


def _text(found: Sequence[ScoreTable]) -> str:
    parts = []
    for board in found:
        lines = ["| " + " | ".join(line) + " |" for line in [board.head, ["---"] * len(board.head), *board.lines]]
        parts.append("\n".join([f"**{board.title}.** {board.caption}", "", *lines]))
    return "\n\n".join(parts)


def front(cells: Sequence[Cell]) -> list[Cell]:
    """The Pareto front of one model: cells that no other beats in both bytes and KL, fewest bytes first."""
    best: list[Cell] = []
    for cell in sorted((c for c in cells if c.kl is not None), key=lambda c: (c.byte_fraction_16, c.kl)):
        if not best or (cell.kl or 0) < (best[-1].kl or 0):
            best.append(cell)
    return best


def _at_bytes(model: str, cells: list[Cell], low: bool) -> ScoreTable | None:
    """KL of every method at each byte fraction. low: on 4-bit weights, else on 16-bit weights."""
    own = [c for c in cells if (c.weight_bits < 16) == low and c.method != ROUNDING and c.target_sparsity is None]
    targets = sorted({c.target_byte_fraction for c in own if c.target_byte_fraction is not None}, reverse=True)
    if not targets:
        return None
    rounded = sorted((c for c in cells if c.method == ROUNDING), key=lambda c: -(c.byte_fraction_16 or 0))
    scale = 1.0
    if low:
        scale = next((c.byte_fraction_16 / c.byte_fraction for c in own if c.byte_fraction and c.byte_fraction_16), 1.0)
    lines = []
    if rounded:
        shown = []
        for target in targets:
            fits = [c for c in rounded if (c.byte_fraction_16 or 0) <= target * scale * 1.001]
            shown.append(f"{kl_of(fits[0])}, {fits[0].weight_bits:g} bits" if fits else "n/a")
        lines.append([OWN_ROUNDING, *shown, NONE])
    ranked = sorted(dict.fromkeys(c.method for c in own), key=lambda name: _rank(own, name, targets))
    for name in ranked:
        mine = [c for c in own if c.method == name]
        native = next((c for c in mine if c.target_byte_fraction is None and c.kl is not None), None)
        if native is not None:
            cells_ = [kl_of(native) + f" at {fixed(native.byte_fraction)}", *[NONE] * (len(targets) - 1)]
        else:
            by_target = {c.target_byte_fraction: c for c in mine}
            cells_ = [
                kl_of(by_target[t]) if t in by_target else NONE if _native_only(mine) else NOT_RUN for t in targets
            ]
        last = next((c for c in reversed(mine) if place(c) is not None), None)
        lines.append([name, *cells_, NONE if last is None else percent(place(last))])
    bits = next((c.weight_bits for c in own), 16)
    head = ["method", *(f"{fixed(t)} ({fixed(t * scale)} of 16 bits)" if low else fixed(t) for t in targets), "place"]
    dense = next((c.ppl_dense for c in own if c.ppl_dense), None)
    return ScoreTable(
        f"{model}, weights of {bits:g} bits, at equal bytes",
        "KL from the dense model in 16 bits, nats per token, with its 95 % interval over documents. Columns: the fraction of the dense "
        f"step's bytes that is read. Dense perplexity: {number(dense)}. MOYU's own rounding: of all weights, to the most bits that "
        "fit; it is no competitor, because llama.cpp's quantiser loses less. Place: between "
        "matched random (0 %) and matched oracle (100 %) on a log scale, at the fewest bytes reached.",
        head if not low else [h for h in head if h != "place"],
        lines if not low else [line[:-1] for line in lines],
    )


def _native_only(cells: list[Cell]) -> bool:
    """Whether a method was run only at its own sparsity, without a target."""
    return all(c.target_byte_fraction is None for c in cells)


def _claims(cells: list[Cell]) -> list[ScoreTable]:
    """The table of claims."""
    found = claims.lines(cells)
    if not found:
        return []
    return [
        ScoreTable(
            "What the cells show",
            "Numbers of cells in which the 95 % interval of a paired difference over documents lies on the claim's side of 0 "
            "(shown), on both sides (open) or on the other side (refuted). Order and routers are compared by log-perplexity, "
            "the rest by KL; order on 16-bit weights.",
            ["claim", "shown", "open", "refuted", "refuted by (difference in nats per token)"],
            found,
        )
    ]


def _missing(cells: list[Cell]) -> str:
    """Methods of the registry without a cell."""
    from moyu import methods  # imports torch, which takes seconds; only needed with cells

    left = [name for name in methods.names() if not any(c.method == name for c in cells)]
    return f" Not run: {', '.join(left)}." if left else ""


def _rank(cells: list[Cell], name: str, targets: list[float]) -> tuple[float, ...]:
    """Sort key: KL at the fewest bytes first. Methods that do not reach these bytes come last."""
    found = {c.target_byte_fraction: c.kl for c in cells if c.method == name and c.kl is not None}
    return tuple(found.get(t, math.inf) for t in reversed(targets))


def _at_sparsity(model: str, cells: list[Cell]) -> ScoreTable | None:
    own = [c for c in cells if c.target_sparsity is not None and c.weight_bits == 16 and c.kl is not None]
    if not own:
        return None
    lines = [
        [
            sites_of(c.method), c.method, percent(c.realized_sparsity), fixed(c.byte_fraction), kl_of(c),
            number(c.kl_random, 2), number(c.kl_oracle, 2),
        ]
        for c in sorted(own, key=lambda c: (sites_of(c.method), c.kl))
    ]  # fmt: skip
    return ScoreTable(
        f"{model}, at equal sparsity, by kind of site",
        f"Target: {percent(own[0].target_sparsity)} of the units skipped. KL as above.",
        ["sites", "method", "skipped", "bytes", "KL", "random", "oracle"],
        lines,
    )


def sites_of(name: str) -> str:
    """The sites of a method, from the registry: what it reads and what it skips."""
    from moyu.reporting.method_pages import skipped  # imports torch, which takes seconds; only needed with cells

    return skipped(name)


def _trinity(cells: list[Cell], speeds: Sequence[Speed]) -> ScoreTable:
    """Quality, speed and applicability, one line per method."""
    models = list(dict.fromkeys(c.model for c in cells))
    asked = [c for c in cells if c.weight_bits == 16 and c.target_sparsity is None and c.method != ROUNDING]
    top = max((c.target_byte_fraction or 0 for c in asked), default=0)
    fronts = {m: front([c for c in cells if c.model == m]) for m in models}
    lines = []
    for name in dict.fromkeys(c.method for c in asked):
        mine = [c for c in asked if c.method == name]
        reached = [c for c in mine if c.ppl and c.ppl_dense]
        kept = [(c.ppl_dense or 0) / (c.ppl or 1) for c in reached if (c.target_byte_fraction or top) == top]
        rate = next((gain(s) for s in speeds if s.method == name), None)
        good = [c for c in reached if (c.ppl_dense or 0) / (c.ppl or 1) >= GOOD]
        share = len(good) / len(mine) if rate is not None and rate >= FAST else 0.0 if rate is not None else None
        quality = min(kept) if len(kept) == len(models) else 0.0
        least = None if rate is None or share is None else min(quality / GOOD, rate / FAST, share)
        lines.append(
            [
                name,
                fixed(quality, 3) if quality else f"n/a on {len(models) - len(kept)} of {len(models)}",
                f"{len(good)} of {len(mine)}",
                times(rate) if rate is not None else NONE,
                NONE if share is None else percent(share),
                NONE if least is None else fixed(least),
                ", ".join(m for m in models if any(c.method == name for c in fronts[m])) or NONE,
                fixed(sum(c.fit_s or 0 for c in mine), 0),
            ]
        )
    ways = speeds[0].context if speeds else None
    timing = (
        f"S: speed-up over dense on the same kernels, {ways}, random weights, at the same bytes"
        if ways
        else "S was not timed"
    )
    return ScoreTable(
        f"Quality, speed, applicability on {', '.join(models)}",
        f"P: dense perplexity over the method's at {fixed(top)} of the bytes, for the worst model. Good: number of cells (model × "
        f"byte fraction) with P of at least {GOOD}. {timing}. A: share of good cells if S is at least {FAST}, else 0. "
        f"Least: min(P / {GOOD}, S / {FAST}, A). Front: models with a cell of the method, on weights of any bits, on the "
        f"Pareto front of bytes and KL. Fit: seconds for all cells.{_missing(cells)}",
        ["method", "P", "good", "S", "A", "least", "front", "fit, s"],
        lines,
    )


def plot(rows: Sequence[records.Record]) -> Markup:
    """KL against bytes, one panel a model.

    Of a quantised file: methods and files by bits a weight. Of a model in 16 bits: rounding, methods on 16 and 4 bits, the front.
    """
    cells, boards = _plain(rows), file_boards.boards(rows)
    models = list(dict.fromkeys(c.model for c in cells))
    shown = [c for c in cells if (c.kl and c.byte_fraction_16 and c.family != "reference") or c.method == ROUNDING]
    canvas = Canvas(WIDTH, HEIGHT * max(1, len(models) + len(boards)), "KL against bytes read, one panel per model")
    for index, board in enumerate(boards):
        file_boards.draw(canvas, board, HEIGHT * index)
    for index, model in enumerate(models, len(boards)):
        own = [c for c in shown if c.model == model and c.kl]
        if own:
            _panel(canvas, model, own, HEIGHT * index)
    return standalone(canvas)


def standalone(canvas: Canvas) -> Markup:
    """The image as a file of its own, with its style."""
    svg = str(canvas.svg())
    start = svg.index(">") + 1
    head = svg[:start].replace(
        "<svg ", '<svg class="board" xmlns="http://www.w3.org/2000/svg" style="background:#fff" '
    )
    return Markup(head) + STYLE + Markup(svg[start:])


def _panel(canvas: Canvas, model: str, cells: list[Cell], top: float) -> None:
    levels = [c.kl or 0.0 for c in cells]
    low, high = 10 ** math.floor(math.log10(min(levels))), 10 ** math.ceil(math.log10(max(levels)))
    left = min(c.byte_fraction_16 or 1.0 for c in cells) - 0.1  # room for names
    x, y = Linear(left, 1.0, 60.0, WIDTH - 90), Log(low, max(high, low * 10), top + HEIGHT - 40, top + 76)
    for v in y.ticks():
        canvas.line(60.0, y(v), WIDTH - 90, y(v))
        canvas.text(54.0, y(v) + 4, f"{v:g}", "end")
    for v in x.ticks(8):
        canvas.text(x(v), top + HEIGHT - 22, f"{v:.2f}", "middle")
    canvas.text(
        60.0, top + 18, f"{model}: KL, nats per token, by bytes read over the dense model's in 16 bits", style="title"
    )
    at: Callable[[Cell], tuple[float, float]] = lambda c: (x(c.byte_fraction_16 or 1.0), y(c.kl or 0.0))  # noqa: E731
    canvas.path([at(c) for c in front(cells)], "front")
    for c in cells:
        style = "rounding" if c.method == ROUNDING else "own" if c.family == "own" else "other"
        hint = f"{c.method}, {c.weight_bits:g} bits: KL {number(c.kl)} at {fixed(c.byte_fraction_16)}"
        draw = canvas.diamond if c.weight_bits < 16 and c.method != ROUNDING else canvas.dot
        draw(*at(c), style, 3.5, hint)
    named: set[tuple[str, bool]] = set()
    for c in sorted(cells, key=lambda c: c.byte_fraction_16 or 0):
        key = (c.method, c.weight_bits < 16)
        if c.method == ROUNDING or key not in named:
            named.add(key)
            canvas.label(*at(c), f"{c.weight_bits - 0.5:g} bit" if c.method == ROUNDING else c.method, 7.0)
