"""From a byte fraction to a plan: find the sparsity and the settings with which a step reads that fraction.

A plan adds bytes of its own (biases, routers), which depend on the sparsity; so we calibrate, measure the added bytes, and
solve for the sparsity again. If a method can spend the same bytes in several ways, the way with the least KL on the
validation text is used. A method that divides budgets gives each site its own settings and sparsity, so that the total
loss is least (`moyu.calibration.fisher`).
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from moyu.calibration import fisher, head
from moyu.calibration.allocation import mean
from moyu.calibration.streams import Progress
from moyu.calibration.trials import separable, weights
from moyu.calibration.walk import calibrate, solve_bytes
from moyu.errors import OutOfReach
from moyu.measure import accounting
from moyu.measure.evaluation import evaluate, read_fraction
from moyu.measure.storage import Storage
from moyu.measure.text import Split
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.methods.values import Site, SiteParams
from moyu.model.anatomy import Anatomy, Block
from moyu.plan import Plan

PROBE = 2  # calibration windows, enough to measure the bytes that a plan adds
ROUNDS = 4
CLOSE = 1e-3  # change of the added bytes that ends the search, as a fraction of the dense step's bytes
TRIAL = 4  # windows of calibration and of validation text on which settings are compared
SLACK = 5e-3  # allowed difference between the asked and the measured byte fraction
LEAST = 1e-3  # the least sparsity; at 0 not even exact zeros are skipped


@dataclass(frozen=True)
class Reader:
    """Counts the bytes that a decode step reads of a model whose weights are stored in `storage`."""

    model: nn.Module
    anatomy: Anatomy
    storage: Storage | None = None  # None: as in the model

    @property
    def bits(self) -> int:
        """Bits per weight without scales; the most, if formats differ."""
        if self.storage is not None:
            return self.storage.bits
        kept = [p.blocks for b in self.anatomy.all_blocks() for p in b.pieces.values()]
        return max((16 if blocks is None else blocks.format.bits for blocks in kept), default=16)

    @property
    def planes(self) -> bool:
        """Whether the first bits of a weight can be read without the rest. Simulated storage can do that; no kernel reads it."""
        return self.storage is not None and self.storage.bits < 16

    def dense(self) -> float:
        """Bytes of a dense step."""
        if self.storage is None:
            return accounting.dense_step_bytes(self.model, self.anatomy)
        return self.storage.step_bytes(self.model, self.anatomy)

    def skippable(self, method: Method) -> float:
        """Bytes of all units of all sites."""
        sites = [s for b in self.anatomy.places() for s in method.sites(b)]
        return accounting.skippable_bytes(self.model, self.anatomy, sites) * self.share

    def added(self, plan: Plan, copies: Mapping[int, int] | None = None) -> float:
        """Bytes that a step reads of the plan itself. With a storage, matrices count as stored and the rest in 16 bits.

        copies: for a plan of some layers only, the number of layers that each of them represents.
        """
        total, share = 0.0, accounting.shares(self.anatomy)
        for site, params in plan.parts.values():
            count = (1 if copies is None else copies[site.layer]) * share.get((site.layer, site.expert), 1.0)
            counted = params if self.storage is None else _sixteen(params)
            total += count * (counted.extra_bytes() + plan.method_of(site).score_bytes(site, counted))
            if self.storage is None:
                continue
            for matrix in params.matrices(plan.method.matrices).values():
                total += count * (self.storage.head.kept_bytes(*sorted(matrix.shape)) - 2 * matrix.numel())
        return total

    def kept(self, plan: Plan) -> Plan:
        """The plan with its matrices rounded as the storage rounds them, groups along their longer side."""
        if self.storage is None or self.storage.bits == 16:
            return plan

        def short(matrix: Tensor) -> Tensor:
            wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
            found = self.storage.head.kept(wide)  # pyright: ignore[reportOptionalMemberAccess]
            return (found if wide is matrix else found.t()).contiguous()

        parts = {}
        for key, (site, params) in plan.parts.items():
            own = {name: short(matrix) for name, matrix in params.matrices(plan.method.matrices).items()}
            parts[key] = (site, params.mapped(lambda name, tensor, own=own: own.get(name, tensor)))
        return dataclasses.replace(plan, parts=parts)

    def skipped(self, byte_fraction: float, plan: Plan) -> float:
        """Bytes skipped per step, recovered from an evaluation's byte fraction."""
        total = accounting.dense_step_bytes(self.model, self.anatomy)
        added = accounting.added_bytes(plan, self.anatomy)
        return (total + added - byte_fraction * total) * self.share

    def byte_fraction(self, byte_fraction: float, plan: Plan) -> float:
        """The byte fraction in this storage, from an evaluation's byte fraction on the weights as in the model."""
        return (self.dense() + self.added(plan) - self.skipped(byte_fraction, plan)) / self.dense()

    def floor(self, plan: Plan) -> float:
        """The least byte fraction of a plan's method: all units skipped, and the plan's own bytes added."""
        return (self.dense() + self.added(plan) - self.skippable(plan.method)) / self.dense()

    @property
    def share(self) -> float:
        """Bytes of a stored weight over its bytes in the model."""
        if self.storage is None:
            return 1.0
        return self.storage.weight_bits / 8 / next(self.model.parameters()).element_size()


