"""Words that a user writes after an option, checked while the command line is read: a typo is answered before torch is imported.

The lists of names here are those of the modules that use them, which import torch; a test compares the two.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from moyu import methods
from moyu.errors import UserError, check_one_of
from moyu.model import named, zoo

BACKENDS = ("auto", "cpu", "gpu", "reference")  # auto, and kernels.BACKENDS
WEIGHTS = ("bf16", "q8_0", "q4_0")  # machine.WEIGHTS
ALLOCATIONS = ("uniform", "greedy", "search", "fisher")  # settings.ALLOCATIONS
SHAPES = ("llama-3.2-1b", "llama-3.2-3b", "llama-3-8b", "qwen2.5-0.5b", "tiny")  # loading.SHAPES
PACKED = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0")  # packer.TYPES
DEVICE = r"(cpu|cuda|mps|xpu|hpu|xla|meta)(:\d+)?"


def one_of(kind: str, legal: Sequence[str]) -> Callable[[str | None], str | None]:
    """A check that a word is one of these."""

    def check(word: str | None) -> str | None:
        if word is not None:
            check_one_of(kind, word, legal)
        return word

    return check


backend = one_of("back end is", BACKENDS)
weights = one_of("weights are", WEIGHTS)
allocation = one_of("allocation is", ALLOCATIONS)
packed = one_of("type is", PACKED)
shape = one_of("shape is", SHAPES)
shape_or_none = one_of("shape is", (*SHAPES, "none"))


def model(word: str | None) -> str | None:
    """A model's name."""
    if word is not None:
        named.check_name(word)
    return word


def model_list(words: list[str] | None) -> list[str] | None:
    """Names of models."""
    for word in words or ():
        named.check_name(word)
    return words


def embedded(word: str) -> str:
    """The name of an embedded model."""
    zoo.path(word)
    return word


def method(word: str) -> str:
    """A method's name."""
    methods.check_name(word)
    return word


def method_list(words: list[str] | None) -> list[str] | None:
    """Names of methods."""
    for word in words or ():
        methods.check_name(word)
    return words


def device(word: str) -> str:
    """A device's name. Whether it can be used here, torch says."""
    if not re.fullmatch(DEVICE, word):
        raise UserError(f"no device is called {word!r}", "write cpu, cuda, or cuda:1 for the second GPU")
    return word


def sparsity(value: float | None) -> float | None:
    """A fraction of units."""
    if value is not None and not 0 <= value < 1:
        raise UserError(f"sparsity must be in [0, 1), not {value}", "0.5 skips half of the units")
    return value


def byte_fraction(value: float | None) -> float | None:
    """A fraction of bytes."""
    if value is not None and not 0 < value <= 1:
        raise UserError(f"byte fraction must be in (0, 1], not {value}", "0.6 reads 60 % of the dense bytes")
    return value


def text(file: Path | None) -> Path | None:
    """A file of text."""
    if file is not None:
        try:
            with open(file, "rb"):
                pass
        except OSError as error:
            raise UserError(
                f"cannot read text {str(file)!r} ({error.strerror})", "give a readable text file to --text"
            ) from error
    return file


def plan(folder: Path | None) -> Path | None:
    """A plan's folder."""
    if folder is not None and not (folder / "plan.json").is_file():
        missing = os.strerror(2)
        raise UserError(f"no plan in {folder} ({missing})", _plans_beside(folder))
    return folder


def plan_list(folders: list[Path] | None) -> list[Path] | None:
    """Folders of plans."""
    for folder in folders or ():
        plan(folder)
    return folders


def _plans_beside(folder: Path) -> str:
    """The next step where there is no plan: the nearest one in the same place, if there is one."""
    places = (folder.parent, folder)
    found = [p.parent for place in places if place.is_dir() for p in place.glob("*/plan.json")]
    near = difflib.get_close_matches(str(folder), map(str, found), n=1, cutoff=0.6) or [str(p) for p in found[:1]]
    return f"did you mean {near[0]}?" if near else "make it with `moyu calibrate`"


def complete_models() -> list[str]:
    """What the shell offers as a model beside files."""
    return list(zoo.names())
