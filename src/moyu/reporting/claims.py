"""Test claims on the cells of a scoreboard, with paired intervals over documents.

order      matched oracle <= method <= matched random, in perplexity, on 16-bit weights and on a file's own;
routers    every trained router beats static popularity, in perplexity, at equal bytes;
own        the own method (`estimate` on 16-bit weights, `levels` on a quantised file) has the least KL of all at equal bytes;
files      a plan on a quantised file has less KL than the next larger of the best files, which reads at least as many bytes: the own,
           and any other.

A cell shows a claim if the interval of the difference lies on the claim's side of 0, and refutes it if it lies on the other
side; else the cell is open. A "≤" is also shown by losses that are equal on every document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moyu.records import Cell, Comparison
from moyu.reporting.beside_files import front

RESAMPLES = 1000
ROUNDING, NULL = "quantise", "popularity"
OWN, OF_FILES = "estimate", "levels"  # on 16-bit weights, on quantised files
NAMED = 3  # the most refutations that a table names


@dataclass(frozen=True)
class Verdict:
    """One comparison: the mean difference over documents with its 95 % interval. Positive supports the claim."""

    claim: str
    cell: Cell
    against: str
    difference: float
    low: float
    high: float

    @property
    def holds(self) -> bool | None:
        """True: shown. False: refuted. None: open."""
        same = "≤" in self.claim and self.low == self.high == 0
        return True if self.low > 0 or same else False if self.high < 0 else None


def verdicts(cells: Sequence[Cell], files: Sequence[Comparison] = ()) -> list[Verdict]:
    """All comparisons that the cells allow, and the files on the same windows."""
    return [*_order(cells), *_routers(cells), *_own(cells), *_files(cells, files)]


def _order(cells: Sequence[Cell]) -> Iterator[Verdict]:
    for cell in cells:
        own = cell.by_document
        if cell.method in (ROUNDING, "random", "oracle") or "nll_random" not in own:
            continue  # random and oracle would be compared with themselves
        nll = own["nll"][: len(own["nll_random"])]  # of a file's board the references are of the first documents
        yield _compare("oracle ≤ method", cell, "matched oracle", nll, own["nll_oracle"])
        yield _compare("method ≤ random", cell, "matched random", own["nll_random"], nll)


def _routers(cells: Sequence[Cell]) -> Iterator[Verdict]:
    from moyu.methods import method_class  # imports torch, which takes seconds; only needed with cells

    for cell in cells:
        if cell.method == ROUNDING or not method_class(cell.method).trains:
            continue
        for other in _rivals(cells, cell):
            if other.method == NULL:
                yield _compare("router < popularity", cell, NULL, other.by_document["nll"], cell.by_document["nll"])


def _own(cells: Sequence[Cell]) -> Iterator[Verdict]:
    for cell in cells:
        if cell.method != (OWN if cell.step_bytes is None else OF_FILES):
            continue
        for other in _rivals(cells, cell):
            if other.family != "reference":
                claim = f"{cell.method} < every method"
                yield _compare(claim, cell, other.method, other.by_document["kl"], cell.by_document["kl"])


def _files(cells: Sequence[Cell], files: Sequence[Comparison]) -> Iterator[Verdict]:
    for cell in cells:
        size = cell.step_bytes
        if size is None or cell.kl is None or cell.family == "reference":
            continue
        larger = [f for f in front(files) if f.step_bytes >= size]
        if larger:
            other = min(larger, key=lambda f: f.step_bytes)
            who = OF_FILES if cell.method == OF_FILES else "any other method"
            claim = f"{who} < the next larger file"
            yield _compare(claim, cell, other.row, other.by_document["kl"], cell.by_document["kl"])


def _rivals(cells: Sequence[Cell], cell: Cell) -> Iterator[Cell]:
    """Cells of other methods with the same model, weights and target byte fraction."""
    if cell.target_byte_fraction is None or cell.kl is None:
        return
    for other in cells:
        same = (other.model, other.weight_bits, other.target_byte_fraction) == (
            cell.model, cell.weight_bits, cell.target_byte_fraction
        )  # fmt: skip
        if same and other.method != cell.method and other.kl is not None:
            yield other


def _compare(claim: str, cell: Cell, against: str, worse: Sequence[float], better: Sequence[float]) -> Verdict:
    from moyu.measure.statistics import bootstrap  # imports scipy, which takes seconds; only needed with cells

    found = bootstrap([a - b for a, b in zip(worse, better, strict=True)], resamples=RESAMPLES)
    return Verdict(claim, cell, against, found.value, found.low, found.high)


def lines(cells: Sequence[Cell], files: Sequence[Comparison] = ()) -> list[list[str]]:
    """One line per claim: its name, the number of cells that show, leave open and refute it, and the largest refutations."""
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts(cells, files):
        found.setdefault(verdict.claim, []).append(verdict)
    table = []
    for claim, own in found.items():
        counts = [sum(v.holds is kind for v in own) for kind in (True, None, False)]
        against = sorted((v for v in own if v.holds is False), key=lambda v: v.difference)
        named = [_named(v) for v in against[:NAMED]] + [f"{len(against) - NAMED} more"] * (len(against) > NAMED)
        table.append([claim, *map(str, counts), "; ".join(named) or "none"])
    return table


def _named(verdict: Verdict) -> str:
    cell = verdict.cell
    asked = (
        f"{cell.target_byte_fraction:.2f} of the bytes" if cell.target_byte_fraction is not None
        else f"sparsity {cell.target_sparsity:.2f}" if cell.target_sparsity is not None else "native"
    )  # fmt: skip
    bits = "" if cell.weight_bits == 16 or cell.step_bytes is not None else f", {cell.weight_bits:g} bits"
    rival = "" if verdict.against.startswith("matched") else f" against {verdict.against}"
    return f"{cell.method}{rival} on {cell.model}, {asked}{bits} ({verdict.difference:+.2g} [{verdict.low:+.2g}, {verdict.high:+.2g}])"
