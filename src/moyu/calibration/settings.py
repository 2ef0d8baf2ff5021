"""What a user asks for, checked before anything is loaded. Imports torch alone, so that mistakes are named at once."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moyu import methods
from moyu.errors import UserError, check_one_of
from moyu.kernels import BackendName
from moyu.model import machine

DEFAULT_METHODS = ("cett", "cats", "teal", "estimate", "levels", "griffin", "tda", "popularity")
DEFAULT_SPARSITY = 0.5
# How sites divide a sparsity; `moyu.calibration.allocation` does it.
ALLOCATIONS = ("uniform", "greedy", "search", "fisher")

WINDOWS = (16, 32)  # of text to calibrate and to test on, at most
SMALL = 200e6  # weights that a token meets; a larger model on a CPU has fewer windows, in proportion
MATCHED = 5.5e8  # such weights times windows, up to which the matched references of a run are measured on a CPU

Stage = Callable[[str, int, int], None]  # (name of the stage, done, all)


def quiet(name: str, done: int, total: int) -> None:
    """A progress display that shows nothing."""


def default_methods(boundary: int) -> tuple[str, ...]:
    """The methods of a run that names none; without a dense prompt those that need none."""
    return tuple(m for m in DEFAULT_METHODS if boundary or methods.method_class(m).granularity != "sequence")


def knobs_of(name: str) -> set[str]:
    """The names of a method's knobs."""
    return {f.name for f in dataclasses.fields(methods.method_class(name))}


@dataclass(frozen=True)
class Settings:
    """What a run was asked for."""

    methods: Sequence[str] = DEFAULT_METHODS
    knobs: Mapping[str, Any] = field(default_factory=dict)  # each goes to the methods that have it
    sparsity: float | None = None
    bytes: float | None = None
    bias: bool = False
    centre: bool = False
    learn_bias: int = 0  # steps
    allocation: str = "uniform"  # of ALLOCATIONS
    text: str | Path | Sequence[str] | None = None  # a file, the text itself, or documents; None: MOYU's own
    by_document: bool = False  # windows of the text lie inside its documents
    prompt: str | None = None
    window: int = 256
    boundary: int = 128
    calibration: int | None = None  # windows; None: WINDOWS, or fewer for a large model on a CPU
    test: int | None = None
    new_tokens: int = 48
    seed: int = 0
    backend: BackendName = "auto"
    strict: bool = False  # refuse a decode step that is not the fastest there is
    device: str = "cpu"
    dense_layers: tuple[int, ...] = ()  # left alone; -1 is the last
    weights: str | None = None  # of machine.WEIGHTS; None: as the checkpoint has them

    def target(self) -> float:
        """The sparsity asked for."""
        return DEFAULT_SPARSITY if self.sparsity is None else self.sparsity

    def windows(self, weights: float) -> tuple[int, int]:
        """How many windows calibrate and how many test a model of which a token meets so many weights."""
        share = 1.0 if self.device != "cpu" else min(1.0, SMALL / max(weights, 1.0))
        least, usual = (4, 8), (round(count * share) for count in WINDOWS)
        few = [max(*pair) for pair in zip(least, usual, strict=True)]
        asked = (self.calibration, self.test)
        return tuple(own if own is not None else count for own, count in zip(asked, few, strict=True))  # pyright: ignore

    def matched(self, weights: float) -> int | bool:
        """On how many windows the matched references are measured; True: on all."""
        return True if self.device != "cpu" or self.test is not None else max(2, int(MATCHED / weights))

    def knobs_for(self, name: str) -> dict[str, Any]:
        """Those of the knobs that a method has."""
        own = knobs_of(name)
        return {knob: value for knob, value in self.knobs.items() if knob in own}

    def check(self) -> None:
        """Refuse what cannot be run, before anything is loaded."""
        self._check_numbers()
        self._check_methods()
        machine.check(self.device, self.backend, self.weights)

    def _check_numbers(self) -> None:
        if self.sparsity is not None and self.bytes is not None:
            raise UserError("both a sparsity and a byte fraction are given", "give one of --sparsity and --bytes")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise UserError(f"sparsity must be in [0, 1), not {self.sparsity}", "0.5 skips half of the units")
        if self.bytes is not None and not 0 < self.bytes <= 1:
            raise UserError(f"byte fraction must be in (0, 1], not {self.bytes}", "0.6 reads 60 % of the dense bytes")
        if self.learn_bias < 0:
            raise UserError(f"--learn-bias must not be negative, not {self.learn_bias}", "100 steps, for example")
        if not 0 <= self.boundary < self.window - 1:
            raise UserError(
                f"a prompt of {self.boundary} tokens leaves nothing to score in windows of {self.window}",
                "use --prompt-tokens smaller than --window by at least 2",
            )
        check_one_of("allocation is", self.allocation, ALLOCATIONS)

    def _check_methods(self) -> None:
        legal = {name: knobs_of(name) for name in self.methods}
        for knob in self.knobs:
            if not any(knob in own for own in legal.values()):
                every = sorted(set().union(*legal.values()))
                near = difflib.get_close_matches(knob, every, n=1, cutoff=0.3)
                hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(every) or 'no knobs'}"
                raise UserError(f"no knob is called {knob!r} in {', '.join(legal)}", hint)
        given = {"--sparsity": self.sparsity, "--bytes": self.bytes}
        told = [option for option, value in given.items() if value is not None]
        if told and not any(methods.method_class(name).solves_target for name in self.methods):
            raise UserError(
                f"{told[0]} would do nothing (the model decides what {', '.join(legal)} skips)", "leave it out"
            )
        for name in self.methods:
            methods.method(name, **self.knobs_for(name))
            if methods.method_class(name).granularity == "sequence" and self.boundary == 0:
                raise UserError(f"method {name!r} decides from the prompt", "use --prompt-tokens of at least 1")
