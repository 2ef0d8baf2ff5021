"""Rounding with feedback: the error of each input is taken back by the inputs after it, as far as they go together on the text.

Inputs are rounded one after another. With H = E[x x'] and U the upper factor of its inverse, H^-1 = U' U, the best that the later
inputs can do about the error of input i is to change by -error_i U_i,later / U_ii (GPTQ, arXiv 2210.17323). The scales of a block are
searched when its turn comes, on the weights as they are by then, and each input's error weighs 1 / U_ii^2: what it costs after the
later inputs have done that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.packing import search
from moyu.packing.grid import Grid, Place, half


def factor(second: Tensor) -> Tensor:
    """U (n, n) float32 of H (n, n), which must be positive definite."""
    lower = torch.linalg.cholesky(second.double())
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).float()


def place(weight: Tensor, grid: Grid, upper: Tensor | None) -> Place:
    """Round a weight (n, R). upper: U (n, n); None: each weight to the nearest value, inputs weigh the same."""
    inputs, outputs = weight.shape
    found, left, block = Place.empty(grid, inputs, outputs), weight.clone(), grid.form.block
    worth = weight.new_ones(inputs) if upper is None else upper.diagonal() ** -2
    for index, start in enumerate(range(0, inputs, block)):
        stop = start + block
        _scales(found, index, left[start:stop], worth[start:stop])
        if upper is None:
            for i in range(start, stop):
                part = i // grid.size
                found.level[i] = grid.nearest(left[i], found.scale(part), found.offset(part))
            continue
        errors, own = left[start:stop], upper[start:stop, start:stop]
        for i in range(block):
            part = (start + i) // grid.size
            scale, offset = found.scale(part), found.offset(part)
            level = grid.nearest(errors[i], scale, offset)
            found.level[start + i] = level
            errors[i].sub_(level * scale + offset).div_(own[i, i])
            errors[i + 1 :].addr_(own[i, i + 1 :], errors[i], alpha=-1)
        left[stop:].addmm_(upper[start:stop, stop:].t(), errors, alpha=-1)
    return found


def _scales(found: Place, index: int, x: Tensor, worth: Tensor) -> None:
    """Give a block its scales, for weights x (inputs of the block, R)."""
    grid = found.grid
    x, worth = x.unflatten(0, (-1, grid.size)), worth.view(-1, grid.size, 1)
    scale, offset = search.groups(x, worth, grid)
    own = slice(index * grid.parts, (index + 1) * grid.parts)
    limits = grid.form.steps
    if limits is None:
        found.d[index], found.s[own] = half(scale[0]), 1.0
        if grid.form.minimum:
            found.e[index], found.t[own] = half(offset[0]), 1.0
        return
    level = grid.nearest(x, scale[:, None], offset[:, None] if grid.form.minimum else offset)
    heavy = (worth * level * level).sum(1)
    found.d[index], found.s[own] = search.steps(scale, heavy, limits)
    if grid.form.minimum:
        found.e[index], found.t[own] = search.steps(-offset, worth.sum(1).expand_as(scale), limits)
        found.t[own] *= -1
