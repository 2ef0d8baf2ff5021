"""Scales and minima for groups of weights: the best of many that are tried, by the squared error under weights of its own for each input.

Tried are ranges that leave out more and more of a group's ends. For each the levels are rounded, and the scale and the offset that
fit these levels best follow in closed form (least squares), as llama.cpp's quantisers of K types do. Here both ends are tried
apart, and rounding and fitting are repeated on the best.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.packing.grid import Grid, half

ONE_SIDED = tuple(n / 32 for n in range(22, 39))  # of the range of the largest weight
CUTS = (-0.03, 0.03, 0.09, 0.16, 0.25)  # of the whole range, at either end
COARSE = (0.75, 0.8, 0.85, 0.9, 0.95, 1.0)  # of a block's largest scale, as the range of its integers
AGAIN = 2  # times that the best is rounded and fitted again


def groups(x: Tensor, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group: x (P, size, R), weight (P, size, 1) -> (P, R) each."""
    return _with_minimum(x, weight, grid) if grid.form.minimum else (_symmetric(x, weight, grid), x.new_zeros(1))


def _symmetric(x: Tensor, weight: Tensor, grid: Grid) -> Tensor:
    low, high = grid.levels
    largest = x.gather(1, x.abs().argmax(1, keepdim=True))  # (P, 1, R)
    weighted = weight * x
    best, scale = x.new_full((len(x), x.shape[2]), -1.0), x.new_zeros(len(x), x.shape[2])

    def take(start: Tensor) -> None:
        nonlocal best, scale
        level = (x * _inverse(start)).round_().clamp_(low, high)
        along, square = (weighted * level).sum(1), (weight * level * level).sum(1)
        found = along * _inverse(square)
        gain = along * found
        scale = torch.where(gain > best, found, scale)
        best = torch.maximum(gain, best)

    for share in ONE_SIDED:
        take(share * largest / low)
        take(-share * largest / low)
    for _ in range(AGAIN):
        take(scale[:, None])
    return scale


def _with_minimum(x: Tensor, weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    high = grid.levels[1]
    below = grid.form.steps is not None  # the offset of a K type is never above 0
    least, most = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
    if below:
        least, most = least.clamp(max=0), most.clamp(min=0)
    span = most - least
    total, weighted = weight.sum(1), weight * x  # (P, 1), (P, size, R)
    sum_x = weighted.sum(1)
    shape = (len(x), x.shape[2])
    best, scale, offset = x.new_full(shape, -torch.inf), x.new_zeros(shape), x.new_zeros(shape)

    def take(step: Tensor, bottom: Tensor) -> None:
        nonlocal best, scale, offset
        level = ((x - bottom) * _inverse(step)).round_().clamp_(0, high)
        heavy = weight * level
        sum_l, sum_ll, sum_lx = heavy.sum(1), (heavy * level).sum(1), (weighted * level).sum(1)
        determinant = total * sum_ll - sum_l * sum_l
        a = (total * sum_lx - sum_l * sum_x) * _inverse(determinant)
        b = (sum_x - a * sum_l) / total
        alone = sum_lx * _inverse(sum_ll)
        use = (b > 0) & below | (determinant <= 0)
        a, b = torch.where(use, alone, a), torch.where(use, 0.0, b)
        gain = 2 * (a * sum_lx + b * sum_x) - (a * a * sum_ll + 2 * a * b * sum_l + b * b * total)
        better = (gain > best) & (a >= 0)
        scale, offset = torch.where(better, a, scale), torch.where(better, b, offset)
        best = torch.where(better, gain, best)

    for under in CUTS:
        for over in CUTS:
            take(span * (1 - under - over) / high, least + under * span)
    for _ in range(AGAIN):
        take(scale[:, None], offset[:, None])
    return scale, offset


def steps(scale: Tensor, heavy: Tensor, limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A block's scales (parts, R) as d (R,) times integers (parts, R) between limits; heavy (parts, R): the weight of each error."""
    low, high = limits
    end = high if low == 0 else low
    largest = scale.gather(0, scale.abs().argmax(0, keepdim=True))[0]
    best = torch.full_like(largest, torch.inf)
    d, found = torch.zeros_like(largest), torch.zeros_like(scale)
    for share in COARSE:
        unit = half(share * largest / end)
        whole = (scale * _inverse(unit)).round_().clamp_(low, high)
        error = (heavy * (scale - unit * whole).square()).sum(0)
        better = error < best
        d, found, best = (
            torch.where(better, unit, d),
            torch.where(better, whole, found),
            torch.minimum(error, best),
        )
    return d, found


def _inverse(x: Tensor) -> Tensor:
    return torch.where(x == 0, 0.0, 1 / x)
