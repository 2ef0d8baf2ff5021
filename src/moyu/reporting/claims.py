"""Test three claims on the cells of a scoreboard, with paired intervals over documents.

order      matched oracle <= method <= matched random, in perplexity, on 16-bit weights;
routers    every trained router beats static popularity, in perplexity, at equal bytes;
estimate   has the least KL of all methods at every target byte fraction, and less KL than rounding below 4 bits.

A cell shows a claim if the interval of the difference lies on the claim's side of 0, and refutes it if it lies on the other
side; else the cell is open. A "≤" is also shown by losses that are equal on every document.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moyu.records import Cell

RESAMPLES = 1000
ROUNDING, NULL, OWN = "quantise", "popularity", "estimate"
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


def verdicts(cells: Sequence[Cell]) -> list[Verdict]:
    """All comparisons that the cells allow."""
    return [*_order(cells), *_routers(cells), *_estimate(cells)]


def _order(cells: Sequence[Cell]) -> Iterator[Verdict]:
    for cell in cells:
        own = cell.by_document
        if cell.method in (ROUNDING, "random", "oracle") or "nll_random" not in own:
            continue  # random and oracle would be compared with themselves
        yield _compare("oracle ≤ method", cell, "matched oracle", own["nll"], own["nll_oracle"])
        yield _compare("method ≤ random", cell, "matched random", own["nll_random"], own["nll"])


def _routers(cells: Sequence[Cell]) -> Iterator[Verdict]:
    from moyu.methods import method_class  # imports torch, which takes seconds; only needed with cells

    for cell in cells:
        if cell.method == ROUNDING or not method_class(cell.method).trains:
            continue
        for other in _rivals(cells, cell):
            if other.method == NULL:
                yield _compare("router < popularity", cell, NULL, other.by_document["nll"], cell.by_document["nll"])


def _estimate(cells: Sequence[Cell]) -> Iterator[Verdict]:
    for cell in (c for c in cells if c.method == OWN):
        for other in _rivals(cells, cell):
            if other.family != "reference":
                yield _compare(
                    f"{OWN} < every method", cell, other.method, other.by_document["kl"], cell.by_document["kl"]
                )
        if cell.weight_bits < 16 and cell.target_byte_fraction is not None and cell.kl is not None:
            rounded = [c for c in cells if (c.model, c.method) == (cell.model, ROUNDING)]
            scale = (cell.byte_fraction_16 or 1.0) / (cell.byte_fraction or 1.0)
            for other in rounded:
                if abs((other.byte_fraction_16 or 0.0) - cell.target_byte_fraction * scale) < 1e-3:
                    yield _compare(
                        f"{OWN} < rounding", cell, f"{other.weight_bits:g} bits", other.by_document["kl"],
                        cell.by_document["kl"],
                    )  # fmt: skip


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


def lines(cells: Sequence[Cell]) -> list[list[str]]:
    """One line per claim: its name, the number of cells that show, leave open and refute it, and the largest refutations."""
    found: dict[str, list[Verdict]] = {}
    for verdict in verdicts(cells):
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
    bits = "" if cell.weight_bits == 16 else f", {cell.weight_bits:g} bits"
    rival = "" if verdict.against.startswith("matched") else f" against {verdict.against}"
    return f"{cell.method}{rival} on {cell.model}, {asked}{bits} ({verdict.difference:+.2g} [{verdict.low:+.2g}, {verdict.high:+.2g}])"
