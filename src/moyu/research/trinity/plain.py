"""The board of a model in 16 bits: methods on its weights and on simulated weights of 4 bits, MOYU's own rounding beside.

Quality is KL from the dense model in 16 bits, whatever the bits of the weights. Rounding is MOYU's own, so that its row says what
bits are worth here, and is no competitor: files that people would use are (`of_file`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TypedDict

from moyu import methods, records
from moyu.calibration.budget import Reader
from moyu.errors import OutOfReach
from moyu.measure import evaluation
from moyu.measure.storage import Storage, stored
from moyu.plan import Plan
from moyu.records.about import AboutMethod, about_method, about_plan
from moyu.research.trinity.asked import QUANTISE, Target
from moyu.research.trinity.board import Board, Wanted, timer

SPARSITIES = (0.5,)
BITS = (8, 6, 5, 4, 3, 2)
LOW = (3, 2)  # bits whose bytes are the targets of methods on 4-bit weights


class Setting(TypedDict):
    """The fields of a cell that its model and storage decide."""

    protocol: records.Protocol
    corpus: dict[str, object]
    quick: bool
    simulated: bool
    weight_bits: float


@dataclass(frozen=True)
class PlainBoard(Board):
    """The cells of a model in 16 bits."""

    def cells(self) -> Iterator[Wanted]:
        names = self.asked.names()
        for bits in BITS if QUANTISE in names else ():
            yield Wanted(bits, QUANTISE, Target("rounding"))
        for bits in (16, 4):
            for name in names:
                if name == QUANTISE:
                    continue
                if not methods.method_class(name).solves_target:
                    yield Wanted(bits, name, Target("native"))
                    continue
                low = (self.steps[b] / self.steps[4] for b in LOW)
                for value in self.asked.fractions() if bits == 16 else low:
                    yield Wanted(bits, name, Target("bytes", value))
                if bits == 16:
                    for value in SPARSITIES:
                        yield Wanted(bits, name, Target("sparsity", value))

    def make(self, wanted: Wanted) -> records.Record:
        storage = Storage(wanted.bits)
        around = stored(self.context.loaded.model, self.context.anatomy, storage)
        with around if wanted.bits != 16 else nullcontext():
            if wanted.name == QUANTISE:
                return self.rounding(storage)
            return self.measure(wanted.name, storage, wanted.target)

    @cached_property
    def steps(self) -> dict[int, float]:
        """Bytes of a dense step by bits."""
        return {b: Storage(b).step_bytes(self.context.loaded.model, self.context.anatomy) for b in (16, *BITS)}

    def rounding(self, storage: Storage) -> records.Cell:
        """Quantising: all weights of the blocks in so many bits, nothing skipped."""
        given = self.predict(self.context.loaded.model, self.windows)
        test, _ = self.reference
        fraction = self.steps[storage.bits] / self.steps[16]
        own: AboutMethod = {**about_plan(None), "method": QUANTISE, "family": "reference", "kv_policy": None}
        return records.Cell(
            kind="cell",
            **self.about,
            **own,
            **self._setting(storage),
            realized_sparsity=0.0,
            byte_fraction=1.0,
            byte_fraction_16=fraction,
            **self.measured(evaluation.score(test, given, self.windows), evaluation.score(test, test, self.windows)),
        )

    def measure(self, name: str, storage: Storage, target: Target) -> records.Cell:
        """A method's cell, or the reason why it has none."""
        context, method = self.context, methods.method(name)
        byte_target = target.value if target.kind == "bytes" else None
        sparsity_target = target.value if target.kind == "sparsity" else None
        unplanned: AboutMethod = {**about_method(method), "target_sparsity": sparsity_target, "kv_policy": None}
        if not context.applicable([name])[0]:
            return records.Cell(
                kind="cell",
                **self.about,
                **unplanned,
                **self._setting(storage),
                target_byte_fraction=byte_target,
                status="n/a (nothing to skip)",
            )
        test, _ = self.reference
        reader = Reader(context.loaded.model, context.anatomy, storage)
        seconds = timer()
        try:
            plan = self._plan(name, reader, target)
        except OutOfReach as error:
            return records.Cell(
                kind="cell",
                **self.about,
                **unplanned,
                **self._setting(storage),
                target_byte_fraction=byte_target,
                floor=error.floor,
                status=f"n/a (floor {error.floor:.2f})",
            )
        fit_s = seconds()
        quality = evaluation.evaluate(
            context.loaded.model,
            plan,
            self.windows,
            matched=storage.bits == 16,
            batch=self.batch,
            anatomy=context.anatomy,
            reference=test,
        )
        fraction = reader.byte_fraction(quality.byte_fraction, plan)
        planned: AboutMethod = {**about_plan(plan), "target_sparsity": sparsity_target}
        return records.Cell(
            kind="cell",
            **self.about,
            **planned,
            **self._setting(storage),
            target_byte_fraction=byte_target,
            realized_sparsity=quality.realized_sparsity,
            byte_fraction=fraction,
            byte_fraction_16=fraction * self.steps[storage.bits] / self.steps[16],
            floor=self.floor(name, reader, plan, target),
            knobs=plan.method.knobs(),
            site_knobs=plan.site_knobs,
            fit_s=fit_s,
            **self.measured(quality.method, quality.dense, quality.random, quality.oracle),
        )

    def _plan(self, name: str, reader: Reader, target: Target) -> Plan:
        if target.kind == "bytes":
            return self.plan_for(name, reader, target.value)
        return self.context.plan(name, sparsity=target.value)

    def _setting(self, storage: Storage) -> Setting:
        """What all cells of this model and storage have in common."""
        return {
            "protocol": self.context.protocol,
            "corpus": dict(self.windows.source),
            "quick": self.asked.quick,
            "simulated": True,
            "weight_bits": storage.weight_bits,
        }
