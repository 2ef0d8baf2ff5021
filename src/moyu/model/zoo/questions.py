"""Questions about held-out Python sources: the data of the tasks in `zoo/tasks`, in the format of lm-evaluation-harness.

The sources are the zoo's test split, which no embedded model was trained on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from typing import Any

from moyu.model.zoo import corpus

LINES = 8  # of context before a question
CHOICES = 4
ASSIGNMENT = re.compile(r"(\s+self\.\w+ =) (\w{2,20})")


def next_line(count: int = 200, **_: Any) -> dict[str, Any]:
    """Which of four lines comes next: `context`, `choices`, and `answer`, the index of the right line.

    The wrong lines come from elsewhere in the same file and have the right line's indentation.
    """

    def ask(lines: list[str], rng: random.Random) -> Iterator[dict[str, Any]]:
        usable = [n for n in range(LINES, len(lines)) if len(lines[n].strip()) >= 12]
        if len(usable) < 4 * CHOICES:
            return
        n = rng.choice(usable)
        right = lines[n]
        indent = right[: len(right) - len(right.lstrip())]
        far = dict.fromkeys(indent + lines[m].strip() for m in usable if abs(m - n) > LINES)
        wrong = [line for line in far if line != right]
        if len(wrong) >= CHOICES - 1:
            choices = rng.sample([right, *rng.sample(wrong, CHOICES - 1)], CHOICES)
            yield {"context": _before(lines, n), "choices": choices, "answer": choices.index(right)}

    return _dataset(ask, count)


def assignment(count: int = 200, **_: Any) -> dict[str, Any]:
    """The value of an attribute: `context` up to `self.name =`, and `target`, the one word after it."""

    def ask(lines: list[str], rng: random.Random) -> Iterator[dict[str, Any]]:
        found = [(n, match) for n, line in enumerate(lines) if n >= LINES and (match := ASSIGNMENT.fullmatch(line))]
        for n, match in rng.sample(found, min(3, len(found))):
            yield {"context": _before(lines, n) + match[1], "target": match[2]}

    return _dataset(ask, count)


def _before(lines: list[str], n: int) -> str:
    return "\n".join(lines[n - LINES : n]) + "\n"


def _dataset(ask: Any, count: int) -> dict[str, Any]:
    """The first `count` questions that `ask` makes from the documents, as the split `test`."""
    from datasets import Dataset  # comes with lm-eval  # pyright: ignore[reportMissingImports]

    rng, rows = random.Random(0), []
    for document in corpus.held_out("test"):
        rows += ask(document.text.splitlines(), rng)
    return {"test": Dataset.from_list(rows[:count])}
