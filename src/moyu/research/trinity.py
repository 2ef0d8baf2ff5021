"""The scoreboard: every method on every model at equal bytes and at equal sparsity, quantising beside them.

A cell is one record in a file of its own, written whole or not at all: a run that stops goes on where it was. Quality is KL
from the dense model in 16 bits, whatever the bits of the weights, with one window a document and intervals over documents.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from moyu import methods, records
from moyu.calibration.budget import Reader, Way, plan_for_bytes, ways
from moyu.calibration.context import Context
from moyu.calibration.settings import Settings, Stage, quiet
from moyu.calibration.speed import bench_shape
from moyu.errors import OutOfReach, UserError
from moyu.files import key_of
from moyu.kernels import BackendName
from moyu.measure import evaluation, text
from moyu.measure.environment import device_name
from moyu.measure.evaluation import Scores
from moyu.measure.statistics import bootstrap
from moyu.measure.storage import Storage, stored
from moyu.measure.windows import Windows
from moyu.model import machine
from moyu.model.contents import weights_digest
from moyu.plan import Plan
from moyu.records.about import AboutMethod, AboutModel, about_method, about_plan

MODELS = ("swiglu", "relu", "gelu")
BYTES = (0.75, 0.6, 0.5)
SPARSITIES = (0.5,)
QUANTISE = "quantise"  # the row of rounding all weights, beside the methods
BITS = (8, 6, 5, 4, 3, 2)
LOW = (3, 2)  # bits whose bytes are the targets of methods on 4-bit weights: rounding further or skipping
DOCUMENTS = 24
SLOW = ("oracle-greedy",)  # a bound that takes minutes a cell: only where it is named
QUICK_METHODS = ("cats", "griffin", "popularity")
SHAPE, SHAPE_LAYERS = "llama-3.2-1b", 4
DEFINITION = 1  # of a cell and of its timing: one more wherever what is measured changes


@dataclass(frozen=True)
class Target:
    """What a cell was asked for: a byte fraction of the dense step in these bits, a sparsity, or neither."""

    kind: str  # "bytes", "sparsity", "native": what the method skips by itself; "rounding"
    value: float = 0.0

    def __str__(self) -> str:
        return self.kind if self.kind in ("native", "rounding") else f"{self.kind}{self.value:.3f}"


@dataclass(frozen=True)
class Asked:
    """Which scoreboard."""

    models: Sequence[str] = MODELS
    methods: Sequence[str] = ()  # none: all of the registry
    bytes: Sequence[float] = BYTES
    quick: bool = False
    documents: int = DOCUMENTS
    seed: int = 0
    speed: bool = True
    device: str = "cpu"
    backend: BackendName = "auto"  # of what is timed

    def check(self) -> None:
        """Refuse what cannot be run, before anything is loaded."""
        for name in self.methods:
            if name != QUANTISE:
                methods.method_class(name)
        for value in self.bytes:
            if not 0 < value < 1:
                raise UserError(f"byte fraction must be in (0, 1), not {value}", "0.75,0.6,0.5 are the default")
        if self.documents < 2:
            raise UserError(f"{self.documents} documents give no interval", "use at least 2")
        machine.check(self.device, self.backend)

    def names(self) -> list[str]:
        """Methods of the rows."""
        if self.methods:
            return list(self.methods)
        return [QUANTISE, *(QUICK_METHODS if self.quick else [n for n in methods.names() if n not in SLOW])]

    def settings(self) -> Settings:
        """How models and text are opened: more test windows than documents, of which each document's first is taken."""
        if self.quick:
            return Settings(window=128, boundary=64, calibration=4, test=48, seed=self.seed, device=self.device)
        return Settings(calibration=8, test=8 * self.documents, seed=self.seed, device=self.device)


def run(asked: Asked, out: Path, stage: Stage = quiet) -> list[records.Record]:
    """Fill in the cells that `out` lacks, then time; all records, in the order of the tables."""
    asked.check()
    out.mkdir(parents=True, exist_ok=True)
    rows: list[records.Record] = []
    for model in asked.models:
        rows += Board(asked, model, out, stage).fill()
    if asked.speed:
        rows += timed(asked, out, rows, stage)
    return rows


class Setting(TypedDict):
    """The fields of a cell that its model and storage decide."""

    protocol: records.Protocol
    corpus: dict[str, object]
    quick: bool
    simulated: bool
    weight_bits: float


class Measured(TypedDict):
    """The fields of a cell that its scores decide."""

    documents: int
    tokens: int
    ppl_dense: float
    ppl: float
    kl: float
    kl_random: float | None
    kl_oracle: float | None
    kl_interval: list[float]
    top1_agreement: float
    by_document: dict[str, list[float]]


