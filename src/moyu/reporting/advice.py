"""The tables of "Should I use it?": what `levels` gives over the next larger file, and what other methods give at the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

from moyu.records import Comparison, Record
from moyu.reporting.beside_files import front
from moyu.reporting.columns import number
from moyu.reporting.file_boards import FileBoard, boards


def gains(rows: Sequence[Record]) -> str:
    """Plans of `levels`, for each file of the records, beside the best smaller file that still reads at least as much as the plan."""
    head = "| the file | `levels` reads | KL | same next word | a file instead | reads | KL | same next word | KL is |"
    lines = [head, "|---" * 9 + "|"]
    compared = [r for r in rows if isinstance(r, Comparison)]
    for source in (r for r in compared if r.what == "source"):
        own = [r for r in compared if (r.source_sha256, r.corpus) == (source.source_sha256, source.corpus)]
        plans = [r for r in own if r.what == "plan" and r.choice == "own" and r.row.startswith("levels .")]
        for plan in sorted((p for p in plans if "whole" not in p.row), key=lambda p: -p.step_bytes):
            larger = [f for f in front(own) if plan.step_bytes <= f.step_bytes < source.step_bytes]
            if not larger:
                continue
            other = min(larger, key=lambda f: f.step_bytes)
            size = source.step_bytes
            cells = [
                f"{source.model}, {number(source.bits_per_weight)} bits a weight of the layers",
                *(_cell(r, size) for r in (plan, other)),
                f"{other.kl / plan.kl:,.2g} times less"
                if plan.kl < other.kl
                else f"{plan.kl / other.kl:,.2g} times more",
            ]
            cells.insert(2, other.row)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(row: Comparison, size: float) -> str:
    return f"{row.step_bytes / size:.0%} | {number(row.kl, 2)} | {row.top1_agreement:.0%}"


def others(rows: Sequence[Record]) -> str:
    """KL of `levels`, of its null and of the best method of others, for each board of a quantised file and each byte fraction."""
    lines = [
        "| the file | of its bytes | `levels` | the same without choosing for each token | the best method of others | which |"
    ]
    lines.append("|---" * 6 + "|")
    for board in boards(rows):
        for fraction in board.fractions:
            found = {c.method: c.kl for c in board.cells if c.target_byte_fraction == fraction and c.kl is not None}
            if "levels" in found:
                rest = {name: kl for name, kl in found.items() if _rival(board, name)}
                best = min(rest, key=lambda name: rest[name]) if rest else None
                cells = [
                    board.source.model,
                    f"{fraction:.0%}",
                    number(found["levels"], 2),
                    number(found.get("levels-static"), 2),
                    "–" if best is None else number(rest[best], 2),
                    "–" if best is None else f"`{best}`",
                ]
                lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _rival(board: FileBoard, name: str) -> bool:
    """Whether a method is another's: neither MOYU's own nor a reference."""
    family = next(c.family for c in board.cells if c.method == name)
    return family not in ("own", "reference", "static")
