"""The one kind of error that a user's input causes."""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


class UserError(ValueError):
    """Something the user gave cannot be used: what was wrong, and the next step."""

    def __init__(self, problem: str, next_step: str = "") -> None:
        """`problem` says what and where, `next_step` what to do about it; what does not print in them is escaped."""
        problem, next_step = _printable(problem), _printable(next_step)
        super().__init__(f"{problem}: {next_step}" if next_step else problem)
        self.problem = problem
        self.next_step = next_step


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def line_of(error: Exception, most: int = 300) -> str:
    """What an error of a library says, in one line of at most `most` characters."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextmanager
def panics_are_errors() -> Iterator[None]:
    """A panic of a library in Rust, which is no Exception, becomes a RuntimeError of its message.

    Rust prints a panic itself, with a trace: what comes to stderr in here, from whom ever, is held back and lost with a panic.
    """
    sys.stderr.flush()
    with tempfile.TemporaryFile() as held, os.fdopen(os.dup(2), "wb", buffering=0) as stderr:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            held.truncate(0)
            raise RuntimeError(str(error)) from error
        finally:
            sys.stderr.flush()
            os.dup2(stderr.fileno(), 2)
            held.seek(0)
            stderr.write(held.read())


class OutOfReach(UserError):
    """A byte fraction below a method's floor."""

    def __init__(self, byte_fraction: float, floor: float) -> None:
        """`floor` is the least byte fraction that the method can reach."""
        super().__init__(
            f"byte fraction {byte_fraction} is out of reach: n/a (floor {floor:.2f})", "ask for more bytes"
        )
        self.floor = floor


def check_one_of(kind: str, word: str, legal: Collection[str]) -> None:
    """Refuse a word that is none of these: `no back end is called 'foo': did you mean 'auto'? There are ...`. kind: `back end is`."""
    if word not in legal:
        near = difflib.get_close_matches(word, legal, n=1, cutoff=0.0)[0]
        raise UserError(f"no {kind} called {word!r}", f"did you mean {near!r}? There are {', '.join(legal)}")


def first_problem(error: Any) -> str:
    """The first thing that a pydantic ValidationError says, with its place: `parts[2].rule.top_k: input should be ...`."""
    found = error.errors(include_url=False)[0]
    place = place_of(found["loc"])
    said = f"{found['msg'][:1].lower()}{found['msg'][1:]}"
    return f"{place}: {said}" if place else said


def place_of(path: Iterable[str | int]) -> str:
    """A place in nested values, `layers[0].needed_mean`."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).removeprefix(".")
