"""Texts of different kinds that every machine with MOYU has, and a proof that they differ.

Source code by package and style, English manuals and documentation, generated arithmetic, structured data. None is
downloaded. `cross_perplexity` tests a byte model of each domain on the text of every other one.
"""

from __future__ import annotations

import ast
import csv
import importlib
import importlib.metadata
import io
import json
import random
import sysconfig
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moyu.errors import UserError
from moyu.model import zoo
from moyu.model.zoo.corpus import Document
from moyu.research.studies.subject import Subject

SMALLEST = 1200  # bytes of a document
GENERATED = 240  # documents of a generated domain
WORDS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen",
    "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gil",
    "Hana",
    "Ivo",
    "June",
    "Kai",
    "Lena",
    "Milo",
    "Nora",
    "Otto",
    "Tara",
)
TOWNS = ("Oslo", "Lima", "Cairo", "Quito", "Delhi", "Seoul", "Turin", "Porto", "Kyoto", "Dakar")


def _code(symbolic: bool) -> list[str]:
    """Python files that no zoo model was trained on: of the computer algebra packages, or of all others."""
    files: list[Document] = [*zoo.corpus.held_out("test"), *zoo.corpus.held_out("validation")]
    return [d.text for d in files if d.name.startswith(("sympy/", "mpmath/")) == symbolic]


def _headers() -> list[str]:
    """C++ headers that come with torch."""
    root = Path(str(importlib.metadata.distribution("torch").locate_file("torch/include/ATen")))
    found = sorted(root.rglob("*.h"))
    random.Random(0).shuffle(found)
    return [text for p in found[:400] if (text := zoo.corpus.read(p))]


def _manuals() -> list[str]:
    """Python's help topics, and the descriptions of installed packages."""
    topics = importlib.import_module("pydoc_data.topics").topics
    own = [str(topics[name]) for name in sorted(topics)]
    packages = sorted(importlib.metadata.distributions(), key=lambda d: d.name.lower())
    return own + [(d.read_text("METADATA") or "").partition("\n\n")[2] for d in packages]


def _docstrings() -> list[str]:
    """The documentation strings of the standard library's and torch's modules, one document per module."""
    root = Path(sysconfig.get_path("stdlib"))
    found = [p for p in sorted(root.rglob("*.py")) if not {"site-packages", "test"} & set(p.parts)]
    random.Random(0).shuffle(found)
    texts = []
    for path in found[:400]:
        text = zoo.corpus.read(path)
        if text is None:
            continue
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        parts = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds)]
        texts.append("\n\n".join(p for p in parts if p))
    return texts


