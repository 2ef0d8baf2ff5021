"""Levels of one native step: those to replay, and those that it took, told to a chooser that only watches or replays."""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from moyu.engine.choosers import Known
from moyu.engine.sites import SiteState
from moyu.engine.steps.layers import LINEARS, PlainLayer
from moyu.kernels.checks import address
from moyu.methods.values import Rows, Site

Level = tuple[int, int, int]
NOTHING: Level = (0, 0, 0)  # struct DecodeLevels of kernels.h: nothing to replay, and nobody asks


class StepLevels:
    """The levels of every site in one step, as the extension takes them."""

    def __init__(self, layers: list[PlainLayer], head: SiteState | None, chooser: Known, rows: Rows) -> None:
        """Asks `chooser` for what to replay; `rows` are the step's (B,), `head` the site of a head that the step goes through."""
        self.chooser, self.rows = chooser, rows
        self.columns = array("q")  # struct DecodeColumns, one a layer
        self.neurons: list[Level] = []  # one a layer
        self._taken: list[tuple[Site, Tensor]] = []
        self._given: list[Tensor] = []  # must live as long as the step
        for layer in layers:
            columns: dict[str, Level] = dict.fromkeys(LINEARS, NOTHING)
            neurons: Level = NOTHING
            for state in layer.states:
                width = layer.block.neurons
                if state.site.skips == "columns":
                    width = layer.block.pieces[state.site.linears[0]].shape[1]
                given, taken = self._level(state, width)
                if state.site.skips == "columns":  # its linears see one input: all replay, the first tells
                    columns |= {name: (*given, 0) for name in state.site.linears}
                    columns[state.site.linears[0]] = (*given, taken)
                else:
                    neurons = (*given, taken)
            for name in LINEARS:
                self.columns.extend(columns[name])
            self.neurons.append(neurons)

        self.words = NOTHING  # of the head
        if head is not None:
            given, taken = self._level(head, head.site.units)
            self.words = (*given, taken)

    def _level(self, state: SiteState, width: int) -> tuple[tuple[int, int], int]:
        site = state.site
        taken = torch.empty(len(self.rows.seq), width, dtype=torch.bool)
        self._taken.append((site, taken))
        given = self.chooser.known(site, self.rows)
        if given is None:
            return (0, 0), taken.data_ptr()
        self._given.append(given := given.contiguous())
        return (address(f"the levels of {site.key}", given, tuple(taken.shape), torch.bool), width), taken.data_ptr()

    def tell(self) -> None:
        """Show the chooser what the step took."""
        for site, mask in self._taken:
            self.chooser(site, mask, self.rows, _no_hindsight)


def _no_hindsight() -> Tensor:
    raise RuntimeError("a native step has no hindsight: this chooser must not be one of the known ones")
