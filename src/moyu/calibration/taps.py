"""What a pass shows of one layer, and what a method's `fit` sees of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from moyu.methods.values import Acts, Rows, Site, Tap
from moyu.model.anatomy import Block
from moyu.weights import Stored


class OnDemand(Mapping[Any, Tensor]):
    """Tensors by name; those that are not known yet are all made at once, when the first of them is asked for."""

    def __init__(self, known: Mapping[Any, Tensor], make: Callable[[], Mapping[Any, Tensor]]) -> None:
        """make: all of them; what is known already stays as it is."""
        self._known, self._make = dict(known), make
        self._made = False

    def _all(self) -> dict[Any, Tensor]:
        if not self._made:
            self._known, self._made = {**self._make(), **self._known}, True
        return self._known

    def __getitem__(self, name: Any) -> Tensor:
        return self._known[name] if name in self._known else self._all()[name]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._all())

    def __len__(self) -> int:
        return len(self._all())


class Taps:
    """An observer that keeps all taps of one layer, the means of what its masks skip, and the taps that later layers read."""

    def __init__(self, layer: int, ahead: dict[tuple[int, Tap], Tensor], wanted: set[tuple[int, Tap]]) -> None:
        self.layer, self.ahead, self.wanted = layer, ahead, wanted
        self.taps: dict[tuple[int | None, Tap], Tensor] = {}
        self.rows: dict[tuple[int | None, Tap], Rows] = {}
        self.skipped: dict[str, Tensor] = {}

    def see(self, layer: int, expert: int | None, tap: Tap, x: Tensor, rows: Rows) -> None:
        if (layer, tap) in self.wanted:
            self.ahead[layer, tap] = x.detach()
        if layer != self.layer:
            return
        self.taps[expert, tap] = x.detach()
        self.rows[expert, tap] = rows

    def mask(self, site: Site, values: Tensor, mask: Tensor, rows: Rows) -> None:
        if site.layer == self.layer:
            self.skipped[site.key] = missing(values, mask, rows)

    def acts(self, expert: int | None) -> tuple[Mapping[Tap, Tensor], Rows | None]:
        taps: dict[Tap, Tensor] = {t: x for (e, t), x in self.taps.items() if e is None}
        taps |= {t: x for (e, t), x in self.taps.items() if e == expert}
        rows = next((r for (e, t), r in self.rows.items() if e == expert), None)
        if rows is None and not any(e is not None for e, _ in self.rows):
            rows = next(iter(self.rows.values()), None)
        return taps, rows


class LaterTaps:
    """The taps of a pass that runs only if one of them is asked for."""

    def __init__(self, rows: Rows, run: Callable[[], Taps]) -> None:
        """rows: of networks that are not routed to."""
        self._rows, self._run, self._taps = rows, run, None

    def _seen(self) -> Taps:
        if self._taps is None:
            self._taps = self._run()
        return self._taps

    def acts(self, expert: int | None) -> tuple[Mapping[Tap, Tensor], Rows | None]:
        if expert is not None and expert >= 0:  # who is routed to an expert, the pass alone knows
            return self._seen().acts(expert)
        return OnDemand({}, lambda: self._seen().acts(expert)[0]), self._rows


def missing(values: Tensor, mask: Tensor, rows: Rows) -> Tensor:
    """The mean (n,) over sparse rows of the values (N, n) that a mask (N, n) takes away."""
    return torch.where(mask, 0, values.float())[rows.sparse].mean(0)


Tensors = tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, Stored]]


def tensors_of(block: Block) -> Tensors:
    """Weights and biases of a block's linears, by name, and weights as they are stored, if they are quantised.

    Of those, copies are made when a weight is asked for.
    """
    weights = OnDemand({}, lambda: {n: p.weight.detach() for n, p in block.pieces.items()})
    biases = {n: p.bias.detach() for n, p in block.pieces.items() if p.bias is not None}
    return weights, biases, {n: p.blocks for n, p in block.pieces.items() if p.blocks is not None}


def acts_of(
    tensors: Tensors,
    site: Site,
    seen: Taps | LaterTaps,
    dense: Taps | LaterTaps,
    ahead: tuple[Tensor, Tensor] | None = None,
) -> Acts | None:
    """A site's activations from both streams, with its block's tensors; ahead: its taps, if it reads another layer's.

    None for an expert to which no token of the text is routed. It stays dense.
    """
    sparse_taps, rows = seen.acts(site.expert)
    if rows is None or not bool((rows.sparse & rows.valid).any()):
        return None

    def of_dense() -> Mapping[Tap, Tensor]:
        taps, dense_rows = dense.acts(site.expert)
        routed_alike = dense_rows is not None and len(dense_rows.seq) == len(rows.seq)
        return taps if routed_alike else sparse_taps  # routing differs between the streams: fit on the sparse one

    known: tuple[dict[Tap, Tensor], ...] = tuple({site.reads: tap} for tap in ahead or ())
    if not known:
        return Acts(OnDemand({}, of_dense), sparse_taps, rows, *tensors)
    return Acts(OnDemand(known[0], of_dense), OnDemand(known[1], lambda: sparse_taps), rows, *tensors)
