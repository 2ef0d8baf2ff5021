"""The rows of a table: the source file, llama.cpp's files that are made from it, and plans on it, on the same text."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from benchmarks.cpu.gguf_file import quantised
from benchmarks.quants import importance
from benchmarks.quants.documents import Texts
from torch import Tensor

from moyu import records
from moyu.files import key_of, sha256_of
from moyu.measure import evaluation
from moyu.measure.evaluation import Scores
from moyu.measure.sizes import Size, opened
from moyu.measure.windows import as_batches
from moyu.model import dissect
from moyu.model.anatomy import Anatomy
from moyu.model.gguf.reader import File
from moyu.plan import Plan
from moyu.records import Comparison
from moyu.records.about import about_model
from moyu.records.comparing import comparison

TYPES = (  # of files: a mixture of llama.cpp's, one with another type of the embedding and the head, or one type throughout
    "Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", "Q4_K_M", "Q4_K_S", "IQ4_XS", "IQ4_NL", "Q4_0",
    "Q3_K_L", "Q3_K_M", "Q3_K_S", "Q2_K",
    "Q4_K_M head Q5_0", "Q3_K_M head Q5_0", "Q3_K_M head Q4_0", "Q4_0 pure", "IQ4_NL pure", "Q3_K_S pure", "Q2_K pure",
)  # fmt: skip
INDIFFERENT = ("Q8_0",)  # types that llama.cpp makes the same with an importance matrix
CHOICES = ("own", "random", "oracle")  # of units: a plan's, and those of its nulls
DEFINITION = 1  # of a row: one more wherever what is measured changes


@dataclass(frozen=True)
class Asked:
    """A row: the source, a file of a type, or a plan with its own choice of units or a matched one."""

    row: str = "source"
    importance: bool = False
    plan: Path | None = None
    nulls: bool = False
    given: Path | None = None  # a file of the same model that was made elsewhere, as by `moyu pack`
    of: Path | None = None  # the given file that a plan is of; None: the source

    def making(self) -> dict[str, Any]:
        """Of a file, what llama.cpp's quantiser is told."""
        kind, _, head = self.row.removesuffix(" pure").partition(" head ")
        return {"kind": kind, "head": head or None, "pure": self.row.endswith(" pure")}

    @property
    def file(self) -> str:
        """What a file of this row is called."""
        return f"{self.row.replace(' ', '-')}{'-importance' if self.importance else ''}.gguf"

    def __str__(self) -> str:
        return f"{self.row} with importance" if self.importance else self.row