def _sixteen(params: SiteParams) -> SiteParams:
    """The same with its numbers in 16 bits."""
    return params.mapped(lambda _, tensor: tensor.half() if tensor.is_floating_point() else tensor)


@dataclass(frozen=True)
class Way:
    """One way to spend bytes: a method with its settings, at the same sparsity everywhere."""

    reader: Reader
    method: Method
    options: Mapping[str, Any]  # of `calibrate`, without the sparsity

    def start(self, windows: Windows, byte_fraction: float) -> float:
        """The sparsity to start with. Raises OutOfReach below the method's floor."""
        return solve(self.reader, self.method, windows, byte_fraction, **self.options)

    def floor(self, plan: Plan) -> float:
        """The least byte fraction of this way, with the bytes that `plan` adds."""
        return self.reader.floor(plan)

    @property
    def slope(self) -> float:
        """The approximate change of the byte fraction per sparsity."""
        return -self.reader.skippable(self.method) / self.reader.dense()

    def plan(self, windows: Windows, sparsity: float, progress: Progress | None) -> Plan:
        """The plan at a sparsity."""
        return self._kept(self.method, windows, progress, sparsity=sparsity)

    def _kept(self, method: Method, windows: Windows, progress: Progress | None, **options: Any) -> Plan:
        options |= {"anatomy": self.reader.anatomy, "progress": progress, **self.options}
        return self.reader.kept(calibrate(self.reader.model, method, windows, **options))


