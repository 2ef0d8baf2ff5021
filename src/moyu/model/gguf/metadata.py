"""The metadata of a GGUF file, with checks of types and limits."""

from __future__ import annotations

from typing import Any

import numpy as np

from moyu.errors import UserError
from moyu.model.gguf.reader import File

LARGEST = 1 << 31


class Metadata:
    """The metadata of a file, typed. Errors name the key. It knows which entries were asked for."""

    def __init__(self, file: File) -> None:
        """Raises UserError if the file does not name its architecture."""
        self.file = file
        self._asked: set[str] = set()
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

    def number(self, key: str, default: float | None = None, *, zero: bool = False) -> float:
        """A positive finite number of the architecture, with `zero` 0 too. Raises UserError if it is missing or anything else."""
        value = float(self._typed(f"{self.architecture}.{key}", (float, int), default))
        if not (0 < value < float("inf") or (zero and value == 0)):
            raise self.refuse(f"{self.architecture}.{key} is {value}, not a positive number")
        return value

    def flag(self, key: str, default: bool) -> bool:
        """A truth value of the architecture."""
        return bool(self._value(f"{self.architecture}.{key}", bool, default))

    def flags(self, key: str, count: int) -> list[bool] | int | None:
        """Truth values of the first `count` layers, an integer in their place, or None. Raises UserError if there are too few."""
        name = f"{self.architecture}.{key}"
        self._asked.add(name)
        value = self.file.metadata.get(name)
        if isinstance(value, np.ndarray):
            if len(value) < count:
                raise self.refuse(f"{name} is of {len(value)} layers, not {count}")
            return [bool(flag) for flag in value[:count]]
        return value if value is None else self.integer(key, least=0)

    def unread(self) -> dict[str, Any]:
        """The entries of the architecture that nobody asked for, by key without the architecture's name."""
        prefix = f"{self.architecture}."
        return {
            key.removeprefix(prefix): _single(value)
            for key, value in self.file.metadata.items()
            if key.startswith(prefix) and key not in self._asked
        }

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
        value = self._value(key, kind, default)
        if isinstance(value, bool):
            raise self.refuse(f"{key} is {value!r}, of the wrong type")
        return value

    def _value(self, key: str, kind: type | tuple[type, ...], default: Any) -> Any:
        self._asked.add(key)
        value = _single(self.file.metadata.get(key, default))
        if value is None:
            raise self.refuse(f"the metadata lack {key}")
        if isinstance(value, np.ndarray):
            raise self.refuse(f"{key} differs between layers, which MOYU does not support")
        if not isinstance(value, kind):
            raise self.refuse(f"{key} is {value!r:.40}, of the wrong type")
        return value


def _single(value: Any) -> Any:
    """Of one value a layer that are all the same, that value; anything else as it is."""
    same = isinstance(value, np.ndarray) and len(value) and np.all(value == value[0])
    return value[0].item() if same else value
