"""A study: a claim with its prediction and refutation, stated before it runs; observations; and their analysis.

`observe` runs models and returns arrays. These are stored, so that a stopped study can continue. `analyse` is a pure function
of the arrays, so that tests can give it data with a known answer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from moyu.files import atomic_write_bytes, key_of
from moyu.model.contents import weights_digest
from moyu.model.zoo import corpus
from moyu.research.studies.subject import Subject
from moyu.research.studies.verdicts import Condition, Control, Finding

Observed = Mapping[str, NDArray[Any]]
Progress = Callable[[str, int, int], None]  # (what, done, total)


@dataclass
class Setup:
    """The model, size and seed of a study."""

    model: str | None  # zoo name, local folder or hub id
    quick: bool = False
    seed: int = 0
    cache: Path | None = None  # folder for finished parts; None: nothing is stored
    device: str = "cpu"  # where the model runs
    progress: Progress = field(default=lambda what, done, total: None)
    definition: int = 1  # version of the study

    @cached_property
    def subject(self) -> Subject:
        """The model, loaded when first used."""
        assert self.model is not None
        return Subject.open(self.model, self.device)

    @cached_property
    def made_from(self) -> str:
        """What observations follow from: the weights, the text that this machine has, the size, the seed, the study's version."""
        names = [] if self.model is None else self.model.split(", ")
        subjects = [self.subject] if len(names) == 1 else [Subject.open(name, self.device) for name in names]
        return key_of(
            weights=[weights_digest(subject.model) for subject in subjects],
            text=corpus.versions(),
            settings=[self.quick, self.seed],
            definition=self.definition,
        )

    def size(self, full: int, quick: int) -> int:
        """A number of documents, seeds or steps."""
        return quick if self.quick else full

    def part(self, key: str, make: Callable[[], Observed]) -> Observed:
        """Arrays that are made once for these weights, size and seed, so that a stopped study continues after its last part."""
        if self.cache is None:
            return make()
        file = self.cache / f"{key.replace('/', '-')}-{self.made_from}.npz"
        if file.exists():
            with np.load(file, allow_pickle=False) as arrays:
                return dict(arrays)
        made = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_bytes(file, _packed(made))
        return made

    def untrained_part(self, key: str, make: Callable[[Subject], Observed]) -> Observed:
        """The same of the architecture at random initialisation."""
        return self.part(key, lambda: make(self.subject.untrained(self.seed)))


def _packed(arrays: Observed) -> bytes:
    import io

    buffer = io.BytesIO()
    np.savez_compressed(buffer, **{k: np.asarray(v) for k, v in arrays.items()})  # pyright: ignore[reportArgumentType]
    return buffer.getvalue()


class Study(ABC):
    """One claim. Its class variables are fixed, and printed, before it runs."""

    name: ClassVar[str]
    claim: ClassVar[str]
    prediction: ClassVar[str]
    refutation: ClassVar[str]
    needs: ClassVar[Literal["nothing", "model", "matched models"]] = "model"
    trains: ClassVar[bool] = False
    definition: ClassVar[int] = 1  # one more wherever what is observed or how it is judged changes
    conditions: ClassVar[tuple[Condition, ...]]  # the first is the main one
    controls: ClassVar[tuple[Control, ...]] = ()

    @abstractmethod
    def observe(self, setup: Setup) -> Observed:
        """Run the models. The first axis of an array is usually documents."""

    @abstractmethod
    def analyse(self, observed: Observed) -> Finding:
        """Estimates of the conditions, controls and nulls from the arrays alone."""