@dataclass(frozen=True)
class Divided(Way):
    """Each site has settings and a sparsity of its own; all settings have the same sites.

    In place of a `Way`'s sparsity stands the fraction of a dense step's bytes that is saved.
    """

    choices: Sequence[Method]
    windows: Windows  # calibration text, to measure the loss of each site
    progress: Progress | None = None

    @cached_property
    def curves(self) -> dict[str, list[fisher.Point]]:
        """The bytes that each site saves and the loss that it causes, by level and settings."""
        reader = self.reader

        def worth(plan: Plan, skipped: float, levels: Mapping[str, float]) -> float:
            return skipped * reader.share - reader.added(plan)

        seed = int(self.options.get("seed", 0))
        of_head = head.curves(reader.model, self.choices, self.windows, reader.anatomy)
        return of_head | fisher.curves(
            reader.model, self.choices, self.windows, reader.anatomy, worth, seed=seed, progress=self.progress
        )

    def start(self, windows: Windows, byte_fraction: float) -> float:
        if byte_fraction < self._floor or self._floor == 1:
            raise OutOfReach(byte_fraction, self._floor)
        return max(LEAST, 1 - byte_fraction)

    @cached_property
    def _floor(self) -> float:
        return 1 - sum(max(0.0, *(p.saved for p in points)) for points in self.curves.values()) / self.reader.dense()

    def floor(self, plan: Plan) -> float:
        return self._floor

    @property
    def most(self) -> float:
        """The largest fraction of a dense step's bytes that can be saved."""
        return 1 - self._floor

    def saved_at(self, kl: float) -> float:
        """The fraction of a dense step's bytes at which the sites' costs add up to `kl`, in nats a token."""
        low, high = 0.0, self.most
        for _ in range(20):
            middle = (low + high) / 2
            cost = sum(p.cost for p in fisher.divide(self.curves, middle * self.reader.dense()).values())
            low, high = (middle, high) if cost <= kl else (low, middle)
        return max(low, LEAST)

    @property
    def slope(self) -> float:
        return -1.0

    def plan(self, windows: Windows, sparsity: float, progress: Progress | None) -> Plan:
        taken = fisher.divide(self.curves, sparsity * self.reader.dense())
        sites = [s for b in self.reader.anatomy.places() for s in self.method.sites(b)]
        points = {s.key: taken[fisher.name_of(s)] for s in sites}
        used = collections.Counter(p.method for p in points.values() if p.method is not None)
        usual = max(used, key=lambda own: used[own])
        levels, shares = {key: p.level for key, p in points.items()}, weights(sites)
        plan = self._kept(
            usual,
            windows,
            progress,
            sparsity=mean(levels, shares),
            levels=levels,
            settings={key: p.method for key, p in points.items() if p.method not in (None, usual)},
        )
        about = {"asked": "fisher", "levels": levels, "summed_kl": sum(p.cost for p in taken.values())}
        return dataclasses.replace(plan, calibration={**plan.calibration, "allocation": about})


def ways(
    reader: Reader, method: Method, windows: Windows, progress: Progress | None = None, **options: Any
) -> list[Way]:
    """The ways in which a method can spend bytes. The same ways serve every byte fraction.

    windows: calibration text. options: of `calibrate`, without the sparsity. If knobs are set, only these settings are used.
    Budgets are not divided if layers cannot run alone, or if a compensation follows.
    """
    settings = method.settings_for(reader.bits, reader.planes) if method == type(method)() else (method,)
    compensated = options.get("bias") or options.get("centre")
    if not method.divides or compensated or not separable(reader.model, windows, reader.anatomy):
        return [Way(reader, own, options) for own in settings]
    alike: dict[tuple[str, ...], list[Method]] = {}
    for own in settings:
        keys = tuple(s.key for b in reader.anatomy.places() for s in own.sites(b))
        alike.setdefault(keys, []).append(own)
    return [Divided(reader, choices[0], options, choices, windows, progress) for choices in alike.values()]


def plan_for_bytes(
    ways: Sequence[Way],
    split: Split,
    byte_fraction: float,
    *,
    reference: Tensor | None = None,
    progress: Progress | None = None,
) -> Plan:
    """A plan under which a step reads `byte_fraction` of the dense step's bytes, by the best way.

    reference: log-probabilities of `split.validation` to compare ways with, if not this model's. Raises OutOfReach below the
    floor of every way.
    """
    if len(ways) == 1:
        return _solved(ways[0], split.calibration, byte_fraction, progress)
    best, least, refused = None, math.inf, None
    few = dataclasses.replace(split.calibration, tokens=split.calibration.tokens[:TRIAL])
    check = dataclasses.replace(split.validation, tokens=split.validation.tokens[:TRIAL])
    known = None if reference is None else reference[:TRIAL]
    for way in ways:
        model, trains = way.reader.model, way.method.trains
        try:  # large routers need all of the text
            plan = _solved(way, split.calibration if trains else few, byte_fraction)
        except OutOfReach as error:
            refused = error if refused is None or error.floor < refused.floor else refused
            continue
        found = evaluate(model, plan, check, matched=False, anatomy=way.reader.anatomy, reference=known)
        kl = float(found.method.kl.mean())
        if best is None or kl < least:
            best, least = (way, plan), kl
    if best is None:
        assert refused is not None
        raise refused
    way, plan = best
    return plan if way.method.trains else _solved(way, split.calibration, byte_fraction, progress)


