"""The metadata of a GGUF file, with checks of types and limits."""

from __future__ import annotations

from typing import Any

import numpy as np

from moyu.errors import UserError
from moyu.model.gguf.reader import File

LARGEST = 1 << 31


class Metadata:
    """The metadata of a file, typed. Errors name the key."""

    def __init__(self, file: File) -> None:
        """Raises UserError if the file does not name its architecture."""
        self.file = file
        self.architecture = self._typed("general.architecture", str)

    def refuse(self, reason: str, remedy: str = "convert the model again with a current llama.cpp") -> UserError:
        """The error to raise for a file that cannot be loaded: the reason and what to do."""
        return UserError(f"{self.file.path}: {reason}", remedy)

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        """An integer of the architecture, in least .. 2^31 - 1. Raises UserError if it is missing or out of range."""
        value = self._typed(f"{self.architecture}.{key}", int, default)
        if not least <= value < LARGEST:
            raise self.refuse(f"{self.architecture}.{key} is {value}, not in {least} .. {LARGEST - 1}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive finite number of the architecture. Raises UserError if it is missing or anything else."""
        value = float(self._typed(f"{self.architecture}.{key}", (float, int), default))
        if not 0 < value < float("inf"):
            raise self.refuse(f"{self.architecture}.{key} is {value}, not a positive number")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string of the architecture. Raises UserError if it is missing."""
        return self._typed(f"{self.architecture}.{key}", str, default)

    def token(self, name: str) -> int | None:
        """The id of a special token; None if the file names none. Raises UserError for an id outside the vocabulary."""
        key = f"tokenizer.ggml.{name}_token_id"
        if key not in self.file.metadata:
            return None
        value = self._typed(key, int)
        if not 0 <= value < self.vocabulary:
            raise self.refuse(f"{key} is {value}, in a vocabulary of {self.vocabulary}")
        return value

    def has(self, tensor: str) -> bool:
        """Whether the file has a tensor of this name."""
        return tensor in self.file.tensors

    @property
    def vocabulary(self) -> int:
        """The number of tokens: rows of the embedding."""
        if not self.has("token_embd.weight"):
            raise self.refuse("there is no tensor token_embd.weight")
        return self.file.tensors["token_embd.weight"].shape[0]

    def _typed(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        value = self.file.metadata.get(key, default)
        if value is None:
            raise self.refuse(f"the metadata lack {key}")
        if isinstance(value, np.ndarray):
            raise self.refuse(f"{key} differs between layers, which MOYU does not support")
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.refuse(f"{key} is {value!r:.40}, of the wrong type")
        return value
