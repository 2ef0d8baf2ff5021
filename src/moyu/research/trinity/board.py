"""A board: the cells of one model, each a record in a file of its own, found again by all that it was made from."""

from __future__ import annotations

import dataclasses
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict

from torch import Tensor

from moyu import methods, records
from moyu.calibration.budget import Reader, Way, plan_for_bytes, ways
from moyu.calibration.context import Context
from moyu.calibration.settings import Stage, quiet
from moyu.errors import UserError
from moyu.files import key_of
from moyu.measure import evaluation, text
from moyu.measure.evaluation import Scores
from moyu.measure.statistics import bootstrap
from moyu.measure.windows import Windows, as_batches
from moyu.model import dissect
from moyu.model.contents import weights_digest
from moyu.plan import Plan
from moyu.records.about import AboutModel
from moyu.records.comparing import means
from moyu.research.trinity.asked import QUANTISE, Asked, Target

DEFINITION = 1  # of a cell and of its timing: one more wherever what is measured changes
VALIDATION = 8  # windows on which ways of spending bytes are compared, at most


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
class Wanted:
    """A cell: a method, or what stands beside methods, at a target, on weights of so many bits (0: of the file's own)."""

    bits: int
    name: str
    target: Target

    @property
    def weights(self) -> str:
        """How file names call the weights."""
        return f"{self.bits}bit" if self.bits else "own"


@dataclass(frozen=True)
class Board(ABC):
    """One model's cells."""

    asked: Asked
    model: str
    out: Path
    stage: Stage = quiet
    opened: Context | None = None  # the model with its text, where it is open already

    @abstractmethod
    def cells(self) -> Iterator[Wanted]:
        """Every cell."""

    @abstractmethod
    def make(self, wanted: Wanted) -> records.Record:
        """Measure a cell."""

    def settings_of(self, wanted: Wanted) -> list[Any]:
        """What decides a cell beside the weights and the text."""
        knobs = None if wanted.name == QUANTISE else methods.method(wanted.name).knobs()
        return [wanted.name, knobs, wanted.bits, str(wanted.target), self.asked.seed, self.asked.quick]

    def fill(self) -> list[records.Record]:
        """Every cell, measured now or before."""
        cells = list(self.cells())
        missing = [c for c in cells if self.known(c) is None]
        if missing:
            _ = self.reference  # before any weight is rounded
        stage = f"scoreboard of {Path(self.model).stem}{self.cost(missing)}"
        for done, wanted in enumerate(missing):
            self.stage(stage, done, len(missing))
            row = self.make(wanted).model_copy(update={"made_from": self.made_from(wanted)})
            records.write(self.file(wanted), [row])
        self.stage(stage, len(missing), len(missing))
        return [row for c in cells if (row := self.known(c)) is not None]

    def cost(self, missing: Sequence[Wanted]) -> str:
        """What the display says of the time that these cells will take."""
        return ""

    def file(self, wanted: Wanted) -> Path:
        """Where a cell is kept."""
        kind = "quick" if self.asked.quick else "full"
        folder = self.out / "cells" / kind / self.model.strip("./").replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        return folder / f"{wanted.name}.{wanted.weights}.{wanted.target}.jsonl"

    def known(self, wanted: Wanted) -> records.Record | None:
        """A cell that was measured before: of these weights and this text, with these settings."""
        file = self.file(wanted)
        rows = records.read(file) if file.exists() else []
        key = self.made_from(wanted)
        return next((row for row in rows if row.made_from == key), None)

    def made_from(self, wanted: Wanted) -> str:
        """All that decides what a cell holds."""
        return key_of(
            weights=self.weights,
            text=[w.digest for w in (self.context.split.calibration, self.validation, self.windows)],
            settings=self.settings_of(wanted),
            definition=DEFINITION,
        )

    @cached_property
    def weights(self) -> str:
        """The digest of the model's weights, taken before any is rounded."""
        return weights_digest(self.context.loaded.model)

    @cached_property
    def context(self) -> Context:
        """The model and its text."""
        return self.opened or Context.open(self.model, self.asked.settings(), self.stage)

    @property
    def documents(self) -> int:
        """Documents that are scored, at most."""
        return self.asked.count()

    @cached_property
    def windows(self) -> Windows:
        """Test windows, the first of each document."""
        test = self.context.split.test
        first = {document: i for i, document in reversed(list(enumerate(test.documents)))}
        chosen = sorted(first.values())[: self.documents]
        if len(chosen) < 2:
            raise UserError(f"the test text of {self.model!r} has {len(chosen)} documents", "give more text")
        return dataclasses.replace(test, tokens=test.tokens[chosen], documents=tuple(test.documents[i] for i in chosen))

    @property
    def validation(self) -> Windows:
        """Validation windows."""
        windows = self.context.split.validation
        return dataclasses.replace(windows, tokens=windows.tokens[:VALIDATION])

    @cached_property
    def reference(self) -> tuple[Tensor, Tensor]:
        """Log-probabilities of the model as it is, on test and on validation windows."""
        return self.predict(self.context.loaded.model, self.windows), self.predict(
            self.context.loaded.model, self.validation
        )

    def predict(self, model: Any, windows: Windows) -> Tensor:
        """Log-probabilities of a dense model."""
        return evaluation.predict(model, windows, self.batch)

    @cached_property
    def batch(self) -> int:
        """Windows that run at once: of a large vocabulary few, because their logits take the memory."""
        vocabulary = dissect.text_config(self.context.loaded.model).vocab_size
        return min(16, len(as_batches(self.context.split.test.tokens[:16], vocabulary)[0]))

    @cached_property
    def _ways(self) -> dict[tuple[str, int], list[Way]]:
        """Of methods and bits: what they have learnt serves every byte fraction."""
        return {}

    def plan_for(self, name: str, reader: Reader, byte_fraction: float) -> Plan:
        """A method's plan for a byte fraction. Raises OutOfReach below its floor."""
        context, key = self.context, (name, reader.bits)
        split = text.Split(context.split.calibration, self.validation, self.windows)
        if key not in self._ways:
            method, windows = methods.method(name), split.calibration
            options = {"name": self.model, "seed": self.asked.seed, "chains": context.chains}
            self._ways[key] = ways(reader, method, windows, **options)
        return plan_for_bytes(self._ways[key], split, byte_fraction, reference=self.reference[1])

    def floor(self, name: str, reader: Reader, plan: Plan, target: Target) -> float:
        """The least byte fraction of a method whose plan is known."""
        spent = self._ways.get((name, reader.bits), []) if target.kind == "bytes" else []
        return max(0.0, min((way.floor(plan) for way in spent), default=reader.floor(plan)))

    @property
    def about(self) -> AboutModel:
        """Fields of every cell that name the model."""
        return self.context.about()

    def measured(
        self, scores: Scores, dense: Scores, random: Scores | None = None, oracle: Scores | None = None
    ) -> Measured:
        """Numbers of a cell, with means by document; the matched references may be of fewer documents, the first ones."""
        found: dict[str, list[float]] = {"nll_dense": means(dense.nll)}
        for kind, one in (("", scores), ("_random", random), ("_oracle", oracle)):
            if one is not None:
                found[f"kl{kind}"], found[f"nll{kind}"] = means(one.kl), means(one.nll)
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


def timer() -> Any:
    """A function that says how many seconds have passed since."""
    start = time.monotonic()
    return lambda: time.monotonic() - start