@dataclass(frozen=True)
class Table:
    """One source on one text; a row that `out` has is not measured again."""

    source: Path
    texts: Texts
    out: Path
    work: Path
    threads: int = 0  # of llama.cpp's quantiser
    keep: bool = False  # the files that are made

    def fill(self, asked: Sequence[Asked]) -> Iterator[Comparison]:
        """The rows, measured now or before."""
        self.work.mkdir(parents=True, exist_ok=True)
        for one in asked:
            found = self.known(one)
            if len(found) < (len(CHOICES) if one.nulls else 1):
                there = {r.choice for r in found}
                fresh = [row for row in self.measure(one) if row.choice not in there]
                for row in fresh:
                    records.append(self.out, row)
                found += fresh
            yield from found

    def known(self, asked: Asked) -> list[Comparison]:
        """Rows that were measured before: of this source and this text, made in this way."""
        rows = records.read(self.out) if self.out.exists() else []
        return [r for r in rows if isinstance(r, Comparison) and r.made_from == self.made_from(asked)]

    def made_from(self, asked: Asked) -> str:
        """All that decides what a row holds."""
        return key_of(
            weights=self.sha256,
            text=[self.texts.scored.digest, self.texts.calibration.digest if asked.importance else None],
            settings=[asked.row, asked.nulls, None if asked.plan is None else Plan.load(asked.plan).hash],
            definition=DEFINITION,
            **({} if asked.given is None else {"file": sha256_of(asked.given)}),
            **({} if asked.of is None else {"of": sha256_of(asked.of)}),
        )

    def make(self, asked: Asked, path: Path) -> Path:
        """The file of a type, at `path`."""
        matrix = self.matrix if asked.importance else None
        return quantised(self.source, path, **asked.making(), importance=matrix, threads=self.threads)

    def measure(self, asked: Asked) -> list[Comparison]:
        """The rows of what was asked for: a plan with its nulls is several."""
        _ = self.reference
        if asked.plan is not None:
            return self._plan(asked, Plan.load(asked.plan))
        if asked.row == "source":
            file, model, anatomy, size = self._opened
            return [self._row(asked, "source", model, anatomy, size, self._scores(), file=file)]
        path = asked.given or self.make(asked, self.work / f"{self.sha256[:16]}-{asked.file}")
        file, model, anatomy, size = opened(path)
        made = {"file_sha256": sha256_of(path), "made_by": made_by() if asked.given is None else "moyu pack"}
        if asked.importance:
            made["importance"] = self.texts.calibration.digest
        row = self._row(asked, "file", model, anatomy, size, self._scores(model), file=file, **made)
        if not self.keep and asked.given is None:
            path.unlink()
        return [row]

    def _plan(self, asked: Asked, plan: Plan) -> list[Comparison]:
        """A plan on the source: its own choice and, where they are asked for, the matched random and oracle's."""
        file, model, anatomy, size = self._opened if asked.of is None else opened(asked.of)
        found = evaluation.evaluate(
            model,
            plan,
            self.texts.scored,
            matched=asked.nulls,
            batch=len(as_batches(self.texts.scored.tokens, self.reference.shape[-1])[0]),
            anatomy=anatomy,
            reference=self.reference,
        )
        step = found.byte_fraction * size.moyu
        with_head = any(site.skips == "words" for site in plan.sites())
        layers = None if with_head else step - (size.moyu - size.layers_moyu)
        own = Size(step, step, layers, size.layers_moyu, size.weights)
        choices = dict(zip(CHOICES, (found.method, found.random, found.oracle), strict=True))
        return [
            self._row(asked, "plan", model, anatomy, own, scores, file=file, choice=choice, plan=plan.hash)
            for choice, scores in choices.items()
            if scores is not None
        ]

    def _row(
        self,
        asked: Asked,
        what: str,
        model: Any,
        anatomy: Anatomy,
        size: Size,
        scores: Scores,
        *,
        file: File,
        **more: Any,
    ) -> Comparison:
        """The record of a row."""
        about = {**about_model(self.source.stem, model, anatomy), "made_from": self.made_from(asked)}
        about |= {"row": asked.row, "what": what, "source_sha256": self.sha256, "tensors": file.formats()}
        return comparison(about, size, scores, self.reference, self.texts.scored, **more)

    def _scores(self, model: Any = None) -> Scores:
        """Of a whole model, or the source, against the source, a batch at a time."""
        windows, start, parts = self.texts.scored, 0, []
        for tokens in as_batches(windows.tokens, self.reference.shape[-1]):
            some = dataclasses.replace(windows, tokens=tokens)
            reference = self.reference[start : start + len(tokens)]
            parts.append(
                evaluation.score(reference, reference if model is None else evaluation.predict(model, some), some)
            )
            start += len(tokens)
        return Scores(*(torch.cat([getattr(p, name) for p in parts]) for name in ("nll", "kl", "agree")))

    @cached_property
    def sha256(self) -> str:
        """Of the source."""
        return sha256_of(self.source)

    @cached_property
    def _opened(self) -> tuple[File, Any, Anatomy, Size]:
        return opened(self.source)

    @cached_property
    def reference(self) -> Tensor:
        """The source's log-probabilities (B, T - P - 1, V): a mapped file, because those of a large vocabulary take gigabytes."""
        windows = self.texts.scored
        path = self.work / f"{self.sha256[:16]}-{windows.digest}.logs"
        if not path.exists():
            model, part = self._opened[1], path.with_suffix(".part")
            with part.open("wb") as file:
                for tokens in as_batches(windows.tokens, dissect.text_config(model).vocab_size):
                    file.write(evaluation.predict(model, dataclasses.replace(windows, tokens=tokens)).numpy().tobytes())
            part.replace(path)
        count, length = windows.tokens.shape
        found = torch.from_file(str(path), size=path.stat().st_size // 4)
        return found.view(count, length - windows.prompt - 1, -1)

    @cached_property
    def matrix(self) -> dict[str, Any]:
        """The importance matrix, from its file."""
        windows = self.texts.calibration
        path = self.work / f"{self.sha256[:16]}-{windows.digest}.imatrix.gguf"
        if not path.exists():
            file, model, _, _ = self._opened
            part = path.with_suffix(".part")
            importance.write(part, importance.measure(file, model, windows), windows)
            part.replace(path)
        return importance.load(path)


def made_by() -> str:
    """llama.cpp, by the package that brings it."""
    import llama_cpp

    return f"llama-cpp-python {llama_cpp.__version__}"
