"""Write a GGUF file, version 3: metadata and descriptions first, then tensors in any order, each at its place.

The file appears under its name when it is whole.
"""

from __future__ import annotations

import os
import struct
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moyu.model.gguf.reader import ALIGNMENT, ARRAY, BLOCKS, FLOAT32, KINDS, MAGIC, NUMBERS, STRING

NUMBER_OF = {kind: number for number, kind in KINDS.items()}
UINT32, INT32, BOOL, UINT64, INT64 = 4, 5, 7, 10, 11
TYPE_OF = {np.dtype(dtype): number for number, dtype in NUMBERS.items()}
KEPT_OUT = ("split.no", "split.count", "split.tensors.count", "general.alignment")  # true of another file alone


class Writer:
    """A file that is being written: `with Writer(...) as file: file.put(name, tensor)` for every tensor."""

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, tuple[tuple[int, ...], str]]
    ) -> None:
        """tensors: shape, rows first, and type of each. metadata: strings, numbers, lists of strings, arrays of numpy."""
        self.path, self._left = path, dict(tensors)
        pairs = {key: value for key, value in metadata.items() if key not in KEPT_OUT}
        head = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(pairs))]
        head += [_string(key) + _typed(value) for key, value in pairs.items()]
        self._at, at = {}, 0
        for name, (shape, kind) in tensors.items():
            sides = shape[::-1]
            head.append(_string(name) + struct.pack(f"<I{len(sides)}QIQ", len(sides), *sides, NUMBER_OF[kind], at))
            self._at[name] = at
            at += _aligned(nbytes(shape, kind))
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        self._temporary, self._file = Path(temporary), os.fdopen(handle, "wb")
        try:
            start = self._file.write(b"".join(head))
            self._start = _aligned(start)
            self._file.truncate(self._start + at)
        except BaseException:
            self._drop()
            raise

    def put(self, name: str, tensor: Tensor) -> None:
        """Write a tensor: its numbers in the type that was announced, or its blocks (q, bytes) uint8. ValueError for another size."""
        raw = tensor.contiguous().view(torch.uint8).numpy()
        if raw.nbytes != (expected := nbytes(*self._left.pop(name))):
            raise ValueError(f"{name} has {raw.nbytes} bytes, but {expected} were announced")
        self._file.seek(self._start + self._at[name])
        self._file.write(raw.data)

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None and self._left:
            self._drop()
            raise ValueError(f"{len(self._left)} tensors were not written, among them {next(iter(self._left))}")
        if kind is not None:
            self._drop()
            return
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            umask = os.umask(0)
            os.umask(umask)
            self._temporary.chmod(0o666 & ~umask)
            self._temporary.replace(self.path)
        except BaseException:
            self._drop()
            raise

    def _drop(self) -> None:
        self._file.close()
        self._temporary.unlink(missing_ok=True)


def nbytes(shape: tuple[int, ...], kind: str) -> int:
    """Bytes of a tensor of a type."""
    weights, size = BLOCKS[kind]
    return prod(shape) // weights * size


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _string(text: str) -> bytes:
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    """A value with its type before it."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, bool):
        return struct.pack("<I?", BOOL, value)
    if isinstance(value, int):
        for number, least, end in ((UINT32, 0, 1 << 32), (INT32, -(1 << 31), 0), (UINT64, 0, 1 << 64)):
            if least <= value < end:
                return struct.pack("<I", number) + np.array(value, NUMBERS[number]).tobytes()
        return struct.pack("<Iq", INT64, value)
    if isinstance(value, float):
        return struct.pack("<If", FLOAT32, value)
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", ARRAY, TYPE_OF[value.dtype], len(value)) + value.tobytes()
    return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(_string(text) for text in value)
