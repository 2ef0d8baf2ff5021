"""Files that stand beside a model on its board: of the same tokenizer and the same shape, with other weights or other types."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from moyu.errors import UserError
from moyu.files import sha256_of
from moyu.model.gguf.reader import File, read
from moyu.model.named import gguf_file

TOKENS, ARCHITECTURE = "tokenizer.ggml.tokens", "general.architecture"


@dataclass(frozen=True)
class Competitor:
    """A file to compare with."""

    path: Path

    @property
    def name(self) -> str:
        """What its rows are called."""
        return self.path.stem

    @cached_property
    def sha256(self) -> str:
        """Of the file."""
        return sha256_of(self.path)


def assigned(models: Sequence[str], files: Sequence[Path]) -> dict[str, list[Competitor]]:
    """Each model's competitors. Raises UserError for a file that no model has the tokenizer and the shape of, with the reason."""
    found: dict[str, list[Competitor]] = {name: [] for name in models}
    sources = {name: read(path) for name in models if (path := gguf_file(name)) is not None}
    if files and not sources:
        raise UserError("--competitors are files beside a GGUF file", "give one to --models")
    for path in files:
        if not path.is_file():
            raise UserError(f"no file is called {str(path)!r}", "give GGUF files to --competitors")
        other = read(path)
        reasons = {name: difference(own, other) for name, own in sources.items()}
        fit = [name for name, why in reasons.items() if why is None]
        if not fit:
            why = next(iter(reasons.values()))
            raise UserError(
                f"{path.name} cannot be compared with {', '.join(sources)}: {why}", "give files of the same model"
            )
        for name in fit:
            if any(one.name == path.stem for one in found[name]):
                raise UserError(f"two competitors are called {path.stem!r}", "rename one: rows are called by it")
            found[name].append(Competitor(path))
    return found


def difference(one: File, other: File) -> str | None:
    """In what two files differ beside their weights; None: in nothing that a comparison needs."""
    for key in (ARCHITECTURE, TOKENS):
        if not np.array_equal(one.metadata.get(key, []), other.metadata.get(key, [])):
            return f"another {'tokenizer' if key == TOKENS else 'architecture'}"
    shared = one.tensors.keys() & other.tensors.keys()
    for name in sorted(shared):
        if one.tensors[name].shape != other.tensors[name].shape:
            return f"{name} is {other.tensors[name].shape}, not {one.tensors[name].shape}"
    left = {n for n in one.tensors.keys() ^ other.tensors.keys() if n.startswith("blk.")}
    return f"only one of them has {min(left)}" if left else None
