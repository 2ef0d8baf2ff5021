"""Read a GGUF file, version 2 or 3: metadata and tensors. Every length is checked against the file before it is used.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. It is little-endian: magic, version, two counts, the
pairs of metadata, the descriptions of tensors, and from the next multiple of the alignment on the tensors themselves.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from moyu.errors import UserError
from moyu.weights import FORMATS, IN_FILES, held

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT, LARGEST_ALIGNMENT = 32, 1 << 16  # the default, and the largest that is accepted
FLOAT32, STRING, ARRAY = 6, 8, 9  # types of metadata; the others are numbers
NUMBERS = {
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip
# More than any model has, and few enough that a file with false counts is read quickly.
MOST = {"pairs of metadata": 1 << 16, "tensors": 1 << 17, "strings in arrays": 1 << 22}
LONGEST_KEY, LONGEST_NAME, MOST_DIMENSIONS = 65535, 64, 4  # bytes, bytes: limits of the format and of ggml

# Types of tensors by their number in the file; for supported types, the weights that share a scale and their bytes.
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_TAKEN = {name: held(torch.empty(0, 1, dtype=dtype), "rows").format for name, dtype in DTYPES.items()}
_TAKEN |= {name.upper(): FORMATS[name] for name in IN_FILES}
KINDS = {f.ggml: name for name, f in _TAKEN.items()}
BLOCKS = {name: (f.block, f.block_bytes) for name, f in _TAKEN.items()}
OTHERS = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4",
}  # fmt: skip

# A model in several files: which part a file is, from 0, how many there are, and the tensors in all of them.
NUMBER, COUNT, TOTAL = "split.no", "split.count", "split.tensors.count"
_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
DAMAGED = "the file is damaged or not a GGUF file: download or convert it again"


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its shape in torch's order (rows first), its type and its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str  # of BLOCKS
    offset: int  # from the beginning of the file
    nbytes: int
    part: int = 0  # of a model in several files


@dataclass(frozen=True)
class File:
    """The content of a file, or of several that are one model.

    Metadata are numbers, strings, lists of strings and arrays of numbers. Of a model in several files `path` is the one that was given.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Entry]
    mapped: tuple[mmap.mmap, ...]

    def formats(self) -> str:
        """How many tensors there are of each type, and the bits of a weight, for instance "169 Q4_K, 141 F32: 4.51 bits a weight"."""
        kinds = Counter(entry.kind for entry in self.tensors.values())
        weights = sum(prod(entry.shape) for entry in self.tensors.values())
        bits = 8 * sum(entry.nbytes for entry in self.tensors.values()) / max(weights, 1)
        return f"{', '.join(f'{count} {kind}' for kind, count in kinds.most_common())}: {bits:.2f} bits a weight"

    def stored(self, name: str) -> Tensor:
        """The raw bytes of a tensor, (rows, bytes of a row) uint8: a view of the mapped file."""
        entry = self.tensors[name]
        flat = torch.frombuffer(self.mapped[entry.part], dtype=torch.uint8, count=entry.nbytes, offset=entry.offset)
        return flat.view(prod(entry.shape[:-1]), -1)

    def values(self, name: str) -> Tensor:
        """A tensor of numbers in its own type and shape: a view of the mapped file. KeyError if it is quantised."""
        entry = self.tensors[name]
        return self.stored(name).view(DTYPES[entry.kind]).view(entry.shape)


def read(path: Path) -> File:
    """Read metadata and descriptions, and map the tensors. Any part stands for a model in several files.

    Raises UserError, with the offset, for a damaged file, and for parts that are missing or do not belong together.
    """
    file = _read(path)
    count = file.metadata.get(COUNT, 1)
    if not isinstance(count, int):
        raise UserError(f"{path}: {COUNT} is not an integer", DAMAGED)
    if count <= 1:
        return file
    found = _PART.fullmatch(path.name)
    if found is None or int(found[3]) != count:
        raise UserError(
            f"{path} is one of {count} parts of a model", f"its name must end in -00001-of-{count:05d}.gguf"
        )
    places = [path.with_name(f"{found[1]}-{n:05d}-of-{found[3]}.gguf") for n in range(1, count + 1)]
    if missing := [place.name for place in places if not place.is_file()]:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"{path} is one of {count} parts of a model, and {shown} is missing", "put all parts in one folder"
        )
    return _joined(path, [_read(place) for place in places])