def _solved(way: Way, windows: Windows, byte_fraction: float, progress: Progress | None = None) -> Plan:
    """The plan of one way: start from the bytes that the plan counts, then correct by the bytes that a step really reads.

    Both differ, because exact zeros are skipped too and units differ in size. Among the plans that read no more than asked,
    the one with the least sparsity is used (with exact zeros, more sparsity need not mean fewer bytes); if all read more, the
    nearest. A method that trains is not corrected, because it would have to train again.
    """
    reader, method = way.reader, way.method
    sparsity = way.start(windows, byte_fraction)
    probe = dataclasses.replace(windows, tokens=windows.tokens[:TRIAL])
    slope, seen = way.slope, None
    best, least = None, (True, math.inf)
    for _ in range(ROUNDS):
        plan = way.plan(windows, sparsity, progress)
        if method.trains or method.joint:
            return plan
        read = reader.byte_fraction(read_fraction(reader.model, plan, probe, reader.anatomy), plan)
        over = read - byte_fraction
        rank = (over > SLACK, over if over > SLACK else sparsity)
        if rank < least:
            best, least = plan, rank
        if abs(over) <= SLACK or (over < 0 and sparsity <= LEAST):
            break
        if seen is not None and seen[0] != sparsity:
            slope = min((read - seen[1]) / (sparsity - seen[0]), slope / 4)
        seen = (sparsity, read)
        sparsity = min(max(sparsity - over / slope, LEAST), 1.0 - LEAST)
    assert best is not None
    return best


def solve(reader: Reader, method: Method, windows: Windows, byte_fraction: float, **options: Any) -> float:
    """The sparsity at which a step reads `byte_fraction` of `reader.dense()`, including the bytes that the plan adds.

    The added bytes of a layer depend on sizes and sparsity alone, so one layer of each kind is fitted, on the first windows of
    calibration text. Raises OutOfReach below the method's floor.
    """
    probe = dataclasses.replace(windows, tokens=windows.tokens[:PROBE])
    total, skippable = reader.dense(), reader.skippable(method)
    copies = kinds(reader.anatomy, method)
    sparsity, added, slope = solve_bytes(skippable, total, 0.0, byte_fraction), 0.0, 0.0
    seen: tuple[float, float] | None = None
    for _ in range(ROUNDS):
        plan = calibrate(
            reader.model, method, probe, sparsity=sparsity, anatomy=reader.anatomy, layers=copies, **options
        )
        found = reader.added(plan, copies)
        if abs(found - added - slope * sparsity) < CLOSE * total:
            break
        if seen is not None and seen[0] != sparsity:
            slope = (found - seen[1]) / (sparsity - seen[0])  # added bytes are nearly linear in the sparsity
        seen, added = (sparsity, found), found - slope * sparsity
        sparsity = solve_bytes(skippable - slope, total, added, byte_fraction)
    return sparsity


def kinds(anatomy: Anatomy, method: Method) -> dict[int, int]:
    """The first layer of each kind and the number of its kind. Layers are of one kind if their sites and weights have equal sizes."""
    first: dict[Any, int] = {}
    counts: dict[int, int] = {}
    for layer in range(len(anatomy.layers)):
        blocks = [b for b in anatomy.all_blocks() if b.layer == layer]
        kind = tuple(
            (dataclasses.replace(s, layer=s.layer - layer, reads_layer=s.source_layer - layer), _sizes(b, s))
            for b in blocks
            for s in method.sites(b)
        )
        if kind:
            same = first.setdefault(kind, layer)
            counts[same] = counts.get(same, 0) + 1
    return counts


def _sizes(block: Block, site: Site) -> tuple[Any, ...]:
    return tuple(tuple(block.pieces[n].shape) for n in site.linears)
