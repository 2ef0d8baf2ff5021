"""Documents of a text file: articles of WikiText, lines of JSON, or pieces of any other text."""

from __future__ import annotations

import re
from pathlib import Path

from moyu.errors import UserError
from moyu.files import parse_json

TITLE = re.compile(r"^ = [^=\n].* = \n", re.MULTILINE)  # of an article of WikiText


def documents(file: Path, text: str) -> list[str]:
    """The documents of a file that has this text: of JSON lines their `text`, of WikiText its articles, of any other file the whole.

    Raises UserError, with the line, for JSON lines without a `text`.
    """
    if file.suffix != ".jsonl":
        starts = [m.start() for m in TITLE.finditer(text)] or [0]
        return [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(parse_json(line)["text"])
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{file}:{number} is no document", 'give lines like {"text": "..."}') from None
    return found


def pieces(text: str, length: int) -> list[str]:
    """A text in pieces of `length` characters, each of which stands for a document; the rest goes with the last one."""
    count = max(1, len(text) // length)
    return [text[n * length : (n + 1) * length if n < count - 1 else len(text)] for n in range(count)]