def _joined(path: Path, parts: list[File]) -> File:
    """The parts of a model as one. The first one has the metadata."""
    tensors: dict[str, Entry] = {}
    for number, part in enumerate(parts):
        said = part.metadata.get(NUMBER), part.metadata.get(COUNT)
        if said != (number, len(parts)):
            raise UserError(
                f"{part.path} says that it is part {said[0]} of {said[1]}, not {number} of {len(parts)}", DAMAGED
            )
        if twice := tensors.keys() & part.tensors.keys():
            raise UserError(f"{part.path}: the tensor {min(twice)!r} is in another part too", DAMAGED)
        tensors |= {name: replace(entry, part=number) for name, entry in part.tensors.items()}
    total = parts[0].metadata.get(TOTAL, len(tensors))
    if total != len(tensors):
        raise UserError(f"{path}: the parts have {len(tensors)} tensors, but the model {total}", DAMAGED)
    return File(path, parts[0].metadata, tensors, tuple(part.mapped[0] for part in parts))


def _read(path: Path) -> File:
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)  # private: writes would not reach the file
    except ValueError:
        raise UserError(f"{path} is empty", DAMAGED) from None
    except OSError as error:
        raise UserError(f"cannot read {str(path)!r} ({error.strerror})", "give a GGUF file that can be read") from error
    return _Reading(path, mapped).file()


