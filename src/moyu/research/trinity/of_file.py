"""The board of a quantised file: methods on the file's own weights, and other files beside them on the same windows.

The reference is the file itself, targets are fractions of the bytes that a step of it reads, and what competes with a method is a
file of as many bytes. Bits a weight are over the weights that a token is multiplied with, those of the head included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from moyu import methods, records
from moyu.calibration.budget import Reader
from moyu.errors import OutOfReach, UserError, line_of
from moyu.files import sha256_of
from moyu.measure import accounting, evaluation
from moyu.measure.evaluation import Scores
from moyu.measure.sizes import Size, in_sixteen_bits, opened
from moyu.measure.windows import Windows
from moyu.methods.base import Method
from moyu.model.gguf.reader import read
from moyu.model.named import gguf_file
from moyu.records.about import AboutModel, about_method, about_model, about_plan
from moyu.records.comparing import comparison
from moyu.research.trinity.asked import FILE_MATCHED, Target
from moyu.research.trinity.board import Board, Wanted, timer
from moyu.research.trinity.competitors import Competitor

SOURCE = "source"
BARE = ("random", "oracle", "oracle-greedy")  # references themselves: none beside them
# What a cell takes, in dense runs of a window: of SmolLM2-135M on one core.
SCORED, MATCHED, FITTED, DIVIDED, TRAINED = 1.5, 4.0, 1.5, 70, 60


@dataclass(frozen=True)
class FileBoard(Board):
    """The cells of a quantised file."""

    competitors: Sequence[Competitor] = ()

    def cells(self) -> Iterator[Wanted]:
        yield Wanted(0, SOURCE, Target("file"))
        for one in self.competitors:
            yield Wanted(0, one.name, Target("file"))
        for name in self.asked.names(of_file=True):
            if not methods.method_class(name).solves_target:
                yield Wanted(0, name, Target("native"))
                continue
            for value in self.asked.fractions(of_file=True):
                yield Wanted(0, name, Target("bytes", value))

    def settings_of(self, wanted: Wanted) -> list[Any]:
        if wanted.target.kind == "file":
            one = self._competitor(wanted)
            return ["file", self.sha256 if one is None else one.sha256]
        return [*super().settings_of(wanted), FILE_MATCHED]

    def make(self, wanted: Wanted) -> records.Record:
        if wanted.target.kind != "file":
            return self.measure(wanted.name, wanted.target)
        one = self._competitor(wanted)
        return self.source() if one is None else self.compete(one)

    @property
    def documents(self) -> int:
        return self.asked.count(of_file=True)

    def cost(self, missing: Sequence[Wanted]) -> str:
        """The time that cells will take, from one dense run of a window and what kinds of cells took beside it."""
        if not missing:
            return ""
        seconds = timer()
        self.predict(self.context.loaded.model, _first(self.windows, 2))
        pace, count, runs = seconds() / 2, len(self.windows.tokens), 0.0
        calibration, seen = len(self.context.split.calibration.tokens), set[str]()
        for wanted in missing:
            if wanted.target.kind == "file":
                runs += count
            elif self._reached(wanted):
                method = methods.method_class(wanted.name)
                runs += SCORED * count + MATCHED * min(FILE_MATCHED, count) + FITTED * calibration
                if wanted.name not in seen:
                    runs += DIVIDED * method.divides + TRAINED * method.trains
                seen.add(wanted.name)
        return f", {len(missing)} cells, some {max(1, round(runs * pace / 60))} minutes"

    def _reached(self, wanted: Wanted) -> bool:
        model, anatomy = self.context.loaded.model, self.context.anatomy
        able = bool(self.context.applicable([wanted.name])[0])
        least = accounting.floor(model, anatomy, methods.method(wanted.name))
        return able and (wanted.target.kind != "bytes" or least < wanted.target.value)

    def _competitor(self, wanted: Wanted) -> Competitor | None:
        return next((one for one in self.competitors if one.name == wanted.name), None)

    @cached_property
    def path(self) -> Path:
        """Of the file."""
        path = gguf_file(self.model)
        assert path is not None
        return path

    @property
    def about(self) -> AboutModel:
        return {**super().about, "model": self.path.stem}

    # ----------------------------------------------------------------------------------------------------------- files

    @cached_property
    def size(self) -> Size:
        """Bytes of a dense step."""
        return Size.of(self.context.loaded.model, self.context.anatomy)

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return sha256_of(self.path)

    def source(self) -> records.Comparison:
        """The file itself."""
        reference, _ = self.reference
        scores = evaluation.score(reference, reference, self.windows)
        about = {**self.about, "row": self.path.stem, "what": "source", "tensors": read(self.path).formats()}
        return comparison(about, self.size, scores, reference, self.windows, source_sha256=self.sha256)

    def compete(self, one: Competitor) -> records.Comparison:
        """Another file on the same windows."""
        file, model, anatomy, size = opened(one.path)
        model = model.to(next(self.context.loaded.model.parameters()).device)
        reference, _ = self.reference
        scores = evaluation.score(reference, self.predict(model, self.windows), self.windows)
        about = {
            **about_model(self.path.stem, model, anatomy),
            "row": one.name,
            "what": "file",
            "tensors": file.formats(),
        }
        digests = {"source_sha256": self.sha256, "file_sha256": one.sha256}
        return comparison(about, size, scores, reference, self.windows, **digests)

    # --------------------------------------------------------------------------------------------------------- methods

    def measure(self, name: str, target: Target) -> records.Cell:
        """A method's cell, or the reason why it has none."""
        method = methods.method(name)
        if not self.context.applicable([name])[0]:
            return self._empty(method, target, "nothing to skip")
        reader = Reader(self.context.loaded.model, self.context.anatomy)
        seconds = timer()
        try:
            if target.kind == "bytes":
                plan = self.plan_for(name, reader, target.value * self.size.file / self.size.moyu)
            else:
                plan = self.context.plan(name, sparsity=0.0)
        except OutOfReach as error:
            least = error.floor * self.size.moyu / self.size.file
            return self._empty(method, target, f"floor {least:.2f}", least)
        except (UserError, torch.linalg.LinAlgError) as error:  # pyright: ignore[reportPrivateImportUsage]
            return self._empty(method, target, line_of(error))
        fit_s = seconds()
        quality = evaluation.evaluate(
            self.context.loaded.model,
            plan,
            self.windows,
            matched=0 if name in BARE else FILE_MATCHED,
            batch=self.batch,
            anatomy=self.context.anatomy,
            reference=self.reference[0],
        )
        read_bytes = quality.byte_fraction * self.size.moyu
        return self._cell(
            {**about_plan(plan), "target_sparsity": None},
            target,
            realized_sparsity=quality.realized_sparsity,
            byte_fraction=read_bytes / self.size.file,
            byte_fraction_16=read_bytes / self._sixteen,
            step_bytes=read_bytes,
            bits_per_weight=8 * read_bytes / self._weights,
            floor=self.floor(name, reader, plan, target) * self.size.moyu / self.size.file,
            knobs=plan.method.knobs(),
            site_knobs=plan.site_knobs,
            fit_s=fit_s,
            **self._scores(quality),
        )

    def _scores(self, quality: evaluation.Quality) -> dict[str, Any]:
        matched: list[Scores | None] = [quality.random, quality.oracle]
        return {**self.measured(quality.method, quality.dense, *matched)}

    def _empty(self, method: Method, target: Target, why: str, floor: float | None = None) -> records.Cell:
        return self._cell(
            {**about_method(method), "target_sparsity": None, "kv_policy": None},
            target,
            floor=floor,
            status=f"n/a ({why})",
        )

    def _cell(self, about: dict[str, Any], target: Target, **more: Any) -> records.Cell:
        return records.Cell.model_validate(
            {
                "kind": "cell",
                **self.about,
                **about,
                "protocol": self.context.protocol,
                "corpus": {**self.windows.source, "digest": self.windows.digest},
                "quick": self.asked.quick,
                "simulated": True,
                "weight_bits": self.size.bits,
                "target_byte_fraction": target.value if target.kind == "bytes" else None,
                **more,
            }
        )

    @cached_property
    def _sixteen(self) -> float:
        return in_sixteen_bits(self.context.loaded.model, self.context.anatomy)

    @cached_property
    def _weights(self) -> float:
        return accounting.step_weights(self.context.loaded.model, self.context.anatomy)


def _first(windows: Windows, count: int) -> Windows:
    return dataclasses.replace(windows, tokens=windows.tokens[:count], documents=windows.documents[:count])