def spelled(number: int) -> str:
    """A number below 1000 in English words."""
    if number < 20:
        return WORDS[number]
    if number < 100:
        return TENS[number // 10] + ("" if number % 10 == 0 else f"-{WORDS[number % 10]}")
    rest = number % 100
    return f"{WORDS[number // 100]} hundred" + (f" and {spelled(rest)}" if rest else "")


def _generated(write: Callable[[random.Random], str]) -> list[str]:
    return [write(random.Random(index)) for index in range(GENERATED)]


def _arithmetic(rng: random.Random) -> str:
    lines = []
    for _ in range(120):
        a, b = rng.randrange(1000), rng.randrange(1000)
        lines.append(rng.choice((f"{a} + {b} = {a + b}", f"{a} - {b} = {a - b}", f"{a} * {b} = {a * b}")))
    return "\n".join(lines)


def people(rng: random.Random, count: int) -> list[dict[str, object]]:
    """Records of invented people."""
    return [
        {"id": rng.randrange(10_000), "name": rng.choice(NAMES), "town": rng.choice(TOWNS), "age": rng.randrange(18, 90),
         "score": round(rng.random() * 100, 2), "active": rng.random() < 0.5}
        for _ in range(count)
    ]  # fmt: skip


def _json(rng: random.Random) -> str:
    return json.dumps(people(rng, 40), indent=rng.choice((None, 1, 2)))


def _table(rng: random.Random) -> str:
    rows = people(rng, 90)
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _log(rng: random.Random) -> str:
    lines, second = [], rng.randrange(86_400)
    for _ in range(70):
        second += rng.randrange(9)
        level = rng.choice(("INFO", "INFO", "WARNING", "ERROR"))
        client = ".".join(str(rng.randrange(256)) for _ in range(4))
        path = f"/{rng.choice(NAMES).lower()}/{rng.randrange(500)}"
        clock = f"{second // 3600 % 24:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
        lines.append(
            f"2026-03-0{rng.randrange(1, 10)} {clock} {level} {client} GET {path} {rng.choice((200, 200, 304, 404, 500))}"
        )
    return "\n".join(lines)


DOMAINS: dict[str, Callable[[], list[str]]] = {
    "library": lambda: _code(symbolic=False),
    "manuals": _manuals,
    "arithmetic": lambda: _generated(_arithmetic),
    "headers": _headers,
    "json": lambda: _generated(_json),
    "symbolic": lambda: _code(symbolic=True),
    "docstrings": _docstrings,
    "tables": lambda: _generated(_table),
    "logs": lambda: _generated(_log),
}
MEANING = {
    "library": "Python of libraries and their tests",
    "manuals": "English of help topics and package descriptions",
    "arithmetic": "generated sums, differences and products",
    "headers": "C++ headers of torch",
    "json": "generated JSON records",
    "symbolic": "Python of computer algebra",
    "docstrings": "English inside the standard library's documentation strings",
    "tables": "generated comma-separated tables",
    "logs": "generated logs of a server",
}


@cache
def documents(domain: str) -> tuple[str, ...]:
    """The documents of a domain, each of at least `SMALLEST` bytes, no two equal, in a fixed order."""
    texts = [t for t in dict.fromkeys(DOMAINS[domain]()) if len(t.encode()) >= SMALLEST]
    random.Random(0).shuffle(texts)
    return tuple(texts)


def windows(subject: Subject, domain: str, count: int, length: int, *, skip: int = 0, seed: int = 0) -> Tensor:
    """`count` windows of BOS and `length` - 1 tokens, each from a document of its own: (count, length).

    skip: documents to leave out, so that two calls share none. Raises UserError if the domain has too few.
    """
    rng = random.Random(seed)
    rows = []
    for text in documents(domain)[skip:]:
        ids = subject.encode(text[: 40 * length])
        if len(ids) >= length:
            start = rng.randrange(len(ids) - length + 2)
            rows.append([subject.bos, *ids[start : start + length - 1]])
        if len(rows) == count:
            return torch.tensor(rows)
    raise UserError(
        f"domain {domain!r} has {len(rows)} documents of {length} tokens behind the first {skip}, fewer than {count}",
        "a smaller study is `--quick`",
    )


def unigrams(subject: Subject, texts: Tensor, shape: Sequence[int], seed: int = 0) -> Tensor:
    """Tokens drawn at random with the frequencies of `texts`, BOS first: -> shape (B, T)."""
    generator = torch.Generator().manual_seed(seed)
    flat = texts[:, 1:].flatten()
    drawn = flat[torch.randint(len(flat), tuple(shape), generator=generator)]
    drawn[:, 0] = subject.bos
    return drawn


class ByteModel:
    """An interpolated trigram model of bytes (Witten-Bell): enough to tell kinds of text apart."""

    ORDER = 3

    def __init__(self, texts: Sequence[str]) -> None:
        """Count the n-grams of texts."""
        self.tables = [self._count(texts, order) for order in range(1, self.ORDER + 1)]

    @staticmethod
    def _grams(text: str, order: int) -> np.ndarray:
        """Codes of all trigrams without collisions, (n,) int64, one per byte from the third on."""
        data = np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)
        start = ByteModel.ORDER - order
        parts = [data[start + i : len(data) - order + 1 + i] for i in range(order)]
        return sum((p << 8 * (order - 1 - i) for i, p in enumerate(parts)), np.zeros_like(parts[0]))

    def _count(self, texts: Sequence[str], order: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        grams, counts = np.unique(np.concatenate([self._grams(t, order) for t in texts]), return_counts=True)
        contexts, index = np.unique(grams >> 8, return_inverse=True)
        totals, kinds = np.bincount(index, weights=counts), np.bincount(index)
        return grams, counts, contexts, np.stack([totals, kinds])

    def bits(self, text: str) -> float:
        """Bits per byte of a text."""
        probability = np.full(len(text.encode()) - self.ORDER + 1, 1 / 256)
        for order, (grams, counts, contexts, sizes) in enumerate(self.tables, 1):
            own = self._grams(text, order)
            count = _look_up(grams, counts, own)
            total, kinds = (_look_up(contexts, row, own >> 8) for row in sizes)
            seen = total > 0
            mixed = (count + kinds * probability) / np.where(seen, total + kinds, 1)
            probability = np.where(seen, mixed, probability)
        return float(-np.log2(probability).mean())


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    at = np.searchsorted(keys, wanted).clip(max=len(keys) - 1)
    return np.where(keys[at] == wanted, values[at], 0).astype(np.float64)


def cross_perplexity(names: Sequence[str], texts: int, size: int = 4000) -> np.ndarray:
    """Bits per byte of a model of domain i on each held-out document of domain j: (D, D, texts).

    The model reads `texts` documents, cut to `size` bytes; it is tested on other documents.
    """
    out = np.full((len(names), len(names), texts), np.nan)
    cut = {n: [t.encode()[:size].decode(errors="ignore") for t in documents(n)[: 2 * texts]] for n in names}
    for i, name in enumerate(names):
        model = ByteModel(cut[name][::2])
        for j, other in enumerate(names):
            for k, text in enumerate(cut[other][1::2]):
                out[i, j, k] = model.bits(text)
    return out
