"""After rounding: levels, scales and minima move, one at a time, to where the error of the linear's outputs is least.

The error over the text is sum_rows d' H d, d = w - v, H = E[x x']. Its gradient H d is kept, so that the best value of one level is known
at once: v_i + (H d)_i / H_ii, to the nearest level. A group's scale and offset have their best values by two equations. Every move
lowers the error or is not made.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moyu.packing.grid import Place, half


def sweep(place: Place, weight: Tensor, second: Tensor) -> None:
    """Move everything once: weight (n, R), H (n, n)."""
    grid = place.grid
    pull = second @ (weight - place.values())  # H d, (n, R)
    for part in range(len(place.s)):
        own = slice(part * grid.size, (part + 1) * grid.size)
        near, before = second[own, own], _values(place, part)
        here = pull[own].clone()
        _levels(place, part, here, near)
        _scale(place, part, here, near)
        pull.addmm_(second[:, own], _values(place, part) - before, alpha=-1)
        if grid.form.steps is not None and (part + 1) % grid.parts == 0:
            _block(place, part // grid.parts, pull, second)


def _values(place: Place, part: int) -> Tensor:
    own = slice(part * place.grid.size, (part + 1) * place.grid.size)
    return place.level[own] * place.scale(part) + place.offset(part)


def _levels(place: Place, part: int, here: Tensor, near: Tensor) -> None:
    """Move the levels of a group; here: H d of its inputs (size, R), which follows."""
    scale = place.scale(part)
    low, high = place.grid.levels
    start = part * place.grid.size
    step = torch.where(scale == 0, 0.0, 1 / scale)
    for i in range(place.grid.size):
        level = place.level[start + i]
        moved = (level + here[i] / near[i, i] * step).round_().clamp_(low, high) - level
        level += moved
        here.addr_(near[i], moved * scale, alpha=-1)


def _scale(place: Place, part: int, here: Tensor, near: Tensor) -> None:
    """Move the scale and the offset of a group."""
    grid, block = place.grid, part // place.grid.parts
    level = place.level[part * grid.size : (part + 1) * grid.size]
    heavy = near @ level
    ll, l1, one = (level * heavy).sum(0), heavy.sum(0), near.sum().expand(level.shape[1])
    pulls = (level * here).sum(0), here.sum(0)
    limits = grid.form.steps
    unit, least = (place.d[block], place.e[block]) if limits else (None, None)
    scale, offset = place.scale(part), place.offset(part)
    to_scale, to_offset = _solved(ll, l1, one, *pulls) if grid.form.minimum else (_ratio(pulls[0], ll), None)
    new_scale = _held(scale + to_scale, unit, limits)
    new_offset = offset
    if to_offset is not None:  # the best offset for the scale as it was rounded
        rest = _ratio(pulls[1] - l1 * (new_scale[1] - scale), one)
        held = _held(offset + rest, least, None if limits is None else (-limits[1], limits[0]))
        new_offset, new_t = held[1], held[0]
    by_scale, by_offset = new_scale[1] - scale, new_offset - offset
    better = _change(by_scale, by_offset, ll, l1, one, *pulls) < 0
    target, values = (place.s[part], new_scale[0]) if limits else (place.d[block], new_scale[1])
    target.copy_(torch.where(better, values, target))
    if to_offset is not None:
        target, values = (place.t[part], new_t) if limits else (place.e[block], new_offset)
        target.copy_(torch.where(better, values, target))


def _block(place: Place, block: int, pull: Tensor, second: Tensor) -> None:
    """Move the d and e of a block of integers."""
    grid = place.grid
    parts = slice(block * grid.parts, (block + 1) * grid.parts)
    own = slice(block * grid.form.block, (block + 1) * grid.form.block)
    near, here = second[own, own], pull[own]
    one = (place.level[own].unflatten(0, (-1, grid.size)) * place.s[parts][:, None]).flatten(0, 1)
    two = place.t[parts].repeat_interleave(grid.size, 0)
    heavy = near @ one
    if grid.form.minimum:
        other = near @ two
        sides = (one * heavy).sum(0), (two * heavy).sum(0), (two * other).sum(0)
        pulls = (one * here).sum(0), (two * here).sum(0)
        to_d, to_e = _solved(*sides, *pulls)
    else:
        zero = torch.zeros_like(one[0])
        sides, pulls = ((one * heavy).sum(0), zero, zero), ((one * here).sum(0), zero)
        to_d, to_e = _ratio(pulls[0], sides[0]), zero
    by_d, by_e = half(place.d[block] + to_d) - place.d[block], half(place.e[block] + to_e) - place.e[block]
    better = _change(by_d, by_e, *sides, *pulls) < 0
    by_d, by_e = torch.where(better, by_d, 0.0), torch.where(better, by_e, 0.0)
    place.d[block] += by_d
    place.e[block] += by_e
    pull.addmm_(second[:, own], one * by_d + two * by_e, alpha=-1)


def _held(value: Tensor, unit: Tensor | None, limits: tuple[int, int] | None) -> tuple[Tensor, Tensor]:
    """A scale as a format holds it: the integer and the scale, or (without a unit) the float16 number twice."""
    if unit is None or limits is None:
        return half(value), half(value)
    whole = torch.where(unit == 0, 0.0, value / unit).round_().clamp_(*limits)
    return whole, whole * unit


def _solved(a: Tensor, b: Tensor, c: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """The solution of ((a b), (b c)) z = (x, y); 0 where there is none."""
    determinant = a * c - b * b
    fine = determinant > 1e-6 * a * c
    inverse = torch.where(fine, 1 / determinant, 0.0)
    return (c * x - b * y) * inverse, (a * y - b * x) * inverse


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b > 0, a / b, 0.0)


def _change(p: Tensor, q: Tensor, a: Tensor, b: Tensor, c: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """The change of the error by moves p and q."""
    return p * p * a + 2 * p * q * b + q * q * c - 2 * (p * x + q * y)