@dataclass(frozen=True)
class Board:
    """One model's cells."""

    asked: Asked
    model: str
    out: Path
    stage: Stage = quiet

    def fill(self) -> list[records.Record]:
        """Every cell, measured now or before."""
        cells = list(self.cells())
        missing = [c for c in cells if self.known(*c) is None]
        if missing:
            _ = self.reference  # before any weight is rounded
        for done, (bits, name, target) in enumerate(missing):
            self.stage(f"scoreboard of {self.model}", done, len(missing))
            storage = Storage(bits)
            around = stored(self.context.loaded.model, self.context.anatomy, storage)
            with around if bits != 16 else nullcontext():
                row = self.rounding(storage) if name == QUANTISE else self.measure(name, storage, target)
            row = row.model_copy(update={"made_from": self.made_from(bits, name, target)})
            records.write(self.file(bits, name, target), [row])
        self.stage(f"scoreboard of {self.model}", len(missing), len(missing))
        return [row for c in cells if (row := self.known(*c)) is not None]

    def cells(self) -> Iterator[tuple[int, str, Target]]:
        """(bits, method, target) of every cell."""
        names = self.asked.names()
        for bits in BITS if QUANTISE in names else ():
            yield bits, QUANTISE, Target("rounding")
        for bits in (16, 4):
            for name in names:
                if name == QUANTISE:
                    continue
                if not methods.method_class(name).solves_target:
                    yield bits, name, Target("native")
                    continue
                for value in self.asked.bytes if bits == 16 else (self.steps[b] / self.steps[4] for b in LOW):
                    yield bits, name, Target("bytes", value)
                if bits == 16:
                    for value in SPARSITIES:
                        yield bits, name, Target("sparsity", value)

    def file(self, bits: int, name: str, target: Target) -> Path:
        """Where a cell is kept."""
        kind = "quick" if self.asked.quick else "full"
        folder = self.out / "cells" / kind / self.model.strip("./").replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{name}.{bits}bit.{target}.jsonl"

    def known(self, bits: int, name: str, target: Target) -> records.Cell | None:
        """A cell that was measured before: of these weights and this text, with these settings."""
        file = self.file(bits, name, target)
        rows = records.read(file) if file.exists() else []
        key = self.made_from(bits, name, target)
        return next((row for row in rows if isinstance(row, records.Cell) and row.made_from == key), None)

    def made_from(self, bits: int, name: str, target: Target) -> str:
        """All that decides what a cell holds."""
        return key_of(
            weights=self._weights,
            text=[w.digest for w in (self.context.split.calibration, self._validation, self.windows)],
            settings=[name, self._knobs(name), bits, str(target), self.asked.seed, self.asked.quick],
            definition=DEFINITION,
        )

    @staticmethod
    def _knobs(name: str) -> dict[str, Any] | None:
        return None if name == QUANTISE else methods.method(name).knobs()

    @cached_property
    def _weights(self) -> str:
        """Taken before any weight is rounded."""
        return weights_digest(self.context.loaded.model)

    @cached_property
    def context(self) -> Context:
        """The model and its text."""
        return Context.open(self.model, self.asked.settings(), self.stage)

    @cached_property
    def steps(self) -> dict[int, float]:
        """Bytes of a dense step by bits."""
        return {b: Storage(b).step_bytes(self.context.loaded.model, self.context.anatomy) for b in (16, *BITS)}

    @cached_property
    def windows(self) -> Windows:
        """Test windows, the first of each document."""
        test = self.context.split.test
        first = {document: i for i, document in reversed(list(enumerate(test.documents)))}
        count = 6 if self.asked.quick else self.asked.documents
        chosen = sorted(first.values())[:count]
        if len(chosen) < 2:
            raise UserError(f"the test text of {self.model!r} has {len(chosen)} documents", "give more text")
        return dataclasses.replace(test, tokens=test.tokens[chosen], documents=tuple(test.documents[i] for i in chosen))

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the dense model in 16 bits, on test and on validation windows."""
        model, validation = self.context.loaded.model, self._validation
        return evaluation.predict(model, self.windows), evaluation.predict(model, validation)

    @cached_property
    def _ways(self) -> dict[tuple[str, int], list[Way]]:
        """Of methods and bits: what they have learnt serves every byte fraction."""
        return {}

    @property
    def _validation(self) -> Windows:
        windows = self.context.split.validation
        return dataclasses.replace(windows, tokens=windows.tokens[:8])

    def rounding(self, storage: Storage) -> records.Cell:
        """Quantising: all weights of the blocks in so many bits, nothing skipped."""
        given = evaluation.predict(self.context.loaded.model, self.windows)
        test, _ = self.reference
        fraction = self.steps[storage.bits] / self.steps[16]
        own: AboutMethod = {**about_plan(None), "method": QUANTISE, "family": "reference", "kv_policy": None}
        return records.Cell(
            kind="cell",
            **self._about,
            **own,
            **self._setting(storage),
            realized_sparsity=0.0,
            byte_fraction=1.0,
            byte_fraction_16=fraction,
            **self._measured(evaluation.score(test, given, self.windows), evaluation.score(test, test, self.windows)),
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
                **self._about,
                **unplanned,
                **self._setting(storage),
                target_byte_fraction=byte_target,
                status="n/a (nothing to skip)",
            )
        test, validation = self.reference
        reader = Reader(context.loaded.model, context.anatomy, storage)
        started = time.monotonic()
        try:
            plan = self._plan(name, reader, target, validation)
        except OutOfReach as error:
            return records.Cell(
                kind="cell",
                **self._about,
                **unplanned,
                **self._setting(storage),
                target_byte_fraction=byte_target,
                floor=error.floor,
                status=f"n/a (floor {error.floor:.2f})",
            )
        seconds = time.monotonic() - started
        quality = evaluation.evaluate(
            context.loaded.model,
            plan,
            self.windows,
            matched=storage.bits == 16,
            anatomy=context.anatomy,
            reference=test,
        )
        fraction = reader.byte_fraction(quality.byte_fraction, plan)
        spent = self._ways.get((name, reader.bits), []) if target.kind == "bytes" else []
        planned: AboutMethod = {**about_plan(plan), "target_sparsity": sparsity_target}
        return records.Cell(
            kind="cell",
            **self._about,
            **planned,
            **self._setting(storage),
            target_byte_fraction=byte_target,
            realized_sparsity=quality.realized_sparsity,
            byte_fraction=fraction,
            byte_fraction_16=fraction * self.steps[storage.bits] / self.steps[16],
            floor=max(0.0, min((way.floor(plan) for way in spent), default=reader.floor(plan))),
            knobs=plan.method.knobs(),
            site_knobs=plan.site_knobs,
            fit_s=seconds,
            **self._measured(quality.method, quality.dense, quality.random, quality.oracle),
        )

    def _plan(self, name: str, reader: Reader, target: Target, validation: Tensor) -> Plan:
        context = self.context
        if target.kind != "bytes":
            return context.plan(name, sparsity=target.value)
        split, key = text.Split(context.split.calibration, self._validation, self.windows), (name, reader.bits)
        if key not in self._ways:
            method, windows = methods.method(name), split.calibration
            self._ways[key] = ways(reader, method, windows, name=self.model, seed=self.asked.seed)
        return plan_for_bytes(self._ways[key], split, target.value, reference=validation)

    @property
    def _about(self) -> AboutModel:
        return self.context.about()

    def _setting(self, storage: Storage) -> Setting:
        """What all cells of this model and storage have in common."""
        return {
            "protocol": self.context.protocol,
            "corpus": dict(self.windows.source),
            "quick": self.asked.quick,
            "simulated": True,
            "weight_bits": storage.weight_bits,
        }

    def _measured(
        self, scores: Scores, dense: Scores, random: Scores | None = None, oracle: Scores | None = None
    ) -> Measured:
        """Numbers of a cell, with means by document."""
        found: dict[str, list[float]] = {"nll_dense": _means(dense.nll)}
        for kind, one in (("", scores), ("_random", random), ("_oracle", oracle)):
            if one is not None:
                found[f"kl{kind}"], found[f"nll{kind}"] = _means(one.kl), _means(one.nll)
        interval = bootstrap(found["kl"], resamples=1000)
        return {
            "documents": len(self.windows.tokens),
            "tokens": scores.nll.numel(),
            "ppl_dense": dense.perplexity,
            "ppl": scores.perplexity,
            "kl": _divergence(scores),
            "kl_random": None if random is None else _divergence(random),
            "kl_oracle": None if oracle is None else _divergence(oracle),
            "kl_interval": [interval.low, interval.high],
            "top1_agreement": float(scores.agree.float().mean()),
            "by_document": found,
        }


def _divergence(scores: Scores) -> float:
    """Mean KL, which rounding alone makes negative."""
    return max(0.0, float(scores.kl.double().mean()))


def _means(values: Tensor) -> list[float]:
    """Means of documents (B, T) -> B numbers, in six digits."""
    return [float(f"{v:.6g}") for v in values.double().mean(1).tolist()]


def timed(asked: Asked, out: Path, rows: Sequence[records.Record], stage: Stage = quiet) -> list[records.Record]:
    """Speed on a random-weight shape of the methods that have cells, each at the largest byte fraction asked for.

    All of them and dense alternate in one run, whose records are kept; a pass that stops finds the plans that took training.
    """
    names = [n for n in asked.names() if n != QUANTISE and methods.method_class(n).family != "reference"]
    names = [n for n in names if any(isinstance(r, records.Cell) and r.method == n and r.kl is not None for r in rows)]
    if not names:
        return []
    shape, layers = ("tiny", 2) if asked.quick else (SHAPE, SHAPE_LAYERS)
    fraction = max(asked.bytes)
    run = key_of(
        weights=[shape, layers, asked.seed],  # random ones, which follow from these
        settings=[fraction, asked.device, asked.backend, {n: methods.method(n).knobs() for n in names}],
        machine=[device_name(asked.device), torch.get_num_threads()],
        definition=DEFINITION,
    )
    folder = out / ("speed-quick" if asked.quick else "speed")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{run}.jsonl"
    if not file.exists():
        found = bench_shape(
            shape,
            dict.fromkeys(names, 0.0),
            byte_fraction=fraction,
            keep=folder / "plans",
            layers=layers,
            rounds=3,
            backend=asked.backend,
            device=asked.device,
            seed=asked.seed,
            stage=stage,
        )
        records.write(file, found)
    return records.read(file)