class _Reading:
    """A reading position in the file."""

    def __init__(self, path: Path, mapped: mmap.mmap) -> None:
        self.path, self.mapped, self.size, self.at = path, mapped, len(mapped), 0
        self.strings = 0  # in arrays, so far

    def refuse(self, reason: str, at: int | None = None, remedy: str = DAMAGED) -> NoReturn:
        raise UserError(f"{self.path}, byte {self.at if at is None else at}: {reason}", remedy)

    def file(self) -> File:
        if self.take(4, "the magic") != MAGIC:
            self.refuse(f"a GGUF file begins with {MAGIC.decode()}, but this file with {bytes(self.mapped[:4])!r}", 0)
        version = self.number(4, "the version")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            self.refuse(
                "the file is big-endian, but this reader supports little-endian only" if swapped else f"the file has version {version} of "
                f"the format, but this reader supports {' and '.join(map(str, VERSIONS))}",
                4, "convert it again with a current llama.cpp",
            )  # fmt: skip
        tensors, pairs = (self.count(what, 8) for what in ("tensors", "pairs of metadata"))
        metadata = dict(self.pairs(pairs))
        return File(self.path, metadata, self.entries(tensors, metadata), (self.mapped,))

    def pairs(self, count: int) -> Iterator[tuple[str, Any]]:
        seen: set[str] = set()
        for _ in range(count):
            start = self.at
            key = self.string("a key", LONGEST_KEY)
            if key in seen:
                self.refuse(f"the key {key!r} comes twice", start)
            seen.add(key)
            yield key, self.value(key, self.number(4, f"the type of {key}"))

    def value(self, key: str, kind: int) -> Any:
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            return self.array(key)
        value = self.numbers(key, kind, 1)[0]
        return float(str(value)) if kind == FLOAT32 else value.item()  # 1e-06 as written, not 9.99999997e-07

    def array(self, key: str) -> Any:
        start = self.at
        kind, count = self.number(4, f"the type in {key}"), self.number(8, f"the length of {key}")
        if kind != STRING:
            return self.numbers(key, kind, count)
        self.strings += count
        if self.strings > MOST["strings in arrays"] or count * 8 > self.size - self.at:
            self.refuse(f"{key} has {count} strings, more than the file can hold", start)
        return [self.string(f"a string of {key}") for _ in range(count)]

    def entries(self, count: int, metadata: Mapping[str, Any]) -> dict[str, Entry]:
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or not 8 <= alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
            self.refuse(f"general.alignment is {alignment!r}, not a power of two in 8 .. {LARGEST_ALIGNMENT}")
        found = [self.entry(alignment) for _ in range(count)]
        start = -(-self.at // alignment) * alignment
        placed: dict[str, Entry] = {}
        for at, entry in found:
            if entry.name in placed:
                self.refuse(f"the tensor {entry.name!r} comes twice", at)
            entry = Entry(entry.name, entry.shape, entry.kind, start + entry.offset, entry.nbytes)
            if entry.offset + entry.nbytes > self.size:
                self.refuse(
                    f"{entry.name} would end at byte {entry.offset + entry.nbytes}, but the file ends at {self.size}",
                    at,
                )
            placed[entry.name] = entry
        before = None
        for at, name in sorted((entry.offset, entry.name) for entry in placed.values()):
            if before is not None and at < before.offset + before.nbytes:
                self.refuse(f"{name} overlaps {before.name}", at)
            before = placed[name]
        return placed

    def entry(self, alignment: int) -> tuple[int, Entry]:
        """The position of a description, and its tensor, whose offset still counts from the first tensor."""
        start = self.at
        name = self.string("the name of a tensor", LONGEST_NAME)
        dimensions = self.number(4, f"the dimensions of {name}")
        if not 1 <= dimensions <= MOST_DIMENSIONS:
            self.refuse(f"{name} has {dimensions} dimensions, not 1 to {MOST_DIMENSIONS}", start)
        shape = tuple(self.number(8, f"the shape of {name}") for _ in range(dimensions))[::-1]
        number, offset = self.number(4, f"the type of {name}"), self.number(8, f"the offset of {name}")
        if number not in KINDS:
            kind = OTHERS.get(number, f"of type {number}")
            self.refuse(
                f"{name} is {kind}; MOYU supports {', '.join(BLOCKS)}", start,
                "make a file of another type from a 16-bit one: `llama-quantize IN.gguf OUT.gguf Q4_K_M`"
                if number in OTHERS else DAMAGED,
            )  # fmt: skip
        kind = KINDS[number]
        weights, size = BLOCKS[kind]
        if min(shape) < 1 or shape[-1] % weights:
            self.refuse(f"{name} has shape {shape}, but rows are made of blocks of {weights}", start)
        if offset % alignment:
            self.refuse(f"{name} is at offset {offset}, not a multiple of {alignment}", start)
        return start, Entry(name, shape, kind, offset, prod(shape) // weights * size)

    def count(self, what: str, size: int) -> int:
        at, count = self.at, self.number(size, f"the number of {what}")
        if count > MOST[what]:
            self.refuse(f"{count} {what}, more than {MOST[what]}", at)
        return count

    def number(self, size: int, what: str) -> int:
        return struct.unpack("<I" if size == 4 else "<Q", self.take(size, what))[0]

    def numbers(self, key: str, kind: int, count: int) -> np.ndarray:
        start = self.at
        if kind not in NUMBERS:
            self.refuse(f"{key} has values of type {kind}, which the format does not have" if kind != ARRAY else
                        f"{key} is an array of arrays", start)  # fmt: skip
        dtype = np.dtype(NUMBERS[kind])
        data = self.take(count * dtype.itemsize, key)
        if NUMBERS[kind] == "?" and max(data, default=0) > 1:
            self.refuse(f"{key} is neither true nor false", start)
        return np.frombuffer(data, dtype)

    def string(self, what: str, longest: int | None = None) -> str:
        start = self.at
        length = self.number(8, f"the length of {what}")
        if longest is not None and length > longest:
            self.refuse(f"{what} is {length} bytes long, more than {longest}", start)
        if longest is not None and not length:
            self.refuse(f"{what} is empty", start)
        try:
            return self.take(length, what).decode()
        except UnicodeDecodeError:
            self.refuse(f"{what} is not UTF-8", start)

    def take(self, count: int, what: str) -> bytes:
        if count > self.size - self.at:
            self.refuse(f"{what} takes {count} bytes, but the file ends after {self.size - self.at}")
        start, self.at = self.at, self.at + count
        return self.mapped[start : self.at]
