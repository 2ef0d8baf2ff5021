"""The zoo's text: Python sources that every machine with MOYU has, split by a hash of their names.

Training, validation and test files never share a name. A held-out file is dropped if more than a fifth of its 5-line
shingles occur in training. transformers' model files are for training only, because most of them repeat each other.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import random
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

Split = Literal["train", "validation", "test"]

ROOTS = ("torch", "transformers", "numpy", "typer", "rich", "jinja2", "pyyaml", "pydantic")
LISTING = Path(os.environ.get("MOYU_CORPUS") or Path(__file__).parent / "corpus.json")  # of the shipped models' data
SMALLEST, LARGEST = 200, 300_000  # bytes of a file
SHINGLE, SHARED = 5, 0.2  # lines of a shingle; share of them in training above which a held-out file is dropped
CALIBRATION_FILES = 400


@dataclass(frozen=True)
class Document:
    """One source file: package and path, and its text."""

    name: str  # "package/relative/path.py"
    text: str


def split_of(name: str) -> Split:
    """The split of a file, from its name alone."""
    if name.startswith("transformers/transformers/models/"):
        return "train"
    bucket = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 100
    return "train" if bucket < 92 else "validation" if bucket < 96 else "test"


def packages() -> list[str]:
    """Distributions whose sources are used: ROOTS and everything that they require."""
    seen: dict[str, None] = {}
    waiting = list(ROOTS)
    while waiting:
        name = re.sub(r"[-_.]+", "-", waiting.pop()).lower()
        if name in seen:
            continue
        try:
            needs = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        seen[name] = None
        waiting += [re.split(r"[\s\[<>=!~;(]", need)[0] for need in needs if "extra ==" not in need]
    return sorted(seen)


def versions() -> dict[str, str]:
    """What the text on this machine follows from: Python and the distributions whose sources are used."""
    return {name: importlib.metadata.version(name) for name in packages()} | {"python": platform.python_version()}


def files() -> Iterator[tuple[str, Path]]:
    """Every source file of the corpus on this machine: name and path."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for path in sorted(stdlib.rglob("*.py")):
        relative = path.relative_to(stdlib)
        if not {"site-packages", "dist-packages"} & set(relative.parts):
            yield f"stdlib/{relative.as_posix()}", path
    for package in packages():
        listed = importlib.metadata.distribution(package).files or []
        for entry in sorted(listed, key=str):
            if entry.suffix == ".py" and ".." not in entry.parts:
                yield f"{package}/{entry.as_posix()}", Path(str(entry.locate()))


def read(path: Path) -> str | None:
    """A file's text; None if it is missing, too short, too long or not UTF-8."""
    try:
        if not SMALLEST <= path.stat().st_size <= LARGEST:
            return None
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def collect() -> dict[Split, list[Document]]:
    """Read and split everything; slow, for training only."""
    splits: dict[Split, list[Document]] = {"train": [], "validation": [], "test": []}
    seen: set[bytes] = set()
    for name, path in files():
        text = read(path)
        if text is None:
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            splits[split_of(name)].append(Document(name, text))
    known = {shingle for d in splits["train"] for shingle in shingles(d.text)}
    for split in ("validation", "test"):
        splits[split] = [d for d in splits[split] if shared(d.text, known) <= SHARED]
    for documents in splits.values():
        documents.sort(key=lambda d: hashlib.sha256(d.name.encode()).digest())
        random.Random(0).shuffle(documents)
    return splits


def shingles(text: str) -> Iterator[int]:
    """Hashes of all runs of 5 non-blank lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (hash(tuple(lines[i : i + SHINGLE])) for i in range(len(lines) - SHINGLE + 1))


def shared(text: str, known: set[int]) -> float:
    """The fraction of a text's shingles that are known."""
    own = list(shingles(text))
    return sum(s in known for s in own) / len(own) if own else 1.0


def listing(splits: dict[Split, list[Document]]) -> dict[str, Any]:
    """The listing that ships with MOYU: held-out and calibration files, by name and hash."""
    entries = {
        split: [[d.name, _digest(d.text)] for d in splits[split][: CALIBRATION_FILES if split == "train" else None]]
        for split in ("train", "validation", "test")
    }
    versions = {p: importlib.metadata.version(p) for p in packages()}
    return {"files": entries, "versions": versions, "python": sysconfig.get_python_version()}


def train_documents(max_bytes: int | None = None) -> list[Document]:
    """Training files for calibration, in a fixed order, about `max_bytes` of them."""
    return _listed("train", max_bytes)


def held_out(split: Literal["validation", "test"] = "test", max_bytes: int | None = None) -> list[Document]:
    """Files that no zoo model was trained on, in a fixed order, about `max_bytes` of them.

    A file counts only if this machine has it as it was at training. If fewer than 20 count (another Python or torch), the
    standard library's files of the same split are used instead, and `fingerprint` says so.
    """
    return _listed(split, max_bytes)


def _listed(split: Split, max_bytes: int | None) -> list[Document]:
    documents = []
    size = 0
    for name, digest in _shipped()["files"][split]:
        text = read(_locate(name))
        if text is not None and _digest(text) == digest:
            documents.append(Document(name, text))
            size += len(text.encode())
            if max_bytes is not None and size >= max_bytes:
                return documents
    return documents if len(documents) >= 20 else _stand_in(split, max_bytes)


def _stand_in(split: Split, max_bytes: int | None) -> list[Document]:
    documents, size = [], 0
    stdlib = takewhile(lambda file: file[0].startswith("stdlib/"), files())
    candidates = [file for file in stdlib if split_of(file[0]) == split]
    random.Random(0).shuffle(candidates)
    for name, path in candidates:
        if max_bytes is not None and size >= max_bytes:
            break
        text = read(path)
        if text is not None:
            documents.append(Document(name, text))
            size += len(text.encode())
    return documents


def _locate(name: str) -> Path:
    package, _, relative = name.partition("/")
    if package == "stdlib":
        return Path(sysconfig.get_path("stdlib")) / relative
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(relative)))
    except importlib.metadata.PackageNotFoundError:
        return Path("/nonexistent")


@cache
def _shipped() -> dict[str, Any]:
    return json.loads(LISTING.read_text())


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(documents: Iterable[Document]) -> dict[str, Any]:
    """The identity of a text: documents, bytes, one hash over all, and whether all files are as they were at training."""
    documents = list(documents)
    listed = {n: d for split in _shipped()["files"].values() for n, d in split}
    total = hashlib.sha256()
    for document in documents:
        total.update(_digest(document.text).encode())
    return {
        "documents": len(documents),
        "bytes": sum(len(d.text.encode()) for d in documents),
        "sha256": total.hexdigest()[:16],
        "exact": bool(documents) and all(listed.get(d.name) == _digest(d.text) for d in documents),
    }


def shuffled(text: str, seed: int = 0) -> str:
    """The same words and spaces in random order: a control that keeps their frequencies and nothing else."""
    words = re.findall(r"\s+|\w+|[^\w\s]", text)
    random.Random(seed).shuffle(words)
    return "".join(words)
