"""The one kind of error that a user's input causes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
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
